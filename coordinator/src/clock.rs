//! Wall-clock time for people, in milliseconds since the epoch. Deadlines use `Instant`, never this.

use std::time::UNIX_EPOCH;
use thaw_runtime::surroundings;

/// Milliseconds since the epoch, by this machine's clock.
#[must_use]
pub fn now_ms() -> i64 {
    let since = surroundings::wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// As protobuf writes it.
#[must_use]
pub fn timestamp(ms: i64) -> prost_types::Timestamp {
    let nanos = i32::try_from(ms.rem_euclid(1000) * 1_000_000).expect("below a second");
    prost_types::Timestamp { seconds: ms.div_euclid(1000), nanos }
}
