//! What a training step does, layer group by layer group: operations, bytes through memory, operator calls.
//!
//! WORK-1: matrix products and convolutions have operations, and every operator has the bytes of the tensors that it reads and writes, once for
//!         each pass over them; an operator that only looks at memory has neither.
//! WORK-2: a backward computes a gradient for each weight, and for each value that depends on one; so the lowest trainable group computes none
//!         for what comes from below.
//! WORK-3: sizes are those of one sample, texts at the length given; what does not depend on the batch, the weights' own traffic, is apart.

use std::collections::{BTreeMap, BTreeSet};

use crate::cost;
use crate::ir::{Node, ValueId};
use crate::memory::keeps;
use crate::operators;
use crate::segment::{Segment, SegmentedGraph};
use crate::sizes::Sizes;

/// One direction of one layer group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Floating-point operations of matrix products and convolutions, per sample.
    pub flops: u64,
    /// Through memory, per sample.
    pub bytes: u64,
    /// Through memory, per batch: weights read, their gradients written.
    pub weight_bytes: u64,
    /// Calls of kernels, per batch.
    pub operators: u64,
}

/// One layer group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupWork {
    pub forward: Work,
    /// Where a group below is trained, too.
    pub backward: Work,
    /// Where this is the lowest group that is trained.
    pub lowest_backward: Work,
}

/// Of each layer group, for samples of `tokens` tokens where the graph's inputs are texts of any length.
#[must_use]
pub fn work(segmented: &SegmentedGraph, tokens: Option<u64>) -> Vec<GroupWork> {
    let counter = Counter::of(segmented, tokens);
    segmented.segments.iter().map(|segment| counter.group(segment)).collect()
}

struct Counter<'a> {
    segmented: &'a SegmentedGraph,
    sizes: Sizes<'a>,
    /// Value → bytes of the parameter it holds.
    parameters: BTreeMap<ValueId, u64>,
}

impl<'a> Counter<'a> {
    fn of(segmented: &'a SegmentedGraph, tokens: Option<u64>) -> Self {
        let parameters = segmented.graph.parameters.iter();
        let bytes = |weight: &crate::ir::Weight| cost::elements(&weight.shape) * weight.dtype.size() as u64;
        Self {
            segmented,
            sizes: Sizes::of(&segmented.graph, tokens),
            parameters: parameters.map(|weight| (weight.value, bytes(weight))).collect(),
        }
    }

    fn group(&self, segment: &Segment) -> GroupWork {
        let mut found = GroupWork::default();
        for node in self.nodes(segment) {
            found.forward.add(self.forward(node));
        }
        found.backward = self.backward(segment, &segment.inputs);
        found.lowest_backward = self.backward(segment, &[]);
        found
    }

    fn nodes(&self, segment: &Segment) -> impl Iterator<Item = &'a Node> {
        let graph = &self.segmented.graph;
        segment.nodes.iter().map(|id| graph.node(*id)).filter(|node| computes(node)).collect::<Vec<_>>().into_iter()
    }

    fn forward(&self, node: &Node) -> Work {
        let looked_up = node.operator == "aten::embedding";
        let (weights, values): (Vec<ValueId>, Vec<ValueId>) =
            node.reads().into_iter().partition(|value| self.parameters.contains_key(value));
        let made = self.bytes(&node.makes());
        Work {
            flops: self.flops(node),
            // Of a table only the rows looked up are read.
            bytes: passes(node) * (self.bytes(&values) + made) + if looked_up { made } else { 0 },
            weight_bytes: if looked_up { 0 } else { self.weight_bytes(&weights) },
            operators: 1,
        }
    }

    /// `tracked`: values from below whose gradients are wanted.
    fn backward(&self, segment: &Segment, tracked: &[ValueId]) -> Work {
        let mut tracked: BTreeSet<ValueId> = tracked.iter().copied().collect();
        let mut readers: BTreeMap<ValueId, u64> = BTreeMap::new();
        let mut found = Work::default();
        let graph = &self.segmented.graph;
        for node in segment.nodes.iter().map(|id| graph.node(*id)) {
            let reads = node.reads();
            let weights: Vec<ValueId> =
                reads.iter().copied().filter(|value| self.parameters.contains_key(value)).collect();
            let wanted: Vec<ValueId> = reads.into_iter().filter(|value| tracked.contains(value)).collect();
            if weights.is_empty() && wanted.is_empty() {
                continue;
            }
            tracked.extend(node.makes());
            if !computes(node) {
                continue;
            }
            wanted.iter().for_each(|value| *readers.entry(*value).or_default() += 1);
            let products = u64::from(!weights.is_empty()) + wanted.len().min(2) as u64;
            let made = self.bytes(&node.makes());
            found.add(Work {
                flops: products * self.flops(node),
                // The result's gradient and what was kept are read, the values' gradients written.
                bytes: passes(node) * (made + self.bytes(&keeps(node)) + self.bytes(&wanted)),
                // A weight is read for the gradient of the values, and its own gradient is written.
                weight_bytes: self.weight_bytes(&weights) * (1 + u64::from(!wanted.is_empty())),
                operators: products.max(1),
            });
        }
        for (value, readers) in readers {
            // A value that several read gets the sum of their gradients.
            let additions = readers - 1;
            found.bytes += 3 * additions * self.bytes(&[value]);
            found.operators += additions;
        }
        found
    }

    /// Of one sample.
    fn flops(&self, node: &Node) -> u64 {
        if is_product(node) { cost::flops(node, |value| self.sizes.shape(value)) / self.sizes.batch } else { 0 }
    }

    fn bytes(&self, values: &[ValueId]) -> u64 {
        values.iter().filter(|value| !self.parameters.contains_key(value)).map(|value| self.sizes.bytes(*value)).sum()
    }

    fn weight_bytes(&self, weights: &[ValueId]) -> u64 {
        weights.iter().filter_map(|value| self.parameters.get(value)).sum()
    }
}

