//! What training holds in memory besides weights: estimates from what operators keep for their backward pass.
//!
//! MEM-1: every value is counted once, in the group that makes it, whoever keeps it; values that share memory are one value.
//! MEM-2: sizes are those of one sample, texts at the length given: the estimate is for the longest batch.

use std::collections::{BTreeMap, BTreeSet};

use crate::cost::elements;
use crate::flow::Memory;
use crate::ir::{Arg, Graph, Node, ValueId};
use crate::operators;
use crate::segment::{Segment, SegmentedGraph};
use crate::sizes::Sizes;

/// One layer group's values: bytes of one sample, but for the last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Activations {
    /// Kept from forward to backward, where the group or one below it is trained.
    pub saved: u64,
    /// The most that its backward holds more than what was saved: gradients, less what is let go by then.
    pub rise: u64,
    /// The most that is alive at one time while the group only computes its outputs, its inputs included.
    pub alive: u64,
    /// Of all samples: gradients of its weights that wait to be put in their places.
    pub weight_gradients: u64,
}

/// Of each layer group, for samples of `tokens` tokens where the graph's inputs are texts of any length.
#[must_use]
pub fn activations(segmented: &SegmentedGraph, tokens: Option<u64>) -> Vec<Activations> {
    let graph = &segmented.graph;
    let memory = Memory::in_training(graph);
    let training = Training { graph, sizes: Sizes::of(graph, tokens), kept: kept(graph, segmented, &memory), memory };
    let computing = Memory::of(graph);
    let of_segment = |segment: &Segment| Activations {
        saved: training.saved(segment).values().sum::<u64>() + training.hidden(segment),
        rise: training.rise(segment),
        alive: alive(graph, segment, &training.sizes, &computing),
        weight_gradients: weight_gradients(graph, segment),
    };
    segmented.segments.iter().map(of_segment).collect()
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

/// What a node keeps in training that is no value of the graph.
fn hidden(node: &Node, sizes: &Sizes<'_>) -> u64 {
    let made = node.makes().first().map_or(0, |value| sizes.elements(*value));
    match node.operator.strip_prefix("aten::").unwrap_or(&node.operator) {
        // The positions of the largest elements, eight bytes each.
        "max_pool2d" | "max_pool1d" => 8 * made,
        // A byte for each element that tells whether it stays.
        _ if operators::is_dropout(node) && !is_attention(node) => made,
        // Attention with dropout is made of products: queries and keys scaled, the weights before and after dropout, and their bytes.
        _ if is_noisy_attention(node) => 4 * (query(node, sizes) + key(node, sizes)) + 9 * weights(node, sizes),
        _ => 0,
    }
}

/// What a node's backward makes on the way to the gradients of its inputs.
fn on_the_way(node: &Node, sizes: &Sizes<'_>) -> u64 {
    // The gradients of the weights, after and before their softmax.
    if is_noisy_attention(node) { 4 * 2 * weights(node, sizes) } else { 0 }
}

fn is_attention(node: &Node) -> bool {
    node.operator == "aten::scaled_dot_product_attention"
}

fn is_noisy_attention(node: &Node) -> bool {
    let share = node.argument("dropout_p");
    is_attention(node) && share.is_some_and(|share| !matches!(share, Arg::Float(share) if *share <= 0.0))
}

/// Elements.
fn query(node: &Node, sizes: &Sizes<'_>) -> u64 {
    node.tensor("query").map_or(0, |value| sizes.elements(value))
}

/// Elements.
fn key(node: &Node, sizes: &Sizes<'_>) -> u64 {
    node.tensor("key").map_or(0, |value| sizes.elements(value))
}

/// Elements of attention's weights: one for each query and key of a head.
fn weights(node: &Node, sizes: &Sizes<'_>) -> u64 {
    let shape = |name: &str| node.tensor(name).and_then(|value| sizes.shape(value)).unwrap_or_default();
    let (width, keys) = (shape("query").last().copied(), shape("key").iter().rev().nth(1).copied());
    let (width, keys) = (width.unwrap_or(1).unsigned_abs().max(1), keys.unwrap_or(0).unsigned_abs());
    query(node, sizes) / width * keys
}

struct Training<'a> {
    graph: &'a Graph,
    sizes: Sizes<'a>,
    memory: Memory,
    kept: BTreeSet<usize>,
}

