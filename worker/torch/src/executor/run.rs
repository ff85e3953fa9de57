//! Running a compiled block over a frame of values.

use tch::Tensor;

use super::numbers::Number;
use super::{Block, Cell, Code, Error, Flag, Frame, Instruction, NumberOperand, Operand, Phase};
use crate::op::{Cast, Operator, Output, Value};

/// The most operands that are passed without a heap allocation.
const INLINE_OPERANDS: usize = 24;

impl Block {
    /// Runs every instruction in order. Autograd records as the thread's switch says.
    pub(crate) fn run(&self, frame: &mut Frame, phase: Phase) -> Result<(), Error> {
        for value in &self.copies {
            if let Some(tensor) = frame.tensor(*value) {
                let copy = self.copy.call_tensor(&[Value::Tensor(tensor)]);
                let failed = |source| Error::Node { node: "its inputs".to_owned(), place: self.name.clone(), source };
                frame.cells[*value] = Cell::Tensor(copy.map_err(failed)?);
            }
        }
        let mut outputs = Vec::new();
        for instruction in &self.instructions {
            self.step(instruction, frame, phase, &mut outputs)?;
            frame.beat.call();
            for value in &instruction.frees {
                frame.cells[*value] = Cell::Empty;
            }
        }
        Ok(())
    }

