//! A model in training: the weights of every layer group in one flat buffer each, and steps that run segment by segment.
//!
//! MODEL-1: a group's parameters are views into its flat buffer, so an update of the buffer moves them. The buffer holds first the
//!          parameters with weight decay, then those without (biases, norms: fewer than two dimensions), each in graph order and each from
//!          a multiple of 64 bytes on; the gaps are zero and stay zero.
//! MODEL-2: frozen means absent: no gradient, no gradient buffer, dropout off, batch statistics neither used nor updated.
//! MODEL-3: backward runs from the head down; a group's gradient is final when it is handed over, before the segment below starts.
//! MODEL-4: gradients are summed in the order of one backward pass over the whole graph, so they equal it bit for bit.
//! MODEL-5: a checkpointed segment draws the same noise the second time and moves no statistics then.

mod load;
mod prefix;
mod state;
mod step;

use std::collections::{BTreeMap, BTreeSet};

use tch::{Device, Kind, Tensor};
use thaw_graph::segment::SegmentedGraph;

use crate::autograd;
pub use crate::executor::Options;
use crate::executor::{self, Beat, Frame, Phase, Program};
pub use load::{WeightBytes, WeightSource};
pub use prefix::Entry;
pub use state::StateTensor;
pub use step::StepOutput;

/// What a weight's reader may fail with.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// Why a model could not be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Program(#[from] executor::Error),
    #[error("cannot read the weight {name}")]
    Weight { name: String, source: SourceError },
    #[error("cannot load the weight {name}: the graph says {expected}, the file has {found}")]
    WeightShape { name: String, expected: String, found: String },
    #[error("cannot load the state of the layer group {group}: {name} is missing")]
    StateMissing { group: String, name: String },
    #[error("cannot load the state of the layer group {group}: {name} does not belong to it")]
    StateUnknown { group: String, name: String },
    #[error("cannot run a batch")]
    Batch(#[from] thaw_graph::guards::Error),
    #[error("cannot run a batch: the input `{name}` must hold {expected}, not {found}")]
    Input { name: String, expected: String, found: String },
    #[error("cannot train: no layer group is trainable; call set_trainable first")]
    NothingTrainable,
    #[error("cannot use the layer group {index}: the model has {groups}")]
    NoSuchGroup { index: usize, groups: usize },
    #[error(
        "cannot enter above the layer group {group}: {found} values were given for {expected} that cross the boundary"
    )]
    Cut { group: String, expected: usize, found: usize },
    #[error("cannot train above the boundary below segment {boundary}: the layer group {lowest} below it is trainable")]
    BoundaryAbove { boundary: usize, lowest: usize },
    #[error("cannot use the model's output: {0} was not computed")]
    NoOutput(String),
    #[error(transparent)]
    Generator(#[from] crate::runtime::Error),
    #[error(transparent)]
    Gradient(#[from] crate::autograd::Error),
    #[error("cannot compute {what}")]
    Tensor { what: &'static str, source: tch::TchError },
    #[error(transparent)]
    Operator(crate::op::Error),
    #[error("cannot compute the loss")]
    Loss(#[source] crate::op::Error),
}

fn tensor_error(what: &'static str) -> impl FnOnce(tch::TchError) -> Error {
    move |source| Error::Tensor { what, source }
}

/// One parameter's place in its group's flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatParameter {
    pub name: String,
    pub shape: Vec<i64>,
    /// Elements from the buffer's start; a multiple of 64 bytes.
    pub offset: usize,
    pub elements: usize,
    /// Whether its elements lie channels last (output, height, width, input) instead of row-major.
    pub channels_last: bool,
    /// Index into the graph's parameters.
    index: usize,
}

impl FlatParameter {
    /// Its part of a flat buffer, in its own shape.
    ///
    /// # Errors
    /// With libtorch's text, where the buffer is another's.
    pub fn view(&self, flat: &Tensor) -> Result<Tensor, Error> {
        self.try_view(flat).map_err(tensor_error("a parameter's view"))
    }

    fn try_view(&self, flat: &Tensor) -> Result<Tensor, tch::TchError> {
        let part = flat.f_narrow(0, load::signed(self.offset), load::signed(self.elements))?;
        match self.shape[..] {
            [outputs, inputs, height, width] if self.channels_last => {
                part.f_view([outputs, height, width, inputs])?.f_permute([0, 3, 1, 2])
            }
            _ => part.f_view(self.shape.as_slice()),
        }
    }
}

/// A layer group's weights.
#[derive(Debug)]
pub struct GroupParameters {
    pub name: String,
    /// All parameters, one-dimensional, in the master type; see MODEL-1.
    pub flat: Tensor,
    /// Elements at its start that take weight decay, gaps included.
    pub decay_elements: usize,
    pub parameters: Vec<FlatParameter>,
    /// Handles to the group's buffers (batch-norm statistics): they share memory with the model's.
    pub buffers: Vec<(String, Tensor)>,
}

impl GroupParameters {
    /// Elements of all parameters, gaps not counted.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.parameters.iter().map(|parameter| parameter.elements).sum()
    }

    /// How its parameters lie in `flat`; apart from the tensors, so that another thread can read a copy of `flat` by it.
    #[must_use]
    pub fn layout(&self) -> FlatLayout {
        let moved = self.parameters.iter().filter(|parameter| parameter.channels_last);
        FlatLayout { channels_last: moved.cloned().collect() }
    }
}

/// How the parameters of a group lie in its flat buffer.
#[derive(Debug, Clone)]
pub struct FlatLayout {
    /// Those that are not row-major.
    channels_last: Vec<FlatParameter>,
}

impl FlatLayout {
    /// A buffer like the group's (weights, a gradient, moments) with every parameter row-major: the form that is saved, whatever the memory
    /// format. Shares memory where nothing lies otherwise.
    ///
    /// # Errors
    /// With libtorch's text.
    pub fn to_row_major(&self, flat: &Tensor) -> Result<Tensor, Error> {
        self.reordered(flat, |parameter, from, to| {
            let row_major = FlatParameter { channels_last: false, ..parameter.clone() };
            row_major.view(to)?.f_copy_(&parameter.view(from)?).map_err(tensor_error("a row-major copy"))
        })
    }

    /// The inverse of [`FlatLayout::to_row_major`].
    ///
    /// # Errors
    /// With libtorch's text.
    pub fn from_row_major(&self, flat: &Tensor) -> Result<Tensor, Error> {
        self.reordered(flat, |parameter, from, to| {
            let row_major = FlatParameter { channels_last: false, ..parameter.clone() };
            parameter.view(to)?.f_copy_(&row_major.view(from)?).map_err(tensor_error("a copy in the memory format"))
        })
    }

    fn reordered(
        &self,
        flat: &Tensor,
        copy: impl Fn(&FlatParameter, &Tensor, &Tensor) -> Result<(), Error>,
    ) -> Result<Tensor, Error> {
        if self.channels_last.is_empty() {
            return Ok(flat.shallow_clone());
        }
        let _mode = crate::autograd::GradMode::set(false);
        let reordered = flat.copy();
        for parameter in &self.channels_last {
            copy(parameter, flat, &reordered)?;
        }
        Ok(reordered)
    }
}

/// What thawed batch norms normalise by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchNorm {
    /// The batch's statistics, which also move the running ones.
    BatchStatistics,
    /// The running statistics, left alone: for micro-batches too small to have statistics.
    FrozenStatistics,
}

