//! The archive's JSON to the IR.
//!
//! READ-1: what is not supported is refused by name here, at submit time, never skipped.
//! READ-2: assertion nodes are checked here and do not reach the IR; guards reach it as [`crate::guards::Guard`].
//! READ-3: sizes are read from graph inputs only: `sym_size` of an inner tensor is rewritten to arithmetic on input sizes, so that numbers
//!         never depend on parameters and never cross a cut.
//! READ-4: parameters that share one storage view are one parameter, under the first name, with a note.
//! READ-5: an operator that returns a list of tensors (`split`, `unbind`, `chunk`) has one entry in `outputs` for each element.

mod arguments;
mod sizes;

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::guards::Guard;
use crate::ir::{Arg, Argument, DType, Dim, Graph, GraphInput, Node, TensorMeta, Value, ValueId, Weight};
use crate::operators;
use crate::payload::Payload;
use crate::schema::{self, InputSpec, OutputSpec, Program};
use crate::symbols::{self, Expr};

const REGIONS: [&str; 2] =
    ["torch.ops.higher_order.wrap_with_set_grad_enabled", "torch.ops.higher_order.wrap_with_autocast"];

/// Why a graph cannot be executed by Thaw.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the graph document does not follow the export schema: export again with PyTorch 2.11")]
    Json(#[from] serde_json::Error),
    #[error(
        "the higher-order operator `{operator}` at node `{node}` is not supported: rewrite that part of the model without it"
    )]
    HigherOrder { node: String, operator: String },
    #[error(
        "the control flow operator `{operator}` at node `{node}` depends on data: make the model's path fixed before export"
    )]
    ControlFlow { node: String, operator: String },
    #[error("the size `{symbol}` of `{value}` depends on data: make the model's sizes depend on input sizes only")]
    DataDependent { value: String, symbol: String },
    #[error(
        "the target `{target}` of node `{node}` is not an operator: export again, or rewrite that part of the model"
    )]
    UnknownTarget { node: String, target: String },
    #[error(
        "the argument `{argument}` of node `{node}` is of the kind `{kind}`, which is not supported: rewrite that part of the model"
    )]
    ArgumentKind { node: String, argument: String, kind: &'static str },
    #[error("the number {number} for {what} at `{place}` is not supported: use a dense tensor of a common dtype")]
    Number { what: &'static str, number: i64, place: String },
    #[error("the node `{node}` reads `{value}`, which nothing makes: export again")]
    UnknownValue { node: String, value: String },
    #[error("`{value}` is made twice: export again")]
    Redefined { value: String },
    #[error(
        "the graph returns {count} values and Thaw needs one tensor: wrap the model so that it returns its logits or features only"
    )]
    Outputs { count: usize },
    #[error(
        "the graph has the {what} `{name}`, which is not supported: export for training with torch.export.export, without run_decompositions"
    )]
    Signature { what: &'static str, name: String },
    #[error("the input `{name}` is not a tensor: wrap the model so that its inputs are tensors")]
    InputKind { name: String },
    #[error("the tensor `{name}` is in the graph but not in the archive: export again")]
    MissingTensor { name: String },
    #[error("the tensor `{name}` differs between graph and archive in shape or dtype: export again")]
    TensorMismatch { name: String },
    #[error("the assertion `{node}` does not hold: the graph and its tensors disagree; export again")]
    Assertion { node: String },
    #[error(
        "the in-place operator `{operator}` at node `{node}` lies in a region without gradients: use the out-of-place operator there"
    )]
    InPlaceWithoutGradient { node: String, operator: String },
    #[error("a size of `{value}` cannot be used")]
    Size { value: String, source: symbols::Error },
    #[error("the graph has more than 4294967295 values: export a smaller model")]
    TooManyValues,
}