    fn step(
        &self,
        instruction: &Instruction,
        frame: &mut Frame,
        phase: Phase,
        outputs: &mut Vec<Output>,
    ) -> Result<(), Error> {
        match &instruction.code {
            Code::Number { function, operands } => {
                let numbers = operands.iter().map(|operand| number(frame, operand)).collect::<Result<Vec<_>, _>>();
                let result = numbers.and_then(|numbers| function.apply(&numbers));
                let result = result.map_err(|message| self.failure(&instruction.node, message))?;
                if let Some(Some(output)) = instruction.outputs.first() {
                    frame.cells[*output] = match result {
                        Number::Int(value) => Cell::Int(value),
                        Number::Float(value) => Cell::Float(value),
                        Number::Bool(value) => Cell::Bool(value),
                    };
                }
                Ok(())
            }
            Code::Call { bypass: Some(bypass), .. } if !phase.is_on(bypass.flag) => {
                let Some(tensor) = frame.tensor(bypass.value) else { return Ok(()) };
                let mut tensor = tensor.shallow_clone();
                if bypass.ones {
                    tensor = tensor.f_fill_(1.0).map_err(|error| self.failure(&instruction.node, error.to_string()))?;
                }
                if let Some(Some(output)) = instruction.outputs.first() {
                    frame.cells[*output] = Cell::Tensor(tensor);
                }
                Ok(())
            }
            Code::Call { operator, operands, cast, .. } => {
                self.call(instruction, operator, operands, *cast, frame, phase, outputs)?;
                self.store(instruction, frame, outputs)
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one instruction and where it runs")]
    fn call(
        &self,
        instruction: &Instruction,
        operator: &Operator,
        operands: &[Operand],
        cast: Cast,
        frame: &Frame,
        phase: Phase,
        outputs: &mut Vec<Output>,
    ) -> Result<(), Error> {
        let lists = Lists::gather(frame, operands).map_err(|message| self.failure(&instruction.node, message))?;
        let mut inline = [Value::Default; INLINE_OPERANDS];
        let mut heap;
        let values: &mut [Value<'_>] = if operands.len() <= INLINE_OPERANDS {
            &mut inline[..operands.len()]
        } else {
            heap = vec![Value::Default; operands.len()];
            &mut heap
        };
        let (mut ints, mut tensors, mut optionals) = (lists.ints.iter(), lists.tensors.iter(), lists.optionals.iter());
        for (slot, operand) in values.iter_mut().zip(operands) {
            *slot = match operand {
                Operand::Default => Value::Default,
                Operand::Constant(constant) => Value::Constant(constant),
                Operand::Switch { flag, on, off } => Value::Constant(if phase.is_on(*flag) { on } else { off }),
                Operand::Value(value) => {
                    cell_value(frame, *value).map_err(|message| self.failure(&instruction.node, message))?
                }
                Operand::Ints(_) => ints.next().map_or(Value::Default, |list| Value::Ints(list)),
                Operand::Tensors(_) => tensors.next().map_or(Value::Default, |list| Value::Tensors(list)),
                Operand::OptionalTensors(_) => {
                    optionals.next().map_or(Value::Default, |list| Value::OptionalTensors(list))
                }
            };
        }
        operator.call_into(values, cast, outputs).map_err(|source| Error::Node {
            node: instruction.node.clone(),
            place: self.name.clone(),
            source,
        })
    }

    /// Puts results where the instruction says.
    fn store(&self, instruction: &Instruction, frame: &mut Frame, outputs: &mut Vec<Output>) -> Result<(), Error> {
        if let [Output::Tensors(_)] = &outputs[..] {
            let Some(Output::Tensors(list)) = outputs.pop() else { return Ok(()) };
            if list.len() < instruction.outputs.len() {
                let message =
                    format!("{} tensors came back, the graph names {}", list.len(), instruction.outputs.len());
                return Err(self.failure(&instruction.node, message));
            }
            outputs.extend(list.into_iter().map(Output::Tensor));
        }
        for (place, output) in instruction.outputs.iter().zip(outputs.drain(..)) {
            let Some(place) = place else { continue };
            frame.cells[*place] = match output {
                Output::Tensor(tensor) => Cell::Tensor(tensor),
                Output::Int(value) => Cell::Int(value),
                Output::Float(value) => Cell::Float(value),
                Output::Bool(value) => Cell::Bool(value),
                Output::None => Cell::Empty,
                Output::Tensors(_) => {
                    return Err(self.failure(&instruction.node, "a list among several results".to_owned()));
                }
            };
        }
        Ok(())
    }

    fn failure(&self, node: &str, message: String) -> Error {
        Error::Value { node: node.to_owned(), place: self.name.clone(), message }
    }
}

impl Phase {
    fn is_on(self, flag: Flag) -> bool {
        match flag {
            Flag::Dropout => self.dropout,
            Flag::BatchStatistics => self.batch_statistics,
        }
    }
}

/// Lists that are made per call, in the order of their operands.
#[derive(Default)]
struct Lists<'a> {
    ints: Vec<Vec<i64>>,
    tensors: Vec<Vec<&'a Tensor>>,
    optionals: Vec<Vec<Option<&'a Tensor>>>,
}

impl<'a> Lists<'a> {
    fn gather(frame: &'a Frame, operands: &[Operand]) -> Result<Self, String> {
        let mut lists = Self::default();
        let tensor = |value: &usize| frame.tensor(*value).ok_or_else(|| format!("value {value} is not a tensor here"));
        for operand in operands {
            match operand {
                Operand::Ints(list) => {
                    lists.ints.push(
                        list.iter().map(|entry| number(frame, entry).map(Number::integer)).collect::<Result<_, _>>()?,
                    );
                }
                Operand::Tensors(values) => lists.tensors.push(values.iter().map(tensor).collect::<Result<_, _>>()?),
                Operand::OptionalTensors(values) => lists
                    .optionals
                    .push(values.iter().map(|value| value.as_ref().map(tensor).transpose()).collect::<Result<_, _>>()?),
                Operand::Default | Operand::Constant(_) | Operand::Switch { .. } | Operand::Value(_) => {}
            }
        }
        Ok(lists)
    }
}

fn cell_value(frame: &Frame, value: usize) -> Result<Value<'_>, String> {
    Ok(match &frame.cells[value] {
        Cell::Tensor(tensor) => Value::Tensor(tensor),
        Cell::Int(number) => Value::Int(*number),
        Cell::Float(number) => Value::Float(*number),
        Cell::Bool(flag) => Value::Bool(*flag),
        Cell::Empty => return Err(format!("value {value} is empty here")),
    })
}

fn number(frame: &Frame, operand: &NumberOperand) -> Result<Number, String> {
    if let Some(number) = operand.literal() {
        return Ok(number);
    }
    let NumberOperand::Value(value) = *operand else { return Err("not a number".to_owned()) };
    match &frame.cells[value] {
        Cell::Int(number) => Ok(Number::Int(*number)),
        Cell::Float(number) => Ok(Number::Float(*number)),
        Cell::Bool(flag) => Ok(Number::Bool(*flag)),
        Cell::Tensor(_) | Cell::Empty => Err(format!("value {value} is not a number here")),
    }
}
