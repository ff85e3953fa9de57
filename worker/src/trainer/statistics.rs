//! Running statistics of batch norms over the run's own training samples (adaptive batch normalisation, Li et al. 2017): of all groups before
//! the first stage (`batch_norm.frozen_groups: recompute`), of those trained so far on entering one (`recompute_batch_norm`).
//!
//! STAT-1: what comes out follows from weights and samples alone: fixed batches in the part's order, each rank its share, added in that order
//!         in double precision. So every rank, world size and restart has the same bits.
//! STAT-2: the batch norms of other groups are as in evaluation. While statistics are taken a batch norm normalises by its batch; the variance
//!         over all samples is that within batches plus that between their means.
//! STAT-3: where it fails, the statistics are as they were.

use super::feed;
use super::job::Job;
use super::replica::{self, Replica};
use std::collections::{BTreeMap, BTreeSet};
use thaw_data::index::Part;
use thaw_graph::ir::{Arg, Graph, ValueId};
use thaw_torch::tch::{Kind, Tensor};

/// A last batch below this is left out where there are others: its statistics would be noise.
const SMALLEST_BATCH: usize = 16;
/// What a batch norm is exported with where its node does not say.
const DEFAULT_MOMENTUM: f64 = 0.1;

/// One batch norm: its buffers' names, and what share of a batch's statistics its update takes.
struct Norm {
    mean: String,
    variance: String,
    momentum: f64,
}

/// Replaces the running statistics of all batch norms in `groups` (ascending), unless a newer gang is proposed meanwhile. Returns the groups
/// that have any.
pub(super) fn recompute(
    job: &Job,
    replica: &mut Replica,
    groups: &[usize],
    given_up: &impl Fn() -> bool,
) -> Result<Vec<usize>, super::session::Error> {
    let mut norms = norms(&replica.model().graph().graph);
    let home = |norm: &Norm| {
        let holds =
            |group: &&usize| replica.model().groups()[**group].buffers.iter().any(|(name, _)| *name == norm.mean);
        groups.iter().find(holds).copied()
    };
    let changed: BTreeSet<usize> = norms.iter().filter_map(home).collect();
    norms.retain(|norm| home(norm).is_some());
    if norms.is_empty() {
        return Ok(Vec::new());
    }
    let held = |tensor: &Tensor| (tensor.shallow_clone(), tensor.copy());
    let counters: Vec<(Tensor, Tensor)> = replica.update_counters().into_iter().map(held).collect();
    let before: Vec<(Tensor, Tensor)> = buffers(replica, &norms).iter().map(|(_, tensor)| held(tensor)).collect();
    let found = observe_all(job, replica, &norms, groups, given_up);
    put_back(&counters);
    match found {
        Ok(found) => put(replica, &norms, &found),
        Err(error) => {
            put_back(&before);
            return Err(error);
        }
    }
    tracing::info!(batch_norms = norms.len(), "recomputed batch-norm statistics on the training samples");
    Ok(changed.into_iter().collect())
}

/// The statistics over all training samples, which leaves others in the buffers.
fn observe_all(
    job: &Job,
    replica: &mut Replica,
    norms: &[Norm],
    groups: &[usize],
    given_up: &impl Fn() -> bool,
) -> Result<Vec<f64>, super::session::Error> {
    let samples = job.dataset.index().size(Part::Train);
    let share = replica.evaluation_share(feed::evaluation_batches(samples));
    let mut source = feed::evaluation_source(&job.dataset, Part::Train, share, None)?;
    let mut mine = Vec::new();
    while let Some(micro) = source.next(None, replica.model_mut()) {
        if given_up() {
            return Err(super::session::Error::Superseded);
        }
        let micro = micro?;
        let count = micro.batch.labels.len();
        if count < SMALLEST_BATCH && samples as usize > SMALLEST_BATCH {
            continue;
        }
        let found = observe(replica, norms, groups, &micro)?;
        mine.extend((count as u64).to_le_bytes());
        mine.extend(found.iter().flat_map(|value| value.to_le_bytes()));
    }
    let all = replica.gather(mine)?;
    Ok(combine(&all, norms, replica))
}

/// Gives tensors the values they had.
fn put_back(pairs: &[(Tensor, Tensor)]) {
    for (tensor, before) in pairs {
        let _restored = tensor.shallow_clone().f_copy_(before);
    }
}

