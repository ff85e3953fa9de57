//! The learning rate of a group at a step: its peak, times the stage's shape, times the group's own warmup.
//!
//! - RATE-1: a rate is a function of the plan, the stages that have ended (their updates and reductions), the step in the stage, and the
//!   reductions of the present one, which the tracker in every checkpoint holds. Nothing else is carried along, so a resumed run has the
//!   rates of an undisturbed one, bit for bit.
//! - RATE-2: a newly thawed group warms up linearly from 0 over `warmup_steps`, from its thaw: fresh AdamW moments make the
//!   first updates sign steps.
//! - RATE-3: a group that was thawed before never jumps up: it warms up from the rate it had last, over at least
//!   [`SHORTEST_WARMUP`] steps; where its rate stood at or above the new peak it starts at the peak.
//!
//! With `t` the updates done in the stage (from 0), `T` the stage's most updates and `w` the warmup, the shapes are:
//!
//! | | |
//! |---|---|
//! | constant | `1` |
//! | inverse_sqrt | `min(1, sqrt(w / (t + 1)))`, `w` at least 1 |
//! | linear | `1` for `t < w`, then `(T - t) / (T - w)` |
//! | cosine | `1` for `t < w`, then `(1 + cos(pi (t - w) / (T - w))) / 2` |
//! | slanted_triangular | Howard and Ruder 2018, equation 3, cut 0.1, ratio 32 |
//! | reduce_on_plateau | `factor` to the power of the reductions so far, which follow from recorded evaluations (`stage_end`) |
//! | range_test | `1e-8 ^ (1 - t / (T - 1))` |
//! | one_cycle | with `p = t / (T - 1)`: cosine from 1/25 up to 1 at `p = 0.25`, then cosine down to 1e-5 (Smith 2018, fastai's constants) |
//!
//! slanted_triangular, one_cycle and range_test bring their own way up, so their warmup is 0 unless it is given.

use std::f64::consts::PI;
use thaw_proto::ids::GroupIndex;
use thaw_proto::plan::{Plan, PlannedStage};
use thaw_proto::spec::LrSchedulerType;

/// Updates over which a group that was thawed before rises to a new stage's rates, at least.
pub const SHORTEST_WARMUP: u32 = 10;
const LONGEST_WARMUP: u32 = 500;
const WARMUP_SHARE: f64 = 0.06;

const STLR_CUT: f64 = 0.1;
const STLR_RATIO: f64 = 32.0;
const ONE_CYCLE_UP: f64 = 0.25;
const ONE_CYCLE_START: f64 = 1.0 / 25.0;
const ONE_CYCLE_END: f64 = 1e-5;
const RANGE_TEST_START: f64 = 1e-8;

/// A stage that has ended, as far as later rates depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndedStage {
    /// Updates that it took.
    pub steps: u32,
    /// How often reduce_on_plateau had lowered its rate.
    pub reductions: u32,
}

/// Rates of one stage, given what became of each earlier one.
#[derive(Debug, Clone)]
pub struct Rates<'plan> {
    stage: &'plan PlannedStage,
    /// Per trainable group: where its warmup starts, as a share of its peak; `None` for a newly thawed one.
    start: Vec<Option<f64>>,
}

impl<'plan> Rates<'plan> {
    /// Rates of stage `ended.len()`. `None` past the last stage.
    #[must_use]
    pub fn entering(plan: &'plan Plan, ended: &[EndedStage]) -> Option<Self> {
        let mut last: Vec<Option<f64>> = vec![None; plan.groups.len()];
        for (stage, ended) in plan.stages.iter().zip(ended) {
            let Some(final_step) = ended.steps.checked_sub(1) else {
                continue;
            };
            let rates = Self::with_last(stage, &last).at(final_step, ended.reductions);
            for (group, rate) in stage.trainable_groups.iter().zip(rates) {
                last[position(*group)] = Some(rate);
            }
        }
        plan.stages.get(ended.len()).map(|stage| Self::with_last(stage, &last))
    }

    fn with_last(stage: &'plan PlannedStage, last: &[Option<f64>]) -> Self {
        let start = stage
            .trainable_groups
            .iter()
            .zip(&stage.learning_rates)
            .map(|(group, &peak)| last[position(*group)].map(|rate| (rate / peak).min(1.0)))
            .collect();
        Self { stage, start }
    }

