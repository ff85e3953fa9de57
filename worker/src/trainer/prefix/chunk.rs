//! The shapes a prefix is computed in: functions of a sample's length and the spec, of nothing else (PFX-1).

use crate::trainer::job::Job;
use thaw_core::prefix::{Processor, SampleSize, chunk_samples};
use thaw_core::sampler;
use thaw_data::index::Part;
use thaw_graph::ir::Dim;
use thaw_proto::plan::PlannedStage;
use thaw_torch::tch::Device;

/// Texts are padded up to a multiple of this.
const TOKEN_STEP: usize = 8;

/// Samples that a prefix is run for at a time, at most, and bytes of what it gives: they wait in memory for their steps.
const WINDOW_SAMPLES: usize = 256;
const WINDOW_BYTES: u64 = 64 << 20;

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Shapes {
    /// Samples per chunk, where the spec says.
    given: Option<u32>,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Texts {
        /// Longest text; the graph takes no longer one.
        longest: usize,
        /// Whether the graph takes one length only.
        fixed: bool,
        on: Processor,
    },
    Images {
        /// Of one sample.
        elements: usize,
    },
}

impl Shapes {
    pub(super) fn of(job: &Job, device: Device) -> Self {
        let graph = &job.graph.graph;
        let meta = graph.inputs.first().and_then(|input| graph.value(input.value).tensor.as_ref());
        let kind = match meta {
            Some(meta) if !meta.dtype.is_float() => Kind::Texts {
                longest: job.longest_text as usize,
                fixed: matches!(meta.shape.get(1), Some(Dim::Known(_))),
                on: if device.is_cuda() { Processor::Gpu } else { Processor::Cpu },
            },
            Some(_) | None => {
                let shape = graph.inputs.first().and_then(|input| graph.hinted_shape(input.value)).unwrap_or_default();
                let elements: i64 = shape.iter().skip(1).product();
                Kind::Images { elements: usize::try_from(elements).unwrap_or(1).max(1) }
            }
        };
        Self { given: job.spec.prefix_cache.chunk_size, kind }
    }

    pub(super) fn are_texts(&self) -> bool {
        matches!(self.kind, Kind::Texts { .. })
    }

    /// Columns that a text of so many tokens is computed in; 0 for images.
    pub(super) fn class(&self, length: Option<u32>) -> usize {
        match (&self.kind, length) {
            (Kind::Texts { longest, fixed: true, .. }, _) => *longest,
            (Kind::Texts { longest, fixed: false, .. }, Some(length)) => {
                (length as usize).next_multiple_of(TOKEN_STEP).min(*longest).max(length as usize)
            }
            (Kind::Texts { .. }, None) | (Kind::Images { .. }, _) => 0,
        }
    }

    /// Samples of a chunk of that class.
    pub(super) fn samples(&self, class: usize) -> usize {
        let (size, on) = match &self.kind {
            Kind::Texts { on, .. } => (SampleSize::Tokens(class as u64), *on),
            Kind::Images { elements } => (SampleSize::Elements(*elements as u64), Processor::Cpu),
        };
        usize::try_from(chunk_samples(self.given, size, on)).expect("a chunk is a number of samples that fit in memory")
    }

    /// Steps that the prefix is run for at a time, the same on every rank (PFX-4).
    pub(super) fn steps_ahead(&self, job: &Job, stage: &PlannedStage, world_size: u32) -> usize {
        let Kind::Texts { fixed: false, .. } = self.kind else { return 1 };
        let (batch, shards) = (job.plan.global_batch_size, job.plan.logical_shards);
        // Of the rank that has most.
        let samples = sampler::shard_batch(batch, shards, 0).saturating_mul(shards.div_ceil(world_size.max(1)));
        let fit = usize::try_from(WINDOW_BYTES / stage.boundary_bytes_per_sample.max(1)).unwrap_or(usize::MAX);
        (WINDOW_SAMPLES.min(fit) / samples.max(1) as usize).max(1)
    }

    /// How many samples to look ahead for companions of a chunk.
    pub(super) fn ahead(&self, part: Part) -> usize {
        match (&self.kind, part) {
            // Lengths differ, so a class needs a wide choice to fill its chunks.
            (Kind::Texts { fixed: false, .. }, _) => 512,
            (Kind::Texts { fixed: true, .. } | Kind::Images { .. }, Part::Train | Part::Eval | Part::Test) => {
                2 * self.samples(self.class(None))
            }
        }
    }
}