impl Training<'_> {
    fn nodes(&self, segment: &Segment) -> Vec<&Node> {
        segment.nodes.iter().map(|id| self.graph.node(*id)).collect()
    }

    /// The classes that a segment makes and that are kept, with their bytes.
    fn saved(&self, segment: &Segment) -> BTreeMap<usize, u64> {
        let outside = outside(self.graph, segment, &self.memory);
        let mut saved = BTreeMap::new();
        for value in self.nodes(segment).into_iter().flat_map(Node::makes) {
            let class = self.memory.class(value);
            if self.kept.contains(&class) && !outside.contains(&class) {
                saved.entry(class).or_insert_with(|| self.sizes.bytes(value));
            }
        }
        saved
    }

    fn hidden(&self, segment: &Segment) -> u64 {
        self.nodes(segment).into_iter().map(|node| hidden(node, &self.sizes)).sum()
    }

    /// See [`Activations::rise`]: the backward pass, node by node.
    fn rise(&self, segment: &Segment) -> u64 {
        let nodes = self.nodes(segment);
        let tracked = self.tracked(segment, &nodes);
        let saved = self.saved(segment);
        // The cuts' own values stay to the end of the step.
        let cuts: BTreeSet<usize> = segment.outputs.iter().map(|value| self.memory.class(*value)).collect();
        let mut readers: BTreeMap<usize, usize> = BTreeMap::new();
        let classes = |values: Vec<ValueId>| values.into_iter().map(|value| self.memory.class(value));
        for class in nodes.iter().flat_map(|node| classes(keeps(node)).collect::<BTreeSet<_>>()) {
            *readers.entry(class).or_default() += 1;
        }
        let mut gradients: BTreeMap<usize, u64> =
            segment.outputs.iter().map(|value| (self.memory.class(*value), self.sizes.bytes(*value))).collect();
        let (mut rise, mut let_go) = (0_u64, 0_u64);
        for node in nodes.iter().rev() {
            let made: BTreeSet<usize> = classes(node.makes()).collect();
            let wanted: Vec<ValueId> = node.reads().into_iter().filter(|value| tracked.contains(value)).collect();
            let held: u64 = gradients.values().sum();
            // Views, and what is written in place, have their gradient in the same class; that of a write is made anew.
            let in_place = operators::is_in_place(&node.operator) && !passes_on(node);
            let anew = in_place.then(|| wanted.first().map_or(0, |value| self.sizes.bytes(*value)));
            let more: u64 = if passes_on(node) {
                0
            } else {
                let new = wanted.iter().filter(|value| !made.contains(&self.memory.class(**value)));
                new.map(|value| self.sizes.bytes(*value)).sum::<u64>() + anew.unwrap_or(0)
            };
            rise = rise.max((held + more + on_the_way(node, &self.sizes)).saturating_sub(let_go));
            for value in &wanted {
                gradients.entry(self.memory.class(*value)).or_insert_with(|| self.sizes.bytes(*value));
            }
            // Two that get the same gradient share it until one of them gets another.
            if passes_on(node) && wanted.len() > 1 {
                let last = wanted.last().map(|value| self.memory.class(*value));
                last.filter(|class| !made.contains(class)).map(|class| gradients.insert(class, 0));
            }
            let read: BTreeSet<usize> = wanted.iter().map(|value| self.memory.class(*value)).collect();
            gradients.retain(|class, _| read.contains(class) || !made.contains(class));
            let_go += hidden(node, &self.sizes);
            for class in classes(keeps(node)).collect::<BTreeSet<_>>() {
                let left = readers.entry(class).or_insert(1);
                *left -= 1;
                if *left == 0 && !cuts.contains(&class) {
                    let_go += saved.get(&class).copied().unwrap_or(0);
                }
            }
        }
        rise
    }

    /// Values whose gradients a backward computes: those that depend on a weight, or come from below.
    fn tracked(&self, segment: &Segment, nodes: &[&Node]) -> BTreeSet<ValueId> {
        let mut tracked: BTreeSet<ValueId> = segment.inputs.iter().copied().collect();
        let weights: BTreeSet<ValueId> = self.graph.parameters.iter().map(|weight| weight.value).collect();
        for node in nodes {
            if node.reads().iter().any(|value| tracked.contains(value) || weights.contains(value)) {
                tracked.extend(node.makes());
            }
        }
        tracked
    }
}

/// Whether a node hands the gradient of its result to its inputs as it is.
fn passes_on(node: &Node) -> bool {
    let name = node.operator.strip_prefix("aten::").unwrap_or(&node.operator);
    matches!(name, "add" | "add_") || (operators::is_view(&node.operator) && !operators::is_dropout(node))
}

