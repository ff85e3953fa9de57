//! Arguments and results of one node.

use super::{Error, Reader, Scope, lookup, sizes};
use crate::ir::{Arg, Argument, Device, IntArg, ValueId};
use crate::schema::{self, OptionalTensor, SymArgument};

impl Reader {
    pub(super) fn arguments(&self, node: &str, given: &schema::Node, scope: &Scope) -> Result<Vec<Argument>, Error> {
        given
            .inputs
            .iter()
            .map(|input| {
                Ok(Argument { name: input.name.clone(), value: argument(node, &input.name, &input.arg, scope)? })
            })
            .collect()
    }

    /// Defines what the node makes; a list of tensors gives one entry for each (READ-5).
    pub(super) fn outputs(
        &mut self,
        graph: &schema::Graph,
        name: &str,
        node: &schema::Node,
        scope: &mut Scope,
    ) -> Result<Vec<Option<ValueId>>, Error> {
        let mut outputs = Vec::new();
        for output in &node.outputs {
            match output {
                schema::Argument::AsTensor(named)
                | schema::Argument::AsOptionalTensor(OptionalTensor::AsTensor(named)) => {
                    outputs.push(Some(self.define_tensor(scope, graph, &named.name)?));
                }
                schema::Argument::AsTensors(list) => {
                    for named in list {
                        outputs.push(Some(self.define_tensor(scope, graph, &named.name)?));
                    }
                }
                schema::Argument::AsNone(_) | schema::Argument::AsOptionalTensor(OptionalTensor::AsNone(_)) => {
                    outputs.push(None)
                }
                schema::Argument::AsSymInt(SymArgument::AsName(value)) => {
                    let id = self.define(scope, value, None)?;
                    if let Some(expression) = graph.sym_int_values.get(value) {
                        self.numbers.insert(id, sizes::expression(value, expression)?);
                    }
                    outputs.push(Some(id));
                }
                schema::Argument::AsSymFloat(SymArgument::AsName(value))
                | schema::Argument::AsSymBool(SymArgument::AsName(value)) => {
                    outputs.push(Some(self.define(scope, value, None)?));
                }
                other => {
                    return Err(Error::ArgumentKind {
                        node: name.to_owned(),
                        argument: "result".to_owned(),
                        kind: other.kind(),
                    });
                }
            }
        }
        Ok(outputs)
    }
}

fn argument(node: &str, name: &str, given: &schema::Argument, scope: &Scope) -> Result<Arg, Error> {
    use schema::Argument as Given;
    let value = |name: &str| lookup(scope, node, name);
    let refuse = || Error::ArgumentKind { node: node.to_owned(), argument: name.to_owned(), kind: given.kind() };
    let number = |number: &schema::Number| number.value().ok_or_else(refuse);
    let unknown = |what, number| Error::Number { what, number, place: format!("{node}.{name}") };
    let optional = |item: &OptionalTensor| match item {
        OptionalTensor::AsTensor(named) => value(&named.name).map(Some),
        OptionalTensor::AsNone(_) => Ok(None),
    };
    match given {
        Given::AsNone(_) => Ok(Arg::None),
        Given::AsTensor(named) => value(&named.name).map(Arg::Tensor),
        Given::AsTensors(list) => {
            list.iter().map(|named| value(&named.name)).collect::<Result<_, _>>().map(Arg::Tensors)
        }
        Given::AsOptionalTensors(list) => list.iter().map(optional).collect::<Result<_, _>>().map(Arg::OptionalTensors),
        Given::AsOptionalTensor(item) => Ok(optional(item)?.map_or(Arg::None, Arg::Tensor)),
        Given::AsInt(int) | Given::AsSymInt(SymArgument::Literal(int)) => Ok(Arg::Int(*int)),
        Given::AsSymInt(SymArgument::AsName(name)) => value(name).map(Arg::SymInt),
        Given::AsInts(ints) => Ok(Arg::Ints(ints.iter().copied().map(IntArg::Known).collect())),
        Given::AsSymInts(items) => {
            let item = |item: &SymArgument<i64>| match item {
                SymArgument::AsName(name) => value(name).map(IntArg::Value),
                SymArgument::Literal(int) => Ok(IntArg::Known(*int)),
            };
            items.iter().map(item).collect::<Result<_, _>>().map(Arg::Ints)
        }
        Given::AsFloat(float) | Given::AsSymFloat(SymArgument::Literal(float)) => number(float).map(Arg::Float),
        Given::AsSymFloat(SymArgument::AsName(name)) => value(name).map(Arg::SymFloat),
        Given::AsFloats(floats) => floats.iter().map(number).collect::<Result<_, _>>().map(Arg::Floats),
        Given::AsBool(flag) | Given::AsSymBool(SymArgument::Literal(flag)) => Ok(Arg::Bool(*flag)),
        Given::AsSymBool(SymArgument::AsName(name)) => value(name).map(Arg::SymBool),
        Given::AsBools(flags) => Ok(Arg::Bools(flags.clone())),
        Given::AsString(text) => Ok(Arg::String(text.clone())),
        Given::AsScalarType(kind) => schema::dtype(*kind).map(Arg::DType).ok_or_else(|| unknown("a dtype", *kind)),
        Given::AsLayout(schema::STRIDED) => Ok(Arg::Layout(0)),
        Given::AsLayout(layout) => Err(unknown("a layout", *layout)),
        Given::AsMemoryFormat(format) => {
            schema::memory_format(*format).map(Arg::MemoryFormat).ok_or_else(|| unknown("a memory format", *format))
        }
        Given::AsDevice(device) => Ok(Arg::Device(Device { kind: device.kind.clone(), index: device.index })),
        Given::AsStrings(_)
        | Given::AsSymBools(_)
        | Given::AsGraph(_)
        | Given::AsCustomObj(_)
        | Given::AsOperator(_)
        | Given::AsSymFloats(_)
        | Given::AsComplex(_)
        | Given::AsNestedTensors(_)
        | Given::AsIntLists(_)
        | Given::AsStringToArgument(_) => Err(refuse()),
    }
}

/// The value that an argument names, where it names exactly one.
pub(super) fn value_name(argument: &schema::Argument) -> Option<&str> {
    match argument {
        schema::Argument::AsTensor(named) => Some(&named.name),
        schema::Argument::AsSymInt(SymArgument::AsName(name)) => Some(name),
        _ => None,
    }
}

/// All names in a list of results, lists of tensors flattened.
pub(super) fn flat_names(arguments: &[schema::Argument]) -> Option<Vec<String>> {
    let mut names = Vec::new();
    for argument in arguments {
        match argument {
            schema::Argument::AsTensors(list) => names.extend(list.iter().map(|named| named.name.clone())),
            other => names.push(value_name(other)?.to_owned()),
        }
    }
    Some(names)
}
