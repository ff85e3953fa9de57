//! Which samples go where: the batches of a stage's steps and of an evaluation, loaded ahead.

use super::prefix::{self, Prefix, Source};
use super::replica::ShardBatch;
use std::ops::Range;
use thaw_core::sampler::{self, ShardSampler};
use thaw_data::batch::Dataset;
use thaw_data::index::Part;
use thaw_data::prefetch::Work;
use thaw_proto::plan::Plan;
use thaw_torch::SegmentedModel;

/// Samples per evaluation batch; fixed, so that evaluation does not depend on the world size (EVAL-1).
const EVALUATION_BATCH: u32 = 64;
/// Steps loaded ahead.
const AHEAD: usize = 4;

/// The samples of every shard at every step.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    samplers: Vec<ShardSampler>,
    shards: u32,
    steps_per_epoch: u32,
}

impl Order {
    pub(crate) fn new(plan: &Plan, seed: u64, shard_sizes: &[u64]) -> Self {
        let shards = plan.logical_shards;
        let sampler = |shard: u32| ShardSampler {
            seed,
            shard,
            len: u32::try_from(shard_sizes[shard as usize]).expect("the index counts samples in 32 bits"),
            batch: sampler::shard_batch(plan.global_batch_size, shards, shard),
        };
        Self { samplers: (0..shards).map(sampler).collect(), shards, steps_per_epoch: plan.steps_per_epoch }
    }

    /// Positions in the training part that `shard` takes at `stage_step` of a stage that began with epoch `first_epoch`.
    pub(crate) fn samples(&self, first_epoch: u32, stage_step: u32, shard: u32) -> Vec<u32> {
        let (epoch, step) = (stage_step / self.steps_per_epoch, stage_step % self.steps_per_epoch);
        let within = self.samplers[shard as usize].micro_batch(first_epoch + epoch, step);
        within.into_iter().map(|index| shard + index * self.shards).collect()
    }

    /// Samples of a step over all shards.
    pub(crate) fn step_size(&self, stage_step: u32) -> u32 {
        let step = stage_step % self.steps_per_epoch;
        let size =
            |sampler: &ShardSampler| sampler.len.saturating_sub(step.saturating_mul(sampler.batch)).min(sampler.batch);
        self.samplers.iter().map(size).sum()
    }
}

/// The batches of one rank's shards from a step of a stage on, step by step.
pub(crate) struct Feed {
    source: Source,
    shards: Range<u32>,
}

impl Feed {
    pub(crate) fn start(
        dataset: &Dataset,
        order: Order,
        first_epoch: u32,
        steps: Range<u32>,
        shards: Range<u32>,
        prefix: Option<&Prefix>,
    ) -> Result<Self, prefix::Error> {
        let of_step = shards.clone();
        let work = steps.flat_map(move |step| {
            let order = order.clone();
            of_step
                .clone()
                .map(move |shard| Work { part: Part::Train, samples: order.samples(first_epoch, step, shard) })
        });
        let ahead = AHEAD * shards.len();
        Ok(Self { source: Source::start(dataset, work, ahead, prefix)?, shards })
    }

    /// The next step's batches in shard order; `None` after the last step.
    pub(crate) fn next(
        &mut self,
        mut prefix: Option<&mut Prefix>,
        model: &mut SegmentedModel,
    ) -> Option<Result<Vec<ShardBatch>, prefix::Error>> {
        let mut batches = Vec::with_capacity(self.shards.len());
        for shard in self.shards.clone() {
            match self.source.next(prefix.as_deref_mut(), model)? {
                Ok(micro) => batches
                    .push(ShardBatch { shard, micro: Some(micro).filter(|micro| !micro.batch.labels.is_empty()) }),
                Err(error) => return Some(Err(error)),
            }
        }
        Some(Ok(batches))
    }
}

/// How many fixed batches a part of `samples` samples is evaluated in.
pub(crate) fn evaluation_batches(samples: u32) -> u32 {
    samples.div_ceil(EVALUATION_BATCH)
}

/// The given range of a part's fixed evaluation batches.
pub(crate) fn evaluation_source(
    dataset: &Dataset,
    part: Part,
    batches: Range<u32>,
    prefix: Option<&Prefix>,
) -> Result<Source, prefix::Error> {
    let size = dataset.index().size(part);
    let work = batches.map(move |batch| {
        let start = batch * EVALUATION_BATCH;
        Work { part, samples: (start..(start + EVALUATION_BATCH).min(size)).collect() }
    });
    Source::start(dataset, work, AHEAD, prefix)
}
