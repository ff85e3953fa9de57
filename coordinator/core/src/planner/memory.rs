//! The most that a trainer's tensors take in a stage.
//!
//! MEM-3: it is the largest of four moments: where a chunk of the frozen prefix is computed, where an evaluation batch is, where a backward pass is
//!        at its height, and where the best weights have just been kept. Each has the weights, gradients, sums and optimizer state beside it.
//! MEM-4: it is stated for a run that learns: each stage's first evaluation finds better weights than any before, so that from then on the best
//!        ones are the stage's own, and before that the last stage's. Where a stage to come restores them, their optimizer state is kept too.
//! MEM-5: the copies that a checkpoint is written from come on top of it, where one is written within the stage, and are stated apart.

use super::{GraphFacts, cost};
use crate::prefix::{Processor, SampleSize, chunk_samples};
use thaw_proto::spec::{Precision, PrefixCacheMode, RunSpec};

/// Samples of an evaluation that are computed at a time, at most.
const EVALUATION_BATCH: u64 = 64;
/// Of a text's token: its id, its mask and its type, eight bytes each.
const TOKEN_BYTES: u64 = 24;

/// What else a stage's peak follows from.
pub(super) struct Stage<'a> {
    /// Ascending.
    pub(super) groups: &'a [usize],
    /// Of the stage before; `None` for the first.
    pub(super) before: Option<&'a [usize]>,
    /// The groups trained so far, this stage's included.
    pub(super) thawed: &'a [bool],
    /// The lowest trainable groups of the stages to come, whose boundaries are computed in the same pass.
    pub(super) later: &'a [usize],
    /// Whether an evaluation comes before the stage's last step.
    pub(super) goes_on_after_an_evaluation: bool,
    pub(super) eval_samples: u64,
    /// Whether a stage to come goes on from the best weights.
    pub(super) restored_later: bool,
}

/// Bytes.
pub(super) fn bytes(spec: &RunSpec, graph: &GraphFacts, stage: &Stage<'_>) -> u64 {
    let element = cost::element_bytes(spec.precision);
    let sum = |groups: &mut dyn Iterator<Item = &super::GroupFacts>| -> u64 {
        groups.map(|group| group.parameters + group.buffers).sum()
    };
    let stored = sum(&mut graph.groups.iter());
    let parameters: u64 = graph.groups.iter().map(|group| group.parameters).sum();
    let ever = sum(&mut graph.groups.iter().zip(stage.thawed).filter(|(_, thawed)| **thawed).map(|(group, _)| group));
    let states = cost::states_per_parameter(spec) + u64::from(spec.ema.is_some());
    let shards_per_trainer = u64::from(spec.logical_shards.div_ceil(spec.workers.max.max(1)));
    // Sums are made in the gradients themselves. With several shards one more buffer holds what is added up; where that is not one node of
    // the tree, the sum needs its own.
    let sums = u64::from(cost::gives_several_parts(spec)) + u64::from(shards_per_trainer > 1);
    let pull = if spec.l2_sp.is_some() { parameters } else { 0 };
    let copies = if spec.precision == Precision::Bf16 { 2 * parameters } else { 0 };
    let trainable = cost::trainable_parameters(graph, stage.groups);
    let always = element * (stored + trainable * (1 + sums + states) + pull + ever) + copies;
    let kept = if stage.restored_later { states } else { 0 };
    let moments = |groups: &[usize]| element * kept * cost::trainable_parameters(graph, groups);
    // The first stage's weights are the best so far as it begins.
    let (first, own) = (moments(stage.before.unwrap_or(stage.groups)), moments(stage.groups));
    let later = if stage.goes_on_after_an_evaluation { first.max(own) } else { first };
    let values = Values { spec, graph, stage, lowest: stage.groups.first().copied().unwrap_or(0) };
    let most = (first + values.prefix()).max(later + values.evaluation()).max(later + values.training()).max(own);
    always + most
}

/// Bytes of what is computed.
struct Values<'a> {
    spec: &'a RunSpec,
    graph: &'a GraphFacts,
    stage: &'a Stage<'a>,
    /// The lowest trainable group.
    lowest: usize,
}

