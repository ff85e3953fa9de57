//! The cut below the lowest trainable layer group: what crosses it, and whether that is a function of each sample alone.
//!
//! BOUND-1: what crosses a usable boundary has the batch as its first dimension, then known sizes, the first of which may be the token
//!          dimension instead; so it can be kept sample by sample, real tokens only, and put together again in other batches.
//! BOUND-2: no parameter of a group at or above the boundary is read below it, so as long as the groups below are untouched, so is the prefix.
//! BOUND-3: the identity of a prefix names its operators and values, not their numbers: what is built above it does not change it.

use std::collections::BTreeSet;

use crate::ir::{Arg, DType, Dim, Graph, IntArg, NodeId, ValueId};
use crate::operators;
use crate::segment::SegmentedGraph;
use crate::symbols::Expr;

/// Why the outputs of a prefix cannot be kept sample by sample.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("nothing lies below the layer group {group}")]
    NothingBelow { group: String },
    #[error("`{value}`, which crosses into the layer group {group}, has no batch dimension of its own")]
    NotBySample { value: String, group: String },
    #[error("the parameter {parameter} of a layer group above is read below the layer group {group}")]
    Tied { parameter: String, group: String },
    #[error("the node `{node}` below the layer group {group} draws random numbers")]
    Random { node: String, group: String },
}

/// What a prefix's outputs need to be used in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boundary {
    /// The lowest segment above it.
    pub segment: usize,
    /// In the order of the segment's inputs.
    pub values: Vec<CutValue>,
    /// What the segments above need of the batch itself.
    pub inputs: InputNeed,
    /// Whether they read anything that the prologue works out.
    pub prologue: bool,
}

/// A tensor that crosses a boundary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutValue {
    pub value: ValueId,
    /// As exported; mixed precision may make it another.
    pub dtype: DType,
    /// The dimensions after the first, which is the batch.
    pub dims: Vec<CutDim>,
}

/// A dimension of one sample's part of a [`CutValue`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CutDim {
    Known(i64),
    /// As long as the batch's texts.
    Tokens,
}

/// What masks, positions and sizes above a boundary are worked out from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum InputNeed {
    Nothing,
    /// The sizes of the graph's inputs, not what is in them.
    Sizes,
    Contents,
}

impl Boundary {
    /// Bytes of one sample with so many tokens.
    #[must_use]
    pub fn bytes_per_sample(&self, tokens: u64) -> u64 {
        let size = |dim: &CutDim| match dim {
            CutDim::Known(size) => size.unsigned_abs(),
            CutDim::Tokens => tokens,
        };
        let bytes = |value: &CutValue| value.dims.iter().map(size).product::<u64>() * value.dtype.size() as u64;
        self.values.iter().map(bytes).sum()
    }
}

/// The boundary below a segment (BOUND-1, BOUND-2).
///
/// # Errors
/// Where outputs of the segments below cannot be kept by sample.
pub fn boundary(segmented: &SegmentedGraph, segment: usize) -> Result<Boundary, Error> {
    let graph = &segmented.graph;
    let group = || segmented.segments[segment].name.clone();
    if segment == 0 {
        return Err(Error::NothingBelow { group: group() });
    }
    let above: BTreeSet<ValueId> = segmented.segments[segment..]
        .iter()
        .flat_map(|segment| &segment.parameters)
        .map(|index| graph.parameters[*index].value)
        .collect();
    for node in below(segmented, segment).map(|id| graph.node(id)) {
        if let Some(tied) = node.reads().into_iter().find(|value| above.contains(value)) {
            return Err(Error::Tied { parameter: graph.value(tied).name.clone(), group: group() });
        }
        // Dropout is off below a boundary, and stochastic depth's noise is one.
        let switched = node.operator.contains("dropout") || node.operator.contains("attention");
        if operators::is_random(node) && !switched && node.operator != "aten::bernoulli_" {
            return Err(Error::Random { node: node.name.clone(), group: group() });
        }
    }
    let shape = |input: usize, dim: usize| {
        let value = graph.inputs.get(input)?.value;
        graph.value(value).tensor.as_ref()?.shape.get(dim).cloned()
    };
    let batch = shape(0, 0);
    let is_text = graph
        .inputs
        .first()
        .is_some_and(|input| graph.value(input.value).tensor.as_ref().is_some_and(|tensor| !tensor.dtype.is_float()));
    let tokens = if is_text { shape(0, 1) } else { None };
    let mut values = Vec::new();
    for value in &segmented.segments[segment].inputs {
        let refuse = || Error::NotBySample { value: graph.value(*value).name.clone(), group: group() };
        let tensor = graph.value(*value).tensor.as_ref().ok_or_else(refuse)?;
        let (first, rest) = tensor.shape.split_first().ok_or_else(refuse)?;
        if Some(first) != batch.as_ref() {
            return Err(refuse());
        }
        let dims = rest.iter().enumerate().map(|(position, dim)| match dim {
            Dim::Known(size) | Dim::Symbolic(Expr::Known(size)) => Some(CutDim::Known(*size)),
            symbolic if position == 0 && Some(symbolic) == tokens.as_ref() => Some(CutDim::Tokens),
            Dim::Symbolic(_) => None,
        });
        let dims = dims.collect::<Option<Vec<_>>>().ok_or_else(refuse)?;
        values.push(CutValue { value: *value, dtype: tensor.dtype, dims });
    }
    let (inputs, prologue) = needs(segmented, segment);
    Ok(Boundary { segment, values, inputs, prologue })
}

