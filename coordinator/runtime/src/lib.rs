//! What both binaries share: named tasks with a policy, shutdown, telemetry, mutual TLS, waiting before a retry, limits of the process.
//!
//! Law: this crate knows nothing of runs. It is the only place that spawns tasks, listens to signals, or reads the
//! telemetry variables of the environment.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

pub mod backoff;
pub mod dial;
pub mod limits;
pub mod shutdown;
pub mod standstill;
pub mod surroundings;
pub mod tasks;
pub mod telemetry;
pub mod tls;

/// An error of any kind, as tasks return it.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// An error and its causes on one line, outermost first, for a log line or a message to a person.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        // Some libraries print their cause in their own text; saying it twice helps nobody.
        if !text.ends_with(&next_text) {
            text.push_str(": ");
            text.push_str(&next_text);
        }
        cause = next.source();
    }
    text
}
