//! What is seen of a run while it trains: the run itself, as a client watches it, and every update, as rank 0 notes it in the run's trace.
//!
//! The trace is read rather than the coordinator asked, so that steps are seen while there is none.

use super::super::Failure;
use super::super::client::{Again, Coordinators};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thaw_proto::pb;
use thaw_proto::pb::watch_run_response::Update;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Between two looks at the trace: what a step's time may be off by.
const LOOK: Duration = Duration::from_millis(2);
/// Between two words on how far a run is.
const SAY: Duration = Duration::from_secs(30);
/// Before a watch is opened again.
const REOPEN: Duration = Duration::from_millis(50);

/// An update, when it was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Applied {
    pub(super) at: Instant,
    /// Updates before it, over all stages.
    pub(super) step: u64,
    pub(super) stage: u32,
}

/// A line of the trace.
#[derive(Debug, Deserialize)]
struct Line {
    step: u64,
    stage: u32,
    shards: Vec<Shard>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Shard {
    shard: u32,
    samples: Vec<u32>,
}

/// Everything the trace said, in the order it was written.
#[derive(Debug, Clone, Default)]
pub(super) struct Steps {
    pub(super) all: Vec<Applied>,
    /// The samples of each step; where it was done again, of the last time.
    pub(super) samples: BTreeMap<u64, Vec<Shard>>,
    /// Steps that were done again with other samples.
    pub(super) contradicted: u64,
}

impl Steps {
    /// One above the highest step seen.
    pub(super) fn next(&self) -> u64 {
        self.samples.last_key_value().map_or(0, |(step, _)| step + 1)
    }

    /// When each number of updates was first reached.
    pub(super) fn firsts(&self) -> BTreeMap<u64, Instant> {
        let mut firsts = BTreeMap::new();
        for applied in &self.all {
            firsts.entry(applied.step).or_insert(applied.at);
        }
        firsts
    }

    /// Lines of a trace, all seen now.
    #[cfg(test)]
    pub(super) fn of(lines: &[&str]) -> Self {
        let mut steps = Self::default();
        let read = lines.iter().filter_map(|line| serde_json::from_str(line).ok());
        read.for_each(|line| steps.take(Instant::now(), line));
        steps
    }

    fn take(&mut self, at: Instant, line: Line) {
        self.all.push(Applied { at, step: line.step, stage: line.stage });
        if let Some(before) = self.samples.insert(line.step, line.shards)
            && Some(&before) != self.samples.get(&line.step)
        {
            self.contradicted += 1;
        }
    }
}

/// How far the trace is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Reached {
    /// The step that comes next.
    next: u64,
    /// The stage of the last.
    stage: u32,
}

/// What is known of a run now. A cheap clone.
#[derive(Debug, Clone)]
pub(super) struct Sight {
    run: watch::Receiver<pb::Run>,
    reached: watch::Receiver<Reached>,
}

/// A run that is followed to its end.
pub(super) struct Followed {
    pub(super) sight: Sight,
    watching: JoinHandle<Result<pb::Run, Failure>>,
    stepping: JoinHandle<Steps>,
    done: watch::Sender<bool>,
}

impl Followed {
    /// Follows `run`, whose folder is `folder`.
    pub(super) fn start(coordinators: Coordinators, run: &pb::Run, folder: &Path) -> Self {
        let (seen, latest) = watch::channel(run.clone());
        let (said, reached) = watch::channel(Reached::default());
        let (done, is_done) = watch::channel(false);
        let (runtime, name) = (tokio::runtime::Handle::current(), run.name.clone());
        // On a thread of its own: calls to whichever coordinator answers cannot move between threads.
        let watching = tokio::task::spawn_blocking(move || runtime.block_on(watch_run(coordinators, name, seen)));
        let stepping = tokio::spawn(read_steps(folder.join("trace/steps.jsonl"), said, is_done));
        Self { sight: Sight { run: latest, reached }, watching, stepping, done }
    }

    /// The run once it has ended, and its steps. Gives up after `limit` without an update.
    pub(super) async fn end(self, limit: Duration) -> Result<(pb::Run, Steps), Failure> {
        let mut last = (self.sight.next(), Instant::now());
        let mut said = Instant::now();
        let mut watching = self.watching;
        let run = loop {
            match tokio::time::timeout(Duration::from_millis(200), &mut watching).await {
                Ok(ended) => break ended.map_err(|error| Failure::from_error(&error))??,
                Err(_elapsed) => {
                    let next = self.sight.next();
                    if said.elapsed() > SAY {
                        said = Instant::now();
                        super::say(&format!("at step {next} of {}", self.sight.planned()));
                    }
                    if next != last.0 {
                        last = (next, Instant::now());
                    } else if last.1.elapsed() > limit {
                        self.stepping.abort();
                        let run = self.sight.run();
                        return Err(Failure::failed(format!(
                            "{} stands at step {next} for {} s; it is {} ({})",
                            run.name,
                            limit.as_secs(),
                            run.state().as_str_name(),
                            run.message
                        )));
                    }
                }
            }
        };
        self.done.send_replace(true);
        let steps = self.stepping.await.map_err(|error| Failure::from_error(&error))?;
        Ok((run, steps))
    }
}

impl Sight {
    pub(super) fn run(&self) -> pb::Run {
        self.run.borrow().clone()
    }

