//! Which samples go where: the batches of a stage's steps and of an evaluation, loaded ahead.

use super::prefix::{self, Prefix, Source};
use super::replica::ShardBatch;
use std::ops::Range;
use std::sync::Arc;
use thaw_core::sampler::{self, ShardSampler};
use thaw_data::augment::View;
use thaw_data::batch::Dataset;
use thaw_data::index::Part;
use thaw_data::prefetch::Work;
use thaw_proto::plan::Plan;
use thaw_proto::spec::RunSpec;
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
    spec: Arc<RunSpec>,
}

impl Order {
    pub(crate) fn new(plan: &Plan, spec: &RunSpec, shard_sizes: &[u64]) -> Self {
        let seed = spec.seed;
        let shards = plan.logical_shards;
        let sampler = |shard: u32| ShardSampler {
            seed,
            shard,
            len: u32::try_from(shard_sizes[shard as usize]).expect("the index counts samples in 32 bits"),
            batch: sampler::shard_batch(plan.global_batch_size, shards, shard),
        };
        Self {
            samplers: (0..shards).map(sampler).collect(),
            shards,
            steps_per_epoch: plan.steps_per_epoch,
            spec: Arc::new(spec.clone()),
        }
    }

    /// Positions in the training part that `shard` takes at `stage_step` of a stage that began with epoch `first_epoch`.
    pub(crate) fn samples(&self, first_epoch: u32, stage_step: u32, shard: u32) -> Vec<u32> {
        let (epoch, step) = (stage_step / self.steps_per_epoch, stage_step % self.steps_per_epoch);
        let within = self.samplers[shard as usize].micro_batch(first_epoch + epoch, step);
        within.into_iter().map(|index| shard + index * self.shards).collect()
    }

    /// The view that all samples of a step are taken in.
    pub(crate) fn view(&self, first_epoch: u32, stage_step: u32) -> Option<View> {
        sampler::view(&self.spec, first_epoch + stage_step / self.steps_per_epoch).map(View)
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
    /// Micro-batches of a shard's part.
    parts: u32,
}

impl Feed {
    pub(crate) fn start(
        dataset: &Dataset,
        order: Order,
        first_epoch: u32,
        steps: Range<u32>,
        shards: Range<u32>,
        parts: u32,
        prefix: Option<&Prefix>,
    ) -> Result<Self, prefix::Error> {
        let of_step = shards.clone();
        let work = steps.flat_map(move |step| {
            let order = order.clone();
            of_step.clone().flat_map(move |shard| {
                let samples = order.samples(first_epoch, step, shard);
                let view = order.view(first_epoch, step);
                (0..parts).map(move |part| Work {
                    part: Part::Train,
                    samples: samples[cut(samples.len(), part, parts)].to_vec(),
                    view,
                })
            })
        });
        let micros = shards.len() * parts as usize;
        let window = prefix.map_or(1, Prefix::steps_ahead) * micros;
        Ok(Self { source: Source::start(dataset, work, AHEAD * micros, window, prefix)?, shards, parts })
    }

    /// The next step's batches in shard order; `None` after the last step.
    pub(crate) fn next(
        &mut self,
        mut prefix: Option<&mut Prefix>,
        model: &mut SegmentedModel,
    ) -> Option<Result<Vec<ShardBatch>, prefix::Error>> {
        let mut batches = Vec::with_capacity(self.shards.len());
        for shard in self.shards.clone() {
            let mut micros = Vec::with_capacity(self.parts as usize);
            for _ in 0..self.parts {
                match self.source.next(prefix.as_deref_mut(), model)? {
                    Ok(micro) => micros.extend(Some(micro).filter(|micro| !micro.batch.labels.is_empty())),
                    Err(error) => return Some(Err(error)),
                }
            }
            batches.push(ShardBatch { shard, micros });
        }
        Some(Ok(batches))
    }
}

/// Part `part` of `parts` contiguous ones of about equal size; empty ones where there are fewer items.
fn cut(items: usize, part: u32, parts: u32) -> Range<usize> {
    let bound = |part: u32| items * part as usize / parts as usize;
    bound(part)..bound(part + 1)
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
        Work { part, samples: (start..(start + EVALUATION_BATCH).min(size)).collect(), view: None }
    });
    Source::start(dataset, work, AHEAD, 1, prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_items_in_order() {
        for (items, parts) in [(16, 4), (7, 3), (2, 5), (0, 2)] {
            let cuts: Vec<_> = (0..parts).map(|part| cut(items, part, parts)).collect();
            assert_eq!((cuts[0].start, cuts[cuts.len() - 1].end), (0, items));
            assert!(cuts.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(cuts.iter().all(|cut| cut.len() <= items.div_ceil(parts as usize)));
        }
    }
}
