//! One key, open for reading and writing.

use super::rows::{self, HEADER_BYTES, MAX_BYTES, MAX_META_BYTES, Name, Place};
use super::tier::{OpenKey, rows_files};
use super::{Config, Error, Key};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

/// A file is made longer by this at a time, so that the ledger is seldom locked; by less where the budget is small.
const EXTENT_BYTES: u64 = 8 << 20;

/// What became of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    Stored,
    /// Neither tier has room, and no unused key can make some.
    Full,
}

/// What a store holds and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    pub rows: u64,
    pub hits: u64,
    pub misses: u64,
    /// Rows that failed their checksum.
    pub damaged: u64,
}

/// See the module. Shared between threads; open once per process and key.
#[derive(Debug)]
pub struct Store {
    /// Memory first.
    tiers: Vec<OpenKey>,
    index: RwLock<Index>,
    writer: Mutex<Writer>,
    hits: AtomicU64,
    misses: AtomicU64,
    damaged: AtomicU64,
}

#[derive(Debug, Default)]
struct Index {
    files: Vec<Arc<File>>,
    /// Name → file, place.
    rows: HashMap<Name, (usize, Place)>,
}

#[derive(Debug)]
struct Writer {
    /// Names this process's files.
    process: String,
    /// The tier written to; past the last when all are full.
    tier: usize,
    file: Option<OpenFile>,
    row: Vec<u8>,
}

#[derive(Debug)]
struct OpenFile {
    file: Arc<File>,
    path: PathBuf,
    /// In the index's files.
    number: usize,
    used: u64,
    length: u64,
}

impl Store {
    /// Opens a key: takes its lock and finds every row that any process has written so far.
    ///
    /// # Errors
    /// Folders that cannot be made, files that cannot be read.
    pub fn open(config: &Config, key: Key) -> Result<Self, Error> {
        let used = [&config.memory, &config.disk].into_iter().filter(|tier| tier.max_bytes > 0);
        let tiers = used.map(|tier| OpenKey::open(tier, &key)).collect::<Result<Vec<_>, _>>()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        let process = format!("{}-{now}", std::process::id());
        let mut index = Index::default();
        for path in tiers.iter().flat_map(|tier| rows_files(&tier.folder)) {
            index.scan(&path)?;
        }
        Ok(Self {
            tiers,
            index: RwLock::new(index),
            writer: Mutex::new(Writer { process, tier: 0, file: None, row: Vec::new() }),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
        })
    }

    /// Whether a row is there, as far as its header tells.
    #[must_use]
    pub fn contains(&self, sample: u32, view: u32) -> bool {
        self.index.read().unwrap_or_else(PoisonError::into_inner).rows.contains_key(&(sample, view))
    }

    /// Reads a row's bytes behind what `into` holds; returns what describes it. `None`: it is not there, or damaged (CACHE-1).
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn get(&self, sample: u32, view: u32, into: &mut Vec<u8>) -> Result<Option<Vec<u8>>, Error> {
        let name = (sample, view);
        let found = {
            let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
            index.rows.get(&name).map(|(file, place)| (Arc::clone(&index.files[*file]), *place))
        };
        let Some((file, place)) = found else {
            self.misses.fetch_add(1, Ordering::Relaxed);
            return Ok(None);
        };
        let failed = |source| Error::Rows { action: "read a row of", path: self.folder(), source };
        let row = rows::read(&file, name, place, into).map_err(failed)?;
        if row.is_some() {
            self.hits.fetch_add(1, Ordering::Relaxed);
        } else {
            self.misses.fetch_add(1, Ordering::Relaxed);
            self.damaged.fetch_add(1, Ordering::Relaxed);
            self.index.write().unwrap_or_else(PoisonError::into_inner).rows.remove(&name);
            tracing::warn!(sample, view, "a row of the prefix cache is damaged; it will be computed again");
        }
        Ok(row)
    }

