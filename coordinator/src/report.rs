//! A finished run as one JSON document, the same in `report/summary.json` and from `thaw train -o json`.

use serde::Serialize;
use thaw_proto::convert::{self, WireEnum};
use thaw_proto::pb;
use thaw_proto::run::{RunReason, RunState};
use thaw_proto::spec::Strategy;
use thaw_proto::violation::Violations;

/// The document's path below the run's folder.
pub const PATH: &str = "report/summary.json";

/// What happened in a run. Field names are a contract.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The run's id.
    pub run: String,
    pub state: RunState,
    pub reason: RunReason,
    /// Absent where there is nothing to add.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    pub strategy: Strategy,
    pub stages: Vec<StageSummary>,
    /// `null` without a test part, or where the run has not succeeded.
    pub test: Option<Scores>,
    /// Optimizer updates; those that were committed where the run has not succeeded.
    pub steps: u64,
    /// Wall time in training and evaluation, over all attempts.
    pub seconds: f64,
    /// Trainers in each generation that formed, in order.
    pub world_sizes: Vec<u32>,
    pub weights_blake3: Option<String>,
    /// URL of the folder with the model.
    pub model: Option<String>,
}

/// One stage that has ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageSummary {
    pub name: String,
    /// Names of the trained layer groups, nearest the input first.
    pub groups: Vec<String>,
    pub steps: u32,
    pub epochs: f64,
    pub seconds: f64,
    /// The most bytes of tensors that a trainer held.
    pub peak_memory_bytes: u64,
    /// Of the best weights after the stage.
    pub eval: Scores,
}

/// `null` for what is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scores {
    pub loss: f64,
    pub accuracy: f64,
    pub macro_f1: f64,
}

impl Summary {
    /// The document of a run, as any client can make it from GetRun.
    ///
    /// # Errors
    /// The message is none a server sends: an enum is missing.
    pub fn of(run: &pb::Run) -> Result<Self, Violations> {
        let plan = run.plan.clone().unwrap_or_default();
        let strategy = run.spec.as_ref().and_then(|spec| Strategy::from_number(spec.strategy).flatten());
        let result = run.result.as_ref();
        let stage_seconds = run.stage_results.iter().map(|stage| stage.seconds).sum();
        Ok(Self {
            run: run.name.strip_prefix("runs/").unwrap_or(&run.name).to_owned(),
            state: convert::run::state(run.state)?,
            reason: convert::run::reason(run.reason)?,
            message: run.message.clone(),
            strategy: strategy.unwrap_or(Strategy::GradualUnfreezing),
            stages: run.stage_results.iter().map(|stage| StageSummary::of(stage, &plan)).collect(),
            test: result.and_then(|result| result.test.as_ref()).map(Scores::of),
            steps: result.map_or_else(|| run.position.map_or(0, |position| position.step), |result| result.steps),
            seconds: result.map_or(stage_seconds, |result| result.seconds),
            world_sizes: run.world_sizes.clone(),
            weights_blake3: result.map(|result| result.weights_blake3.clone()),
            model: result.map(|result| result.model.clone()),
        })
    }
}

impl StageSummary {
    fn of(result: &pb::StageResult, plan: &pb::Plan) -> Self {
        let planned = plan.stages.get(result.stage as usize);
        let group = |index: u32| plan.groups.get(index as usize).map(|group| group.name.clone());
        Self {
            name: planned.map_or_else(|| format!("stage {}", result.stage), |stage| stage.name.clone()),
            groups: planned
                .into_iter()
                .flat_map(|stage| &stage.trainable_groups)
                .filter_map(|index| group(*index))
                .collect(),
            steps: result.steps,
            epochs: result.epochs,
            seconds: result.seconds,
            peak_memory_bytes: result.peak_memory_bytes,
            eval: result
                .eval
                .as_ref()
                .map_or(Scores { loss: f64::NAN, accuracy: f64::NAN, macro_f1: f64::NAN }, Scores::of),
        }
    }
}

impl Scores {
    fn of(evaluation: &pb::Evaluation) -> Self {
        Self { loss: evaluation.loss, accuracy: evaluation.accuracy, macro_f1: evaluation.macro_f1 }
    }
}