/// What a training step minimises: cross-entropy, and how.
#[derive(Debug, Default)]
pub struct Loss {
    /// Share of the target that is spread evenly over all classes.
    pub label_smoothing: f64,
    /// `[classes]`, master type, on the model's device. The loss is the sum of weighted losses over the sum of the samples' weights.
    pub class_weights: Option<Tensor>,
}

/// Where gradients lie: makes room for so many elements of the master type, all zero; `None` where it has none.
pub type GradientMemory = Box<dyn Fn(usize, Kind) -> Option<Tensor> + Send + Sync>;

/// A thawed group's gradient: one flat buffer, and a view of it per parameter.
#[derive(Debug)]
struct GradientBuffer {
    flat: Tensor,
    views: Vec<Tensor>,
}

/// See the module.
#[derive(Debug)]
pub struct SegmentedModel {
    graph: SegmentedGraph,
    program: Program,
    options: Options,
    frame: Frame,
    groups: Vec<GroupParameters>,
    /// By group; `Some` where it is trainable.
    gradients: Vec<Option<GradientBuffer>>,
    /// Index into the graph's parameters → its group.
    owners: BTreeMap<usize, usize>,
    /// Cells that a batch fills.
    transient: Vec<usize>,
    batch_norm: BatchNorm,
    activation_checkpointing: bool,
    /// Indices of the graph's parameters that one operator reads, once.
    read_once: BTreeSet<usize>,
    loss: crate::op::Operator,
    training_loss: Loss,
    /// `aten::contiguous`, where images are to lie channels last.
    channels_last: Option<crate::op::Operator>,
    gradient_memory: Memory,
}

/// libtorch's own memory where there is none.
#[derive(Default)]
struct Memory(Option<GradientMemory>);

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "given" } else { "libtorch's" })
    }
}

impl SegmentedModel {
    /// The layer groups, group 0 nearest the input.
    #[must_use]
    pub fn groups(&self) -> &[GroupParameters] {
        &self.groups
    }

