//! A run's positions, checkpoints, evaluations and results.

use super::{WireEnum, optional, required, required_enum};
use crate::ids::{Generation, StageIndex, Step};
use crate::pb;
use crate::run::{CheckpointRef, Evaluation, Position, RunReason, RunResult, RunState, StageEnd, StageResult};
use crate::violation::Violations;

/// The state of a [`pb::Run`] or [`pb::Event`].
///
/// # Errors
/// Where it is missing or unknown.
pub fn state(number: i32) -> Result<RunState, Violations> {
    required_enum("state", number)
}

/// The reason of a [`pb::Run`], [`pb::Event`] or [`pb::TrainerFailed`].
///
/// # Errors
/// Where it is missing or unknown.
pub fn reason(number: i32) -> Result<RunReason, Violations> {
    required_enum("reason", number)
}

impl TryFrom<&pb::Position> for Position {
    type Error = Violations;

    fn try_from(raw: &pb::Position) -> Result<Self, Violations> {
        Ok(Self { stage: StageIndex(raw.stage), stage_step: raw.stage_step, step: Step(raw.step) })
    }
}

impl From<&Position> for pb::Position {
    fn from(position: &Position) -> Self {
        Self { stage: position.stage.0, stage_step: position.stage_step, step: position.step.0 }
    }
}

impl TryFrom<&pb::CheckpointRef> for CheckpointRef {
    type Error = Violations;

    fn try_from(raw: &pb::CheckpointRef) -> Result<Self, Violations> {
        if raw.manifest.is_empty() {
            return Err(Violations::one("manifest", "is required: a path below the run's folder"));
        }
        // The path is joined to the run's folder: it must not lead out of it.
        if raw.manifest.starts_with('/') || raw.manifest.split('/').any(|part| part == "..") {
            return Err(Violations::one("manifest", "must be a path below the run's folder, without .."));
        }
        Ok(Self {
            position: required("position", raw.position.as_ref())?,
            generation: Generation(raw.generation),
            manifest: raw.manifest.clone(),
            manifest_blake3: raw.manifest_blake3.clone(),
        })
    }
}

impl From<&CheckpointRef> for pb::CheckpointRef {
    fn from(checkpoint: &CheckpointRef) -> Self {
        Self {
            position: Some((&checkpoint.position).into()),
            generation: checkpoint.generation.0,
            manifest: checkpoint.manifest.clone(),
            manifest_blake3: checkpoint.manifest_blake3.clone(),
        }
    }
}

impl TryFrom<&pb::Evaluation> for Evaluation {
    type Error = Violations;

    /// The numbers pass unchecked: a loss that is not finite is a result like any other.
    fn try_from(raw: &pb::Evaluation) -> Result<Self, Violations> {
        Ok(Self {
            position: required("position", raw.position.as_ref())?,
            loss: raw.loss,
            accuracy: raw.accuracy,
            macro_f1: raw.macro_f1,
            samples: raw.samples,
            confusion: raw.confusion.clone(),
        })
    }
}

impl From<&Evaluation> for pb::Evaluation {
    fn from(evaluation: &Evaluation) -> Self {
        Self {
            position: Some((&evaluation.position).into()),
            loss: evaluation.loss,
            accuracy: evaluation.accuracy,
            macro_f1: evaluation.macro_f1,
            samples: evaluation.samples,
            confusion: evaluation.confusion.clone(),
        }
    }
}

impl TryFrom<&pb::StageResult> for StageResult {
    type Error = Violations;

    fn try_from(raw: &pb::StageResult) -> Result<Self, Violations> {
        Ok(Self {
            stage: StageIndex(raw.stage),
            steps: raw.steps,
            epochs: raw.epochs,
            seconds: raw.seconds,
            end: required_enum::<StageEnd>("end", raw.end)?,
            eval: required("eval", raw.eval.as_ref())?,
            deciding_eval: required("deciding_eval", raw.deciding_eval.as_ref())?,
            replica_digest: raw.replica_digest.clone(),
            peak_memory_bytes: raw.peak_memory_bytes,
            saves: raw.saves,
            test: raw
                .test
                .as_ref()
                .map(|test| Evaluation::try_from(test).map_err(|found| found.under("test")))
                .transpose()?,
        })
    }
}

impl From<&StageResult> for pb::StageResult {
    fn from(result: &StageResult) -> Self {
        Self {
            stage: result.stage.0,
            steps: result.steps,
            epochs: result.epochs,
            seconds: result.seconds,
            end: result.end.number(),
            eval: Some((&result.eval).into()),
            deciding_eval: Some((&result.deciding_eval).into()),
            replica_digest: result.replica_digest.clone(),
            peak_memory_bytes: result.peak_memory_bytes,
            saves: result.saves,
            test: result.test.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<&pb::RunResult> for RunResult {
    type Error = Violations;

    fn try_from(raw: &pb::RunResult) -> Result<Self, Violations> {
        Ok(Self {
            test: optional("test", raw.test.as_ref())?,
            best: required("best", raw.best.as_ref())?,
            weights_blake3: raw.weights_blake3.clone(),
            model: raw.model.clone(),
            steps: Step(raw.steps),
            seconds: raw.seconds,
        })
    }
}

impl From<&RunResult> for pb::RunResult {
    fn from(result: &RunResult) -> Self {
        Self {
            test: result.test.as_ref().map(Into::into),
            best: Some((&result.best).into()),
            weights_blake3: result.weights_blake3.clone(),
            model: result.model.clone(),
            steps: result.steps.0,
            seconds: result.seconds,
        }
    }
}
