//! [`Tree`]: the collective of processors: shared memory among ranks of a host, TCP between hosts.
//!
//! Each host adds its own ranks' parts first, up to the largest nodes of the tree that it has whole; what these come to goes to the other
//! hosts ([`super::hosts`]). So the order of a sum is the tree's wherever the ranks are.

use super::error::Error;
use super::handshake::HostId;
use super::hosts::Hosts;
use super::local::{CONTROL_BYTES, Local};
use super::peers::{Links, Operation, Peers, Shared};
use super::ring::Record;
use super::tcp::Reducer;
use super::tree::Values;
use super::wire::{Buffer, Kind};
use super::{Collective, Element};
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thaw_proto::ids::Rank;
use thaw_shm::{Lease, Segment};

/// Address space of a rank's segment: windows, and all that it lends. Pages come as they are used.
const SEGMENT_BYTES: usize = 64 << 30;
/// Where a segment holds its owner's proof: 32 bytes.
const TOKEN: usize = CONTROL_BYTES / 2;
const TOKEN_BYTES: usize = 32;

/// A collective of processors, or of one rank alone.
#[derive(Debug)]
pub struct Tree {
    peers: Peers,
    hosts: Hosts,
    /// Where other ranks are on this host.
    local: Option<Local>,
    /// The columns that this rank speaks in, with their numbers; none where all ranks are on one host.
    columns: Vec<(usize, Reducer)>,
}

impl Tree {
    /// A gang of one, for a trainer that has no peers.
    #[must_use]
    pub fn alone(shards: u32) -> Self {
        Self::start(0, shards, Duration::MAX, vec![None], Record::default())
            .expect("no thread is started without peers")
    }

    /// Takes over one checked connection per peer, in rank order.
    pub(super) fn start(
        rank: u32,
        shards: u32,
        deadline: Duration,
        streams: Vec<Option<TcpStream>>,
        record: Record,
    ) -> io::Result<Self> {
        Ok(Self::of(Peers::start(rank, deadline, streams, record)?, shards))
    }

    /// A gang whose frames travel over `links`, each rank on a host of its own. Its operations have no deadline but theirs.
    #[must_use]
    pub fn over(rank: Rank, world_size: u32, shards: u32, links: Arc<dyn Links>) -> Self {
        Self::of(Peers::over(rank.0, world_size, links), shards)
    }

    fn of(peers: Peers, shards: u32) -> Self {
        let hosts = Hosts::apart(peers.world_size(), shards);
        let mut tree = Self { peers, hosts, local: None, columns: Vec::new() };
        tree.columns = tree.reducers();
        tree
    }

    /// What can end everything from outside.
    pub(super) fn shared(&self) -> &Arc<Shared> {
        self.peers.shared()
    }

    /// Lets the ranks of each host reduce through shared memory. `host` is what ranks of one host have in common; a rank without shares
    /// nothing. Ranks are on one host where each can map the other's segment too, whatever they say. `token` is this rank's secret.
    /// What they tell each other counts to the forming of the gang, and has its deadline.
    ///
    /// # Errors
    /// Where the ranks cannot exchange what they found.
    pub(super) fn share_memory(
        &mut self,
        host: Option<HostId>,
        token: [u8; TOKEN_BYTES],
        deadline: Instant,
    ) -> Result<(), Error> {
        if self.world_size() == 1 {
            return Ok(());
        }
        let own = host.and_then(|host| Some((host, Segment::create(SEGMENT_BYTES).ok()?)));
        let offer = own.as_ref().map(|(host, segment)| offer(*host, segment, token)).unwrap_or_default();
        let offers = self.all_gather_until(Some(deadline), &offer)?;
        let mut segments: Vec<Option<Segment>> = Vec::with_capacity(offers.len());
        for (other, theirs) in (0..).zip(&offers) {
            let wanted = other != self.rank().0 && own.is_some();
            segments.push(wanted.then(|| reach(&offer, theirs)).flatten());
        }
        let reached: Vec<u8> = segments.iter().map(|segment| u8::from(segment.is_some())).collect();
        let reached = self.all_gather_until(Some(deadline), &reached)?;
        let reached: Vec<Vec<bool>> = reached.iter().map(|row| row.iter().map(|found| *found == 1).collect()).collect();
        self.hosts = Hosts::of(&reached, self.shards());
        let rank = self.rank().0;
        let neighbours: Vec<Segment> =
            self.hosts.host_of(rank).iter().filter_map(|other| segments[*other as usize].take()).collect();
        self.local = match own {
            Some((_, own)) if !neighbours.is_empty() => Some(Local::new(&self.hosts, rank, own, neighbours)),
            Some(_) | None => None,
        };
        self.columns = if self.hosts.len() == 1 { Vec::new() } else { self.reducers() };
        tracing::debug!(rank, hosts = self.hosts.len(), here = self.ranks_here(), "built the collective");
        Ok(())
    }

