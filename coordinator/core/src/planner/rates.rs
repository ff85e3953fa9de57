//! Peak learning rates: `learning_rate · spread^(-d/D)` for the group `d` of `D` levels below the head (discriminative
//! fine-tuning, Howard and Ruder 2018, section 3.2), or `learning_rate · layer_decay^d`; or what the spec says of a group by name.

use super::GraphFacts;
use super::strategy::{Draft, matching, suggestion, units};
use std::collections::BTreeMap;
use thaw_proto::spec::{RateDecay, RunSpec, Strategy};
use thaw_proto::violation::Violations;

/// The head's rate over the lowest group's may not exceed this: below it, nothing is learnt.
const LARGEST_SPREAD: f64 = 1e4;
const SPREAD_CONVOLUTIONAL: f64 = 100.0;
const SPREAD_OTHER: f64 = 40.0;

/// Levels below the head of the groups that this run can ever thaw.
#[derive(Debug)]
pub(super) struct Levels {
    /// Per group; 0 for the head and for groups that stay frozen.
    of_group: Vec<u32>,
    deepest: u32,
}

impl Levels {
    /// One level per thaw unit for gradual unfreezing, else one per group.
    pub(super) fn of(spec: &RunSpec, graph: &GraphFacts, drafts: &[Draft]) -> Self {
        let mut of_group = vec![0; graph.groups.len()];
        let mut deepest = 0;
        match spec.strategy {
            Strategy::GradualUnfreezing => {
                for unit in units(spec, graph) {
                    deepest += 1;
                    unit.into_iter().for_each(|group| of_group[group] = deepest);
                }
            }
            Strategy::FeatureExtraction | Strategy::FullFineTuning | Strategy::FromScratch | Strategy::Custom => {
                for group in (0..graph.groups.len().saturating_sub(1)).rev() {
                    if drafts.iter().any(|draft| draft.groups.contains(&group)) {
                        deepest += 1;
                        of_group[group] = deepest;
                    }
                }
            }
        }
        Self { of_group, deepest }
    }
}

pub(super) fn check(spec: &RunSpec, graph: &GraphFacts, levels: &Levels, drafts: &[Draft], mistakes: &mut Violations) {
    match decay(spec, graph, None) {
        RateDecay::Spread(spread) => check_spread("learning_rate_spread", spread, mistakes),
        RateDecay::PerLevel(factor) => {
            let overall = factor.powf(f64::from(levels.deepest)).recip();
            if overall > LARGEST_SPREAD * (1.0 + 1e-9) {
                mistakes.push(
                    "layer_decay",
                    format!(
                        "is {factor}, so over {} levels the lowest group's rate is {overall:.0} times below the head's; at most {LARGEST_SPREAD} is allowed",
                        levels.deepest
                    ),
                );
            }
        }
    }
    check_explicit("", &spec.learning_rates, graph, None, mistakes);
    for draft in drafts {
        check_explicit(&draft.path, &draft.learning_rates, graph, Some(&draft.groups), mistakes);
        if draft.spread.is_some() {
            check_spread(&format!("{}learning_rate_spread", draft.path), draft.spread, mistakes);
        }
    }
}

fn check_spread(path: &str, spread: Option<f64>, mistakes: &mut Violations) {
    if let Some(spread) = spread
        && !(1.0..=LARGEST_SPREAD).contains(&spread)
    {
        mistakes.push(path, format!("is {spread}; it must be between 1 and {LARGEST_SPREAD}"));
    }
}

