//! How long a step takes: the work that the plan counts, each kind of it at a rate, and the rates from steps that were measured.
//!
//! TIME-1: a step's time is a sum over kinds of work (a constant, kernels, operations, bytes of activations, bytes of weights), none negative.
//! TIME-2: rates are calibrated on the stages of a run that came first, and say how long the others take; a stage that was calibrated on is no
//!         prediction, and is said to be none.
//! TIME-3: what the measured stages do not tell apart keeps the proportions of a common processor core: what takes time whatever the sizes,
//!         and what follows the sizes, each to its own kind first.

use thaw_proto::plan::{Plan, StepWork};

/// Stages of a run that rates are calibrated on, its first: one tells the constant, since a head is next to no work, one the rest.
pub const CALIBRATING_STAGES: usize = 2;

const KINDS: usize = 5;
/// Seconds of each kind of work on a common core: a constant a step, a kernel, an operation, a byte of activations (partly in caches), a byte of
/// weights, gradients or optimizer state (from memory). Only their proportions matter once anything was measured.
const COMMON: [f64; KINDS] = [3e-4, 3e-6, 1.0 / 150e9, 1.0 / 30e9, 1.0 / 15e9];
/// Kinds that do not follow the sizes: the constant and the kernels.
const FIXED_KINDS: usize = 2;
/// How strongly rates are held to those proportions, among kinds that follow the sizes and among those that do not; the squared relative error of
/// one measurement weighs 1.
const HELD: f64 = 1e-3;
/// The same, between the two.
const HELD_ACROSS: f64 = 1e-6;

/// Seconds of each kind of work.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates([f64; KINDS]);

/// What a stage's step took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSeconds {
    /// From the batch to the updated weights.
    pub whole: f64,
    /// Of these in the update; `None` where that is not known.
    pub update: Option<f64>,
}

/// What the work of a stage and the calibrated rates say of its step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// `None` where nothing was measured, or the plan does not say what the work is.
    pub seconds: Option<f64>,
    /// Whether the rates come from this stage (TIME-2).
    pub calibrates: bool,
}

impl Rates {
    /// Of a common core: good for comparing stages with each other before anything was measured.
    pub const COMMON: Self = Self(COMMON);

    /// Seconds of one step.
    #[must_use]
    pub fn seconds(&self, work: &StepWork) -> f64 {
        self.0.iter().zip(amounts(work)).map(|(rate, amount)| rate * amount).sum()
    }

    /// The rates that fit what was measured, by least squares of relative errors; `None` where nothing was.
    #[must_use]
    pub fn calibrated(measured: &[(StepWork, StepSeconds)]) -> Option<Self> {
        let mut rows = Vec::new();
        for (work, seconds) in measured.iter().filter(|(work, _)| is_known(work)) {
            rows.push((amounts(work), seconds.whole));
            rows.extend(seconds.update.map(|seconds| (amounts_of_update(work), seconds)));
        }
        rows.retain(|(_, seconds)| seconds.is_finite() && *seconds > 0.0);
        if rows.is_empty() {
            return None;
        }
        // Relative to the common core, and of each measurement's time.
        let relative = |(amounts, seconds): ([f64; KINDS], f64)| {
            std::array::from_fn(|kind| amounts[kind] * COMMON[kind] / seconds)
        };
        let factors = fitted(&rows.into_iter().map(relative).collect::<Vec<_>>());
        Some(Self(std::array::from_fn(|kind| factors[kind] * COMMON[kind])))
    }
}

/// Each stage's step, as the plan's work and the run's own first stages have it (TIME-2). `measured` has an entry for each stage, `None` where
/// it was not measured.
#[must_use]
pub fn predictions(plan: &Plan, measured: &[Option<StepSeconds>]) -> Vec<Prediction> {
    let works: Vec<StepWork> = plan.stages.iter().map(|stage| stage.cost.work).collect();
    let known = |index: &usize| is_known(&works[*index]) && measured.get(*index).is_some_and(Option::is_some);
    let first: Vec<usize> = (0..works.len()).filter(known).take(CALIBRATING_STAGES).collect();
    let points = first.iter().filter_map(|&index| Some((works[index], measured[index]?)));
    let rates = Rates::calibrated(&points.collect::<Vec<_>>());
    let of_stage = |(index, work): (usize, &StepWork)| Prediction {
        seconds: rates.filter(|_| is_known(work)).map(|rates| rates.seconds(work)),
        calibrates: first.contains(&index),
    };
    works.iter().enumerate().map(of_stage).collect()
}

/// Plans of the first versions do not say.
fn is_known(work: &StepWork) -> bool {
    *work != StepWork::default()
}

