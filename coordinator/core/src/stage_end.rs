//! When a stage ends, and when the run does. Every rank feeds the same reduced evaluations to the same functions and so
//! comes to the same decision at the same step, with no round trip.
//!
//! - STAGE-1: improvement is counted from the evaluation made on entering the stage.
//! - STAGE-2: a non-finite metric is worse than any other; two in a row end the stage.
//! - STAGE-3: the run's best is replaced by any better evaluation, however small the gain; patience and the end of the run
//!   ask for a gain above `min_delta`, a share of the best so far.
//! - STAGE-4: a run ends early only after a stage deeper than the first.
//! - STAGE-5: a plateau's reductions are counted here, from the same evaluations as patience, so that every rank and every resume agrees on
//!   the rates that follow.
//!
//! Trackers are plain data: they are saved with each checkpoint, and a decision after a resume is the one that would have been.

use crate::schedule::EndedStage;
use serde::{Deserialize, Serialize};
use thaw_proto::ids::StageIndex;
use thaw_proto::plan::{Plan, PlannedStage};
use thaw_proto::run::{Evaluation, RunReason, StageEnd};
use thaw_proto::spec::{EarlyStopping, Metric, RunSpec};

/// Non-finite evaluations in a row that end a stage.
const NON_FINITE_LIMIT: u32 = 2;
const DEFAULT_MIN_DELTA: f64 = 1e-3;

/// What counts as better.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Judge {
    pub metric: Metric,
    /// Share of the best so far.
    pub min_delta: f64,
}

impl Judge {
    /// How the run's best is chosen: by the run's early stopping, else by evaluation loss.
    #[must_use]
    pub fn of_run(spec: &RunSpec) -> Self {
        match spec.until.early_stopping {
            Some(EarlyStopping { metric, min_delta, .. }) => Self { metric, min_delta },
            None => Self { metric: Metric::EvalLoss, min_delta: DEFAULT_MIN_DELTA },
        }
    }

    /// The metric's value; `None` where it is not finite.
    #[must_use]
    pub fn value(self, evaluation: &Evaluation) -> Option<f64> {
        let value = match self.metric {
            Metric::EvalLoss => evaluation.loss,
            Metric::EvalAccuracy => evaluation.accuracy,
            Metric::EvalMacroF1 => evaluation.macro_f1,
        };
        // A network that has diverged can still have an accuracy.
        (value.is_finite() && evaluation.loss.is_finite()).then_some(value)
    }

    /// How much better `value` is than `best`; negative where it is worse.
    fn gain(self, value: f64, best: f64) -> f64 {
        match self.metric {
            Metric::EvalLoss => best - value,
            Metric::EvalAccuracy | Metric::EvalMacroF1 => value - best,
        }
    }

    /// Whether `value` is better than `best` at all.
    #[must_use]
    pub fn is_better(self, value: f64, best: f64) -> bool {
        self.gain(value, best) > 0.0
    }

    /// Whether `value` is better than `best` by more than `min_delta`.
    #[must_use]
    pub fn improves(self, value: f64, best: f64) -> bool {
        self.gain(value, best) > self.min_delta * best.abs()
    }
}

/// What early stopping and reduce_on_plateau remember within one stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageTracker {
    /// How this stage's evaluations are judged.
    pub judge: Judge,
    /// Best value of the stage, the entry evaluation's included. `None`: no finite one yet.
    pub best: Option<f64>,
    /// Evaluations in a row that did not improve on `best`.
    pub without_gain: u32,
    /// Evaluations in a row that were not finite.
    pub non_finite: u32,
    /// The run's best on entering the stage. `None`: there was none.
    pub run_best_before: Option<f64>,
    /// How often reduce_on_plateau has lowered the rate (STAGE-5).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reductions: u32,
    /// Evaluations in a row that did not improve on `best`, counted from the last reduction.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub without_gain_at_rate: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero(value: &u32) -> bool {
    *value == 0
}