/// The classes that a segment does not make: weights, and what comes through the cut.
fn outside(graph: &Graph, segment: &Segment, memory: &Memory) -> BTreeSet<usize> {
    let weights =
        [&graph.parameters, &graph.buffers, &graph.constants].into_iter().flatten().map(|weight| weight.value);
    weights.chain(segment.inputs.iter().copied()).map(|value| memory.class(value)).collect()
}

/// See [`Activations::alive`].
fn alive(graph: &Graph, segment: &Segment, sizes: &Sizes<'_>, memory: &Memory) -> u64 {
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
    let outside = outside(graph, segment, memory);
    let inputs = segment.inputs.iter().map(|value| (memory.class(*value), sizes.bytes(*value)));
    let mut held: BTreeMap<usize, u64> = inputs.collect();
    let mut most = 0;
    for (place, node) in nodes.iter().enumerate() {
        for value in node.makes() {
            let class = memory.class(value);
            if !outside.contains(&class) {
                held.entry(class).or_insert_with(|| sizes.bytes(value));
            }
        }
        most = most.max(held.values().sum());
        held.retain(|class, _| last_use.get(class).is_some_and(|last| *last > place));
    }
    most
}

/// Layers and tables write their gradients where they belong; other operators' wait there for the group's end.
fn weight_gradients(graph: &Graph, segment: &Segment) -> u64 {
    let nodes = || segment.nodes.iter().map(|id| graph.node(*id));
    let at_home: BTreeSet<ValueId> = nodes()
        .filter(|node| matches!(node.operator.as_str(), "aten::linear" | "aten::embedding"))
        .flat_map(Node::reads)
        .collect();
    let parameters = segment.parameters.iter().map(|&index| &graph.parameters[index]);
    let waiting = parameters.filter(|weight| !at_home.contains(&weight.value));
    waiting.map(|weight| elements(&weight.shape) * weight.dtype.size() as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::Argument;
    use crate::test_support::Builder;

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

    fn tensors(arguments: &[(&'static str, ValueId)]) -> Vec<(&'static str, Arg)> {
        arguments.iter().map(|&(name, value)| (name, Arg::Tensor(value))).collect()
    }

    /// Two samples; eight features, 32 bytes a sample, through a layer, dropout and gelu, then a layer beside which they pass, and tanh.
    #[test]
    fn mem_1_a_step_by_hand() {
        let mut builder = Builder::new();
        builder.segment("a", &[]);
        let x = builder.input(&[2, 4]);
        let h = builder.linear(x, 2, 4, 8);
        let dropout = [("input", Arg::Tensor(h)), ("p", Arg::Float(0.1)), ("train", Arg::Bool(true))];
        let d = builder.node("dropout", &dropout, &[2, 8]);
        let g = builder.node("gelu", &tensors(&[("self", d)]), &[2, 8]);
        builder.segment("b", &[g]);
        let z = builder.linear(g, 2, 8, 8);
        let s = builder.node("add", &tensors(&[("self", z), ("other", g)]), &[2, 8]);
        let t = builder.node("tanh", &tensors(&[("self", s)]), &[2, 8]);
        let found = activations(&builder.finish(t), None);
        // What gelu reads, a byte for each of eight elements, and what crosses the cut. Two gradients at gelu. The layer's result and gelu's:
        // without training, dropout makes nothing.
        assert_eq!(found[0], Activations { saved: 32 + 8 + 32, rise: 64, alive: 64, weight_gradients: 0 });
        // Tanh's result; two gradients; at the sum, both of its operands and itself.
        assert_eq!(found[1], Activations { saved: 32, rise: 64, alive: 96, weight_gradients: 0 });
    }

    #[test]
    fn attention_keeps_its_weights_only_with_dropout() {
        let saved = |share: f64| {
            let mut builder = Builder::new();
            builder.segment("a", &[]);
            let x = builder.input(&[2, 3, 5, 4]);
            let weight = builder.parameter(&[4]);
            let q = builder.node("mul", &tensors(&[("self", x), ("other", weight)]), &[2, 3, 5, 4]);
            let mut arguments = tensors(&[("query", q), ("key", q), ("value", q)]);
            arguments.push(("dropout_p", Arg::Float(share)));
            let made = builder.node("scaled_dot_product_attention", &arguments, &[2, 3, 5, 4]);
            activations(&builder.finish(made), None)[0]
        };
        // The result and what it is made of, 240 bytes each; the scale's four gradients wait for their place.
        assert_eq!((saved(0.0).saved, saved(0.0).weight_gradients), (2 * 240, 16));
        // Queries and keys once more, and 3 x 5 x 5 weights: before and after, and a byte each.
        assert_eq!(saved(0.1).saved, 2 * 240 + 2 * 240 + 9 * 75);
    }
}
