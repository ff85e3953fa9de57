//! From a spec, a graph and a data set to the stages of a run.
//!
//! - PLAN-1: every mistake is reported, not the first one.
//! - PLAN-2: a group is thawed at most once; `thawed_groups` of all stages are disjoint.
//! - PLAN-3: derived stages only add groups, from the head down; a group without parameters is never trainable.
//! - PLAN-4: groups that hold embeddings are in a derived stage only where the spec says so.
//!
//! The planner never looks at names other than to match those of custom stages.

mod cost;
mod memory;
mod rates;
mod sizing;
mod strategy;
mod work;

#[cfg(test)]
mod tests;

use crate::prefix::SampleSize;
use crate::{sampler, schedule};
use rates::Levels;
use strategy::Draft;
use thaw_proto::ids::GroupIndex;
use thaw_proto::plan::{DataSummary, LayerGroup, Plan, PlannedStage};
use thaw_proto::spec::{ClassWeights, LrScheduler, LrSchedulerType, OnEnter, RunSpec, Strategy};
use thaw_proto::violation::Violations;

/// Epochs that bound a stage which only early stopping would end.
pub const EPOCHS_WITHOUT_LIMIT: u32 = 100;

/// What the planner needs to know of the graph, with its new head.
#[derive(Debug, Clone, PartialEq)]
pub struct GraphFacts {
    /// Nearest the input first; the head is last.
    pub groups: Vec<GroupFacts>,
    /// Width in elements of the features the head reads.
    pub feature_size: u32,
    /// Whether the backbone is a convolution net.
    pub convolutional: bool,
    /// The longest text, or an image.
    pub sample: SampleSize,
}

/// One layer group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupFacts {
    pub name: String,
    /// Elements of its parameters.
    pub parameters: u64,
    /// Elements of those parameters that weight decay applies to.
    pub decay_parameters: u64,
    /// Elements of its buffers (batch-norm statistics).
    pub buffers: u64,
    /// Multiply-adds of one sample's forward pass.
    pub forward_flops: u64,
    /// Whether it holds a token embedding.
    pub embedding: bool,
    /// Bytes of one sample's values that cross the cut below this group; 0 where unknown.
    pub boundary_bytes_per_sample: u64,
    /// Bytes of one sample's values that its backward pass reads.
    pub saved_bytes_per_sample: u64,
    /// The most bytes that its backward pass holds more than that, of one sample.
    pub rise_bytes_per_sample: u64,
    /// The most bytes of one sample's values that are alive at one time while it only computes its outputs.
    pub alive_bytes_per_sample: u64,
    /// Bytes of gradients of its weights that are copied to where they belong when its backward pass is done.
    pub weight_gradient_bytes: u64,
    pub forward: Work,
    /// Where a group below is trained, too.
    pub backward: Work,
    /// Where this is the lowest group that is trained.
    pub lowest_backward: Work,
}

/// What one direction of a layer group does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Of matrix products and convolutions, per sample.
    pub flops: u64,
    /// Of values read and written, per sample.
    pub bytes: u64,
    /// Of weights read and gradients written, per batch.
    pub weight_bytes: u64,
    /// Kernels that run, per batch.
    pub operators: u64,
}

/// What the planner needs to know of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFacts {
    /// In label order.
    pub classes: Vec<String>,
    pub summary: DataSummary,
    /// Training samples per logical shard.
    pub shard_sizes: Vec<u64>,
}

/// Derives the stages of a run.
///
/// # Errors
/// Every mistake in `spec` that shows only beside the graph and the data, each with the path of its field.
pub fn plan(spec: &RunSpec, graph: &GraphFacts, data: &DataFacts) -> Result<Plan, Violations> {
    let mut mistakes = Violations::default();
    check_graph(graph, &mut mistakes);
    check_data(spec, data, &mut mistakes);
    let mut notes = Vec::new();
    if graph.groups.is_empty() {
        return Err(mistakes);
    }
    let drafts = strategy::drafts(spec, graph, &mut notes, &mut mistakes);
    let levels = Levels::of(spec, graph, &drafts);
    rates::check(spec, graph, &levels, &drafts, &mut mistakes);
    for draft in &drafts {
        check_schedule(draft, &mut mistakes);
    }
    // Derived stages share the spec's fields, so they share its mistakes.
    mistakes.0.dedup();
    if !mistakes.is_empty() {
        return Err(mistakes);
    }

    let steps_per_epoch = sampler::steps_per_epoch(spec.global_batch_size, &data.shard_sizes);
    let mut thawed = vec![false; graph.groups.len()];
    let mut stages = Vec::with_capacity(drafts.len());
    for index in 0..drafts.len() {
        stages.push(stage(spec, graph, &levels, &drafts, index, steps_per_epoch, &data.summary, &mut thawed));
    }
    data_notes(spec, data, &mut notes);
    notes.extend(cost::view_note(spec, &stages));
    Ok(Plan {
        groups: graph.groups.iter().map(layer_group).collect(),
        stages,
        classes: data.classes.clone(),
        data: data.summary.clone(),
        logical_shards: spec.logical_shards,
        global_batch_size: spec.global_batch_size,
        steps_per_epoch,
        notes,
        feature_size: graph.feature_size,
    })
}

