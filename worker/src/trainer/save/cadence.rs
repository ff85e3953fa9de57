//! How often to save: so often that what saving takes from training stays a given share of it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Before anything is measured, and at least between two saves: what a loss may cost at most then.
const SHORTEST: Duration = Duration::from_secs(10);
/// Of the last so many saves the dearest counts.
const REMEMBERED: usize = 3;
/// Share of the newest step in the usual step time.
const NEWEST: f64 = 0.2;

/// What a save costs is how much longer steps take while it is written, and how long training stood still for it.
#[derive(Debug)]
pub(super) struct Cadence {
    /// Updates between saves, where the spec says so.
    every: Option<u32>,
    max_overhead: f64,
    last: Instant,
    /// Seconds.
    costs: VecDeque<f64>,
    /// Seconds of a step while nothing is written.
    usual: Option<f64>,
    /// Of the save in flight so far, seconds.
    cost: Option<f64>,
}

impl Cadence {
    pub(super) fn new(every: Option<u32>, max_overhead: f64) -> Self {
        let (last, costs) = (Instant::now(), VecDeque::new());
        Self { every, max_overhead, last, costs, usual: None, cost: None }
    }

    /// Whether a save is due after `step` updates.
    pub(super) fn is_due(&self, step: u64) -> bool {
        match self.every {
            Some(every) => step.is_multiple_of(u64::from(every)),
            None => self.last.elapsed() >= self.interval(),
        }
    }

    fn interval(&self) -> Duration {
        let dearest = self.costs.iter().copied().fold(0.0, f64::max);
        // Far beyond any run, and in the range of a duration.
        SHORTEST.max(Duration::from_secs_f64((dearest / self.max_overhead).min(1e9)))
    }

    /// A stage's steps take their own time.
    pub(super) fn enter_stage(&mut self) {
        self.usual = None;
    }

    /// A save was handed to the writer, which took the training thread `stall`.
    pub(super) fn began(&mut self, stall: Duration) {
        self.last = Instant::now();
        self.cost = Some(self.cost.unwrap_or(0.0) + stall.as_secs_f64());
    }

    /// A step took `seconds`; `idle`: nothing is being written any more.
    pub(super) fn step(&mut self, seconds: f64, idle: bool) {
        if let Some(cost) = &mut self.cost {
            *cost += self.usual.map_or(0.0, |usual| seconds - usual);
        } else {
            self.usual = Some(self.usual.map_or(seconds, |usual| usual + NEWEST * (seconds - usual)));
        }
        if idle && let Some(cost) = self.cost.take() {
            if self.costs.len() == REMEMBERED {
                self.costs.pop_front();
            }
            self.costs.push_back(cost.max(0.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_between_saves_are_obeyed() {
        let cadence = Cadence::new(Some(20), 0.03);
        assert_eq!([19, 20, 21, 40].map(|step| cadence.is_due(step)), [false, true, false, true]);
    }

    #[test]
    fn the_interval_follows_what_saving_took() {
        let mut cadence = Cadence::new(None, 0.02);
        assert_eq!(cadence.interval(), SHORTEST);
        cadence.step(1.0, true);
        cadence.began(Duration::from_millis(250));
        cadence.step(1.5, false);
        cadence.step(1.25, true);
        // A quarter at once, then a half and a quarter longer.
        assert_eq!(cadence.interval(), Duration::from_secs(50));
        for _ in 0..REMEMBERED {
            cadence.began(Duration::ZERO);
            cadence.step(0.9, true);
        }
        assert_eq!(cadence.interval(), SHORTEST);
    }
}
