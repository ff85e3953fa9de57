//! Building a model: weights into flat buffers, views into the frame.

use std::collections::{BTreeMap, BTreeSet};

use tch::{Kind, Tensor};
use thaw_graph::ir::{DType, Graph, Node, ValueId, Weight};
use thaw_graph::segment::{Segment, SegmentedGraph};

use super::{
    BatchNorm, Error, FlatParameter, GroupParameters, Loss, Options, SegmentedModel, SourceError, tensor_error,
};
use crate::autograd::{self, GradMode};
use crate::executor::{Cell, Frame, Phase, Precision, Program, kind_of};
use crate::op;

/// A parameter's alignment in its flat buffer: kernels may choose their path by it, and a parameter on its own is aligned so.
const ALIGNMENT_BYTES: usize = 64;

/// A weight: element type, shape, raw little-endian bytes.
pub type WeightBytes = (DType, Vec<i64>, Vec<u8>);

/// Reads a weight by its dotted name.
pub type WeightSource<'a> = dyn FnMut(&str) -> Result<WeightBytes, SourceError> + 'a;

impl SegmentedModel {
    /// Compiles the graph and loads its weights. All groups are frozen at first.
    ///
    /// # Errors
    /// [`Error::Program`] where the graph cannot run, [`Error::Weight`] and [`Error::WeightShape`] where a weight is missing or another.
    pub fn new(graph: SegmentedGraph, weights: &mut WeightSource<'_>, options: Options) -> Result<Self, Error> {
        // Without them libtorch's own run.
        let _registered = autograd::register_kernels();
        let program = Program::compile(&graph, &options)?;
        let is_channels_last = options.is_channels_last(&graph.graph);
        let mut loader = Loader { frame: Frame::new(program.values), source: weights, options, is_channels_last };
        let _mode = GradMode::set(false);
        let mut owners = BTreeMap::new();
        let mut groups = Vec::new();
        for (index, segment) in graph.segments.iter().enumerate() {
            owners.extend(segment.parameters.iter().map(|parameter| (*parameter, index)));
            groups.push(loader.group(&graph, segment)?);
        }
        // Buffers of no group are those of the prologue, which never change.
        for weight in graph.graph.buffers.iter().chain(&graph.graph.constants) {
            if matches!(loader.frame.cells[weight.value.0 as usize], Cell::Empty) {
                let _handle = loader.whole(weight)?;
            }
        }
        program.folded.run(&mut loader.frame, Phase::EVAL)?;
        let transient = loader.frame.cells.iter().enumerate().filter(|(_, cell)| matches!(cell, Cell::Empty));
        let transient = transient.map(|(index, _)| index).collect();
        let gradients = groups.iter().map(|_| None).collect();
        let loss = op::resolve("aten::cross_entropy_loss", "").map_err(Error::Loss)?;
        let channels_last = is_channels_last.then(|| op::resolve("aten::contiguous", "")).transpose();
        let channels_last = channels_last.map_err(Error::Operator)?;
        let read_once = read_once(&graph.graph);
        let frame = loader.frame;
        Ok(Self {
            graph,
            program,
            options,
            frame,
            groups,
            gradients,
            owners,
            transient,
            batch_norm: BatchNorm::BatchStatistics,
            activation_checkpointing: false,
            read_once,
            loss,
            training_loss: Loss::default(),
            channels_last,
            gradient_memory: super::Memory::default(),
        })
    }
}

struct Loader<'a, 's> {
    frame: Frame,
    source: &'a mut WeightSource<'s>,
    options: Options,
    is_channels_last: bool,
}

impl Loader<'_, '_> {
    fn group(&mut self, graph: &SegmentedGraph, segment: &Segment) -> Result<GroupParameters, Error> {
        let master = self.options.precision.master();
        let (mut parameters, decay_elements, total) = layout(&graph.graph.parameters, &segment.parameters, master);
        for parameter in &mut parameters {
            parameter.channels_last = self.is_channels_last && parameter.shape.len() == 4;
        }
        let failed = || tensor_error("a flat weight buffer");
        let flat = Tensor::f_zeros([signed(total)], (master, self.options.device)).map_err(failed())?;
        for parameter in &parameters {
            let weight = &graph.graph.parameters[parameter.index];
            let values = self.read(weight)?;
            let mut place = parameter.view(&flat)?;
            place.f_copy_(&values).map_err(failed())?;
            let leaf = place.f_detach().map_err(failed())?;
            if self.options.precision == Precision::Bf16 {
                autograd::keep_half_copy(&leaf);
            }
            self.frame.cells[weight.value.0 as usize] = Cell::Tensor(leaf);
        }
        let mut buffers = Vec::new();
        for index in &segment.buffers {
            let weight = &graph.graph.buffers[*index];
            buffers.push((weight.name.clone(), self.whole(weight)?));
        }
        Ok(GroupParameters { name: segment.name.clone(), flat, decay_elements, parameters, buffers })
    }

