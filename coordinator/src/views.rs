//! What readers see of the runs: the last saved state of each, and a stream of what changes.
//!
//! The driver publishes after it has saved; calls read and watch here, so no reader ever asks the store.
//!
//! VIEW-1: what is published is durable. (Progress is not, and is marked so in the proto.)
//! VIEW-2: a watch sees the run as it is first, then every change in order. One that is too slow gets the run as it is
//!         again.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use thaw_proto::ids::RunId;
use thaw_proto::pb;
use tokio::sync::broadcast;

/// Updates a slow watch may lag behind.
const LAG: usize = 256;

/// All runs, as messages. A cheap clone.
#[derive(Debug, Clone, Default)]
pub struct Views {
    runs: Arc<Mutex<BTreeMap<RunId, View>>>,
}

#[derive(Debug)]
struct View {
    run: Arc<pb::Run>,
    events: VecDeque<KeptEvent>,
    progress: Option<pb::Progress>,
    updates: broadcast::Sender<Update>,
}

/// An event and the run's revision before it happened.
#[derive(Debug, Clone, PartialEq)]
pub struct KeptEvent {
    /// A reader who has seen this revision, and none later, has not seen the event.
    pub after: u64,
    pub event: pb::Event,
}

/// Something a watch sees.
#[derive(Debug, Clone)]
pub enum Update {
    /// The events of one change, and the run after it.
    Changed(Arc<pb::Run>, Vec<KeptEvent>),
    Progress(pb::Progress),
    Evaluation(pb::Evaluation),
}

/// A watch as it starts: what is, what was, and what will be.
#[derive(Debug)]
pub struct Watch {
    pub run: Arc<pb::Run>,
    pub events: Vec<KeptEvent>,
    pub progress: Option<pb::Progress>,
    pub updates: broadcast::Receiver<Update>,
}

impl Views {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<RunId, View>> {
        self.runs.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Shows a saved state. `events` are all that are kept; those newer than the state shown before go to watches.
    pub fn publish(&self, id: &RunId, run: pb::Run, events: Vec<KeptEvent>) {
        let run = Arc::new(run);
        let mut runs = self.lock();
        match runs.get_mut(id) {
            None => {
                let (updates, _) = broadcast::channel(LAG);
                runs.insert(id.clone(), View { run, events: events.into(), progress: None, updates });
            }
            Some(view) => {
                let seen = view.run.revision;
                let new: Vec<_> = events.iter().filter(|kept| kept.after >= seen).cloned().collect();
                view.run = Arc::clone(&run);
                view.events = events.into();
                // Nobody watching is no error.
                drop(view.updates.send(Update::Changed(run, new)));
            }
        }
    }

    /// Shows a measurement, which is not kept.
    pub fn progress(&self, id: &RunId, progress: pb::Progress) {
        if let Some(view) = self.lock().get_mut(id) {
            view.progress = Some(progress.clone());
            drop(view.updates.send(Update::Progress(progress)));
        }
    }

    /// Shows an evaluation as it comes, before a checkpoint holds it.
    pub fn evaluation(&self, id: &RunId, evaluation: pb::Evaluation) {
        if let Some(view) = self.lock().get(id) {
            drop(view.updates.send(Update::Evaluation(evaluation)));
        }
    }

    /// One run.
    #[must_use]
    pub fn get(&self, id: &RunId) -> Option<Arc<pb::Run>> {
        self.lock().get(id).map(|view| Arc::clone(&view.run))
    }

    /// All runs, newest first; runs of one instant by name.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<pb::Run>> {
        let mut runs: Vec<_> = self.lock().values().map(|view| Arc::clone(&view.run)).collect();
        let made = |run: &pb::Run| run.create_time.map_or((0, 0), |time| (time.seconds, time.nanos));
        runs.sort_by(|a, b| made(b).cmp(&made(a)).then_with(|| a.name.cmp(&b.name)));
        runs
    }

    /// Starts a watch on one run.
    #[must_use]
    pub fn watch(&self, id: &RunId) -> Option<Watch> {
        let runs = self.lock();
        let view = runs.get(id)?;
        Some(Watch {
            run: Arc::clone(&view.run),
            events: view.events.iter().cloned().collect(),
            progress: view.progress.clone(),
            updates: view.updates.subscribe(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(revision: u64) -> pb::Run {
        pb::Run { name: "runs/a-1".to_owned(), revision, ..Default::default() }
    }

    fn event(after: u64) -> KeptEvent {
        KeptEvent { after, event: pb::Event { generation: after, ..Default::default() } }
    }

    #[tokio::test]
    async fn a_watch_sees_each_event_once() {
        let views = Views::default();
        let id = RunId("a-1".to_owned());
        views.publish(&id, run(5), vec![event(0)]);
        let mut watch = views.watch(&id).unwrap();
        assert_eq!((watch.run.revision, watch.events.len()), (5, 1));
        views.publish(&id, run(9), vec![event(0), event(5), event(5)]);
        match watch.updates.recv().await.unwrap() {
            Update::Changed(run, new) => assert_eq!((run.revision, new), (9, vec![event(5), event(5)])),
            other => panic!("{other:?}"),
        }
    }
}
