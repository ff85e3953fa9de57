//! How many trainers of a stage pay, by the cost model, before anything was measured.
//!
//! SIZE-1: `workers.min` to `workers.max`; a stage that says its own number keeps it.
//! SIZE-2: the most of which each makes at least [`LEAST_EFFICIENCY`] of what one alone would, on common processor cores and a common network. What
//!         runs the frozen prefix in its first epochs counts with the share of these in the stage.

use super::strategy::Draft;
use super::{GraphFacts, cost, work};
use crate::step_time::Rates;
use thaw_proto::spec::{PrefixCacheMode, RunSpec, WorkerSizing};

/// Of a trainer's time, least share that goes into what it would do alone.
const LEAST_EFFICIENCY: f64 = 0.5;
/// Bytes a second between two trainers: ten gigabit Ethernet.
const NETWORK_BYTES: f64 = 1.25e9;
/// Seconds until the other has a message.
const LATENCY: f64 = 1e-4;
/// Of a stage that patience alone ends.
const USUAL_EPOCHS: u32 = 10;

/// The stage's most trainers, where not all that the run may have; `thawed`: the groups trained so far, this stage's included.
pub(super) fn of_stage(
    spec: &RunSpec,
    graph: &GraphFacts,
    draft: &Draft,
    thawed: &[bool],
    steps_per_epoch: u32,
) -> Option<u32> {
    match (draft.workers, spec.workers.sizing) {
        (Some(given), _) => Some(given),
        (None, WorkerSizing::Most) => None,
        (None, WorkerSizing::ByCost) => {
            let uncached_share = uncached_share(spec, draft, steps_per_epoch);
            let seconds = |trainers| step_seconds(spec, graph, &draft.groups, thawed, uncached_share, trainers);
            Some(most_that_pay(spec, seconds))
        }
    }
}

fn most_that_pay(spec: &RunSpec, seconds: impl Fn(u32) -> f64) -> u32 {
    let alone = seconds(1);
    let shards = |trainers: u32| spec.logical_shards.div_ceil(trainers);
    let pays = |trainers: &u32| alone >= LEAST_EFFICIENCY * f64::from(*trainers) * seconds(*trainers);
    // One more is of no use where the fullest trainer has as many shards as before.
    let is_faster = |trainers: &u32| shards(*trainers) < shards(trainers - 1);
    let (min, max) = (spec.workers.min, spec.workers.max);
    (min + 1..=max).filter(is_faster).filter(pays).last().unwrap_or(min)
}

/// Of all steps, those that run the frozen prefix although a cache keeps it: of the first epoch, or of each view's.
fn uncached_share(spec: &RunSpec, draft: &Draft, steps_per_epoch: u32) -> f64 {
    let by_steps = draft.until.max_steps.map(|steps| steps.div_ceil(steps_per_epoch.max(1)));
    let limits = [draft.until.max_epochs, by_steps, draft.until.early_stopping.map(|_| USUAL_EPOCHS)];
    let epochs = limits.into_iter().flatten().min().unwrap_or(USUAL_EPOCHS).max(1);
    let first = match spec.augmentation() {
        None => 1,
        Some(_) => spec.prefix_cache.views.unwrap_or(epochs),
    };
    f64::from(first.min(epochs)) / f64::from(epochs)
}

/// Of a gang of so many, on average over the stage.
#[expect(clippy::cast_precision_loss, reason = "estimates")]
fn step_seconds(
    spec: &RunSpec,
    graph: &GraphFacts,
    groups: &[usize],
    thawed: &[bool],
    uncached_share: f64,
    trainers: u32,
) -> f64 {
    let mut sized = spec.clone();
    sized.workers.max = trainers;
    let cached = Rates::COMMON.seconds(&work::of_stage(&sized, graph, groups, thawed));
    sized.prefix_cache.mode = PrefixCacheMode::Off;
    let uncached = Rates::COMMON.seconds(&work::of_stage(&sized, graph, groups, thawed));
    let own = uncached_share * uncached + (1.0 - uncached_share) * cached;
    if trainers == 1 {
        return own;
    }
    // Halves are summed and handed round, beside the backward pass; the messages' way is not hidden.
    let bytes = 2.0 * cost::all_reduce_bytes(spec, graph, groups) as f64;
    own.max(bytes / NETWORK_BYTES) + 2.0 * LATENCY * f64::from(trainers).log2().ceil()
}
