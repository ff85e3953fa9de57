//! [`Peers`]: a connection to every other rank, frames over it, and one operation at a time.
//!
//! Law: each peer has a thread that only reads, so a peer's write always makes progress and two ranks that send at once
//! cannot block each other. The calling thread writes straight from the caller's buffers. Over other [`Links`] than sockets there are no
//! such threads: frames are fetched as they are waited for.

use super::error::Error;
use super::ring::Record;
use super::wire::{self, Buffer, Header, Kind};
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thaw_proto::ids::Rank;

/// Below this a frame goes out in one write, so that it is one packet and one wake-up.
const COALESCE_BYTES: usize = 64 << 10;
/// A peer is at most three frames ahead; the next waits in the socket.
const MAX_QUEUED: usize = 4;

/// What carries the frames of a gang where that is not the system's sockets.
pub trait Links: fmt::Debug + Send + Sync {
    /// Sends a frame, and does not wait until it arrives.
    ///
    /// # Errors
    /// That rank is gone.
    fn send(&self, to: Rank, frame: Vec<u8>) -> io::Result<()>;

    /// Waits for the next frame of each of these ranks, in their order.
    ///
    /// # Errors
    /// Which of them is gone, and how that was seen.
    fn receive(&self, from: &[Rank]) -> Result<Vec<Vec<u8>>, (Rank, io::Error)>;
}

/// The connections of one rank.
#[derive(Debug)]
pub(super) struct Peers {
    rank: u32,
    world_size: u32,
    deadline: Duration,
    /// Number of the next operation. Held during an operation: there is one at a time.
    sequence: Mutex<u64>,
    /// Of what was entered and left.
    record: Record,
    /// One for each socket.
    readers: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

/// What the threads that read share with the one that calls.
#[derive(Debug)]
pub(super) struct Shared {
    carrier: Carrier,
    inbox: Mutex<Inbox>,
    changed: Condvar,
    spare: Mutex<Vec<Buffer>>,
}

#[derive(Debug)]
enum Carrier {
    /// In rank order; `None` is this rank.
    Sockets(Vec<Option<TcpStream>>),
    Links(Arc<dyn Links>),
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
#[derive(Debug)]
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

impl Peers {
    /// Takes over one checked connection per peer, in rank order.
    pub(super) fn start(
        rank: u32,
        deadline: Duration,
        streams: Vec<Option<TcpStream>>,
        record: Record,
    ) -> io::Result<Self> {
        for stream in streams.iter().flatten() {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(None)?;
            stream.set_nodelay(true)?;
        }
        let world_size = u32::try_from(streams.len()).expect("ranks are u32");
        let mut peers = Self::among(rank, world_size, deadline, Carrier::Sockets(streams), record);
        for (peer, stream) in peers.shared.sockets() {
            let (shared, incoming) = (Arc::clone(&peers.shared), stream.try_clone()?);
            // Pushed one by one: where a thread cannot start, dropping `peers` joins those before it.
            let reader = std::thread::Builder::new().name(format!("reduce-from-{peer}"));
            peers.readers.push(reader.spawn(move || shared.read_from(peer, incoming))?);
        }
        Ok(peers)
    }

    /// Speaks to `world_size` ranks, itself among them, over `links`.
    pub(super) fn over(rank: u32, world_size: u32, links: Arc<dyn Links>) -> Self {
        Self::among(rank, world_size, Duration::MAX, Carrier::Links(links), Record::default())
    }

    fn among(rank: u32, world_size: u32, deadline: Duration, carrier: Carrier, record: Record) -> Self {
        let frames = (0..world_size).map(|_| VecDeque::new()).collect();
        let inbox = Mutex::new(Inbox { frames, ..Inbox::default() });
        let shared = Shared { carrier, inbox, changed: Condvar::new(), spare: Mutex::default() };
        let shared = Arc::new(shared);
        Self { rank, world_size, deadline, sequence: Mutex::new(0), record, readers: Vec::new(), shared }
    }

    pub(super) fn rank(&self) -> u32 {
        self.rank
    }

    pub(super) fn world_size(&self) -> u32 {
        self.world_size
    }

    pub(super) fn record(&self) -> &Record {
        &self.record
    }

    /// What can end everything from outside, without keeping it.
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// All other ranks. Staggered, so that not all ranks send to rank 0 first.
    pub(super) fn others(&self) -> impl Iterator<Item = u32> {
        let (rank, world_size) = (self.rank, self.world_size());
        (1..world_size).map(move |offset| (rank + offset) % world_size)
    }

