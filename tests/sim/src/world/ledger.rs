//! The samples of every step, and the state that training on them comes to.

use super::{GLOBAL_BATCH, SHARDS};

/// What a toy's weights are: the hash of every sample it has seen, in order.
pub(crate) type Weights = [u8; 32];

/// Samples of a shard in a step.
pub(crate) fn samples_of(step: u64, shard: u32) -> impl Iterator<Item = u64> {
    let each = u64::from(GLOBAL_BATCH / SHARDS);
    let first = step * u64::from(GLOBAL_BATCH) + u64::from(shard) * each;
    first..first + each
}

/// Weights after a step, given those before it and the samples in it.
pub(crate) fn next_weights(before: Weights, step: u64, samples: &[u64]) -> Weights {
    let mut samples = samples.to_vec();
    samples.sort_unstable();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&before).update(&step.to_le_bytes());
    for sample in samples {
        hasher.update(&sample.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Weights after each number of steps without a fault (LEDGER-1), as far as they were asked for.
#[derive(Debug)]
pub(super) struct Ledger(Vec<Weights>);

impl Default for Ledger {
    fn default() -> Self {
        Self(vec![[0; 32]])
    }
}

impl Ledger {
    pub(super) fn at(&mut self, steps: u64) -> Weights {
        let wanted = usize::try_from(steps).unwrap_or(usize::MAX);
        while self.0.len() <= wanted {
            let step = self.0.len() as u64;
            let samples: Vec<u64> = (0..SHARDS).flat_map(|shard| samples_of(step, shard)).collect();
            self.0.push(next_weights(self.0[self.0.len() - 1], step, &samples));
        }
        self.0[wanted]
    }
}
