//! Which groups each stage trains.

use super::GraphFacts;
use regex::Regex;
use std::collections::BTreeMap;
use thaw_proto::spec::{LrScheduler, OnEnter, RunSpec, Stage, Strategy, Until};
use thaw_proto::violation::Violations;

/// Below this likeness (Jaro-Winkler) a name is no suggestion.
const LIKE_ENOUGH: f64 = 0.7;

/// A stage before its rates and costs are known.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) name: String,
    /// Where in the spec it comes from: empty, or `stages[2].`.
    pub(super) path: String,
    /// Indices of groups, ascending.
    pub(super) groups: Vec<usize>,
    pub(super) learning_rate: Option<f64>,
    pub(super) spread: Option<f64>,
    pub(super) until: Until,
    pub(super) on_enter: OnEnter,
    pub(super) recompute_batch_norm: bool,
    /// Most trainers.
    pub(super) workers: Option<u32>,
    pub(super) scheduler: LrScheduler,
    /// The stage's own rates by group.
    pub(super) learning_rates: BTreeMap<String, f64>,
}

pub(super) fn drafts(
    spec: &RunSpec,
    graph: &GraphFacts,
    notes: &mut Vec<String>,
    mistakes: &mut Violations,
) -> Vec<Draft> {
    let head = graph.groups.len() - 1;
    match spec.strategy {
        Strategy::FeatureExtraction => vec![derived(spec, "head", vec![head])],
        Strategy::GradualUnfreezing => gradual(spec, graph, head, notes),
        Strategy::FullFineTuning => vec![derived(spec, "full", whole(spec, graph, head, notes))],
        Strategy::FromScratch => vec![derived(spec, "scratch", whole(spec, graph, head, notes))],
        Strategy::Custom => custom(spec, graph, mistakes),
    }
}

fn derived(spec: &RunSpec, name: &str, groups: Vec<usize>) -> Draft {
    Draft {
        name: name.to_owned(),
        path: String::new(),
        groups,
        learning_rate: None,
        spread: None,
        until: spec.until.clone(),
        on_enter: OnEnter::RestoreBest,
        recompute_batch_norm: false,
        workers: None,
        scheduler: spec.lr_scheduler,
        learning_rates: BTreeMap::new(),
    }
}

fn gradual(spec: &RunSpec, graph: &GraphFacts, head: usize, notes: &mut Vec<String>) -> Vec<Draft> {
    let units = units(spec, graph);
    if units.len() < spec.thaw_units as usize {
        notes.push(format!(
            "The backbone has {} group(s) to thaw, so there are {} thaw units, not {}.",
            units.len(),
            units.len(),
            spec.thaw_units
        ));
    }
    note_embeddings(spec, graph, notes);
    let mut groups = vec![head];
    let mut drafts = vec![derived(spec, "head", groups.clone())];
    for (index, unit) in units.into_iter().enumerate() {
        groups.extend(unit);
        groups.sort_unstable();
        drafts.push(derived(spec, &format!("thaw-{}", index + 1), groups.clone()));
    }
    drafts
}

fn whole(spec: &RunSpec, graph: &GraphFacts, head: usize, notes: &mut Vec<String>) -> Vec<usize> {
    note_embeddings(spec, graph, notes);
    let mut groups = thawable(spec, graph);
    groups.reverse();
    groups.push(head);
    groups
}

fn note_embeddings(spec: &RunSpec, graph: &GraphFacts, notes: &mut Vec<String>) {
    for group in graph.groups.iter().filter(|group| group.embedding && !spec.thaw_embeddings) {
        notes.push(format!(
            "Group {} holds embeddings ({} parameters) and stays frozen; thaw_embeddings: true thaws it.",
            group.name, group.parameters
        ));
    }
}

/// Backbone groups that derived stages may train, from the top down.
fn thawable(spec: &RunSpec, graph: &GraphFacts) -> Vec<usize> {
    let head = graph.groups.len() - 1;
    (0..head)
        .rev()
        .filter(|&index| graph.groups[index].parameters > 0)
        .filter(|&index| spec.thaw_embeddings || !graph.groups[index].embedding)
        .collect()
}

/// Thaw units below the head, from the top down: contiguous in [`thawable`], of about equal forward cost.
pub(super) fn units(spec: &RunSpec, graph: &GraphFacts) -> Vec<Vec<usize>> {
    let groups = thawable(spec, graph);
    let costs: Vec<u64> = groups.iter().map(|&group| graph.groups[group].forward_flops).collect();
    let mut rest = groups.as_slice();
    partition(&costs, spec.thaw_units as usize)
        .into_iter()
        .map(|size| {
            let (unit, below) = rest.split_at(size);
            rest = below;
            unit.to_vec()
        })
        .collect()
}

