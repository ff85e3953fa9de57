//! A model entered at a boundary: the frozen prefix run on its own, and what it gave put in its place.
//!
//! PREFIX-1: a prefix runs without gradient and in evaluation, whatever is trainable above it.
//! PREFIX-2: entering with what [`SegmentedModel::prefix`] gave, and running from the inputs, compute the same for a batch of that shape.

use tch::{Kind, Tensor};
use thaw_graph::boundary::{Boundary, CutDim, InputNeed};
use thaw_graph::ir::Dim;

use super::{Error, SegmentedModel, tensor_error};
use crate::autograd::GradMode;
use crate::executor::{Cell, Phase, kind_of};
use crate::runtime;

/// Where a batch enters the model.
#[derive(Debug, Clone, Copy)]
pub enum Entry<'a> {
    /// The graph's inputs, each `[batch, ...]`.
    Inputs(&'a [Tensor]),
    /// At a boundary.
    Cut {
        boundary: &'a Boundary,
        /// What crosses it, each `[batch, ...]`, in the boundary's order; on any device.
        values: &'a [Tensor],
        /// The graph's inputs; needed where the boundary says [`InputNeed::Contents`].
        inputs: Option<&'a [Tensor]>,
    },
}

impl<'a> From<&'a [Tensor]> for Entry<'a> {
    fn from(inputs: &'a [Tensor]) -> Self {
        Self::Inputs(inputs)
    }
}

impl<'a> From<&'a Vec<Tensor>> for Entry<'a> {
    fn from(inputs: &'a Vec<Tensor>) -> Self {
        Self::Inputs(inputs)
    }
}

impl<'a, const N: usize> From<&'a [Tensor; N]> for Entry<'a> {
    fn from(inputs: &'a [Tensor; N]) -> Self {
        Self::Inputs(inputs)
    }
}

impl SegmentedModel {
    /// What crosses each of the boundaries for a batch, `[batch, ...]` each, detached; boundaries in any order.
    ///
    /// # Errors
    /// [`Error::Input`] where the batch does not fit the graph, else what its operators say.
    pub fn prefix(&mut self, inputs: &[Tensor], boundaries: &[&Boundary]) -> Result<Vec<Vec<Tensor>>, Error> {
        let _mode = GradMode::set(false);
        let result = self.bind(inputs).and_then(|()| self.run_prefix(boundaries));
        self.clear();
        result
    }

    fn run_prefix(&mut self, boundaries: &[&Boundary]) -> Result<Vec<Vec<Tensor>>, Error> {
        self.program.prologue.run(&mut self.frame, Phase::EVAL)?;
        let mut found: Vec<Vec<Tensor>> = boundaries.iter().map(|_| Vec::new()).collect();
        let top = boundaries.iter().map(|boundary| boundary.segment).max().unwrap_or(0);
        for segment in 0..top {
            self.run_frozen(segment..segment + 1)?;
            for (boundary, found) in boundaries.iter().zip(&mut found) {
                if boundary.segment == segment + 1 {
                    *found = self.crossing(boundary)?;
                }
            }
        }
        Ok(found)
    }

    fn crossing(&self, boundary: &Boundary) -> Result<Vec<Tensor>, Error> {
        let value = |cut: &thaw_graph::CutValue| {
            let missing = || Error::NoOutput(self.graph.graph.value(cut.value).name.clone());
            Ok(self.frame.tensor(cut.value.0 as usize).ok_or_else(missing)?.shallow_clone())
        };
        boundary.values.iter().map(value).collect()
    }

    /// Puts a batch into the frame and runs the prologue. Returns the first segment that is still to run.
    pub(super) fn enter(&mut self, entry: &Entry<'_>) -> Result<usize, Error> {
        let (boundary, values, inputs) = match entry {
            Entry::Inputs(inputs) => {
                self.bind(inputs)?;
                self.program.prologue.run(&mut self.frame, Phase::EVAL)?;
                return Ok(0);
            }
            Entry::Cut { boundary, values, inputs } => (boundary, values, inputs),
        };
        if values.len() != boundary.values.len() {
            let group = self.groups[boundary.segment].name.clone();
            return Err(Error::Cut { group, expected: boundary.values.len(), found: values.len() });
        }
        if let Some(lowest) = self.trainable().first().filter(|lowest| **lowest < boundary.segment) {
            return Err(Error::BoundaryAbove { boundary: boundary.segment, lowest: *lowest });
        }
        if boundary.prologue {
            match inputs {
                Some(inputs) => self.bind(inputs)?,
                None => self.bind(&self.placeholders(boundary, values)?)?,
            }
            self.program.prologue.run(&mut self.frame, Phase::EVAL)?;
        }
        for (cut, value) in boundary.values.iter().zip(*values) {
            let value = runtime::send(value, self.options.device, value.kind());
            self.frame.cells[cut.value.0 as usize] = Cell::Tensor(value.map_err(tensor_error("a cut on the device"))?);
        }
        Ok(boundary.segment)
    }

    /// Inputs of the right sizes without contents, for a boundary above which nobody reads these.
    fn placeholders(&self, boundary: &Boundary, values: &[Tensor]) -> Result<Vec<Tensor>, Error> {
        debug_assert!(boundary.inputs < InputNeed::Contents, "contents are given");
        let graph = &self.graph.graph;
        let batch = values.first().and_then(|value| value.size().first().copied()).unwrap_or(0);
        let tokens = boundary.values.iter().zip(values).find_map(|(cut, value)| {
            (cut.dims.first() == Some(&CutDim::Tokens)).then(|| value.size().get(1).copied()).flatten()
        });
        let zero = |kind: Kind| Tensor::f_zeros([1], (kind, self.options.device));
        let placeholder = |input: &thaw_graph::ir::GraphInput| {
            let hints = graph.hinted_shape(input.value).unwrap_or_default();
            let meta = graph.value(input.value).tensor.as_ref();
            let dims = meta.map_or(&[][..], |meta| meta.shape.as_slice());
            let size = |(position, dim): (usize, &Dim)| match (position, dim) {
                (0, _) => batch,
                (_, Dim::Known(size)) => *size,
                (1, Dim::Symbolic(_)) => tokens.unwrap_or(hints[1]),
                (position, Dim::Symbolic(_)) => hints[position],
            };
            let shape: Vec<i64> = dims.iter().enumerate().map(size).collect();
            let kind = meta.map_or(Kind::Float, |meta| kind_of(meta.dtype));
            zero(kind).and_then(|zero| zero.f_expand(&shape, false)).map_err(tensor_error("a batch's sizes"))
        };
        graph.inputs.iter().map(placeholder).collect()
    }
}
