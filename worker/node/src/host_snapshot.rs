//! [`HostSnapshot`]: a run's state in memory of its host, which outlives the trainers that wrote it.
//!
//! ```text
//! header │ contents (JSON) │ body: the tensors' bytes
//!
//! trainer ── creates, fills, tells ──▶ agent opens it, and so keeps it ── its address in StartTrainer ──▶ a later trainer opens it
//! ```
//!
//! - `HSNAP-1`: it is told once it is complete, and never changes after that: a death leaves the one before, or the whole new one.
//! - `HSNAP-2`: what is opened is what was told, of that run, generation and step, and its contents have their hash, before anything of it is used.
//!   The body is as large as the state, and hashing it beside training would cost what a snapshot is to save; it is memory as trainers' own is, and
//!   what is loaded from it has a digest that ranks compare (KEEP-2).
//! - `HSNAP-3`: its memory is there for as long as some process has it open, and no longer.

use bytes::Bytes;
use std::io;
use thaw_core::survivors::Snapshot;
use thaw_proto::ids::{Generation, Step};
use thaw_proto::pb;
use thaw_proto::run::Position;
use thaw_shm::{Segment, SegmentAddress};

/// `THAWSNAP`, and the version of all that follows.
const MARKS: [u64; 2] = [u64::from_le_bytes(*b"THAWSNAP"), 1];
/// Words of the header: marks, run, generation, step, moves, bytes of the contents, bytes of the body.
const WORDS: usize = 8;
/// Behind them lies the hash of the words and the contents.
const HASH: usize = WORDS * size_of::<u64>();
const HEADER: usize = 128;

/// Why a snapshot cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address does not parse.
    #[error("host_snapshot.address: {0}")]
    Address(String),
    /// The memory cannot be reached.
    #[error("the memory of the snapshot at {address} cannot be reached")]
    Memory {
        /// As told.
        address: SegmentAddress,
        /// What the system said.
        source: io::Error,
    },
    /// It is another one than was told.
    #[error("at {address} lies no snapshot of {expected} of this run")]
    Another {
        /// As told.
        address: SegmentAddress,
        /// As told.
        expected: Snapshot,
    },
    /// It is not as it was written.
    #[error("the snapshot of {snapshot} is damaged: {what}")]
    Damaged {
        /// Which.
        snapshot: Snapshot,
        /// What does not fit.
        what: &'static str,
    },
}

/// See the module.
#[derive(Debug)]
pub struct HostSnapshot {
    segment: Segment,
    snapshot: Snapshot,
    position: Option<pb::Position>,
}

impl HostSnapshot {
    /// A complete one of a run that stands at `position`, whose step is that of `snapshot`.
    ///
    /// # Errors
    /// What the system says: there is no memory left.
    pub fn create(
        run: &str,
        snapshot: Snapshot,
        position: Position,
        contents: &[u8],
        body: Vec<Bytes>,
    ) -> io::Result<Self> {
        let body_bytes: usize = body.iter().map(Bytes::len).sum();
        let segment = Segment::create(HEADER + contents.len() + body_bytes)?;
        let words = words(run, snapshot, [contents.len(), body_bytes]);
        segment.write(0, &words);
        segment.write(HASH, hash(&words, contents).as_bytes());
        let mut end = HEADER;
        // Each lets go of what it was copied from as soon as it lies here.
        for piece in std::iter::once(Bytes::copy_from_slice(contents)).chain(body) {
            segment.fill(end, &piece)?;
            end += piece.len();
        }
        Ok(Self { segment, snapshot, position: Some((&position).into()) })
    }

    /// Another process's, as it was told.
    ///
    /// # Errors
    /// [`Error::Address`], [`Error::Memory`]: that process is gone, or has let go of it; [`Error::Another`].
    pub fn open(run: &str, told: &pb::HostSnapshot) -> Result<Self, Error> {
        let address: SegmentAddress = told.address.parse().map_err(Error::Address)?;
        let memory = |source| Error::Memory { address, source };
        let bytes = usize::try_from(told.bytes).map_err(|_| memory(io::ErrorKind::InvalidInput.into()))?;
        if bytes < HEADER {
            return Err(memory(io::ErrorKind::InvalidInput.into()));
        }
        let snapshot = snapshot_of(told);
        let segment = Segment::open(address.into(), bytes).map_err(memory)?;
        let found = header(&segment);
        let lengths = lengths(&found).filter(|[contents, body]| HEADER + contents + body == bytes);
        if lengths.is_none_or(|lengths| found != words(run, snapshot, lengths)) {
            return Err(Error::Another { address, expected: snapshot });
        }
        Ok(Self { segment, snapshot, position: told.position })
    }

    /// What others of this host need to open it while this process has it.
    #[must_use]
    pub fn told(&self) -> pb::HostSnapshot {
        pb::HostSnapshot {
            address: SegmentAddress::from(self.segment.address()).to_string(),
            bytes: self.segment.len() as u64,
            generation: self.snapshot.generation.0,
            position: self.position,
            moves: self.snapshot.moves,
        }
    }

