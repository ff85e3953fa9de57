//! [`Tree`]: the collective of processors, over TCP; reductions through shared memory where all ranks are on one host.
//!
//! The elements are cut into as many chunks as there are ranks. Rank `c` gets everyone's parts of chunk `c`, adds them along
//! the tree, and sends the sum to all: each rank sends and receives about twice the buffer, whatever the world size, and one
//! rank alone decides the order of every sum.
//!
//! Law: each peer has a thread that only reads, so a peer's write always makes progress and two ranks that send at once
//! cannot block each other. The calling thread writes straight from the caller's buffers.

use super::error::Error;
use super::local::{Local, Offer};
use super::tree;
use super::wire::{self, Buffer, Header, Kind};
use super::{Collective, Element};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thaw_core::sampler::ranks_shards;
use thaw_core::sampler::tree::maximal_subtrees;
use thaw_proto::ids::Rank;

/// Below this a frame goes out in one write, so that it is one packet and one wake-up.
const COALESCE_BYTES: usize = 64 << 10;
/// A peer is at most three frames ahead; the next waits in the socket.
const MAX_QUEUED: usize = 4;

/// A collective over TCP, or of one rank alone.
#[derive(Debug)]
pub struct Tree {
    rank: u32,
    world_size: u32,
    shards: u32,
    deadline: Duration,
    /// Number of the next operation. Held during an operation: there is one at a time.
    sequence: Mutex<u64>,
    /// In rank order; `None` is this rank.
    peers: Vec<Option<Peer>>,
    shared: Arc<Shared>,
    /// Where all ranks share a host.
    local: Option<Local>,
}

#[derive(Debug)]
struct Peer {
    stream: TcpStream,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    changed: Condvar,
    spare: Mutex<Vec<Buffer>>,
}

#[derive(Debug, Default)]
struct Inbox {
    /// Frames not yet used, by rank.
    frames: Vec<VecDeque<(Header, Buffer)>>,
    /// Peers whose connection ended, in the order in which that was seen.
    lost: Vec<(u32, Option<Arc<io::Error>>)>,
    /// The first error; every later operation returns it.
    failed: Option<Error>,
    closed: bool,
}

/// An operation in flight.
pub(super) struct Operation {
    sequence: u64,
    kind: Kind,
    elements: u64,
    end: Instant,
    limit: Duration,
}

impl Operation {
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    pub(super) fn mismatch(&self, what: String) -> Error {
        Error::Mismatch { operation: self.kind.name(), sequence: self.sequence, what }
    }

    fn too_late(&self, missing: Vec<u32>) -> Error {
        Error::Deadline { operation: self.kind.name(), sequence: self.sequence, deadline: self.limit, missing }
    }

    fn lost(&self, rank: u32, source: Option<Arc<io::Error>>) -> Error {
        Error::PeerLost { operation: self.kind.name(), sequence: self.sequence, rank, source }
    }

    fn left(&self) -> Option<Duration> {
        self.end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }
}

impl Tree {
    /// A gang of one, for a trainer that has no peers.
    #[must_use]
    pub fn alone(shards: u32) -> Self {
        Self::start(0, shards, Duration::MAX, vec![None]).expect("no thread is started without peers")
    }

    /// Takes over one checked connection per peer, in rank order.
    pub(super) fn start(
        rank: u32,
        shards: u32,
        deadline: Duration,
        streams: Vec<Option<TcpStream>>,
    ) -> io::Result<Self> {
        let world_size = u32::try_from(streams.len()).expect("ranks are u32");
        let frames = streams.iter().map(|_| VecDeque::new()).collect();
        let shared = Arc::new(Shared { inbox: Mutex::new(Inbox { frames, ..Inbox::default() }), ..Shared::default() });
        let mut tree = Self {
            rank,
            world_size,
            shards,
            deadline,
            sequence: Mutex::new(0),
            peers: Vec::new(),
            shared,
            local: None,
        };
        for (peer, stream) in (0..).zip(streams) {
            // Pushed one by one: where a thread cannot start, dropping `tree` joins those before it.
            let peer = stream.map(|stream| tree.start_peer(peer, stream)).transpose()?;
            tree.peers.push(peer);
        }
        Ok(tree)
    }

