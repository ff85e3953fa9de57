//! Adding over TCP: a column of ranks, each with its parts, to the same sum on all.
//!
//! Each rank sends and receives about twice the values, whatever their number, and each element is added by one rank alone, or level by
//! level in the tree's own order.
//!
//! - *At once*: the elements are cut into as many chunks as there are members. Member `c` gets everyone's parts of chunk `c`, adds them along
//!   the tree, and sends the sum to all. Two messages behind each other, whatever the parts are.
//! - *Halving and doubling*, where the members are the nodes of one level of the tree: the two halves of a node exchange halves of what they
//!   have and add; then the same one level up with half as many elements; then all the way back with sums. One peer at a time, in long
//!   messages.

use super::Element;
use super::error::Error;
use super::hosts::{Column, Nodes, cut};
use super::peers::{Operation, Peers};
use super::tree::{self, Values};
use super::wire::Buffer;
use std::ops::Range;

/// Phases in which sums are sent back; below it, those in which parts are sent.
const BACK: u8 = 128;
/// A rank's share from which halves are exchanged: below it the number of messages behind each other counts.
const HALVING_BYTES: usize = 64 << 10;

/// One column, as a member of it sees it.
#[derive(Debug)]
pub(super) struct Reducer {
    shards: u32,
    members: Vec<(u32, Nodes)>,
    /// This rank's place among them.
    place: usize,
    /// Places in the tree's order, where halves can be exchanged.
    halving: Option<Vec<usize>>,
}

impl Reducer {
    pub(super) fn new(column: Column, rank: u32, shards: u32) -> Self {
        let place = column.members.iter().position(|(member, _)| *member == rank);
        let halving = column.halving_order(shards);
        Self { shards, members: column.members, place: place.expect("a rank speaks in its own columns"), halving }
    }

    /// Adds over all members; every one then has the same bits.
    pub(super) fn reduce<E: Element>(
        &self,
        peers: &Peers,
        operation: &Operation,
        values: &mut Values<'_, E>,
    ) -> Result<(), Error> {
        match &self.halving {
            // One part is its own sum.
            _ if self.members.len() == 1 && matches!(values, Values::InPlace(_)) => Ok(()),
            _ if self.members.len() == 1 => self.at_once(peers, operation, values),
            Some(order) if values.len() * size_of::<E>() / self.members.len() >= HALVING_BYTES => {
                self.by_halves(peers, operation, values, order)
            }
            Some(_) | None => self.at_once(peers, operation, values),
        }
    }

    /// The other members with their places. Staggered, so that not all send to the first one first.
    fn others(&self) -> impl Iterator<Item = (usize, u32)> {
        let members = self.members.len();
        (1..members).map(move |offset| (self.place + offset) % members).map(|place| (place, self.members[place].0))
    }

    fn at_once<E: Element>(
        &self,
        peers: &Peers,
        operation: &Operation,
        values: &mut Values<'_, E>,
    ) -> Result<(), Error> {
        let chunk =
            |place| cut(values.len(), self.members.len(), place)..cut(values.len(), self.members.len(), place + 1);
        let chunks: Vec<Range<usize>> = (0..self.members.len()).map(chunk).collect();
        for (place, rank) in self.others() {
            let parts = values.parts(&chunks[place]);
            let payload: Vec<&[u8]> = parts.into_iter().map(bytemuck::cast_slice).collect();
            peers.send(operation, 0, rank, &payload)?;
        }
        let from: Vec<u32> = self.others().map(|(_, rank)| rank).collect();
        let own = chunks[self.place].clone();
        let received = peers.receive(operation, 0, &from)?;
        self.add_parts(operation, &received, &own, values)?;
        peers.recycle(received);
        for (_, rank) in self.others() {
            peers.send(operation, BACK, rank, &[bytemuck::cast_slice(values.sum(own.clone()))])?;
        }
        let received = peers.receive(operation, BACK, &from)?;
        for ((place, rank), buffer) in self.others().zip(&received) {
            let room = values.sum(chunks[place].clone());
            room.copy_from_slice(sized(operation, rank, buffer, room.len())?);
        }
        peers.recycle(received);
        Ok(())
    }

