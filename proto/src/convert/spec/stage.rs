//! The stages of strategy custom, and the rules between a stage's end and its schedule.

use super::policies::{group_pattern, learning_rates};
use super::{lr_scheduler, until};
use crate::convert::checker::{Checker, Interval, quote};
use crate::convert::enums::WireEnum;
use crate::pb;
use crate::spec::{LrSchedulerType, OnEnter, Stage, Strategy, Workers};
use std::collections::BTreeSet;

pub(super) fn stages(at: &mut Checker, raw: &pb::RunSpec, workers: &Workers) -> Vec<Stage> {
    // An unknown strategy may be a misspelled custom.
    let is_known = Strategy::from_number(raw.strategy).is_some();
    match (raw.strategy == Strategy::Custom.number(), raw.stages.is_empty()) {
        _ if !is_known => {}
        (true, true) => at.refuse("stages", "is required for strategy custom: give at least one stage"),
        (false, false) => {
            at.refuse(
                "stages",
                "must be empty unless strategy is custom: remove the stages, or set strategy to custom",
            );
        }
        (true, false) | (false, true) => {}
    }
    let mut names = BTreeSet::new();
    at.each("stages", &raw.stages, |at, raw| {
        if !raw.name.is_empty() && !names.insert(raw.name.clone()) {
            at.refuse("name", format!("{} is the name of an earlier stage: choose another", quote(&raw.name)));
        }
        stage(at, raw, workers)
    })
}

fn stage(at: &mut Checker, raw: &pb::Stage, workers: &Workers) -> Stage {
    let name = at.name("name", &raw.name);
    if raw.thaw.is_empty() {
        at.refuse(
            "thaw",
            "is required: names of layer groups, or regular expressions between slashes (/block\\.[67]/)",
        );
    }
    for (index, pattern) in raw.thaw.iter().enumerate() {
        group_pattern(at, &format!("thaw[{index}]"), pattern);
    }
    if let Some(most) = raw.workers.filter(|most| !(workers.min..=workers.max).contains(most)) {
        let Workers { min, max, .. } = workers;
        let message = format!(
            "must be in {min}-{max} (workers.min to workers.max), not {most}; leave it out for as many as workers.sizing gives"
        );
        at.refuse("workers", message);
    }
    Stage {
        name,
        thaw: raw.thaw.clone(),
        learning_rate: at.real_or_none("learning_rate", raw.learning_rate, Interval::Positive, "the run's"),
        learning_rate_spread: {
            let allowed = Interval::Closed(1.0, 10_000.0);
            at.real_or_none("learning_rate_spread", raw.learning_rate_spread, allowed, "the run's")
        },
        until: raw.until.as_ref().map(|raw| at.within("until", |at| until(at, raw))),
        on_enter: at.choice("on_enter", raw.on_enter).unwrap_or(OnEnter::RestoreBest),
        lr_scheduler: raw.lr_scheduler.as_ref().map(|raw| at.within("lr_scheduler", |at| lr_scheduler(at, raw))),
        learning_rates: learning_rates(at, &raw.learning_rates),
        recompute_batch_norm: raw.recompute_batch_norm,
        workers: raw.workers,
    }
}

/// Refuses a schedule that needs a known length on a stage that only patience ends.
pub(super) fn known_lengths(at: &mut Checker, strategy: Strategy, raw: &pb::RunSpec) {
    let kind = |raw: Option<&pb::LrScheduler>| {
        raw.and_then(|raw| LrSchedulerType::from_number(raw.r#type).flatten()).filter(|&kind| needs_length(kind))
    };
    let unbounded = |raw: Option<&pb::Until>| {
        raw.is_some_and(|raw| raw.early_stopping.is_some() && raw.max_epochs.is_none() && raw.max_steps.is_none())
    };
    let mistake = |kind: LrSchedulerType| {
        let name = kind.name();
        format!(
            "{name} needs a stage of known length: give until max_epochs or max_steps, or use constant, inverse_sqrt or \
             reduce_on_plateau"
        )
    };
    let (run_kind, run_until) = (kind(raw.lr_scheduler.as_ref()), unbounded(raw.until.as_ref()));
    if strategy != Strategy::Custom {
        if let Some(kind) = run_kind.filter(|_| run_until) {
            at.refuse("lr_scheduler.type", mistake(kind));
        }
        return;
    }
    for (index, stage) in raw.stages.iter().enumerate() {
        let own_kind = kind(stage.lr_scheduler.as_ref());
        let stage_kind = if stage.lr_scheduler.is_some() { own_kind } else { run_kind };
        let stage_until = if stage.until.is_some() { unbounded(stage.until.as_ref()) } else { run_until };
        if let Some(kind) = stage_kind.filter(|_| stage_until) {
            let field = if own_kind.is_some() { "lr_scheduler.type" } else { "until" };
            at.refuse(&format!("stages[{index}].{field}"), mistake(kind));
        }
    }
}

fn needs_length(kind: LrSchedulerType) -> bool {
    match kind {
        LrSchedulerType::Constant | LrSchedulerType::InverseSqrt | LrSchedulerType::ReduceOnPlateau => false,
        LrSchedulerType::Linear
        | LrSchedulerType::Cosine
        | LrSchedulerType::SlantedTriangular
        | LrSchedulerType::OneCycle
        | LrSchedulerType::RangeTest => true,
    }
}