    /// Loads a weight that is not in a flat buffer. Returns another handle to it.
    fn whole(&mut self, weight: &Weight) -> Result<Tensor, Error> {
        let values = self.read(weight)?;
        let kind = if weight.dtype.is_float() { self.options.precision.master() } else { values.kind() };
        let tensor = values
            .f_to_device(self.options.device)
            .and_then(|tensor| tensor.f_to_kind(kind))
            .map_err(tensor_error("a buffer"))?;
        let handle = tensor.shallow_clone();
        self.frame.cells[weight.value.0 as usize] = Cell::Tensor(tensor);
        Ok(handle)
    }

    fn read(&mut self, weight: &Weight) -> Result<Tensor, Error> {
        let (dtype, shape, bytes) =
            (self.source)(&weight.name).map_err(|source| Error::Weight { name: weight.name.clone(), source })?;
        if dtype != weight.dtype || shape != weight.shape {
            return Err(Error::WeightShape {
                name: weight.name.clone(),
                expected: format!("{:?} {:?}", weight.dtype, weight.shape),
                found: format!("{dtype:?} {shape:?}"),
            });
        }
        tensor_from_bytes(&weight.name, dtype, &shape, &bytes)
    }
}

/// Indices of the parameters that one operator reads, once.
fn read_once(graph: &Graph) -> BTreeSet<usize> {
    let mut reads: BTreeMap<ValueId, usize> = BTreeMap::new();
    for value in graph.nodes.iter().flat_map(Node::reads) {
        *reads.entry(value).or_default() += 1;
    }
    let parameters = graph.parameters.iter().enumerate();
    parameters.filter(|(_, weight)| reads.get(&weight.value) == Some(&1)).map(|(index, _)| index).collect()
}

/// Where each parameter lies: those with weight decay first, each in graph order. Also the first part's length and the whole's.
fn layout(weights: &[Weight], indices: &[usize], master: Kind) -> (Vec<FlatParameter>, usize, usize) {
    let mut sorted = indices.to_vec();
    sorted.sort_unstable();
    let step = ALIGNMENT_BYTES / master.elt_size_in_bytes();
    let mut parameters = Vec::new();
    let (mut offset, mut decay_elements) = (0, 0);
    for decays in [true, false] {
        for index in sorted.iter().filter(|index| (weights[**index].shape.len() >= 2) == decays) {
            let weight = &weights[*index];
            let elements = weight.shape.iter().map(|size| usize::try_from(*size).unwrap_or(0)).product();
            parameters.push(FlatParameter {
                name: weight.name.clone(),
                shape: weight.shape.clone(),
                offset,
                elements,
                channels_last: false,
                index: *index,
            });
            offset = (offset + elements).next_multiple_of(step);
        }
        if decays {
            decay_elements = offset;
        }
    }
    (parameters, decay_elements, offset)
}

pub(super) fn signed(count: usize) -> i64 {
    i64::try_from(count).expect("a buffer has fewer than 2^63 elements")
}

/// A tensor from raw little-endian bytes.
pub(super) fn tensor_from_bytes(name: &str, dtype: DType, shape: &[i64], bytes: &[u8]) -> Result<Tensor, Error> {
    let elements: i64 = shape.iter().product();
    let expected = usize::try_from(elements).unwrap_or(0) * dtype.size();
    if bytes.len() != expected {
        return Err(Error::WeightShape {
            name: name.to_owned(),
            expected: format!("{expected} bytes"),
            found: format!("{} bytes", bytes.len()),
        });
    }
    if bytes.is_empty() {
        return Tensor::f_zeros(shape, (kind_of(dtype), tch::Device::Cpu)).map_err(tensor_error("an empty weight"));
    }
    Tensor::f_from_data_size(bytes, shape, kind_of(dtype)).map_err(tensor_error("a weight from its bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decayed_parameters_come_first_and_each_is_aligned() {
        let weight = |name: &str, shape: &[i64]| Weight {
            value: ValueId(0),
            name: name.to_owned(),
            dtype: DType::Float32,
            shape: shape.to_vec(),
            flag: true,
        };
        let weights = [
            weight("a.bias", &[3]),
            weight("a.weight", &[3, 7]),
            weight("other", &[2, 2]),
            weight("b.weight", &[2, 3]),
        ];
        let (parameters, decay, total) = layout(&weights, &[3, 1, 0], Kind::Float);
        let places: Vec<_> =
            parameters.iter().map(|place| (place.name.as_str(), place.offset, place.elements)).collect();
        assert_eq!(places, [("a.weight", 0, 21), ("b.weight", 32, 6), ("a.bias", 48, 3)]);
        assert_eq!((decay, total), (48, 64));
    }
}
