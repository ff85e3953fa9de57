//! One tier: a folder, its lock, and the account of what it holds.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::room::{file_system, room};
use crate::{Error, Key};

/// A tier's lock is held for the time of a directory scan or an eviction; only a stopped process holds it longer.
pub(crate) const LOCK_DEADLINE: Duration = Duration::from_secs(5);

/// Where a node keeps prefix outputs, and how much of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// A folder on tmpfs.
    pub memory: Tier,
    /// A folder on a local disk.
    pub disk: Tier,
}

impl Config {
    /// The default folder of the memory tier: one a user.
    #[must_use]
    pub fn default_memory_folder() -> PathBuf {
        PathBuf::from(format!("/dev/shm/thaw-prefix-{}", nix::unistd::geteuid()))
    }
}

/// One tier's place and budget, the same for all processes of the node that name the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tier {
    /// Made if absent.
    pub folder: PathBuf,
    /// Bytes of files that it may hold, all keys together; 0 turns the tier off.
    pub max_bytes: u64,
}

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TierName {
    /// Files on tmpfs.
    Memory,
    /// Files on a local disk, which the page cache keeps in memory where it can.
    Disk,
}

/// A tier that is on: its folder is there and ours.
#[derive(Debug)]
pub(crate) struct OpenTier {
    pub(crate) name: TierName,
    pub(crate) folder: PathBuf,
    pub(crate) max_bytes: u64,
}

impl OpenTier {
    /// Makes the folder where it is absent. `None` where the tier is off.
    pub(crate) fn open(name: TierName, tier: &Tier) -> Result<Option<OpenTier>, Error> {
        if tier.max_bytes == 0 {
            return Ok(None);
        }
        let folder = &tier.folder;
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(Error::folder(
            "make the folder",
            folder,
            folder,
        ))?;
        OpenTier::checked(name, tier).map(Some)
    }

    /// The tier as it is; `None` where it is off or its folder is absent.
    pub(crate) fn existing(name: TierName, tier: &Tier) -> Result<Option<OpenTier>, Error> {
        if tier.max_bytes == 0 || !tier.folder.exists() {
            return Ok(None);
        }
        OpenTier::checked(name, tier).map(Some)
    }

    fn checked(name: TierName, tier: &Tier) -> Result<OpenTier, Error> {
        let folder = &tier.folder;
        if name == TierName::Memory {
            check_memory(folder)?;
        }
        Ok(OpenTier { name, folder: folder.clone(), max_bytes: tier.max_bytes })
    }

    /// The folder of `key`.
    pub(crate) fn key_folder(&self, key: &Key) -> PathBuf {
        self.folder.join(key.to_string())
    }

    /// Waits for the tier's lock, at most `patience`. Each lock has a file of its own, so threads exclude each other too.
    pub(crate) fn lock(&self, patience: Duration) -> Result<Locked<'_>, Error> {
        let path = self.folder.join("lock");
        let wrong = |source| Error::folder("lock", &path, &self.folder)(source);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(wrong)?;
        let deadline = Instant::now() + patience;
        let mut pause = Duration::from_micros(50);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Locked { tier: self, _lock: file }),
                Err(TryLockError::Error(source)) => return Err(wrong(source)),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => {
                    return Err(Error::Busy { path, patience });
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(pause),
            }
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }
}

/// Others may write to the folder that /dev/shm is, so a folder there is trusted only if this user made it.
fn check_memory(folder: &Path) -> Result<(), Error> {
    let wrong = |source| Error::folder("look at", folder, folder)(source);
    let user = nix::unistd::geteuid().as_raw();
    for found in [fs::symlink_metadata(folder), fs::metadata(folder)] {
        let owner = found.map_err(wrong)?.uid();
        if owner != user {
            return Err(Error::Foreign { folder: folder.to_owned(), owner });
        }
    }
    if !file_system(folder).map_err(wrong)?.in_memory {
        return Err(Error::NotMemory { folder: folder.to_owned() });
    }
    Ok(())
}

/// What a key holds in a tier.
#[derive(Debug)]
pub(crate) struct KeyFolder {
    pub(crate) key: Key,
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) last_use: SystemTime,
}

/// The tier's lock, held. Files grow, and keys come and go, only through it (`CACHE-3`).
pub(crate) struct Locked<'a> {
    tier: &'a OpenTier,
    _lock: File,
}

