//! The archive's JSON as it lies in the file: `torch.export` schema, major 8. Only the fields that Thaw reads.
//!
//! SCHEMA-1: these types never leave the crate; `reader` turns them into [`crate::ir`].

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::ir::DType;

#[derive(Debug, Deserialize)]
pub(crate) struct Program {
    pub graph_module: GraphModule,
    #[serde(default)]
    pub range_constraints: BTreeMap<String, RangeConstraint>,
    #[serde(default)]
    pub guards_code: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct GraphModule {
    pub graph: Graph,
    pub signature: Signature,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RangeConstraint {
    pub min_val: Option<i64>,
    pub max_val: Option<i64>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Graph {
    pub inputs: Vec<Argument>,
    pub outputs: Vec<Argument>,
    pub nodes: Vec<Node>,
    #[serde(default)]
    pub tensor_values: BTreeMap<String, TensorMeta>,
    #[serde(default)]
    pub sym_int_values: BTreeMap<String, SymInt>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Node {
    pub target: String,
    pub inputs: Vec<NamedArgument>,
    pub outputs: Vec<Argument>,
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    #[serde(default)]
    pub name: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct NamedArgument {
    pub name: String,
    pub arg: Argument,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Named {
    pub name: String,
}

/// Every kind the schema has; the reader refuses those it does not support, by name.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(clippy::enum_variant_names, reason = "the names are the schema's own")]
pub(crate) enum Argument {
    AsNone(serde::de::IgnoredAny),
    AsTensor(Named),
    AsTensors(Vec<Named>),
    AsInt(i64),
    AsInts(Vec<i64>),
    AsFloat(Number),
    AsFloats(Vec<Number>),
    AsString(String),
    AsStrings(serde::de::IgnoredAny),
    AsSymInt(SymArgument<i64>),
    AsSymInts(Vec<SymArgument<i64>>),
    AsScalarType(i64),
    AsMemoryFormat(i64),
    AsLayout(i64),
    AsDevice(Device),
    AsBool(bool),
    AsBools(Vec<bool>),
    AsSymBool(SymArgument<bool>),
    AsSymBools(serde::de::IgnoredAny),
    AsGraph(Box<GraphArgument>),
    AsOptionalTensors(Vec<OptionalTensor>),
    AsCustomObj(serde::de::IgnoredAny),
    AsOperator(serde::de::IgnoredAny),
    AsSymFloat(SymArgument<Number>),
    AsSymFloats(serde::de::IgnoredAny),
    AsOptionalTensor(OptionalTensor),
    AsComplex(serde::de::IgnoredAny),
    AsNestedTensors(serde::de::IgnoredAny),
    AsIntLists(serde::de::IgnoredAny),
    AsStringToArgument(serde::de::IgnoredAny),
}

impl Argument {
    /// The schema's name for the kind, for messages.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::AsNone(_) => "none",
            Self::AsTensor(_) => "tensor",
            Self::AsTensors(_) => "tensors",
            Self::AsInt(_) => "int",
            Self::AsInts(_) => "ints",
            Self::AsFloat(_) => "float",
            Self::AsFloats(_) => "floats",
            Self::AsString(_) => "string",
            Self::AsStrings(_) => "strings",
            Self::AsSymInt(_) => "symbolic int",
            Self::AsSymInts(_) => "symbolic ints",
            Self::AsScalarType(_) => "dtype",
            Self::AsMemoryFormat(_) => "memory format",
            Self::AsLayout(_) => "layout",
            Self::AsDevice(_) => "device",
            Self::AsBool(_) => "bool",
            Self::AsBools(_) => "bools",
            Self::AsSymBool(_) => "symbolic bool",
            Self::AsSymBools(_) => "symbolic bools",
            Self::AsGraph(_) => "graph",
            Self::AsOptionalTensors(_) => "optional tensors",
            Self::AsCustomObj(_) => "custom object",
            Self::AsOperator(_) => "operator",
            Self::AsSymFloat(_) => "symbolic float",
            Self::AsSymFloats(_) => "symbolic floats",
            Self::AsOptionalTensor(_) => "optional tensor",
            Self::AsComplex(_) => "complex number",
            Self::AsNestedTensors(_) => "nested tensors",
            Self::AsIntLists(_) => "int lists",
            Self::AsStringToArgument(_) => "dictionary",
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SymArgument<T> {
    AsName(String),
    #[serde(alias = "as_int", alias = "as_float", alias = "as_bool")]
    Literal(T),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum OptionalTensor {
    AsTensor(Named),
    AsNone(serde::de::IgnoredAny),
}

#[derive(Debug, Deserialize)]
pub(crate) struct GraphArgument {
    pub graph: Graph,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Device {
    #[serde(rename = "type")]
    pub kind: String,
    pub index: Option<i64>,
}

/// JSON has no infinities: the exporter writes them as text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Number {
    Finite(f64),
    Text(String),
}

impl Number {
    pub(crate) fn value(&self) -> Option<f64> {
        match self {
            Self::Finite(value) => Some(*value),
            Self::Text(text) => match text.as_str() {
                "Infinity" => Some(f64::INFINITY),
                "-Infinity" => Some(f64::NEG_INFINITY),
                "NaN" => Some(f64::NAN),
                _ => None,
            },
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct TensorMeta {
    pub dtype: i64,
    pub sizes: Vec<SymInt>,
    #[serde(default)]
    pub requires_grad: bool,
    #[serde(default)]
    pub strides: Vec<SymInt>,
    pub storage_offset: Option<SymInt>,
    pub layout: i64,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SymInt {
    AsInt(i64),
    AsExpr(SymExpr),
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct SymExpr {
    pub expr_str: String,
    #[serde(default)]
    pub hint: Option<Hint>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(clippy::enum_variant_names, reason = "the names are the schema's own")]
pub(crate) enum Hint {
    AsInt(i64),
    AsBool(serde::de::IgnoredAny),
    AsFloat(serde::de::IgnoredAny),
}

#[derive(Debug, Deserialize)]
pub(crate) struct Signature {
    pub input_specs: Vec<InputSpec>,
    pub output_specs: Vec<OutputSpec>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum InputSpec {
    UserInput { arg: Argument },
    Parameter { arg: Named, parameter_name: String },
    Buffer { arg: Named, buffer_name: String, persistent: bool },
    TensorConstant { arg: Named, tensor_constant_name: String },
    CustomObj(serde::de::IgnoredAny),
    Token(serde::de::IgnoredAny),
    ConstantInput { name: String },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum OutputSpec {
    UserOutput { arg: Argument },
    LossOutput(serde::de::IgnoredAny),
    BufferMutation(serde::de::IgnoredAny),
    GradientToParameter(serde::de::IgnoredAny),
    GradientToUserInput(serde::de::IgnoredAny),
    UserInputMutation(serde::de::IgnoredAny),
    Token(serde::de::IgnoredAny),
    ParameterMutation(serde::de::IgnoredAny),
}

/// `data/weights/*_weights_config.json` and its twin for constants.
#[derive(Debug, Deserialize)]
pub(crate) struct PayloadConfig {
    pub config: BTreeMap<String, PayloadMeta>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct PayloadMeta {
    pub path_name: String,
    pub use_pickle: bool,
    pub tensor_meta: Option<TensorMeta>,
}

/// The export schema's `ScalarType`, which is not libtorch's.
pub(crate) fn dtype(number: i64) -> Option<DType> {
    match number {
        1 => Some(DType::Uint8),
        2 => Some(DType::Int8),
        3 => Some(DType::Int16),
        4 => Some(DType::Int32),
        5 => Some(DType::Int64),
        6 => Some(DType::Float16),
        7 => Some(DType::Float32),
        8 => Some(DType::Float64),
        12 => Some(DType::Bool),
        13 => Some(DType::BFloat16),
        _ => None,
    }
}

/// The inverse of [`dtype`].
pub(crate) fn dtype_number(dtype: DType) -> i64 {
    match dtype {
        DType::Uint8 => 1,
        DType::Int8 => 2,
        DType::Int16 => 3,
        DType::Int32 => 4,
        DType::Int64 => 5,
        DType::Float16 => 6,
        DType::Float32 => 7,
        DType::Float64 => 8,
        DType::Bool => 12,
        DType::BFloat16 => 13,
    }
}

/// The export schema's `Layout.Strided`.
pub(crate) const STRIDED: i64 = 7;

/// The export schema's `MemoryFormat` in libtorch's numbers: contiguous 0, preserve 1, channels last 2, channels last 3d 3.
pub(crate) fn memory_format(number: i64) -> Option<i64> {
    match number {
        1 => Some(0),
        2 => Some(2),
        3 => Some(3),
        4 => Some(1),
        _ => None,
    }
}
