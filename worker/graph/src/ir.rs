//! The graph as Thaw executes it: values, typed arguments, nodes in execution order. Built by the reader from the archive's JSON;
//! resolved and run by `thaw-torch`. Nothing here knows libtorch.

use std::collections::BTreeMap;

/// Index into [`Graph::values`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ValueId(pub u32);

/// Index into [`Graph::nodes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

/// An exported graph: inputs, weights and the operators between them.
#[derive(Debug, Clone, PartialEq)]
pub struct Graph {
    pub values: Vec<Value>,
    /// In execution order.
    pub nodes: Vec<Node>,
    /// What the caller passes per batch, in order.
    pub inputs: Vec<GraphInput>,
    pub parameters: Vec<Weight>,
    pub buffers: Vec<Weight>,
    /// Tensors that belong to the graph but are neither parameter nor buffer (lifted constants).
    pub constants: Vec<Weight>,
    /// The one result: logits or features.
    pub output: ValueId,
    /// Symbol name → range and the value it had at export.
    pub symbols: BTreeMap<String, Symbol>,
    /// Where each input symbol is read from: (input index, dimension).
    pub symbol_sources: BTreeMap<String, (usize, usize)>,
    /// Conditions on the symbols that a batch must meet.
    pub guards: Vec<crate::guards::Guard>,
    /// Class of each module by dotted path, e.g. `torch.nn.modules.linear.Linear`.
    pub modules: BTreeMap<String, String>,
    /// What a user should know about this graph (tied parameters, guards that cannot be checked), one sentence each.
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// The name in the archive.
    pub name: String,
    /// Present for tensors.
    pub tensor: Option<TensorMeta>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct TensorMeta {
    pub dtype: DType,
    pub shape: Vec<Dim>,
}

/// A size: known, or an expression over symbols.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dim {
    Known(i64),
    Symbolic(crate::symbols::Expr),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Symbol {
    pub min: i64,
    /// `None`: unbounded.
    pub max: Option<i64>,
    /// The value at export.
    pub hint: i64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct GraphInput {
    pub value: ValueId,
    /// The argument's name in the model's forward.
    pub name: String,
}

/// A parameter, buffer or constant.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    pub value: ValueId,
    /// Dotted name in the module, e.g. `encoder.layer.0.attention.self.query.weight`.
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<i64>,
    /// For parameters: whether it required a gradient at export. For buffers: persistent.
    pub flag: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Operator with namespace, e.g. `aten::linear`.
    pub operator: String,
    /// Overload name; empty for `default`.
    pub overload: String,
    /// Given arguments in schema order; omitted ones take the schema's default.
    pub arguments: Vec<Argument>,
    /// One entry per result of the schema; `None` where the graph ignores it.
    pub outputs: Vec<Option<ValueId>>,
    /// Dotted path of the innermost module the node came from; empty for the root.
    pub module: String,
    /// The node's own name.
    pub name: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Argument {
    /// The schema's name for it.
    pub name: String,
    pub value: Arg,
}

/// The closed set of argument kinds that occur in exported graphs.
#[derive(Debug, Clone, PartialEq)]
pub enum Arg {
    None,
    Tensor(ValueId),
    Tensors(Vec<ValueId>),
    OptionalTensors(Vec<Option<ValueId>>),
    Int(i64),
    /// Read from a value that a node produced (`sym_size.int` and arithmetic on it).
    SymInt(ValueId),
    Ints(Vec<IntArg>),
    Float(f64),
    SymFloat(ValueId),
    Floats(Vec<f64>),
    Bool(bool),
    SymBool(ValueId),
    Bools(Vec<bool>),
    String(String),
    DType(DType),
    /// As libtorch numbers them (strided is 0).
    Layout(i64),
    /// As libtorch numbers them (contiguous 0, preserve 1, channels last 2).
    MemoryFormat(i64),
    Device(Device),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntArg {
    Known(i64),
    Value(ValueId),
}

/// Written at export time; the executor puts the device in use in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// cpu, cuda, ...
    pub kind: String,
    pub index: Option<i64>,
}

/// Element types, independent of any library's numbering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DType {
    Uint8,
    Int8,
    Int16,
    Int32,
    Int64,
    Float16,
    Float32,
    Float64,
    BFloat16,
    Bool,
}

impl DType {
    /// Bytes per element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::Uint8 | Self::Int8 | Self::Bool => 1,
            Self::Int16 | Self::Float16 | Self::BFloat16 => 2,
            Self::Int32 | Self::Float32 => 4,
            Self::Int64 | Self::Float64 => 8,
        }
    }

    /// Whether it holds real numbers.
    #[must_use]
    pub fn is_float(self) -> bool {
        match self {
            Self::Float16 | Self::Float32 | Self::Float64 | Self::BFloat16 => true,
            Self::Uint8 | Self::Int8 | Self::Int16 | Self::Int32 | Self::Int64 | Self::Bool => false,
        }
    }
}

