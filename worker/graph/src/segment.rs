//! Layer groups and the cuts between them.
//!
//! SEG-1: segments are contiguous in node order but for the prologue; segment i belongs to layer group i.
//! SEG-2: the prologue holds the nodes that depend on no parameter and no parameter-dependent buffer (masks, position ids, sizes); it runs
//!        once per batch without gradient, and its values are visible to every segment, never carried through a cut.
//! SEG-3: a value that crosses a cut is an output of its segment and an input of the next; one that crosses several passes through.

use crate::ir::{Graph, NodeId, ValueId};

/// A graph divided into layer groups, group 0 nearest the input, the head last.
#[derive(Debug, Clone, PartialEq)]
pub struct SegmentedGraph {
    pub graph: Graph,
    pub prologue: Vec<NodeId>,
    /// One per layer group.
    pub segments: Vec<Segment>,
}

/// The part of a graph that one layer group owns.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// The layer group's name, e.g. `encoder.layer.3` or `head`.
    pub name: String,
    pub nodes: Vec<NodeId>,
    /// Indices into [`Graph::parameters`].
    pub parameters: Vec<usize>,
    /// Indices into [`Graph::buffers`].
    pub buffers: Vec<usize>,
    /// Parameter-dependent tensors from the cut below; empty for the first.
    pub inputs: Vec<ValueId>,
    /// Parameter-dependent tensors for the cut above; for the last segment the graph's output.
    pub outputs: Vec<ValueId>,
}
