//! Reports on their way to the coordinator.
//!
//! Law: bounded. Progress is worth something only while somebody listens; log lines give way when there are too many, and the
//! loss is counted; nothing else is dropped (the trainers send few of the others, and each keeps its own in its ledger).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use thaw_proto::pb::TrainerReport;
use thaw_proto::pb::trainer_report::Event;
use tokio::sync::Notify;

/// Reports that wait at most, not counting those that are never dropped.
const MAX_WAITING: usize = 4096;

/// How a report must arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivery {
    /// May be lost.
    BestEffort,
    /// Sent once, unless there are too many.
    Once,
    /// Sent again with every new session until the trainer's slot is used again.
    AtLeastOnce,
}

pub(super) fn delivery(report: &TrainerReport) -> Delivery {
    match &report.event {
        Some(Event::Progress(_) | Event::Pong(_) | Event::HostSnapshot(_)) | None => Delivery::BestEffort,
        Some(Event::Log(_) | Event::Evaluation(_) | Event::Operations(_)) => Delivery::Once,
        Some(
            Event::Ready(_)
            | Event::Built(_)
            | Event::Checkpoint(_)
            | Event::StageEnded(_)
            | Event::Finished(_)
            | Event::Suspended(_)
            | Event::Failed(_)
            | Event::Interrupted(_)
            | Event::Exited(_),
        ) => Delivery::AtLeastOnce,
    }
}

/// A cheap handle; clones share the queue.
#[derive(Debug, Clone, Default)]
pub(super) struct Outbox {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<TrainerReport>,
    connected: bool,
    dropped: u64,
}

impl Outbox {
    /// Queues a report. Never waits.
    pub(super) fn push(&self, report: TrainerReport) {
        let mut state = self.state();
        let delivery = delivery(&report);
        if delivery == Delivery::BestEffort && !state.connected {
            return;
        }
        if delivery != Delivery::AtLeastOnce && state.waiting.len() >= MAX_WAITING {
            state.dropped += 1;
            if state.dropped.is_power_of_two() {
                tracing::warn!(dropped = state.dropped, "reports dropped: the coordinator does not take them");
            }
            return;
        }
        state.waiting.push_back(report);
        drop(state);
        self.shared.filled.notify_one();
    }

    /// Says whether a session takes reports.
    pub(super) fn set_connected(&self, connected: bool) {
        self.state().connected = connected;
    }

    /// Starts over with a new session: what is sent again from the ledgers takes the place of what still waits of it.
    pub(super) fn restart(&self, again: Vec<TrainerReport>) {
        let mut state = self.state();
        state.connected = true;
        state.waiting.retain(|report| delivery(report) == Delivery::Once);
        // In front: a log line must not hold up the news that a trainer is ready.
        again.into_iter().rev().for_each(|report| state.waiting.push_front(report));
        drop(state);
        self.shared.filled.notify_one();
    }

    /// The next report. Cancel-safe. For one caller at a time.
    pub(super) async fn next(&self) -> TrainerReport {
        loop {
            let filled = self.shared.filled.notified();
            let next = self.state().waiting.pop_front();
            match next {
                Some(report) => return report,
                None => filled.await,
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("no code that holds the lock panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use thaw_proto::pb::{GangBuilt, LogLine, Progress};

    fn report(event: Event) -> TrainerReport {
        TrainerReport { event: Some(event), ..TrainerReport::default() }
    }

    #[tokio::test]
    async fn progress_needs_a_listener_and_lines_give_way() {
        let outbox = Outbox::default();
        outbox.push(report(Event::Progress(Progress::default())));
        for _ in 0..MAX_WAITING + 10 {
            outbox.push(report(Event::Log(LogLine::default())));
        }
        outbox.push(report(Event::Built(GangBuilt {})));
        assert_eq!(outbox.state().waiting.len(), MAX_WAITING + 1);
        assert_eq!(outbox.state().dropped, 10);
        outbox.restart(vec![report(Event::Built(GangBuilt {}))]);
        assert_eq!(outbox.state().waiting.len(), MAX_WAITING + 1, "the ledger's copy replaces the waiting one");
        assert!(matches!(outbox.next().await.event, Some(Event::Built(_))));
        outbox.push(report(Event::Progress(Progress::default())));
        assert_eq!(outbox.state().waiting.len(), MAX_WAITING);
    }
}