impl StageTracker {
    /// The tracker after a stage's entry evaluation (STAGE-1).
    fn enter(stage: &PlannedStage, run: Judge, baseline: &Evaluation, run_best_before: Option<f64>) -> Self {
        let judge = match stage.until.early_stopping {
            Some(EarlyStopping { metric, min_delta, .. }) => Judge { metric, min_delta },
            None => run,
        };
        let best = judge.value(baseline);
        Self {
            judge,
            best,
            without_gain: 0,
            non_finite: u32::from(best.is_none()),
            run_best_before,
            reductions: 0,
            without_gain_at_rate: 0,
        }
    }

    fn observe(&mut self, stage: &PlannedStage, evaluation: &Evaluation) {
        let value = self.judge.value(evaluation);
        self.non_finite = if value.is_some() { 0 } else { self.non_finite + 1 };
        let better = |value: &f64| self.best.is_none_or(|best| self.judge.improves(*value, best));
        if let Some(value) = value.filter(better) {
            self.best = Some(value);
            self.without_gain = 0;
            self.without_gain_at_rate = 0;
            return;
        }
        self.without_gain += 1;
        self.without_gain_at_rate += 1;
        if stage.plateau.is_some_and(|plateau| self.without_gain_at_rate >= plateau.patience) {
            self.reductions += 1;
            self.without_gain_at_rate = 0;
        }
    }
}

/// Whether the stage goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Continue,
    End(StageEnd),
}

/// Decides after `stage_step` updates in the stage, once the evaluation due at that step (if any) has been observed.
#[must_use]
pub fn decide(stage: &PlannedStage, steps_per_epoch: u32, stage_step: u32, tracker: &StageTracker) -> Decision {
    if tracker.non_finite >= NON_FINITE_LIMIT {
        return Decision::End(StageEnd::NotFinite);
    }
    if stage.until.max_steps.is_some_and(|most| stage_step >= most) {
        return Decision::End(StageEnd::MaxSteps);
    }
    let by_epochs = stage.until.max_epochs.map(|most| most.saturating_mul(steps_per_epoch));
    if by_epochs.is_some_and(|most| stage_step >= most) {
        return Decision::End(StageEnd::MaxEpochs);
    }
    // Only a plan that bounds its stage by neither can come here; its `max_steps` still holds.
    if stage_step >= stage.max_steps {
        return Decision::End(StageEnd::MaxSteps);
    }
    match stage.until.early_stopping {
        Some(stopping) if tracker.without_gain >= stopping.patience => Decision::End(StageEnd::Patience),
        Some(_) | None => Decision::Continue,
    }
}

/// Whether an evaluation is due after `stage_step` updates: every `eval_steps`, else at each epoch's end, and at the stage's end.
#[must_use]
pub fn evaluation_due(stage: &PlannedStage, eval_steps: Option<u32>, steps_per_epoch: u32, stage_step: u32) -> bool {
    let every = eval_steps.unwrap_or(steps_per_epoch).max(1);
    stage_step >= stage.max_steps || (stage_step > 0 && stage_step.is_multiple_of(every))
}

/// What a run remembers of its evaluations: its best one, and the tracker of the stage it is in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunTracker {
    pub judge: Judge,
    /// `None`: no finite evaluation yet.
    pub best: Option<Evaluation>,
    /// `None`: before the first stage's entry evaluation.
    pub stage: Option<StageTracker>,
    /// How often each ended stage's rate was lowered; those after the last reduced one may be missing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ended_reductions: Vec<u32>,
}

/// What an evaluation was for the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Standing {
    /// The weights evaluated are the best so far: keep them with their optimizer state.
    Best,
    NotBest,
}

/// What follows the end of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterStage {
    NextStage(StageIndex),
    /// The run has ended with its best weights: `LastStageEnded` or `NoGain`.
    EndRun(RunReason),
    /// No evaluation was ever finite, so there are no weights worth keeping.
    Fail(RunReason),
}

impl RunTracker {
    /// The tracker of a run that has not begun.
    #[must_use]
    pub fn new(judge: Judge) -> Self {
        Self { judge, best: None, stage: None, ended_reductions: Vec::new() }
    }