fn layer_group(facts: &GroupFacts) -> LayerGroup {
    LayerGroup {
        name: facts.name.clone(),
        parameters: facts.parameters,
        forward_flops: facts.forward_flops,
        embedding: facts.embedding,
    }
}

fn check_graph(graph: &GraphFacts, mistakes: &mut Violations) {
    match graph.groups.last() {
        None => mistakes.push("backbone.graph", "has no layer group"),
        Some(head) if head.parameters == 0 => mistakes.push("backbone.head", "has no parameter to train"),
        Some(_) => {}
    }
    if graph.feature_size == 0 {
        mistakes.push("backbone.graph", "gives the head no features to read");
    }
}

fn check_data(spec: &RunSpec, data: &DataFacts, mistakes: &mut Violations) {
    if data.classes.len() < 2 {
        mistakes.push("data.train", format!("has {} class(es); a classifier needs at least 2", data.classes.len()));
    }
    for (class, count) in data.classes.iter().zip(&data.summary.class_counts) {
        if *count == 0 {
            mistakes.push("data.train", format!("class `{class}` has no sample; remove it or add samples"));
        }
    }
    if let ClassWeights::Given(weights) = &spec.class_weights
        && weights.len() != data.classes.len()
    {
        mistakes.push(
            "class_weights.weights",
            format!("has {} weights for {} classes ({})", weights.len(), data.classes.len(), data.classes.join(", ")),
        );
    }
    if data.summary.eval_samples == 0 {
        mistakes.push("data.eval", "has no sample; give data.eval, or a larger data.split.eval");
    }
    if spec.global_batch_size < spec.logical_shards {
        mistakes.push(
            "global_batch_size",
            format!(
                "is {}, smaller than the {} logical shards it is cut into",
                spec.global_batch_size, spec.logical_shards
            ),
        );
    }
    if data.shard_sizes.len() != spec.logical_shards as usize {
        mistakes.push(
            "logical_shards",
            format!("is {}, but the training data is cut into {}", spec.logical_shards, data.shard_sizes.len()),
        );
    }
    let empty = data.shard_sizes.iter().filter(|size| **size == 0).count();
    if empty > 0 {
        mistakes.push(
            "logical_shards",
            format!(
                "is {}, more than the {} training samples can fill: {empty} shard(s) would be empty; use fewer shards or more samples",
                spec.logical_shards, data.summary.train_samples
            ),
        );
    }
    if data.shard_sizes.iter().any(|size| *size > u64::from(u32::MAX)) {
        mistakes.push("logical_shards", "leaves more than 4294967295 samples in a shard; use more shards");
    }
}

fn check_schedule(draft: &Draft, mistakes: &mut Violations) {
    let known_length = draft.until.max_epochs.is_some() || draft.until.max_steps.is_some();
    let needs_length = draft.scheduler.kind.is_some_and(schedule::needs_length);
    if needs_length && !known_length {
        mistakes.push(
            format!("{}lr_scheduler.type", draft.path),
            "needs a stage of known length; give until.max_epochs or until.max_steps, or use constant, inverse_sqrt or reduce_on_plateau",
        );
    }
    if let (Some(plateau), Some(stopping)) = (draft.scheduler.plateau, draft.until.early_stopping)
        && plateau.patience >= stopping.patience
    {
        mistakes.push(
            format!("{}lr_scheduler.patience", draft.path),
            format!(
                "is {}, so the stage ends (until.early_stopping.patience is {}) before its rate is ever reduced; lower the one or raise the other",
                plateau.patience, stopping.patience
            ),
        );
    }
}

