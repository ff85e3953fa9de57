//! The plan. A trainer receives it from the coordinator, so its parts must agree with each other before anything indexes by them.

use super::checker::Checker;
use super::enums::WireEnum;
use super::spec;
use super::{each, required};
use crate::ids::GroupIndex;
use crate::pb;
use crate::plan::{DataSummary, LayerGroup, Plan, PlannedStage, StageCost, StepWork};
use crate::violation::Violations;

impl TryFrom<&pb::Plan> for Plan {
    type Error = Violations;

    fn try_from(raw: &pb::Plan) -> Result<Self, Violations> {
        let mut at = Checker::default();
        let stages = at.collect(each("stages", &raw.stages));
        let data = at.collect(required("data", raw.data.as_ref()));
        let plan = Self {
            groups: raw.groups.iter().map(LayerGroup::from).collect(),
            stages,
            classes: raw.classes.clone(),
            data,
            logical_shards: raw.logical_shards,
            global_batch_size: raw.global_batch_size,
            steps_per_epoch: raw.steps_per_epoch,
            notes: raw.notes.clone(),
            feature_size: raw.feature_size,
        };
        at.collect(disagreements(&plan, raw.stages.is_empty()));
        at.finish(plan)
    }
}

/// Rules over several fields.
fn disagreements(plan: &Plan, no_stages: bool) -> Result<(), Violations> {
    let mut violations = Violations::default();
    if plan.groups.is_empty() {
        violations.push("groups", "is required: at least the head");
    }
    if no_stages {
        violations.push("stages", "is required: at least one");
    }
    let counts = [
        ("logical_shards", plan.logical_shards),
        ("global_batch_size", plan.global_batch_size),
        ("steps_per_epoch", plan.steps_per_epoch),
    ];
    for (field, count) in counts {
        if count == 0 {
            violations.push(field, "must be at least 1, not 0");
        }
    }
    if plan.logical_shards > plan.global_batch_size {
        let (shards, batch) = (plan.logical_shards, plan.global_batch_size);
        violations.push("logical_shards", format!("must be at most global_batch_size ({batch}), not {shards}"));
    }
    for (index, stage) in plan.stages.iter().enumerate() {
        for (field, groups) in [("trainable_groups", &stage.trainable_groups), ("thawed_groups", &stage.thawed_groups)]
        {
            if let Some(group) = groups.iter().find(|group| group.0 as usize >= plan.groups.len()) {
                violations
                    .push(format!("stages[{index}].{field}"), format!("names group {group} of {}", plan.groups.len()));
            }
        }
    }
    violations.or_ok(())
}

impl TryFrom<&pb::PlannedStage> for PlannedStage {
    type Error = Violations;

    fn try_from(raw: &pb::PlannedStage) -> Result<Self, Violations> {
        let mut at = Checker::default();
        let until = spec::planned_until(&mut at, raw.until.as_ref());
        let (schedule, warmup_steps, plateau) = spec::planned_schedule(&mut at, raw.lr_scheduler.as_ref());
        let on_enter = spec::planned_on_enter(&mut at, raw.on_enter);
        for (field, groups) in [("trainable_groups", &raw.trainable_groups), ("thawed_groups", &raw.thawed_groups)] {
            if !groups.is_sorted_by(|low, high| low < high) {
                at.refuse(field, "must be ascending");
            }
        }
        if raw.trainable_groups.is_empty() {
            at.refuse("trainable_groups", "is required: at least one group");
        }
        if raw.learning_rates.len() != raw.trainable_groups.len() {
            let (rates, groups) = (raw.learning_rates.len(), raw.trainable_groups.len());
            at.refuse("learning_rates", format!("must have one rate per trainable group ({groups}), not {rates}"));
        }
        for (index, rate) in raw.learning_rates.iter().enumerate() {
            if !rate.is_finite() || *rate < 0.0 {
                at.refuse(
                    &format!("learning_rates[{index}]"),
                    format!("must be a finite number, at least 0, not {rate}"),
                );
            }
        }
        if raw.workers == Some(0) {
            at.refuse("workers", "must be at least 1, not 0; leave it out for workers.max");
        }
        if raw.max_steps == 0 {
            at.refuse("max_steps", "must be at least 1, not 0");
        }
        at.finish(Self {
            name: raw.name.clone(),
            trainable_groups: groups(&raw.trainable_groups),
            learning_rates: raw.learning_rates.clone(),
            until,
            on_enter,
            schedule,
            warmup_steps,
            max_steps: raw.max_steps,
            trainable_parameters: raw.trainable_parameters,
            all_reduce_bytes: raw.all_reduce_bytes,
            memory_bytes: raw.memory_bytes,
            boundary_bytes_per_sample: raw.boundary_bytes_per_sample,
            thawed_groups: groups(&raw.thawed_groups),
            plateau,
            cost: raw.cost.as_ref().map(StageCost::from).unwrap_or_default(),
            recompute_batch_norm: raw.recompute_batch_norm,
            workers: raw.workers,
        })
    }
}

