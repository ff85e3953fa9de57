//! A node's cache of frozen-prefix outputs: one row of bytes per sample, in memory up to a budget, then on disk, shared by the processes
//! of the node.
//!
//! ```text
//! <tier>/ledger               locked while anybody takes room or gives it back
//! <tier>/<key>/lock           locked, shared, by every process that has the key open
//! <tier>/<key>/<process>.rows what that process wrote: header, meta, data, header, ...
//! ```
//!
//! The memory tier is a folder on a memory file system, so both tiers are files: they outlive a process, and every process of the node
//! reads them. Reads copy straight out of the page cache.
//!
//! CACHE-1: a row that is returned is one that was written whole under that key, sample and view: every read checks its checksum. Whatever is
//!          torn, flipped or foreign is a miss.
//! CACHE-2: the files of a tier never grow beyond its budget, whatever the number of processes: room is taken under the tier's lock, before it
//!          is written to.
//! CACHE-3: only whole keys are evicted, least recently opened first, and never one that a live process has open.
//! CACHE-4: nothing here is needed for a right result: a cache may be deleted at any moment between two runs.
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

mod rows;
mod store;
mod tier;

pub use store::{Kept, Stats, Store};
pub use tier::{Config, Tier, clear};

use std::path::PathBuf;

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {action} {}; give a folder that this user may write to, or switch the cache off", path.display())]
    Folder { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cannot {action} {}", path.display())]
    Rows { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("a row of {bytes} bytes is longer than a cache can hold")]
    Size { bytes: usize },
}

/// What rows belong to: the same key means the same bytes for the same sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(blake3::Hash);

impl Key {
    /// From named parts, in the order given.
    #[must_use]
    pub fn of(parts: &[(&str, &[u8])]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("thaw-cache key v1");
        for (name, value) in parts {
            for text in [name.as_bytes(), value] {
                hasher.update(&(text.len() as u64).to_le_bytes());
                hasher.update(text);
            }
        }
        Self(hasher.finalize())
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0.to_hex())
    }
}
