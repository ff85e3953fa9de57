//! What a stage costs: estimates for people and for the scheduler, never read by training.

use super::{GraphFacts, work};
use crate::sampler::ranks_shards;
use crate::sampler::tree::maximal_subtrees;
use crate::writers;
use thaw_proto::plan::{DataSummary, PlannedStage, StageCost};
use thaw_proto::spec::{Optimizer, Precision, PrefixCacheMode, RunSpec};

/// Elements.
pub(super) fn trainable_parameters(graph: &GraphFacts, groups: &[usize]) -> u64 {
    groups.iter().map(|&group| graph.groups[group].parameters).sum()
}

/// Bytes of gradient per optimizer update. Gradients are kept in the master weights' format.
pub(super) fn all_reduce_bytes(spec: &RunSpec, graph: &GraphFacts, groups: &[usize]) -> u64 {
    trainable_parameters(graph, groups).saturating_mul(element_bytes(spec.precision))
}

/// Whether some trainer's shards are not one node of the tree over all.
pub(super) fn gives_several_parts(spec: &RunSpec) -> bool {
    let (trainers, shards) = (spec.workers.max.max(1), spec.logical_shards);
    (0..trainers).any(|rank| maximal_subtrees(ranks_shards(rank, trainers, shards), shards).len() > 1)
}

/// Bytes of one sample at the cut below the lowest trainable group; 0 where nothing is frozen below it.
pub(super) fn boundary_bytes_per_sample(graph: &GraphFacts, groups: &[usize]) -> u64 {
    match groups.first() {
        None | Some(0) => 0,
        Some(&lowest) => graph.groups[lowest].boundary_bytes_per_sample,
    }
}

/// Samples and views of them that a stage's cache holds once it is full.
pub(super) fn cached_samples(spec: &RunSpec, data: &DataSummary) -> u64 {
    let views = match spec.augmentation() {
        None => 1,
        Some(_) => spec.prefix_cache.views.unwrap_or(0),
    };
    data.train_samples.saturating_mul(u64::from(views)) + data.eval_samples + data.test_samples
}

/// `thawed`: the groups trained so far, this stage's included; `samples`: that the cache holds.
pub(super) fn of_stage(
    spec: &RunSpec,
    graph: &GraphFacts,
    groups: &[usize],
    thawed: &[bool],
    samples: u64,
) -> StageCost {
    let element = element_bytes(spec.precision);
    let batch = u64::from(spec.global_batch_size);
    let boundary = groups.first().copied().unwrap_or(0);
    let forward = |groups: &[super::GroupFacts]| {
        let multiply_adds = groups.iter().fold(0_u64, |sum, group| sum.saturating_add(group.forward_flops));
        multiply_adds.saturating_mul(2).saturating_mul(batch)
    };
    let (below, above) = graph.groups.split_at(boundary);
    // A backward pass takes a product for the weights and one for the inputs.
    let step_flops = forward(above).saturating_mul(3);
    let gradient_bytes = all_reduce_bytes(spec, graph, groups);
    let optimizer_bytes = gradient_bytes.saturating_mul(states_per_parameter(spec));
    let trained = graph.groups.iter().zip(thawed).filter(|(_, thawed)| **thawed);
    let weights: u64 = trained.map(|(group, _)| group.parameters + group.buffers).sum();
    StageCost {
        step_flops,
        uncached_step_flops: step_flops.saturating_add(forward(below)),
        full_step_flops: forward(&graph.groups).saturating_mul(3),
        gradient_bytes,
        optimizer_bytes,
        checkpoint_bytes: weights.saturating_mul(element).saturating_add(optimizer_bytes),
        cache_bytes: boundary_bytes_per_sample(graph, groups).saturating_mul(samples),
        save_bytes: save_bytes(spec, graph, groups),
        work: work::of_stage(spec, graph, groups, thawed),
    }
}

/// Bytes of the copies from which the trainer with the most to write writes its share of a checkpoint within the stage: all of the state, where
/// one of each host puts it into memory too.
fn save_bytes(spec: &RunSpec, graph: &GraphFacts, groups: &[usize]) -> u64 {
    let states = 1 + states_per_parameter(spec) + u64::from(spec.ema.is_some());
    let whole = |&group: &usize| graph.groups[group].parameters * states + graph.groups[group].buffers;
    let sizes: Vec<u64> = groups.iter().map(whole).collect();
    if spec.checkpoint.host_snapshot_steps != Some(0) {
        return sizes.into_iter().sum::<u64>() * element_bytes(spec.precision);
    }
    let world_size = spec.workers.max.max(1);
    let mut shares = vec![0; world_size as usize];
    writers::assign(&sizes, world_size).into_iter().zip(&sizes).for_each(|(rank, size)| shares[rank as usize] += size);
    shares.into_iter().max().unwrap_or(0) * element_bytes(spec.precision)
}

/// Samples of a step in the largest logical shard.
pub(super) fn shard_samples(spec: &RunSpec) -> u64 {
    u64::from(spec.global_batch_size.div_ceil(spec.logical_shards.max(1)))
}

/// Tensors of optimizer state as large as the weights.
pub(super) fn states_per_parameter(spec: &RunSpec) -> u64 {
    match spec.optimizer {
        Optimizer::AdamW { .. } => 2,
        Optimizer::Sgd { momentum, .. } => u64::from(momentum > 0.0),
    }
}

pub(super) fn element_bytes(precision: Precision) -> u64 {
    match precision {
        Precision::Fp32 | Precision::Bf16 => 4,
        Precision::Fp64 => 8,
    }
}

/// From when on the frozen prefix of augmented samples costs nothing.
pub(super) fn view_note(spec: &RunSpec, stages: &[PlannedStage]) -> Option<String> {
    spec.augmentation()?;
    let is_kept = spec.prefix_cache.mode != PrefixCacheMode::Off;
    if !is_kept || stages.iter().all(|stage| stage.cost.uncached_step_flops == stage.cost.step_flops) {
        return None;
    }
    Some(match spec.prefix_cache.views {
        Some(1) => "Every training sample has one view: frozen groups run on it in a stage's first epoch alone.".to_owned(),
        Some(views) => format!(
            "Every training sample has {views} views, one an epoch in turn: frozen groups run on them in the first {views} epochs and cost nothing from epoch {} on.",
            views + 1
        ),
        None => "Augmentation draws anew in every epoch, so frozen groups run on every training sample each time; prefix_cache.views keeps so many draws of each."
            .to_owned(),
    })
}
