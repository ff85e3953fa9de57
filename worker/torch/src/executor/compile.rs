//! From a segmented graph to a [`Program`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use thaw_graph::ir::{Arg, DType, Graph, IntArg, Node, NodeId, ValueId};
use thaw_graph::segment::SegmentedGraph;

use super::alias::Aliases;
use super::numbers::Function;
use super::{
    Block, Bypass, Code, Error, Flag, Instruction, NumberOperand, Operand, Options, Program, fold, kind_of, rules,
};
use crate::op::{self, Operator, Value};

impl Program {
    /// Resolves and checks everything that a graph needs.
    ///
    /// # Errors
    /// [`Error::Unresolved`] names every operator that libtorch does not know; the others name the first node at fault.
    pub fn compile(segmented: &SegmentedGraph, options: &Options) -> Result<Self, Error> {
        if options.is_channels_last(&segmented.graph) {
            let mut segmented = segmented.clone();
            rules::allow_copies(&mut segmented.graph);
            return Self::compile_as_written(&segmented, options);
        }
        Self::compile_as_written(segmented, options)
    }

    fn compile_as_written(segmented: &SegmentedGraph, options: &Options) -> Result<Self, Error> {
        let compiler = Compiler::new(segmented, options)?;
        let folded = fold::foldable(segmented, &compiler.operators);
        let mut visible = compiler.outside.clone();
        // Nothing of it is dropped: any block may read it.
        let made: BTreeSet<usize> = folded.iter().flat_map(|node| compiler.outputs(*node)).collect();
        let scope = Scope { visible: &visible, inputs: BTreeSet::new(), kept: made.clone() };
        let constants = compiler.block("what depends on nothing", &folded, &scope)?;
        visible.extend(made);
        let folded: BTreeSet<NodeId> = folded.into_iter().collect();
        let left =
            |nodes: &[NodeId]| -> Vec<NodeId> { nodes.iter().copied().filter(|node| !folded.contains(node)).collect() };
        // Other blocks read what the prologue makes, so it drops nothing.
        let made: BTreeSet<usize> = segmented.prologue.iter().flat_map(|node| compiler.outputs(*node)).collect();
        let prologue = compiler.block(
            "prologue",
            &left(&segmented.prologue),
            &Scope { visible: &visible, inputs: BTreeSet::new(), kept: made.clone() },
        )?;
        visible.extend(made);
        let mut blocks = Vec::new();
        for segment in &segmented.segments {
            let inputs = segment.inputs.iter().map(index).collect();
            let kept = segment.outputs.iter().map(index).collect();
            blocks.push(compiler.block(
                &segment.name,
                &left(&segment.nodes),
                &Scope { visible: &visible, inputs, kept },
            )?);
        }
        Ok(Self { values: segmented.graph.values.len(), folded: constants, prologue, blocks })
    }
}

fn index(value: &ValueId) -> usize {
    value.0 as usize
}

/// What surrounds a block.
struct Scope<'a> {
    /// Weights, the batch's inputs and, for segments, the prologue's values.
    visible: &'a BTreeSet<usize>,
    /// From the cut below.
    inputs: BTreeSet<usize>,
    /// For the cut above.
    kept: BTreeSet<usize>,
}

impl Scope<'_> {
    /// Whether the value comes from outside the block.
    fn gives(&self, value: usize) -> bool {
        self.visible.contains(&value) || self.inputs.contains(&value)
    }
}

struct Compiler<'a> {
    graph: &'a Graph,
    options: &'a Options,
    operators: BTreeMap<(&'a str, &'a str), Arc<Operator>>,
    /// Value → index of the parameter it holds.
    parameters: BTreeMap<usize, usize>,
    buffers: BTreeSet<usize>,
    /// Weights and the batch's inputs: there before the first node.
    outside: BTreeSet<usize>,
    /// The floating type the model was exported in; literals of it become the master type.
    exported: DType,
}

impl<'a> Compiler<'a> {
    fn new(segmented: &'a SegmentedGraph, options: &'a Options) -> Result<Self, Error> {
        let graph = &segmented.graph;
        let parameters =
            graph.parameters.iter().enumerate().map(|(place, weight)| (index(&weight.value), place)).collect();
        let buffers = graph.buffers.iter().map(|weight| index(&weight.value)).collect();
        let weights =
            graph.parameters.iter().chain(&graph.buffers).chain(&graph.constants).map(|weight| index(&weight.value));
        let outside = weights.chain(graph.inputs.iter().map(|input| index(&input.value))).collect();
        let exported =
            graph.parameters.iter().map(|weight| weight.dtype).find(|dtype| dtype.is_float()).unwrap_or(DType::Float32);
        let nodes = segmented.prologue.iter().chain(segmented.segments.iter().flat_map(|segment| &segment.nodes));
        let operators = resolve_all(nodes.map(|node| &graph.nodes[node.0 as usize]))?;
        Ok(Self { graph, options, operators, parameters, buffers, outside, exported })
    }