/// Reads the program document; `payloads` are the archive's tensors by name.
pub(crate) fn read(program: &serde_json::Value, payloads: &BTreeMap<String, Payload>) -> Result<Graph, Error> {
    let program = Program::deserialize(program)?;
    let mut reader = Reader::new(&program)?;
    let mut scope = Scope::new();
    reader.signature_inputs(&program, payloads, &mut scope)?;
    reader.find_symbol_sources();
    let graph = &program.graph_module.graph;
    reader.nodes(graph, &mut scope, false)?;
    reader.graph.output = output(&program, &scope)?;
    reader.read_guards(&program.guards_code);
    reader.forget_unread_outputs();
    Ok(reader.graph)
}

/// Names of one (sub)graph to values.
type Scope = BTreeMap<String, ValueId>;

struct Reader {
    graph: Graph,
    /// What a number in the graph is, as an expression over input symbols.
    numbers: BTreeMap<ValueId, Expr>,
    /// A value that holds a symbol, once one was needed.
    symbol_values: BTreeMap<String, ValueId>,
}

impl Reader {
    fn new(program: &Program) -> Result<Self, Error> {
        let graph = Graph {
            values: Vec::new(),
            nodes: Vec::new(),
            inputs: Vec::new(),
            parameters: Vec::new(),
            buffers: Vec::new(),
            constants: Vec::new(),
            output: ValueId(0),
            symbols: sizes::symbols(program)?,
            symbol_sources: BTreeMap::new(),
            guards: Vec::new(),
            modules: BTreeMap::new(),
            notes: Vec::new(),
        };
        Ok(Self { graph, numbers: BTreeMap::new(), symbol_values: BTreeMap::new() })
    }

    fn add_value(&mut self, name: &str, tensor: Option<TensorMeta>) -> Result<ValueId, Error> {
        let id = ValueId(u32::try_from(self.graph.values.len()).map_err(|_| Error::TooManyValues)?);
        self.graph.values.push(Value { name: name.to_owned(), tensor });
        Ok(id)
    }

    fn define(&mut self, scope: &mut Scope, name: &str, tensor: Option<TensorMeta>) -> Result<ValueId, Error> {
        let id = self.add_value(name, tensor)?;
        match scope.insert(name.to_owned(), id) {
            None => Ok(id),
            Some(_) => Err(Error::Redefined { value: name.to_owned() }),
        }
    }

    fn define_tensor(&mut self, scope: &mut Scope, graph: &schema::Graph, name: &str) -> Result<ValueId, Error> {
        let meta = graph
            .tensor_values
            .get(name)
            .ok_or_else(|| Error::UnknownValue { node: "tensor_values".to_owned(), value: name.to_owned() })?;
        let meta = sizes::tensor_meta(name, meta)?;
        self.define(scope, name, Some(meta))
    }

