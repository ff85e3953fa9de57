//! [`Ring`]: the last operations over all ranks that a trainer has entered, and whether it gets anywhere, in memory that its agent keeps.
//!
//! ```text
//! agent ── creates, hands its address to the trainer ──▶ trainer maps it, and records: claim an entry, write it, mark it; later its end
//!       └─ reads it whenever it likes: also of a trainer that is stopped, hangs, or is gone
//! ```
//!
//! - `RING-1`: recording takes no lock, no memory and no call of the system, and never waits; two threads that record have entries of
//!   their own.
//! - `RING-2`: an entry counts while its mark says which it is, before and after it is read: one that is being written is left out.
//! - `RING-3`: what is read was written by another process: an entry that makes no sense is left out, and nothing else comes of it.
//! - `RING-4`: training beats whenever a piece of its work is done: an operator, a segment's backward, a sample, a layer group. It says so while
//!   it waits for others, which has a deadline, or for a whole file to come from or go to storage, which takes as long as it takes. What
//!   neither beats nor waits stands still.
//!
//! It says what an operation was and never what it carried. Without memory to write to, recording does nothing.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::UNIX_EPOCH;
use thaw_proto::ids::{Generation, StageIndex, Step};
use thaw_proto::worker::{CollectiveKind, CollectiveOperation, OperationEnd};
use thaw_runtime::surroundings;
use thaw_shm::{Segment, SegmentAddress};

/// Entries kept: a training step of many layer groups has some dozens.
const ENTRIES: u64 = 256;
/// A cache line each, of eight words.
const ENTRY_BYTES: usize = 64;
const SEGMENT_BYTES: usize = ENTRY_BYTES * (1 + ENTRIES as usize);
/// The words in front of the entries: how many were claimed so far, where training stands, how often it has beaten, and how many waits of its
/// have begun and not ended.
const CLAIMED: usize = 0;
const STAGE: usize = 8;
const STEP: usize = 16;
const BEATS: usize = 24;
const WAITS: usize = 32;
/// Words of an entry. The mark is its number from 1, and 0 while it is being written.
const MARK: usize = 0;
const GENERATION: usize = 8;
const SEQUENCE: usize = 16;
/// Kind in the lowest byte, stage above the lowest 32 bits.
const KIND: usize = 24;
const AT_STEP: usize = 32;
const BYTES: usize = 40;
const BEGAN: usize = 48;
/// Unix microseconds, times two; odd where it failed, 0 while it lasts.
const ENDED: usize = 56;
/// Of each counter, what [`Ring::read`] gives.
const MOST_READ: usize = 12;

const KINDS: [CollectiveKind; 5] = [
    CollectiveKind::ReduceF32,
    CollectiveKind::ReduceF64,
    CollectiveKind::AllGather,
    CollectiveKind::Copy,
    CollectiveKind::GpuSum,
];

/// Where another process of this host finds a ring.
pub type RingAddress = SegmentAddress;

/// See the module.
#[derive(Debug)]
pub struct Ring {
    segment: Segment,
}

impl Ring {
    /// A new one, with nothing in it.
    ///
    /// # Errors
    /// What the system says.
    pub fn create() -> io::Result<Self> {
        Ok(Self { segment: Segment::create(SEGMENT_BYTES)? })
    }

    /// Another process's.
    ///
    /// # Errors
    /// What the system says: that process is not on this host, or is gone.
    pub fn open(address: RingAddress) -> io::Result<Self> {
        Ok(Self { segment: Segment::open(address.into(), SEGMENT_BYTES)? })
    }

    /// Under which [`Ring::open`] finds it while this process lives.
    #[must_use]
    pub fn address(&self) -> RingAddress {
        self.segment.address().into()
    }