/// Everything that decides what crosses a boundary but the weights' values, as text (BOUND-3).
#[must_use]
pub fn prefix_identity(segmented: &SegmentedGraph, segment: usize) -> String {
    let graph = &segmented.graph;
    let name = |value: ValueId| graph.value(value).name.as_str();
    let mut text = String::new();
    for input in &graph.inputs {
        text.push_str(&format!("input {} {:?}\n", input.name, graph.value(input.value).tensor));
    }
    for node in below(segmented, segment).map(|id| graph.node(id)) {
        text.push_str(&format!("{}.{}(", node.operator, node.overload));
        for argument in &node.arguments {
            text.push_str(&format!("{}={},", argument.name, argument_text(graph, &argument.value)));
        }
        let made = node.outputs.iter().map(|output| output.map_or("_", name));
        text.push_str(&format!(") -> {}\n", made.collect::<Vec<_>>().join(",")));
    }
    let crossing = segmented.segments[segment].inputs.iter().map(|value| name(*value));
    text.push_str(&format!("cut {}\n", crossing.collect::<Vec<_>>().join(",")));
    text
}

fn argument_text(graph: &Graph, argument: &Arg) -> String {
    let name = |value: &ValueId| graph.value(*value).name.clone();
    match argument {
        Arg::Tensor(value) | Arg::SymInt(value) | Arg::SymFloat(value) | Arg::SymBool(value) => name(value),
        Arg::Tensors(values) => format!("{:?}", values.iter().map(name).collect::<Vec<_>>()),
        Arg::OptionalTensors(values) => {
            format!("{:?}", values.iter().map(|value| value.as_ref().map(name)).collect::<Vec<_>>())
        }
        Arg::Ints(items) => {
            let item = |item: &IntArg| match item {
                IntArg::Known(size) => size.to_string(),
                IntArg::Value(value) => name(value),
            };
            format!("{:?}", items.iter().map(item).collect::<Vec<_>>())
        }
        Arg::None
        | Arg::Int(_)
        | Arg::Float(_)
        | Arg::Floats(_)
        | Arg::Bool(_)
        | Arg::Bools(_)
        | Arg::String(_)
        | Arg::DType(_)
        | Arg::Layout(_)
        | Arg::MemoryFormat(_)
        | Arg::Device(_) => format!("{argument:?}"),
    }
}

/// The prologue's nodes, then those of the segments below.
fn below(segmented: &SegmentedGraph, segment: usize) -> impl Iterator<Item = NodeId> + '_ {
    let lower = segmented.segments[..segment].iter().flat_map(|lower| &lower.nodes);
    segmented.prologue.iter().chain(lower).copied()
}

/// Follows what the upper segments read back through the prologue to the graph's inputs. Also, whether they read the prologue at all.
fn needs(segmented: &SegmentedGraph, segment: usize) -> (InputNeed, bool) {
    let graph = &segmented.graph;
    let inputs: BTreeSet<ValueId> = graph.inputs.iter().map(|input| input.value).collect();
    let mut wanted: BTreeSet<ValueId> = segmented.segments[segment..]
        .iter()
        .flat_map(|upper| &upper.nodes)
        .flat_map(|id| graph.node(*id).reads())
        .collect();
    let mut need = if wanted.is_disjoint(&inputs) { InputNeed::Nothing } else { InputNeed::Contents };
    let mut prologue = false;
    for node in segmented.prologue.iter().rev().map(|id| graph.node(*id)) {
        if !node.makes().iter().any(|value| wanted.contains(value)) {
            continue;
        }
        prologue = true;
        for value in node.reads() {
            if !inputs.contains(&value) {
                wanted.insert(value);
            } else if node.operator == "aten::sym_size" {
                need = need.max(InputNeed::Sizes);
            } else {
                need = need.max(InputNeed::Contents);
            }
        }
    }
    (need, prologue)
}