    /// As [`Collective::all_gather`], with a deadline of its own where it is given one.
    fn all_gather_until(&self, deadline: Option<Instant>, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        self.peers.operate_until(deadline, Kind::AllGather, 0, bytes.len(), |operation| {
            for rank in self.peers.others() {
                self.peers.send(operation, 0, rank, &[bytes])?;
            }
            let from: Vec<u32> = self.peers.others().collect();
            let received = self.peers.receive(operation, 0, &from)?;
            let mut gathered = vec![bytes.to_vec(); self.world_size() as usize];
            for (rank, buffer) in from.into_iter().zip(&received) {
                gathered[rank as usize] = Buffer::as_bytes(buffer).to_vec();
            }
            self.peers.recycle(received);
            Ok(gathered)
        })
    }

    fn reducers(&self) -> Vec<(usize, Reducer)> {
        let rank = self.rank().0;
        let columns = self.hosts.columns_of(rank).into_iter();
        columns.map(|(number, column)| (number, Reducer::new(column, rank, self.shards()))).collect()
    }

    /// Ranks that reduce through this rank's shared memory, itself among them.
    #[must_use]
    pub fn ranks_here(&self) -> usize {
        self.hosts.host_of(self.rank().0).len()
    }

    fn reduce<E: Element>(&self, values: &mut Values<'_, E>) -> Result<(), Error> {
        let bytes = values.len() * size_of::<E>();
        let reduced = self.peers.operate(E::KIND, values.len(), bytes, |operation| {
            let (rank, mine) = (self.rank().0, self.hosts.nodes_of(self.rank().0));
            let lengths = values.lengths();
            if lengths.len() != mine.len() || lengths.iter().any(|length| *length != values.len()) {
                return Err(operation.mismatch(format!(
                    "rank {rank} gives parts of {lengths:?} elements for its subtrees {mine:?} of {} elements",
                    values.len()
                )));
            }
            let elements = values.len();
            let here = self.hosts.host_of(rank);
            let shares = self.hosts.shares(here.len(), elements);
            let place = here.iter().position(|other| *other == rank).expect("a rank is on its host");
            let first = shares[place].start;
            let mut beyond = |share: &mut Values<'_, E>| self.over_columns(operation, elements, first, share);
            match &self.local {
                None => beyond(values),
                Some(local) if self.columns.is_empty() => local.reduce(&self.peers, operation, shares, values, None),
                Some(local) => local.reduce(&self.peers, operation, shares, values, Some(&mut beyond)),
            }
        });
        if thaw_mutants::planted("interrupted-looks-finished") { Ok(()) } else { reduced }
    }

    /// Adds a host's share of the elements, which begins at `first`, over the other hosts.
    fn over_columns<E: Element>(
        &self,
        operation: &Operation,
        elements: usize,
        first: usize,
        share: &mut Values<'_, E>,
    ) -> Result<(), Error> {
        for (number, reducer) in &self.columns {
            let range = self.hosts.elements_of(*number, elements);
            let range = range.start - first..range.end - first;
            match share {
                Values::InPlace(values) => {
                    reducer.reduce(&self.peers, operation, &mut Values::InPlace(&mut values[range]))?;
                }
                Values::Apart { parts, sum } => {
                    let parts: Vec<&[E]> = parts.iter().map(|part| &part[range.clone()]).collect();
                    let mut values = Values::Apart { parts: &parts, sum: &mut sum[range] };
                    reducer.reduce(&self.peers, operation, &mut values)?;
                }
            }
        }
        Ok(())
    }
}

