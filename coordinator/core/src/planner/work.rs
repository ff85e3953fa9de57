//! What a trainer does in a step: the terms of its time, which `step_time` weighs.
//!
//! WORK-4: a term is counted for one trainer of the largest gang, once the frozen prefix costs nothing; where it never will (no cache, or a group
//!         below that was trained), its forward pass is part of every step.

use super::{GraphFacts, Work, cost};
use thaw_proto::plan::StepWork;
use thaw_proto::spec::{PrefixCacheMode, RunSpec};

/// Of gradients in a sum over ranks: each trainer reads and writes its share of everybody's, in all as much as its own.
const SUM_PASSES: u64 = 2;
/// Kernels of an update per layer group: two spans, the counter, the norm.
const UPDATE_OPERATORS: u64 = 4;

/// `groups`: the trainable ones, ascending; `thawed`: those trained so far, these included.
pub(super) fn of_stage(spec: &RunSpec, graph: &GraphFacts, groups: &[usize], thawed: &[bool]) -> StepWork {
    let Some(&lowest) = groups.first() else { return StepWork::default() };
    let shards = u64::from(spec.logical_shards.div_ceil(spec.workers.max.max(1)));
    let batches = shards * u64::from(spec.gradient_accumulation_steps.max(1));
    let samples = cost::shard_samples(spec).saturating_mul(shards);
    let mut work = Total { work: StepWork::default(), samples, batches };
    let (below, above) = graph.groups.split_at(lowest);
    let keeps_prefix = spec.prefix_cache.mode != PrefixCacheMode::Off && !thawed[..lowest].contains(&true);
    if keeps_prefix {
        // Read from where it is kept, and written for the step.
        work.work.activation_bytes += 2 * samples * cost::boundary_bytes_per_sample(graph, groups);
    } else {
        below.iter().for_each(|group| work.add(&group.forward));
    }
    for (place, group) in above.iter().enumerate() {
        work.add(&group.forward);
        let is_head = place + 1 == above.len();
        if spec.activation_checkpointing && !is_head {
            work.add(&group.forward);
        }
        work.add(if place == 0 { &group.lowest_backward } else { &group.backward });
    }
    let mut found = work.work;
    found.activation_bytes = scaled(spec, found.activation_bytes);
    found.weight_bytes = scaled(spec, found.weight_bytes);
    let (gradient, trained) = (cost::all_reduce_bytes(spec, graph, groups), groups.len() as u64);
    // A further shard's gradient is copied out of the way and added.
    let passes = if spec.workers.max > 1 { SUM_PASSES } else { 0 } + 5 * (shards - 1);
    found.weight_bytes = found.weight_bytes.saturating_add(passes.saturating_mul(gradient));
    found.operators += if spec.workers.max > 1 { 2 * trained } else { 0 };
    found.update_operators = UPDATE_OPERATORS * trained;
    found.update_bytes = gradient.saturating_mul(update_passes(spec));
    found
}

/// How often the update reads or writes as much as all trainable weights.
fn update_passes(spec: &RunSpec) -> u64 {
    // The norm reads the gradient; the update reads it again, and reads and writes the weights and each part of their state.
    let update = 4 + 2 * cost::states_per_parameter(spec);
    let clipping = if spec.max_grad_norm.is_some() { 2 } else { 0 };
    let mean = if spec.ema.is_some() { 3 } else { 0 };
    let pull = if spec.l2_sp.is_some() { 4 } else { 0 };
    update + clipping + mean + pull
}

/// Bytes at the run's element size; the graph's are those of four bytes an element.
fn scaled(spec: &RunSpec, bytes: u64) -> u64 {
    bytes / 4 * cost::element_bytes(spec.precision)
}

struct Total {
    work: StepWork,
    /// Of one trainer in a step.
    samples: u64,
    /// Micro-batches of one trainer in a step.
    batches: u64,
}

impl Total {
    fn add(&mut self, part: &Work) {
        let total = &mut self.work;
        total.operators = total.operators.saturating_add(part.operators.saturating_mul(self.batches));
        total.flops = total.flops.saturating_add(part.flops.saturating_mul(self.samples));
        total.activation_bytes = total.activation_bytes.saturating_add(part.bytes.saturating_mul(self.samples));
        total.weight_bytes = total.weight_bytes.saturating_add(part.weight_bytes.saturating_mul(self.batches));
    }
}