    /// Runs the next operation, and ends everything where it fails. This rank gives so many bytes to it.
    pub(super) fn operate<R>(
        &self,
        kind: Kind,
        elements: usize,
        bytes: usize,
        run: impl FnOnce(&Operation) -> Result<R, Error>,
    ) -> Result<R, Error> {
        self.operate_until(None, kind, elements, bytes, run)
    }

    /// As [`Self::operate`], with a deadline of its own where it is given one.
    pub(super) fn operate_until<R>(
        &self,
        deadline: Option<Instant>,
        kind: Kind,
        elements: usize,
        bytes: usize,
        run: impl FnOnce(&Operation) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let mut sequence = self.sequence.lock().expect("no code that holds the lock panics");
        if let Some(failed) = &self.shared.inbox().failed {
            return Err(failed.clone());
        }
        let now = Instant::now();
        let limit = deadline.map_or(self.deadline, |deadline| deadline.saturating_duration_since(now));
        // A deadline beyond the clock's end is none; a year stands for it.
        let end = now.checked_add(limit).unwrap_or(now + Duration::from_secs(365 * 24 * 3600));
        let operation = Operation { sequence: *sequence, kind, elements: elements as u64, end, limit };
        let entry = self.record.begin(kind.recorded(), *sequence, bytes as u64);
        let result = run(&operation);
        *sequence += 1;
        if let Err(error) = &result {
            self.shared.fail(error.clone());
        }
        // An abort during the last copy also counts: nobody may take the result for finished (COLL-2).
        let result = match &self.shared.inbox().failed {
            Some(failed) => Err(failed.clone()),
            None => result,
        };
        self.record.end(entry, result.is_ok());
        result
    }

    /// Sends one frame to a rank.
    pub(super) fn send(&self, operation: &Operation, phase: u8, to: u32, payload: &[&[u8]]) -> Result<(), Error> {
        let bytes: usize = payload.iter().map(|part| part.len()).sum();
        let header = Header {
            sequence: operation.sequence,
            kind: operation.kind,
            phase,
            elements: operation.elements,
            payload_bytes: bytes as u64,
        };
        let mut first = header.encode().to_vec();
        let whole = |first: &mut Vec<u8>| first.extend(payload.iter().flat_map(|part| part.iter()));
        let streams = match &self.shared.carrier {
            Carrier::Sockets(streams) => streams,
            Carrier::Links(links) => {
                whole(&mut first);
                return links.send(Rank(to), first).map_err(|error| operation.lost(to, Some(Arc::new(error))));
            }
        };
        let stream = streams[to as usize].as_ref().expect("frames go to other ranks");
        if bytes <= COALESCE_BYTES {
            whole(&mut first);
            return write(operation, to, stream, &first);
        }
        write(operation, to, stream, &first)?;
        payload.iter().try_for_each(|part| write(operation, to, stream, part))
    }

    /// One frame of the phase from each of these ranks, in their order.
    pub(super) fn receive(&self, operation: &Operation, phase: u8, from: &[u32]) -> Result<Vec<Buffer>, Error> {
        let mut inbox = self.shared.inbox();
        loop {
            if let Some(failed) = &inbox.failed {
                return Err(failed.clone());
            }
            let missing: Vec<u32> =
                from.iter().copied().filter(|rank| inbox.frames[*rank as usize].is_empty()).collect();
            if missing.is_empty() {
                break;
            }
            if inbox.lost.iter().any(|(rank, _)| missing.contains(rank)) {
                // The first to go took the others with it.
                let (rank, source) = inbox.lost[0].clone();
                return Err(operation.lost(rank, source));
            }
            if let Carrier::Links(links) = &self.shared.carrier {
                inbox.fetch(links.as_ref(), &missing);
                continue;
            }
            let left = operation.left().ok_or_else(|| operation.too_late(missing))?;
            inbox = self.shared.changed.wait_timeout(inbox, left).expect("no code that holds the lock panics").0;
        }
        let mut received = Vec::with_capacity(from.len());
        for rank in from {
            let frame = inbox.frames[*rank as usize].pop_front();
            let (header, buffer) = frame.expect("no rank is missing, and none is asked for twice");
            check(operation, phase, *rank, header)?;
            received.push(buffer);
        }
        drop(inbox);
        self.shared.changed.notify_all();
        Ok(received)
    }