    /// The sum over all shards of one chunk.
    fn add_parts<E: Element>(
        &self,
        operation: &Operation,
        received: &[Buffer],
        chunk: &Range<usize>,
        values: &mut Values<'_, E>,
    ) -> Result<(), Error> {
        let mut room = Vec::new();
        let (own, sum) = values.parts_and_sum(chunk, &mut room);
        let mut parts: Vec<tree::Part<'_, E>> = self.members[self.place].1.iter().cloned().zip(own).collect();
        for ((place, rank), buffer) in self.others().zip(received) {
            let nodes = &self.members[place].1;
            let values = sized(operation, rank, buffer, nodes.len() * sum.len())?;
            if !sum.is_empty() {
                parts.extend(nodes.iter().cloned().zip(values.chunks_exact(sum.len())));
            }
        }
        if sum.is_empty() {
            return Ok(());
        }
        parts.sort_by_key(|(node, _)| node.start);
        if thaw_mutants::planted("sum-out-of-order") {
            sum.fill(E::default());
            parts.iter().for_each(|(_, part)| tree::add(sum, part));
            return Ok(());
        }
        tree::sum(&(0..self.shards), &parts, sum);
        Ok(())
    }

    fn by_halves<E: Element>(
        &self,
        peers: &Peers,
        operation: &Operation,
        values: &mut Values<'_, E>,
        order: &[usize],
    ) -> Result<(), Error> {
        let position = order.iter().position(|place| *place == self.place).expect("every member has a position");
        let levels = order.len().trailing_zeros();
        let mut held = 0..values.len();
        let mut path = Vec::new();
        for level in 0..levels {
            let partner = self.members[order[position ^ (1 << level)]].0;
            let is_lower = position & (1 << level) == 0;
            let middle = held.start + cut(held.len(), 2, 1);
            let (lower, upper) = (held.start..middle, middle..held.end);
            let (kept, given) = if is_lower { (lower, upper) } else { (upper, lower) };
            let phase = u8::try_from(level).expect("there are fewer than 2^32 ranks");
            // What the first exchange sends is the part itself, later ones send sums.
            let sending = if level == 0 { values.parts(&given)[0] } else { &*values.sum(given.clone()) };
            peers.send(operation, phase, partner, &[bytemuck::cast_slice(sending)])?;
            let received = peers.receive(operation, phase, &[partner])?;
            let theirs = sized(operation, partner, &received[0], kept.len())?;
            if let (0, Values::Apart { parts, sum }) = (level, &mut *values) {
                sum[kept.clone()].copy_from_slice(&parts[0][kept.clone()]);
            }
            let mine = values.sum(kept.clone());
            if is_lower {
                tree::add(mine, theirs)
            } else {
                tree::add_onto(theirs, mine)
            }
            peers.recycle(received);
            path.push((partner, given));
            held = kept;
        }
        for (level, (partner, given)) in (0..levels).zip(path).rev() {
            let phase = BACK + u8::try_from(level).expect("there are fewer than 2^32 ranks");
            peers.send(operation, phase, partner, &[bytemuck::cast_slice(values.sum(held.clone()))])?;
            let received = peers.receive(operation, phase, &[partner])?;
            let room = values.sum(given.clone());
            room.copy_from_slice(sized(operation, partner, &received[0], room.len())?);
            peers.recycle(received);
            held = held.start.min(given.start)..held.end.max(given.end);
        }
        Ok(())
    }
}

/// The elements of a frame, of which there must be so many.
fn sized<'a, E: Element>(
    operation: &Operation,
    rank: u32,
    buffer: &'a Buffer,
    elements: usize,
) -> Result<&'a [E], Error> {
    buffer.as_elements::<E>().filter(|found| found.len() == elements).ok_or_else(|| {
        let (sent, expected) = (buffer.as_bytes().len(), elements * size_of::<E>());
        operation.mismatch(format!("rank {rank} sent {sent} bytes, expected {expected}"))
    })
}