    /// Rates of the update after `stage_step` updates in the stage and so many reductions, per trainable group.
    #[must_use]
    pub fn at(&self, stage_step: u32, reductions: u32) -> Vec<f64> {
        let stage = self.stage;
        let reduced = stage.plateau.map_or(1.0, |plateau| plateau.factor.powi(reductions.min(1 << 20) as i32));
        let shape = shape(stage.schedule, stage_step, stage.max_steps, stage.warmup_steps) * reduced;
        let warm = |start: Option<f64>| match start {
            None => warmup(0.0, stage_step, stage.warmup_steps),
            Some(start) => warmup(start, stage_step, stage.warmup_steps.max(SHORTEST_WARMUP)),
        };
        self.start.iter().zip(&stage.learning_rates).map(|(&start, &peak)| peak * (shape * warm(start))).collect()
    }
}

/// Linear from `start` (towards 1, reached with update number `steps`).
fn warmup(start: f64, stage_step: u32, steps: u32) -> f64 {
    if stage_step.saturating_add(1) >= steps {
        return 1.0;
    }
    start + (1.0 - start) * (f64::from(stage_step + 1) / f64::from(steps))
}

/// The stage's factor after `stage_step` updates, in [0, 1], without the reductions of a plateau.
#[must_use]
pub fn shape(kind: LrSchedulerType, stage_step: u32, max_steps: u32, warmup_steps: u32) -> f64 {
    let (t, total, warm) = (f64::from(stage_step), f64::from(max_steps), f64::from(warmup_steps));
    // How far the stage is between the end of its warmup and its own end.
    let decayed = if stage_step < warmup_steps { 0.0 } else { ((t - warm) / (total - warm).max(1.0)).min(1.0) };
    match kind {
        LrSchedulerType::Constant | LrSchedulerType::ReduceOnPlateau => 1.0,
        LrSchedulerType::InverseSqrt => (warm.max(1.0) / (t + 1.0)).sqrt().min(1.0),
        LrSchedulerType::Linear => 1.0 - decayed,
        LrSchedulerType::Cosine => 0.5 * (1.0 + (PI * decayed).cos()),
        LrSchedulerType::SlantedTriangular => slanted_triangular(t, total),
        LrSchedulerType::OneCycle => one_cycle(t, total),
        LrSchedulerType::RangeTest => RANGE_TEST_START.powf(1.0 - (t / (total - 1.0).max(1.0)).min(1.0)),
    }
}

fn slanted_triangular(t: f64, total: f64) -> f64 {
    let cut = (total * STLR_CUT).floor().max(1.0);
    let rise = if t < cut { t / cut } else { (1.0 - (t - cut) / (cut * (1.0 / STLR_CUT - 1.0))).max(0.0) };
    (1.0 + rise * (STLR_RATIO - 1.0)) / STLR_RATIO
}

fn one_cycle(t: f64, total: f64) -> f64 {
    if total <= 1.0 {
        return 1.0;
    }
    let progress = (t / (total - 1.0)).min(1.0);
    if progress < ONE_CYCLE_UP {
        cosine(ONE_CYCLE_START, 1.0, progress / ONE_CYCLE_UP)
    } else {
        cosine(1.0, ONE_CYCLE_END, (progress - ONE_CYCLE_UP) / (1.0 - ONE_CYCLE_UP))
    }
}

fn cosine(from: f64, to: f64, share: f64) -> f64 {
    to + (from - to) * 0.5 * (1.0 + (PI * share).cos())
}

/// Whether the shape is defined only for a stage of known length.
#[must_use]
pub fn needs_length(kind: LrSchedulerType) -> bool {
    match kind {
        LrSchedulerType::Constant | LrSchedulerType::InverseSqrt | LrSchedulerType::ReduceOnPlateau => false,
        LrSchedulerType::Linear
        | LrSchedulerType::Cosine
        | LrSchedulerType::SlantedTriangular
        | LrSchedulerType::OneCycle
        | LrSchedulerType::RangeTest => true,
    }
}

/// Updates of warmup for a newly thawed group: the given ones, else 6 % of the stage, 10-500; never more than the stage has.
#[must_use]
pub fn warmup_steps(kind: LrSchedulerType, given: Option<u32>, max_steps: u32) -> u32 {
    let derived = match kind {
        LrSchedulerType::Constant
        | LrSchedulerType::InverseSqrt
        | LrSchedulerType::Linear
        | LrSchedulerType::Cosine
        | LrSchedulerType::ReduceOnPlateau => {
            // Below 2^32, and not negative.
            ((f64::from(max_steps) * WARMUP_SHARE).round() as u32).clamp(SHORTEST_WARMUP, LONGEST_WARMUP)
        }
        LrSchedulerType::SlantedTriangular | LrSchedulerType::OneCycle | LrSchedulerType::RangeTest => 0,
    };
    given.unwrap_or(derived).min(max_steps)
}

