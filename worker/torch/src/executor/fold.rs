//! Which nodes depend on nothing: they run once, when the model is loaded.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use thaw_graph::ir::{Node, NodeId};
use thaw_graph::segment::SegmentedGraph;

use super::alias::Aliases;
use super::numbers::Function;
use super::rules;
use crate::op::Operator;

/// Nodes that read neither the batch nor a weight, draw nothing, and whose results nobody writes to; in execution order.
///
/// The graph's constants, and buffers of no layer group, never change, so reading them does not count.
pub(super) fn foldable<'a>(
    segmented: &'a SegmentedGraph,
    operators: &BTreeMap<(&'a str, &'a str), Arc<Operator>>,
) -> Vec<NodeId> {
    let graph = &segmented.graph;
    let operator = |node: &'a Node| operators.get(&(node.operator.as_str(), node.overload.as_str()));
    let mut aliases = Aliases::default();
    let mut written = BTreeSet::new();
    let order = segmented.prologue.iter().chain(segmented.segments.iter().flat_map(|segment| &segment.nodes));
    let nodes: Vec<NodeId> = order.copied().collect();
    for node in nodes.iter().map(|node| &graph.nodes[node.0 as usize]) {
        if let Some(operator) = operator(node) {
            written.extend(aliases.written(node, operator));
            aliases.add(node, operator);
        }
    }
    let owned: BTreeSet<usize> =
        segmented.segments.iter().flat_map(|segment| segment.buffers.iter().copied()).collect();
    let shared = graph.buffers.iter().enumerate().filter(|(index, _)| !owned.contains(index));
    let weights = shared.map(|(_, buffer)| buffer).chain(&graph.constants);
    let mut constant: BTreeSet<usize> = weights.map(|weight| weight.value.0 as usize).collect();
    let mut folded = Vec::new();
    for id in nodes {
        let node = &graph.nodes[id.0 as usize];
        let Some(operator) = operator(node) else { continue };
        let outputs = || node.outputs.iter().flatten().map(|output| output.0 as usize);
        let independent = node.reads().iter().all(|value| constant.contains(&(value.0 as usize)));
        let untouched = outputs().all(|output| !written.contains(&aliases.root(output)));
        let writes = operator.arguments().iter().any(|argument| argument.written);
        if independent && untouched && !writes && !operator.is_random() && Function::named(&node.operator).is_none() {
            constant.extend(outputs());
            folded.push(id);
        }
    }
    folded.retain(|node| !rules::is_assertion(&graph.nodes[node.0 as usize].operator));
    folded
}