    /// Which state it is.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot
    }

    /// Its contents and its body, in the memory where they lie.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn read(self) -> Result<(Bytes, Bytes), Error> {
        let damaged = |what| Error::Damaged { snapshot: self.snapshot, what };
        let words = header(&self.segment);
        let bytes = self.segment.len();
        let lengths = lengths(&words).filter(|[contents, body]| HEADER + contents + body == bytes);
        let [contents, _] = lengths.ok_or_else(|| damaged("its lengths are not that of its memory"))?;
        let expected: &[u8] = self.segment.numbers(HASH, blake3::OUT_LEN);
        if hash(&words, self.segment.numbers(HEADER, contents)).as_bytes()[..] != *expected {
            return Err(damaged("its contents do not have their hash"));
        }
        let whole = Bytes::from_owner(Memory(self.segment));
        Ok((whole.slice(HEADER..HEADER + contents), whole.slice(HEADER + contents..)))
    }
}

/// Which state a message is about.
#[must_use]
pub fn snapshot_of(told: &pb::HostSnapshot) -> Snapshot {
    let step = told.position.map_or(0, |position| position.step);
    Snapshot { step: Step(step), moves: told.moves, generation: Generation(told.generation) }
}

/// A segment that nobody writes to any more (HSNAP-1).
struct Memory(Segment);

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        self.0.numbers(0, self.0.len())
    }
}

fn words(run: &str, snapshot: Snapshot, [contents, body]: [usize; 2]) -> [u64; WORDS] {
    let hash = blake3::hash(run.as_bytes());
    let (run, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    let run = u64::from_le_bytes(*run);
    let [mark, version] = MARKS;
    let Snapshot { step, moves, generation } = snapshot;
    [mark, version, run, generation.0, step.0, moves, contents as u64, body as u64]
}

fn header(segment: &Segment) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    words.copy_from_slice(segment.numbers(0, WORDS));
    words
}

/// Of contents and body; `None` where they are no lengths that memory can have.
fn lengths(words: &[u64; WORDS]) -> Option<[usize; 2]> {
    let [.., contents, body] = words.map(|word| usize::try_from(word).ok());
    let all = contents?.checked_add(body?)?.checked_add(HEADER)?;
    isize::try_from(all).ok().and(Some([contents?, body?]))
}

fn hash(words: &[u64; WORDS], contents: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for word in words {
        hasher.update(&word.to_le_bytes());
    }
    hasher.update(contents);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SNAPSHOT: Snapshot = Snapshot { step: Step(7), moves: 15, generation: Generation(2) };

    fn written() -> HostSnapshot {
        let position = Position { step: Step(7), ..Position::default() };
        let body = vec![Bytes::from_static(b"weights"), Bytes::new(), Bytes::from_static(b"moments")];
        HostSnapshot::create("demo", SNAPSHOT, position, b"{}", body).unwrap()
    }

    #[test]
    fn what_was_written_is_read_also_once_its_writer_is_gone() {
        let own = written();
        let told = own.told();
        assert_eq!((told.bytes, snapshot_of(&told)), (128 + 2 + 14, SNAPSHOT));
        let other = HostSnapshot::open("demo", &told).unwrap();
        drop(own);
        assert_eq!(other.snapshot(), SNAPSHOT);
        let (contents, body) = other.read().unwrap();
        assert_eq!((&contents[..], &body[..]), (&b"{}"[..], &b"weightsmoments"[..]));
    }

    /// HSNAP-2: a descriptor that is used again leads to something else.
    #[test]
    fn what_was_not_told_is_not_opened() {
        let own = written();
        let told = own.told();
        let another = |run: &str, told: pb::HostSnapshot| {
            let found = HostSnapshot::open(run, &told);
            assert!(matches!(found, Err(Error::Another { .. })), "{found:?}");
        };
        another("other", told.clone());
        another("demo", pb::HostSnapshot { generation: 3, ..told.clone() });
        another("demo", pb::HostSnapshot { moves: 14, ..told.clone() });
        another("demo", pb::HostSnapshot { position: None, ..told.clone() });
        another("demo", pb::HostSnapshot { bytes: told.bytes - 1, ..told.clone() });
        let unreachable = |told: pb::HostSnapshot| {
            let found = HostSnapshot::open("demo", &told);
            assert!(matches!(found, Err(Error::Memory { .. })), "{found:?}");
        };
        unreachable(pb::HostSnapshot { bytes: told.bytes + 1, ..told.clone() });
        unreachable(pb::HostSnapshot { bytes: 127, ..told.clone() });
        let nonsense = pb::HostSnapshot { address: "12".to_owned(), ..told.clone() };
        assert!(matches!(HostSnapshot::open("demo", &nonsense), Err(Error::Address(_))));
        drop(own);
        let gone = HostSnapshot::open("demo", &told);
        assert!(gone.is_err(), "{gone:?}");
    }

    /// HSNAP-2
    #[test]
    fn no_damage_to_header_hash_or_contents_is_missed() {
        for at in (0..HASH + blake3::OUT_LEN).chain(HEADER..HEADER + 2) {
            let own = written();
            let byte = own.segment.numbers::<u8>(at, 1)[0];
            own.segment.write(at, &[byte ^ 1]);
            assert!(matches!(own.read(), Err(Error::Damaged { .. })), "byte {at}");
        }
    }
}
