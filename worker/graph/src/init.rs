//! How tensors without stored values begin.
//!
//! INIT-1: a rule says what distribution, never a value: the trainer draws it from the run's seed, so that all ranks draw the same.

use std::collections::BTreeMap;

use crate::ir::{Graph, ValueId};
use crate::modules;
use crate::operators;

/// Standard deviation for embeddings and free tensors (class tokens, position tables), as BERT and ViT use it.
const TABLE_STD: f64 = 0.02;

/// How a tensor begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Uniform in ±1/√`fan_in`: PyTorch's default for linear and convolution weights (Kaiming uniform with a = √5).
    LinearWeight {
        fan_in: u64,
    },
    /// Uniform in ±1/√`fan_in`: PyTorch's default for their biases.
    LinearBias {
        fan_in: u64,
    },
    /// Normal with mean 0.
    Normal {
        std: f64,
    },
    Ones,
    Zeros,
}

/// A rule for every parameter of the graph, as (index into [`Graph::parameters`], rule), by the operator that uses it: linear and convolution as
/// PyTorch's modules, norms at 1 and 0, everything else normal with 0.02. Batch-norm statistics are not parameters: see [`buffer_init`].
#[must_use]
pub fn scratch_init(graph: &Graph) -> Vec<(usize, Init)> {
    let rules = rules_by_value(graph);
    let rule = |value: ValueId| rules.get(&value).copied().unwrap_or(Init::Normal { std: TABLE_STD });
    graph.parameters.iter().enumerate().map(|(index, parameter)| (index, rule(parameter.value))).collect()
}

/// A rule for each batch-norm statistic, as (index into [`Graph::buffers`], rule): mean 0, variance 1, count 0. Other buffers keep their values.
#[must_use]
pub fn buffer_init(graph: &Graph) -> Vec<(usize, Init)> {
    let mut rules = Vec::new();
    for (index, buffer) in graph.buffers.iter().enumerate() {
        let read_as = |argument: &str| {
            graph
                .nodes
                .iter()
                .any(|node| operators::is_norm(&node.operator) && node.tensor(argument) == Some(buffer.value))
        };
        if read_as("running_var") {
            rules.push((index, Init::Ones));
        } else if read_as("running_mean") || buffer.name.ends_with("num_batches_tracked") {
            rules.push((index, Init::Zeros));
        }
    }
    rules
}

fn rules_by_value(graph: &Graph) -> BTreeMap<ValueId, Init> {
    let shapes: BTreeMap<ValueId, &[i64]> =
        graph.parameters.iter().map(|weight| (weight.value, weight.shape.as_slice())).collect();
    let mut rules = BTreeMap::new();
    for node in &graph.nodes {
        let is_layer = operators::is_layer(&node.operator);
        let is_norm = operators::is_norm(&node.operator);
        if !is_layer && !is_norm {
            continue;
        }
        // `addmm` (GPT-2's Conv1D) keeps its weight as (in, out).
        let is_transposed = node.operator == "aten::addmm";
        let weight = node.arguments.iter().find(|argument| {
            modules::is_layer_weight(&node.operator, &argument.name) || (is_norm && argument.name == "weight")
        });
        let weight = weight.and_then(|argument| argument.value.values().first().copied());
        let bias = node.tensor("bias").or_else(|| is_transposed.then(|| node.tensor("self")).flatten());
        let fan_in = weight.and_then(|weight| shapes.get(&weight)).map_or(1, |shape| fan_in(shape, is_transposed));
        let (weight_rule, bias_rule) = if is_norm {
            (Init::Ones, Init::Zeros)
        } else {
            (Init::LinearWeight { fan_in }, Init::LinearBias { fan_in })
        };
        for (value, rule) in [(weight, weight_rule), (bias, bias_rule)] {
            if let Some(value) = value.filter(|value| shapes.contains_key(value)) {
                rules.entry(value).or_insert(rule);
            }
        }
    }
    rules
}

/// Inputs that one output element sums over.
fn fan_in(shape: &[i64], is_transposed: bool) -> u64 {
    let sizes = if is_transposed { shape.get(..1) } else { shape.get(1..) };
    sizes.unwrap_or(&[]).iter().map(|&size| size.unsigned_abs()).product::<u64>().max(1)
}
