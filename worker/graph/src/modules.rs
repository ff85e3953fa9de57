//! The module tree behind a graph, and where its blocks are.
//!
//! A block is a module that repeats: a transformer layer, a residual block. No list of model families: what counts is the tree, the classes
//! in it and where the matrices are.
//!
//! MOD-1: a plain container (`Sequential`, `ModuleList`) is looked into; so is a module that holds at least two modules of one class with at
//!        least two matrices each (an encoder, a stage). Everything else is one unit.
//! MOD-2: units are blocks when they are numbered or hold two matrices, and are no embedding; other units join the block before them, or the
//!        stem.

use std::collections::{BTreeMap, BTreeSet};

use crate::ir::Graph;
use crate::operators;

/// A module that is not divided further.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unit {
    pub path: String,
    is_leaf: bool,
    matrices: usize,
    is_block: bool,
}

pub(crate) struct Tree<'a> {
    graph: &'a Graph,
    /// Direct children by path, in order of execution.
    children: BTreeMap<String, Vec<String>>,
    /// Modules that look up embeddings.
    embeddings: BTreeSet<String>,
    /// Number of weights with two or more dimensions at or below each path.
    matrices: BTreeMap<String, usize>,
}

impl<'a> Tree<'a> {
    /// `counts` tells which nodes matter (the trained ones outside the head); `skip` is the head's path, whose weights do not count.
    pub(crate) fn new(graph: &'a Graph, counts: &[bool], skip: Option<&str>) -> Self {
        let mut tree =
            Self { graph, children: BTreeMap::new(), embeddings: BTreeSet::new(), matrices: BTreeMap::new() };
        for (node, _) in graph.nodes.iter().zip(counts).filter(|(_, counts)| **counts) {
            for path in ancestors(&node.module) {
                let siblings = tree.children.entry(parent(path).to_owned()).or_default();
                if !siblings.iter().any(|sibling| sibling == path) {
                    siblings.push(path.to_owned());
                }
                if node.operator.starts_with("aten::embedding") {
                    tree.embeddings.insert(path.to_owned());
                }
            }
        }
        for weight in graph.parameters.iter().filter(|weight| weight.shape.len() >= 2) {
            if skip.is_some_and(|head| is_within(&weight.name, head)) {
                continue;
            }
            for path in ancestors(&weight.name) {
                *tree.matrices.entry(path.to_owned()).or_default() += 1;
            }
        }
        tree
    }

    /// Units in order of execution, blocks marked.
    pub(crate) fn units(&self) -> Vec<Unit> {
        let mut units = Vec::new();
        for child in self.children("") {
            self.visit(child, &mut units);
        }
        // What stands in front of the real blocks is their stem: a single convolution, or an embedding module with a few tables in front of
        // numbered layers.
        let is_real = |unit: &Unit| unit.is_block && unit.matrices >= 2;
        let has_numbered = units.iter().any(|unit| is_real(unit) && is_numbered(&unit.path));
        if units.iter().any(is_real) {
            for unit in units.iter_mut().take_while(|unit| !is_real(unit) || (has_numbered && !is_numbered(&unit.path)))
            {
                unit.is_block = false;
            }
        }
        units
    }

    fn visit(&self, path: &str, units: &mut Vec<Unit>) {
        let children = self.children(path);
        let is_leaf = children.is_empty();
        let has_only_leaves = children.iter().all(|child| self.children(child).is_empty());
        // A numbered module that calls repeated children itself (a dense block) mixes their results, so cuts inside it would carry many tensors;
        // a stage keeps its blocks in a container and runs them one after another.
        let mixes = is_numbered(path) && self.has_repeated_children(path);
        let is_divided = if self.is_container(path) {
            !(is_numbered(path) && has_only_leaves)
        } else {
            self.holds_repeated(path) && !mixes
        };
        if !is_leaf && (is_divided || self.is_only_child(path)) {
            for child in children {
                self.visit(child, units);
            }
            return;
        }
        let matrices = self.matrices(path);
        let is_block = if is_leaf {
            matrices > 0 && is_number(path) && self.is_container(parent(path))
        } else {
            matrices >= 2 || (matrices == 1 && is_numbered(path))
        };
        let is_block = is_block && !self.embeddings.contains(path);
        units.push(Unit { path: path.to_owned(), is_leaf, matrices, is_block });
    }

    fn children(&self, path: &str) -> &[String] {
        self.children.get(path).map_or(&[], Vec::as_slice)
    }

    fn matrices(&self, path: &str) -> usize {
        self.matrices.get(path).copied().unwrap_or(0)
    }

    /// Modules without a forward of their own never show on a stack, so an unknown class is a container too.
    fn is_container(&self, path: &str) -> bool {
        self.graph.modules.get(path).is_none_or(|class| {
            [
                "torch.nn.modules.container.Sequential",
                "torch.nn.modules.container.ModuleList",
                "torch.nn.modules.container.ModuleDict",
            ]
            .contains(&class.as_str())
        })
    }

    /// A wrapper around everything.
    fn is_only_child(&self, path: &str) -> bool {
        let total: usize = self.children("").iter().map(|child| self.matrices(child)).sum();
        parent(path).is_empty() && !is_numbered(path) && self.matrices(path) == total
    }