    /// Takes in the evaluation made on entering `stage`, after its weights were restored.
    pub fn enter_stage(&mut self, stage: &PlannedStage, baseline: &Evaluation) -> Standing {
        let before = self.best_value();
        self.stage = Some(StageTracker::enter(stage, self.judge, baseline, before));
        self.rank(baseline)
    }

    /// Takes in an evaluation made during `stage`.
    pub fn observe(&mut self, stage: &PlannedStage, evaluation: &Evaluation) -> Standing {
        if let Some(tracker) = &mut self.stage {
            tracker.observe(stage, evaluation);
        }
        self.rank(evaluation)
    }

    /// Notes that stage `ended` has ended, for the rates of later ones.
    pub fn end_stage(&mut self, ended: StageIndex) {
        let reductions = self.reductions();
        if reductions > 0 {
            self.ended_reductions.resize(ended.0 as usize, 0);
            self.ended_reductions.push(reductions);
        }
    }

    /// How often the present stage's rate has been lowered.
    #[must_use]
    pub fn reductions(&self) -> u32 {
        self.stage.as_ref().map_or(0, |stage| stage.reductions)
    }

    /// The ended stages, `steps` being the updates of each.
    #[must_use]
    pub fn ended_stages(&self, steps: &[u32]) -> Vec<EndedStage> {
        let reductions = self.ended_reductions.iter().copied().chain(std::iter::repeat(0));
        steps.iter().zip(reductions).map(|(&steps, reductions)| EndedStage { steps, reductions }).collect()
    }

    /// [`decide`] for the stage the run is in; before its entry evaluation a stage goes on.
    #[must_use]
    pub fn decide(&self, stage: &PlannedStage, steps_per_epoch: u32, stage_step: u32) -> Decision {
        match &self.stage {
            Some(tracker) => decide(stage, steps_per_epoch, stage_step, tracker),
            None => Decision::Continue,
        }
    }

    /// What follows once stage `ended` has ended.
    #[must_use]
    pub fn after_stage(&self, plan: &Plan, ended: StageIndex, stop_when_no_gain: bool) -> AfterStage {
        let Some(best) = self.best_value() else {
            return AfterStage::Fail(RunReason::TrainerError);
        };
        let next = ended.next();
        if next.0 as usize >= plan.stages.len() {
            return AfterStage::EndRun(RunReason::LastStageEnded);
        }
        let before = self.stage.as_ref().and_then(|stage| stage.run_best_before);
        let gained = before.is_none_or(|before| self.judge.improves(best, before));
        // STAGE-4
        if stop_when_no_gain && ended.0 > 0 && !gained {
            return AfterStage::EndRun(RunReason::NoGain);
        }
        AfterStage::NextStage(next)
    }

    fn best_value(&self) -> Option<f64> {
        self.best.as_ref().and_then(|best| self.judge.value(best))
    }