    /// The last operations of a generation, oldest first.
    #[must_use]
    pub fn read(&self, generation: Generation) -> Vec<CollectiveOperation> {
        let mut entries: Vec<(u64, CollectiveOperation)> =
            (0..ENTRIES).filter_map(|place| self.entry(place, generation)).collect();
        entries.sort_by_key(|(mark, _)| std::cmp::Reverse(*mark));
        let mut room = [MOST_READ; 2];
        entries.retain(|(_, operation)| {
            let room = &mut room[usize::from(operation.kind.is_on_gpu())];
            let fits = *room > 0;
            *room -= usize::from(fits);
            fits
        });
        entries.into_iter().rev().map(|(_, operation)| operation).collect()
    }

    /// Whether training gets anywhere.
    #[must_use]
    pub fn movement(&self) -> Movement {
        let word = |word: usize| self.header(word).load(Ordering::Relaxed);
        let stage = StageIndex(u32::try_from(word(STAGE)).unwrap_or(u32::MAX));
        Movement { beats: word(BEATS), waits: word(WAITS) > 0, stage, step: Step(word(STEP)) }
    }

    /// What lies at a place, with its mark (RING-2, RING-3).
    fn entry(&self, place: u64, generation: Generation) -> Option<(u64, CollectiveOperation)> {
        let word = |word: usize| self.word(place, word);
        let mark = word(MARK).load(Ordering::Acquire);
        let [of_generation, sequence, kind, step, bytes, began_us, ended] =
            [GENERATION, SEQUENCE, KIND, AT_STEP, BYTES, BEGAN, ENDED].map(|at| word(at).load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        if mark == 0 || word(MARK).load(Ordering::Relaxed) != mark || of_generation != generation.0 {
            return None;
        }
        let end = match (ended / 2, ended % 2) {
            (0, _) => OperationEnd::None,
            (at_us, 0) => OperationEnd::Finished { at_us },
            (at_us, _) => OperationEnd::Failed { at_us },
        };
        let stage = StageIndex(u32::try_from(kind >> 32).ok()?);
        let kind = *KINDS.get(usize::try_from(kind & 0xff).ok()?)?;
        Some((mark, CollectiveOperation { kind, sequence, bytes, stage, step: Step(step), began_us, end }))
    }

    fn header(&self, word: usize) -> &AtomicU64 {
        self.segment.long(word)
    }

    fn word(&self, place: u64, word: usize) -> &AtomicU64 {
        let place = usize::try_from(place % ENTRIES).expect("there are few entries");
        self.segment.long((1 + place) * ENTRY_BYTES + word)
    }
}

/// Where training stands, and whether it gets anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Movement {
    /// 0: its trainer does not beat.
    pub beats: u64,
    /// Whether it waits for others.
    pub waits: bool,
    pub stage: StageIndex,
    /// Updates that are applied.
    pub step: Step,
}

/// What training beats with (RING-4). Any of its threads may.
#[derive(Debug, Clone, Default)]
pub struct Pulse {
    ring: Option<Arc<Ring>>,
}

impl Pulse {
    /// In `ring`, where there is one.
    #[must_use]
    pub fn of(ring: Option<Arc<Ring>>) -> Self {
        Self { ring }
    }

    /// A piece of its work is done.
    pub fn beat(&self) {
        if let Some(ring) = &self.ring {
            ring.header(BEATS).fetch_add(1, Ordering::Relaxed);
        }
    }

    /// It waits for others, or for storage, until what is returned is dropped.
    pub fn wait(&self) -> Wait<'_> {
        if let Some(ring) = &self.ring {
            ring.header(WAITS).fetch_add(1, Ordering::Relaxed);
        }
        Wait(self)
    }
}

