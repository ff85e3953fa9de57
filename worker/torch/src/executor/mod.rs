//! Runs a segmented graph, operator by operator.
//!
//! EXE-1: a [`Program`] is compiled once: operators resolved, literals rewritten and converted, aliases followed, last uses known. Running it
//!        looks up nothing by name.
//! EXE-2: what is switched per layer group (dropout, batch statistics) is a [`Phase`] given per block; nothing else differs between training
//!        and evaluation.
//! EXE-3: an operator that writes in place never writes to a value from outside its block (a cut value, an input, a value of the prologue):
//!        the block works on a copy from its start on. Buffers are the exception, and only with batch statistics.
//! EXE-4: a value is dropped after its last use in its block, unless the block gives it on.
//! EXE-5: what depends on nothing is computed once, and stays.

mod alias;
mod compile;
mod fold;
mod numbers;
mod rules;
mod run;

use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use thaw_graph::ir::{DType, Graph};

pub use rules::{MemoryFormat, Precision};

use crate::op::{Cast, Constant, Operator};

/// Why a graph could not be compiled or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot load the graph: libtorch does not know {}; export it again with PyTorch 2.11 and no custom operators", operators.join(", "))]
    Unresolved { operators: Vec<String> },
    #[error("cannot load the node {node}: {operator} has no argument `{argument}`")]
    UnknownArgument { node: String, operator: String, argument: String },
    #[error("cannot load the node {node}: it reads the value {value} that {place} does not define")]
    Undefined { node: String, value: String, place: String },
    #[error("cannot load the node {node}: {operator} writes to the parameter {parameter}")]
    WritesParameter { node: String, operator: String, parameter: String },
    #[error("cannot load the node {node}: {operator} has {results} results, the graph names {named}")]
    Results { node: String, operator: String, results: usize, named: usize },
    #[error("cannot load the node {node}")]
    Literal { node: String, source: crate::op::Error },
    #[error("cannot load the graph: it asks for device or type literals of an unknown kind `{0}`")]
    UnknownLiteral(String),
    #[error("cannot run the node {node} in {place}")]
    Node { node: String, place: String, source: crate::op::Error },
    #[error("cannot run the node {node} in {place}: {message}")]
    Value { node: String, place: String, message: String },
}

/// How a graph is compiled.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub precision: Precision,
    /// Written into the graph's device literals.
    pub device: Device,
    pub memory_format: MemoryFormat,
}

impl Options {
    /// The memory format that suits the graph.
    #[must_use]
    pub fn new(precision: Precision, device: Device) -> Self {
        Self { precision, device, memory_format: MemoryFormat::Automatic }
    }

    /// Whether images and the weights of convolutions lie channels last.
    pub(crate) fn is_channels_last(&self, graph: &Graph) -> bool {
        match self.memory_format {
            MemoryFormat::Contiguous => false,
            MemoryFormat::ChannelsLast => true,
            MemoryFormat::Automatic => rules::prefers_channels_last(graph, self.precision),
        }
    }
}

/// What a layer group does differently in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// Dropout, attention dropout and stochastic depth as exported; else off.
    pub dropout: bool,
    /// Batch norm uses and updates batch statistics as exported; else the running ones, left alone.
    pub batch_statistics: bool,
}

impl Phase {
    /// Evaluation, and frozen groups.
    pub const EVAL: Self = Self { dropout: false, batch_statistics: false };
    /// A thawed group.
    pub const TRAIN: Self = Self { dropout: true, batch_statistics: true };
}

/// A compiled graph.
#[derive(Debug)]
pub struct Program {
    /// Number of values.
    pub(crate) values: usize,
    /// Run once, when the weights are there (EXE-5).
    pub(crate) folded: Block,
    pub(crate) prologue: Block,
    /// One per segment.
    pub(crate) blocks: Vec<Block>,
}

/// A compiled segment, or the prologue.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) name: String,
    pub(crate) instructions: Vec<Instruction>,
    /// Values from outside that the block writes to, copied at its start (EXE-3).
    pub(crate) copies: Vec<usize>,
    /// `aten::clone`.
    pub(crate) copy: Arc<Operator>,
    /// Parameters (indices into the graph's) that it reads.
    pub(crate) parameters: Vec<usize>,
}

