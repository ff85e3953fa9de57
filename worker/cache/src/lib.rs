//! A node's store of frozen-prefix outputs: computed once per sample and view, then read by every run that asks for the same.
//!
//! ```text
//! <tier folder>/                    memory: a folder on tmpfs; disk: any local folder
//!   thaw-prefix-cache               marks the folder as ours, and the format's version
//!   lock                            held while room is given out or taken back
//!   <key>/
//!     open                          share-locked by every process that has the key open; its time is the last use
//!     <writer>-<n>.data             payloads; grows by extents
//!     <writer>-<n>.index            one entry a record, written after its payload; locked by its living writer
//! ```
//!
//! Laws:
//! - `CACHE-1` What is read is what was put, for that key, sample and view, or it is a miss: never wrong bytes, whatever happened to the
//!   files. A record is checked when a process first reads it.
//! - `CACHE-2` A process may be killed at any point: records that it had put before stay readable, one that it was putting is absent.
//! - `CACHE-3` The files of a tier never hold more bytes than its budget, over all processes of the node: they grow only under the tier's
//!   lock, and the folder itself is the account, so no ledger can be wrong after a death. Room that others need is never promised.
//! - `CACHE-4` A key that any living process has open is never evicted or cleared; other keys go least recently used first.
//! - `CACHE-5` A file that this module did not name is never read, counted, changed or removed.
//! - `CACHE-6` A full, slow or damaged cache is an answer (`Put::Full`, a miss), never a failed run.
//!
//! It knows nothing of graphs, tensors' meaning or samples' order. It never waits without a deadline, and never for another writer.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

mod entry;
mod index;
mod key;
mod room;
mod segment;
mod store;
mod tier;
mod upkeep;

pub use entry::{MAX_DIMS, MAX_TENSORS, Tensor};
pub use index::Record;
pub use key::{Key, KeyTextError};
pub use room::memory_room;
pub use store::{Put, Stats, Store, TierStats};
pub use tier::{Config, Tier, TierName};
pub use upkeep::{Cleared, Fit, Which, clear, held_bytes, would_fit};

use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why the cache cannot be used. Damage and lack of room are no errors: see `CACHE-6`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tier's folder cannot be made, or not be used.
    #[error(
        "cannot {operation} {path} of the prefix cache; give {folder} to this user (owner, read and write permission), \
         or name another folder"
    )]
    Folder {
        /// What was tried.
        operation: &'static str,
        /// The file or folder it was tried on.
        path: PathBuf,
        /// The tier's folder.
        folder: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The memory tier's folder is not in memory.
    #[error(
        "the prefix cache's memory folder {folder} is not on tmpfs; name one under /dev/shm, or set its budget to 0"
    )]
    NotMemory {
        /// The tier's folder.
        folder: PathBuf,
    },
    /// Another user made the folder, so its content cannot be trusted.
    #[error("the prefix cache's folder {folder} belongs to user {owner}; remove it, or name another folder")]
    Foreign {
        /// The tier's folder.
        folder: PathBuf,
        /// User id of its owner.
        owner: u32,
    },
    /// The tier's lock was not free in time.
    #[error(
        "the prefix cache's lock {path} was not free within {patience:?}; see which stopped process holds it (fuser -v)"
    )]
    Busy {
        /// The lock's file.
        path: PathBuf,
        /// How long it was waited for.
        patience: Duration,
    },
    /// The caller's buffers do not match the record.
    #[error("the buffers for sample {sample}, view {view} hold {given:?} bytes; its tensors hold {wanted:?}")]
    Size {
        /// Position of the sample.
        sample: u32,
        /// Its view.
        view: u16,
        /// Bytes of each buffer given.
        given: Vec<usize>,
        /// Bytes of each tensor.
        wanted: Vec<usize>,
    },
    /// A record with too many tensors or dimensions.
    #[error(
        "a record holds 1 to {MAX_TENSORS} tensors of at most {MAX_DIMS} dimensions, not {tensors} of at most {dims}"
    )]
    Shape {
        /// Tensors given.
        tensors: usize,
        /// Most dimensions of one.
        dims: usize,
    },
    /// A writer's name that cannot be part of a file's name.
    #[error("the writer's name {name:?} is not 1 to 64 letters, digits, '-' or '_'")]
    Writer {
        /// As given.
        name: String,
    },
}

impl Error {
    fn folder(operation: &'static str, path: &Path, folder: &Path) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::Folder { operation, path: path.to_owned(), folder: folder.to_owned(), source }
    }
}