    /// Keeps the memory of used frames for the next.
    pub(super) fn recycle(&self, buffers: Vec<Buffer>) {
        self.shared.spare.lock().expect("no code that holds the lock panics").extend(buffers);
    }

    /// The first peer that was seen to go.
    pub(super) fn lost(&self) -> Option<u32> {
        self.shared.inbox().lost.first().map(|(rank, _)| *rank)
    }

    /// Why waiting for `rank`, other than for a frame, has no sense any more.
    pub(super) fn ended(&self, operation: &Operation, rank: u32) -> Option<Error> {
        let inbox = self.shared.inbox();
        if let Some(failed) = &inbox.failed {
            return Some(failed.clone());
        }
        // Who was seen to go first is named, even where another one is waited for: that one fails because of it.
        if let Some((lost, source)) = inbox.lost.first().filter(|_| inbox.lost.iter().any(|(lost, _)| *lost == rank)) {
            return Some(operation.lost(*lost, source.clone()));
        }
        // It is where this rank will not come before it has gone on.
        if let Some((header, _)) = inbox.frames[rank as usize].front()
            && (header.sequence, header.kind) != (operation.sequence, operation.kind)
        {
            return Some(elsewhere(operation, rank, *header));
        }
        operation.left().is_none().then(|| operation.too_late(vec![rank]))
    }
}

fn write(operation: &Operation, to: u32, mut stream: &TcpStream, mut bytes: &[u8]) -> Result<(), Error> {
    while !bytes.is_empty() {
        let left = operation.left().ok_or_else(|| operation.too_late(vec![to]))?;
        let written = stream.set_write_timeout(Some(left)).and_then(|()| stream.write(bytes));
        match written {
            Ok(0) => return Err(operation.lost(to, None)),
            Ok(written) => bytes = &bytes[written..],
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {}
                _ => return Err(operation.lost(to, Some(Arc::new(error)))),
            },
        }
    }
    Ok(())
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

fn elsewhere(operation: &Operation, rank: u32, found: Header) -> Error {
    operation.mismatch(format!("rank {rank} is in {} {}", found.kind.name(), found.sequence))
}

impl Inbox {
    /// The next frame of each of these ranks, or the end of one.
    fn fetch(&mut self, links: &dyn Links, from: &[u32]) {
        let ranks: Vec<Rank> = from.iter().copied().map(Rank).collect();
        match links.receive(&ranks) {
            Ok(frames) => {
                for (rank, frame) in from.iter().zip(frames) {
                    let mut buffer = Buffer::default();
                    match wire::read_frame(&mut frame.as_slice(), &mut buffer) {
                        Ok(Some(header)) => self.frames[*rank as usize].push_back((header, buffer)),
                        Ok(None) => self.lost.push((*rank, None)),
                        Err(error) => self.lost.push((*rank, Some(Arc::new(error)))),
                    }
                }
            }
            Err((rank, error)) => self.lost.push((rank.0, Some(Arc::new(error)))),
        }
    }
}

impl Shared {
    /// The connections, each with its rank; none over other links.
    fn sockets(&self) -> impl Iterator<Item = (u32, &TcpStream)> {
        let streams = match &self.carrier {
            Carrier::Sockets(streams) => streams.as_slice(),
            Carrier::Links(_) => &[],
        };
        (0..).zip(streams).filter_map(|(rank, stream)| Some((rank, stream.as_ref()?)))
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().expect("no code that holds the lock panics")
    }

    /// Ends everything with `error`, unless something ended it before.
    pub(super) fn fail(&self, error: Error) {
        self.inbox().failed.get_or_insert(error);
        self.changed.notify_all();
        for (_, stream) in self.sockets() {
            // Wakes our reader and writer, and tells the peer at once.
            let _already_closed = stream.shutdown(Shutdown::Both);
        }
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
}

impl Drop for Peers {
    fn drop(&mut self) {
        self.shared.inbox().closed = true;
        self.shared.changed.notify_all();
        for (_, stream) in self.shared.sockets() {
            // What was written still arrives: the end of the stream is queued behind it.
            let _already_closed = stream.shutdown(Shutdown::Both);
        }
        for reader in self.readers.drain(..) {
            let _panicked = reader.join();
        }
    }
}
