//! A batch through the model: evaluation, and a training step.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};
use thaw_graph::guards;
use thaw_graph::ir::{DType, GraphInput};

use super::{Entry, Error, Loss, SegmentedModel, tensor_error};
use crate::autograd::{self, GradMode};
use crate::executor::{Cell, Phase, dtype_of};
use crate::op::Value;
use crate::runtime::{self, GeneratorState};

/// As libtorch numbers memory formats.
const CHANNELS_LAST: i64 = 2;

/// What a training step gives besides gradients.
#[derive(Debug)]
pub struct StepOutput {
    /// Mean cross-entropy of the batch before its weight: no dimensions, master type, detached.
    pub loss: Tensor,
    /// On a GPU these are the times to enqueue, unless the caller synchronises.
    pub forward: Duration,
    /// Without the time spent in the callback.
    pub backward: Duration,
}

/// What one segment's backward needs.
struct Record {
    /// Detached cut values from below.
    inputs: Vec<(usize, Tensor)>,
    /// Cut values for above.
    outputs: Vec<(usize, Tensor)>,
}

/// A segment that has run.
enum Forward {
    Recorded(Record),
    Dropped(Checkpoint),
}

/// What it takes to run a segment again just as it ran.
struct Checkpoint {
    /// Detached cut values from below, with their wish for a gradient.
    inputs: Vec<(usize, Tensor)>,
    generator: GeneratorState,
}

/// Gradients that wait for a lower segment.
#[derive(Default)]
struct Pending {
    /// By cut value.
    cuts: BTreeMap<usize, Tensor>,
    /// By index into the graph's parameters.
    parameters: BTreeMap<usize, Tensor>,
}