/// That each key names a group (one of `trained`, where given), and that no group has two rates.
fn check_explicit(
    path: &str,
    rates: &BTreeMap<String, f64>,
    graph: &GraphFacts,
    trained: Option<&[usize]>,
    mistakes: &mut Violations,
) {
    let mut by_expression: BTreeMap<usize, &str> = BTreeMap::new();
    for key in rates.keys() {
        let field = format!("{path}learning_rates[{key:?}]");
        let found = match matching(key, graph) {
            Ok(found) => found,
            Err(error) => {
                mistakes.push(field, format!("is no regular expression: {error}"));
                continue;
            }
        };
        if found.is_empty() {
            mistakes.push(field, format!("names no layer group{}", suggestion(key, graph)));
        } else if trained.is_some_and(|trained| !found.iter().any(|group| trained.contains(group))) {
            mistakes.push(field, "names no layer group that this stage trains; add it to thaw, or remove the rate");
        } else if key.starts_with('/') {
            for group in found {
                if let Some(other) = by_expression.insert(group, key) {
                    let name = &graph.groups[group].name;
                    mistakes
                        .push(field.clone(), format!("and {other:?} both name {name}; give {name} a rate by its name"));
                    break;
                }
            }
        }
    }
}

/// The rate that is given for a group: by its name, else by an expression.
fn explicit(rates: &BTreeMap<String, f64>, graph: &GraphFacts, group: usize) -> Option<f64> {
    let names = |key: &String| matching(key, graph).is_ok_and(|found| found.contains(&group));
    let (expressions, words): (Vec<_>, Vec<_>) =
        rates.iter().filter(|(key, _)| names(key)).partition(|(key, _)| key.starts_with('/'));
    // The group's own name before `head`.
    let own = words.iter().find(|(key, _)| **key == graph.groups[group].name).or(words.first());
    own.or(expressions.first()).map(|(_, rate)| **rate)
}

/// Peak rate per group of the stage. `backbone_thawed`: whether any group but the head trains here or has trained before.
pub(super) fn of_stage(
    spec: &RunSpec,
    graph: &GraphFacts,
    levels: &Levels,
    draft: &Draft,
    backbone_thawed: bool,
) -> Vec<f64> {
    let head = graph.groups.len() - 1;
    let decay = decay(spec, graph, draft.spread);
    // A custom stage's rate is that of its highest group; derived stages always hold the head, at level 0.
    let top = draft.groups.last().map_or(0, |&group| levels.of_group[group]);
    let base = draft.learning_rate.unwrap_or(spec.learning_rate);
    draft
        .groups
        .iter()
        .map(|&group| {
            let given = explicit(&draft.learning_rates, graph, group);
            if let Some(rate) = given.or_else(|| explicit(&spec.learning_rates, graph, group)) {
                return rate;
            }
            let rate = base * factor(decay, levels.of_group[group] - top, levels.deepest);
            if group == head && backbone_thawed && draft.learning_rate.is_none() {
                rate * spec.head_rate_after_thaw
            } else {
                rate
            }
        })
        .collect()
}

fn factor(decay: RateDecay, levels_below: u32, deepest: u32) -> f64 {
    if levels_below == 0 {
        return 1.0;
    }
    match decay {
        RateDecay::Spread(spread) => spread.unwrap_or(1.0).powf(-f64::from(levels_below) / f64::from(deepest)),
        RateDecay::PerLevel(factor) => factor.powf(f64::from(levels_below)),
    }
}

/// The decay in force, its default filled in: a stage's own spread, else the run's.
fn decay(spec: &RunSpec, graph: &GraphFacts, stage_spread: Option<f64>) -> RateDecay {
    if let Some(spread) = stage_spread {
        return RateDecay::Spread(Some(spread));
    }
    match (spec.rate_decay, spec.strategy) {
        (RateDecay::Spread(None), Strategy::FromScratch) => RateDecay::Spread(Some(1.0)),
        (
            RateDecay::Spread(None),
            Strategy::FeatureExtraction | Strategy::GradualUnfreezing | Strategy::FullFineTuning | Strategy::Custom,
        ) => RateDecay::Spread(Some(if graph.convolutional { SPREAD_CONVOLUTIONAL } else { SPREAD_OTHER })),
        (given @ (RateDecay::Spread(Some(_)) | RateDecay::PerLevel(_)), _) => given,
    }
}