    fn outputs(&self, node: NodeId) -> Vec<usize> {
        self.graph.nodes[node.0 as usize].outputs.iter().flatten().map(index).collect()
    }

    fn block(&self, name: &str, nodes: &[NodeId], scope: &Scope<'_>) -> Result<Block, Error> {
        let mut state = BlockState { name, ..BlockState::default() };
        let mut instructions = Vec::new();
        for node in nodes {
            let node = &self.graph.nodes[node.0 as usize];
            if rules::is_assertion(&node.operator) {
                continue;
            }
            self.check_defined(node, scope, &state)?;
            instructions.push(match Function::named(&node.operator) {
                Some(function) => number_instruction(node, function)?,
                None => self.call_instruction(node, scope, &mut state)?,
            });
            state.defined.extend(node.outputs.iter().flatten().map(index));
        }
        free_after_last_use(&mut instructions, scope);
        let (copies, parameters) = (state.copies.into_iter().collect(), state.parameters.into_iter().collect());
        Ok(Block { name: name.to_owned(), instructions, copies, copy: self.operators[&COPY].clone(), parameters })
    }

    fn check_defined(&self, node: &Node, scope: &Scope<'_>, state: &BlockState<'_>) -> Result<(), Error> {
        for value in node.reads().iter().map(index) {
            if !state.defined.contains(&value) && !scope.gives(value) {
                let name = self.graph.values[value].name.clone();
                return Err(Error::Undefined {
                    node: node.name.clone(),
                    value: name,
                    place: format!("{} or below", state.name),
                });
            }
        }
        Ok(())
    }

    fn call_instruction(
        &self,
        node: &'a Node,
        scope: &Scope<'_>,
        state: &mut BlockState<'_>,
    ) -> Result<Instruction, Error> {
        let operator = self.operators[&(node.operator.as_str(), node.overload.as_str())].clone();
        if !operator.returns_list() && node.outputs.len() > operator.returns().len() {
            return Err(Error::Results {
                node: node.name.clone(),
                operator: operator.name().to_owned(),
                results: operator.returns().len(),
                named: node.outputs.len(),
            });
        }
        let buffer = self.note_writes(node, &operator, scope, state)?;
        let counter = buffer.map(|value| Bypass { flag: Flag::BatchStatistics, value, ones: false });
        let bypass = counter.or_else(|| state.noise_bypass(node));
        state.aliases.add(node, &operator);
        state.note_noise(node);
        let mut operands: Vec<Operand> = operator.arguments().iter().map(|_| Operand::Default).collect();
        for argument in &node.arguments {
            let Some(position) = operator.position(&argument.name) else {
                return Err(Error::UnknownArgument {
                    node: node.name.clone(),
                    operator: operator.name().to_owned(),
                    argument: argument.name.clone(),
                });
            };
            state
                .parameters
                .extend(argument.value.values().iter().filter_map(|value| self.parameters.get(&index(value))));
            operands[position] = self.operand(node, &operator, position, &argument.value, state)?;
        }
        // Arguments left out at the end need not be passed.
        while matches!(operands.last(), Some(Operand::Default)) {
            operands.pop();
        }
        let cast = self.options.precision.cast(&node.operator, self.options.device);
        let code = Code::Call { operator, operands, cast, bypass };
        Ok(Instruction { node: node.name.clone(), code, outputs: outputs_of(node), frees: Vec::new() })
    }

    /// Follows what an in-place operator writes to. Returns the buffer, where it is one.
    fn note_writes(
        &self,
        node: &Node,
        operator: &Operator,
        scope: &Scope<'_>,
        state: &mut BlockState<'_>,
    ) -> Result<Option<usize>, Error> {
        let mut buffer = None;
        for root in state.aliases.written(node, operator) {
            if let Some(parameter) = self.parameters.get(&root) {
                return Err(Error::WritesParameter {
                    node: node.name.clone(),
                    operator: operator.name().to_owned(),
                    parameter: self.graph.parameters[*parameter].name.clone(),
                });
            }
            if self.buffers.contains(&root) {
                buffer = Some(root);
            } else if scope.gives(root) {
                state.copies.insert(root);
            }
        }
        Ok(buffer)
    }

