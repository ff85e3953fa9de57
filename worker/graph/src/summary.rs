//! What a planner needs to know about a graph, without the graph.

use std::collections::BTreeSet;

use crate::cost;
use crate::ir::{DType, Dim, Graph, ValueId};
use crate::modules;
use crate::operators;
use crate::segment::{Segment, SegmentedGraph};
use crate::symbols::Expr;

/// A segmented graph in numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Group 0 nearest the input, the head last.
    pub groups: Vec<GroupSummary>,
    /// Size of the vector that enters the head; of the output where there is no head.
    pub feature_size: u64,
    /// Convolutions and neither attention nor embeddings.
    pub convolutional: bool,
    pub inputs: Vec<InputSummary>,
    /// Longest sequence in tokens, for graphs whose inputs are tokens; `None`: no limit or no tokens.
    pub max_length: Option<i64>,
    /// For the user, one sentence each.
    pub notes: Vec<String>,
    /// blake3 in hex over the graph and its weights: [`crate::Archive::fingerprint`].
    pub fingerprint: String,
}

/// One layer group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupSummary {
    pub name: String,
    /// Elements.
    pub parameters: u64,
    /// Elements to which weight decay applies; see [`parameter_decays`].
    pub decay_parameters: u64,
    /// Elements.
    pub buffers: u64,
    /// Floating-point operations per sample.
    pub forward_flops: u64,
    /// Whether it looks tokens up in a table.
    pub embedding: bool,
    /// What leaves it upwards, at the exported sizes (sequence length of the example).
    pub boundary_bytes_per_sample: u64,
}

/// One input of the graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputSummary {
    pub name: String,
    pub dtype: DType,
    /// `None` for sizes that may differ from batch to batch; the first dimension is the batch.
    pub shape: Vec<Option<i64>>,
}

/// The graph in numbers; `fingerprint` is the archive's.
#[must_use]
pub fn summary(segmented: &SegmentedGraph, fingerprint: String) -> Summary {
    let graph = &segmented.graph;
    let batch = batch_hint(graph);
    let inputs: Vec<InputSummary> =
        graph.inputs.iter().map(|input| input_summary(graph, input.value, &input.name)).collect();
    Summary {
        groups: segmented.segments.iter().map(|segment| group_summary(graph, segment, batch)).collect(),
        feature_size: feature_size(segmented),
        convolutional: is_convolutional(graph),
        max_length: max_length(graph),
        inputs,
        notes: graph.notes.clone(),
        fingerprint,
    }
}

/// Whether weight decay applies to a parameter: matrices and kernels, not biases, norms or scales.
#[must_use]
pub fn parameter_decays(name: &str, shape: &[i64]) -> bool {
    let module = modules::parent(name).rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    let is_norm = module.contains("norm") || module.starts_with("bn") || module.starts_with("ln");
    shape.len() >= 2 && !is_norm
}

fn group_summary(graph: &Graph, segment: &Segment, batch: u64) -> GroupSummary {
    let parameters = || segment.parameters.iter().map(|&index| &graph.parameters[index]);
    let flops =
        segment.nodes.iter().fold(0_u64, |sum, id| sum.saturating_add(cost::forward_flops(graph, graph.node(*id))));
    let boundary = segment.outputs.iter().fold(0_u64, |sum, value| sum.saturating_add(bytes(graph, *value)));
    GroupSummary {
        name: segment.name.clone(),
        parameters: parameters().map(|weight| cost::elements(&weight.shape)).sum(),
        decay_parameters: parameters()
            .filter(|weight| parameter_decays(&weight.name, &weight.shape))
            .map(|weight| cost::elements(&weight.shape))
            .sum(),
        buffers: segment.buffers.iter().map(|&index| cost::elements(&graph.buffers[index].shape)).sum(),
        forward_flops: flops / batch,
        embedding: modules::reads_embedding(graph, segment.nodes.iter().map(|id| id.0 as usize)),
        boundary_bytes_per_sample: boundary.div_ceil(batch),
    }
}

fn bytes(graph: &Graph, value: ValueId) -> u64 {
    let size = graph.value(value).tensor.as_ref().map_or(0, |tensor| tensor.dtype.size() as u64);
    graph.hinted_shape(value).map_or(0, |shape| cost::elements(&shape)).saturating_mul(size)
}

/// Samples in the exported example.
fn batch_hint(graph: &Graph) -> u64 {
    let shape = graph.inputs.first().and_then(|input| graph.hinted_shape(input.value));
    shape.and_then(|shape| shape.first().copied()).map_or(1, |size| size.unsigned_abs().max(1))
}

fn input_summary(graph: &Graph, value: ValueId, name: &str) -> InputSummary {
    let tensor = graph.value(value).tensor.as_ref();
    let known = |dim: &Dim| match dim {
        Dim::Known(size) => Some(*size),
        Dim::Symbolic(_) => None,
    };
    InputSummary {
        name: name.to_owned(),
        dtype: tensor.map_or(DType::Float32, |tensor| tensor.dtype),
        shape: tensor.map_or_else(Vec::new, |tensor| tensor.shape.iter().map(known).collect()),
    }
}

fn feature_size(segmented: &SegmentedGraph) -> u64 {
    let graph = &segmented.graph;
    let first_linear = segmented.segments.last().filter(|_| modules::head_path(graph).is_some()).and_then(|head| {
        let mut nodes = head.nodes.iter().map(|id| graph.node(*id));
        nodes.find(|node| node.operator == "aten::linear")?.tensor("input")
    });
    let shape = graph.hinted_shape(first_linear.unwrap_or(graph.output));
    shape.and_then(|shape| shape.last().copied()).map_or(0, i64::unsigned_abs)
}

fn is_convolutional(graph: &Graph) -> bool {
    let names: BTreeSet<&str> = graph.nodes.iter().map(|node| node.operator.as_str()).collect();
    let attends = ["aten::scaled_dot_product_attention", "aten::softmax", "aten::_softmax", "aten::embedding"];
    names.iter().any(|name| operators::is_convolution(name)) && !attends.iter().any(|name| names.contains(name))
}

/// The limit of the second dimension of an integer input.
fn max_length(graph: &Graph) -> Option<i64> {
    let tokens = graph
        .inputs
        .iter()
        .filter_map(|input| graph.value(input.value).tensor.as_ref())
        .find(|tensor| !tensor.dtype.is_float())?;
    match tokens.shape.get(1)? {
        Dim::Known(size) => Some(*size),
        Dim::Symbolic(Expr::Symbol(name)) => graph.symbols.get(name)?.max,
        Dim::Symbolic(_) => None,
    }
}