    fn rank(&mut self, evaluation: &Evaluation) -> Standing {
        let Some(value) = self.judge.value(evaluation) else {
            return Standing::NotBest;
        };
        if self.best_value().is_none_or(|best| self.judge.is_better(value, best)) {
            self.best = Some(evaluation.clone());
            return Standing::Best;
        }
        Standing::NotBest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{evaluation, plan_of, reference, spec};
    use serde_json::json;

    fn patient_plan() -> Plan {
        plan_of(&spec(
            json!({"until": {"max_epochs": 9, "max_steps": null, "early_stopping": {"metric": "eval_loss", "patience": 2, "min_delta": 0.001}}}),
        ))
    }

    fn tracker(plan: &Plan, losses: &[f64]) -> RunTracker {
        let mut tracker = RunTracker::new(Judge { metric: Metric::EvalLoss, min_delta: 1e-3 });
        let _ = tracker.enter_stage(&plan.stages[0], &evaluation(losses[0]));
        for loss in &losses[1..] {
            let _ = tracker.observe(&plan.stages[0], &evaluation(*loss));
        }
        tracker
    }

    fn decision(losses: &[f64]) -> Decision {
        let plan = patient_plan();
        tracker(&plan, losses).decide(&plan.stages[0], plan.steps_per_epoch, 1)
    }

    #[test]
    fn stage_1_patience_counts_from_the_entry_evaluation() {
        assert_eq!(decision(&[1.0, 1.1]), Decision::Continue);
        assert_eq!(decision(&[1.0, 1.1, 1.05]), Decision::End(StageEnd::Patience));
        assert_eq!(decision(&[1.0, 1.1, 0.9, 0.95]), Decision::Continue);
        // A gain below min_delta is none.
        assert_eq!(decision(&[1.0, 0.9995, 0.9992]), Decision::End(StageEnd::Patience));
        assert_eq!(decision(&[1.0, 0.9995, 0.9985]), Decision::Continue);
    }

    #[test]
    fn stage_2_two_non_finite_in_a_row_end_the_stage() {
        assert_eq!(decision(&[1.0, f64::NAN]), Decision::Continue);
        assert_eq!(decision(&[1.0, f64::NAN, f64::INFINITY]), Decision::End(StageEnd::NotFinite));
        assert_eq!(decision(&[1.0, f64::NAN, 0.5, f64::NAN]), Decision::Continue);
    }

    #[test]
    fn a_stage_ends_at_its_epochs_and_steps() {
        let plan = patient_plan();
        let tracker = tracker(&plan, &[1.0]);
        let last = 9 * plan.steps_per_epoch;
        assert_eq!(tracker.decide(&plan.stages[0], plan.steps_per_epoch, last - 1), Decision::Continue);
        assert_eq!(tracker.decide(&plan.stages[0], plan.steps_per_epoch, last), Decision::End(StageEnd::MaxEpochs));
        let mut stage = plan.stages[0].clone();
        stage.until.max_steps = Some(7);
        assert_eq!(tracker.decide(&stage, plan.steps_per_epoch, 7), Decision::End(StageEnd::MaxSteps));
        assert!(
            evaluation_due(&stage, None, 5, 5)
                && !evaluation_due(&stage, None, 5, 0)
                && !evaluation_due(&stage, Some(3), 5, 5)
        );
        assert!(evaluation_due(&stage, Some(3), 5, stage.max_steps));
    }

    #[test]
    fn stage_3_the_best_is_kept_for_any_gain() {
        let plan = patient_plan();
        let tracker = tracker(&plan, &[1.0, 0.9999, f64::NAN, 1.2]);
        assert_eq!(tracker.best.unwrap().loss, 0.9999);
    }

    #[test]
    fn stage_4_a_run_ends_after_a_deeper_stage_without_gain() {
        let plan = patient_plan();
        let mut tracker = tracker(&plan, &[1.0, 0.8]);
        assert_eq!(tracker.after_stage(&plan, StageIndex(0), true), AfterStage::NextStage(StageIndex(1)));
        let _ = tracker.enter_stage(&plan.stages[1], &evaluation(0.8));
        assert_eq!(tracker.observe(&plan.stages[1], &evaluation(0.7999)), Standing::Best);
        assert_eq!(tracker.after_stage(&plan, StageIndex(1), true), AfterStage::EndRun(RunReason::NoGain));
        assert_eq!(tracker.after_stage(&plan, StageIndex(1), false), AfterStage::NextStage(StageIndex(2)));
        let _ = tracker.observe(&plan.stages[1], &evaluation(0.6));
        assert_eq!(tracker.after_stage(&plan, StageIndex(1), true), AfterStage::NextStage(StageIndex(2)));
        let last = StageIndex(plan.stages.len() as u32 - 1);
        assert_eq!(tracker.after_stage(&plan, last, true), AfterStage::EndRun(RunReason::LastStageEnded));
    }

    fn plateau_plan(factor: f64, patience: u32, min_delta: f64) -> Plan {
        plan_of(&spec(json!({
            "lr_scheduler": {"kind": "reduce_on_plateau", "warmup_steps": 0, "plateau": {"factor": factor, "patience": patience}},
            "until": {"max_epochs": 9, "max_steps": null, "early_stopping": {"metric": "eval_loss", "patience": 50, "min_delta": min_delta}},
        })))
    }

    /// STAGE-5: the rate after each evaluation is that of torch's ReduceLROnPlateau.
    #[test]
    fn stage_5_reductions_are_those_of_pytorch() {
        for table in reference("plateau") {
            let number = |field: &str| table[field].as_f64().unwrap();
            let factor = number("factor");
            let plan = plateau_plan(factor, number("patience") as u32, number("threshold"));
            let values: Vec<f64> = serde_json::from_value(table["values"].clone()).unwrap();
            let rates: Vec<f64> = serde_json::from_value(table["rates"].clone()).unwrap();
            let mut tracker = RunTracker::new(Judge { metric: Metric::EvalLoss, min_delta: number("threshold") });
            let _ = tracker.enter_stage(&plan.stages[0], &evaluation(values[0]));
            for (value, rate) in values.iter().zip(&rates).skip(1) {
                let _ = tracker.observe(&plan.stages[0], &evaluation(*value));
                let ours = factor.powi(tracker.reductions() as i32);
                assert!((ours / rate - 1.0).abs() < 1e-12, "{ours} is not {rate}");
            }
        }
    }

    #[test]
    fn stage_5_reductions_of_ended_stages_are_kept() {
        let plan = plateau_plan(0.5, 2, 0.0);
        let mut tracker = RunTracker::new(Judge { metric: Metric::EvalLoss, min_delta: 0.0 });
        for (stage, losses) in [(0, [1.0, 0.9, 0.8, 0.7]), (1, [0.7, 0.9, f64::NAN, 0.9])] {
            let _ = tracker.enter_stage(&plan.stages[stage], &evaluation(losses[0]));
            for loss in &losses[1..] {
                let _ = tracker.observe(&plan.stages[stage], &evaluation(*loss));
            }
            tracker.end_stage(StageIndex(stage as u32));
        }
        let ended = tracker.ended_stages(&[5, 7, 1]);
        assert_eq!(
            ended.iter().map(|stage| (stage.steps, stage.reductions)).collect::<Vec<_>>(),
            [(5, 0), (7, 1), (1, 0)]
        );
        let text = serde_json::to_string(&tracker).unwrap();
        assert_eq!(serde_json::from_str::<RunTracker>(&text).unwrap(), tracker);
        // A tracker of the first version.
        let old = r#"{"judge": {"metric": "eval_loss", "min_delta": 0.001}, "best": null, "stage": {"judge": {"metric": "eval_loss",
            "min_delta": 0.001}, "best": 1.0, "without_gain": 0, "non_finite": 0, "run_best_before": null}}"#;
        assert_eq!(serde_json::from_str::<RunTracker>(old).unwrap().reductions(), 0);
    }

    #[test]
    fn a_run_without_a_finite_evaluation_fails() {
        let plan = patient_plan();
        let tracker = tracker(&plan, &[f64::NAN, f64::NAN]);
        assert_eq!(tracker.after_stage(&plan, StageIndex(0), true), AfterStage::Fail(RunReason::TrainerError));
    }

    #[test]
    fn accuracy_is_better_when_larger_and_trackers_survive_json() {
        let judge = Judge { metric: Metric::EvalAccuracy, min_delta: 0.0 };
        assert!(judge.is_better(0.8, 0.7) && !judge.is_better(0.7, 0.7) && !judge.improves(0.6, 0.7));
        let plan = patient_plan();
        // The last needs all 17 digits, read exactly.
        let tracker = tracker(&plan, &[1.0, 0.1 + 0.2, 0.998_403_397_000_000_1, f64::NAN]);
        let text = serde_json::to_string(&tracker).unwrap();
        assert_eq!(serde_json::from_str::<RunTracker>(&text).unwrap(), tracker);
    }
}