    fn operand(
        &self,
        node: &Node,
        operator: &Operator,
        position: usize,
        value: &Arg,
        state: &BlockState<'_>,
    ) -> Result<Operand, Error> {
        let constant = |value: &Arg| self.constant(node, operator, position, value);
        let name = &operator.arguments()[position].name;
        if let Some((flag, off)) = rules::off_value(node, name, value).or_else(|| state.noise_scale(node, name, value))
        {
            return Ok(Operand::Switch { flag, on: constant(value)?, off: constant(&off)? });
        }
        Ok(match value {
            Arg::Tensor(value) | Arg::SymInt(value) | Arg::SymFloat(value) | Arg::SymBool(value) => {
                Operand::Value(index(value))
            }
            Arg::Tensors(values) => Operand::Tensors(values.iter().map(index).collect()),
            Arg::OptionalTensors(values) => {
                Operand::OptionalTensors(values.iter().map(|value| value.as_ref().map(index)).collect())
            }
            Arg::Ints(list) if list.iter().any(|entry| matches!(entry, IntArg::Value(_))) => {
                Operand::Ints(list.iter().map(int_operand).collect())
            }
            // cuDNN is written off by an export on the CPU.
            Arg::Bool(false)
                if matches!(name.as_str(), "cudnn_enabled" | "cudnn_enable") && self.options.device.is_cuda() =>
            {
                Operand::Constant(constant(&Arg::Bool(true))?)
            }
            _ => Operand::Constant(constant(value)?),
        })
    }

    fn constant(&self, node: &Node, operator: &Operator, position: usize, value: &Arg) -> Result<op::Constant, Error> {
        let integers: Vec<i64>;
        let value = match value {
            Arg::None => Value::None,
            Arg::Int(value) => Value::Int(*value),
            Arg::Float(value) => Value::Float(*value),
            Arg::Bool(value) => Value::Bool(*value),
            Arg::String(text) => Value::String(text),
            Arg::Floats(list) => Value::Floats(list),
            Arg::Bools(list) => Value::Bools(list),
            Arg::Layout(code) => Value::Layout(*code),
            Arg::MemoryFormat(code) => Value::MemoryFormat(*code),
            Arg::Device(_) => Value::Device(self.options.device),
            Arg::DType(dtype) if *dtype == self.exported => Value::DType(self.options.precision.master()),
            Arg::DType(dtype) => Value::DType(kind_of(*dtype)),
            Arg::Ints(list) => {
                integers = list
                    .iter()
                    .filter_map(|entry| if let IntArg::Known(value) = entry { Some(*value) } else { None })
                    .collect();
                Value::Ints(&integers)
            }
            Arg::Tensor(_)
            | Arg::Tensors(_)
            | Arg::OptionalTensors(_)
            | Arg::SymInt(_)
            | Arg::SymFloat(_)
            | Arg::SymBool(_) => {
                return Err(Error::UnknownLiteral(operator.arguments()[position].name.clone()));
            }
        };
        operator.constant(position, value).map_err(|source| Error::Literal { node: node.name.clone(), source })
    }
}

/// What is known while a block is compiled.
#[derive(Default)]
struct BlockState<'n> {
    name: &'n str,
    defined: BTreeSet<usize>,
    aliases: Aliases,
    copies: BTreeSet<usize>,
    parameters: BTreeSet<usize>,
    /// Root of a noise tensor → the probability that drew it.
    noise: BTreeMap<usize, f64>,
}

impl BlockState<'_> {
    /// Remembers noise that stochastic depth draws, and scales.
    fn note_noise(&mut self, node: &Node) {
        let Some(Some(output)) = node.outputs.first() else { return };
        let drawn = if rules::is_keep_noise(node) { rules::keep_probability(node) } else { None };
        let probability =
            drawn.or_else(|| if rules::is_noise_scale(node) { self.noise_in(node, "self") } else { None });
        if let Some(probability) = probability {
            self.noise.insert(self.aliases.root(index(output)), probability);
        }
    }

    /// The probability that drew the noise given as that argument.
    fn noise_in(&self, node: &Node, argument: &str) -> Option<f64> {
        let root = self.aliases.root(index(&node.tensor(argument)?));
        self.noise.get(&root).copied()
    }

    /// Where stochastic depth is off: noise is one, not drawn, and a product with it is the other factor itself, with its memory layout.
    fn noise_bypass(&self, node: &Node) -> Option<Bypass> {
        let (argument, ones) = if rules::is_keep_noise(node) {
            ("self", true)
        } else if rules::is_product(node) && self.noise_in(node, "other").is_some() {
            ("self", false)
        } else if rules::is_product(node) && self.noise_in(node, "self").is_some() {
            ("other", false)
        } else {
            return None;
        };
        Some(Bypass { flag: Flag::Dropout, value: index(&node.tensor(argument)?), ones })
    }

    /// Where stochastic depth is off its noise is not scaled.
    fn noise_scale(&self, node: &Node, argument: &str, value: &Arg) -> Option<(Flag, Arg)> {
        if !rules::is_noise_scale(node) || argument != "other" {
            return None;
        }
        let drawn = self.noise_in(node, "self")?;
        (rules::real(value)?.to_bits() == drawn.to_bits()).then_some((Flag::Dropout, Arg::Float(1.0)))
    }
}

