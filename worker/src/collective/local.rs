//! [`Local`]: a reduction through shared memory, for a gang whose ranks are all on one host.
//!
//! The elements are cut into rounds of one block per rank; rank `r` adds block `r` of each round. Blocks pass through a small window of each
//! rank's segment, so that they stay in the caches: main memory sees the parts read once and the sums written once.
//!
//! ```text
//! publish(t + 1) ─▶ all published t? ─▶ add own block, post the sum ─▶ copy the others' sums ─▶ consumed t
//! ```
//!
//! LOCAL-1: two windows alternate by round: one is written again only when every rank has consumed the round that used it last.
//! LOCAL-2: counters only rise, by one a round, over all operations; what a rank wrote before it posted a counter is seen by who has read it.
//! LOCAL-3: a rank waits on a counter a moment by looking, then asleep; the connection to each peer says when one is gone.

use super::error::Error;
use super::tcp::{Operation, Waiting};
use super::tree;
use super::{Element, wire};
use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;
use thaw_core::sampler::ranks_shards;
use thaw_core::sampler::tree::maximal_subtrees;
use thaw_shm::Segment;

/// A control word has a cache line of its own.
const LINE: usize = 64;
const PUBLISHED: usize = 0;
const SUMMED: usize = LINE;
const CONSUMED: usize = 2 * LINE;
/// Sequence, kind, elements: what the published parts belong to.
const HEADER: usize = 3 * LINE;
/// The owner's proof: 32 bytes.
const TOKEN: usize = 4 * LINE;
const CONTROL_BYTES: usize = 4096;
/// Of all that a gang publishes in a round, about. Larger blocks mean fewer waits for each other; where there are more ranks than cores,
/// smaller ones keep less of the others' work waiting. Found by trying 2, 4 and 8 ranks.
const WINDOW_BYTES: usize = 8 << 20;
/// Bytes of a block, at least and at most.
const BLOCK_BYTES: (usize, usize) = (16 << 10, 2 << 20);
/// Looks at a counter before sleeping: some ten microseconds.
const LOOKS: u32 = 200;
/// Longest sleep between two looks at whether a peer is gone or the operation aborted.
const SLEEP: Duration = Duration::from_millis(10);

/// How the segments of a gang are laid out; the same on every rank.
#[derive(Debug, Clone)]
struct Layout {
    world_size: u32,
    shards: u32,
    block_bytes: usize,
    /// Most parts that a rank gives.
    parts: usize,
}

impl Layout {
    fn new(world_size: u32, shards: u32) -> Self {
        let parts = (0..world_size).map(|rank| subtrees(rank, world_size, shards).len()).max().unwrap_or(0).max(1);
        let ranks = world_size as usize;
        let block_bytes = (WINDOW_BYTES / (parts * ranks * ranks)).clamp(BLOCK_BYTES.0, BLOCK_BYTES.1);
        // Whole elements of any type, and whole cache lines.
        Self { world_size, shards, block_bytes: block_bytes / LINE * LINE, parts }
    }

    fn bytes(&self) -> usize {
        self.sums_at(2)
    }

    /// Where `part` for the block of rank `of` lies in a rank's window.
    fn part_at(&self, window: u32, of: u32, part: usize) -> usize {
        let block = (window as usize * self.world_size as usize + of as usize) * self.parts + part;
        CONTROL_BYTES + block * self.block_bytes
    }

    fn sums_at(&self, window: u32) -> usize {
        self.part_at(2, 0, 0) + window as usize * self.block_bytes
    }
}

fn subtrees(rank: u32, world_size: u32, shards: u32) -> Vec<Range<u32>> {
    maximal_subtrees(ranks_shards(rank, world_size, shards), shards)
}

/// This rank's segment, for others to map.
#[derive(Debug)]
pub(super) struct Offer {
    segment: Segment,
    layout: Layout,
    token: [u8; 32],
}

