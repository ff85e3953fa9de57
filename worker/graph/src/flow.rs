//! What depends on what: liveness, shared memory, and the nodes that need no parameter.
//!
//! FLOW-1: a node is dead when nothing it makes reaches the output and it changes no buffer; dead nodes are removed.
//! FLOW-2: values that may share memory are one class; a write to one of them is a write to all.
//! FLOW-3: the prologue holds what depends only on inputs, constants and buffers that nothing writes, and draws no random numbers; a value
//!         whose memory a later segment writes is not in it.

use std::collections::BTreeSet;

use crate::ir::{Arg, Graph, Node, ValueId};
use crate::operators;

/// Classes of values that may share memory.
pub(crate) struct Memory {
    parent: Vec<usize>,
}

impl Memory {
    pub(crate) fn of(graph: &Graph) -> Self {
        Self::where_shared(graph, |node| operators::is_in_place(&node.operator) || operators::is_view(&node.operator))
    }

    /// While training, dropout makes values of its own.
    pub(crate) fn in_training(graph: &Graph) -> Self {
        Self::where_shared(graph, |node| {
            let views = operators::is_view(&node.operator) && !operators::is_dropout(node);
            operators::is_in_place(&node.operator) || views
        })
    }

    fn where_shared(graph: &Graph, shares: impl Fn(&Node) -> bool) -> Self {
        let mut memory = Self { parent: (0..graph.values.len()).collect() };
        for node in &graph.nodes {
            let shares = shares(node);
            if let Some(base) = first_tensor(node).filter(|_| shares) {
                for made in node.makes() {
                    memory.join(base, made);
                }
            }
        }
        memory
    }

    pub(crate) fn class(&self, value: ValueId) -> usize {
        let mut index = value.0 as usize;
        while self.parent[index] != index {
            index = self.parent[index];
        }
        index
    }

    fn join(&mut self, one: ValueId, other: ValueId) {
        let (one, other) = (self.class(one), self.class(other));
        // The smaller id leads, so that classes do not depend on the order of joining.
        self.parent[one.max(other)] = one.min(other);
    }
}

/// The tensor that an in-place operator writes or a view looks at.
pub(crate) fn first_tensor(node: &Node) -> Option<ValueId> {
    match node.arguments.first().map(|argument| &argument.value) {
        Some(Arg::Tensor(value)) => Some(*value),
        _ => None,
    }
}

/// The tensors that the node writes: an in-place operator's first argument, a batch norm's running statistics.
pub(crate) fn writes(node: &Node) -> Vec<ValueId> {
    if operators::is_in_place(&node.operator) {
        return first_tensor(node).into_iter().collect();
    }
    if operators::is_norm(&node.operator) {
        return ["running_mean", "running_var"].into_iter().filter_map(|name| node.tensor(name)).collect();
    }
    Vec::new()
}

/// Removes dead nodes (FLOW-1).
pub(crate) fn prune(graph: &mut Graph) {
    let memory = Memory::of(graph);
    let buffers: BTreeSet<usize> = graph.buffers.iter().map(|buffer| memory.class(buffer.value)).collect();
    let mut live_values = BTreeSet::from([graph.output]);
    let mut live_classes = BTreeSet::from([memory.class(graph.output)]);
    let mut live = vec![false; graph.nodes.len()];
    for (index, node) in graph.nodes.iter().enumerate().rev() {
        let changes_live = operators::is_in_place(&node.operator)
            && first_tensor(node).is_some_and(|value| {
                let class = memory.class(value);
                live_classes.contains(&class) || buffers.contains(&class)
            });
        live[index] = changes_live || node.makes().iter().any(|value| live_values.contains(value));
        if live[index] {
            for value in node.reads() {
                live_values.insert(value);
                live_classes.insert(memory.class(value));
            }
        }
    }
    let mut kept = live.into_iter();
    graph.nodes.retain(|_| kept.next().unwrap_or(true));
    for output in graph.nodes.iter_mut().flat_map(|node| &mut node.outputs) {
        if output.is_some_and(|value| !live_values.contains(&value)) {
            *output = None;
        }
    }
}

/// For each node, whether it belongs to a layer group; the others are the prologue (FLOW-3).
pub(crate) fn trained_nodes(graph: &Graph) -> Vec<bool> {
    let memory = Memory::of(graph);
    let mut classes: BTreeSet<usize> = graph.parameters.iter().map(|parameter| memory.class(parameter.value)).collect();
    classes.extend(
        graph.nodes.iter().flat_map(writes).filter(|value| is_buffer(graph, *value)).map(|value| memory.class(value)),
    );
    let mut values: BTreeSet<ValueId> = BTreeSet::new();
    let mut trained = vec![false; graph.nodes.len()];
    loop {
        let mut changed = false;
        let mut read_above: BTreeSet<usize> = BTreeSet::new();
        for (index, node) in graph.nodes.iter().enumerate() {
            let reads: BTreeSet<usize> = node.reads().into_iter().map(|value| memory.class(value)).collect();
            if trained[index] {
                read_above.extend(reads);
                continue;
            }
            let depends = node.reads().iter().any(|value| values.contains(value)) || !reads.is_disjoint(&classes);
            let is_rewritten = node.makes().iter().any(|value| classes.contains(&memory.class(*value)));
            // The prologue runs first, so a write that a group must not see yet cannot be in it.
            let is_early = writes(node).iter().any(|value| read_above.contains(&memory.class(*value)));
            if depends || is_rewritten || is_early || operators::is_random(node) {
                trained[index] = true;
                changed = true;
                values.extend(node.makes());
                classes.extend(writes(node).into_iter().map(|value| memory.class(value)));
                read_above.extend(reads);
            }
        }
        if !changed {
            return trained;
        }
    }
}

fn is_buffer(graph: &Graph, value: ValueId) -> bool {
    graph.buffers.iter().any(|buffer| buffer.value == value)
}