impl Values<'_> {
    fn is_apart(&self) -> bool {
        let trained_below = self.stage.thawed[..self.lowest].contains(&true);
        self.lowest > 0 && self.spec.prefix_cache.mode != PrefixCacheMode::Off && !trained_below
    }

    fn boundary(&self) -> u64 {
        cost::boundary_bytes_per_sample(self.graph, self.stage.groups)
    }

    /// Of one sample: as it is loaded, and once more where images are laid out anew.
    fn input(&self) -> u64 {
        match self.graph.sample {
            SampleSize::Tokens(tokens) => TOKEN_BYTES * tokens,
            SampleSize::Elements(elements) => 4 * elements * (1 + u64::from(self.graph.convolutional)),
        }
    }

    fn alive(&self, groups: std::ops::Range<usize>) -> u64 {
        self.graph.groups[groups].iter().map(|group| group.alive_bytes_per_sample).max().unwrap_or(0)
    }

    /// A chunk, with the boundaries that are taken from it: in the first stage, which computes those of the later ones too.
    fn prefix(&self) -> u64 {
        if !self.is_apart() || self.stage.before.is_some() {
            return 0;
        }
        let cut = |lowest: &usize| self.graph.groups[*lowest].boundary_bytes_per_sample;
        let mut later: Vec<usize> = self.stage.later.iter().copied().filter(|later| *later < self.lowest).collect();
        later.sort_unstable();
        later.dedup();
        let taken: u64 = later.iter().filter(|lowest| **lowest > 0).map(cut).sum();
        self.chunk() * self.scaled(self.input() + self.alive(0..self.lowest) + taken)
    }

    fn chunk(&self) -> u64 {
        chunk_samples(self.spec.prefix_cache.chunk_size, self.graph.sample, Processor::Cpu)
    }

    fn evaluation(&self) -> u64 {
        let samples = self.stage.eval_samples.min(EVALUATION_BATCH);
        let all = self.graph.groups.len();
        let entered = if self.is_apart() {
            self.boundary() + self.alive(self.lowest..all)
        } else {
            self.input() + self.alive(0..all)
        };
        samples * self.scaled(entered)
    }

    /// A micro-batch's backward pass at its height.
    fn training(&self) -> u64 {
        let parts = u64::from(self.spec.gradient_accumulation_steps.max(1));
        let micro = cost::shard_samples(self.spec).div_ceil(parts);
        let above = &self.graph.groups[self.lowest..];
        let head = above.len().saturating_sub(1);
        // What comes from below stays to the end of the step.
        let entered = if self.is_apart() { self.boundary() } else { self.input() + self.boundary() };
        let (mut saved, mut most) = (0, 0);
        for (place, group) in above.iter().enumerate() {
            let dropped = self.spec.activation_checkpointing && place < head;
            // Where activations are computed again, the cuts remain, and one group's own at a time.
            let now = saved + group.saved_bytes_per_sample + group.rise_bytes_per_sample;
            most = most.max(micro * self.scaled(entered + now) + self.in_elements(group.weight_gradient_bytes));
            saved += if dropped {
                above.get(place + 1).map_or(0, |next| next.boundary_bytes_per_sample)
            } else {
                group.saved_bytes_per_sample
            };
        }
        // A frozen prefix that runs in the step comes first.
        let below = if self.is_apart() { 0 } else { micro * self.scaled(self.input() + self.alive(0..self.lowest)) };
        most.max(below)
    }

    /// Values of four bytes an element as the run has them.
    fn scaled(&self, bytes: u64) -> u64 {
        match self.spec.precision {
            Precision::Fp32 => bytes,
            Precision::Fp64 => 2 * bytes,
            // Matrix products and what follows them take half; norms and losses do not.
            Precision::Bf16 => bytes / 2,
        }
    }

    /// Gradients of weights, which have the weights' own type.
    fn in_elements(&self, bytes: u64) -> u64 {
        bytes / 4 * cost::element_bytes(self.spec.precision)
    }
}
