//! What readers see of the runs: the last saved state of each, and a stream of what changes.
//!
//! While this coordinator leads, the driver publishes after it has saved; while it follows, what the store's watch says is
//! published. Calls read and watch here.
//!
//! VIEW-1: what is published is durable. (Progress is not, and is marked so in the proto.)
//! VIEW-2: a watch sees the run as it is first, then every change in order. One that is too slow gets the run as it is
//!         again.
//! VIEW-3: a run never goes back: a state that is not newer than the one shown is left out.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use thaw_proto::ids::RunId;
use thaw_proto::pb;
use tokio::sync::{broadcast, watch};

/// Updates a slow watch may lag behind.
const LAG: usize = 256;

/// All runs, as messages. A cheap clone.
#[derive(Debug, Clone, Default)]
pub struct Views {
    runs: Arc<Mutex<BTreeMap<RunId, View>>>,
    /// Counts what was published, for those who wait for a revision.
    published: watch::Sender<u64>,
}

#[derive(Debug)]
struct View {
    run: Arc<pb::Run>,
    /// Committed ones, oldest first.
    checkpoints: Arc<Vec<pb::CheckpointRef>>,
    folder: PathBuf,
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

/// A saved state of a run, as readers see it.
#[derive(Debug, Clone)]
pub struct Shown {
    pub run: pb::Run,
    /// All that are kept, oldest first.
    pub events: Vec<KeptEvent>,
    /// Committed ones, oldest first.
    pub checkpoints: Vec<pb::CheckpointRef>,
    /// The run's folder.
    pub folder: PathBuf,
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

    /// Shows a saved state, unless it is not newer than the one shown (VIEW-3). Those events that are newer go to watches.
    pub fn publish(&self, id: &RunId, shown: Shown) {
        let Shown { run, events, checkpoints, folder } = shown;
        let (run, checkpoints) = (Arc::new(run), Arc::new(checkpoints));
        {
            let mut runs = self.lock();
            match runs.get_mut(id) {
                None => {
                    let (updates, _) = broadcast::channel(LAG);
                    let view = View { run, checkpoints, folder, events: events.into(), progress: None, updates };
                    runs.insert(id.clone(), view);
                }
                Some(view) if view.run.revision >= run.revision => return,
                Some(view) => {
                    let seen = view.run.revision;
                    let new: Vec<_> = events.iter().filter(|kept| kept.after >= seen).cloned().collect();
                    view.run = Arc::clone(&run);
                    view.checkpoints = checkpoints;
                    view.events = events.into();
                    // Nobody watching is no error.
                    drop(view.updates.send(Update::Changed(run, new)));
                }
            }
        }
        self.published.send_modify(|count| *count += 1);
    }

    /// Forgets a run that the store does not have any more; its watches end.
    pub fn forget(&self, id: &RunId) {
        self.lock().remove(id);
    }

    /// Returns once the run is shown at `revision` or later.
    pub async fn wait_for(&self, id: &RunId, revision: u64) {
        let mut published = self.published.subscribe();
        loop {
            published.borrow_and_update();
            if self.get(id).is_some_and(|run| run.revision >= revision) {
                return;
            }
            if published.changed().await.is_err() {
                return;
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

    /// A run's folder, and its committed checkpoints, oldest first; the newest hundred.
    #[must_use]
    pub fn checkpoints(&self, id: &RunId) -> Option<(PathBuf, Arc<Vec<pb::CheckpointRef>>)> {
        self.lock().get(id).map(|view| (view.folder.clone(), Arc::clone(&view.checkpoints)))
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

    fn shown(revision: u64, events: Vec<KeptEvent>) -> Shown {
        Shown { run: run(revision), events, checkpoints: Vec::new(), folder: PathBuf::new() }
    }

    #[tokio::test]
    async fn a_watch_sees_each_event_once() {
        let views = Views::default();
        let id = RunId("a-1".to_owned());
        views.publish(&id, shown(5, vec![event(0)]));
        let mut watch = views.watch(&id).unwrap();
        assert_eq!((watch.run.revision, watch.events.len()), (5, 1));
        views.publish(&id, shown(9, vec![event(0), event(5), event(5)]));
        // The same again, and an older one, from somebody who is behind.
        views.publish(&id, shown(9, vec![event(0), event(5), event(5)]));
        views.publish(&id, shown(7, vec![event(0), event(5)]));
        // Of two changes the first was not seen on its own.
        views.publish(&id, shown(20, vec![event(0), event(5), event(5), event(9), event(14)]));
        for expected in [(9, vec![event(5), event(5)]), (20, vec![event(9), event(14)])] {
            match watch.updates.recv().await.unwrap() {
                Update::Changed(run, new) => assert_eq!((run.revision, new), expected, "VIEW-2, VIEW-3"),
                other => panic!("{other:?}"),
            }
        }
        assert!(watch.updates.try_recv().is_err());
        views.wait_for(&id, 20).await;
    }
}