impl Work {
    fn add(&mut self, other: Self) {
        self.flops = self.flops.saturating_add(other.flops);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.weight_bytes = self.weight_bytes.saturating_add(other.weight_bytes);
        self.operators += other.operators;
    }
}

/// Whether a kernel runs for the node.
fn computes(node: &Node) -> bool {
    let is_noise = operators::is_dropout(node);
    (is_noise || !operators::is_view(&node.operator))
        && !node.operator.starts_with("python::")
        && !operators::is_assertion(&node.operator)
        && !node.makes().is_empty()
}

/// Matrix products and convolutions: bound by operations, not by memory.
fn is_product(node: &Node) -> bool {
    let name = node.operator.strip_prefix("aten::").unwrap_or(&node.operator);
    let products = ["linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "scaled_dot_product_attention"];
    products.contains(&name) || operators::is_convolution(&node.operator)
}

/// How many times a kernel's bytes count: what evaluates functions or draws numbers for each element takes longer than memory does.
fn passes(node: &Node) -> u64 {
    match node.operator.strip_prefix("aten::").unwrap_or(&node.operator).trim_end_matches('_') {
        "gelu" | "silu" | "mish" | "elu" | "exp" | "log" | "tanh" | "sigmoid" | "pow" => 3,
        "softmax" | "_softmax" | "log_softmax" => 2,
        "dropout" => 3,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::Arg;
    use crate::test_support::Builder;

    /// Two samples: four features, a layer of eight, gelu; then a layer of three.
    #[test]
    fn work_1_and_2_count_a_layer_by_hand() {
        let mut builder = Builder::new();
        builder.segment("a", &[]);
        let x = builder.input(&[2, 4]);
        let h = builder.linear(x, 2, 4, 8);
        let g = builder.node("gelu", &[("self", Arg::Tensor(h))], &[2, 8]);
        builder.segment("b", &[g]);
        let y = builder.linear(g, 2, 8, 3);
        let seen = builder.node("view", &[("self", Arg::Tensor(y))], &[2, 3]);
        let found = work(&builder.finish(seen), None);
        let of = |flops, bytes, weight_bytes, operators| Work { flops, bytes, weight_bytes, operators };
        // 16 bytes in, 32 out; gelu counts three times; 40 weights.
        assert_eq!(found[0].forward, of(2 * 8 * 4, 48 + 3 * 64, 160, 2));
        // By its weights only; gelu reads the gradient and its input, and writes a gradient.
        assert_eq!(found[0].lowest_backward, of(2 * 8 * 4, (32 + 16) + 3 * 96, 160, 2));
        assert_eq!(found[0].backward, found[0].lowest_backward, "nothing comes from below the first group");
        assert_eq!(found[1].forward, of(2 * 3 * 8, 32 + 12, 108, 1));
        assert_eq!(found[1].lowest_backward, of(2 * 3 * 8, 12 + 32, 108, 1));
        assert_eq!(found[1].backward, of(2 * 2 * 3 * 8, 12 + 32 + 32, 2 * 108, 2));
    }

    #[test]
    fn a_value_that_two_read_gets_a_sum_and_noise_without_a_share_is_none() {
        let mut builder = Builder::new();
        builder.segment("a", &[]);
        let x = builder.input(&[1, 4]);
        let h = builder.linear(x, 1, 4, 4);
        let dropout = |p: f64| [("input", Arg::Tensor(h)), ("p", Arg::Float(p)), ("train", Arg::Bool(true))];
        let kept = builder.node("dropout", &dropout(0.0), &[1, 4]);
        let dropped = builder.node("dropout", &dropout(0.1), &[1, 4]);
        let sum = builder.node("add", &[("self", Arg::Tensor(kept)), ("other", Arg::Tensor(dropped))], &[1, 4]);
        let found = work(&builder.finish(sum), None)[0];
        // The layer, one dropout, the addition.
        assert_eq!(found.forward.operators, 3);
        assert_eq!(found.forward.bytes, 32 + 3 * 32 + 48);
        // The layer; the dropout's gradient; the addition's two.
        assert_eq!(found.backward.bytes, (16 + 16) + 3 * (16 + 16) + (16 + 32));
    }
}
