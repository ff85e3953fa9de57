//! What agents and the coordinator say about trainers, as checked values.

use crate::ids::{Generation, Incarnation, Rank, RunId, Slot, WorkerName};
use crate::peers::Peers;
use crate::run::{CheckpointRef, Position};

/// One trainer process of one run. Another process in the same slot has another incarnation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TrainerKey {
    pub run: RunId,
    pub slot: Slot,
    pub incarnation: Incarnation,
}

/// How an agent introduces itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Hello {
    pub worker: WorkerName,
    pub incarnation: Incarnation,
    /// Trainers it can hold at once, 1-64.
    pub slots: u32,
    /// Host other trainers can reach this one under.
    pub host: String,
    /// Alive now; each in a slot of its own.
    pub trainers: Vec<TrainerStatus>,
}

/// A trainer that is alive.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrainerStatus {
    pub trainer: TrainerKey,
    /// 0 before its first proposal.
    pub generation: Generation,
    /// The last applied step. `None`: has applied none.
    pub position: Option<Position>,
    /// Operating system's process id.
    pub pid: u32,
}

/// A gang to form, as one of its members sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Proposal {
    pub trainer: TrainerKey,
    pub generation: Generation,
    /// Below the number of peers.
    pub rank: Rank,
    /// At least one.
    pub peers: Peers,
    /// Random bytes that the peers of this generation show each other.
    pub key: Vec<u8>,
    /// `None`: from the beginning.
    pub resume: Option<CheckpointRef>,
}
