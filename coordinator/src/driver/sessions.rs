//! What the loop does with workers: sessions, heartbeats, reports.

use super::inbound::{self, Report, Reported};
use super::main_loop::MainLoop;
use super::workers::HEARTBEAT_INTERVAL;
use super::{Error, Outbox, SessionId, outbound};
use crate::folder::Lines;
use crate::lines;
use std::collections::BTreeMap;
use thaw_core::run_machine::{self, Input, Trainer};
use thaw_proto::ids::{RunId, Step, WorkerName};
use thaw_proto::pb;
use thaw_proto::pb::coordinator_message::Message;
use thaw_proto::worker::{Hello, TrainerStatus};

impl MainLoop {
    pub(super) fn list_workers(&self) -> Vec<pb::Worker> {
        let runs_on = |worker: &WorkerName| self.roster.runs_on(worker).map(|id| format!("runs/{id}")).collect();
        self.workers.list(&self.held(), &self.quarantined(), runs_on)
    }

    pub(super) async fn open_session(
        &mut self,
        hello: Hello,
        outbox: Outbox,
    ) -> Result<Result<SessionId, Error>, Error> {
        let (worker, trainers) = (hello.worker.clone(), hello.trainers.clone());
        let had = self.workers.has(&worker);
        let slots = hello.slots;
        let Ok(session) = self.workers.open(hello, outbox) else {
            return Ok(Err(Error::NameTaken(worker.to_string())));
        };
        tracing::info!(%worker, slots, "the worker has a session");
        let interval = u32::try_from(HEARTBEAT_INTERVAL.as_millis()).expect("it is below a minute");
        let welcome =
            outbound::under(self.fenced.epoch(), Message::Welcome(pb::Welcome { heartbeat_interval_ms: interval }));
        self.workers.send(&worker, welcome);
        if had {
            // What was said on the older stream may not have arrived.
            self.workers_lost(std::slice::from_ref(&worker)).await?;
        }
        self.seen(&worker, &trainers).await?;
        Ok(Ok(session))
    }

    /// Gives up all that are silent, do not listen, or have closed their sessions, with `also`.
    pub(super) async fn lose_workers(&mut self, also: Option<WorkerName>) -> Result<(), Error> {
        let mut lost = self.workers.over();
        for worker in &lost {
            tracing::warn!(%worker, "the worker is silent, or does not listen; it is lost");
        }
        lost.extend(also.filter(|worker| !lost.contains(worker)));
        lost.iter().for_each(|worker| self.workers.remove(worker));
        self.workers_lost(&lost).await
    }

    async fn workers_lost(&mut self, lost: &[WorkerName]) -> Result<(), Error> {
        let mut runs: BTreeMap<RunId, Vec<WorkerName>> = BTreeMap::new();
        for worker in lost {
            for run in self.roster.runs_on(worker) {
                runs.entry(run.clone()).or_default().push(worker.clone());
            }
        }
        for (id, workers) in runs {
            if let Err(rejection) = self.feed(&id, &Input::WorkersLost { workers }).await? {
                tracing::error!(run = %id, %rejection, "the loss of workers was turned away");
            }
        }
        Ok(())
    }

    pub(super) async fn hear(
        &mut self,
        session: &SessionId,
        message: pb::worker_message::Message,
    ) -> Result<(), Error> {
        use pb::worker_message::Message;
        if !self.workers.is_current(session) {
            return Ok(());
        }
        match message {
            Message::Hello(_) => tracing::warn!(worker = %session.worker, "a second hello is left out"),
            Message::Heartbeat(heartbeat) => {
                let statuses: Result<Vec<TrainerStatus>, _> =
                    heartbeat.trainers.iter().map(TrainerStatus::try_from).collect();
                match statuses {
                    Ok(statuses) => {
                        self.workers.heard(&session.worker, statuses.clone());
                        self.seen(&session.worker, &statuses).await?;
                    }
                    Err(violations) => {
                        tracing::warn!(worker = %session.worker, %violations, "a heartbeat is not valid")
                    }
                }
            }
            Message::Report(raw) => match inbound::report(&session.worker, raw) {
                Ok(reported) => self.reported(&session.worker, reported).await?,
                Err(violations) => tracing::warn!(worker = %session.worker, %violations, "a report is not valid"),
            },
        }
        Ok(())
    }

    /// Shows every run the trainers that a worker says are alive; stops those of no run.
    async fn seen(&mut self, worker: &WorkerName, statuses: &[TrainerStatus]) -> Result<(), Error> {
        let mut by_run: BTreeMap<RunId, Vec<Trainer>> =
            self.roster.runs_on(worker).map(|id| (id.clone(), Vec::new())).collect();
        for status in statuses {
            let trainer = outbound::trainer_on(worker, &status.trainer);
            if self.runs.contains_key(&status.trainer.run) {
                by_run.entry(status.trainer.run.clone()).or_default().push(trainer);
            } else {
                let stop = outbound::stop(status.trainer.run.to_string(), &trainer, status.generation);
                self.workers.send(worker, outbound::under(self.fenced.epoch(), stop));
            }
        }
        for (id, trainers) in by_run {
            let Some(run) = self.runs.get(&id) else { continue };
            // DRIVE-6.
            let expected = self.roster.has_just(worker, &id, &trainers);
            if expected && run_machine::is_no_news(&run.stored.record, &run.observed, &trainers) {
                continue;
            }
            let input = Input::TrainersSeen { worker: worker.clone(), trainers };
            if let Err(rejection) = self.feed(&id, &input).await? {
                tracing::error!(run = %id, %rejection, "what a worker holds was turned away");
            }
        }
        Ok(())
    }

    async fn reported(&mut self, worker: &WorkerName, reported: Reported) -> Result<(), Error> {
        let Reported { run: id, trainer, generation, report } = reported;
        let Some(run) = self.runs.get(&id) else {
            tracing::debug!(run = %id, %worker, "a report about an unknown run is left out");
            return Ok(());
        };
        let record = &run.stored.record;
        let is_member = || record.generation == generation && record.member(&trainer).is_some();
        match report {
            Report::Input(input) => {
                if let Input::TrainerExited { trainer, .. } = &input {
                    self.workers.exited(worker, trainer.incarnation.as_str());
                }
                if let Err(rejection) = self.feed(&id, &input).await? {
                    tracing::info!(run = %id, %worker, %rejection, "a report was turned away");
                }
            }
            // Measurements of a gang that is over would only confuse readers.
            Report::Progress(progress) if is_member() => {
                self.journal.append(&id, &run.folder, Lines::Metrics, lines::progress(&progress));
                let step = Step(progress.position.map_or(0, |position| position.step));
                self.views.progress(&id, progress);
                if let Err(rejection) = self.feed(&id, &Input::Progressed { generation, step }).await? {
                    tracing::error!(run = %id, %rejection, "a gang's progress was turned away");
                }
            }
            Report::Evaluation(evaluation) if is_member() => {
                self.journal.append(&id, &run.folder, Lines::Metrics, lines::evaluation(&evaluation, generation));
                self.views.evaluation(&id, evaluation);
            }
            Report::Progress(_) | Report::Evaluation(_) => {}
            Report::Log(line) => self.journal.append(&id, &run.folder, Lines::Logs, lines::log(line)),
            Report::Operations(recent) => {
                // At a run's end each of its trainers is told of too, and nobody asks why.
                if let Some(run) = self.runs.get_mut(&id).filter(|run| !run.stored.record.state.has_ended()) {
                    run.inquest.hear(generation, trainer, recent);
                }
                self.judge(&id).await?;
            }
        }
        Ok(())
    }
}
