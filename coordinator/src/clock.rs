//! Wall-clock time for people, in milliseconds since the epoch. No wait is counted by it.

use std::time::UNIX_EPOCH;
use thaw_core::run_machine::Now;
use thaw_mutants::planted;
use thaw_runtime::surroundings;

/// Milliseconds since the epoch, by this machine's clock.
#[must_use]
pub fn now_ms() -> i64 {
    let since = surroundings::wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// By both clocks.
#[must_use]
pub fn now() -> Now {
    let steady_ms = u64::try_from(surroundings::steady_clock().as_millis()).unwrap_or(u64::MAX);
    // A mutant's waits follow the wall clock.
    let unix_ms = now_ms().unsigned_abs();
    Now { unix_ms, steady_ms: if planted("waits-by-wall-clock") { unix_ms } else { steady_ms } }
}

/// As protobuf writes it.
#[must_use]
pub fn timestamp(ms: i64) -> prost_types::Timestamp {
    let nanos = i32::try_from(ms.rem_euclid(1000) * 1_000_000).expect("below a second");
    prost_types::Timestamp { seconds: ms.div_euclid(1000), nanos }
}