    /// Lets reductions pass through shared memory, where every rank can map every other's (all decide the same).
    ///
    /// # Errors
    /// Where the ranks cannot exchange what they found.
    pub(super) fn share_memory(&mut self, token: [u8; 32]) -> Result<(), Error> {
        if self.world_size == 1 {
            return Ok(());
        }
        let offer = Offer::new(self.world_size, self.shards, token);
        let offers = self.all_gather(&offer.as_ref().map(Offer::encode).unwrap_or_default())?;
        let local = offer.ok().and_then(|offer| offer.map(self.rank, &offers));
        let all = self.all_gather(&[u8::from(local.is_some())])?;
        self.local = local.filter(|_| all.iter().all(|found| found == &[1]));
        tracing::debug!(rank = self.rank, shared_memory = self.local.is_some(), "built the collective");
        Ok(())
    }

    /// Whether reductions pass through shared memory.
    #[must_use]
    pub fn shares_memory(&self) -> bool {
        self.local.is_some()
    }

    fn start_peer(&self, rank: u32, stream: TcpStream) -> io::Result<Peer> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(None)?;
        stream.set_nodelay(true)?;
        let (shared, incoming) = (self.shared.clone(), stream.try_clone()?);
        let reader = std::thread::Builder::new()
            .name(format!("reduce-from-{rank}"))
            .spawn(move || shared.read_from(rank, incoming))?;
        Ok(Peer { stream, reader: Some(reader) })
    }

    fn others(&self) -> impl Iterator<Item = (u32, &Peer)> {
        // Staggered, so that not all ranks send to rank 0 first.
        (1..self.world_size)
            .map(|offset| (self.rank + offset) % self.world_size)
            .filter_map(|rank| self.peers.get(rank as usize).and_then(Option::as_ref).map(|peer| (rank, peer)))
    }

    fn operate<R>(
        &self,
        kind: Kind,
        elements: usize,
        run: impl FnOnce(&Operation) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let mut sequence = self.sequence.lock().expect("no code that holds the lock panics");
        if let Some(failed) = &self.shared.inbox().failed {
            return Err(failed.clone());
        }
        let now = Instant::now();
        // A deadline beyond the clock's end is none; a year stands for it.
        let end = now.checked_add(self.deadline).unwrap_or(now + Duration::from_secs(365 * 24 * 3600));
        let operation = Operation { sequence: *sequence, kind, elements: elements as u64, end, limit: self.deadline };
        let result = run(&operation);
        *sequence += 1;
        if let Err(error) = &result {
            self.fail(error.clone());
        }
        // An abort during the last copy also counts: nobody may take the result for finished (COLL-2).
        match &self.shared.inbox().failed {
            Some(failed) => Err(failed.clone()),
            None => result,
        }
    }

    /// Ends everything with `error`, unless something ended it before.
    fn fail(&self, error: Error) {
        self.shared.inbox().failed.get_or_insert(error);
        self.shared.changed.notify_all();
        for (_, peer) in self.others() {
            // Wakes our reader and writer, and tells the peer at once.
            let _already_closed = peer.stream.shutdown(Shutdown::Both);
        }
    }

    fn send(&self, operation: &Operation, phase: u8, to: (u32, &Peer), payload: &[&[u8]]) -> Result<(), Error> {
        let bytes: usize = payload.iter().map(|part| part.len()).sum();
        let header = Header {
            sequence: operation.sequence,
            kind: operation.kind,
            phase,
            elements: operation.elements,
            payload_bytes: bytes as u64,
        };
        let mut first = header.encode().to_vec();
        if bytes <= COALESCE_BYTES {
            first.extend(payload.iter().flat_map(|part| part.iter()));
            return self.write(operation, to, &first);
        }
        self.write(operation, to, &first)?;
        payload.iter().try_for_each(|part| self.write(operation, to, part))
    }

    fn write(&self, operation: &Operation, (rank, peer): (u32, &Peer), mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let left = operation.left().ok_or_else(|| operation.too_late(vec![rank]))?;
            let written = peer.stream.set_write_timeout(Some(left)).and_then(|()| (&peer.stream).write(bytes));
            match written {
                Ok(0) => return Err(operation.lost(rank, None)),
                Ok(written) => bytes = &bytes[written..],
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {}
                    _ => return Err(operation.lost(rank, Some(Arc::new(error)))),
                },
            }
        }
        Ok(())
    }

    /// One frame of the phase from every peer, in rank order; `None` is this rank.
    fn receive(&self, operation: &Operation, phase: u8) -> Result<Vec<Option<Buffer>>, Error> {
        let mut inbox = self.shared.inbox();
        loop {
            if let Some(failed) = &inbox.failed {
                return Err(failed.clone());
            }
            let missing: Vec<u32> =
                self.others().map(|(rank, _)| rank).filter(|rank| inbox.frames[*rank as usize].is_empty()).collect();
            if missing.is_empty() {
                break;
            }
            if inbox.lost.iter().any(|(rank, _)| missing.contains(rank)) {
                // The first to go took the others with it.
                let (rank, source) = inbox.lost[0].clone();
                return Err(operation.lost(rank, source));
            }
            let left = operation.left().ok_or_else(|| operation.too_late(missing))?;
            inbox = self.shared.changed.wait_timeout(inbox, left).expect("no code that holds the lock panics").0;
        }
        let mut received = Vec::with_capacity(self.peers.len());
        for (rank, frames) in (0..).zip(&mut inbox.frames) {
            let Some((header, buffer)) = frames.pop_front() else {
                received.push(None);
                continue;
            };
            check(operation, phase, rank, header)?;
            received.push(Some(buffer));
        }
        drop(inbox);
        self.shared.changed.notify_all();
        Ok(received)
    }

    fn reduce<E: Element>(&self, parts: &[&[E]], out: &mut [E]) -> Result<(), Error> {
        self.operate(E::KIND, out.len(), |operation| {
            let mine = self.subtrees(self.rank);
            if parts.len() != mine.len() || parts.iter().any(|part| part.len() != out.len()) {
                let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
                return Err(operation.mismatch(format!(
                    "rank {} gives parts of {lengths:?} elements for its subtrees {mine:?} of {} elements",
                    self.rank,
                    out.len()
                )));
            }
            if let Some(local) = &self.local {
                return local.reduce(operation, &Waiting { shared: &self.shared }, parts, out);
            }
            for (rank, peer) in self.others() {
                let chunk = self.chunk(rank, out.len());
                let payload: Vec<&[u8]> = parts.iter().map(|part| bytemuck::cast_slice(&part[chunk.clone()])).collect();
                self.send(operation, 0, (rank, peer), &payload)?;
            }
            let own = self.chunk(self.rank, out.len());
            let received = self.receive(operation, 0)?;
            self.add_parts(operation, parts, &received, own.clone(), &mut out[own.clone()])?;
            self.shared.recycle(received);
            for (rank, peer) in self.others() {
                self.send(operation, 1, (rank, peer), &[bytemuck::cast_slice(&out[own.clone()])])?;
            }
            let received = self.receive(operation, 1)?;
            for (rank, buffer) in (0..).zip(&received) {
                let Some(buffer) = buffer else { continue };
                let room = &mut out[self.chunk(rank, operation.elements as usize)];
                match buffer.as_elements::<E>() {
                    Some(sum) if sum.len() == room.len() => room.copy_from_slice(sum),
                    _ => return Err(wrong_length(operation, rank, buffer, size_of_val(room))),
                }
            }
            self.shared.recycle(received);
            Ok(())
        })
    }

    /// The sum over all shards of one chunk.
    fn add_parts<E: Element>(
        &self,
        operation: &Operation,
        mine: &[&[E]],
        received: &[Option<Buffer>],
        chunk: Range<usize>,
        sum: &mut [E],
    ) -> Result<(), Error> {
        if sum.is_empty() {
            return Ok(());
        }
        let mut parts: Vec<(Range<u32>, &[E])> = Vec::new();
        for (rank, buffer) in (0..).zip(received) {
            let subtrees = self.subtrees(rank);
            let Some(buffer) = buffer else {
                parts.extend(subtrees.into_iter().zip(mine.iter().map(|part| &part[chunk.clone()])));
                continue;
            };
            match buffer.as_elements::<E>() {
                Some(values) if values.len() == subtrees.len() * sum.len() => {
                    parts.extend(subtrees.into_iter().zip(values.chunks_exact(sum.len())));
                }
                _ => {
                    return Err(wrong_length(operation, rank, buffer, subtrees.len() * size_of_val(sum)));
                }
            }
        }
        tree::sum(self.shards, &parts, sum);
        Ok(())
    }

    /// What `rank` gives a sum of: one part for each of these nodes.
    fn subtrees(&self, rank: u32) -> Vec<Range<u32>> {
        maximal_subtrees(ranks_shards(rank, self.world_size, self.shards), self.shards)
    }

    /// Elements that `rank` adds.
    fn chunk(&self, rank: u32, elements: usize) -> Range<usize> {
        let bound = |rank: u32| {
            let bound = elements as u128 * u128::from(rank) / u128::from(self.world_size);
            usize::try_from(bound).expect("a bound is at most the number of elements")
        };
        bound(rank)..bound(rank + 1)
    }
}