impl Locked<'_> {
    /// Opens a key for use, making its folder: while the file that comes back is held, nobody evicts it (`CACHE-4`).
    pub(crate) fn hold(&self, key: &Key) -> Result<File, Error> {
        let folder = self.tier.key_folder(key);
        let wrong = |source| Error::folder("open the key", &folder, &self.tier.folder)(source);
        match DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(wrong(error)),
            _ => {}
        }
        let open =
            OpenOptions::new().create(true).truncate(false).write(true).open(folder.join("open")).map_err(wrong)?;
        // Only a holder of the tier's lock ever takes it exclusively, so this does not wait.
        open.try_lock_shared().map_err(|error| wrong(error.into()))?;
        let _ = open.set_modified(SystemTime::now());
        Ok(open)
    }

    /// All keys, those not used for longest first.
    pub(crate) fn keys(&self) -> io::Result<Vec<KeyFolder>> {
        let mut keys = Vec::new();
        for found in fs::read_dir(&self.tier.folder)? {
            let found = found?;
            let Some(key) = found.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if !found.file_type()?.is_dir() {
                continue;
            }
            let path = found.path();
            let last_use =
                fs::metadata(path.join("open")).and_then(|file| file.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            keys.push(KeyFolder { key, bytes: folder_bytes(&path)?, path, last_use });
        }
        keys.sort_by(|a, b| a.last_use.cmp(&b.last_use).then(a.key.cmp(&b.key)));
        Ok(keys)
    }

    /// Bytes that the tier may take now, its budget and the file system's room considered.
    pub(crate) fn room(&self) -> io::Result<u64> {
        let used: u64 = self.keys()?.iter().map(|key| key.bytes).sum();
        Ok(self.tier.max_bytes.saturating_sub(used).min(room(self.tier.name, &self.tier.folder)?))
    }

    /// Removes the keys not used for longest until `wanted` bytes fit; how many. None at all where that would not do.
    pub(crate) fn evict(&self, wanted: u64) -> io::Result<u64> {
        let keys = self.keys()?;
        let used: u64 = keys.iter().map(|key| key.bytes).sum();
        let over_budget = used.saturating_add(wanted).saturating_sub(self.tier.max_bytes);
        let mut missing = over_budget.max(wanted.saturating_sub(room(self.tier.name, &self.tier.folder)?));
        let mut going = Vec::new();
        for key in keys.into_iter().filter(|key| key.bytes > 0) {
            if missing == 0 {
                break;
            }
            if let Some(unused) = Unused::of(&key)? {
                missing = missing.saturating_sub(key.bytes);
                going.push((key, unused));
            }
        }
        if missing > 0 {
            return Ok(0);
        }
        for (key, unused) in &going {
            self.remove(key, unused)?;
            tracing::info!(key = %key.key, tier = ?self.tier.name, bytes = key.bytes, "evicted a prefix from the cache");
        }
        Ok(going.len() as u64)
    }

    /// Removes a key's files; foreign ones among them stay (`CACHE-5`). Processes that still have a file open keep reading it.
    pub(crate) fn remove(&self, key: &KeyFolder, _unused: &Unused) -> io::Result<()> {
        let mut files = own_files(&key.path)?;
        // Indexes first: after a death in the middle, payloads without an index are bytes that nobody reads.
        files.sort_by(|a, b| b.extension().cmp(&a.extension()));
        for file in files.iter().chain([&key.path.join("open")]) {
            match fs::remove_file(file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        match fs::remove_dir(&key.path) {
            Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => Err(error),
            _ => Ok(()),
        }
    }

    /// Lengthens `file`, taking the bytes from the file system at once where it can; false where it has none left.
    pub(crate) fn lengthen(&self, file: &File, from: u64, to: u64) -> io::Result<bool> {
        if to <= from {
            return Ok(true);
        }
        let (Ok(offset), Ok(length)) = (i64::try_from(from), i64::try_from(to.saturating_sub(from))) else {
            return Ok(false);
        };
        let taken = loop {
            match fallocate(file, FallocateFlags::empty(), offset, length) {
                Err(Errno::EINTR) => {}
                taken => break taken,
            }
        };
        match taken {
            Ok(()) => Ok(true),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => file.set_len(to).map(|()| true),
            Err(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG | Errno::ENOMEM) => file.set_len(from).map(|()| false),
            Err(other) => Err(other.into()),
        }
    }
}

/// Shows that no process has a key open; holds it so until dropped.
pub(crate) struct Unused {
    _open: Option<File>,
}

impl Unused {
    /// Only under the tier's lock.
    pub(crate) fn of(key: &KeyFolder) -> io::Result<Option<Unused>> {
        let open = match OpenOptions::new().write(true).open(key.path.join("open")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(Unused { _open: None })),
            open => open?,
        };
        match open.try_lock() {
            Ok(()) => Ok(Some(Unused { _open: Some(open) })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// The segment files of a key's folder, and nothing else there.
pub(crate) fn own_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for found in fs::read_dir(folder)? {
        let found = found?;
        let path = found.path();
        let ours = matches!(path.extension().and_then(OsStr::to_str), Some("data" | "index"))
            && path.file_stem().and_then(OsStr::to_str).is_some_and(is_segment_name);
        if ours && found.file_type()?.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}

/// Whether a writer's name can be part of a file's.
pub(crate) fn is_writer_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn is_segment_name(stem: &str) -> bool {
    stem.rsplit_once('-')
        .is_some_and(|(writer, n)| is_writer_name(writer) && !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

fn folder_bytes(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for file in own_files(folder)? {
        match fs::metadata(&file) {
            Ok(found) => bytes += found.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}