    pub(super) fn next(&self) -> u64 {
        self.reached.borrow().next
    }

    /// Updates that its stages have at most.
    fn planned(&self) -> u64 {
        let stages = self.run().plan.map(|plan| plan.stages).unwrap_or_default();
        stages.iter().map(|stage| u64::from(stage.max_steps)).sum()
    }

    /// When the run was first seen as `wanted`, or had ended. `None` after `limit`.
    pub(super) async fn until_run(&self, limit: Duration, wanted: impl Fn(&pb::Run) -> bool) -> Option<Instant> {
        let mut run = self.run.clone();
        let seen = tokio::time::timeout(limit, run.wait_for(|run| wanted(run) || has_ended(run))).await;
        seen.is_ok_and(|seen| seen.is_ok()).then(Instant::now)
    }

    /// When the update after `step` others was seen. `None` after `limit`, and where the run ends before.
    pub(super) async fn until_step(&self, limit: Duration, step: u64) -> Option<Instant> {
        self.until_reached(limit, |reached| reached.next > step).await.then(Instant::now)
    }

    /// Until an update of this stage, or of a later one, was seen. `false` as for [`Self::until_step`].
    pub(super) async fn until_stage(&self, limit: Duration, stage: u32) -> bool {
        self.until_reached(limit, |reached| reached.stage >= stage).await
    }

    /// Until the last update of the present stage was seen, or a later one where the stage ends before its plan does. `false` as for
    /// [`Self::until_step`], and in the last stage.
    pub(super) async fn until_stage_ends(&self, limit: Duration) -> bool {
        let now = *self.reached.borrow();
        let stages = self.run().plan.map(|plan| plan.stages).unwrap_or_default();
        let ends = stages.iter().scan(0, |sum, stage| {
            *sum += u64::from(stage.max_steps);
            Some(*sum)
        });
        let Some(end) = ends.take(stages.len().saturating_sub(1)).find(|end| *end > now.next) else { return false };
        self.until_reached(limit, |reached| reached.next >= end || reached.stage > now.stage).await
    }

    async fn until_reached(&self, limit: Duration, wanted: impl Fn(&Reached) -> bool) -> bool {
        let (mut reached, mut run) = (self.reached.clone(), self.run.clone());
        let came = async {
            tokio::select! {
                came = reached.wait_for(wanted) => came.is_ok(),
                _ = run.wait_for(has_ended) => false,
            }
        };
        tokio::time::timeout(limit, came).await.unwrap_or(false)
    }

    pub(super) fn has_ended(&self) -> bool {
        has_ended(&self.run.borrow())
    }
}

pub(super) fn has_ended(run: &pb::Run) -> bool {
    matches!(run.state(), pb::RunState::Succeeded | pb::RunState::Failed | pb::RunState::Cancelled)
}

/// Watches a run at whichever coordinator answers. That none does for a while is no failure here.
async fn watch_run(
    mut coordinators: Coordinators,
    name: String,
    seen: watch::Sender<pb::Run>,
) -> Result<pb::Run, Failure> {
    let request = pb::WatchRunRequest { name, after_revision: 0, include_progress: false };
    loop {
        let opened = coordinators.call(Again::Yes, async |mut runs| runs.watch_run(request.clone()).await).await;
        let Ok(mut updates) = opened else {
            tokio::time::sleep(REOPEN).await;
            continue;
        };
        loop {
            match updates.message().await {
                Ok(Some(message)) => {
                    if let Some(Update::Run(run)) = message.update {
                        // A coordinator that follows may be behind the one asked before.
                        seen.send_if_modified(|latest| {
                            let newer = run.revision >= latest.revision;
                            if newer {
                                *latest = run;
                            }
                            newer
                        });
                    }
                }
                Ok(None) => break,
                Err(broken) => {
                    // Whatever it was, the next coordinator is asked.
                    let _ = coordinators.after_stream(&broken);
                    break;
                }
            }
        }
        let latest = seen.borrow().clone();
        if has_ended(&latest) {
            return Ok(latest);
        }
        tokio::time::sleep(REOPEN).await;
    }
}

/// Reads the trace as it grows, until told that no more comes.
async fn read_steps(path: PathBuf, said: watch::Sender<Reached>, is_done: watch::Receiver<bool>) -> Steps {
    let (mut file, mut rest) = (None, Vec::new());
    let mut steps = Steps::default();
    loop {
        let last = *is_done.borrow();
        if file.is_none() {
            file = File::open(&path).ok();
        }
        let mut grown = Vec::new();
        // An error is a file that is not there yet, and else shows as missing steps.
        if file.as_mut().is_some_and(|file| file.read_to_end(&mut grown).is_ok()) && !grown.is_empty() {
            let at = Instant::now();
            rest.extend_from_slice(&grown);
            let whole = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
            let before = steps.all.len();
            // A line that was cut short by a death is not one.
            let lines = rest[..whole].split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
            lines.for_each(|line| steps.take(at, line));
            rest.drain(..whole);
            if steps.all.len() > before {
                let stage = steps.all.last().map_or(0, |last| last.stage);
                said.send_replace(Reached { next: steps.next(), stage });
            }
        }
        if last {
            return steps;
        }
        tokio::time::sleep(LOOK).await;
    }
}
