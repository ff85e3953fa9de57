//! The shapes a prefix is computed in: functions of a sample's length and the spec, of nothing else (PFX-1).

use crate::trainer::job::Job;
use thaw_data::index::Part;
use thaw_graph::ir::Dim;

/// Texts are padded up to a multiple of this.
const TOKEN_STEP: usize = 16;
/// Tokens of a chunk, about: enough for a matrix product to run at full speed, few enough that a rare length wastes little.
const CHUNK_TOKENS: usize = 1024;
/// Elements of a chunk of images, about (eight of 3 x 224 x 224).
const CHUNK_ELEMENTS: usize = 8 * 3 * 224 * 224;
/// Samples of a chunk, at least and at most.
const CHUNK_SAMPLES: (usize, usize) = (8, 64);

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Shapes {
    /// Samples per chunk, where the spec says.
    given: Option<usize>,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Texts {
        /// Longest text; the graph takes no longer one.
        longest: usize,
        /// Whether the graph takes one length only.
        fixed: bool,
    },
    Images {
        /// Of one sample.
        elements: usize,
    },
}

impl Shapes {
    pub(super) fn of(job: &Job) -> Self {
        let graph = &job.graph.graph;
        let meta = graph.inputs.first().and_then(|input| graph.value(input.value).tensor.as_ref());
        let kind = match meta {
            Some(meta) if !meta.dtype.is_float() => Kind::Texts {
                longest: job.longest_text as usize,
                fixed: matches!(meta.shape.get(1), Some(Dim::Known(_))),
            },
            Some(_) | None => {
                let shape = graph.inputs.first().and_then(|input| graph.hinted_shape(input.value)).unwrap_or_default();
                let elements: i64 = shape.iter().skip(1).product();
                Kind::Images { elements: usize::try_from(elements).unwrap_or(1).max(1) }
            }
        };
        Self { given: job.spec.prefix_cache.chunk_size.map(|size| size as usize), kind }
    }

    pub(super) fn are_texts(&self) -> bool {
        matches!(self.kind, Kind::Texts { .. })
    }

    /// Columns that a text of so many tokens is computed in; 0 for images.
    pub(super) fn class(&self, length: Option<u32>) -> usize {
        match (&self.kind, length) {
            (Kind::Texts { longest, fixed: true }, _) => *longest,
            (Kind::Texts { longest, fixed: false }, Some(length)) => {
                (length as usize).next_multiple_of(TOKEN_STEP).min(*longest).max(length as usize)
            }
            (Kind::Texts { .. }, None) | (Kind::Images { .. }, _) => 0,
        }
    }

    /// Samples of a chunk of that class.
    pub(super) fn samples(&self, class: usize) -> usize {
        let derived = match &self.kind {
            Kind::Texts { .. } => CHUNK_TOKENS / class.max(1),
            Kind::Images { elements } => CHUNK_ELEMENTS / elements,
        };
        self.given.unwrap_or(derived.clamp(CHUNK_SAMPLES.0, CHUNK_SAMPLES.1))
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
