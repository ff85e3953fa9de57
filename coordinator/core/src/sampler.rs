//! Which samples a step trains on, and with which randomness: functions of (seed, epoch, step, shard), never of a rank.
//!
//! - SAMPLE-1: within an epoch every shard visits each of its samples exactly once.
//! - SAMPLE-2: sample to shard is fixed for the run, so what a shard caches stays of use.
//! - SAMPLE-3: the order can be entered anywhere: sample `i` of an epoch costs the same as the first.
//! - TREE-1: sums over shards are taken in one fixed binary tree, so they have the same bits at every world size.

use std::ops::Range;
use thaw_proto::spec::RunSpec;

/// Rounds of the Feistel network: enough that every output bit depends on every input bit at any width.
const ROUNDS: usize = 8;

/// A bijection of `0..len`, in constant memory: a Feistel network on the next even number of bits, walked along its cycle
/// until the value is inside (Black and Rogaway 2002).
#[derive(Debug, Clone)]
pub struct Permutation {
    len: u32,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

/// The order in which a shard of `len` samples (at least 1) is visited in an epoch.
#[must_use]
pub fn permutation(seed: u64, epoch: u32, shard: u32, len: u32) -> Permutation {
    let mut hasher = blake3::Hasher::new_derive_key("thaw.v1 order of a shard's samples");
    hasher.update(&seed.to_le_bytes()).update(&epoch.to_le_bytes()).update(&shard.to_le_bytes());
    let mut stream = hasher.finalize_xof();
    let keys = std::array::from_fn(|_| {
        let mut key = [0; 8];
        stream.fill(&mut key);
        u64::from_le_bytes(key)
    });
    let bits = u32::BITS - len.saturating_sub(1).leading_zeros();
    Permutation { len, half_bits: bits.div_ceil(2).max(1), keys }
}

impl Permutation {
    /// The sample at `position` of the epoch.
    ///
    /// # Panics
    /// When `position` is not below the length.
    #[must_use]
    pub fn at(&self, position: u32) -> u32 {
        assert!(position < self.len, "position {position} is outside a shard of {} samples", self.len);
        let mut value = u64::from(position);
        loop {
            value = self.encrypt(value);
            // The walk starts inside, so it comes back inside.
            if let Ok(inside) = u32::try_from(value)
                && inside < self.len
            {
                return inside;
            }
        }
    }

    fn encrypt(&self, value: u64) -> u64 {
        let mask = (1_u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        (left << self.half_bits) | right
    }
}

/// Finalizer of SplitMix64 (Steele et al. 2014).
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Shard of the sample at `position` of the seeded training list.
#[must_use]
pub fn shard_of(position: u64, shards: u32) -> u32 {
    u32::try_from(position % u64::from(shards)).expect("a remainder is below its divisor")
}

/// Samples that `shard` contributes to a step: the global batch's share, the remainder going to the lowest shards.
#[must_use]
pub fn shard_batch(global_batch: u32, shards: u32, shard: u32) -> u32 {
    global_batch / shards + u32::from(shard < global_batch % shards)
}

/// Optimizer updates in which every shard is through its samples. Needs a global batch of at least one sample per shard.
#[must_use]
pub fn steps_per_epoch(global_batch: u32, shard_sizes: &[u64]) -> u32 {
    let shards = u32::try_from(shard_sizes.len()).expect("there are at most 4096 shards");
    let steps = (0..shards)
        .zip(shard_sizes)
        .map(|(shard, size)| size.div_ceil(u64::from(shard_batch(global_batch, shards, shard))));
    u32::try_from(steps.max().unwrap_or(0)).expect("a shard has fewer than 2^32 samples")
}

/// The samples of one shard, step by step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardSampler {
    pub seed: u64,
    pub shard: u32,
    /// Samples in the shard.
    pub len: u32,
    /// Samples per step.
    pub batch: u32,
}

impl ShardSampler {
    /// Positions within the shard that a step trains on; short or empty where the shard is through before others are.
    /// `epoch` counts from the start of the run.
    #[must_use]
    pub fn micro_batch(&self, epoch: u32, step_in_epoch: u32) -> Vec<u32> {
        let start = u64::from(step_in_epoch) * u64::from(self.batch);
        let end = (start + u64::from(self.batch)).min(u64::from(self.len));
        let order = permutation(self.seed, epoch, self.shard, self.len);
        let position = |index: u64| u32::try_from(index).expect("it is below the shard's length");
        (start..end).map(|index| order.at(position(index))).collect()
    }
}

/// Seed of everything random (dropout, augmentation) in a shard's forward pass of a step; not negative.
#[must_use]
pub fn shard_seed(seed: u64, step: u64, shard: u32) -> i64 {
    let mut hasher = blake3::Hasher::new_derive_key("thaw.v1 randomness of a shard's step");
    hasher.update(&seed.to_le_bytes()).update(&step.to_le_bytes()).update(&shard.to_le_bytes());
    let mut first = [0; 8];
    hasher.finalize_xof().fill(&mut first);
    i64::from_le_bytes(first) & i64::MAX
}

/// Which draw of the spec's random changes every training sample takes in an epoch, counted from the run's start; `None` where nothing changes.
#[must_use]
pub fn view(spec: &RunSpec, epoch: u32) -> Option<u32> {
    spec.augmentation()?;
    Some(spec.prefix_cache.views.map_or(epoch, |views| epoch % views.max(1)))
}

/// Shards that a rank runs: `[rank * S / W, (rank + 1) * S / W)`. Empty where there are more ranks than shards.
#[must_use]
pub fn ranks_shards(rank: u32, world: u32, shards: u32) -> Range<u32> {
    let bound = |rank: u32| {
        let bound = u64::from(rank) * u64::from(shards) / u64::from(world);
        u32::try_from(bound).expect("a rank is at most the world size")
    };
    // The last shard is nobody's where ranks do not divide the shards.
    let short = thaw_mutants::planted("shard-dropped") && rank + 1 == world && !shards.is_multiple_of(world);
    bound(rank)..bound(rank + 1) - u32::from(short)
}

/// The fixed binary tree over shards (TREE-1).
pub mod tree {
    use std::ops::Range;