#[expect(clippy::cast_precision_loss, reason = "estimates")]
fn amounts(work: &StepWork) -> [f64; KINDS] {
    [
        1.0,
        (work.operators + work.update_operators) as f64,
        work.flops as f64,
        work.activation_bytes as f64,
        (work.weight_bytes + work.update_bytes) as f64,
    ]
}

#[expect(clippy::cast_precision_loss, reason = "estimates")]
fn amounts_of_update(work: &StepWork) -> [f64; KINDS] {
    [0.0, work.update_operators as f64, 0.0, 0.0, work.update_bytes as f64]
}

/// The factors, none negative, with the least sum of (row . factors - 1)^2 over rows, and of the squared distances from their means, as they are
/// held.
fn fitted(rows: &[[f64; KINDS]]) -> [f64; KINDS] {
    let mut free = [true; KINDS];
    loop {
        let factors = solved(rows, free);
        // What would be negative is zero, and the others are found again: at most one more is fixed each time.
        let worst = (0..KINDS).filter(|kind| factors[*kind] < 0.0).min_by(|a, b| factors[*a].total_cmp(&factors[*b]));
        match worst {
            Some(kind) => free[kind] = false,
            None => return factors,
        }
    }
}

/// [`fitted`] with those that are not free at zero, and the others of any sign.
fn solved(rows: &[[f64; KINDS]], free: [bool; KINDS]) -> [f64; KINDS] {
    let mut matrix = [[0.0; KINDS + 1]; KINDS];
    for (i, line) in matrix.iter_mut().enumerate() {
        for (j, cell) in line.iter_mut().take(KINDS).enumerate() {
            let same = f64::from(u8::from(i == j));
            *cell = match (free[i], free[j]) {
                (true, true) => rows.iter().map(|row| row[i] * row[j]).sum::<f64>() + held(i, j, same),
                _ => same,
            };
        }
        line[KINDS] = if free[i] { rows.iter().map(|row| row[i]).sum() } else { 0.0 };
    }
    eliminated(matrix)
}

/// What holding to the means adds to an entry of the matrix.
fn held(i: usize, j: usize, same: f64) -> f64 {
    const SIZED_KINDS: usize = KINDS - FIXED_KINDS;
    let own = match (i < FIXED_KINDS, j < FIXED_KINDS) {
        (true, true) => 1.0 / FIXED_KINDS as f64,
        (false, false) => 1.0 / SIZED_KINDS as f64,
        _ => 0.0,
    };
    HELD * (same - own) + HELD_ACROSS * (same - 1.0 / KINDS as f64)
}