impl Offer {
    /// A segment that holds `token`, by which others know it.
    pub(super) fn new(world_size: u32, shards: u32, token: [u8; 32]) -> io::Result<Self> {
        let layout = Layout::new(world_size, shards);
        let segment = Segment::create(layout.bytes())?;
        segment.write(TOKEN, &token);
        Ok(Self { segment, layout, token })
    }

    /// What the other ranks need to know.
    pub(super) fn encode(&self) -> Vec<u8> {
        let (process, descriptor) = self.segment.address();
        let mut bytes = self.token.to_vec();
        bytes.extend(process.to_le_bytes());
        bytes.extend(descriptor.to_le_bytes());
        bytes
    }

    /// Maps every other rank's segment. `None`: one of them is not on this host.
    pub(super) fn map(self, rank: u32, offers: &[Vec<u8>]) -> Option<Local> {
        let mut segments = Vec::with_capacity(offers.len());
        for (other, offer) in (0..).zip(offers) {
            if other == rank {
                segments.push(None);
                continue;
            }
            let token = offer.get(..32)?;
            let number = |at: usize| Some(u32::from_le_bytes(offer.get(at..at + 4)?.try_into().ok()?));
            let segment = Segment::open((number(32)?, number(36)?), self.layout.bytes()).ok()?;
            if segment.numbers::<u8>(TOKEN, 32) != token {
                return None;
            }
            segments.push(Some(segment));
        }
        Some(Local { rank, layout: self.layout, own: self.segment, segments, round: Mutex::new(0) })
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Local {
    rank: u32,
    layout: Layout,
    own: Segment,
    /// By rank; `None` is this one.
    segments: Vec<Option<Segment>>,
    /// Rounds done in all operations so far.
    round: Mutex<u32>,
}

/// One reduction in flight.
struct Reduction<'a, E> {
    local: &'a Local,
    operation: &'a Operation,
    waiting: &'a Waiting<'a>,
    parts: &'a [&'a [E]],
    /// Rounds before this operation.
    before: u32,
    elements: usize,
}

impl Local {
    /// Adds over all shards, in tree order; see [`super::Collective::reduce_shards_f32`].
    pub(super) fn reduce<E: Element>(
        &self,
        operation: &Operation,
        waiting: &Waiting<'_>,
        parts: &[&[E]],
        out: &mut [E],
    ) -> Result<(), Error> {
        let mut round = self.round.lock().expect("no code that holds the lock panics");
        let reduction = Reduction { local: self, operation, waiting, parts, before: *round, elements: out.len() };
        let rounds = reduction.rounds();
        reduction.publish(0)?;
        for turn in 0..rounds {
            if turn + 1 < rounds {
                reduction.publish(turn + 1)?;
            }
            reduction.add(turn, out)?;
            reduction.collect(turn, out)?;
        }
        *round = round.wrapping_add(rounds);
        Ok(())
    }

    fn peers(&self) -> impl Iterator<Item = (u32, &Segment)> {
        let world_size = self.layout.world_size;
        // Staggered, so that not all ranks read from rank 0 first.
        (1..world_size)
            .map(move |offset| (self.rank + offset) % world_size)
            .filter_map(|rank| self.segments[rank as usize].as_ref().map(|segment| (rank, segment)))
    }
}