impl Arg {
    /// Every value that the argument reads.
    #[must_use]
    pub fn values(&self) -> Vec<ValueId> {
        match self {
            Self::Tensor(value) | Self::SymInt(value) | Self::SymFloat(value) | Self::SymBool(value) => vec![*value],
            Self::Tensors(values) => values.clone(),
            Self::OptionalTensors(values) => values.iter().copied().flatten().collect(),
            Self::Ints(items) => items.iter().filter_map(IntArg::value).collect(),
            Self::None
            | Self::Int(_)
            | Self::Float(_)
            | Self::Floats(_)
            | Self::Bool(_)
            | Self::Bools(_)
            | Self::String(_)
            | Self::DType(_)
            | Self::Layout(_)
            | Self::MemoryFormat(_)
            | Self::Device(_) => Vec::new(),
        }
    }

    /// Puts `new` wherever `old` is read.
    pub(crate) fn replace(&mut self, old: ValueId, new: ValueId) {
        let swap = |value: &mut ValueId| {
            if *value == old {
                *value = new;
            }
        };
        match self {
            Self::Tensor(value) | Self::SymInt(value) | Self::SymFloat(value) | Self::SymBool(value) => swap(value),
            Self::Tensors(values) => values.iter_mut().for_each(swap),
            Self::OptionalTensors(values) => values.iter_mut().flatten().for_each(swap),
            Self::Ints(items) => {
                for item in items {
                    if let IntArg::Value(value) = item {
                        swap(value);
                    }
                }
            }
            Self::None
            | Self::Int(_)
            | Self::Float(_)
            | Self::Floats(_)
            | Self::Bool(_)
            | Self::Bools(_)
            | Self::String(_)
            | Self::DType(_)
            | Self::Layout(_)
            | Self::MemoryFormat(_)
            | Self::Device(_) => {}
        }
    }
}

impl IntArg {
    fn value(&self) -> Option<ValueId> {
        match self {
            Self::Known(_) => None,
            Self::Value(value) => Some(*value),
        }
    }
}

impl Node {
    /// Every value that the node reads, in argument order.
    #[must_use]
    pub fn reads(&self) -> Vec<ValueId> {
        self.arguments.iter().flat_map(|argument| argument.value.values()).collect()
    }

    /// Every value that the node makes.
    #[must_use]
    pub fn makes(&self) -> Vec<ValueId> {
        self.outputs.iter().copied().flatten().collect()
    }

    /// The argument of that name, where it is given.
    #[must_use]
    pub fn argument(&self, name: &str) -> Option<&Arg> {
        self.arguments.iter().find(|argument| argument.name == name).map(|argument| &argument.value)
    }

    /// The tensor given as that argument.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<ValueId> {
        match self.argument(name) {
            Some(Arg::Tensor(value)) => Some(*value),
            _ => None,
        }
    }
}

impl Graph {
    /// The value of that id.
    ///
    /// # Panics
    /// If the id is another graph's.
    #[must_use]
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0 as usize]
    }

    /// The node of that id.
    ///
    /// # Panics
    /// If the id is another graph's.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// The value's sizes with every symbol at its export-time hint; `None` for what is not a tensor or does not evaluate.
    #[must_use]
    pub fn hinted_shape(&self, id: ValueId) -> Option<Vec<i64>> {
        let hints: BTreeMap<String, i64> =
            self.symbols.iter().map(|(name, symbol)| (name.clone(), symbol.hint)).collect();
        self.shape_at(id, &hints)
    }

    /// The sizes of a tensor at the symbols' values; `None` where it is no tensor, or a symbol is missing.
    pub(crate) fn shape_at(&self, id: ValueId, symbols: &BTreeMap<String, i64>) -> Option<Vec<i64>> {
        let tensor = self.value(id).tensor.as_ref()?;
        tensor
            .shape
            .iter()
            .map(|dim| match dim {
                Dim::Known(size) => Some(*size),
                Dim::Symbolic(expression) => expression.eval(symbols).ok(),
            })
            .collect()
    }
}
