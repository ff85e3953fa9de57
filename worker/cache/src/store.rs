//! One key, open for reading and writing.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use crate::entry::{Entry, MAX_DIMS, MAX_TENSORS, PayloadSum, Tensor, payload_bytes};
use crate::index::{Index, Record};
use crate::segment::{Extents, Payloads, Reading, Writing};
use crate::tier::{LOCK_DEADLINE, OpenTier, is_writer_name, own_files};
use crate::{Config, Error, Key, TierName};

/// A step waits on it: sooner recompute than wait for a tier's lock longer.
const PUT_PATIENCE: Duration = Duration::from_millis(250);
/// Bytes are summed in pieces of this, while the processor's cache has them from the copy.
const IN_CACHE: usize = 64 << 10;

/// What became of a record that was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// It is kept in this tier.
    Stored(TierName),
    /// It was there already, so nothing was written.
    Present,
    /// No tier has room for it, and nothing could be evicted; it will be computed again when it is needed.
    Full,
}

/// What an open key holds as far as this process has seen, and what this process did with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// What is kept in memory.
    pub memory: TierStats,
    /// What is kept on disk.
    pub disk: TierStats,
    /// Records read.
    pub hits: u64,
    /// Records asked for and not there, or damaged.
    pub misses: u64,
    /// Damaged records and stretches of index that were met.
    pub damaged: u64,
    /// Keys that this process evicted to make room.
    pub evicted: u64,
}

/// Records and their payloads in one tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierStats {
    /// Records.
    pub entries: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
}

/// One key, open. Threads may share it. While it lives, nobody evicts the key.
#[derive(Debug)]
pub struct Store {
    key: Key,
    writer: String,
    tiers: Vec<HeldTier>,
    writers: Mutex<Vec<Writer>>,
    index: RwLock<Index>,
    hits: AtomicU64,
    misses: AtomicU64,
    damaged: AtomicU64,
    evicted: AtomicU64,
}

#[derive(Debug)]
struct HeldTier {
    tier: OpenTier,
    folder: PathBuf,
    /// Share-locked: keeps the key from being evicted.
    open: File,
}

/// This process's segment of one tier.
#[derive(Debug, Default)]
struct Writer {
    segment: Option<Writing>,
    /// The smallest payload refused since the last refresh, without and with eviction: what is not smaller need not ask again.
    refused: [Option<u64>; 2],
}

