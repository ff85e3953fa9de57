//! Rates by group, accumulation, and what thawed batch norms normalise by.

use crate::convert::checker::{Checker, quote};
use crate::pb;
use crate::spec::{ThawedBatchNorm, ThawedBatchNormPolicy};
use std::collections::{BTreeMap, HashMap};

/// Micro-batches of a shard's part: at least a sample each.
pub(super) fn accumulation(at: &mut Checker, raw: &pb::RunSpec, logical_shards: u32) -> u32 {
    const FIELD: &str = "gradient_accumulation_steps";
    let steps = at.whole(FIELD, raw.gradient_accumulation_steps, 1..=65536, 1);
    let shard = raw.global_batch_size / logical_shards.max(1);
    // A batch that does not fill the shards is reported on its own.
    if shard > 0 && steps > shard {
        at.refuse(
            FIELD,
            format!("must be at most {shard}, the samples of a logical shard, not {steps}: lower it, or raise global_batch_size"),
        );
    }
    steps
}

pub(super) fn thawed_batch_norm(at: &mut Checker, raw: &pb::BatchNorm) -> ThawedBatchNorm {
    let policy = at.choice("thawed_groups", raw.thawed_groups).unwrap_or(ThawedBatchNormPolicy::Auto);
    let default = ThawedBatchNorm::default().minimum_batch;
    ThawedBatchNorm { policy, minimum_batch: at.whole("minimum_batch", raw.minimum_batch, 2..=65536, default) }
}

/// Rates by group, in the order of their keys.
pub(super) fn learning_rates(at: &mut Checker, raw: &HashMap<String, f64>) -> BTreeMap<String, f64> {
    let rates: BTreeMap<String, f64> = raw.iter().map(|(group, rate)| (group.clone(), *rate)).collect();
    for (group, rate) in &rates {
        let field = format!("learning_rates[{}]", quote(group));
        group_pattern(at, &field, group);
        if !(rate.is_finite() && *rate > 0.0) {
            at.refuse(&field, format!("must be a finite number > 0, not {rate}"));
        }
    }
    rates
}

/// The name of a layer group, or a regular expression between slashes.
pub(super) fn group_pattern(at: &mut Checker, field: &str, pattern: &str) {
    if pattern.is_empty() {
        at.refuse(field, "must not be empty: the name of a layer group, or a regular expression between slashes");
        return;
    }
    let Some(rest) = pattern.strip_prefix('/') else { return };
    match rest.strip_suffix('/') {
        Some(expression) if !expression.is_empty() => at.pattern(field, expression),
        Some(_) | None => {
            at.refuse(
                field,
                format!("{} starts with a slash: close the regular expression with another", quote(pattern)),
            );
        }
    }
}