    fn holds_repeated(&self, path: &str) -> bool {
        self.has_repeated_children(path) || self.children(path).iter().any(|child| self.holds_repeated(child))
    }

    fn has_repeated_children(&self, path: &str) -> bool {
        let mut classes: BTreeMap<&str, usize> = BTreeMap::new();
        for child in self.children(path) {
            let Some(class) = self.graph.modules.get(child) else { continue };
            if self.matrices(child) >= 2 && !self.children(child).is_empty() && !self.is_container(child) {
                *classes.entry(class).or_default() += 1;
            }
        }
        classes.values().any(|&count| count >= 2)
    }
}

impl Unit {
    pub(crate) fn is_block(&self) -> bool {
        self.is_block
    }

    /// Whether a node of this module belongs to the unit.
    pub(crate) fn holds(&self, module: &str) -> bool {
        is_within(module, &self.path)
    }
}

/// The head's class on the module stack, as head surgery writes it.
pub(crate) const HEAD_CLASS: &str = "thaw.Head";

/// Last components of module paths that name a classifier.
const CLASSIFIERS: [&str; 12] = [
    "fc",
    "classifier",
    "head",
    "heads",
    "score",
    "out_proj",
    "logits",
    "last_linear",
    "cls",
    "predictions",
    "output",
    "lm_head",
];

/// Operators that pick or reshape logits after the classifier.
const SELECTIONS: [&str; 9] = [
    "aten::index",
    "aten::select",
    "aten::squeeze",
    "aten::slice",
    "aten::to",
    "aten::contiguous",
    "aten::clone",
    "aten::view",
    "aten::reshape",
];

/// The node that computes the logits: the linear layer from which the output is at most selected or reshaped.
pub(crate) fn last_linear(graph: &Graph) -> Option<usize> {
    let mut wanted = graph.output;
    loop {
        let index = graph.nodes.iter().rposition(|node| node.makes().contains(&wanted))?;
        let node = &graph.nodes[index];
        if node.operator == "aten::linear" {
            return Some(index);
        }
        if !SELECTIONS.contains(&node.operator.as_str()) {
            return None;
        }
        wanted = node.tensor("self")?;
    }
}

/// The path of the head: where surgery put it, else the exported classifier's. `None`: the graph ends in features.
pub(crate) fn head_path(graph: &Graph) -> Option<String> {
    let module = &graph.nodes[last_linear(graph)?].module;
    for path in [parent(module), module] {
        if graph.modules.get(path).is_some_and(|class| class == HEAD_CLASS) {
            return Some(path.to_owned());
        }
    }
    is_classifier(module).then(|| module.clone())
}

/// Whether a module of that path is a classifier by name: `fc`, `classifier.6`, `classifier.out_proj`, ...
pub(crate) fn is_classifier(module: &str) -> bool {
    let mut parts = module.rsplit('.').skip_while(|part| part.bytes().all(|byte| byte.is_ascii_digit()));
    parts.next().is_some_and(|part| CLASSIFIERS.contains(&part))
}

/// Whether the group looks tokens up in an embedding table.
pub(crate) fn reads_embedding(graph: &Graph, nodes: impl IntoIterator<Item = usize>) -> bool {
    nodes.into_iter().any(|index| {
        let node = &graph.nodes[index];
        node.operator.starts_with("aten::embedding")
            && node.tensor("weight").is_some_and(|value| graph.parameters.iter().any(|weight| weight.value == value))
    })
}

/// Whether the weight is a layer's matrix rather than a norm's or a table's: used by linear, convolution and the like.
pub(crate) fn is_layer_weight(operator: &str, argument: &str) -> bool {
    operators::is_layer(operator) && matches!(argument, "weight" | "mat2")
}

pub(crate) fn is_within(path: &str, module: &str) -> bool {
    path.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

pub(crate) fn parent(path: &str) -> &str {
    path.rsplit_once('.').map_or("", |(parent, _)| parent)
}

/// `a`, `a.b`, `a.b.c` for `a.b.c`; nothing for the root.
fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    let ends = path.match_indices('.').map(|(index, _)| index).chain((!path.is_empty()).then_some(path.len()));
    ends.map(|end| &path[..end])
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// `0`, `12`.
fn is_number(path: &str) -> bool {
    last(path).bytes().all(|byte| byte.is_ascii_digit())
}

/// `0`, `encoder_layer_3`, `denseblock1`.
fn is_numbered(path: &str) -> bool {
    last(path).bytes().last().is_some_and(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_apart() {
        assert_eq!(ancestors("a.b.c").collect::<Vec<_>>(), ["a", "a.b", "a.b.c"]);
        assert_eq!(ancestors("").count(), 0);
        assert!(is_within("a.b", "a") && is_within("a", "a") && !is_within("ab", "a"));
        assert!(is_classifier("fc") && is_classifier("model.classifier.6") && is_classifier("classifier.out_proj"));
        assert!(!is_classifier("encoder.layer.3.mlp") && !is_classifier("pooler.dense") && !is_classifier(""));
    }
}