fn position(group: GroupIndex) -> usize {
    group.0 as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{plan_of, reference, spec};
    use proptest::prelude::*;
    use serde_json::json;

    fn ended(steps: &[u32]) -> Vec<EndedStage> {
        steps.iter().map(|&steps| EndedStage { steps, reductions: 0 }).collect()
    }

    fn close(left: f64, right: f64) {
        assert!((left - right).abs() <= 1e-15 * right.abs().max(1.0), "{left} is not {right}");
    }

    #[test]
    fn shapes_follow_their_closed_forms() {
        let (total, warm) = (100, 10);
        for t in 0..total {
            let x = f64::from(t);
            close(shape(LrSchedulerType::Constant, t, total, warm), 1.0);
            close(
                shape(LrSchedulerType::InverseSqrt, t, total, warm),
                if t < 10 { 1.0 } else { (10.0 / (x + 1.0)).sqrt() },
            );
            close(shape(LrSchedulerType::Linear, t, total, warm), if t < 10 { 1.0 } else { (100.0 - x) / 90.0 });
            let cosine = if t < 10 { 1.0 } else { (PI * (x - 10.0) / 180.0).cos().powi(2) };
            close(shape(LrSchedulerType::Cosine, t, total, warm), cosine);
            let rise = if t < 10 { x / 10.0 } else { 1.0 - (x - 10.0) / 90.0 };
            close(shape(LrSchedulerType::SlantedTriangular, t, total, 0), (1.0 + 31.0 * rise) / 32.0);
        }
    }

    #[test]
    fn one_cycle_has_its_four_corners() {
        let at = |t| shape(LrSchedulerType::OneCycle, t, 101, 0);
        close(at(0), 0.04);
        close(at(25), 1.0);
        close(at(100), 1e-5);
        close(at(12), 0.04 + 0.96 * (1.0 - (PI * 12.0 / 25.0).cos()) / 2.0);
        close(shape(LrSchedulerType::OneCycle, 0, 1, 0), 1.0);
    }

    #[test]
    fn warmup_is_six_percent_between_ten_and_five_hundred() {
        let derived = |steps| warmup_steps(LrSchedulerType::Linear, None, steps);
        assert_eq!([derived(5), derived(100), derived(1000), derived(100_000)], [5, 10, 60, 500]);
        assert_eq!(warmup_steps(LrSchedulerType::Linear, Some(7), 100), 7);
        assert_eq!(warmup_steps(LrSchedulerType::Linear, Some(700), 100), 100);
        assert_eq!(warmup_steps(LrSchedulerType::OneCycle, None, 100), 0);
    }

    /// RATE-2, RATE-3: with a constant schedule the head goes on at its new peak while the new unit warms up from 0.
    #[test]
    fn rate_2_new_groups_warm_up_alone() {
        let plan = plan_of(&spec(json!({"lr_scheduler": {"kind": "constant", "warmup_steps": 4}})));
        let first = Rates::entering(&plan, &[]).unwrap();
        assert_eq!((0..5).map(|t| first.at(t, 0)[0] / 1e-3).collect::<Vec<_>>(), [0.25, 0.5, 0.75, 1.0, 1.0]);
        let second = Rates::entering(&plan, &ended(&[20])).unwrap();
        let peaks = &plan.stages[1].learning_rates;
        assert_eq!(second.at(0, 0), [peaks[0] * 0.25, peaks[1]]);
        assert_eq!(second.at(3, 0), *peaks);
        assert_eq!(peaks[1], 5e-4);
    }

    /// RATE-3: after a linear decay the head rises from where it stood.
    #[test]
    fn rate_3_old_groups_rise_from_their_last_rate() {
        let plan = plan_of(&spec(
            json!({"lr_scheduler": {"kind": "linear", "warmup_steps": 0}, "until": {"max_epochs": null, "max_steps": 50, "early_stopping": null}}),
        ));
        let last = Rates::entering(&plan, &[]).unwrap().at(49, 0)[0];
        close(last, 1e-3 / 50.0);
        let second = Rates::entering(&plan, &ended(&[50])).unwrap();
        let peak = plan.stages[1].learning_rates[1];
        let start = last / peak;
        close(second.at(0, 0)[1], peak * (start + (1.0 - start) * 0.1));
        close(second.at(9, 0)[1], peak * (1.0 - 9.0 / 50.0));
    }

    #[test]
    fn a_stage_without_steps_changes_nothing() {
        let plan = plan_of(&spec(json!({})));
        assert!(Rates::entering(&plan, &ended(&vec![1; plan.stages.len()])).is_none());
        let skipped = Rates::entering(&plan, &ended(&[0])).unwrap().at(0, 0);
        assert!(skipped.iter().zip(&plan.stages[1].learning_rates).all(|(rate, peak)| rate < peak));
    }

    fn numbers(value: &serde_json::Value) -> Vec<f64> {
        serde_json::from_value(value.clone()).unwrap()
    }

    fn within(left: f64, right: f64) {
        assert!((left - right).abs() <= 1e-12 * right.abs().max(1e-3), "{left} is not {right}");
    }

    /// O6
    #[test]
    fn shapes_are_those_of_the_papers_and_libraries() {
        let kinds = [
            ("slanted_triangular", LrSchedulerType::SlantedTriangular),
            ("one_cycle", LrSchedulerType::OneCycle),
            ("linear", LrSchedulerType::Linear),
            ("cosine", LrSchedulerType::Cosine),
        ];
        for (name, kind) in kinds {
            for table in reference(name) {
                let factors = numbers(&table["factors"]);
                let steps = u32::try_from(factors.len()).unwrap();
                (0..steps).zip(factors).for_each(|(t, factor)| within(shape(kind, t, steps, 0), factor));
            }
        }
    }

    #[test]
    fn range_test_is_exponential() {
        let at = |t| shape(LrSchedulerType::RangeTest, t, 101, 0);
        close(at(0), 1e-8);
        close(at(100), 1.0);
        within(at(50), 1e-4);
        close(shape(LrSchedulerType::RangeTest, 0, 1, 0), 1e-8);
    }

    fn plateau_plan() -> Plan {
        plan_of(&spec(json!({
            "lr_scheduler": {"kind": "reduce_on_plateau", "warmup_steps": 0, "plateau": {"factor": 0.5, "patience": 1}},
        })))
    }

    /// RATE-1: reductions are part of what a rate follows from; later stages rise from the reduced rate.
    #[test]
    fn rate_1_a_plateau_lowers_the_rate_and_the_next_stage_rises_from_there() {
        let plan = plateau_plan();
        let first = Rates::entering(&plan, &[]).unwrap();
        assert_eq!([first.at(9, 0)[0], first.at(9, 1)[0], first.at(9, 3)[0]], [1e-3, 5e-4, 1.25e-4]);
        let second = Rates::entering(&plan, &[EndedStage { steps: 10, reductions: 3 }]).unwrap();
        let peak = plan.stages[1].learning_rates[1];
        let start = 1.25e-4 / peak;
        close(second.at(0, 0)[1], peak * (start + (1.0 - start) * 0.1));
        close(second.at(9, 0)[1], peak);
        close(second.at(9, 1)[1], peak / 2.0);
    }

    fn kinds() -> impl Strategy<Value = LrSchedulerType> {
        prop_oneof![
            Just(LrSchedulerType::Constant),
            Just(LrSchedulerType::InverseSqrt),
            Just(LrSchedulerType::Linear),
            Just(LrSchedulerType::Cosine),
            Just(LrSchedulerType::SlantedTriangular),
            Just(LrSchedulerType::OneCycle),
            Just(LrSchedulerType::ReduceOnPlateau),
            Just(LrSchedulerType::RangeTest),
        ]
    }

    proptest! {
        #[test]
        fn shapes_stay_between_0_and_1(kind in kinds(), total in 1_u32..5000, share in 0.0..1.0_f64, warm in 0_u32..600) {
            let t = (f64::from(total) * share) as u32;
            let factor = shape(kind, t, total, warmup_steps(kind, Some(warm), total));
            prop_assert!((0.0..=1.0).contains(&factor), "{factor}");
        }

        /// RATE-3 over random lengths: entering a stage raises no old group by more than a tenth of its peak.
        #[test]
        fn rate_3_no_jump(kind in 0_usize..4, steps in prop::collection::vec(1_u32..50, 1..4)) {
            let name = ["constant", "inverse_sqrt", "linear", "cosine"][kind];
            let plan = plan_of(&spec(json!({"lr_scheduler": {"kind": name, "warmup_steps": null}})));
            for stage in 1..=steps.len().min(plan.stages.len() - 1) {
                let before = Rates::entering(&plan, &ended(&steps[..stage - 1])).unwrap().at(steps[stage - 1] - 1, 0);
                let after = Rates::entering(&plan, &ended(&steps[..stage])).unwrap().at(0, 0);
                let old = plan.stages[stage].trainable_groups.len() - plan.stages[stage].thawed_groups.len();
                for back in 1..=old {
                    let rise = after[after.len() - back] - before[before.len() - back];
                    prop_assert!(rise <= 0.1 * plan.stages[stage].learning_rates[after.len() - back] + 1e-18);
                }
            }
        }
    }
}
