//! The loop itself: what it owns, receives, and does at a tick.

use super::queue::Tenants;
use super::requests::Requests;
use super::roster::Roster;
use super::save::{self, Save, save};
use super::stored::{self, RUNS, StoredRun, run_key};
use super::workers::Workers;
use super::{Command, Error, NewRun, Reply, UserAction, rebuild};
use crate::folder::{Lines, RunFolder};
use crate::journal::Journal;
use crate::leader::Fenced;
use crate::store::Revision;
use crate::views::Views;
use crate::{clock, lines, report};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use thaw_core::culprit::Inquest;
use thaw_core::gang::FreeSlot;
use thaw_core::run_machine::{self, Input, Observed, Policy};
use thaw_core::scheduler::{Decided, Give, Reclaim, Verdict};
use thaw_mutants::planted;
use thaw_proto::convert::WireEnum;
use thaw_proto::ids::{Generation, Incarnation, RunId};
use thaw_proto::pb;
use thaw_proto::run::RunState;
use thaw_runtime::{surroundings, telemetry};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::Span;
use uuid::Uuid;

/// Between ticks of the machines.
const TICK: Duration = Duration::from_millis(200);

/// Owns every run while this coordinator leads.
#[derive(Debug)]
pub struct MainLoop {
    pub(super) fenced: Fenced,
    pub(super) views: Views,
    pub(super) journal: Journal,
    data_dir: PathBuf,
    queue: mpsc::Receiver<Command>,
    pub(super) policy: Policy,
    pub(super) tenants: Tenants,
    pub(super) runs: BTreeMap<RunId, Run>,
    pub(super) roster: Roster,
    pub(super) workers: Workers,
    requests: Requests,
}

#[derive(Debug)]
pub(super) struct Run {
    pub(super) stored: StoredRun,
    pub(super) revision: Revision,
    pub(super) observed: Observed,
    pub(super) folder: RunFolder,
    /// What is heard of a generation that may have to be explained.
    pub(super) inquest: Inquest,
    /// Lives as long as the run; dropped, so exported, at its end.
    pub(super) span: Span,
    /// Of the present generation, below the run's.
    pub(super) generation_span: Option<(Generation, Span)>,
}

/// Why the loop ended.
#[derive(Debug)]
pub enum Ended {
    Stopped,
    LeadershipLost,
    Failed(Error),
}

impl MainLoop {
    pub(super) async fn load(
        fenced: Fenced,
        views: Views,
        journal: Journal,
        data_dir: PathBuf,
        tenants: Tenants,
        queue: mpsc::Receiver<Command>,
    ) -> Result<Self, Error> {
        let listed = save::read(&fenced, || fenced.reader().list(RUNS)).await?;
        let mut this = Self {
            fenced,
            views,
            journal,
            data_dir,
            queue,
            policy: Policy::default(),
            tenants,
            runs: BTreeMap::new(),
            roster: Roster::default(),
            workers: Workers::new(),
            requests: Requests::default(),
        };
        for entry in listed.value {
            let stored = StoredRun::from_bytes(&entry.value)
                .map_err(|source| Error::Stored { run: entry.key.clone(), source })?;
            this.take(stored, entry.mod_revision)?;
        }
        let unended: Vec<RunId> =
            this.runs.iter().filter(|(_, run)| !run.has_ended()).map(|(id, _)| id.clone()).collect();
        for id in &unended {
            this.feed(id, &Input::CoordinatorStarted)
                .await?
                .unwrap_or_else(|rejection| tracing::error!(run = %id, %rejection, "cannot take over"));
        }
        let ended: Vec<RunId> = this.runs.keys().filter(|id| !unended.contains(id)).cloned().collect();
        for id in ended {
            this.write_report(&id).await;
        }
        this.requests = Requests::load(&this.fenced).await;
        Ok(this)
    }

