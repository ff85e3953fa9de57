//! What training holds in memory besides weights: estimates from what operators keep for their backward pass.
//!
//! MEM-1: every value is counted once, in the group that makes it, whoever keeps it; values that share memory are one value.
//! MEM-2: sizes are those of one sample, texts at the length given: the estimate is for the longest batch.

use std::collections::{BTreeMap, BTreeSet};

use crate::flow::{Memory, first_tensor};
use crate::ir::{Graph, Node, ValueId};
use crate::operators;
use crate::segment::{Segment, SegmentedGraph};
use crate::sizes::Sizes;

/// Bytes of one sample's activations in one layer group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Activations {
    /// Kept from forward to backward, where the group or one below it is trained.
    pub saved: u64,
    /// The most that is alive at one time while the group only computes its outputs.
    pub alive: u64,
    /// The largest single value.
    pub largest: u64,
}

/// Of each layer group, for samples of `tokens` tokens where the graph's inputs are texts of any length.
#[must_use]
pub fn activations(segmented: &SegmentedGraph, tokens: Option<u64>) -> Vec<Activations> {
    let graph = &segmented.graph;
    let sizes = Sizes::of(graph, tokens);
    let memory = Memory::of(graph);
    let kept = kept(graph, segmented, &memory);
    segmented.segments.iter().map(|segment| of_segment(graph, segment, &sizes, &memory, &kept)).collect()
}

/// The classes of memory that some operator's backward reads, or that cross a cut.
fn kept(graph: &Graph, segmented: &SegmentedGraph, memory: &Memory) -> BTreeSet<usize> {
    let cuts = segmented.segments.iter().flat_map(|segment| segment.outputs.iter().copied());
    graph.nodes.iter().flat_map(keeps).chain(cuts).map(|value| memory.class(value)).collect()
}

/// The values of a node that its backward reads, as libtorch's derivative formulas have it.
pub(crate) fn keeps(node: &Node) -> Vec<ValueId> {
    let name = node.operator.strip_prefix("aten::").unwrap_or(&node.operator).trim_end_matches('_');
    let made = node.makes();
    let read = |names: &[&str]| names.iter().filter_map(|name| node.tensor(name)).collect::<Vec<_>>();
    match name {
        "linear" => read(&["input"]),
        "addmm" => read(&["mat1", "mat2"]),
        "mm" | "bmm" | "matmul" => read(&["self", "mat2", "other"]),
        "baddbmm" => read(&["batch1", "batch2"]),
        "mul" | "div" => read(&["self", "other"]),
        "scaled_dot_product_attention" => [read(&["query", "key", "value"]), made].concat(),
        // Their derivative is told by the result.
        "relu" | "sigmoid" | "tanh" | "softmax" | "_softmax" | "log_softmax" | "exp" | "sqrt" | "rsqrt"
        | "hardtanh" => made,
        "gelu" | "silu" | "hardswish" | "leaky_relu" | "pow" | "elu" | "mish" | "relu6" => read(&["self"]),
        "max_pool2d" | "adaptive_avg_pool2d" | "avg_pool2d" | "max_pool1d" => read(&["self"]),
        _ if operators::is_convolution(&node.operator) || operators::is_norm(&node.operator) => {
            read(&["input", "self"])
        }
        _ => Vec::new(),
    }
}

/// What a node keeps that is no value of the graph.
fn hidden(node: &Node, sizes: &Sizes<'_>) -> u64 {
    let made = node.makes().first().map_or(0, |value| sizes.elements(*value));
    match node.operator.strip_prefix("aten::").unwrap_or(&node.operator) {
        // The positions of the largest elements, eight bytes each.
        "max_pool2d" | "max_pool1d" => 8 * made,
        // What each element is multiplied by.
        "dropout" => 4 * made,
        _ => 0,
    }
}

fn of_segment(
    graph: &Graph,
    segment: &Segment,
    sizes: &Sizes<'_>,
    memory: &Memory,
    kept: &BTreeSet<usize>,
) -> Activations {
    let weights: BTreeSet<usize> = [&graph.parameters, &graph.buffers, &graph.constants]
        .into_iter()
        .flatten()
        .map(|weight| memory.class(weight.value))
        .collect();
    let outside: BTreeSet<usize> = segment.inputs.iter().map(|value| memory.class(*value)).chain(weights).collect();
    let nodes: Vec<&Node> = segment.nodes.iter().map(|id| graph.node(*id)).collect();
    let mut last_use: BTreeMap<usize, usize> = BTreeMap::new();
    for (place, node) in nodes.iter().enumerate() {
        for value in node.reads().into_iter().chain(node.makes()) {
            last_use.insert(memory.class(value), place);
        }
    }
    for value in &segment.outputs {
        last_use.insert(memory.class(*value), nodes.len());
    }
    let (mut found, mut now, mut held) = (Activations::default(), 0_u64, BTreeMap::new());
    for (place, node) in nodes.iter().enumerate() {
        found.saved += hidden(node, sizes);
        for value in node.makes() {
            let class = memory.class(value);
            if outside.contains(&class)
                || held.contains_key(&class)
                || first_tensor(node).is_some_and(|base| memory.class(base) == class)
            {
                continue;
            }
            let bytes = sizes.bytes(value);
            held.insert(class, bytes);
            now += bytes;
            found.largest = found.largest.max(bytes);
            if kept.contains(&class) {
                found.saved += bytes;
            }
        }
        found.alive = found.alive.max(now);
        let ended: Vec<usize> = held.keys().copied().filter(|class| last_use.get(class) == Some(&place)).collect();
        for class in ended {
            now -= held.remove(&class).unwrap_or(0);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{Arg, Argument};

    #[test]
    fn what_a_backward_reads_is_kept() {
        let node = |operator: &str, arguments: &[(&str, u32)], output: u32| Node {
            operator: operator.to_owned(),
            overload: String::new(),
            arguments: arguments
                .iter()
                .map(|&(name, value)| Argument { name: name.to_owned(), value: Arg::Tensor(ValueId(value)) })
                .collect(),
            outputs: vec![Some(ValueId(output))],
            module: String::new(),
            name: String::new(),
        };
        assert_eq!(keeps(&node("aten::linear", &[("input", 1), ("weight", 2)], 3)), [ValueId(1)]);
        assert_eq!(keeps(&node("aten::relu_", &[("self", 1)], 3)), [ValueId(3)]);
        assert_eq!(keeps(&node("aten::add", &[("self", 1), ("other", 2)], 3)), []);
        assert_eq!(keeps(&node("aten::batch_norm", &[("input", 1), ("weight", 2)], 3)), [ValueId(1)]);
    }
}
