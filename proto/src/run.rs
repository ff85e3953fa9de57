//! A run's state and results, as plain values.

use crate::ids::{Generation, StageIndex, Step};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RunState {
    Pending,
    Admitted,
    Forming,
    Running,
    Resizing,
    Suspending,
    Suspended,
    Preempting,
    Succeeded,
    Failed,
    Cancelled,
}

impl RunState {
    /// Whether nothing more will happen to the run.
    #[must_use]
    pub fn has_ended(self) -> bool {
        match self {
            Self::Succeeded | Self::Failed | Self::Cancelled => true,
            Self::Pending
            | Self::Admitted
            | Self::Forming
            | Self::Running
            | Self::Resizing
            | Self::Suspending
            | Self::Suspended
            | Self::Preempting => false,
        }
    }

    /// Whether its gang trains, and is asked for nothing else.
    #[must_use]
    pub fn is_training(self) -> bool {
        match self {
            Self::Running => true,
            Self::Pending
            | Self::Admitted
            | Self::Forming
            | Self::Resizing
            | Self::Suspending
            | Self::Suspended
            | Self::Preempting
            | Self::Succeeded
            | Self::Failed
            | Self::Cancelled => false,
        }
    }

    /// Whether its trainers have been asked to save and stand still.
    #[must_use]
    pub fn is_saving(self) -> bool {
        match self {
            Self::Suspending | Self::Preempting => true,
            Self::Pending
            | Self::Admitted
            | Self::Forming
            | Self::Running
            | Self::Resizing
            | Self::Suspended
            | Self::Succeeded
            | Self::Failed
            | Self::Cancelled => false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RunReason {
    WaitingForWorkers,
    Starting,
    Training,
    TrainerLost,
    GangTimeout,
    UserRequest,
    LastStageEnded,
    NoGain,
    TrainerError,
    NoProgress,
    ReplicasDiverged,
    StorageError,
    CoordinatorRestarted,
    WaitingForQuota,
    WaitingInQueue,
    Scaled,
    Preempted,
    StepFailed,
    TrainerHung,
}

/// Where training stands: after this many applied updates.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    pub stage: StageIndex,
    /// Optimizer updates in this stage.
    pub stage_step: u32,
    /// Optimizer updates in the run.
    pub step: Step,
}

/// A durable checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointRef {
    pub position: Position,
    pub generation: Generation,
    /// Path below the run's folder.
    pub manifest: String,
    /// Hex.
    pub manifest_blake3: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub position: Position,
    /// Mean cross-entropy. Not finite where training diverged, which JSON writes as null.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    pub accuracy: f64,
    pub macro_f1: f64,
    pub samples: u64,
    /// Row-major `[true][predicted]`.
    pub confusion: Vec<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageEnd {
    MaxEpochs,
    MaxSteps,
    Patience,
    NotFinite,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageResult {
    pub stage: StageIndex,
    pub steps: u32,
    pub epochs: f64,
    pub seconds: f64,
    pub end: StageEnd,
    pub eval: Evaluation,
    pub deciding_eval: Evaluation,
    pub replica_digest: String,
    /// Of rank 0's tensors, since its trainer started; 0 where that was not measured.
    #[serde(default)]
    pub peak_memory_bytes: u64,
    /// Checkpoints begun within the stage since then.
    #[serde(default)]
    pub saves: u32,
    /// Of the first of several stages, where there is a test part.
    #[serde(default)]
    pub test: Option<Evaluation>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    pub test: Option<Evaluation>,
    pub best: Evaluation,
    pub weights_blake3: String,
    /// URL of the folder with the model.
    pub model: String,
    pub steps: Step,
    pub seconds: f64,
}

fn null_is_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}