    /// Where node `[lo, hi)` of at least two shards divides: `[lo, mid)` and `[mid, hi)`.
    #[must_use]
    pub fn split(lo: u32, hi: u32) -> u32 {
        lo + (hi - lo).div_ceil(2)
    }

    /// The largest nodes of the tree over `0..shards` that lie within `range`, ascending: what a rank can sum alone.
    #[must_use]
    pub fn maximal_subtrees(range: Range<u32>, shards: u32) -> Vec<Range<u32>> {
        let mut found = Vec::new();
        collect(0..shards, &range, &mut found);
        found
    }

    fn collect(node: Range<u32>, range: &Range<u32>, found: &mut Vec<Range<u32>>) {
        if node.start >= node.end || node.end <= range.start || range.end <= node.start {
            return;
        }
        if range.start <= node.start && node.end <= range.end {
            found.push(node);
            return;
        }
        let mid = split(node.start, node.end);
        collect(node.start..mid, range, found);
        collect(mid..node.end, range, found);
    }

    /// Sums node `[lo, hi)`: `leaf` gives a shard's value, `add` joins lower and upper half, in that order.
    pub fn reduce<T>(node: Range<u32>, leaf: &mut impl FnMut(u32) -> T, add: &mut impl FnMut(T, T) -> T) -> Option<T> {
        match node.end.saturating_sub(node.start) {
            0 => None,
            1 => Some(leaf(node.start)),
            _ => {
                let mid = split(node.start, node.end);
                let low = reduce(node.start..mid, leaf, add)?;
                let high = reduce(mid..node.end, leaf, add)?;
                Some(add(low, high))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::collections::BTreeSet;

    #[test]
    fn the_order_is_part_of_the_contract() {
        let order = permutation(7, 0, 0, 10);
        let first: Vec<u32> = (0..10).map(|position| order.at(position)).collect();
        assert_eq!(first, GOLDEN_ORDER);
        assert_eq!([shard_seed(7, 0, 0), shard_seed(7, 1, 0), shard_seed(7, 0, 1)], GOLDEN_SEEDS);
    }

    // Changing these changes every run's result: they may change only with the API's version.
    const GOLDEN_ORDER: [u32; 10] = [5, 4, 6, 3, 8, 9, 0, 7, 2, 1];
    const GOLDEN_SEEDS: [i64; 3] = [5033027887019559995, 4748423348240702881, 5499617546501209346];

    #[test]
    fn views_come_in_turn_and_new_ones_without_end() {
        let views = |augmentation: serde_json::Value, views: Option<u32>| {
            let mut spec = serde_json::to_value(crate::test_support::spec(json!({}))).unwrap();
            spec["data"]["image"] = json!({"size": 8, "mean": [0.5], "std": [0.5], "augmentation": augmentation});
            spec["prefix_cache"]["views"] = json!(views);
            let spec = serde_json::from_value(spec).unwrap();
            (0..5).map(|epoch| view(&spec, epoch)).collect::<Vec<_>>()
        };
        let flips =
            json!({"random_resized_crop": null, "horizontal_flip": 0.5, "color_jitter": null, "random_erasing": null});
        assert_eq!(views(flips.clone(), Some(2)), [0, 1, 0, 1, 0].map(Some));
        assert_eq!(views(flips, None), [0, 1, 2, 3, 4].map(Some));
        assert_eq!(views(json!(null), Some(1)), [None; 5]);
    }

    #[test]
    fn batches_add_up_to_the_global_batch() {
        assert_eq!((0..3).map(|shard| shard_batch(8, 3, shard)).collect::<Vec<_>>(), [3, 3, 2]);
        assert_eq!(steps_per_epoch(8, &[10, 9, 9]), 5);
        assert_eq!(steps_per_epoch(1, &[10]), 10);
    }

    #[test]
    fn the_tree_over_five_shards() {
        let mut leaf = |shard: u32| shard.to_string();
        let sum = tree::reduce(0..5, &mut leaf, &mut |low, high| format!("({low}+{high})"));
        assert_eq!(sum.unwrap(), "(((0+1)+2)+(3+4))");
        assert_eq!(tree::maximal_subtrees(1..5, 5), [1..2, 2..3, 3..5]);
        assert_eq!(tree::maximal_subtrees(2..2, 5), []);
    }

    proptest! {
        #[test]
        fn sample_1_the_order_is_a_bijection(seed: u64, epoch: u32, shard: u32, len in 1_u32..3000) {
            let order = permutation(seed, epoch, shard, len);
            let seen: BTreeSet<u32> = (0..len).map(|position| order.at(position)).collect();
            prop_assert_eq!(seen.len(), len as usize);
            prop_assert!(seen.iter().all(|sample| *sample < len));
        }

        #[test]
        fn sample_3_the_largest_shard_can_be_entered_anywhere(seed: u64, position in 0..u32::MAX) {
            prop_assert!(permutation(seed, 0, 0, u32::MAX).at(position) < u32::MAX);
        }

        #[test]
        fn sample_1_an_epochs_micro_batches_cover_each_sample_once(
            seed: u64, epoch in 0_u32..9, sizes in prop::collection::vec(1_u64..200, 1..6), batch in 6_u32..40,
        ) {
            let shards = sizes.len() as u32;
            let steps = steps_per_epoch(batch, &sizes);
            for (shard, size) in (0..shards).zip(&sizes) {
                let sampler = ShardSampler { seed, shard, len: *size as u32, batch: shard_batch(batch, shards, shard) };
                let mut seen: Vec<u32> = (0..steps).flat_map(|step| sampler.micro_batch(epoch, step)).collect();
                seen.sort_unstable();
                prop_assert_eq!(seen, (0..*size as u32).collect::<Vec<_>>());
            }
        }

        #[test]
        fn every_shard_has_one_rank(world in 1_u32..40, shards in 1_u32..40) {
            let all: Vec<u32> = (0..world).flat_map(|rank| ranks_shards(rank, world, shards)).collect();
            prop_assert_eq!(all, (0..shards).collect::<Vec<_>>());
        }

        /// Sums of floats taken by ranks over their own subtrees and then joined have the bits of the sum by one rank.
        #[test]
        fn tree_1_sums_do_not_depend_on_the_world_size(values in prop::collection::vec(-1e3_f64..1e3, 1..40), world in 1_u32..40) {
            let shards = values.len() as u32;
            let alone = tree::reduce(0..shards, &mut |shard| values[shard as usize], &mut |a, b| a + b).unwrap();
            let mut parts = std::collections::BTreeMap::new();
            for rank in 0..world {
                for node in tree::maximal_subtrees(ranks_shards(rank, world, shards), shards) {
                    let sum = tree::reduce(node.clone(), &mut |shard| values[shard as usize], &mut |a, b| a + b).unwrap();
                    parts.insert((node.start, node.end), sum);
                }
            }
            fn join(lo: u32, hi: u32, parts: &std::collections::BTreeMap<(u32, u32), f64>) -> f64 {
                parts.get(&(lo, hi)).copied().unwrap_or_else(|| {
                    let mid = tree::split(lo, hi);
                    join(lo, mid, parts) + join(mid, hi, parts)
                })
            }
            prop_assert_eq!(join(0, shards, &parts).to_bits(), alone.to_bits());
        }

        #[test]
        fn subtrees_cover_their_range(shards in 1_u32..200, a in 0_u32..200, b in 0_u32..200) {
            let (lo, hi) = (a.min(b).min(shards), a.max(b).min(shards));
            let covered: Vec<u32> = tree::maximal_subtrees(lo..hi, shards).into_iter().flatten().collect();
            prop_assert_eq!(covered, (lo..hi).collect::<Vec<_>>());
        }

        #[test]
        fn seeds_are_not_negative(seed: u64, step: u64, shard: u32) {
            prop_assert!(shard_seed(seed, step, shard) >= 0);
        }
    }
}
