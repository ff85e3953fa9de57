//! A segment: the records one process wrote to one tier, as a payload file and an index that others follow.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::entry::{Entry, MAX_ENTRY, next};
use crate::tier::Locked;
use crate::{Key, TierName};

/// Payloads start at cache lines.
const PAYLOAD_ALIGN: u64 = 64;
const PAGE: u64 = 4096;
/// Files grow by as much as they hold, within these, and by a 64th of a budget at most: rarely, and leaving little unused. What is reserved
/// costs the system time, whether it is used or not.
const LARGEST_EXTENT: u64 = 64 << 20;
const FIRST_EXTENT: u64 = 1 << 20;
const SMALLEST_EXTENT: u64 = 16 << 10;
/// An index is read in pieces of this.
const CHUNK: u64 = 1 << 20;

/// A payload file that records point into.
#[derive(Debug)]
pub(crate) struct Payloads {
    pub(crate) tier: TierName,
    pub(crate) key: Key,
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    /// Damage was reported: once a file.
    pub(crate) reported: AtomicBool,
}

/// What a segment's two files hold, and how long they are: the rest is reserved.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Extents {
    data_used: u64,
    data_reserved: u64,
    index_used: u64,
    /// For entries of payloads that are being written.
    index_promised: u64,
    index_reserved: u64,
}

/// Lengths that a segment's two files should get.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Growth {
    data: u64,
    index: u64,
    /// Bytes that both grow by.
    pub(crate) bytes: u64,
}

impl Extents {
    /// How the files must grow for a record of `payload` bytes, with an extent to spare and without; `None` where it fits already.
    pub(crate) fn growth(&self, payload: u64, max_bytes: u64) -> Option<[Growth; 2]> {
        let data = self.data_used.saturating_add(payload);
        let index = self.index_used + self.index_promised + MAX_ENTRY as u64;
        if data <= self.data_reserved && index <= self.index_reserved {
            return None;
        }
        let extent = (max_bytes / 64).clamp(SMALLEST_EXTENT, LARGEST_EXTENT).min(self.data_used.max(FIRST_EXTENT));
        Some([(extent, extent / 1024), (0, 0)].map(|(data_spare, index_spare)| {
            let data = length(data, self.data_reserved, data_spare);
            let index = length(index, self.index_reserved, index_spare);
            Growth { data, index, bytes: (data - self.data_reserved).saturating_add(index - self.index_reserved) }
        }))
    }
}

fn length(needed: u64, reserved: u64, spare: u64) -> u64 {
    if needed <= reserved {
        return reserved;
    }
    needed.saturating_add(spare).checked_next_multiple_of(PAGE).unwrap_or(u64::MAX)
}

/// A segment being written by this process.
#[derive(Debug)]
pub(crate) struct Writing {
    pub(crate) payloads: Arc<Payloads>,
    pub(crate) extents: Extents,
    pub(crate) index_path: PathBuf,
    /// Exclusively locked while this process lives.
    index: File,
}

impl Writing {
    /// New files for `writer` in a key's folder; under the tier's lock, so that nobody takes an unlocked index for a dead writer's.
    pub(crate) fn create(
        _locked: &Locked<'_>,
        tier: TierName,
        key: &Key,
        folder: &Path,
        writer: &str,
    ) -> io::Result<Writing> {
        let fresh = |path: &Path| OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        for n in 0_u32.. {
            let index_path = folder.join(format!("{writer}-{n}.index"));
            let index = match fresh(&index_path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                index => index?,
            };
            index.try_lock().map_err(io::Error::from)?;
            let path = folder.join(format!("{writer}-{n}.data"));
            let file = match fresh(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                file => file?,
            };
            let payloads = Arc::new(Payloads { tier, key: *key, path, file, reported: AtomicBool::new(false) });
            return Ok(Writing { payloads, extents: Extents::default(), index_path, index });
        }
        Err(io::Error::other("every segment name of this writer is taken"))
    }

    /// Grows both files or neither; false where the file system has no room.
    pub(crate) fn grow(&mut self, locked: &Locked<'_>, growth: Growth) -> io::Result<bool> {
        let extents = &mut self.extents;
        if !locked.lengthen(&self.payloads.file, extents.data_reserved, growth.data)? {
            return Ok(false);
        }
        if !locked.lengthen(&self.index, extents.index_reserved, growth.index)? {
            self.payloads.file.set_len(extents.data_reserved)?;
            return Ok(false);
        }
        (extents.data_reserved, extents.index_reserved) = (growth.data, growth.index);
        Ok(true)
    }

    /// Gives out the place of a payload that fits, and promises room for its entry: [`Self::append`] or [`Self::abandon`] follows.
    pub(crate) fn place(&mut self, payload: u64) -> u64 {
        self.extents.index_promised += MAX_ENTRY as u64;
        let offset = self.extents.data_used;
        self.extents.data_used = (offset + payload).next_multiple_of(PAYLOAD_ALIGN);
        offset
    }