fn groups(indices: &[u32]) -> Vec<GroupIndex> {
    indices.iter().map(|&index| GroupIndex(index)).collect()
}

fn indices(groups: &[GroupIndex]) -> Vec<u32> {
    groups.iter().map(|group| group.0).collect()
}

impl From<&Plan> for pb::Plan {
    fn from(plan: &Plan) -> Self {
        Self {
            groups: plan.groups.iter().map(Into::into).collect(),
            stages: plan.stages.iter().map(Into::into).collect(),
            classes: plan.classes.clone(),
            data: Some((&plan.data).into()),
            logical_shards: plan.logical_shards,
            global_batch_size: plan.global_batch_size,
            steps_per_epoch: plan.steps_per_epoch,
            notes: plan.notes.clone(),
            feature_size: plan.feature_size,
        }
    }
}

impl From<&PlannedStage> for pb::PlannedStage {
    fn from(stage: &PlannedStage) -> Self {
        Self {
            name: stage.name.clone(),
            trainable_groups: indices(&stage.trainable_groups),
            learning_rates: stage.learning_rates.clone(),
            until: Some((&stage.until).into()),
            on_enter: stage.on_enter.number(),
            lr_scheduler: Some(pb::LrScheduler {
                r#type: stage.schedule.number(),
                warmup_steps: Some(stage.warmup_steps),
                warmup_ratio: None,
                factor: stage.plateau.map(|plateau| plateau.factor),
                patience: stage.plateau.map(|plateau| plateau.patience),
            }),
            max_steps: stage.max_steps,
            trainable_parameters: stage.trainable_parameters,
            all_reduce_bytes: stage.all_reduce_bytes,
            memory_bytes: stage.memory_bytes,
            boundary_bytes_per_sample: stage.boundary_bytes_per_sample,
            thawed_groups: indices(&stage.thawed_groups),
            recompute_batch_norm: stage.recompute_batch_norm,
            workers: stage.workers,
            cost: Some((&stage.cost).into()),
        }
    }
}

/// Both forms of a cost hold the same numbers.
macro_rules! same_numbers {
    ($one:ty, $other:ty { $($number:ident),* } $(with $part:ident: $to:expr, $back:expr)?) => {
        impl From<&$one> for $other {
            fn from(cost: &$one) -> Self {
                Self { $($number: cost.$number,)* $($part: $to(&cost.$part))? }
            }
        }
        impl From<&$other> for $one {
            fn from(cost: &$other) -> Self {
                Self { $($number: cost.$number,)* $($part: $back(&cost.$part))? }
            }
        }
    };
}

same_numbers!(
    pb::StepWork,
    StepWork { operators, flops, activation_bytes, weight_bytes, update_operators, update_bytes }
);
same_numbers!(pb::StageCost, StageCost {
    step_flops, uncached_step_flops, full_step_flops, gradient_bytes, optimizer_bytes, checkpoint_bytes, cache_bytes, save_bytes
} with work: |work: &Option<pb::StepWork>| work.as_ref().map(Into::into).unwrap_or_default(), |work: &StepWork| Some(work.into()));

impl From<&pb::LayerGroup> for LayerGroup {
    fn from(raw: &pb::LayerGroup) -> Self {
        Self {
            name: raw.name.clone(),
            parameters: raw.parameters,
            forward_flops: raw.forward_flops,
            embedding: raw.embedding,
        }
    }
}

impl From<&LayerGroup> for pb::LayerGroup {
    fn from(group: &LayerGroup) -> Self {
        Self {
            name: group.name.clone(),
            parameters: group.parameters,
            forward_flops: group.forward_flops,
            embedding: group.embedding,
        }
    }
}

impl TryFrom<&pb::DataSummary> for DataSummary {
    type Error = Violations;

    fn try_from(raw: &pb::DataSummary) -> Result<Self, Violations> {
        Ok(Self {
            train_samples: raw.train_samples,
            eval_samples: raw.eval_samples,
            test_samples: raw.test_samples,
            class_counts: raw.class_counts.clone(),
            fingerprint: raw.fingerprint.clone(),
        })
    }
}

impl From<&DataSummary> for pb::DataSummary {
    fn from(data: &DataSummary) -> Self {
        Self {
            train_samples: data.train_samples,
            eval_samples: data.eval_samples,
            test_samples: data.test_samples,
            class_counts: data.class_counts.clone(),
            fingerprint: data.fingerprint.clone(),
        }
    }
}