/// The solution of a system of equations, its right side in the last column; zero for what it does not determine.
fn eliminated(mut matrix: [[f64; KINDS + 1]; KINDS]) -> [f64; KINDS] {
    for column in 0..KINDS {
        let pivot = (column..KINDS).max_by(|a, b| matrix[*a][column].abs().total_cmp(&matrix[*b][column].abs()));
        matrix.swap(column, pivot.expect("a column is left"));
        let line = matrix[column];
        if line[column].abs() < f64::EPSILON {
            continue;
        }
        for (_, other) in matrix.iter_mut().enumerate().filter(|(index, _)| *index != column) {
            let factor = other[column] / line[column];
            other.iter_mut().zip(line).for_each(|(cell, above)| *cell -= factor * above);
        }
    }
    std::array::from_fn(|index| {
        let own = matrix[index][index];
        if own.abs() < f64::EPSILON { 0.0 } else { matrix[index][KINDS] / own }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{plan_of, spec};
    use serde_json::json;

    fn work(flops: u64, bytes: u64) -> StepWork {
        StepWork {
            operators: 20,
            flops,
            activation_bytes: flops / 40,
            weight_bytes: bytes / 2,
            update_operators: 4,
            update_bytes: bytes / 2,
        }
    }

    fn minilm() -> [(StepWork, f64); 4] {
        let of = |[operators, flops, activation_bytes, weight_bytes, update_operators, update_bytes]: [u64; 6]| {
            StepWork { operators, flops, activation_bytes, weight_bytes, update_operators, update_bytes }
        };
        [
            (of([4, 294_912, 99_840, 147_840, 4, 147_840]), 0.000693),
            (of([49, 5_058_772_992, 133_715_584, 62_272_944, 8, 56_930_688]), 0.03084),
            (of([139, 16_081_403_904, 408_999_552, 190_034_352, 16, 170_496_384]), 0.09789),
            (of([300, 33_068_335_104, 859_537_024, 717_177_264, 32, 722_239_872]), 0.2332),
        ]
    }

    fn measured(rates: Rates, work: StepWork) -> (StepWork, StepSeconds) {
        (work, StepSeconds { whole: rates.seconds(&work), update: None })
    }

    #[test]
    fn a_step_is_the_sum_of_its_work() {
        let work = StepWork {
            operators: 90,
            flops: 150_000_000_000,
            activation_bytes: 30_000_000_000,
            weight_bytes: 10_000_000_000,
            update_operators: 10,
            update_bytes: 5_000_000_000,
        };
        let seconds = Rates::COMMON.seconds(&work);
        assert!((seconds - (3e-4 + 100.0 * 3e-6 + 1.0 + 1.0 + 1.0)).abs() < 1e-9, "{seconds}");
    }

    /// TIME-3: one stage tells how fast the machine is, not at what.
    #[test]
    fn a_machine_of_the_same_proportions_is_known_from_one_stage() {
        let half = Rates(COMMON.map(|rate| 2.0 * rate));
        let rates = Rates::calibrated(&[measured(half, work(1_000_000_000, 1_000_000))]).unwrap();
        let deep = work(40_000_000_000, 900_000_000);
        assert!((rates.seconds(&deep) / half.seconds(&deep) - 1.0).abs() < 1e-9);
    }

    /// A machine whose memory is four times as slow beside its arithmetic, known from a head and a small stage with its update.
    #[test]
    fn another_machines_balance_is_found() {
        let mut slow = COMMON;
        slow[4] *= 4.0;
        let (slow, small) = (Rates(slow), work(4_000_000_000, 100_000_000));
        let update: f64 = slow.0.iter().zip(amounts_of_update(&small)).map(|(rate, amount)| rate * amount).sum();
        let taken = StepSeconds { whole: slow.seconds(&small), update: Some(update) };
        let rates = Rates::calibrated(&[measured(slow, work(1000, 1000)), (small, taken)]).unwrap();
        let deep = work(30_000_000_000, 2_000_000_000);
        let ratio = rates.seconds(&deep) / slow.seconds(&deep);
        assert!((ratio - 1.0).abs() < 0.1, "{ratio}");
        let by_proportions = Rates::COMMON.seconds(&deep) / slow.seconds(&deep);
        assert!((by_proportions - 1.0).abs() > 0.3, "the machine is another: {by_proportions}");
    }

    /// TIME-1
    #[test]
    fn time_1_no_rate_is_negative() {
        let odd = [
            (work(1000, 1000), StepSeconds { whole: 1.0, update: None }),
            (work(5_000_000_000, 1000), StepSeconds { whole: 0.001, update: Some(0.5) }),
        ];
        let Rates(rates) = Rates::calibrated(&odd).unwrap();
        assert!(rates.iter().all(|rate| *rate >= 0.0 && rate.is_finite()), "{rates:?}");
        assert_eq!(Rates::calibrated(&[]), None);
        let unknown = (StepWork::default(), StepSeconds { whole: 1.0, update: None });
        assert_eq!(Rates::calibrated(&[unknown]), None, "a plan of the first version says nothing of its steps");
    }

    /// Work of MiniLM's four stages (16 texts of 32 tokens a trainer) and the seconds that `make bench ONLY=head_cached.minilm` and the like found
    /// for their steps: the head and the last layer say within 15 % what three layers and the whole take.
    #[test]
    fn time_2_the_first_stages_say_what_the_others_take() {
        let plan = |works: &[StepWork]| {
            let mut plan = plan_of(&spec(json!({})));
            plan.stages.truncate(works.len());
            plan.stages.iter_mut().zip(works).for_each(|(stage, work)| stage.cost.work = *work);
            plan
        };
        let found = minilm();
        let works = found.map(|(work, _)| work);
        let steps = found.map(|(_, whole)| Some(StepSeconds { whole, update: None }));
        let predicted = predictions(&plan(&works), &steps);
        assert_eq!(predicted.iter().map(|one| one.calibrates).collect::<Vec<_>>(), [true, true, false, false]);
        for (found, (_, seconds)) in predicted.iter().zip(found) {
            let ratio = found.seconds.unwrap() / seconds;
            assert!((ratio - 1.0).abs() < 0.15, "{ratio}");
        }
        // What the others took is not looked at.
        let later =
            predictions(&plan(&works), &[steps[0], steps[1], None, Some(StepSeconds { whole: 9.0, update: None })]);
        assert_eq!(later, predicted);
        let skipped = predictions(&plan(&works), &[None, steps[1], steps[2], steps[3]]);
        assert_eq!(skipped.iter().map(|one| one.calibrates).collect::<Vec<_>>(), [false, true, true, false]);
    }
}
