//! One logical shard's part of a step: its micro-batches one after the other, their gradients added up.
//!
//! ACC-1: the gradient that is handed over is the sum over the shard's micro-batches in order, each weighted by its samples' share of the
//!        whole global batch; so it is that of the whole part, however finely it is cut.
//! ACC-2: a shard is seeded once, and its batch norms move their running statistics from micro-batch to micro-batch.

use super::prefix::Micro;
use super::replica::{Error, Settings, StepPlan, input_tensors};
use std::collections::BTreeMap;
use thaw_core::sampler;
use thaw_proto::spec::{ThawedBatchNorm, ThawedBatchNormPolicy};
use thaw_torch::SegmentedModel;
use thaw_torch::model::BatchNorm;
use thaw_torch::runtime;
use thaw_torch::tch::{Kind, Tensor};

/// What a shard's part came to. Times are wall seconds.
#[derive(Default)]
pub(super) struct ShardReport {
    /// Its share of the step's mean loss.
    pub(super) loss: Share,
    /// Its samples' share of the global batch.
    pub(super) weight: f64,
    /// Whether any micro-batch moved the running statistics.
    pub(super) moved_statistics: bool,
    pub(super) forward: f64,
    pub(super) backward: f64,
}

/// A sum of losses: a number, or one that is still on the GPU, since reading it would wait for all that the GPU has to do.
pub(super) enum Share {
    Here(f64),
    OnGpu(Tensor),
}

impl Default for Share {
    fn default() -> Self {
        Self::Here(0.0)
    }
}

impl Share {
    fn add(&mut self, loss: &Tensor, weight: f64) -> Result<(), Error> {
        if !loss.device().is_cuda() {
            return self.add_known(loss.f_double_value(&[]).map_err(Error::Device)? * weight);
        }
        let part = loss.f_to_kind(Kind::Double).and_then(|loss| loss.f_mul_scalar(weight));
        let sum = match self {
            Self::Here(known) => part.and_then(|part| part.f_add_scalar(*known)),
            Self::OnGpu(sum) => part.and_then(|part| sum.f_add(&part)),
        };
        *self = Self::OnGpu(sum.map_err(Error::Device)?);
        Ok(())
    }

    fn add_known(&mut self, more: f64) -> Result<(), Error> {
        *self = Self::Here(self.read()? + more);
        Ok(())
    }

    /// Its value. From a GPU it comes when everything before it is done.
    pub(super) fn read(&self) -> Result<f64, Error> {
        match self {
            Self::Here(value) => Ok(*value),
            Self::OnGpu(value) => value.f_double_value(&[]).map_err(Error::Device),
        }
    }
}

/// Runs `micros`, at least one. `give` gets each trainable group's gradient with whether it is the caller's to keep; else a later step
/// overwrites it.
pub(super) fn run_shard(
    model: &mut SegmentedModel,
    settings: &Settings,
    plan: &StepPlan,
    shard: u32,
    micros: &[Micro],
    give: &mut dyn FnMut(usize, &Tensor, bool),
) -> Result<ShardReport, Error> {
    let mut report = ShardReport::default();
    let mut sums: BTreeMap<usize, Tensor> = BTreeMap::new();
    runtime::manual_seed(sampler::shard_seed(settings.seed, plan.step.0, shard).unsigned_abs())?;
    for (place, micro) in micros.iter().enumerate() {
        let is_last = place + 1 == micros.len();
        let mut take = |group: usize, gradient: &Tensor| match (sums.remove(&group), is_last) {
            (None, true) => give(group, gradient, false),
            (None, false) => drop(sums.insert(group, gradient.copy())),
            (Some(mut sum), _) => {
                let _ = sum.g_add_(gradient);
                if is_last {
                    give(group, &sum, true);
                } else {
                    sums.insert(group, sum);
                }
            }
        };
        let inputs = input_tensors(&micro.batch, model.master_kind());
        let labels = Tensor::from_slice(&micro.batch.labels);
        let weight = settings.weight_of(&micro.batch.labels) / plan.weight;
        let norm = statistics_of(&settings.thawed_batch_norm, micro.batch.labels.len());
        model.set_batch_norm(norm);
        let output = model.train_step(micro.entry(&inputs), &labels, weight, &mut take)?;
        report.loss.add(&output.loss, weight)?;
        report.weight += weight;
        report.moved_statistics |= norm == BatchNorm::BatchStatistics;
        report.forward += output.forward.as_secs_f64();
        report.backward += output.backward.as_secs_f64();
    }
    Ok(report)
}

/// What thawed batch norms normalise a micro-batch of so many samples by.
fn statistics_of(settings: &ThawedBatchNorm, samples: usize) -> BatchNorm {
    let enough = match settings.policy {
        ThawedBatchNormPolicy::Auto => samples >= settings.minimum_batch as usize,
        // One sample may be one value a channel, which has no variance.
        ThawedBatchNormPolicy::BatchStatistics => samples > 1,
        ThawedBatchNormPolicy::FrozenStatistics => false,
    };
    if enough { BatchNorm::BatchStatistics } else { BatchNorm::FrozenStatistics }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_add_up_by_weight_and_a_number_on_the_device_is_one_too() {
        let mut share = Share::default();
        share.add(&Tensor::from(0.5_f64), 0.25).unwrap();
        share.add(&Tensor::from(2.0_f32), 0.5).unwrap();
        assert_eq!(share.read().unwrap(), 1.125);
        assert_eq!(Share::OnGpu(Tensor::from(1.5_f64)).read().unwrap(), 1.5);
    }

    #[test]
    fn thawed_norms_follow_policy_and_size() {
        let of = |policy: &str, samples: usize| {
            let settings = serde_json::json!({"policy": policy, "minimum_batch": 4});
            statistics_of(&serde_json::from_value(settings).unwrap(), samples) == BatchNorm::BatchStatistics
        };
        assert_eq!([of("auto", 3), of("auto", 4)], [false, true]);
        assert_eq!([of("batch_statistics", 1), of("batch_statistics", 2)], [false, true]);
        assert!(!of("frozen_statistics", 64));
    }
}
