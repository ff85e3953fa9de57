//! Waiting before a retry: full jitter under a cap, with an end.
//!
//! Law: a wait is uniform in `[0, min(cap, base * 2^attempt)]`, so that clients that failed together do not return
//! together; once the deadline has passed there is no next wait.

use crate::surroundings;
use std::time::Duration;
use tokio::time::Instant;

/// A sequence of waits. Give each retry loop its own.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    deadline: Option<Instant>,
    attempt: u32,
    random: u64,
}

impl Backoff {
    /// Waits of at most `base`, then twice that, and so on up to `cap`, without end.
    #[must_use]
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, deadline: None, attempt: 0, random: surroundings::random() | 1 }
    }

    /// Ends the sequence `limit` from now.
    #[must_use]
    pub fn with_deadline(mut self, limit: Duration) -> Self {
        self.deadline = Some(Instant::now() + limit);
        self
    }

    /// The next wait, cut at the deadline; `None` once that has passed.
    pub fn next_wait(&mut self) -> Option<Duration> {
        let ceiling = self.base.saturating_mul(2_u32.saturating_pow(self.attempt)).min(self.cap);
        self.attempt = self.attempt.saturating_add(1);
        let wait = ceiling.mul_f64(self.uniform());
        let Some(deadline) = self.deadline else {
            return Some(wait);
        };
        let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
        Some(wait.min(left))
    }

    /// Starts over after a success.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }

    /// Uniform in `[0, 1)`, by xorshift64*: enough to spread clients, no more.
    fn uniform(&mut self) -> f64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let bits = self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11;
        bits as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_stay_under_the_doubling_ceiling_and_the_cap() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(100));
        for attempt in 0..200_u32 {
            let ceiling = Duration::from_millis((10_u64 << attempt.min(4)).min(100));
            assert!(backoff.next_wait().unwrap() <= ceiling);
        }
        backoff.reset();
        assert!(backoff.next_wait().unwrap() <= Duration::from_millis(10));
    }

    #[test]
    fn nothing_follows_the_deadline() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1)).with_deadline(Duration::ZERO);
        assert_eq!(backoff.next_wait(), None);
    }
}
