//! Exact evaluation: counts and sums that every rank ends up holding identically.
//!
//! EVAL-1: the part is cut into fixed batches, whatever the world size; a rank evaluates a contiguous range of them, and the batches'
//!         loss sums are added in batch order on every rank.

use thaw_proto::run::{Evaluation, Position};

/// What one rank found in its batches.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tally {
    /// Sum of cross-entropy per batch, in batch order.
    pub(crate) loss_sums: Vec<f64>,
    /// Row-major `[true][predicted]`.
    pub(crate) confusion: Vec<u64>,
}

impl Tally {
    pub(crate) fn new(classes: usize) -> Self {
        Self { loss_sums: Vec::new(), confusion: vec![0; classes * classes] }
    }

    /// Takes one batch: `losses` and `predictions` per sample.
    pub(crate) fn add(&mut self, labels: &[i64], losses: &[f64], predictions: &[i64]) {
        let classes = self.confusion.len().isqrt();
        self.loss_sums.push(losses.iter().sum());
        for (&label, &predicted) in labels.iter().zip(predictions) {
            let (row, column) = (usize::try_from(label), usize::try_from(predicted));
            if let (Ok(row), Ok(column)) = (row, column)
                && row < classes
                && column < classes
            {
                self.confusion[row * classes + column] += 1;
            }
        }
    }

    /// For the wire: counts first, then the sums, all little-endian.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let counts = self.confusion.iter().flat_map(|count| count.to_le_bytes());
        counts.chain(self.loss_sums.iter().flat_map(|sum| sum.to_le_bytes())).collect()
    }

    /// Reads what [`Tally::to_bytes`] wrote.
    pub(crate) fn from_bytes(bytes: &[u8], classes: usize) -> Option<Self> {
        let mut words = bytes.chunks_exact(8).map(|word| word.try_into().expect("chunks of eight bytes"));
        let confusion: Vec<u64> = words.by_ref().take(classes * classes).map(u64::from_le_bytes).collect();
        let loss_sums = words.map(f64::from_le_bytes).collect();
        (bytes.len().is_multiple_of(8) && confusion.len() == classes * classes).then_some(Self { loss_sums, confusion })
    }
}

/// The evaluation over all ranks' tallies, in rank order.
pub(crate) fn evaluation(position: Position, tallies: &[Tally], classes: usize) -> Evaluation {
    let loss_sum: f64 = tallies.iter().flat_map(|tally| &tally.loss_sums).sum();
    let mut confusion = vec![0u64; classes * classes];
    for tally in tallies {
        for (total, count) in confusion.iter_mut().zip(&tally.confusion) {
            *total += count;
        }
    }
    let samples: u64 = confusion.iter().sum();
    let correct: u64 = (0..classes).map(|class| confusion[class * classes + class]).sum();
    Evaluation {
        position,
        loss: ratio(loss_sum, samples),
        accuracy: ratio(as_f64(correct), samples),
        macro_f1: macro_f1(&confusion, classes),
        samples,
        confusion,
    }
}

/// Mean over classes of `2·tp / (2·tp + fp + fn)`; a class with neither samples nor predictions counts as 0, as in scikit-learn.
fn macro_f1(confusion: &[u64], classes: usize) -> f64 {
    let f1 = |class: usize| {
        let hits = confusion[class * classes + class];
        let samples: u64 = confusion[class * classes..(class + 1) * classes].iter().sum();
        let predictions: u64 = (0..classes).map(|row| confusion[row * classes + class]).sum();
        ratio(as_f64(2 * hits), samples + predictions)
    };
    (0..classes).map(f1).sum::<f64>() / as_f64(classes.max(1) as u64)
}

fn ratio(value: f64, count: u64) -> f64 {
    if count == 0 { 0.0 } else { value / as_f64(count) }
}

#[expect(clippy::cast_precision_loss, reason = "counts of samples stay far below 2^53")]
fn as_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ranks_make_one_evaluation() {
        let mut first = Tally::new(2);
        first.add(&[0, 0, 1], &[1.0, 2.0, 3.0], &[0, 1, 1]);
        let mut second = Tally::new(2);
        second.add(&[1], &[4.0], &[0]);
        let merged = evaluation(Position::default(), &[first, second], 2);
        assert_eq!(merged.samples, 4);
        assert_eq!(merged.loss, 2.5);
        assert_eq!(merged.accuracy, 0.5);
        assert_eq!(merged.confusion, [1, 1, 1, 1]);
        assert_eq!(merged.macro_f1, 0.5);
    }

    #[test]
    fn an_absent_class_counts_as_zero() {
        let mut tally = Tally::new(3);
        tally.add(&[0, 1], &[0.0, 0.0], &[0, 1]);
        let found = evaluation(Position::default(), &[tally], 3);
        assert!((found.macro_f1 - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn a_tally_survives_the_wire() {
        let mut tally = Tally::new(2);
        tally.add(&[0, 1], &[0.25, 0.5], &[1, 1]);
        assert_eq!(Tally::from_bytes(&tally.to_bytes(), 2), Some(tally));
        assert_eq!(Tally::from_bytes(&[0; 7], 2), None);
    }
}
