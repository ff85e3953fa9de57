//! The present, by two clocks.

/// When a step is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Unix milliseconds: what is stored and shown, and what outlasts a leader. People and NTP may set it, either way.
    pub unix_ms: u64,
    /// Milliseconds since an instant that the leader keeps for its term. Never set: every wait in [`super::Observed`] is counted by it (RUN-15).
    pub steady_ms: u64,
}

impl Now {
    /// Where nobody sets the clock.
    #[cfg(test)]
    pub(crate) fn at(ms: u64) -> Self {
        Self { unix_ms: ms, steady_ms: ms }
    }
}