    /// Adds the entry of a payload that is written: from here on others see it. One after another, so that readers meet no holes.
    pub(crate) fn append(&mut self, entry: &Entry) -> io::Result<()> {
        let place = self.extents.index_used;
        let mut bytes = Vec::with_capacity(MAX_ENTRY);
        entry.encode(&self.payloads.key, place, &mut bytes);
        self.index.write_all_at(&bytes, place)?;
        self.extents.index_used += bytes.len() as u64;
        self.extents.index_promised -= MAX_ENTRY as u64;
        Ok(())
    }

    /// Gives up the entry of a payload that could not be written.
    pub(crate) fn abandon(&mut self) {
        self.extents.index_promised -= MAX_ENTRY as u64;
    }
}

/// Gives back what was reserved and not used. Shrinking needs no lock: it only makes room.
impl Drop for Writing {
    fn drop(&mut self) {
        let _ = self.payloads.file.set_len(self.extents.data_used);
        let _ = self.index.set_len(self.extents.index_used);
    }
}

/// A segment that another process writes or wrote.
#[derive(Debug)]
pub(crate) struct Reading {
    pub(crate) payloads: Arc<Payloads>,
    index: File,
    /// The index is read up to here, behind the last whole entry.
    read: u64,
    /// The last payload ends here.
    data_end: u64,
}

impl Reading {
    /// `None` where the segment has gone meanwhile.
    pub(crate) fn open(tier: TierName, key: &Key, index_path: &Path) -> io::Result<Option<Reading>> {
        let path = index_path.with_extension("data");
        let open = |path: &Path| match OpenOptions::new().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            file => file.map(Some),
        };
        let (Some(index), Some(file)) = (open(index_path)?, open(&path)?) else { return Ok(None) };
        let payloads = Arc::new(Payloads { tier, key: *key, path, file, reported: AtomicBool::new(false) });
        Ok(Some(Reading { payloads, index, read: 0, data_end: 0 }))
    }

    /// Reads the entries that are new; how many stretches of damage lie between them. What follows the last whole entry is read again
    /// next time: it may be one that is just being written.
    pub(crate) fn follow(&mut self, mut found: impl FnMut(&Arc<Payloads>, Entry)) -> io::Result<u64> {
        let length = self.index.metadata()?.len();
        let (mut damaged, mut from) = (0, self.read);
        while from < length {
            let buffer = self.index_bytes(from, length.min(from + CHUNK))?;
            let mut at = 0;
            while let Some((entry, start, bytes)) = next(&self.payloads.key, from, &buffer, at) {
                let begins = from + start as u64;
                if begins > self.read {
                    damaged += self.follow_gap(begins, &mut found)?;
                }
                at = start + bytes;
                self.accept(entry, from + at as u64, &mut found);
            }
            // An entry may begin at this piece's end.
            from = self.read.max(from + CHUNK - MAX_ENTRY as u64);
        }
        Ok(damaged)
    }

    /// Reads the stretch before a whole entry once more: an entry that was being written while it was read first is whole by now, for
    /// its successor is. 1 where some of it is still no entry.
    fn follow_gap(&mut self, to: u64, found: &mut impl FnMut(&Arc<Payloads>, Entry)) -> io::Result<u64> {
        let from = self.read;
        let buffer = self.index_bytes(from, to)?;
        let (mut at, mut damaged) = (0, 0);
        while let Some((entry, start, bytes)) = next(&self.payloads.key, from, &buffer, at) {
            damaged |= u64::from(start > at);
            at = start + bytes;
            self.accept(entry, from + at as u64, found);
        }
        Ok(damaged | u64::from(self.read < to))
    }

    fn index_bytes(&self, from: u64, to: u64) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; usize::try_from(to - from).map_err(io::Error::other)?];
        let mut filled = 0;
        // Shorter where another process has sealed the index meanwhile.
        while filled < buffer.len() {
            match self.index.read_at(&mut buffer[filled..], from + filled as u64) {
                Ok(0) => break,
                Ok(bytes) => filled += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        buffer.truncate(filled);
        Ok(buffer)
    }

    fn accept(&mut self, entry: Entry, ends: u64, found: &mut impl FnMut(&Arc<Payloads>, Entry)) {
        self.read = ends;
        self.data_end = self.data_end.max((entry.offset + entry.bytes).next_multiple_of(PAYLOAD_ALIGN));
        found(&self.payloads, entry);
    }

    /// Takes back what a dead writer had reserved and not used (`CACHE-3`); nothing while it lives.
    pub(crate) fn seal(&mut self, _locked: &Locked<'_>, found: impl FnMut(&Arc<Payloads>, Entry)) -> io::Result<()> {
        match self.index.try_lock() {
            Err(TryLockError::WouldBlock) => return Ok(()),
            locked => locked.map_err(io::Error::from)?,
        }
        let sealed = self.follow(found).and_then(|_| {
            shorten(&self.payloads.file, self.data_end)?;
            shorten(&self.index, self.read)
        });
        self.index.unlock()?;
        sealed
    }

    /// Whether the files are longer than what they hold.
    pub(crate) fn has_spare(&self) -> io::Result<bool> {
        Ok(self.payloads.file.metadata()?.len() > self.data_end || self.index.metadata()?.len() > self.read)
    }
}

fn shorten(file: &File, length: u64) -> io::Result<()> {
    if file.metadata()?.len() > length { file.set_len(length) } else { Ok(()) }
}