impl SegmentedModel {
    /// Logits of a batch in evaluation, without gradient: [batch, classes], master type.
    ///
    /// # Errors
    /// [`Error::Input`] where the batch does not fit the graph, else what its operators say.
    pub fn forward<'a>(&mut self, entry: impl Into<Entry<'a>>) -> Result<Tensor, Error> {
        let _mode = GradMode::set(false);
        let result = self
            .enter(&entry.into())
            .and_then(|first| self.run_frozen(first..self.groups.len()))
            .and_then(|()| self.logits());
        self.clear();
        result
    }

    /// Runs a batch without gradient and without dropout; the batch norms of `groups` (ascending) normalise by it and move their running
    /// statistics.
    ///
    /// # Errors
    /// As [`SegmentedModel::forward`].
    pub fn observe(&mut self, inputs: &[Tensor], groups: &[usize]) -> Result<(), Error> {
        let phase = |group| Phase { dropout: false, batch_statistics: groups.binary_search(&group).is_ok() };
        let _mode = GradMode::set(false);
        let result = self.enter(&Entry::Inputs(inputs)).and_then(|_| {
            let mut blocks = self.program.blocks.iter().enumerate();
            Ok(blocks.try_for_each(|(group, block)| block.run(&mut self.frame, phase(group)))?)
        });
        self.clear();
        result
    }

    /// One forward and backward of a batch; the weights stay as they are.
    ///
    /// The gradient is that of `weight` times the mean cross-entropy against `labels` (i64, `[batch]`). Each trainable group's flat gradient
    /// goes to `on_group` with the group's index as soon as it is final, from the head down; it lies in a buffer that the next step reuses.
    ///
    /// # Errors
    /// [`Error::NothingTrainable`], [`Error::Input`], else what libtorch says.
    pub fn train_step<'a>(
        &mut self,
        entry: impl Into<Entry<'a>>,
        labels: &Tensor,
        weight: f64,
        on_group: &mut dyn FnMut(usize, &Tensor),
    ) -> Result<StepOutput, Error> {
        let result = self.step(&entry.into(), labels, weight, on_group);
        self.clear();
        result
    }

    fn step(
        &mut self,
        entry: &Entry<'_>,
        labels: &Tensor,
        weight: f64,
        on_group: &mut dyn FnMut(usize, &Tensor),
    ) -> Result<StepOutput, Error> {
        let started = Instant::now();
        let boundary = self.trainable().first().copied().ok_or(Error::NothingTrainable)?;
        {
            let _mode = GradMode::set(false);
            let first = self.enter(entry)?;
            self.run_frozen(first..boundary)?;
        }
        let _mode = GradMode::set(true);
        let mut records = Vec::new();
        for segment in boundary..self.groups.len() {
            // The head's backward comes at once, so nothing of it is dropped.
            let is_head = segment + 1 == self.groups.len();
            records.push(if self.activation_checkpointing && !is_head {
                Forward::Dropped(self.forward_and_drop(segment, segment == boundary)?)
            } else {
                Forward::Recorded(self.forward_segment(segment, segment == boundary)?)
            });
        }
        let loss = self.cross_entropy(labels)?;
        let forward = started.elapsed();
        let backward = self.backward(boundary, records, &loss, weight, on_group)?;
        Ok(StepOutput { loss: loss.detach(), forward, backward })
    }

    /// Puts a batch into the frame, checked against the graph: sizes, then element types.
    pub(super) fn bind(&mut self, inputs: &[Tensor]) -> Result<(), Error> {
        let graph = &self.graph.graph;
        let shapes: Vec<Vec<i64>> = inputs.iter().map(Tensor::size).collect();
        guards::bind(graph, &shapes)?;
        for (slot, tensor) in graph.inputs.iter().zip(inputs) {
            let value = slot.value.0 as usize;
            if let Some(meta) = &graph.values[value].tensor {
                check_kind(slot, meta.dtype, tensor.kind())?;
            }
            let kind = if tensor.is_floating_point() { self.master_kind() } else { tensor.kind() };
            let moved = runtime::send(tensor, self.options.device, kind);
            let mut moved = moved.map_err(tensor_error("an input on the device"))?;
            if let Some(contiguous) = &self.channels_last
                && moved.dim() == 4
            {
                moved = contiguous
                    .call_tensor(&[Value::Tensor(&moved), Value::MemoryFormat(CHANNELS_LAST)])
                    .map_err(Error::Operator)?;
            }
            self.frame.cells[value] = Cell::Tensor(moved);
        }
        Ok(())
    }

    /// Segments as in evaluation. The caller has switched gradients off.
    pub(super) fn run_frozen(&mut self, segments: Range<usize>) -> Result<(), Error> {
        for block in &self.program.blocks[segments] {
            block.run(&mut self.frame, Phase::EVAL)?;
        }
        Ok(())
    }

    /// Runs a segment on detached inputs, so that its backward can run alone.
    fn forward_segment(&mut self, segment: usize, lowest: bool) -> Result<Record, Error> {
        let cut = &self.graph.segments[segment];
        let mut inputs = Vec::new();
        for value in cut.inputs.iter().map(|value| value.0 as usize) {
            let Some(tensor) = self.frame.tensor(value) else { continue };
            let needs_gradient = !lowest && tensor.requires_grad();
            let detached = tensor.f_detach().map_err(tensor_error("a detached cut"))?;
            if needs_gradient {
                let leaf = detached.set_requires_grad(true);
                inputs.push((value, leaf.shallow_clone()));
                self.frame.cells[value] = Cell::Tensor(leaf);
            } else {
                self.frame.cells[value] = Cell::Tensor(detached);
            }
        }
        let phase = self.phase(segment);
        self.program.blocks[segment].run(&mut self.frame, phase)?;
        let outputs = self.graph.segments[segment].outputs.iter().map(|value| value.0 as usize);
        let outputs = outputs.filter_map(|value| Some((value, self.frame.tensor(value)?.shallow_clone())));
        let outputs = outputs.filter(|(_, tensor)| tensor.requires_grad()).collect();
        Ok(Record { inputs, outputs })
    }

    /// Runs a segment and drops its record: what remains are its outputs, detached, and a way to run it again.
    ///
    /// It runs with recording all the same, since kernels may choose their path by what requires a gradient.
    fn forward_and_drop(&mut self, segment: usize, lowest: bool) -> Result<Checkpoint, Error> {
        let generator = GeneratorState::of(self.options.device)?;
        let values = self.graph.segments[segment].inputs.iter().map(|value| value.0 as usize);
        let inputs = values.filter_map(|value| Some((value, detached(self.frame.tensor(value)?))));
        let inputs =
            inputs.map(|(value, tensor)| Ok((value, tensor?))).collect::<Result<Vec<(usize, Tensor)>, Error>>()?;
        let record = self.forward_segment(segment, lowest)?;
        for (value, output) in record.outputs {
            self.frame.cells[value] = Cell::Tensor(detached(&output)?);
        }
        Ok(Checkpoint { inputs, generator })
    }

    /// Runs a dropped segment again, with the same noise, and leaves generator and buffers as they are (MODEL-5).
    fn forward_again(&mut self, segment: usize, lowest: bool, checkpoint: Checkpoint) -> Result<Record, Error> {
        let after = GeneratorState::of(self.options.device)?;
        checkpoint.generator.restore()?;
        for (value, tensor) in checkpoint.inputs {
            self.frame.cells[value] = Cell::Tensor(tensor);
        }
        let mut buffers = Vec::new();
        for index in &self.graph.segments[segment].buffers {
            let value = self.graph.graph.buffers[*index].value.0 as usize;
            let Some(tensor) = self.frame.tensor(value) else { continue };
            let own = tensor.shallow_clone();
            self.frame.cells[value] = Cell::Tensor(tensor.copy());
            buffers.push((value, own));
        }
        let record = self.forward_segment(segment, lowest);
        for (value, own) in buffers {
            self.frame.cells[value] = Cell::Tensor(own);
        }
        after.restore()?;
        record
    }

    fn logits(&self) -> Result<Tensor, Error> {
        let output = self.graph.graph.output.0 as usize;
        let missing = || Error::NoOutput(self.graph.graph.values[output].name.clone());
        let logits = self.frame.tensor(output).ok_or_else(missing)?;
        logits.f_to_kind(self.master_kind()).map_err(tensor_error("the logits"))
    }

    fn cross_entropy(&self, labels: &Tensor) -> Result<Tensor, Error> {
        let labels = runtime::send(labels, self.options.device, Kind::Int64);
        let labels = labels.map_err(tensor_error("the labels on the device"))?;
        let logits = self.logits()?;
        let Loss { label_smoothing, class_weights } = &self.training_loss;
        let weights = class_weights.as_ref().map_or(Value::None, Value::Tensor);
        let mean = Value::Int(1);
        let arguments = [
            Value::Tensor(&logits),
            Value::Tensor(&labels),
            weights,
            mean,
            Value::Default,
            Value::Float(*label_smoothing),
        ];
        self.loss.call_tensor(&arguments).map_err(Error::Loss)
    }

    /// Backward from the head down to `boundary`. Returns the time it took without the callback.
    fn backward(
        &mut self,
        boundary: usize,
        mut records: Vec<Forward>,
        loss: &Tensor,
        weight: f64,
        on_group: &mut dyn FnMut(usize, &Tensor),
    ) -> Result<Duration, Error> {
        let finishing = self.groups_by_last_segment(boundary);
        let mut pending = Pending::default();
        let mut spent = Duration::ZERO;
        for segment in (boundary..self.groups.len()).rev() {
            let started = Instant::now();
            let record = match records.pop().expect("one record per segment that ran") {
                Forward::Recorded(record) => record,
                Forward::Dropped(checkpoint) => self.forward_again(segment, segment == boundary, checkpoint)?,
            };
            let is_head = segment + 1 == self.groups.len();
            let head = if is_head { Some((loss, self.loss_gradient(loss, weight)?)) } else { None };
            self.backward_segment(segment, record, head, &mut pending)?;
            self.frame.beat.call();
            spent += started.elapsed();
            for group in finishing.get(&segment).into_iter().flatten() {
                let started = Instant::now();
                self.write_gradient(*group, &mut pending)?;
                spent += started.elapsed();
                if let Some(buffer) = &self.gradients[*group] {
                    on_group(*group, &buffer.flat);
                }
            }
        }
        Ok(spent)
    }

    /// The gradient that the loss starts with; `None` stands for one.
    fn loss_gradient(&self, loss: &Tensor, weight: f64) -> Result<Option<Tensor>, Error> {
        #[expect(clippy::float_cmp, reason = "exactly one needs no multiplication")]
        if weight == 1.0 {
            return Ok(None);
        }
        let full =
            loss.f_detach().and_then(|like| like.f_full_like(weight)).map_err(tensor_error("the loss's weight"))?;
        Ok(Some(full))
    }

    /// One segment's gradients into `pending`: by its cut values from below and by the trainable parameters it reads.
    fn backward_segment(
        &self,
        segment: usize,
        record: Record,
        head: Option<(&Tensor, Option<Tensor>)>,
        pending: &mut Pending,
    ) -> Result<(), Error> {
        let is_trainable = |index: &usize| self.owners.get(index).is_some_and(|group| self.gradients[*group].is_some());
        let indices: Vec<usize> =
            self.program.blocks[segment].parameters.iter().copied().filter(is_trainable).collect();
        let mut roots: Vec<(Tensor, Option<Tensor>)> = Vec::new();
        match head {
            Some((loss, gradient)) => roots.push((loss.shallow_clone(), gradient)),
            None => {
                for (value, output) in record.outputs {
                    if let Some(gradient) = pending.cuts.remove(&value) {
                        roots.push((output, Some(gradient)));
                    }
                }
            }
        }
        let mut leaves: Vec<Tensor> = Vec::new();
        for index in &indices {
            let leaf = self.parameter(*index).expect("every parameter of a group is loaded").shallow_clone();
            // A tied parameter's gradient so far comes first, as in one pass over the whole graph (MODEL-4).
            if let Some(gradient) = pending.parameters.remove(index) {
                roots.push((leaf.shallow_clone(), Some(gradient)));
            }
            leaves.push(leaf);
        }
        leaves.extend(record.inputs.iter().map(|(_, leaf)| leaf.shallow_clone()));
        roots.retain(|(root, _)| root.requires_grad());
        if roots.is_empty() || leaves.is_empty() {
            return Ok(());
        }
        let outputs: Vec<(&Tensor, Option<&Tensor>)> =
            roots.iter().map(|(root, gradient)| (root, gradient.as_ref())).collect();
        let gradients = autograd::grad(&outputs, &leaves.iter().collect::<Vec<_>>())?;
        let mut gradients = gradients.into_iter();
        for (index, gradient) in indices.into_iter().zip(gradients.by_ref()) {
            pending.parameters.extend(gradient.map(|gradient| (index, gradient)));
        }
        for ((value, _), gradient) in record.inputs.into_iter().zip(gradients) {
            pending.cuts.extend(gradient.map(|gradient| (value, gradient)));
        }
        Ok(())
    }

    /// Segment → trainable groups whose gradient is final after it, highest first. A tied parameter makes a group wait for its lowest reader.
    fn groups_by_last_segment(&self, boundary: usize) -> BTreeMap<usize, Vec<usize>> {
        let mut finishing: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for group in self.trainable().into_iter().rev() {
            let reads = |segment: &usize| {
                let parameters = &self.program.blocks[*segment].parameters;
                parameters.iter().any(|index| self.owners.get(index) == Some(&group))
            };
            let last = (boundary..group).find(reads).unwrap_or(group);
            finishing.entry(last).or_default().push(group);
        }
        finishing
    }

    /// Copies a group's gradients into its flat buffer; zeros where a parameter was not used.
    fn write_gradient(&mut self, group: usize, pending: &mut Pending) -> Result<(), Error> {
        let _mode = GradMode::set(false);
        let Some(buffer) = &mut self.gradients[group] else { return Ok(()) };
        for (parameter, view) in self.groups[group].parameters.iter().zip(&mut buffer.views) {
            let written = match pending.parameters.remove(&parameter.index) {
                // Already in its place.
                Some(gradient) if gradient.data_ptr() == view.data_ptr() => Ok(()),
                Some(gradient) => view.f_copy_(&gradient),
                None => view.f_zero_().map(drop),
            };
            written.map_err(tensor_error("a flat gradient"))?;
        }
        Ok(())
    }

    /// Empties the cells of the batch.
    pub(super) fn clear(&mut self) {
        for value in &self.transient {
            self.frame.cells[*value] = Cell::Empty;
        }
    }
}

/// The same memory without its history, and with the same wish for a gradient.
fn detached(tensor: &Tensor) -> Result<Tensor, Error> {
    let wish = tensor.requires_grad();
    let detached = tensor.f_detach().map_err(tensor_error("a detached cut"))?;
    Ok(detached.set_requires_grad(wish))
}

/// Any floating type will do for a floating input: it becomes the master type.
fn check_kind(input: &GraphInput, expected: DType, found: Kind) -> Result<(), Error> {
    let found_dtype = dtype_of(found);
    let both_float = expected.is_float() && found_dtype.is_some_and(DType::is_float);
    if both_float || found_dtype == Some(expected) {
        return Ok(());
    }
    Err(Error::Input { name: input.name.clone(), expected: format!("{expected:?}"), found: format!("{found:?}") })
}
