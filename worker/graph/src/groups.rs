//! Which layer group each node belongs to.
//!
//! GROUP-1: groups follow node order: a node never lies in a lower group than the node before it (SEG-1). Where modules interleave, the
//!          higher group takes them, with a note.
//! GROUP-2: nodes of no block (poolings, final norms, sums in the root) belong to the block before them, or to the stem.
//! GROUP-3: the head is the classifier alone; rules override everything else.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;

use crate::ir::Graph;
use crate::modules::{self, Tree};

/// The group below the first block.
pub const STEM: &str = "stem";
/// The last group.
pub const HEAD: &str = "head";

/// A layer group given by the user: every node whose module path, or parameter it reads, matches the pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupRule {
    pub name: String,
    /// A regular expression, searched anywhere in the path; anchor it with `^` and `$`.
    pub pattern: String,
}

/// Why layer groups could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the pattern of the layer group `{group}` is not a regular expression: correct it")]
    Pattern { group: String, source: regex::Error },
    #[error(
        "the layer group `{group}` with the pattern `{pattern}` matches no module and no parameter: the nearest name is `{nearest}`"
    )]
    NoMatch { group: String, pattern: String, nearest: String },
    #[error(
        "the layer group `{group}` runs before `{earlier}`, which is listed before it: list groups from the input to the output"
    )]
    Order { group: String, earlier: String },
    #[error("two layer groups are called `{group}`: give each its own name")]
    Repeated { group: String },
}

/// Group names, lowest first, and for each trained node the index of its group; `None` for prologue nodes.
pub(crate) struct Assignment {
    pub names: Vec<String>,
    pub groups: Vec<Option<usize>>,
    pub notes: Vec<String>,
}

pub(crate) fn assign(graph: &Graph, trained: &[bool], rules: &[GroupRule]) -> Result<Assignment, Error> {
    let wanted = if rules.is_empty() { by_modules(graph, trained) } else { by_rules(graph, trained, rules)? };
    Ok(contiguous(graph, trained, wanted))
}

/// For each node the group it asks for, if any.
struct Wanted {
    /// In order.
    names: Vec<String>,
    groups: Vec<Option<usize>>,
}

fn by_modules(graph: &Graph, trained: &[bool]) -> Wanted {
    let head = modules::head_path(graph);
    let is_head = head_nodes(graph, head.as_deref());
    let counts: Vec<bool> = trained.iter().zip(&is_head).map(|(trained, head)| *trained && !head).collect();
    let units = Tree::new(graph, &counts, head.as_deref()).units();
    // Each block starts a group; what follows it and is no block stays in that group.
    let mut names = vec![STEM.to_owned()];
    let mut unit_groups = Vec::new();
    for unit in &units {
        if unit.is_block() {
            names.push(unit.path.clone());
            unit_groups.push(names.len() - 1);
        } else {
            unit_groups.push(names.len() - 1);
        }
    }
    names.push(HEAD.to_owned());
    let group_of = |module: &str| units.iter().position(|unit| unit.holds(module)).map(|unit| unit_groups[unit]);
    let last = names.len() - 1;
    let groups = graph
        .nodes
        .iter()
        .zip(&is_head)
        .map(|(node, &head)| if head { Some(last) } else { group_of(&node.module) })
        .collect();
    Wanted { names, groups }
}

/// The head's nodes: those in its module, and everything after its first.
fn head_nodes(graph: &Graph, head: Option<&str>) -> Vec<bool> {
    let Some(head) = head else { return vec![false; graph.nodes.len()] };
    let start = if head.is_empty() {
        modules::last_linear(graph)
    } else {
        graph.nodes.iter().position(|node| modules::is_within(&node.module, head))
    };
    (0..graph.nodes.len()).map(|index| start.is_some_and(|start| index >= start)).collect()
}

