//! Dividing one source's samples into parts: seeded, by class, every sample in exactly one part (`DATA-2`).

use super::{Error, Part};
use crate::random::Stream;
use std::path::Path;
use thaw_proto::spec::Split;

/// Records of the training source by part, each in source order; the order of the training part is still to be drawn.
pub(crate) type Divided = [Vec<u32>; 3];

/// Divides records by the shares of `split`, which need not sum to 1.
pub(crate) fn divide(
    path: &Path,
    labels: &[u32],
    classes: &[String],
    split: &Split,
    seed: u64,
) -> Result<Divided, Error> {
    let shares = shares(split);
    let mut divided = Divided::default();
    let mut owed = [0.0; 3];
    if split.stratified {
        for (class, members) in members(labels, classes.len()).into_iter().enumerate() {
            check_size(path, &classes[class], members.len(), shares)?;
            deal(members, shares, &mut owed, &mut Stream::new(seed, "split", &classes[class]), &mut divided);
        }
    } else {
        let everything = (0..labels.len() as u32).collect();
        deal(everything, shares, &mut owed, &mut Stream::new(seed, "split all", ""), &mut divided);
    }
    for records in &mut divided {
        records.sort_unstable();
    }
    check_parts(path, labels, classes, shares, &divided)?;
    Ok(divided)
}

/// Whole numbers near `samples * share` that sum to `samples`, by largest remainder. Equal remainders go to the part that earlier
/// calls left shortest (`owed`, in samples), so that many small classes do not all favour the same part.
pub(crate) fn apportion(samples: usize, shares: [f64; 3], owed: &mut [f64; 3]) -> [usize; 3] {
    // Billionths of a sample: sums like 0.7 * 10 must count as whole.
    const UNIT: f64 = 1e9;
    let quotas = shares.map(|share| samples as f64 * share);
    let mut counts = quotas.map(|quota| (quota + 1.0 / UNIT).floor() as usize);
    let left = samples.saturating_sub(counts.iter().sum());
    let mut order: Vec<usize> = (0..3).filter(|part| shares[*part] > 0.0).collect();
    order.sort_by_key(|part| {
        let remainder = ((quotas[*part] - counts[*part] as f64) * UNIT).round() as i64;
        (-remainder, -((owed[*part] * UNIT).round() as i64))
    });
    for part in order.into_iter().take(left) {
        counts[part] += 1;
    }
    for part in 0..3 {
        owed[part] += quotas[part] - counts[part] as f64;
    }
    counts
}

fn shares(split: &Split) -> [f64; 3] {
    let sum = split.train + split.eval + split.test;
    [split.train / sum, split.eval / sum, split.test / sum]
}

fn members(labels: &[u32], classes: usize) -> Vec<Vec<u32>> {
    let mut members = vec![Vec::new(); classes];
    for (record, label) in labels.iter().enumerate() {
        members[*label as usize].push(record as u32);
    }
    members
}

fn deal(mut records: Vec<u32>, shares: [f64; 3], owed: &mut [f64; 3], stream: &mut Stream, divided: &mut Divided) {
    stream.shuffle(&mut records);
    let counts = apportion(records.len(), shares, owed);
    let mut rest = records.as_slice();
    for (part, count) in counts.into_iter().enumerate() {
        let (taken, behind) = rest.split_at(count);
        divided[part].extend_from_slice(taken);
        rest = behind;
    }
}

fn check_size(path: &Path, class: &str, samples: usize, shares: [f64; 3]) -> Result<(), Error> {
    let parts = shares.iter().filter(|share| **share > 0.0).count();
    if samples < parts {
        return Err(Error::ClassTooSmall { path: path.to_owned(), class: class.to_owned(), samples, parts });
    }
    Ok(())
}

fn check_parts(
    path: &Path,
    labels: &[u32],
    classes: &[String],
    shares: [f64; 3],
    divided: &Divided,
) -> Result<(), Error> {
    let path = || path.to_owned();
    let mut trained = vec![false; classes.len()];
    for record in &divided[0] {
        trained[labels[*record as usize] as usize] = true;
    }
    if let Some(class) = trained.iter().position(|trained| !trained) {
        let samples = labels.iter().filter(|label| **label as usize == class).count();
        return Err(Error::NoTrainSample { path: path(), class: classes[class].clone(), samples });
    }
    for (part, name) in Part::ALL.into_iter().enumerate() {
        if shares[part] > 0.0 && divided[part].is_empty() {
            return Err(Error::EmptyPart { path: path(), part: name, share: shares[part], samples: labels.len() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(train: f64, eval: f64, test: f64, stratified: bool) -> Split {
        serde_json::from_value(
            serde_json::json!({"train": train, "eval": eval, "test": test, "stratified": stratified}),
        )
        .unwrap()
    }

    #[test]
    fn small_classes_take_turns() {
        let mut owed = [0.0; 3];
        let mut sums = [0; 3];
        for _ in 0..100 {
            for (sum, count) in sums.iter_mut().zip(apportion(5, [0.8, 0.1, 0.1], &mut owed)) {
                *sum += count;
            }
        }
        assert_eq!(sums, [400, 50, 50]);
    }

    #[test]
    fn a_class_left_without_training_samples_is_named() {
        let labels = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1];
        let classes = ["a".to_owned(), "b".to_owned()];
        let error = divide(Path::new("x.csv"), &labels, &classes, &split(0.1, 0.45, 0.45, true), 1).unwrap_err();
        assert!(
            matches!(error, Error::ClassTooSmall { ref class, samples: 2, parts: 3, .. } if class == "b"),
            "{error}"
        );
        let error = divide(Path::new("x.csv"), &labels, &classes, &split(0.1, 0.9, 0.0, true), 1).unwrap_err();
        assert!(matches!(error, Error::NoTrainSample { ref class, samples: 2, .. } if class == "b"), "{error}");
        let error = divide(Path::new("x.csv"), &labels, &classes, &split(0.999, 0.001, 0.0, true), 1).unwrap_err();
        assert!(matches!(error, Error::EmptyPart { part: Part::Eval, .. }), "{error}");
    }

    proptest! {
        #[test]
        fn every_sample_once_and_shares_held(
            sizes in prop::collection::vec(20_usize..60, 2..8),
            train in 0.4_f64..0.9, eval_of_rest in 0.3_f64..0.7, seed: u64, stratified: bool,
        ) {
            let labels: Vec<u32> = sizes.iter().enumerate().flat_map(|(class, size)| vec![class as u32; *size]).collect();
            let classes: Vec<String> = (0..sizes.len()).map(|class| format!("c{class}")).collect();
            let eval = (1.0 - train) * eval_of_rest;
            let split = split(train, eval, 1.0 - train - eval, stratified);
            let divided = divide(Path::new("x"), &labels, &classes, &split, seed).unwrap();
            let mut all: Vec<u32> = divided.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..labels.len() as u32).collect::<Vec<_>>());
            for (part, share) in [split.train, split.eval, split.test].into_iter().enumerate() {
                let total = labels.len() as f64 * share;
                let within = if stratified { sizes.len() as f64 } else { 1.0 };
                prop_assert!((divided[part].len() as f64 - total).abs() <= within);
                for (class, size) in sizes.iter().enumerate().filter(|_| stratified) {
                    let count = divided[part].iter().filter(|record| labels[**record as usize] as usize == class).count();
                    prop_assert!((count as f64 - *size as f64 * share).abs() < 1.0);
                }
            }
            prop_assert_eq!(divided, divide(Path::new("x"), &labels, &classes, &split, seed).unwrap());
        }
    }
}