/// Sizes of `parts` contiguous, non-empty parts (fewer where there are fewer costs) with the least sum of squared costs.
/// Among equals the upper parts are the smaller ones: early stages are the cheap ones.
fn partition(costs: &[u64], parts: usize) -> Vec<usize> {
    let count = costs.len();
    let parts = parts.min(count);
    let mut sums = vec![0.0_f64; count + 1];
    for (index, cost) in costs.iter().enumerate() {
        // Groups without a cost still take a share, so that they do not all fall into one unit.
        sums[index + 1] = sums[index] + (*cost).max(1) as f64;
    }
    // best[k][i]: least sum of squares of the costs from i on in k parts; size[k][i]: size of the first of these parts.
    let mut best = vec![vec![f64::INFINITY; count + 1]; parts + 1];
    let mut size = vec![vec![0_usize; count + 1]; parts + 1];
    best[0][count] = 0.0;
    for k in 1..=parts {
        for start in 0..count {
            for end in start + 1..=count {
                let total = (sums[end] - sums[start]).powi(2) + best[k - 1][end];
                // Relative, so that rounding does not break ties.
                if total < best[k][start] * (1.0 - 1e-12) || (best[k][start].is_infinite() && total.is_finite()) {
                    best[k][start] = total;
                    size[k][start] = end - start;
                }
            }
        }
    }
    let mut start = 0;
    (1..=parts)
        .rev()
        .map(|k| {
            let taken = size[k][start];
            start += taken;
            taken
        })
        .collect()
}

fn custom(spec: &RunSpec, graph: &GraphFacts, mistakes: &mut Violations) -> Vec<Draft> {
    if spec.stages.is_empty() {
        mistakes.push("stages", "is empty; strategy custom needs at least one stage");
    }
    let mut drafts: Vec<Draft> = Vec::with_capacity(spec.stages.len());
    for (index, stage) in spec.stages.iter().enumerate() {
        if drafts.iter().any(|draft| draft.name == stage.name) {
            mistakes.push(format!("stages[{index}].name"), format!("`{}` is the name of an earlier stage", stage.name));
        }
        drafts.push(Draft {
            name: stage.name.clone(),
            path: format!("stages[{index}]."),
            groups: named_groups(index, stage, graph, mistakes),
            learning_rate: stage.learning_rate,
            spread: stage.learning_rate_spread,
            until: stage.until.clone().unwrap_or_else(|| spec.until.clone()),
            on_enter: stage.on_enter,
            recompute_batch_norm: stage.recompute_batch_norm,
            workers: stage.workers,
            scheduler: stage.lr_scheduler.unwrap_or(spec.lr_scheduler),
            learning_rates: stage.learning_rates.clone(),
        });
    }
    drafts
}

fn named_groups(index: usize, stage: &Stage, graph: &GraphFacts, mistakes: &mut Violations) -> Vec<usize> {
    let mut groups = Vec::new();
    for (position, name) in stage.thaw.iter().enumerate() {
        let path = format!("stages[{index}].thaw[{position}]");
        let found = match matching(name, graph) {
            Ok(found) => found,
            Err(error) => {
                mistakes.push(path, format!("`{name}` is no regular expression: {error}"));
                continue;
            }
        };
        if found.is_empty() {
            mistakes.push(path, format!("`{name}` names no layer group{}", suggestion(name, graph)));
            continue;
        }
        let trainable: Vec<usize> = found.into_iter().filter(|&group| graph.groups[group].parameters > 0).collect();
        if trainable.is_empty() {
            mistakes.push(path, format!("`{name}` names only layer groups without parameters"));
        }
        groups.extend(trainable);
    }
    groups.sort_unstable();
    groups.dedup();
    groups
}

/// Groups with that name, or whose name the expression between slashes matches somewhere. `head` is always the last group.
pub(super) fn matching(name: &str, graph: &GraphFacts) -> Result<Vec<usize>, regex::Error> {
    let last = graph.groups.len() - 1;
    let between_slashes = name.strip_prefix('/').and_then(|rest| rest.strip_suffix('/'));
    let expression = between_slashes.map(Regex::new).transpose()?;
    let matches = |index: usize| {
        let group = graph.groups[index].name.as_str();
        match &expression {
            Some(expression) => expression.is_match(group),
            None => group == name || (name == "head" && index == last),
        }
    };
    Ok((0..graph.groups.len()).filter(|&index| matches(index)).collect())
}

pub(super) fn suggestion(name: &str, graph: &GraphFacts) -> String {
    let bare = name.trim_matches('/');
    let nearest = graph
        .groups
        .iter()
        .map(|group| (strsim::jaro_winkler(bare, &group.name), group.name.as_str()))
        .filter(|(likeness, _)| *likeness >= LIKE_ENOUGH)
        .max_by(|left, right| left.0.total_cmp(&right.0));
    match nearest {
        Some((_, group)) => format!("; did you mean `{group}`?"),
        None => {
            let names: Vec<&str> = graph.groups.iter().map(|group| group.name.as_str()).collect();
            format!("; the groups are {}", names.join(", "))
        }
    }
}
