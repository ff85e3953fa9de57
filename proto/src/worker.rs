//! What agents and the coordinator say about trainers, as checked values.

use crate::ids::{Generation, Incarnation, Rank, RunId, Slot, StageIndex, Step, WorkerName};
use crate::peers::Peers;
use crate::run::{CheckpointRef, Position};
use std::fmt;
use std::time::Duration;

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

/// Where a trainer was as its generation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecentOperations {
    /// Below the world size.
    pub rank: Rank,
    /// At least 1.
    pub world_size: u32,
    /// The last it has entered, oldest first.
    pub operations: Vec<CollectiveOperation>,
    /// How long its training had stood still without waiting for others.
    pub still: Duration,
}

/// What an operation over all ranks does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CollectiveKind {
    /// Sums over logical shards.
    ReduceF32,
    ReduceF64,
    /// Bytes of every rank to every rank.
    AllGather,
    /// Bytes of one rank to some.
    Copy,
    /// A sum over ranks by NCCL.
    GpuSum,
}

impl CollectiveKind {
    /// As errors and events call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ReduceF32 => "reduce_shards_f32",
            Self::ReduceF64 => "reduce_shards_f64",
            Self::AllGather => "all_gather",
            Self::Copy => "copy",
            Self::GpuSum => "GPU sum",
        }
    }

    /// Whether the sums over GPUs count it, and not the host's operations.
    #[must_use]
    pub fn is_on_gpu(self) -> bool {
        match self {
            Self::ReduceF32 | Self::ReduceF64 | Self::AllGather | Self::Copy => false,
            Self::GpuSum => true,
        }
    }
}

/// An operation over all ranks, as one of them has seen it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollectiveOperation {
    pub kind: CollectiveKind,
    /// Counts the generation's from 0; the same on every rank.
    pub sequence: u64,
    /// What this rank gave.
    pub bytes: u64,
    pub stage: StageIndex,
    /// Updates that were applied when it began.
    pub step: Step,
    /// Unix microseconds, by the clock of the trainer's host.
    pub began_us: u64,
    pub end: OperationEnd,
}

/// How far a rank has come with an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperationEnd {
    /// It is in it.
    None,
    /// It left it with what it is for. Unix microseconds.
    Finished { at_us: u64 },
    /// It left it with an error. Unix microseconds.
    Failed { at_us: u64 },
}

impl fmt::Display for CollectiveOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, sequence, bytes, stage, step, .. } = self;
        write!(f, "{} {sequence} ({bytes} bytes) of step {step} in stage {stage}", kind.name())
    }
}