fn check(operation: &Operation, phase: u8, rank: u32, found: Header) -> Result<(), Error> {
    let expected = (operation.sequence, operation.kind, phase, operation.elements);
    if (found.sequence, found.kind, found.phase, found.elements) == expected {
        return Ok(());
    }
    Err(operation.mismatch(format!(
        "rank {rank} is in {} {} phase {} with {} elements, this one in phase {phase} with {}",
        found.kind.name(),
        found.sequence,
        found.phase,
        found.elements,
        operation.elements,
    )))
}

fn wrong_length(operation: &Operation, rank: u32, buffer: &Buffer, expected: usize) -> Error {
    operation.mismatch(format!("rank {rank} sent {} bytes, expected {expected}", buffer.as_bytes().len()))
}

/// What ends a wait that is not for a frame.
pub(super) struct Waiting<'a> {
    shared: &'a Shared,
}

impl Waiting<'_> {
    /// Why waiting for `rank` has no sense any more.
    pub(super) fn ended(&self, operation: &Operation, rank: u32) -> Option<Error> {
        let inbox = self.shared.inbox();
        if let Some(failed) = &inbox.failed {
            return Some(failed.clone());
        }
        // Who was seen to go first is named, even where another one is waited for: that one fails because of it.
        if let Some((lost, source)) = inbox.lost.first().filter(|_| inbox.lost.iter().any(|(lost, _)| *lost == rank)) {
            return Some(operation.lost(*lost, source.clone()));
        }
        operation.left().is_none().then(|| operation.too_late(vec![rank]))
    }
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().expect("no code that holds the lock panics")
    }

    fn read_from(&self, rank: u32, mut stream: TcpStream) {
        let cause = loop {
            let mut buffer = self.spare.lock().expect("no code that holds the lock panics").pop().unwrap_or_default();
            let header = match wire::read_frame(&mut stream, &mut buffer) {
                Ok(Some(header)) => header,
                Ok(None) => break None,
                Err(error) => break Some(Arc::new(error)),
            };
            let mut inbox = self.inbox();
            while inbox.frames[rank as usize].len() >= MAX_QUEUED && inbox.failed.is_none() && !inbox.closed {
                inbox = self.changed.wait(inbox).expect("no code that holds the lock panics");
            }
            inbox.frames[rank as usize].push_back((header, buffer));
            self.changed.notify_all();
        };
        self.inbox().lost.push((rank, cause));
        self.changed.notify_all();
    }

    fn recycle(&self, buffers: Vec<Option<Buffer>>) {
        self.spare.lock().expect("no code that holds the lock panics").extend(buffers.into_iter().flatten());
    }
}

