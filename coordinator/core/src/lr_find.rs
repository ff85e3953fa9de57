//! The learning-rate range test (Smith 2017): what is made of the losses of a stage whose rate rises exponentially.
//!
//! - RANGE-1: losses are smoothed as fastai does it: an exponential mean with weight 0.98, corrected for its start.
//! - RANGE-2: the test has seen enough when the smoothed loss is above four times its best, or no number.
//! - RANGE-3: the suggestion is the middle of the longest falling subsequence (fastai's "valley"), after the first tenth and without the last
//!   five points. Without a fall there is none.

use crate::schedule;
use thaw_proto::spec::LrSchedulerType;

/// Updates of a test.
pub const STEPS: u32 = 100;
/// Rate of the first update.
pub const LOWEST_RATE: f64 = 1e-7;
/// Rate of the last update.
pub const HIGHEST_RATE: f64 = 10.0;

const SMOOTHING: f64 = 0.98;
const DIVERGED: f64 = 4.0;
const LAST_POINTS: usize = 5;

/// One update of the test.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub rate: f64,
    pub loss: f64,
    /// RANGE-1.
    pub smoothed: f64,
}

/// Whether more updates would tell more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Continue,
    /// RANGE-2.
    Diverged,
}

/// The losses so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RangeTest {
    points: Vec<Point>,
    /// Before the correction for its start.
    mean: f64,
}

impl RangeTest {
    /// Takes the loss of the next update, which had this rate.
    pub fn push(&mut self, rate: f64, loss: f64) -> Verdict {
        if !loss.is_finite() {
            return Verdict::Diverged;
        }
        let count = i32::try_from(self.points.len() + 1).unwrap_or(i32::MAX);
        self.mean = SMOOTHING * self.mean + (1.0 - SMOOTHING) * loss;
        let smoothed = self.mean / (1.0 - SMOOTHING.powi(count));
        let best = self.points.iter().map(|point| point.smoothed).fold(f64::INFINITY, f64::min);
        self.points.push(Point { rate, loss, smoothed });
        if smoothed > DIVERGED * best { Verdict::Diverged } else { Verdict::Continue }
    }

    #[must_use]
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// The suggested rate (RANGE-3).
    #[must_use]
    pub fn suggestion(&self) -> Option<f64> {
        let first = STEPS as usize / 10;
        let last = self.points.len().saturating_sub(LAST_POINTS);
        let points = self.points.get(first..last)?;
        let losses: Vec<f64> = points.iter().map(|point| point.smoothed).collect();
        let falls = losses.windows(2).any(|pair| pair[1] < pair[0]);
        if falls { Some(points[valley(&losses)].rate) } else { None }
    }
}

/// The rate of a group whose peak is `peak`, after `step` updates of a test over so many.
#[must_use]
pub fn rate(peak: f64, step: u32, steps: u32) -> f64 {
    peak * schedule::shape(LrSchedulerType::RangeTest, step, steps, 0)
}

/// Index of the middle of the longest falling subsequence; 0 where there are no losses.
#[must_use]
pub fn valley(losses: &[f64]) -> usize {
    // Length of the longest falling subsequence that ends here, and the first index that has the longest.
    let mut lengths = vec![1_usize; losses.len()];
    let mut end = 0_usize;
    for index in 1..losses.len() {
        for earlier in 0..index {
            if losses[index] < losses[earlier] {
                lengths[index] = lengths[index].max(lengths[earlier] + 1);
            }
        }
        if lengths[end] < lengths[index] {
            end = index;
        }
    }
    // As fastai has it: the subsequence begins one before its length says, and a third and half a third are rounded down.
    let span = lengths.get(end).copied().filter(|_| end > 0).unwrap_or(0);
    (end + span / 3 + span / 6).saturating_sub(span)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::reference;
    use proptest::prelude::*;

    /// O7
    #[test]
    fn range_3_the_valley_is_fastais() {
        for curve in reference("valley") {
            let losses: Vec<f64> = serde_json::from_value(curve["losses"].clone()).unwrap();
            assert_eq!(valley(&losses) as u64, curve["index"].as_u64().unwrap(), "{losses:?}");
        }
        assert_eq!(valley(&[]), 0);
    }

    #[test]
    fn range_2_a_test_ends_when_the_loss_explodes() {
        let mut test = RangeTest::default();
        for step in 0..STEPS {
            let rate = rate(HIGHEST_RATE, step, STEPS);
            let loss = if rate < 0.1 { 2.0 - 1.5 * (step as f64 / 80.0) } else { 1000.0 * rate };
            if test.push(rate, loss) == Verdict::Diverged {
                assert!(step > 75 && test.points().len() as u32 == step + 1);
                let suggested = test.suggestion().unwrap();
                assert!((1e-5..1e-1).contains(&suggested), "{suggested}");
                return;
            }
        }
        panic!("the test never ended");
    }

    #[test]
    fn a_loss_that_is_no_number_ends_the_test_and_is_no_point() {
        let mut test = RangeTest::default();
        assert_eq!(test.push(1e-7, 1.0), Verdict::Continue);
        assert_eq!(test.push(1e-6, f64::NAN), Verdict::Diverged);
        assert_eq!((test.points().len(), test.suggestion()), (1, None));
    }

    #[test]
    fn without_a_fall_there_is_no_suggestion() {
        let mut test = RangeTest::default();
        for step in 0..60 {
            let _ = test.push(f64::from(step), 1.0 + f64::from(step));
        }
        assert_eq!(test.suggestion(), None);
    }

    #[test]
    fn rates_run_from_the_lowest_to_the_highest() {
        assert!((rate(HIGHEST_RATE, 0, STEPS) / LOWEST_RATE - 1.0).abs() < 1e-12);
        assert!((rate(HIGHEST_RATE, STEPS - 1, STEPS) / HIGHEST_RATE - 1.0).abs() < 1e-12);
    }

    proptest! {
        /// RANGE-1: smoothing keeps what is constant, and never leaves the range of the losses.
        #[test]
        fn range_1_smoothed_losses_stay_within_the_losses(losses in prop::collection::vec(0.1..9.0_f64, 1..120)) {
            let mut test = RangeTest::default();
            for loss in &losses {
                let _ = test.push(1.0, *loss);
            }
            let (low, high) = losses.iter().fold((f64::INFINITY, 0.0_f64), |(low, high), loss| (low.min(*loss), high.max(*loss)));
            for point in test.points() {
                prop_assert!(point.smoothed >= low - 1e-9 && point.smoothed <= high + 1e-9);
            }
        }
    }
}