fn norms(graph: &Graph) -> Vec<Norm> {
    let name = |value: Option<ValueId>| {
        graph.buffers.iter().find(|buffer| Some(buffer.value) == value).map(|buffer| buffer.name.clone())
    };
    let nodes = graph.nodes.iter().filter(|node| node.operator.contains("batch_norm"));
    let norm = |node: &thaw_graph::ir::Node| {
        let momentum = match node.argument("momentum") {
            Some(Arg::Float(momentum)) => *momentum,
            _ => DEFAULT_MOMENTUM,
        };
        Some(Norm { mean: name(node.tensor("running_mean"))?, variance: name(node.tensor("running_var"))?, momentum })
    };
    nodes.filter_map(norm).filter(|norm| norm.momentum > 0.0).collect()
}

/// Mean and variance of every batch norm over one batch, one after the other.
fn observe(
    replica: &mut Replica,
    norms: &[Norm],
    groups: &[usize],
    micro: &super::prefix::Micro,
) -> Result<Vec<f64>, replica::Error> {
    let zero = |tensor: &Tensor| drop(tensor.shallow_clone().f_zero_());
    let buffers = buffers(replica, norms);
    buffers.iter().for_each(|(_, tensor)| zero(tensor));
    let inputs = replica::input_tensors(&micro.batch, replica.model().master_kind());
    replica.model_mut().observe(&inputs, groups)?;
    // From zero, the update leaves momentum times what the batch had.
    let taken = buffers.into_iter().flat_map(|(momentum, tensor)| {
        let values = Vec::<f64>::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap_or_default();
        values.into_iter().map(move |value| value / momentum)
    });
    Ok(taken.collect())
}

/// Momentum and handle of each norm's mean, then variance.
fn buffers(replica: &Replica, norms: &[Norm]) -> Vec<(f64, Tensor)> {
    let named: BTreeMap<&str, &Tensor> = replica
        .model()
        .groups()
        .iter()
        .flat_map(|group| &group.buffers)
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let both = |norm: &Norm| {
        let handle = |name: &str| named.get(name).map(|tensor| (norm.momentum, tensor.shallow_clone()));
        [handle(&norm.mean), handle(&norm.variance)]
    };
    norms.iter().flat_map(both).flatten().collect()
}

/// The statistics over all batches of all ranks, in order (STAT-1, STAT-2).
fn combine(all: &[Vec<u8>], norms: &[Norm], replica: &Replica) -> Vec<f64> {
    let lengths: Vec<usize> = buffers(replica, norms).iter().map(|(_, tensor)| tensor.numel()).collect();
    let width: usize = lengths.iter().sum();
    let word = |bytes: &[u8]| <[u8; 8]>::try_from(bytes).unwrap_or_default();
    let batches = || {
        all.iter().flat_map(|bytes| bytes.chunks_exact(8 * (1 + width))).map(|batch| {
            #[expect(clippy::cast_precision_loss, reason = "a batch has few samples")]
            let count = u64::from_le_bytes(word(&batch[..8])) as f64;
            (count, batch[8..].chunks_exact(8).map(move |value| f64::from_le_bytes(word(value))))
        })
    };
    let total: f64 = batches().map(|(count, _)| count).sum();
    let mut means = vec![0.0; width];
    for (count, values) in batches() {
        means.iter_mut().zip(values).for_each(|(mean, value)| *mean += value * (count / total));
    }
    // Between batches: of the means around their mean.
    let mut spread = vec![0.0; width];
    for (count, values) in batches() {
        for ((spread, mean), value) in spread.iter_mut().zip(&means).zip(values) {
            *spread += (value - mean).powi(2) * (count / total);
        }
    }
    let mut offset = 0;
    for pair in lengths.chunks_exact(2) {
        let (mean_at, variance_at) = (offset, offset + pair[0]);
        for channel in 0..pair[1] {
            means[variance_at + channel] += spread[mean_at + channel];
        }
        offset = variance_at + pair[1];
    }
    means
}

fn put(replica: &Replica, norms: &[Norm], values: &[f64]) {
    let mut rest = values;
    for (_, tensor) in buffers(replica, norms) {
        let (own, behind) = rest.split_at(tensor.numel());
        rest = behind;
        let _copied = tensor.shallow_clone().f_copy_(&Tensor::from_slice(own).view_as(&tensor));
    }
}