    /// The graph that it runs.
    #[must_use]
    pub fn graph(&self) -> &SegmentedGraph {
        &self.graph
    }

    /// The type of weights, gradients and optimizer state.
    #[must_use]
    pub fn master_kind(&self) -> Kind {
        self.options.precision.master()
    }

    /// Where weights, gradients and optimizer state are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.options.device
    }

    /// Has the gradient buffers of groups that are thawed from now on lie in this memory, where it has room; in libtorch's own without any.
    pub fn set_gradient_memory(&mut self, memory: Option<GradientMemory>) {
        self.gradient_memory = Memory(memory);
    }

    /// Has `beat` called by the thread that runs a batch, after each operator of a forward and each segment of a backward: on a GPU, once it is
    /// enqueued. It must be cheap.
    pub fn set_beat(&mut self, beat: impl Fn() + Send + Sync + 'static) {
        self.frame.beat = Beat(Some(Box::new(beat)));
    }

    /// What training steps minimise from now on; plain cross-entropy at first.
    pub fn set_loss(&mut self, loss: Loss) {
        self.training_loss = loss;
    }

    /// What thawed batch norms do from now on; batch statistics at first.
    pub fn set_batch_norm(&mut self, batch_norm: BatchNorm) {
        self.batch_norm = batch_norm;
    }

    /// Whether a training step keeps only what crosses the cuts between trainable segments, and computes the rest again for backward: less
    /// memory, for the time of a second forward. Off at first. Gradients are the same, bit for bit.
    pub fn set_activation_checkpointing(&mut self, enabled: bool) {
        self.activation_checkpointing = enabled;
    }

    /// Thaws these groups and freezes all others. A group that stays thawed keeps its gradient buffer.
    ///
    /// # Errors
    /// [`Error::NoSuchGroup`]; nothing has changed then.
    pub fn set_trainable(&mut self, groups: &[usize]) -> Result<(), Error> {
        if let Some(index) = groups.iter().find(|index| **index >= self.groups.len()) {
            return Err(Error::NoSuchGroup { index: *index, groups: self.groups.len() });
        }
        for index in 0..self.groups.len() {
            let trainable = groups.contains(&index);
            for parameter in &self.groups[index].parameters {
                let value = self.graph.graph.parameters[parameter.index].value.0 as usize;
                if let Some(tensor) = self.frame.tensor(value) {
                    let _same = tensor.set_requires_grad(trainable);
                }
            }
            if !trainable {
                self.gradients[index] = None;
            } else if self.gradients[index].is_none() {
                self.gradients[index] = Some(GradientBuffer::zeros_for(&self.groups[index], &self.gradient_memory)?);
            }
            self.place_gradients(index);
        }
        Ok(())
    }

    /// Has the gradients of a group's parameters written where they belong, where that is possible (see [`autograd::set_gradient_home`]).
    fn place_gradients(&self, group: usize) {
        for (place, parameter) in self.groups[group].parameters.iter().enumerate() {
            let Some(tensor) = self.parameter(parameter.index) else { continue };
            let home = self.gradients[group].as_ref().map(|buffer| &buffer.views[place]);
            autograd::set_gradient_home(tensor, home.filter(|_| self.read_once.contains(&parameter.index)));
        }
    }

    /// The trainable groups, lowest first.
    #[must_use]
    pub fn trainable(&self) -> Vec<usize> {
        (0..self.groups.len()).filter(|index| self.gradients[*index].is_some()).collect()
    }

    /// How a group runs in a training step.
    fn phase(&self, group: usize) -> Phase {
        if self.gradients[group].is_none() {
            return Phase::EVAL;
        }
        match self.batch_norm {
            BatchNorm::BatchStatistics => Phase::TRAIN,
            BatchNorm::FrozenStatistics => Phase { batch_statistics: false, ..Phase::TRAIN },
        }
    }

    /// The tensor of a parameter, by its index in the graph.
    fn parameter(&self, index: usize) -> Option<&Tensor> {
        self.frame.tensor(self.graph.graph.parameters[index].value.0 as usize)
    }
}

impl GradientBuffer {
    fn zeros_for(group: &GroupParameters, memory: &Memory) -> Result<Self, Error> {
        let failed = || tensor_error("a gradient buffer");
        let given = memory.0.as_ref().and_then(|room| room(group.flat.numel(), group.flat.kind()));
        let flat = given.map_or_else(|| group.flat.f_zeros_like(), Ok).map_err(failed())?;
        let views = group.parameters.iter().map(|parameter| parameter.view(&flat)).collect::<Result<_, _>>()?;
        Ok(Self { flat, views })
    }
}