/// A wait that has begun; see [`Pulse::wait`].
#[must_use = "the wait ends when this is dropped"]
#[derive(Debug)]
pub struct Wait<'a>(&'a Pulse);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        // Before the wait is over: else it would look for a moment as if nothing had come of it.
        self.0.beat();
        if let Some(ring) = &self.0.ring {
            ring.header(WAITS).fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// What the operations of a generation are recorded in.
#[derive(Debug, Clone, Default)]
pub struct Record {
    ring: Option<Arc<Ring>>,
    generation: Generation,
}

/// An operation that was entered, for [`Record::end`].
#[must_use = "an operation that is never ended looks as if it lasted"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry(u64);

impl Record {
    /// Into `ring`, where there is one.
    #[must_use]
    pub fn of(ring: Option<Arc<Ring>>, generation: Generation) -> Self {
        Self { ring, generation }
    }

    /// For who waits for its operations.
    #[must_use]
    pub fn pulse(&self) -> Pulse {
        Pulse::of(self.ring.clone())
    }

    /// Where training stands, for what begins from here on.
    pub fn at(&self, stage: StageIndex, step: Step) {
        if let Some(ring) = &self.ring {
            ring.header(STAGE).store(stage.0.into(), Ordering::Relaxed);
            ring.header(STEP).store(step.0, Ordering::Relaxed);
        }
    }

    /// An operation begins.
    pub fn begin(&self, kind: CollectiveKind, sequence: u64, bytes: u64) -> Entry {
        let Some(ring) = &self.ring else { return Entry(0) };
        let place = ring.header(CLAIMED).fetch_add(1, Ordering::Relaxed);
        let word = |word: usize| ring.word(place, word);
        word(MARK).store(0, Ordering::Relaxed);
        // Whoever sees any of what follows sees that the mark was taken away.
        fence(Ordering::Release);
        let stage = ring.header(STAGE).load(Ordering::Relaxed);
        let code = KINDS.iter().position(|known| *known == kind).unwrap_or(KINDS.len()) as u64;
        for (at, value) in [
            (GENERATION, self.generation.0),
            (SEQUENCE, sequence),
            (KIND, (stage << 32) | code),
            (AT_STEP, ring.header(STEP).load(Ordering::Relaxed)),
            (BYTES, bytes),
            (BEGAN, now_us()),
            (ENDED, 0),
        ] {
            word(at).store(value, Ordering::Relaxed);
        }
        word(MARK).store(place + 1, Ordering::Release);
        Entry(place + 1)
    }

    /// It is left. Where so many have begun since that its entry is another's, that stays as it is.
    pub fn end(&self, entry: Entry, succeeded: bool) {
        let (Some(ring), Some(place)) = (&self.ring, entry.0.checked_sub(1)) else { return };
        if ring.word(place, MARK).load(Ordering::Relaxed) == entry.0 {
            ring.word(place, ENDED).store(now_us() * 2 + u64::from(!succeeded), Ordering::Release);
        }
    }
}

fn now_us() -> u64 {
    let since = surroundings::wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const GENERATION_3: Generation = Generation(3);

    fn ring() -> (Ring, Record) {
        let agents = Ring::create().unwrap();
        let trainers = Ring::open(agents.address().to_string().parse().unwrap()).unwrap();
        (agents, Record::of(Some(Arc::new(trainers)), GENERATION_3))
    }

    #[test]
    fn the_agent_reads_what_the_trainer_recorded_also_once_it_is_gone() {
        let (ring, record) = ring();
        assert!(ring.read(GENERATION_3).is_empty());
        let first = record.begin(CollectiveKind::AllGather, 0, 12);
        record.at(StageIndex(2), Step(40));
        let second = record.begin(CollectiveKind::ReduceF64, 1, 1 << 40);
        record.end(first, true);
        record.end(second, false);
        let _lasts = record.begin(CollectiveKind::Copy, 2, 0);
        drop(record);
        let [gather, reduce, copy] = ring.read(GENERATION_3)[..] else { panic!("{:?}", ring.read(GENERATION_3)) };
        assert_eq!((gather.kind, gather.sequence, gather.bytes), (CollectiveKind::AllGather, 0, 12));
        assert_eq!((gather.stage, gather.step), (StageIndex(0), Step(0)));
        assert!(matches!(gather.end, OperationEnd::Finished { at_us } if at_us >= gather.began_us), "{gather:?}");
        assert_eq!((reduce.kind, reduce.bytes), (CollectiveKind::ReduceF64, 1 << 40));
        assert_eq!((reduce.stage, reduce.step), (StageIndex(2), Step(40)));
        assert!(matches!(reduce.end, OperationEnd::Failed { at_us } if at_us >= reduce.began_us), "{reduce:?}");
        assert_eq!((copy.kind, copy.sequence, copy.end), (CollectiveKind::Copy, 2, OperationEnd::None));
        assert!(ring.read(Generation(2)).is_empty(), "it is of another generation");
    }

    #[test]
    fn old_entries_give_way_and_few_of_each_counter_are_read() {
        let (ring, record) = ring();
        let old = record.begin(CollectiveKind::ReduceF32, 0, 0);
        for sequence in 1..=ENTRIES {
            let entry = record.begin(CollectiveKind::ReduceF32, sequence, 0);
            record.end(entry, true);
        }
        // Its entry is the last one's.
        record.end(old, false);
        let sum = record.begin(CollectiveKind::GpuSum, 5, 0);
        record.end(sum, true);
        let read = ring.read(GENERATION_3);
        assert_eq!(read.len(), MOST_READ + 1);
        assert!(read.iter().all(|one| matches!(one.end, OperationEnd::Finished { .. })), "{read:?}");
        let sequences: Vec<u64> = read.iter().map(|one| one.sequence).collect();
        let last = ENTRIES - MOST_READ as u64 + 1;
        assert_eq!(sequences, (last..=ENTRIES).chain([5]).collect::<Vec<_>>());
    }

    /// RING-2: while one process writes, what another reads is whole.
    #[test]
    fn what_is_read_is_never_half_of_two() {
        let (ring, record) = ring();
        let deadline = Instant::now() + std::time::Duration::from_secs(60);
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                for sequence in 0..200_000 {
                    let entry = record.begin(CollectiveKind::ReduceF32, sequence, !sequence);
                    record.end(entry, true);
                }
            });
            while !writing.is_finished() {
                assert!(Instant::now() < deadline, "it takes far less");
                for one in ring.read(GENERATION_3) {
                    assert_eq!(one.bytes, !one.sequence, "{one:?}");
                }
            }
        });
        assert_eq!(ring.read(GENERATION_3).len(), MOST_READ);
    }

    /// RING-4
    #[test]
    fn training_beats_or_waits_or_stands_still() {
        let (ring, record) = ring();
        assert_eq!((ring.movement().beats, ring.movement().waits), (0, false));
        let pulse = record.pulse();
        pulse.beat();
        record.at(StageIndex(2), Step(40));
        assert_eq!(ring.movement(), Movement { beats: 1, waits: false, stage: StageIndex(2), step: Step(40) });
        let outer = pulse.wait();
        let inner = pulse.wait();
        drop(inner);
        assert!(ring.movement().waits, "the outer wait lasts");
        drop(outer);
        assert_eq!((ring.movement().beats, ring.movement().waits), (3, false), "a wait that has ended is a beat");
        let none = Pulse::default();
        none.beat();
        drop(none.wait());
    }

    /// RING-3
    #[test]
    fn what_makes_no_sense_is_left_out() {
        let (ring, record) = ring();
        let entry = record.begin(CollectiveKind::Copy, 0, 0);
        record.end(entry, true);
        ring.word(0, KIND).store(77, Ordering::Relaxed);
        assert!(ring.read(GENERATION_3).is_empty());
        assert!("12".parse::<RingAddress>().is_err() && "a:1".parse::<RingAddress>().is_err());
        let none = Record::default();
        let entry = none.begin(CollectiveKind::Copy, 0, 0);
        none.end(entry, true);
    }
}
