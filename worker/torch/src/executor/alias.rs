//! Which values share memory within a block, followed through schemas; says what an in-place operator really writes to.
//!
//! Two cut values that share memory in the segment below are taken as separate above it.

use std::collections::BTreeMap;

use thaw_graph::ir::{Arg, Node};

use super::rules;
use crate::op::Operator;

/// Value → the value whose memory it may share.
#[derive(Debug, Default)]
pub(super) struct Aliases {
    roots: BTreeMap<usize, usize>,
}

impl Aliases {
    /// The value that owns the memory, as far as this block knows.
    pub(super) fn root(&self, value: usize) -> usize {
        self.roots.get(&value).copied().unwrap_or(value)
    }

    /// Takes note of a node's results.
    pub(super) fn add(&mut self, node: &Node, operator: &Operator) {
        for (index, output) in node.outputs.iter().enumerate() {
            let Some(output) = output else { continue };
            let position =
                if operator.returns_list() { operator.returns().first() } else { operator.returns().get(index) };
            let source = match position {
                Some(Some(argument)) => argument_value(node, operator, *argument),
                _ if rules::may_return_argument(&node.operator) => argument_value(node, operator, 0),
                _ => None,
            };
            if let Some(source) = source {
                let root = self.root(source);
                self.roots.insert(output.0 as usize, root);
            }
        }
    }

    /// The roots of what a node writes to.
    pub(super) fn written(&self, node: &Node, operator: &Operator) -> Vec<usize> {
        let written = operator.arguments().iter().enumerate().filter(|(_, argument)| argument.written);
        written.filter_map(|(index, _)| argument_value(node, operator, index)).map(|value| self.root(value)).collect()
    }
}

/// The tensor given for the schema's argument at `index`.
fn argument_value(node: &Node, operator: &Operator, index: usize) -> Option<usize> {
    let name = &operator.arguments().get(index)?.name;
    match node.arguments.iter().find(|argument| argument.name == *name)?.value {
        Arg::Tensor(value) => Some(value.0 as usize),
        _ => None,
    }
}
