//! [`Abort`]: ends the forming of a gang from another thread.

use super::error::Error;
use super::peers::Shared;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::Duration;

/// Given to [`super::Listener::connect`], which it ends at once, before or after it has begun. Once the gang is built it has no effect:
/// there is [`super::Collective::abort`].
#[derive(Debug, Clone, Default)]
pub struct Abort(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    asked: bool,
    /// Of the collective whose ranks are telling each other about their memory.
    forming: Weak<Shared>,
}

impl Abort {
    /// Ends the forming. Never blocks, may be called more than once.
    pub fn abort(&self) {
        let forming = {
            let mut state = self.state();
            state.asked = true;
            state.forming.upgrade()
        };
        self.0.changed.notify_all();
        if let Some(forming) = forming {
            forming.fail(Error::Aborted);
        }
    }

    /// Whether it has been asked for.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        self.state().asked
    }

    /// Waits so long, or until it is asked for.
    pub(super) fn wait(&self, limit: Duration) {
        let state = self.state();
        let asked = |state: &mut State| !state.asked;
        let _state =
            self.0.changed.wait_timeout_while(state, limit, asked).expect("no code that holds the lock panics");
    }

    /// From here to [`Abort::release`] it ends the operations of this collective.
    pub(super) fn hold(&self, collective: &Arc<Shared>) {
        let asked = {
            let mut state = self.state();
            state.forming = Arc::downgrade(collective);
            state.asked
        };
        if asked {
            collective.fail(Error::Aborted);
        }
    }

    /// The collective is built.
    pub(super) fn release(&self) {
        self.state().forming = Weak::new();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("no code that holds the lock panics")
    }
}