impl<E: Element> Reduction<'_, E> {
    fn block(&self) -> usize {
        self.local.layout.block_bytes / size_of::<E>()
    }

    /// At least one, in which lengths are compared.
    fn rounds(&self) -> u32 {
        let rounds = self.elements.div_ceil(self.block() * self.local.layout.world_size as usize).max(1);
        u32::try_from(rounds).expect("a vector has fewer than 2^32 rounds of blocks")
    }

    /// The elements that `rank` adds in a round.
    fn range(&self, turn: u32, rank: u32) -> Range<usize> {
        let first = (turn as usize * self.local.layout.world_size as usize + rank as usize) * self.block();
        first.min(self.elements)..(first + self.block()).min(self.elements)
    }

    /// A counter's value once the round is done.
    fn after(&self, turn: u32) -> u32 {
        self.before.wrapping_add(turn).wrapping_add(1)
    }

    /// Gives the others this rank's parts of their blocks.
    fn publish(&self, turn: u32) -> Result<(), Error> {
        let Local { own, layout, .. } = self.local;
        // LOCAL-1
        for (rank, segment) in self.local.peers() {
            self.wait(segment, CONSUMED, rank, self.after(turn).wrapping_sub(2))?;
        }
        if turn == 0 {
            own.write(HEADER, &[self.operation.sequence(), E::KIND as u64, self.elements as u64]);
        }
        for (rank, _) in self.local.peers() {
            let range = self.range(turn, rank);
            for (place, part) in self.parts.iter().enumerate() {
                own.write(layout.part_at(turn % 2, rank, place), &part[range.clone()]);
            }
        }
        thaw_shm::post(own.word(PUBLISHED), self.after(turn));
        Ok(())
    }

    /// Adds this rank's block.
    fn add(&self, turn: u32, out: &mut [E]) -> Result<(), Error> {
        let Local { own, layout, .. } = self.local;
        for (rank, segment) in self.local.peers() {
            self.wait(segment, PUBLISHED, rank, self.after(turn))?;
            if turn == 0 {
                self.check(rank, segment)?;
            }
        }
        let range = self.range(turn, self.local.rank);
        if !range.is_empty() {
            let mut all: Vec<tree::Part<'_, E>> = Vec::with_capacity(layout.parts * layout.world_size as usize);
            for rank in 0..layout.world_size {
                for (place, node) in subtrees(rank, layout.world_size, layout.shards).into_iter().enumerate() {
                    all.push((
                        node,
                        match &self.local.segments[rank as usize] {
                            Some(segment) => {
                                segment.numbers(layout.part_at(turn % 2, self.local.rank, place), range.len())
                            }
                            None => &self.parts[place][range.clone()],
                        },
                    ));
                }
            }
            let sum = &mut out[range];
            tree::sum(layout.shards, &all, sum);
            own.write(layout.sums_at(turn % 2), sum);
        }
        thaw_shm::post(own.word(SUMMED), self.after(turn));
        Ok(())
    }

    /// Copies the others' sums.
    fn collect(&self, turn: u32, out: &mut [E]) -> Result<(), Error> {
        let Local { own, layout, .. } = self.local;
        for (rank, segment) in self.local.peers() {
            self.wait(segment, SUMMED, rank, self.after(turn))?;
            let range = self.range(turn, rank);
            out[range.clone()].copy_from_slice(segment.numbers(layout.sums_at(turn % 2), range.len()));
        }
        thaw_shm::post(own.word(CONSUMED), self.after(turn));
        Ok(())
    }

    fn check(&self, rank: u32, segment: &Segment) -> Result<(), Error> {
        let found = segment.numbers::<u64>(HEADER, 3);
        let expected = [self.operation.sequence(), E::KIND as u64, self.elements as u64];
        if found == expected {
            return Ok(());
        }
        let kind = |number: u64| wire::Kind::from_byte(number as u8).map_or("another operation", wire::Kind::name);
        Err(self.operation.mismatch(format!(
            "rank {rank} is in {} {} with {} elements, this one in {} {} with {}",
            kind(found[1]),
            found[0],
            found[2],
            kind(expected[1]),
            expected[0],
            expected[2]
        )))
    }

    /// Until a peer's counter is at `target` or beyond (LOCAL-3).
    fn wait(&self, segment: &Segment, word: usize, rank: u32, target: u32) -> Result<(), Error> {
        let word = segment.word(word);
        let reached = |value: u32| value.wrapping_sub(target).cast_signed() >= 0;
        for _ in 0..LOOKS {
            if reached(word.load(Ordering::Acquire)) {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        loop {
            let value = word.load(Ordering::Acquire);
            if reached(value) {
                return Ok(());
            }
            if let Some(error) = self.waiting.ended(self.operation, rank) {
                // What it posted before it went still counts.
                return if reached(word.load(Ordering::Acquire)) { Ok(()) } else { Err(error) };
            }
            thaw_shm::wait(word, value, SLEEP);
        }
    }
}
