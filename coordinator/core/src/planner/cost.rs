//! What a stage costs: estimates for people and for the scheduler, never read by training.

use super::GraphFacts;
use thaw_proto::spec::{Optimizer, Precision, RunSpec};

/// Elements.
pub(super) fn trainable_parameters(graph: &GraphFacts, groups: &[usize]) -> u64 {
    groups.iter().map(|&group| graph.groups[group].parameters).sum()
}

/// Bytes of gradient per optimizer update. Gradients are kept in the master weights' format.
pub(super) fn all_reduce_bytes(spec: &RunSpec, graph: &GraphFacts, groups: &[usize]) -> u64 {
    trainable_parameters(graph, groups).saturating_mul(element_bytes(spec.precision))
}

/// Peak bytes of weights, gradients, optimizer state and low-precision copies; activations are not in it.
pub(super) fn memory_bytes(spec: &RunSpec, graph: &GraphFacts, groups: &[usize]) -> u64 {
    let element = element_bytes(spec.precision);
    let stored: u64 = graph.groups.iter().map(|group| group.parameters + group.buffers).sum();
    let parameters: u64 = graph.groups.iter().map(|group| group.parameters).sum();
    let states_per_parameter = match spec.optimizer {
        Optimizer::AdamW { .. } => 2,
        Optimizer::Sgd { momentum, .. } => u64::from(momentum > 0.0),
    };
    let copies = match spec.precision {
        Precision::Bf16 => 2 * parameters,
        Precision::Fp32 | Precision::Fp64 => 0,
    };
    element * stored + element * (1 + states_per_parameter) * trainable_parameters(graph, groups) + copies
}

/// Bytes of one sample at the cut below the lowest trainable group; 0 where nothing is frozen below it.
pub(super) fn boundary_bytes_per_sample(graph: &GraphFacts, groups: &[usize]) -> u64 {
    match groups.first() {
        None | Some(0) => 0,
        Some(&lowest) => graph.groups[lowest].boundary_bytes_per_sample,
    }
}

fn element_bytes(precision: Precision) -> u64 {
    match precision {
        Precision::Fp32 | Precision::Bf16 => 4,
        Precision::Fp64 => 8,
    }
}