impl Collective for Tree {
    fn rank(&self) -> Rank {
        Rank(self.rank)
    }

    fn world_size(&self) -> u32 {
        self.world_size
    }

    fn shards(&self) -> u32 {
        self.shards
    }

    fn reduce_shards_f32(&self, parts: &[&[f32]], out: &mut [f32]) -> Result<(), Error> {
        self.reduce(parts, out)
    }

    fn reduce_shards_f64(&self, parts: &[&[f64]], out: &mut [f64]) -> Result<(), Error> {
        self.reduce(parts, out)
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        self.operate(Kind::AllGather, 0, |operation| {
            for (rank, peer) in self.others() {
                self.send(operation, 0, (rank, peer), &[bytes])?;
            }
            let received = self.receive(operation, 0)?;
            let gathered =
                received.iter().map(|buffer| buffer.as_ref().map_or(bytes, Buffer::as_bytes).to_vec()).collect();
            self.shared.recycle(received);
            Ok(gathered)
        })
    }

    fn lost_peer(&self) -> Option<Rank> {
        self.shared.inbox().lost.first().map(|(rank, _)| Rank(*rank))
    }

    fn abort(&self) {
        self.fail(Error::Aborted);
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.shared.inbox().closed = true;
        self.shared.changed.notify_all();
        for peer in self.peers.iter_mut().flatten() {
            // What was written still arrives: the end of the stream is queued behind it.
            let _already_closed = peer.stream.shutdown(Shutdown::Both);
            if let Some(reader) = peer.reader.take() {
                let _panicked = reader.join();
            }
        }
    }
}
