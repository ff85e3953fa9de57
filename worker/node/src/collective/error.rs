//! How a collective fails.

use std::sync::Arc;
use std::time::Duration;
use thaw_proto::status::ErrorClass;

/// Why an operation, or the building of a collective, failed. Cloned to every operation that comes after it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The operation did not end in time.
    #[error("{operation} {sequence} did not end within {deadline:?}; {}", waiting_for(missing))]
    Deadline {
        /// Its name.
        operation: &'static str,
        /// Counts the operations of this collective from 0.
        sequence: u64,
        /// How long it was given.
        deadline: Duration,
        /// Ranks that had not sent their part; none where that is not known.
        missing: Vec<u32>,
    },
    /// A peer's connection ended while it was needed.
    #[error("{operation} {sequence} lost rank {rank}")]
    PeerLost {
        /// The operation's name.
        operation: &'static str,
        /// Counts the operations of this collective from 0.
        sequence: u64,
        /// The peer that was seen to go first.
        rank: u32,
        /// Absent: its end was closed.
        source: Option<Arc<std::io::Error>>,
    },
    /// GPUs were to be used that cannot be.
    #[error("cannot sum over GPUs: {what}")]
    NotAvailable {
        /// What is missing, where, and what to do about it.
        what: String,
    },
    /// A call to NCCL or CUDA went wrong.
    #[error("{operation} {sequence} failed")]
    Device {
        /// The operation's name.
        operation: &'static str,
        /// Counts the sums over GPUs of this generation from 0.
        sequence: u64,
        /// What trying again can do about it.
        class: ErrorClass,
        /// What the library says.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// [`super::Collective::abort`] was called.
    #[error("the collective was aborted")]
    Aborted,
    /// The collective could not be built.
    #[error("cannot join rank {rank} in generation {generation}: {reason}")]
    Handshake {
        /// The generation that was to be built.
        generation: u64,
        /// The peer.
        rank: u32,
        /// What it said, or what was wrong.
        reason: Refusal,
        /// What the connection said last.
        source: Option<Arc<std::io::Error>>,
    },
    /// The listening socket cannot be opened or used.
    #[error("cannot listen for peers on {address}")]
    Listen {
        /// Host or address.
        address: String,
        /// Why.
        source: Arc<std::io::Error>,
    },
    /// Two ranks called different operations, or one was called with the wrong buffers.
    #[error("{operation} {sequence} does not fit: {what}")]
    Mismatch {
        /// The operation's name here.
        operation: &'static str,
        /// Counts the operations of this collective from 0.
        sequence: u64,
        /// What differs, with both values.
        what: String,
    },
}

/// Why a peer did not join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No answer before the deadline.
    #[error("it did not answer in time")]
    Deadline,
    /// What was sent is not this protocol.
    #[error("it speaks another protocol")]
    Protocol,
    /// The other side belongs to another run.
    #[error("it belongs to another run")]
    Run,
    /// The other side is at this generation, not at ours.
    #[error("it is at generation {0}")]
    Generation(u64),
    /// World size, shards or rank differ from what the other side was told.
    #[error("it expects another world size, rank or number of shards")]
    Shape,
    /// The key is not the generation's.
    #[error("the keys differ")]
    Key,
    /// An address does not resolve.
    #[error("its address cannot be used")]
    Address,
}

impl Error {
    /// What trying again can do about it.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Deadline { .. } | Self::PeerLost { .. } | Self::Aborted | Self::Listen { .. } => ErrorClass::Retry,
            Self::Handshake { generation, reason, .. } => match reason {
                Refusal::Generation(other) if other > generation => ErrorClass::Fenced,
                Refusal::Deadline
                | Refusal::Protocol
                | Refusal::Run
                | Refusal::Generation(_)
                | Refusal::Shape
                | Refusal::Key
                | Refusal::Address => ErrorClass::Retry,
            },
            Self::NotAvailable { .. } => ErrorClass::Invalid,
            Self::Device { class, .. } => *class,
            Self::Mismatch { .. } => ErrorClass::Fatal,
        }
    }
}

fn waiting_for(missing: &[u32]) -> String {
    if missing.is_empty() { "it is not known for whom".to_owned() } else { format!("waiting for ranks {missing:?}") }
}
