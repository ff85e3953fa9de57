//! The samples of every step, and the state that training on them comes to.

use super::{GLOBAL_BATCH, SHARDS};
use std::ops::Range;
use thaw_core::sampler::tree;

/// What a toy's weights are: the hash of every sample it has seen and of every sum it has got, in order.
pub(crate) type Weights = [u8; 32];

/// Of one shard in a step, or of several: so uneven that the order in which they are added shows.
pub(crate) type Gradient = [f64; 5];

/// Samples of a shard in a step.
pub(crate) fn samples_of(step: u64, shard: u32) -> impl Iterator<Item = u64> {
    let each = u64::from(GLOBAL_BATCH / SHARDS);
    let first = step * u64::from(GLOBAL_BATCH) + u64::from(shard) * each;
    first..first + each
}

/// The gradients of a node of the tree over shards, added as a trainer adds those of its own shards.
pub(crate) fn gradient_of(step: u64, node: Range<u32>) -> Gradient {
    let mut leaf = |shard: u32| {
        let mut hasher = blake3::Hasher::new_derive_key("thaw simulation gradient");
        hasher.update(&step.to_le_bytes()).update(&shard.to_le_bytes());
        let hash = hasher.finalize();
        let mut numbers =
            hash.as_bytes().chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        std::array::from_fn(|_| f64::from(numbers.next().unwrap_or_default()).sqrt().recip())
    };
    let mut add = |low: Gradient, high: Gradient| std::array::from_fn(|at| low[at] + high[at]);
    tree::reduce(node, &mut leaf, &mut add).unwrap_or_default()
}

/// Weights after a step, given those before it, the samples in it and the sum of its gradients.
pub(crate) fn next_weights(before: Weights, step: u64, samples: &[u64], gradient: &Gradient) -> Weights {
    let mut samples = samples.to_vec();
    samples.sort_unstable();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&before).update(&step.to_le_bytes());
    for sample in samples {
        hasher.update(&sample.to_le_bytes());
    }
    for number in gradient {
        hasher.update(&number.to_bits().to_le_bytes());
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
            self.0.push(next_weights(self.0[self.0.len() - 1], step, &samples, &gradient_of(step, 0..SHARDS)));
        }
        self.0[wanted]
    }
}