    /// Runs until told to stop, or until the term is over.
    pub async fn run(mut self, stop: CancellationToken) -> Ended {
        let _watched = self.workers.watch_our_time();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let fenced = self.fenced.clone();
        loop {
            let done = tokio::select! {
                // First the end: what is queued then may come of it, as sessions that break, and is for the next
                // leader.
                biased;
                () = stop.cancelled() => return Ended::Stopped,
                () = fenced.over() => return Ended::LeadershipLost,
                _ = ticks.tick() => self.tick().await.map(drop),
                command = self.queue.recv() => match command {
                    Some(command) => self.handle(command).await,
                    None => return Ended::Stopped,
                },
            };
            match done {
                Ok(()) => {}
                Err(Error::Stopped) => return Ended::LeadershipLost,
                Err(error) => return Ended::Failed(error),
            }
        }
    }

    async fn handle(&mut self, command: Command) -> Result<(), Error> {
        match command {
            Command::Create { new, reply } => {
                let created = self.create(*new).await?;
                answer(reply, Ok(created));
            }
            Command::Requested { request_id, reply } => {
                let known = Requests::find(&self.fenced, &request_id).await?;
                let run = known.and_then(|(request, _)| self.views.get(&request.run));
                answer(reply, Ok(run));
            }
            Command::Act { run, action, reply } => {
                let done = self.act(&run, action).await?;
                answer(reply, done);
            }
            Command::Folder { run, reply } => answer(reply, self.find(&run).map(|found| found.folder.clone())),
            Command::Explain { run, reply } => answer(reply, self.explain(&run)),
            Command::Workers { reply } => answer(reply, Ok(self.list_workers())),
            Command::OpenSession { hello, outbox, reply } => {
                let opened = self.open_session(*hello, outbox).await?;
                answer(reply, opened);
            }
            Command::FromWorker { session, message } => self.hear(&session, *message).await?,
            Command::CloseSession { session } => {
                if self.workers.is_current(&session) {
                    tracing::info!(worker = %session.worker, "the worker's session has ended");
                    self.lose_workers(Some(session.worker)).await?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn find(&self, id: &RunId) -> Result<&Run, Error> {
        self.runs.get(id).ok_or_else(|| Error::NotFound(id.clone()))
    }

    /// Owns a run as the store has it, and shows it.
    fn take(&mut self, stored: StoredRun, revision: Revision) -> Result<(), Error> {
        let id = stored.record.id.clone();
        let span = if stored.record.state.has_ended() { Span::none() } else { tracing::info_span!("run", run = %id) };
        if let Some(parent) = &stored.traceparent {
            telemetry::set_parent(&span, parent);
        }
        let folder = RunFolder::of(&id, stored.record.spec.checkpoint.url.as_ref(), &self.data_dir)
            .map_err(|source| Error::Folder { run: id.clone(), source })?;
        self.views.publish(&id, stored.shown(revision));
        let (observed, inquest) = (Observed::default(), Inquest::default());
        self.roster.follow(None, &stored.record);
        self.runs.insert(id, Run { stored, revision, observed, folder, inquest, span, generation_span: None });
        Ok(())
    }

    async fn create(&mut self, new: NewRun) -> Result<Arc<pb::Run>, Error> {
        let now = clock::now_ms();
        let request_id = new.request_id.clone().filter(|_| !planted("request-forgotten"));
        let (mut also, mut before_ms) = (None, None);
        if let Some(request_id) = &request_id {
            let known = Requests::find(&self.fenced, request_id).await?;
            if let Some((request, _)) = known.as_ref().filter(|(request, _)| request.is_fresh(now))
                && let Some(run) = self.views.get(&request.run)
            {
                return Ok(run);
            }
            before_ms = known.as_ref().map(|(request, _)| request.at_ms);
            also = Some(Requests::write(request_id, &new.id, now, known.map(|(_, revision)| revision)));
        }
        let root = tracing::info_span!("run", run = %new.id);
        let stored = StoredRun::new(new.record(now), root.in_scope(telemetry::traceparent));
        let write = Save { key: run_key(&new.id), value: stored.to_bytes(), expected: None, also };
        let revision = save(&self.fenced, write).await?;
        if let Some(request_id) = &request_id {
            self.requests.written(request_id, now, revision, before_ms);
        }
        tracing::info!(parent: &root, run = %new.id, "submitted");
        let events: Vec<pb::Event> = stored.kept_events().into_iter().map(|kept| kept.event).collect();
        self.take(stored, revision)?;
        for event in events {
            self.journal.append(&new.id, &new.folder, Lines::Events, lines::event(&event));
        }
        self.views.get(&new.id).ok_or(Error::NotFound(new.id))
    }

    async fn act(&mut self, id: &RunId, action: UserAction) -> Result<Result<Arc<pb::Run>, Error>, Error> {
        if let Err(error) = self.find(id) {
            return Ok(Err(error));
        }
        let input = match action {
            UserAction::Cancel => Input::Cancel,
            UserAction::Suspend => Input::Suspend,
            UserAction::Resume => Input::Resume,
            UserAction::Scale { workers } => Input::Scale { workers },
        };
        Ok(match self.feed(id, &input).await? {
            Ok(()) => self.views.get(id).ok_or_else(|| Error::NotFound(id.clone())),
            Err(source) => {
                let state =
                    self.find(id).map_or_else(|_| String::new(), |run| run.stored.record.state.name().to_uppercase());
                Err(Error::Rejected { run: id.clone(), state, source })
            }
        })
    }

    /// The run's report, unless it is there. A failure is said and leaves the run as it is: the store has the outcome.
    pub(super) async fn write_report(&self, id: &RunId) {
        let Some(run) = self.runs.get(id) else { return };
        let path = run.folder.path().join(report::PATH);
        let message = stored::message(&run.stored.record, run.revision.0);
        let folder = run.folder.clone();
        let record = run.stored.to_json();
        let written = surroundings::blocking(move || {
            if path.exists() {
                return Ok(());
            }
            // First, since the summary's being there says that both are.
            folder.write(rebuild::RECORD, &record)?;
            let summary = report::Summary::of(&message)?;
            let json = serde_json::to_vec_pretty(&summary)?;
            folder.write(report::PATH, &json)?;
            Ok::<_, thaw_runtime::BoxError>(())
        });
        match written.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(run = %id, error = &*error, "the run's report cannot be written"),
            Err(error) => {
                tracing::error!(run = %id, error = &error as &dyn std::error::Error, "writing the run's report ended early")
            }
        }
    }

    /// Handles what has been said so far, for callers that keep the time themselves. [`MainLoop::run`] is for all
    /// others.
    ///
    /// # Errors
    /// The term is over, or the store refuses what trying again cannot mend.
    pub async fn handle_queued(&mut self) -> Result<(), Error> {
        while let Ok(command) = self.queue.try_recv() {
            self.handle(command).await?;
        }
        Ok(())
    }

    /// Gives every run its turn; says for whom others are asked to give slots up. For callers that keep the time
    /// themselves.
    ///
    /// # Errors
    /// As [`MainLoop::handle_queued`].
    pub async fn tick(&mut self) -> Result<Option<Reclaim>, Error> {
        self.lose_workers(None).await?;
        self.requests.forget_old(&self.fenced, clock::now_ms()).await;
        // One decision for all, so that no slot is given twice.
        let Decided { mut verdicts, reclaim } = self.schedule();
        let resting = self.resting();
        if let Some(reclaim) = &reclaim {
            self.feed_all(asked(reclaim), "a run gives up nothing").await?;
        }
        let mut inputs = Vec::new();
        for (id, run) in self.runs.iter().filter(|(_, run)| run.wants_ticks()) {
            let slots = verdicts.remove(id);
            let waits_on = |verdict| run_machine::waits_as_before(&run.stored.record, &run.observed, verdict, resting);
            if slots.as_ref().is_some_and(waits_on) {
                continue;
            }
            inputs.push((id.clone(), Input::Tick { fresh: fresh(slots.as_ref()), slots, resting }));
        }
        self.feed_all(inputs, "a tick was turned away").await?;
        let is_unexplained = |run: &Run| run.observed.unexplained().is_some();
        let lost: Vec<RunId> =
            self.runs.iter().filter(|(_, run)| is_unexplained(run)).map(|(id, _)| id.clone()).collect();
        for id in lost {
            self.judge(&id).await?;
        }
        Ok(reclaim.filter(|reclaim| !reclaim.from.is_empty()))
    }

    /// Tells whom a run's last gang waited for, where that is asked for and known by now: an event, and a line for each rank.
    pub(super) async fn judge(&mut self, id: &RunId) -> Result<(), Error> {
        let Some(run) = self.runs.get_mut(id) else { return Ok(()) };
        let Some(lost) = run.observed.unexplained() else { return Ok(()) };
        let Some(judgement) = run.inquest.judge(lost, clock::now().steady_ms) else { return Ok(()) };
        for (rank, text) in judgement.lines() {
            let line = pb::LogLine { time: None, source: format!("rank {rank}"), text };
            self.journal.append(id, &run.folder, Lines::Logs, lines::log(line));
        }
        let input = Input::CulpritFound { judgement: Box::new(judgement) };
        if let Err(rejection) = self.feed(id, &input).await? {
            tracing::info!(run = %id, %rejection, "nobody is named");
        }
        Ok(())
    }

    pub(super) fn held(&self) -> BTreeSet<FreeSlot> {
        self.runs.values().flat_map(|run| run.stored.record.held_slots()).collect()
    }
}

impl Run {
    /// The span of a generation; a new one where it is not the one before.
    pub(super) fn span_of(&mut self, generation: Generation) -> &Span {
        let held = self.generation_span.take().filter(|(held, _)| *held == generation);
        let make = || (generation, tracing::info_span!(parent: &self.span, "generation", %generation));
        &self.generation_span.insert(held.unwrap_or_else(make)).1
    }

    pub(super) fn has_ended(&self) -> bool {
        self.stored.record.state.has_ended()
    }

    fn wants_ticks(&self) -> bool {
        match self.stored.record.state {
            RunState::Pending
            | RunState::Admitted
            | RunState::Forming
            | RunState::Running
            | RunState::Resizing
            | RunState::Suspending
            | RunState::Preempting => true,
            RunState::Suspended | RunState::Succeeded | RunState::Failed | RunState::Cancelled => false,
        }
    }
}

/// Incarnations for the trainers that may be started.
fn fresh(slots: Option<&Verdict>) -> Vec<Incarnation> {
    let granted = match slots {
        Some(Verdict::Granted(places)) => places.len(),
        Some(Verdict::Waits { .. }) | None => 0,
    };
    if granted == 0 {
        return Vec::new();
    }
    // Numbered from one that was drawn, so that what is stored of a large gang is short.
    let drawn = surroundings::uuid().as_u128();
    (0..granted).map(|at| Incarnation(Uuid::from_u128(drawn ^ at as u128).to_string())).collect()
}

/// What runs are asked for slots that another is to have.
fn asked(reclaim: &Reclaim) -> Vec<(RunId, Input)> {
    let to = &reclaim.by;
    let input = |give: Give| match give {
        Give::Shrink { to: workers } => Input::Cede { workers, to: to.clone() },
        Give::Yield => Input::Yield { to: to.clone() },
    };
    reclaim.from.iter().map(|(id, give)| (id.clone(), input(*give))).collect()
}

fn answer<T>(reply: Reply<T>, result: Result<T, Error>) {
    if reply.send(result).is_err() {
        tracing::debug!("a caller went away before its answer");
    }
}