#[derive(Debug)]
pub(crate) struct Instruction {
    pub(crate) node: String,
    pub(crate) code: Code,
    /// Where results go; for an operator with a list as its one result, where its elements go.
    pub(crate) outputs: Vec<Option<usize>>,
    /// Cells emptied afterwards.
    pub(crate) frees: Vec<usize>,
}

#[derive(Debug)]
pub(crate) enum Code {
    Call {
        operator: Arc<Operator>,
        operands: Vec<Operand>,
        cast: Cast,
        /// What happens in its place where something is switched off.
        bypass: Option<Bypass>,
    },
    /// Arithmetic on sizes.
    Number { function: numbers::Function, operands: Vec<NumberOperand> },
}

#[derive(Debug)]
pub(crate) enum Operand {
    Default,
    Constant(Constant),
    /// Differs between training and evaluation.
    Switch {
        flag: Flag,
        on: Constant,
        off: Constant,
    },
    Value(usize),
    Ints(Vec<NumberOperand>),
    Tensors(Vec<usize>),
    OptionalTensors(Vec<Option<usize>>),
}

/// A call that is left out unless `flag` is on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bypass {
    pub(crate) flag: Flag,
    /// The call's result instead.
    pub(crate) value: usize,
    /// Whether that value is first filled with ones.
    pub(crate) ones: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flag {
    Dropout,
    BatchStatistics,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum NumberOperand {
    Int(i64),
    Float(f64),
    Bool(bool),
    Value(usize),
}

/// What a value holds while the program runs.
#[derive(Debug)]
pub(crate) enum Cell {
    Empty,
    Tensor(Tensor),
    Int(i64),
    Float(f64),
    Bool(bool),
}

/// The cells of one model: its weights stay, the rest comes and goes with each batch.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) cells: Vec<Cell>,
    pub(crate) beat: Beat,
}

/// What is called after each operator, where somebody wants to see that a batch gets on.
#[derive(Default)]
pub(crate) struct Beat(pub(crate) Option<Box<dyn Fn() + Send + Sync>>);

impl Beat {
    pub(crate) fn call(&self) {
        if let Some(beat) = &self.0 {
            beat();
        }
    }
}

impl std::fmt::Debug for Beat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "beats" } else { "silent" })
    }
}

impl Frame {
    pub(crate) fn new(values: usize) -> Self {
        Self { cells: std::iter::repeat_with(|| Cell::Empty).take(values).collect(), beat: Beat::default() }
    }

    /// The tensor in a cell.
    pub(crate) fn tensor(&self, value: usize) -> Option<&Tensor> {
        match &self.cells[value] {
            Cell::Tensor(tensor) => Some(tensor),
            Cell::Empty | Cell::Int(_) | Cell::Float(_) | Cell::Bool(_) => None,
        }
    }
}

/// libtorch's element type.
#[must_use]
pub fn kind_of(dtype: DType) -> Kind {
    match dtype {
        DType::Uint8 => Kind::Uint8,
        DType::Int8 => Kind::Int8,
        DType::Int16 => Kind::Int16,
        DType::Int32 => Kind::Int,
        DType::Int64 => Kind::Int64,
        DType::Float16 => Kind::Half,
        DType::Float32 => Kind::Float,
        DType::Float64 => Kind::Double,
        DType::BFloat16 => Kind::BFloat16,
        DType::Bool => Kind::Bool,
    }
}

/// The graph's name of an element type, where it has one.
#[must_use]
pub fn dtype_of(kind: Kind) -> Option<DType> {
    Some(match kind {
        Kind::Uint8 => DType::Uint8,
        Kind::Int8 => DType::Int8,
        Kind::Int16 => DType::Int16,
        Kind::Int => DType::Int32,
        Kind::Int64 => DType::Int64,
        Kind::Half => DType::Float16,
        Kind::Float => DType::Float32,
        Kind::Double => DType::Float64,
        Kind::BFloat16 => DType::BFloat16,
        Kind::Bool => DType::Bool,
        _ => return None,
    })
}
