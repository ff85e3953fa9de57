//! Divides a graph into segments; see [`mod@crate::segment`] for the laws.
//!
//! CUT-1: only tensors cross a cut.
//! CUT-2: an in-place operator never writes memory that came through a cut, a graph input, a parameter or a constant: it is replaced by the
//!        out-of-place operator of that name, and later readers read its result.

use std::collections::{BTreeMap, BTreeSet};

use crate::flow::{self, Memory};
use crate::groups::{self, GroupRule};
use crate::ir::{Graph, NodeId, Value, ValueId};
use crate::operators;
use crate::segment::{Segment, SegmentedGraph};

/// Why a graph could not be divided.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot make layer groups")]
    Groups(#[from] groups::Error),
    #[error("the graph has no trainable part: export the model with its parameters")]
    NothingToTrain,
    #[error(
        "the in-place operator `{operator}` at node `{node}` writes memory that other layer groups read and has no out-of-place twin: rewrite it in the model"
    )]
    InPlace { node: String, operator: String },
    #[error(
        "the number `{value}` is worked out in the layer group `{group}` and used above it: make it depend on input sizes only"
    )]
    NumberCrosses { value: String, group: String },
    #[error("the output depends on no parameter: export the model with its parameters")]
    OutputWithoutParameters,
}

/// Divides the graph into layer groups: dead nodes removed, prologue apart, one segment for each group, with the values that cross each cut.
/// Without rules the groups are found from the module tree. What a user should know is added to the graph's notes.
///
/// # Errors
/// A rule that matches nothing or is out of order; in-place operators and numbers that cannot cross a cut.
pub fn segment(graph: &Graph, rules: &[GroupRule]) -> Result<SegmentedGraph, Error> {
    let mut graph = graph.clone();
    flow::prune(&mut graph);
    protect_inputs(&mut graph)?;
    let trained = flow::trained_nodes(&graph);
    if !trained.contains(&true) {
        return Err(Error::NothingToTrain);
    }
    let assignment = groups::assign(&graph, &trained, rules)?;
    protect_cuts(&mut graph, &assignment.groups)?;
    graph.notes.extend(assignment.notes);
    let nodes = |group: Option<usize>| -> Vec<NodeId> {
        (0_u32..)
            .zip(&assignment.groups)
            .filter(|(_, found)| **found == group)
            .map(|(index, _)| NodeId(index))
            .collect()
    };
    let crossing = crossing(&graph, &assignment.groups, &assignment.names)?;
    let mut segments: Vec<Segment> = assignment
        .names
        .iter()
        .enumerate()
        .map(|(group, name)| Segment {
            name: name.clone(),
            nodes: nodes(Some(group)),
            parameters: Vec::new(),
            buffers: Vec::new(),
            inputs: if group == 0 { Vec::new() } else { crossing[group - 1].clone() },
            outputs: crossing[group].clone(),
        })
        .collect();
    let prologue = nodes(None);
    give_weights(&mut graph, &assignment.groups, &mut segments);
    Ok(SegmentedGraph { graph, prologue, segments })
}

/// Out of place wherever a graph input, parameter or constant would be written.
fn protect_inputs(graph: &mut Graph) -> Result<(), Error> {
    let mut index = 0;
    while index < graph.nodes.len() {
        if let Some(written) = in_place_target(graph, index) {
            let memory = Memory::of(graph);
            let class = memory.class(written);
            let fixed = graph.inputs.iter().map(|input| input.value);
            let fixed = fixed.chain(graph.parameters.iter().chain(&graph.constants).map(|weight| weight.value));
            if fixed.into_iter().any(|value| memory.class(value) == class) {
                run_out_of_place(graph, index, written)?;
            }
        }
        index += 1;
    }
    Ok(())
}

/// Out of place wherever memory that came through a cut would be written.
fn protect_cuts(graph: &mut Graph, groups: &[Option<usize>]) -> Result<(), Error> {
    for index in 0..graph.nodes.len() {
        let (Some(written), Some(group)) = (in_place_target(graph, index), groups[index]) else { continue };
        let memory = Memory::of(graph);
        let class = memory.class(written);
        let came_from_below = graph.nodes[..index].iter().zip(groups).any(|(node, made_in)| {
            made_in.is_some_and(|made_in| made_in < group)
                && node.makes().iter().any(|value| memory.class(*value) == class)
        });
        if came_from_below {
            run_out_of_place(graph, index, written)?;
        }
    }
    Ok(())
}