fn by_rules(graph: &Graph, trained: &[bool], rules: &[GroupRule]) -> Result<Wanted, Error> {
    let mut patterns = Vec::new();
    let mut seen = BTreeSet::new();
    for rule in rules {
        if !seen.insert(&rule.name) {
            return Err(Error::Repeated { group: rule.name.clone() });
        }
        patterns.push(Regex::new(&rule.pattern).map_err(|source| Error::Pattern { group: rule.name.clone(), source })?);
    }
    let parameters: BTreeMap<_, _> =
        graph.parameters.iter().map(|weight| (weight.value, weight.name.as_str())).collect();
    let names_head = rules.iter().any(|rule| rule.name == HEAD);
    let is_head = head_nodes(graph, if names_head { None } else { modules::head_path(graph) }.as_deref());
    let mut names: Vec<String> = vec![STEM.to_owned()];
    names.extend(rules.iter().map(|rule| rule.name.clone()));
    names.push(HEAD.to_owned());
    let last = names.len() - 1;
    let mut groups = Vec::new();
    for ((node, &trained), &head) in graph.nodes.iter().zip(trained).zip(&is_head) {
        let reads = node.reads();
        let matches = |pattern: &Regex| {
            pattern.is_match(&node.module)
                || reads.iter().filter_map(|value| parameters.get(value)).any(|name| pattern.is_match(name))
        };
        groups.push(match trained {
            false => None,
            true if head => Some(last),
            true => patterns.iter().position(matches).map(|index| index + 1),
        });
    }
    check_rules(graph, rules, &groups)?;
    Ok(Wanted { names, groups })
}

fn check_rules(graph: &Graph, rules: &[GroupRule], groups: &[Option<usize>]) -> Result<(), Error> {
    let mut first_nodes = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let Some(first) = groups.iter().position(|group| *group == Some(index + 1)) else {
            let nearest = nearest_name(graph, &rule.pattern);
            return Err(Error::NoMatch { group: rule.name.clone(), pattern: rule.pattern.clone(), nearest });
        };
        first_nodes.push(first);
    }
    for (index, pair) in first_nodes.windows(2).enumerate() {
        if pair[1] < pair[0] {
            return Err(Error::Order { group: rules[index + 1].name.clone(), earlier: rules[index].name.clone() });
        }
    }
    Ok(())
}

/// The module or parameter name with the longest stretch in common with the pattern.
fn nearest_name(graph: &Graph, pattern: &str) -> String {
    let plain: String =
        pattern.chars().filter(|letter| letter.is_alphanumeric() || matches!(letter, '.' | '_')).collect();
    let names = graph.modules.keys().chain(graph.parameters.iter().map(|weight| &weight.name));
    let common = |name: &str| {
        let starts = plain.char_indices().map(|(start, _)| &plain[start..]);
        starts
            .map(|rest| {
                rest.chars()
                    .zip(0..)
                    .take_while(|&(_, end)| rest.get(..=end).is_some_and(|piece| name.contains(piece)))
                    .count()
            })
            .max()
    };
    let best = names.max_by_key(|name| (common(name), std::cmp::Reverse(name.len())));
    best.cloned().unwrap_or_default()
}

/// Makes groups follow node order (GROUP-1), and drops those without a node.
fn contiguous(graph: &Graph, trained: &[bool], wanted: Wanted) -> Assignment {
    let mut current = 0;
    let mut moved: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    let mut groups = Vec::new();
    for (index, &trained) in trained.iter().enumerate() {
        if !trained {
            groups.push(None);
            continue;
        }
        let asked = wanted.groups.get(index).copied().flatten().unwrap_or(current);
        // Nodes without parameters move silently: a mask or a size that is worked out late.
        let reads_parameter =
            graph.nodes[index].reads().iter().any(|value| graph.parameters.iter().any(|weight| weight.value == *value));
        if asked < current && reads_parameter {
            *moved.entry((asked, current)).or_default() += 1;
        }
        current = current.max(asked);
        groups.push(Some(current));
    }
    let notes = moved
        .into_iter()
        .map(|((from, to), count)| {
            format!(
                "{count} operators of {} run after {} has begun and are trained with it",
                wanted.names[from], wanted.names[to]
            )
        })
        .collect();
    let used: BTreeSet<usize> = groups.iter().copied().flatten().collect();
    let renumbered: BTreeMap<usize, usize> = used.iter().enumerate().map(|(new, &old)| (old, new)).collect();
    Assignment {
        names: used.iter().map(|&group| wanted.names[group].clone()).collect(),
        groups: groups.into_iter().map(|group| group.and_then(|group| renumbered.get(&group).copied())).collect(),
        notes,
    }
}
