//! Where a step's time goes, averaged between two reports.

use super::prefix;
use super::replica::StepReport;
use std::time::{Duration, Instant};
use thaw_proto::pb;

/// Wall seconds of one step, or of several; [`pb::StepTime`] says what each is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StepSeconds {
    pub(crate) data_wait: f64,
    pub(crate) forward: f64,
    pub(crate) backward: f64,
    pub(crate) straggler_wait: f64,
    pub(crate) exposed_all_reduce: f64,
    pub(crate) clipping: f64,
    pub(crate) optimizer: f64,
    pub(crate) prefix: f64,
    pub(crate) whole: f64,
    pub(crate) checkpoint: f64,
}

impl StepSeconds {
    fn zip(self, other: Self, mut join: impl FnMut(f64, f64) -> f64) -> Self {
        Self {
            data_wait: join(self.data_wait, other.data_wait),
            forward: join(self.forward, other.forward),
            backward: join(self.backward, other.backward),
            straggler_wait: join(self.straggler_wait, other.straggler_wait),
            exposed_all_reduce: join(self.exposed_all_reduce, other.exposed_all_reduce),
            clipping: join(self.clipping, other.clipping),
            optimizer: join(self.optimizer, other.optimizer),
            prefix: join(self.prefix, other.prefix),
            whole: join(self.whole, other.whole),
            checkpoint: join(self.checkpoint, other.checkpoint),
        }
    }
}

impl From<StepSeconds> for pb::StepTime {
    fn from(seconds: StepSeconds) -> Self {
        Self {
            data_wait: seconds.data_wait,
            forward: seconds.forward,
            backward: seconds.backward,
            straggler_wait: seconds.straggler_wait,
            exposed_all_reduce: seconds.exposed_all_reduce,
            clipping: seconds.clipping,
            optimizer: seconds.optimizer,
            prefix: seconds.prefix,
            whole: seconds.whole,
            checkpoint: seconds.checkpoint,
        }
    }
}

/// Sums since the last report.
pub(crate) struct Pace {
    since: Instant,
    steps: u32,
    samples: u64,
    seconds: StepSeconds,
    all_reduced_bytes: u64,
    prefix: prefix::Counts,
}

pub(crate) struct PaceReport {
    pub(crate) samples_per_second: f64,
    /// Per step.
    pub(crate) seconds: StepSeconds,
    /// Per step.
    pub(crate) all_reduced_bytes: u64,
    pub(crate) prefix: prefix::Counts,
}

impl Pace {
    pub(crate) fn new() -> Self {
        Self {
            since: Instant::now(),
            steps: 0,
            samples: 0,
            seconds: StepSeconds::default(),
            all_reduced_bytes: 0,
            prefix: prefix::Counts::default(),
        }
    }

    pub(crate) fn add(&mut self, report: &StepReport, data_wait: f64, prefix: prefix::Counts, samples: u32) {
        let prefix_seconds = prefix.time.as_secs_f64();
        let whole = prefix_seconds + report.seconds.whole;
        let seconds = StepSeconds { data_wait, prefix: prefix_seconds, whole, ..report.seconds };
        self.seconds = self.seconds.zip(seconds, |sum, more| sum + more);
        self.steps += 1;
        self.samples += u64::from(samples);
        self.all_reduced_bytes += report.all_reduced_bytes;
        self.prefix.add(prefix);
    }

    /// Samples of evaluations, whose time is not a step's.
    pub(crate) fn add_evaluated(&mut self, counts: prefix::Counts) {
        self.prefix.add(counts);
    }

    /// Stood still for a checkpoint, between two steps.
    pub(crate) fn stall(&mut self, time: Duration) {
        self.seconds.checkpoint += time.as_secs_f64();
    }

    pub(crate) fn take(&mut self) -> PaceReport {
        let elapsed = self.since.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
        let steps = self.steps.max(1);
        #[expect(clippy::cast_precision_loss, reason = "samples since the last report are few")]
        let report = PaceReport {
            samples_per_second: self.samples as f64 / elapsed,
            seconds: self.seconds.zip(self.seconds, |sum, _| sum / f64::from(steps)),
            all_reduced_bytes: self.all_reduced_bytes / u64::from(steps),
            prefix: self.prefix,
        };
        *self = Self::new();
        report
    }
}