    fn signature_inputs(
        &mut self,
        program: &Program,
        payloads: &BTreeMap<String, Payload>,
        scope: &mut Scope,
    ) -> Result<(), Error> {
        let graph = &program.graph_module.graph;
        let mut tied: BTreeMap<String, (ValueId, String)> = BTreeMap::new();
        for spec in &program.graph_module.signature.input_specs {
            match spec {
                InputSpec::Parameter { arg, parameter_name } => {
                    let value = self.define_tensor(scope, graph, &arg.name)?;
                    let weight = self.weight(value, parameter_name, payloads, None)?;
                    let stored = &payloads[parameter_name];
                    let place = format!("{} {} {:?} {:?}", stored.entry, stored.offset, stored.shape, stored.strides);
                    match tied.get(&place) {
                        Some((first, name)) => {
                            scope.insert(arg.name.clone(), *first);
                            self.graph.notes.push(format!(
                                "the parameter {parameter_name} is tied to {name} and is trained under that name"
                            ));
                        }
                        None => {
                            tied.insert(place, (value, parameter_name.clone()));
                            self.graph.parameters.push(weight);
                        }
                    }
                }
                InputSpec::Buffer { arg, buffer_name, persistent } => {
                    let value = self.define_tensor(scope, graph, &arg.name)?;
                    let weight = self.weight(value, buffer_name, payloads, Some(*persistent))?;
                    self.graph.buffers.push(weight);
                }
                InputSpec::TensorConstant { arg, tensor_constant_name } => {
                    let value = self.define_tensor(scope, graph, &arg.name)?;
                    let weight = self.weight(value, tensor_constant_name, payloads, Some(false))?;
                    self.graph.constants.push(weight);
                }
                InputSpec::UserInput { arg: schema::Argument::AsTensor(named) } => {
                    let value = self.define_tensor(scope, graph, &named.name)?;
                    self.graph.inputs.push(GraphInput { value, name: named.name.clone() });
                }
                InputSpec::UserInput { arg: schema::Argument::AsNone(_) } => {}
                InputSpec::UserInput { arg } => return Err(Error::InputKind { name: arg.kind().to_owned() }),
                // Specialised at export: nothing in the graph reads it.
                InputSpec::ConstantInput { name } => {
                    self.graph.notes.push(format!("the input {name} was a constant at export and is not asked for"));
                }
                InputSpec::CustomObj(_) => {
                    return Err(Error::Signature { what: "custom object", name: "input".to_owned() });
                }
                InputSpec::Token(_) => return Err(Error::Signature { what: "effect token", name: "input".to_owned() }),
            }
        }
        Ok(())
    }

    /// Checks a tensor against what the archive stores; `persistent` is `None` for parameters.
    fn weight(
        &self,
        value: ValueId,
        name: &str,
        payloads: &BTreeMap<String, Payload>,
        persistent: Option<bool>,
    ) -> Result<Weight, Error> {
        let stored = payloads.get(name).ok_or_else(|| Error::MissingTensor { name: name.to_owned() })?;
        let meta = self.graph.value(value).tensor.as_ref();
        let expected: Vec<Dim> = stored.shape.iter().map(|&size| Dim::Known(size)).collect();
        if !meta.is_some_and(|meta| meta.dtype == stored.dtype && meta.shape == expected) {
            return Err(Error::TensorMismatch { name: name.to_owned() });
        }
        let flag = persistent.unwrap_or(stored.requires_grad);
        Ok(Weight { value, name: name.to_owned(), dtype: stored.dtype, shape: stored.shape.clone(), flag })
    }

    fn nodes(&mut self, graph: &schema::Graph, scope: &mut Scope, without_gradient: bool) -> Result<(), Error> {
        for node in &graph.nodes {
            let name = node.name.as_deref().unwrap_or(&node.target);
            let module = self.module(&node.metadata);
            if node.target.starts_with("torch.ops.higher_order.") {
                self.region(graph, node, name, &module, scope, without_gradient)?;
                continue;
            }
            let (operator, overload) = resolve(name, &node.target)?;
            if operators::is_assertion(&operator) {
                self.check_assertion(name, node, scope)?;
                continue;
            }
            if without_gradient && operators::is_in_place(&operator) {
                return Err(Error::InPlaceWithoutGradient { node: name.to_owned(), operator });
            }
            let arguments = self.arguments(name, node, scope)?;
            let outputs = self.outputs(graph, name, node, scope)?;
            let node = Node { operator, overload, arguments, outputs, module, name: name.to_owned() };
            self.push(node)?;
        }
        Ok(())
    }

    /// Adds a node, or arithmetic on input sizes in its place (READ-3).
    fn push(&mut self, node: Node) -> Result<(), Error> {
        if node.operator == "aten::sym_size" {
            let &[Some(value)] = node.outputs.as_slice() else { return Ok(()) };
            if let Some(expression) = self.numbers.get(&value).cloned()
                && self.emit(&expression, value, &node.module)?
            {
                return Ok(());
            }
        }
        self.graph.nodes.push(node);
        Ok(())
    }