    /// Writes a row: what describes it, and its bytes. A row of that name is replaced for this process and those that open the key later.
    ///
    /// # Errors
    /// A row too long, or a file that cannot be written.
    pub fn put(&self, sample: u32, view: u32, meta: &[u8], data: &[u8]) -> Result<Kept, Error> {
        if data.len() > MAX_BYTES as usize || meta.len() > MAX_META_BYTES as usize {
            return Err(Error::Size { bytes: data.len().max(meta.len()) });
        }
        let mut writer = self.writer();
        let mut row = std::mem::take(&mut writer.row);
        rows::encode((sample, view), meta, data, &mut row);
        let written = self.append(&mut writer, &row);
        writer.row = row;
        let Some((number, offset)) = written? else { return Ok(Kept::Full) };
        let place = Place { offset, meta_bytes: meta.len() as u32, data_bytes: data.len() as u32 };
        self.index.write().unwrap_or_else(PoisonError::into_inner).rows.insert((sample, view), (number, place));
        Ok(Kept::Stored)
    }

    /// What it holds and did so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            rows: self.index.read().unwrap_or_else(PoisonError::into_inner).rows.len() as u64,
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            damaged: self.damaged.load(Ordering::Relaxed),
        }
    }

    /// Appends to this process's file, in the first tier that has room. Returns the file's number and the offset; `None`: all are full.
    fn append(&self, writer: &mut Writer, row: &[u8]) -> Result<Option<(usize, u64)>, Error> {
        while let Some(tier) = self.tiers.get(writer.tier) {
            let mut open = match writer.file.take() {
                Some(open) => open,
                None => self.create(tier, writer)?,
            };
            if Self::make_room(tier, &mut open, row.len() as u64)? {
                match open.file.write_all_at(row, open.used) {
                    Ok(()) => {
                        let at = (open.number, open.used);
                        open.used += row.len() as u64;
                        writer.file = Some(open);
                        return Ok(Some(at));
                    }
                    // A memory file system has less room than its budget promised.
                    Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {}
                    Err(source) => return Err(Error::Rows { action: "write a row to", path: open.path, source }),
                }
            }
            open.close();
            writer.tier += 1;
        }
        Ok(None)
    }

    fn create(&self, tier: &OpenKey, writer: &Writer) -> Result<OpenFile, Error> {
        let path = tier.folder.join(format!("{}.rows", writer.process));
        let file = OpenOptions::new().create_new(true).read(true).write(true).open(&path);
        let file = Arc::new(file.map_err(|source| Error::Rows { action: "create", path: path.clone(), source })?);
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        index.files.push(Arc::clone(&file));
        Ok(OpenFile { file, path, number: index.files.len() - 1, used: 0, length: 0 })
    }

    fn make_room(tier: &OpenKey, open: &mut OpenFile, bytes: u64) -> Result<bool, Error> {
        if open.used + bytes <= open.length {
            return Ok(true);
        }
        let extent = EXTENT_BYTES.min(tier.max_bytes() / 16).max(bytes);
        for length in [open.used + extent, open.used + bytes] {
            if tier.grow(&open.file, length)? {
                open.length = length;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self) -> PathBuf {
        self.tiers.first().map(|tier| tier.folder.clone()).unwrap_or_default()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(open) = self.writer().file.take() {
            open.close();
        }
    }
}

impl OpenFile {
    /// Gives back what was taken and not written to.
    fn close(self) {
        // What is left behind where this fails is counted, and goes with its key.
        let _kept_longer = self.file.set_len(self.used);
    }
}

impl Index {
    /// Takes in every row of a file, up to the first place where none begins.
    fn scan(&mut self, path: &std::path::Path) -> Result<(), Error> {
        let failed = |source| Error::Rows { action: "read", path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let end = file.metadata().map_err(failed)?.len();
        let number = self.files.len();
        let mut offset = 0;
        while offset + HEADER_BYTES <= end
            && let Some((name, place)) = rows::header_at(&file, offset, end).map_err(failed)?
        {
            self.rows.insert(name, (number, place));
            offset += place.bytes();
        }
        self.files.push(Arc::new(file));
        Ok(())
    }
}