#[expect(clippy::too_many_arguments, reason = "what one stage follows from")]
fn stage(
    spec: &RunSpec,
    graph: &GraphFacts,
    levels: &Levels,
    drafts: &[Draft],
    index: usize,
    steps_per_epoch: u32,
    data: &DataSummary,
    thawed: &mut [bool],
) -> PlannedStage {
    let draft = &drafts[index];
    let before = index.checked_sub(1).map(|before| drafts[before].groups.as_slice());
    let mut thawed_groups = Vec::new();
    for &group in &draft.groups {
        if !std::mem::replace(&mut thawed[group], true) {
            thawed_groups.push(group_index(group));
        }
    }
    let backbone_thawed = thawed[..thawed.len() - 1].contains(&true);
    let mut until = draft.until.clone();
    if until.max_epochs.is_none() && until.max_steps.is_none() {
        until.max_epochs = Some(EPOCHS_WITHOUT_LIMIT);
    }
    let by_epochs = until.max_epochs.map_or(u32::MAX, |epochs| epochs.saturating_mul(steps_per_epoch));
    let max_steps = by_epochs.min(until.max_steps.unwrap_or(u32::MAX));
    let later: Vec<usize> = drafts[index + 1..].iter().filter_map(|later| later.groups.first().copied()).collect();
    let schedule = draft.scheduler.kind.unwrap_or(match until.early_stopping {
        Some(_) => LrSchedulerType::Constant,
        None => LrSchedulerType::Linear,
    });
    // A trainer's part of a step follows from the stage's largest gang.
    let workers = sizing::of_stage(spec, graph, draft, thawed, steps_per_epoch);
    let mut sized = spec.clone();
    sized.workers.max = workers.unwrap_or(spec.workers.max);
    PlannedStage {
        name: draft.name.clone(),
        trainable_groups: draft.groups.iter().copied().map(group_index).collect(),
        learning_rates: rates::of_stage(spec, graph, levels, draft, backbone_thawed),
        on_enter: if before.is_none() { OnEnter::Keep } else { draft.on_enter },
        recompute_batch_norm: draft.recompute_batch_norm,
        workers,
        schedule,
        warmup_steps: schedule::warmup_steps(schedule, given_warmup(&draft.scheduler, max_steps), max_steps),
        max_steps,
        trainable_parameters: cost::trainable_parameters(graph, &draft.groups),
        all_reduce_bytes: cost::all_reduce_bytes(spec, graph, &draft.groups),
        memory_bytes: memory::bytes(
            &sized,
            graph,
            &memory::Stage {
                groups: &draft.groups,
                before,
                thawed,
                later: &later,
                goes_on_after_an_evaluation: spec.eval_steps.unwrap_or(steps_per_epoch) < max_steps,
                eval_samples: data.eval_samples,
                restored_later: drafts[index + 1..].iter().any(|later| later.on_enter == OnEnter::RestoreBest),
            },
        ),
        boundary_bytes_per_sample: cost::boundary_bytes_per_sample(graph, &draft.groups),
        cost: cost::of_stage(&sized, graph, &draft.groups, thawed, cost::cached_samples(spec, data)),
        thawed_groups,
        until,
        plateau: draft.scheduler.plateau,
    }
}

/// The updates of warmup that the spec gives, as a number or as a share.
fn given_warmup(scheduler: &LrScheduler, max_steps: u32) -> Option<u32> {
    // At most `max_steps`, and not negative.
    let share = scheduler.warmup_ratio.map(|ratio| (f64::from(max_steps) * ratio).round() as u32);
    scheduler.warmup_steps.or(share)
}

/// What each class counts for in the training loss, in label order; `None` where all count the same.
#[must_use]
pub fn class_weights(spec: &RunSpec, plan: &Plan) -> Option<Vec<f64>> {
    match &spec.class_weights {
        ClassWeights::Equal => None,
        ClassWeights::Given(weights) => Some(weights.clone()),
        ClassWeights::Balanced => {
            let counts = &plan.data.class_counts;
            let samples: u64 = counts.iter().sum();
            // Fewer than 2^53 samples, and no class without any (the planner refuses it).
            Some(counts.iter().map(|count| samples as f64 / (counts.len() as f64 * *count as f64)).collect())
        }
    }
}

fn group_index(index: usize) -> GroupIndex {
    GroupIndex(u32::try_from(index).expect("a graph has fewer than 2^32 groups"))
}

fn data_notes(spec: &RunSpec, data: &DataFacts, notes: &mut Vec<String>) {
    if u64::from(spec.global_batch_size) > data.summary.train_samples {
        notes.push(format!(
            "The global batch of {} holds every one of the {} training samples: one update per epoch.",
            spec.global_batch_size, data.summary.train_samples
        ));
    }
    if let (Some(fewest), Some(most)) = (data.summary.class_counts.iter().min(), data.summary.class_counts.iter().max())
        && fewest.saturating_mul(10) < *most
    {
        notes.push(format!(
            "Classes are uneven: the largest has {most} samples, the smallest {fewest}; watch macro F1."
        ));
    }
    match spec.strategy {
        Strategy::FromScratch => notes.push("All weights are drawn anew; the exported ones are not used.".to_owned()),
        Strategy::FeatureExtraction | Strategy::GradualUnfreezing | Strategy::FullFineTuning | Strategy::Custom => {}
    }
}