    /// Inlines a region that only switches gradients (or autocast) off; what it returns is detached.
    fn region(
        &mut self,
        graph: &schema::Graph,
        node: &schema::Node,
        name: &str,
        module: &str,
        scope: &mut Scope,
        without_gradient: bool,
    ) -> Result<(), Error> {
        let operator = node.target.trim_start_matches("torch.ops.higher_order.").to_owned();
        let refuse = || Error::HigherOrder { node: name.to_owned(), operator: operator.clone() };
        if ["cond", "while_loop", "map", "map_impl", "scan"].contains(&operator.as_str()) {
            return Err(Error::ControlFlow { node: name.to_owned(), operator });
        }
        let is_autocast = node.target == REGIONS[1];
        let flag = node.inputs.get(if is_autocast { 2 } else { 0 }).map(|input| &input.arg);
        let Some(&schema::Argument::AsBool(enabled)) = flag else { return Err(refuse()) };
        if !REGIONS.contains(&node.target.as_str()) || (is_autocast && enabled) {
            return Err(refuse());
        }
        let body = node.inputs.iter().position(|input| matches!(input.arg, schema::Argument::AsGraph(_)));
        let body = body.ok_or_else(refuse)?;
        let schema::Argument::AsGraph(inner) = &node.inputs[body].arg else { return Err(refuse()) };
        let operands = &node.inputs[body + 1..];
        if operands.len() != inner.graph.inputs.len() {
            return Err(refuse());
        }
        let mut inner_scope = Scope::new();
        for (formal, operand) in inner.graph.inputs.iter().zip(operands) {
            let (Some(formal), Some(operand)) = (arguments::value_name(formal), arguments::value_name(&operand.arg))
            else {
                return Err(refuse());
            };
            inner_scope.insert(formal.to_owned(), lookup(scope, name, operand)?);
        }
        let is_detached = !is_autocast && !enabled;
        self.nodes(&inner.graph, &mut inner_scope, without_gradient || is_detached)?;
        let results = arguments::flat_names(&inner.graph.outputs).ok_or_else(refuse)?;
        let names = arguments::flat_names(&node.outputs).ok_or_else(refuse)?;
        if results.len() != names.len() {
            return Err(refuse());
        }
        for (result, outer) in results.into_iter().zip(names) {
            let value = lookup(&inner_scope, name, &result)?;
            if is_detached && graph.tensor_values.contains_key(&outer) {
                let detached = self.define_tensor(scope, graph, &outer)?;
                self.graph.nodes.push(detach(value, detached, module, &outer));
            } else {
                scope.insert(outer, value);
            }
        }
        Ok(())
    }

    /// Remembers the classes on the module stack and gives the innermost path.
    fn module(&mut self, metadata: &BTreeMap<String, String>) -> String {
        let mut innermost = String::new();
        for item in metadata.get("nn_module_stack").map(|stack| stack.split(';')).into_iter().flatten() {
            let mut parts = item.splitn(3, ',');
            let (Some(_key), Some(path), Some(class)) = (parts.next(), parts.next(), parts.next()) else { continue };
            if path.starts_with("_empty_nn_module_stack") {
                continue;
            }
            // A module that is called several times is listed as `path@1`, `path@2`, ...
            let path = path.split('@').next().unwrap_or(path);
            self.graph.modules.entry(path.to_owned()).or_insert_with(|| class.to_owned());
            innermost = path.to_owned();
        }
        innermost
    }

    fn check_assertion(&self, name: &str, node: &schema::Node, scope: &Scope) -> Result<(), Error> {
        let argument = |wanted: &str| node.inputs.iter().find(|input| input.name == wanted).map(|input| &input.arg);
        let (Some(schema::Argument::AsTensor(tensor)), Some(&schema::Argument::AsScalarType(number))) =
            (argument("a"), argument("dtype"))
        else {
            return Ok(());
        };
        let value = lookup(scope, name, &tensor.name)?;
        let actual: Option<DType> = self.graph.value(value).tensor.as_ref().map(|meta| meta.dtype);
        if actual == schema::dtype(number) { Ok(()) } else { Err(Error::Assertion { node: name.to_owned() }) }
    }