/// What the other ranks need to know to reach a segment.
fn offer(host: HostId, segment: &Segment, token: [u8; TOKEN_BYTES]) -> Vec<u8> {
    segment.write(TOKEN, &token);
    let (process, descriptor) = segment.address();
    let mut bytes = host.0.to_vec();
    bytes.extend(token);
    bytes.extend(process.to_le_bytes());
    bytes.extend(descriptor.to_le_bytes());
    bytes
}

/// The segment behind an offer, where it is on the same host and can be mapped here.
fn reach(own: &[u8], offer: &[u8]) -> Option<Segment> {
    let host = size_of::<HostId>();
    let token = offer.get(host..host + TOKEN_BYTES)?;
    if own.get(..host)? != &offer[..host] {
        return None;
    }
    let number = |at: usize| {
        let at = host + TOKEN_BYTES + at;
        Some(u32::from_le_bytes(offer.get(at..at + 4)?.try_into().ok()?))
    };
    let segment = Segment::open((number(0)?, number(4)?), SEGMENT_BYTES).ok()?;
    (segment.numbers::<u8>(TOKEN, TOKEN_BYTES) == token).then_some(segment)
}

impl Collective for Tree {
    fn rank(&self) -> Rank {
        Rank(self.peers.rank())
    }

    fn world_size(&self) -> u32 {
        self.peers.world_size()
    }

    fn first_of_host(&self) -> Rank {
        Rank(self.hosts.host_of(self.peers.rank())[0])
    }

    fn shards(&self) -> u32 {
        self.hosts.shards()
    }

    fn reduce_shards_f32(&self, parts: &[&[f32]], out: &mut [f32]) -> Result<(), Error> {
        self.reduce(&mut Values::Apart { parts, sum: out })
    }

    fn reduce_shards_f64(&self, parts: &[&[f64]], out: &mut [f64]) -> Result<(), Error> {
        self.reduce(&mut Values::Apart { parts, sum: out })
    }

    fn reduce_in_place_f32(&self, values: &mut [f32]) -> Result<(), Error> {
        self.reduce(&mut Values::InPlace(values))
    }

    fn reduce_in_place_f64(&self, values: &mut [f64]) -> Result<(), Error> {
        self.reduce(&mut Values::InPlace(values))
    }

    fn lease(&self, bytes: usize) -> Option<Lease> {
        self.local.as_ref()?.lease(bytes)
    }

    fn prepare_leases(&self, bytes: usize) {
        if let Some(local) = &self.local {
            local.prepare_leases(bytes);
        }
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        self.all_gather_until(None, bytes)
    }

    fn copy(&self, from: Rank, to: &[Rank], bytes: &[u8]) -> Result<Vec<u8>, Error> {
        let given = if from == self.rank() { bytes.len() } else { 0 };
        self.peers.operate(Kind::Copy, 0, given, |operation| {
            if from == self.rank() {
                let others = to.iter().filter(|rank| **rank != from);
                others.into_iter().try_for_each(|rank| self.peers.send(operation, 0, rank.0, &[bytes]))?;
            } else if to.contains(&self.rank()) {
                let received = self.peers.receive(operation, 0, &[from.0])?;
                let copied = received.first().map(|buffer| Buffer::as_bytes(buffer).to_vec()).unwrap_or_default();
                self.peers.recycle(received);
                return Ok(copied);
            }
            Ok(Vec::new())
        })
    }

    fn lost_peer(&self) -> Option<Rank> {
        self.peers.lost().map(Rank)
    }

    fn record(&self) -> &Record {
        self.peers.record()
    }

    fn abort(&self) {
        self.shared().fail(Error::Aborted);
    }
}
