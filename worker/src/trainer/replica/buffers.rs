//! The buffers that batch norms write in a training step: running statistics, and counters of their updates.

use std::collections::BTreeSet;
use thaw_graph::ir::{Arg, Graph, ValueId};
use thaw_torch::SegmentedModel;
use thaw_torch::tch::Tensor;

/// Their names, in a graph.
pub(super) struct NormBuffers {
    statistics: BTreeSet<String>,
    counters: BTreeSet<String>,
}

impl NormBuffers {
    pub(super) fn of(graph: &Graph) -> Self {
        let norms = graph.nodes.iter().filter(|node| node.operator.contains("batch_norm"));
        let arguments = norms.flat_map(|node| &node.arguments).filter(|argument| argument.name.starts_with("running_"));
        let moved = arguments
            .filter_map(|argument| if let Arg::Tensor(value) = argument.value { Some(value) } else { None })
            .collect();
        // What the graph itself counts up.
        let counts = graph.nodes.iter().filter(|node| node.operator == "aten::add_");
        let counted = counts.filter_map(|node| node.tensor("self")).collect();
        Self { statistics: names(graph, &moved), counters: names(graph, &counted) }
    }

    /// Those of `groups` that count updates, in order.
    pub(super) fn counters<'a>(&self, model: &'a SegmentedModel, groups: &[usize]) -> Vec<&'a Tensor> {
        handles(model, groups, &self.counters)
    }

    /// The running statistics of `groups` as one vector; `None` where there are none.
    pub(super) fn statistics(&self, model: &SegmentedModel, groups: &[usize]) -> Option<Tensor> {
        let parts = handles(model, groups, &self.statistics).into_iter();
        let parts: Vec<Tensor> = parts.map(|buffer| buffer.flatten(0, -1)).collect();
        if parts.is_empty() { None } else { Some(Tensor::cat(&parts, 0)) }
    }

    /// Puts back what [`NormBuffers::statistics`] gave.
    pub(super) fn put_statistics(&self, model: &SegmentedModel, groups: &[usize], flat: &Tensor) {
        let mut offset = 0;
        for buffer in handles(model, groups, &self.statistics) {
            let length = i64::try_from(buffer.numel()).expect("sizes of real tensors fit");
            buffer.shallow_clone().copy_(&flat.narrow(0, offset, length).view_as(buffer));
            offset += length;
        }
    }
}

fn names(graph: &Graph, values: &BTreeSet<ValueId>) -> BTreeSet<String> {
    let named = graph.buffers.iter().filter(|buffer| values.contains(&buffer.value));
    named.map(|buffer| buffer.name.clone()).collect()
}

fn handles<'a>(model: &'a SegmentedModel, groups: &[usize], names: &BTreeSet<String>) -> Vec<&'a Tensor> {
    let buffers = groups.iter().flat_map(|&group| &model.groups()[group].buffers);
    buffers.filter(|(name, _)| names.contains(name)).map(|(_, buffer)| buffer).collect()
}