    fn read_guards(&mut self, lines: &[String]) {
        for line in lines {
            let size = |name: &str, dimension: usize| {
                let input = self.graph.inputs.iter().find(|input| input.name == name)?;
                match self.graph.value(input.value).tensor.as_ref()?.shape.get(dimension)? {
                    Dim::Known(size) => Some(Expr::Known(*size)),
                    Dim::Symbolic(expression) => Some(expression.clone()),
                }
            };
            match Guard::parse(line, size) {
                // Both sides one expression: the shared symbol says it already.
                Some(guard) if guard.left == guard.right => {}
                Some(guard) => self.graph.guards.push(guard),
                None => self.graph.notes.push(format!("the exported condition {line} is not checked")),
            }
        }
    }

    fn forget_unread_outputs(&mut self) {
        let mut read: BTreeSet<ValueId> = self.graph.nodes.iter().flat_map(Node::reads).collect();
        read.insert(self.graph.output);
        for output in self.graph.nodes.iter_mut().flat_map(|node| &mut node.outputs) {
            if output.is_some_and(|value| !read.contains(&value)) {
                *output = None;
            }
        }
    }
}

fn lookup(scope: &Scope, node: &str, name: &str) -> Result<ValueId, Error> {
    scope.get(name).copied().ok_or_else(|| Error::UnknownValue { node: node.to_owned(), value: name.to_owned() })
}

/// `torch.ops.aten.add.Tensor` to (`aten::add`, `Tensor`).
fn resolve(node: &str, target: &str) -> Result<(String, String), Error> {
    if let Some(operator) = operators::python(target) {
        return Ok((operator, String::new()));
    }
    let parts: Vec<&str> = target.strip_prefix("torch.ops.").map(|rest| rest.split('.').collect()).unwrap_or_default();
    match parts.as_slice() {
        [namespace, name, overload] => {
            let overload = if *overload == "default" { "" } else { overload };
            Ok((format!("{namespace}::{name}"), overload.to_owned()))
        }
        _ => Err(Error::UnknownTarget { node: node.to_owned(), target: target.to_owned() }),
    }
}

fn detach(value: ValueId, detached: ValueId, module: &str, name: &str) -> Node {
    Node {
        operator: "aten::detach".to_owned(),
        overload: String::new(),
        arguments: vec![Argument { name: "self".to_owned(), value: Arg::Tensor(value) }],
        outputs: vec![Some(detached)],
        module: module.to_owned(),
        name: name.to_owned(),
    }
}

fn output(program: &Program, scope: &Scope) -> Result<ValueId, Error> {
    let mut results = Vec::new();
    for spec in &program.graph_module.signature.output_specs {
        match spec {
            OutputSpec::UserOutput { arg: schema::Argument::AsTensor(named) } => results.push(&named.name),
            OutputSpec::UserOutput { arg: schema::Argument::AsNone(_) } => {}
            OutputSpec::UserOutput { arg } => {
                return Err(Error::Signature { what: "output kind", name: arg.kind().to_owned() });
            }
            OutputSpec::LossOutput(_) => return Err(Error::Signature { what: "loss", name: "output".to_owned() }),
            OutputSpec::BufferMutation(_) | OutputSpec::ParameterMutation(_) | OutputSpec::UserInputMutation(_) => {
                return Err(Error::Signature { what: "functional mutation", name: "output".to_owned() });
            }
            OutputSpec::GradientToParameter(_) | OutputSpec::GradientToUserInput(_) => {
                return Err(Error::Signature { what: "gradient", name: "output".to_owned() });
            }
            OutputSpec::Token(_) => return Err(Error::Signature { what: "effect token", name: "output".to_owned() }),
        }
    }
    match results.as_slice() {
        [name] => lookup(scope, "output", name),
        other => Err(Error::Outputs { count: other.len() }),
    }
}