impl Store {
    /// Opens `key`, with everything that any process of the node has put under it. `writer` names this process's life: a uuid.
    ///
    /// # Errors
    /// When a tier's folder cannot be used, or its lock is not free within 5 s.
    pub fn open(config: &Config, key: Key, writer: &str) -> Result<Store, Error> {
        if !is_writer_name(writer) {
            return Err(Error::Writer { name: writer.to_owned() });
        }
        let mut tiers = Vec::new();
        for (name, tier) in [(TierName::Memory, &config.memory), (TierName::Disk, &config.disk)] {
            let Some(tier) = OpenTier::open(name, tier)? else { continue };
            let open = tier.lock(LOCK_DEADLINE)?.hold(&key)?;
            tiers.push(HeldTier { folder: tier.key_folder(&key), tier, open });
        }
        let store = Store {
            key,
            writer: writer.to_owned(),
            writers: Mutex::new(tiers.iter().map(|_| Writer::default()).collect()),
            tiers,
            index: RwLock::default(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        };
        store.refresh()?;
        store.seal()?;
        Ok(store)
    }

    /// The key that is open.
    #[must_use]
    pub fn key(&self) -> Key {
        self.key
    }

    /// Whether a record is there, as far as is known without reading it. Counts as neither hit nor miss.
    #[must_use]
    pub fn contains(&self, sample: u32, view: u16) -> bool {
        self.lookup(sample, view).is_some()
    }

    /// The record of a sample's view, to size buffers for [`Self::read`]. Absent counts as a miss.
    #[must_use]
    pub fn find(&self, sample: u32, view: u16) -> Option<Record> {
        let found = self.lookup(sample, view);
        if found.is_none() {
            self.misses.fetch_add(1, Relaxed);
        }
        found
    }

    /// Reads a record straight into the caller's buffers, one a tensor. False is a miss: the record was damaged, the buffers hold
    /// anything, and the sample is to be computed and put again.
    ///
    /// # Errors
    /// When the buffers' lengths are not those of the record's tensors.
    pub fn read(&self, record: &Record, into: &mut [&mut [u8]]) -> Result<bool, Error> {
        let matches = |record: &Record, into: &[&mut [u8]]| {
            into.len() == record.tensors().len()
                && into.iter().zip(record.tensors()).all(|(b, tensor)| b.len() as u64 == u64::from(tensor.bytes))
        };
        if !matches(record, into) {
            return Err(Error::Size {
                sample: record.0.sample,
                view: record.0.view,
                given: into.iter().map(|buffer| buffer.len()).collect(),
                wanted: record.tensors().iter().map(|tensor| tensor.bytes as usize).collect(),
            });
        }
        let mut record = record.clone();
        loop {
            if self.read_checked(&record, into) {
                self.hits.fetch_add(1, Relaxed);
                return Ok(true);
            }
            match self.lookup(record.0.sample, record.0.view) {
                Some(spare) if matches(&spare, into) => record = spare,
                _ => break,
            }
        }
        self.misses.fetch_add(1, Relaxed);
        Ok(false)
    }

    /// Reads a record behind what `into` holds: the tensors' bytes one after another. `None` is a miss, and leaves `into` as it was.
    pub fn get(&self, sample: u32, view: u16, into: &mut Vec<u8>) -> Option<Record> {
        let start = into.len();
        while let Some(record) = self.lookup(sample, view) {
            into.resize(start + usize::try_from(record.bytes()).ok()?, 0);
            if self.read_checked(&record, &mut [&mut into[start..]]) {
                self.hits.fetch_add(1, Relaxed);
                return Some(record);
            }
            into.truncate(start);
        }
        self.misses.fetch_add(1, Relaxed);
        None
    }

    /// Keeps a record: `pieces` are the tensors' bytes, one piece a tensor. Memory first, then disk; then in place of keys that nobody
    /// has open. Others see it once they refresh.
    ///
    /// # Errors
    /// When the pieces do not match the tensors, or a tier's folder cannot be written. Lack of room is no error.
    pub fn put(&self, sample: u32, view: u16, tensors: &[Tensor], pieces: &[&[u8]]) -> Result<Put, Error> {
        check_shape(sample, view, tensors, pieces)?;
        if self.contains(sample, view) {
            return Ok(Put::Present);
        }
        let bytes = payload_bytes(tensors);
        let Some((place, payloads, offset)) = self.reserve(bytes)? else { return Ok(Put::Full) };
        let mut at = offset;
        let mut sum = PayloadSum::new(&self.key, sample, view);
        for piece in pieces.iter().flat_map(|piece| piece.chunks(IN_CACHE)) {
            sum.add(piece);
            if let Err(source) = payloads.file.write_all_at(piece, at) {
                return self.not_written(place, source);
            }
            at += piece.len() as u64;
        }
        let sum = sum.finish();
        let entry = Entry { sample, view, offset, bytes, sum, tensors: tensors.to_vec() };
        if let Some(segment) = &mut self.writers()[place].segment {
            segment.append(&entry).map_err(self.wrong(place, "write an index entry to"))?;
        }
        self.index.write().unwrap_or_else(PoisonError::into_inner).insert(&payloads, entry);
        Ok(Put::Stored(payloads.tier))
    }

    /// Picks up what other processes have put since, and asks for room again where there was none. Microseconds where there is
    /// nothing new: call it once a batch.
    ///
    /// # Errors
    /// When a tier's folder cannot be read.
    pub fn refresh(&self) -> Result<(), Error> {
        let mut writers = self.writers();
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        for (place, (held, writer)) in self.tiers.iter().zip(writers.iter_mut()).enumerate() {
            writer.refused = [None; 2];
            let own = writer.segment.as_ref().map(|segment| segment.index_path.as_path());
            for path in own_files(&held.folder).map_err(self.wrong(place, "list"))? {
                if path.extension() == Some(OsStr::new("data"))
                    || Some(path.as_path()) == own
                    || index.known.contains(&path)
                {
                    continue;
                }
                if let Some(segment) =
                    Reading::open(held.tier.name, &self.key, &path).map_err(self.wrong(place, "read"))?
                {
                    index.segments.push(segment);
                    index.known.insert(path);
                }
            }
        }
        drop(writers);
        let mut segments = std::mem::take(&mut index.segments);
        for segment in &mut segments {
            let damaged = segment.follow(|payloads, entry| index.insert(payloads, entry));
            self.report_index(segment, damaged);
        }
        index.segments = segments;
        Ok(())
    }

    /// What the key holds and what was done with it. Walks over all records: for a report, not for every batch.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut stats = Stats {
            hits: self.hits.load(Relaxed),
            misses: self.misses.load(Relaxed),
            damaged: self.damaged.load(Relaxed),
            evicted: self.evicted.load(Relaxed),
            ..Stats::default()
        };
        for record in self.index.read().unwrap_or_else(PoisonError::into_inner).records.values() {
            let tier = match record.tier() {
                TierName::Memory => &mut stats.memory,
                TierName::Disk => &mut stats.disk,
            };
            tier.entries += 1;
            tier.bytes += record.bytes();
        }
        stats
    }

    fn lookup(&self, sample: u32, view: u16) -> Option<Record> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).records.get(&(sample, view)).cloned()
    }

    fn writers(&self) -> MutexGuard<'_, Vec<Writer>> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the payload and, the first time, checks it; forgets the record where it is not what was put (`CACHE-1`).
    fn read_checked(&self, record: &Record, into: &mut [&mut [u8]]) -> bool {
        let stored = &record.0;
        let checked = stored.verified.load(Relaxed);
        let mut sum = PayloadSum::new(&stored.payloads.key, stored.sample, stored.view);
        let mut at = stored.offset;
        let read: io::Result<()> = into
            .iter_mut()
            .flat_map(|buffer| buffer.chunks_mut(if checked { usize::MAX } else { IN_CACHE }))
            .try_for_each(|chunk| {
                stored.payloads.file.read_exact_at(chunk, at)?;
                at += chunk.len() as u64;
                if !checked {
                    sum.add(chunk);
                }
                Ok(())
            });
        let right = read.is_ok() && (checked || sum.finish() == stored.sum);
        if right {
            stored.verified.store(true, Relaxed);
            return true;
        }
        self.damaged.fetch_add(1, Relaxed);
        if !stored.payloads.reported.swap(true, Relaxed) {
            let why = read.err().map_or_else(|| "its checksum is wrong".to_owned(), |error| error.to_string());
            let (sample, view, file) = (stored.sample, stored.view, stored.payloads.path.display());
            tracing::warn!(%file, sample, view, why, "a cached prefix output is damaged and will be computed again");
        }
        self.index.write().unwrap_or_else(PoisonError::into_inner).forget(record);
        false
    }

    /// Room ends here only where the file system could not reserve it.
    fn not_written(&self, place: usize, source: io::Error) -> Result<Put, Error> {
        let writer = &mut self.writers()[place];
        if let Some(segment) = &mut writer.segment {
            segment.abandon();
        }
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                writer.refused = [Some(0); 2];
                Ok(Put::Full)
            }
            _ => Err(self.wrong(place, "write a record to")(source)),
        }
    }

    /// A place for `bytes`: which tier, its payload file, and the offset.
    fn reserve(&self, bytes: u64) -> Result<Option<(usize, Arc<Payloads>, u64)>, Error> {
        let mut writers = self.writers();
        for evict in [false, true] {
            // Room in memory comes first. But what is evicted is first what lies on disk.
            let order: [TierName; 2] =
                if evict { [TierName::Disk, TierName::Memory] } else { [TierName::Memory, TierName::Disk] };
            for name in order {
                let Some(place) = self.tiers.iter().position(|held| held.tier.name == name) else { continue };
                let writer = &mut writers[place];
                if writer.refused[usize::from(evict)].is_some_and(|least| bytes >= least) {
                    continue;
                }
                if self.make_room(place, writer, bytes, evict)?
                    && let Some(segment) = &mut writer.segment
                {
                    return Ok(Some((place, Arc::clone(&segment.payloads), segment.place(bytes))));
                }
                writer.refused[usize::from(evict)] = Some(bytes);
            }
        }
        Ok(None)
    }

    /// Lengthens this process's segment where it is too short.
    fn make_room(&self, place: usize, writer: &mut Writer, bytes: u64, evict: bool) -> Result<bool, Error> {
        let tier = &self.tiers[place].tier;
        let extents = writer.segment.as_ref().map_or(Extents::default(), |segment| segment.extents);
        let Some(growths) = extents.growth(bytes, tier.max_bytes) else { return Ok(true) };
        // Whoever holds the lock for so long is stopped; the record is computed again (`CACHE-6`).
        let locked = match tier.lock(PUT_PATIENCE) {
            Err(Error::Busy { .. }) => return Ok(false),
            locked => locked?,
        };
        let wrong = || self.wrong(place, "make room in");
        for growth in growths {
            if evict {
                self.evicted.fetch_add(locked.evict(growth.bytes).map_err(wrong())?, Relaxed);
            }
            if growth.bytes > locked.room().map_err(wrong())? {
                continue;
            }
            let segment = match &mut writer.segment {
                Some(segment) => segment,
                none => none.insert(
                    Writing::create(&locked, tier.name, &self.key, &self.tiers[place].folder, &self.writer)
                        .map_err(wrong())?,
                ),
            };
            if segment.grow(&locked, growth).map_err(wrong())? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes back what dead writers of this key had reserved.
    fn seal(&self) -> Result<(), Error> {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        let mut segments = std::mem::take(&mut index.segments);
        for (place, held) in self.tiers.iter().enumerate() {
            let wrong = || self.wrong(place, "shorten a dead writer's files in");
            let mut spare = Vec::new();
            for segment in segments.iter_mut().filter(|segment| segment.payloads.tier == held.tier.name) {
                if segment.has_spare().map_err(wrong())? {
                    spare.push(segment);
                }
            }
            if spare.is_empty() {
                continue;
            }
            let locked = held.tier.lock(LOCK_DEADLINE)?;
            for segment in spare {
                segment.seal(&locked, |payloads, entry| index.insert(payloads, entry)).map_err(wrong())?;
            }
        }
        index.segments = segments;
        Ok(())
    }

    fn report_index(&self, segment: &Reading, damaged: io::Result<u64>) {
        let file = segment.payloads.path.with_extension("index");
        match damaged {
            Ok(0) => return,
            Ok(stretches) => {
                self.damaged.fetch_add(stretches, Relaxed);
            }
            Err(_) => {
                self.damaged.fetch_add(1, Relaxed);
            }
        }
        if !segment.payloads.reported.swap(true, Relaxed) {
            tracing::warn!(file = %file.display(), "a prefix cache index is damaged; records in it may be computed again");
        }
    }

    fn wrong(&self, place: usize, operation: &'static str) -> impl FnOnce(io::Error) -> Error {
        let held = &self.tiers[place];
        Error::folder(operation, &held.folder, &held.tier.folder)
    }
}

/// Closing is a use: the key becomes the last to be evicted.
impl Drop for Store {
    fn drop(&mut self) {
        for held in &self.tiers {
            let _ = held.open.set_modified(SystemTime::now());
        }
    }
}

fn check_shape(sample: u32, view: u16, tensors: &[Tensor], pieces: &[&[u8]]) -> Result<(), Error> {
    let dims = tensors.iter().map(|tensor| tensor.dims.len()).max().unwrap_or(0);
    if !(1..=MAX_TENSORS).contains(&tensors.len()) || dims > MAX_DIMS {
        return Err(Error::Shape { tensors: tensors.len(), dims });
    }
    let given: Vec<usize> = pieces.iter().map(|piece| piece.len()).collect();
    let wanted: Vec<usize> = tensors.iter().map(|tensor| tensor.bytes as usize).collect();
    if given == wanted { Ok(()) } else { Err(Error::Size { sample, view, given, wanted }) }
}