fn in_place_target(graph: &Graph, index: usize) -> Option<ValueId> {
    let node = &graph.nodes[index];
    operators::is_in_place(&node.operator).then(|| flow::first_tensor(node)).flatten()
}

/// Replaces the operator, and lets everything after it that read the written tensor read the result instead.
fn run_out_of_place(graph: &mut Graph, index: usize, written: ValueId) -> Result<(), Error> {
    let node = &graph.nodes[index];
    let refuse = || Error::InPlace { node: node.name.clone(), operator: node.operator.clone() };
    let operator = operators::out_of_place(&node.operator).ok_or_else(refuse)?;
    let memory = Memory::of(graph);
    let class = memory.class(written);
    let made: BTreeSet<ValueId> = graph.nodes[index..].iter().flat_map(crate::ir::Node::makes).collect();
    // Another view of the same memory, made before and read after, would miss the write.
    let misses_write = |value: ValueId| value != written && memory.class(value) == class && !made.contains(&value);
    if graph.nodes[index + 1..].iter().any(|later| later.reads().into_iter().any(misses_write)) {
        return Err(refuse());
    }
    let result = match node.outputs.first().copied().flatten() {
        Some(result) => result,
        None => {
            let value = Value { name: format!("{}_out", node.name), tensor: graph.value(written).tensor.clone() };
            graph.values.push(value);
            ValueId(graph.values.len() as u32 - 1)
        }
    };
    graph.nodes[index].operator = operator;
    graph.nodes[index].outputs = vec![Some(result)];
    for argument in graph.nodes[index + 1..].iter_mut().flat_map(|later| &mut later.arguments) {
        argument.value.replace(written, result);
    }
    if graph.output == written {
        graph.output = result;
    }
    Ok(())
}

/// For each group, the values that leave it upwards; for the last, the output.
fn crossing(graph: &Graph, groups: &[Option<usize>], names: &[String]) -> Result<Vec<Vec<ValueId>>, Error> {
    let last = names.len() - 1;
    let mut made: BTreeMap<ValueId, usize> = BTreeMap::new();
    let mut highest: BTreeMap<ValueId, usize> = BTreeMap::new();
    for (node, group) in graph.nodes.iter().zip(groups) {
        let Some(group) = *group else { continue };
        for value in node.reads() {
            highest.insert(value, group);
        }
        for value in node.makes() {
            made.entry(value).or_insert(group);
        }
    }
    if !made.contains_key(&graph.output) {
        return Err(Error::OutputWithoutParameters);
    }
    let mut crossing = vec![Vec::new(); names.len()];
    for (&value, &group) in &made {
        // The output leaves the last group, so it passes through every group above its own.
        let reader = if value == graph.output { last } else { highest.get(&value).copied().unwrap_or(group) };
        if reader > group && graph.value(value).tensor.is_none() {
            return Err(Error::NumberCrosses { value: graph.value(value).name.clone(), group: names[group].clone() });
        }
        for values in &mut crossing[group..reader] {
            values.push(value);
        }
    }
    crossing[last] = vec![graph.output];
    Ok(crossing)
}

/// Gives parameters and buffers to the highest group that uses them.
fn give_weights(graph: &mut Graph, groups: &[Option<usize>], segments: &mut [Segment]) {
    let mut users: BTreeMap<ValueId, BTreeSet<usize>> = BTreeMap::new();
    for (node, group) in graph.nodes.iter().zip(groups) {
        if let Some(group) = *group {
            for value in node.reads() {
                users.entry(value).or_default().insert(group);
            }
        }
    }
    let mut notes = Vec::new();
    for (index, parameter) in graph.parameters.iter().enumerate() {
        let groups = users.get(&parameter.value);
        match groups.and_then(BTreeSet::last) {
            Some(&highest) => {
                segments[highest].parameters.push(index);
                for &lower in groups.into_iter().flatten().filter(|lower| **lower != highest) {
                    let (upper, lower) = (&segments[highest].name, &segments[lower].name);
                    notes.push(format!(
                        "the parameter {} is used by {lower} and {upper} and is trained with {upper}",
                        parameter.name
                    ));
                }
            }
            None => {
                notes.push(format!("the parameter {} does not reach the output and is kept as it is", parameter.name))
            }
        }
    }
    for (index, buffer) in graph.buffers.iter().enumerate() {
        if let Some(&highest) = users.get(&buffer.value).and_then(BTreeSet::last) {
            segments[highest].buffers.push(index);
        }
    }
    graph.notes.extend(notes);
}
