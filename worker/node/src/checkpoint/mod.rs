//! Durable bytes of a run: blobs named by their content, manifests, and the codec of a group's state.
//!
//! ```text
//! <run>/blobs/<hh>/<blake3>              immutable
//! <run>/manifests/<generation>-<step>.json   create-only
//! <run>/parts/<generation>-<step>-<rank>.json   what a rank wrote of a save, until rank 0 has put it into the manifest
//! ```
//!
//! Law:
//! - `CKPT-1`: a file is there whole or not at all, and what was reported written survives a power loss.
//! - `CKPT-2`: bytes are checked against the hash that names them whenever they are read; damaged ones are never returned.
//! - `CKPT-3`: a manifest is never replaced; a second writer of the same name is fenced, unless its bytes are equal.
//! - `CKPT-4`: nothing that a kept or a newer generation's manifest names is deleted.
//!
//! It never decides which checkpoint is the run's: that is the head pointer in the coordinator's store. It never lists
//! manifests to find one to load.

mod state;
mod store;
mod writer;

pub use state::{TensorBytes, decode, encode};
pub use store::{CheckpointStore, Keep, Swept, WrittenManifest};
pub use writer::Writer;

use thaw_proto::status::ErrorClass;

/// Why checkpoint storage failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The run's URL is not one this build can use.
    #[error("checkpoint storage {url} cannot be used: {what}; give a file:///folder URL")]
    Url {
        /// As given.
        url: String,
        /// What is wrong with it.
        what: String,
    },
    /// No space, or no quota, is left.
    #[error("cannot {operation} {path}: no space is left; free space there and resume the run")]
    Full {
        /// What was tried.
        operation: &'static str,
        /// The file, with its folder.
        path: String,
        /// What the storage said.
        source: object_store::Error,
    },
    /// The storage failed in another way.
    #[error("cannot {operation} {path}; check that the folder exists and is writable")]
    Storage {
        /// What was tried.
        operation: &'static str,
        /// The file, with its folder.
        path: String,
        /// What the storage said.
        source: object_store::Error,
    },
    /// A file that a manifest or the head pointer names is gone.
    #[error("checkpoint file {path} is missing; restore it, or resume from an earlier checkpoint")]
    Missing {
        /// The file, with its folder.
        path: String,
    },
    /// Bytes are not those that were written.
    #[error("checkpoint file {path} is damaged: {what}; restore it, or resume from an earlier checkpoint")]
    Damaged {
        /// The file, with its folder.
        path: String,
        /// What differs.
        what: String,
    },
    /// Another rank did not say in time what it wrote.
    #[error("{path} was not there after {seconds} s; does every worker see the same checkpoint storage?")]
    Late {
        /// The file, with its folder.
        path: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// Another process wrote this manifest with other bytes.
    #[error("manifest {path} was written by another trainer of the same generation; this one must stop")]
    Fenced {
        /// The file, with its folder.
        path: String,
    },
    /// A name that is not one of ours.
    #[error("{name:?} is not the name of a {expected}")]
    Name {
        /// As given.
        name: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Tensors that cannot be written as safetensors, or bytes that are none.
    #[error("group state is not valid safetensors: {what}")]
    State {
        /// What is wrong.
        what: String,
        /// What the parser said.
        source: Option<safetensors::SafeTensorError>,
    },
    /// A thread or runtime cannot start.
    #[error("cannot start the checkpoint thread")]
    Thread(#[source] std::io::Error),
    /// A save panicked.
    #[error("the checkpoint writer ended unexpectedly")]
    Panicked,
}

impl Error {
    /// What trying again can do about it. A full or failing disk may mend, so the next save tries again.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Full { .. } | Self::Storage { .. } | Self::Late { .. } | Self::Thread(_) => ErrorClass::Retry,
            Self::Url { .. } | Self::Missing { .. } | Self::Damaged { .. } | Self::State { .. } | Self::Name { .. } => {
                ErrorClass::Invalid
            }
            Self::Fenced { .. } => ErrorClass::Fenced,
            Self::Panicked => ErrorClass::Fatal,
        }
    }

    /// Whether storage refused or lost bytes: the run's reason is then `STORAGE_ERROR`.
    #[must_use]
    pub fn is_storage(&self) -> bool {
        match self {
            Self::Full { .. }
            | Self::Storage { .. }
            | Self::Late { .. }
            | Self::Missing { .. }
            | Self::Damaged { .. } => true,
            Self::Url { .. }
            | Self::Fenced { .. }
            | Self::Name { .. }
            | Self::State { .. }
            | Self::Thread(_)
            | Self::Panicked => false,
        }
    }
}
