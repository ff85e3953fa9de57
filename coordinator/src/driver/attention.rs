//! [`Attention`]: a clock that stands still while this process does not run.
//!
//! Whoever waits to hear of others may itself have been kept from listening: stopped and continued, moved with its virtual machine, or short of
//! processors. What it did not hear then says nothing about them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use thaw_runtime::standstill;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Between looks at the time.
const LOOK: Duration = Duration::from_millis(100);
/// A look that comes later than this was kept from coming. Below it lateness is a busy machine's, and counts.
const LATE: Duration = Duration::from_millis(400);
/// From here on it is worth a line in the log.
const WORTH_SAYING: Duration = Duration::from_secs(1);

/// A cheap clone of one clock. Until [`Attention::watch`] it is the monotonic clock.
#[derive(Debug, Clone)]
pub(super) struct Attention {
    since: Instant,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    looked: Option<Instant>,
    missed: Duration,
}

impl State {
    /// What was missed until `now`. Also where nobody has looked since: whoever asks may be the first that runs again.
    fn missed(&self, now: Instant) -> Duration {
        let gap = self.looked.map_or(Duration::ZERO, |looked| now.saturating_duration_since(looked));
        self.missed + if gap > LATE { gap - LOOK } else { Duration::ZERO }
    }
}

impl Attention {
    pub(super) fn new() -> Self {
        Self { since: Instant::now(), state: Arc::default() }
    }

    /// Time since it was made in which this process ran.
    pub(super) fn now(&self) -> Duration {
        let now = Instant::now();
        let missed = self.state().missed(now);
        now.saturating_duration_since(self.since).saturating_sub(missed)
    }

    /// Looks at the time until what is returned is dropped.
    #[must_use]
    pub(super) fn watch(&self) -> JoinSet<()> {
        let clock = self.clone();
        let mut watching = JoinSet::new();
        let looking = async move {
            let mut looks = interval(LOOK);
            looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                looks.tick().await;
                let missed = clock.look(Instant::now());
                if missed > WORTH_SAYING {
                    tracing::warn!(
                        ?missed,
                        "this coordinator did not run; nobody is held to have been silent meanwhile"
                    );
                }
            }
        };
        watching.spawn(standstill::within(standstill::present(), looking));
        watching
    }

    fn look(&self, now: Instant) -> Duration {
        let mut state = self.state();
        let missed = state.missed(now);
        let before = std::mem::replace(&mut *state, State { looked: Some(now), missed });
        missed - before.missed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The runtime's clock goes on by itself only where nothing else can: here nobody looks while it is moved.
    #[tokio::test(start_paused = true)]
    async fn it_stands_still_while_nobody_looks_and_then_goes_on() {
        let clock = Attention::new();
        let _watch = clock.watch();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(clock.now(), Duration::from_secs(1));
        let seconds = |clock: &Attention| clock.now().as_secs_f64();
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!((1.0..1.3).contains(&seconds(&clock)), "five seconds were missed: {}", seconds(&clock));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!((2.0..2.3).contains(&seconds(&clock)), "it goes on: {}", seconds(&clock));
        tokio::time::advance(LATE / 2).await;
        assert!((2.2..2.5).contains(&seconds(&clock)), "a little lateness counts: {}", seconds(&clock));
    }

    #[tokio::test(start_paused = true)]
    async fn unwatched_it_is_the_monotonic_clock() {
        let clock = Attention::new();
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(clock.now(), Duration::from_secs(5));
    }
}