/// What a block copies values with (EXE-3).
const COPY: (&str, &str) = ("aten::clone", "");

fn resolve_all<'a>(
    nodes: impl Iterator<Item = &'a Node>,
) -> Result<BTreeMap<(&'a str, &'a str), Arc<Operator>>, Error> {
    let mut operators = BTreeMap::new();
    let mut unknown = BTreeSet::new();
    for key in nodes.map(|node| (node.operator.as_str(), node.overload.as_str())).chain([COPY]) {
        if Function::named(key.0).is_some() || rules::is_assertion(key.0) || operators.contains_key(&key) {
            continue;
        }
        match op::resolve(key.0, key.1) {
            Ok(operator) => {
                operators.insert(key, Arc::new(operator));
            }
            Err(_) => {
                unknown.insert(if key.1.is_empty() { key.0.to_owned() } else { format!("{}.{}", key.0, key.1) });
            }
        }
    }
    if unknown.is_empty() { Ok(operators) } else { Err(Error::Unresolved { operators: unknown.into_iter().collect() }) }
}

fn outputs_of(node: &Node) -> Vec<Option<usize>> {
    node.outputs.iter().map(|output| output.as_ref().map(index)).collect()
}

fn int_operand(entry: &IntArg) -> NumberOperand {
    match entry {
        IntArg::Known(value) => NumberOperand::Int(*value),
        IntArg::Value(value) => NumberOperand::Value(index(value)),
    }
}

fn number_instruction(node: &Node, function: Function) -> Result<Instruction, Error> {
    let operands = node.arguments.iter().map(|argument| match &argument.value {
        Arg::Int(value) => Ok(NumberOperand::Int(*value)),
        Arg::Float(value) => Ok(NumberOperand::Float(*value)),
        Arg::Bool(value) => Ok(NumberOperand::Bool(*value)),
        Arg::SymInt(value) | Arg::SymFloat(value) | Arg::SymBool(value) | Arg::Tensor(value) => {
            Ok(NumberOperand::Value(index(value)))
        }
        _ => Err(Error::UnknownArgument {
            node: node.name.clone(),
            operator: node.operator.clone(),
            argument: argument.name.clone(),
        }),
    });
    let operands = operands.collect::<Result<_, _>>()?;
    Ok(Instruction {
        node: node.name.clone(),
        code: Code::Number { function, operands },
        outputs: outputs_of(node),
        frees: Vec::new(),
    })
}

/// Every value that an instruction reads.
fn reads(code: &Code) -> Vec<usize> {
    let number = |operand: &NumberOperand| if let NumberOperand::Value(value) = operand { Some(*value) } else { None };
    match code {
        Code::Number { operands, .. } => operands.iter().filter_map(number).collect(),
        Code::Call { operands, .. } => operands
            .iter()
            .flat_map(|operand| match operand {
                Operand::Value(value) => vec![*value],
                Operand::Ints(list) => list.iter().filter_map(number).collect(),
                Operand::Tensors(values) => values.clone(),
                Operand::OptionalTensors(values) => values.iter().flatten().copied().collect(),
                Operand::Default | Operand::Constant(_) | Operand::Switch { .. } => Vec::new(),
            })
            .collect(),
    }
}

/// Fills in [`Instruction::frees`]: the block's own values and its segment's inputs, each after its last reader (EXE-4).
fn free_after_last_use(instructions: &mut [Instruction], scope: &Scope<'_>) {
    let mut seen = BTreeSet::new();
    for instruction in instructions.iter_mut().rev() {
        let mut touched = reads(&instruction.code);
        touched.extend(instruction.outputs.iter().flatten());
        for value in touched {
            if !scope.kept.contains(&value) && !scope.visible.contains(&value) && seen.insert(value) {
                instruction.frees.push(value);
            }
        }
    }
}
