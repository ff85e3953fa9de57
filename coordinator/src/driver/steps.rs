//! One step of a run's machine: step, save, speak.

use super::main_loop::MainLoop;
use super::save::{Save, save};
use super::stored::{self, StoredRun, run_key};
use super::{Error, outbound};
use crate::folder::Lines;
use crate::leader::Fenced;
use crate::store::Revision;
use crate::{clock, lines};
use futures::{StreamExt as _, stream};
use thaw_core::culprit::Inquest;
use thaw_core::run_machine::{self, Effect, Event, Input, Observed, Outcome, Rejection};
use thaw_mutants::planted;
use thaw_proto::ids::RunId;
use thaw_runtime::telemetry;
use tracing::{Instrument, Span};

/// Runs of one tick whose changes are on their way to the store at once (DRIVE-7).
const SAVES_AT_ONCE: usize = 32;

/// A step of a run's machine whose change the store has yet to take.
struct Step {
    id: RunId,
    /// What to store, and the revision of what it replaces; once it is stored, its own. `None`: nothing changed.
    next: Option<(StoredRun, Revision)>,
    observed: Observed,
    effects: Vec<Effect>,
    events: Vec<Event>,
    span: Span,
}

impl MainLoop {
    /// One step of one run. The outer error ends the loop.
    pub(super) async fn feed(&mut self, id: &RunId, input: &Input) -> Result<Result<(), Rejection>, Error> {
        match self.step(id, input) {
            Ok(Some(step)) => {
                let step = keep(&self.fenced, step).await?;
                let span = step.span.clone();
                self.conclude(step).instrument(span).await;
                Ok(Ok(()))
            }
            Ok(None) => Ok(Ok(())),
            Err(rejection) => Ok(Err(rejection)),
        }
    }

    /// One step each of several runs, none of them there twice (DRIVE-7). What is turned away is said with `why`.
    pub(super) async fn feed_all(&mut self, inputs: Vec<(RunId, Input)>, why: &str) -> Result<(), Error> {
        let mut steps = Vec::new();
        for (id, input) in inputs {
            match self.step(&id, &input) {
                Ok(step) => steps.extend(step),
                Err(rejection) => tracing::error!(run = %id, %rejection, "{why}"),
            }
        }
        let fenced = self.fenced.clone();
        let mut kept = stream::iter(steps).map(|step| keep(&fenced, step)).buffered(SAVES_AT_ONCE);
        while let Some(done) = kept.next().await {
            let step = done?;
            let span = step.span.clone();
            self.conclude(step).instrument(span).await;
        }
        Ok(())
    }

    /// What an input makes of a run. `None`: there is no such run.
    fn step(&mut self, id: &RunId, input: &Input) -> Result<Option<Step>, Rejection> {
        let Some(run) = self.runs.get_mut(id) else { return Ok(None) };
        let now = clock::now();
        // Given away, and back with the outcome.
        let observed = std::mem::take(&mut run.observed);
        let outcome = match run_machine::take_step(&self.policy, &run.stored.record, observed, now, input) {
            Ok(outcome) => outcome,
            Err(refused) => {
                run.observed = refused.observed;
                return Err(refused.rejection);
            }
        };
        let Outcome { record, changed, observed, effects, events } = outcome;
        let is_changed = changed || !events.is_empty();
        let next = is_changed.then(|| (run.stored.after(run.revision, record, &events), run.revision));
        let span = run.span.clone();
        if planted("speak-before-save") {
            for effect in &effects {
                self.perform(id, effect);
            }
        }
        Ok(Some(Step { id: id.clone(), next, observed, effects, events, span }))
    }

    /// Shows what the store has taken, then speaks (DRIVE-1).
    async fn conclude(&mut self, step: Step) {
        let Step { id, next, observed, effects, events, span: _ } = step;
        let run = self.runs.get_mut(&id).expect("runs are never removed");
        if let Some((stored, revision)) = next {
            self.roster.follow(Some(&run.stored.record), &stored.record);
            run.stored = stored;
            run.revision = revision;
            for event in &events {
                let message = stored::event_message(event);
                tracing::info!(run = %id, generation = %event.generation, state = ?event.state, reason = ?event.reason, "{}", event.message);
                self.journal.append(&id, &run.folder, Lines::Events, lines::event(&message));
                self.journal.append(&id, &run.folder, Lines::Logs, lines::log_of_event(&message));
            }
            // The report first: whoever sees the end finds the report.
            if run.has_ended() {
                self.write_report(&id).await;
            }
            let run = self.runs.get_mut(&id).expect("runs are never removed");
            self.views.publish(&id, run.stored.shown(run.revision));
        }
        let run = self.runs.get_mut(&id).expect("runs are never removed");
        run.observed = observed;
        for effect in &effects {
            self.perform(&id, effect);
        }
        let run = self.runs.get_mut(&id).expect("runs are never removed");
        if run.has_ended() {
            run.generation_span = None;
            run.inquest = Inquest::default();
            run.span = Span::none();
            self.journal.close(&id);
        }
    }

    fn perform(&mut self, id: &RunId, effect: &Effect) {
        let Some(run) = self.runs.get_mut(id) else { return };
        let traceparent = match effect {
            Effect::StartTrainer { generation, .. } => run.span_of(*generation).in_scope(telemetry::traceparent),
            Effect::AckCheckpoint { generation, checkpoint, .. } => {
                let step = checkpoint.position.step;
                tracing::info!(parent: run.span_of(*generation), run = %id, %generation, %step, "checkpoint committed");
                None
            }
            Effect::Propose(_) | Effect::Commit { .. } | Effect::StopTrainer { .. } | Effect::SuspendTrainer { .. } => {
                None
            }
        };
        let (worker, message) =
            outbound::message(effect, &run.stored.record, traceparent.as_deref(), self.fenced.epoch());
        self.workers.send(&worker, message);
    }
}

/// Hands a step on with the revision that its change has in the store.
async fn keep(fenced: &Fenced, mut step: Step) -> Result<Step, Error> {
    if let Some((stored, revision)) = &mut step.next {
        let write = Save { key: run_key(&step.id), value: stored.to_bytes(), expected: Some(*revision), also: None };
        *revision = save(fenced, write).instrument(step.span.clone()).await?;
    }
    Ok(step)
}
