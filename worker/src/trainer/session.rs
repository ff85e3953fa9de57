//! One generation's training: the plan's stages, step by step, from where the head pointer stands to the end.
//!
//! TRAIN-1: every rank takes every decision itself, from reduced values that all hold; nothing waits for the coordinator but the end.
//! TRAIN-2: what a checkpoint holds is enough to come to the same weights as a run that was never interrupted.
//! TRAIN-3: entering a stage restores the best weights with the optimizer state and counters of that same step.
//!          Where no stage to come does that, the best weights are kept without.
//! TRAIN-4: the best weights are whole: a group that thawed after them goes back to what it was.
//! TRAIN-5: where an operation over all ranks fails, position, replica and trackers are as they were before it: what it was for is decided
//!          and applied only after it. So a rank whose gang broke goes on from where it stands, and ranks that have made as many moves hold the same.

use super::feed::{self, Feed, Order};
use super::job::Job;
use super::outbox::Outbox;
use super::pace::Pace;
use super::prefix::{self, Prefix};
use super::replica::{self, Extent, Replica, StepPlan, StepReport, Votes};
use super::save::{self, Hosted, Saver};
use super::state::{Best, Point, State};
use super::statistics;
use super::trace::{Trace, TraceStep};
use std::sync::Arc;
use std::time::{Duration, Instant};
use thaw_core::schedule::Rates;
use thaw_core::stage_end::{self, AfterStage, Decision, Standing};
use thaw_data::index::Part;
use thaw_proto::ids::{Generation, StageIndex, Step};
use thaw_proto::plan::PlannedStage;
use thaw_proto::run::{Evaluation, Position, RunReason, RunResult, StageEnd, StageResult};
use thaw_proto::spec::{ClassWeights, OnEnter};
use thaw_torch::runtime;
use thaw_torch::tch::Device;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Replica(#[from] replica::Error),
    #[error(transparent)]
    Prefix(#[from] prefix::Error),
    #[error(transparent)]
    Save(#[from] save::Error),
    #[error("cannot write the trace")]
    Trace(#[source] std::io::Error),
    #[error(
        "no evaluation was ever finite, so there are no weights worth keeping; lower learning_rate or set max_grad_norm"
    )]
    NeverFinite,
    #[error("the data ended before the stage did")]
    DataEnded,
    #[error("a newer gang is proposed")]
    Superseded,
}

/// How a session ended, where it did not fail.
pub(crate) enum Ending {
    Finished { result: Box<RunResult>, reason: RunReason },
    Suspended,
}

pub(crate) struct Session<'a> {
    pub(crate) job: &'a Job,
    pub(crate) generation: Generation,
    pub(crate) replica: &'a mut Replica,
    pub(crate) state: &'a mut State,
    /// Whether the state is from before this generation and from no checkpoint.
    pub(crate) kept: bool,
    pub(crate) outbox: &'a Arc<Outbox>,
    /// Of the present stage, where its frozen part is run apart.
    pub(crate) prefix: Option<Prefix>,
    /// Samples of evaluations since the last measurement; their time is not a step's.
    pub(crate) evaluated: prefix::Counts,
    pub(crate) saver: Saver,
    pub(crate) hosted: &'a mut Hosted,
    /// How long putting back the best weights took when the last stage ended.
    pub(crate) restored_in: Duration,
    /// Where the spec asks for it.
    pub(crate) trace: Option<Trace>,
}

impl Session<'_> {
    /// Trains to the end of the run, or to a suspension.
    pub(crate) fn run(&mut self) -> Result<Ending, Error> {
        self.replica.note(self.state.position);
        let Some(reason) = self.stages()? else { return Ok(Ending::Suspended) };
        self.finish(reason)
    }

    /// `None` for a suspension.
    fn stages(&mut self) -> Result<Option<RunReason>, Error> {
        if self.kept && self.state.point == Point::Entering && self.state.position.step > Step(0) {
            // The generation before may have lost the checkpoint of this boundary, which a run's end rests on.
            self.save(Vec::new())?;
        }
        if let Some(reason) = self.after_ended_stage()? {
            return Ok(Some(reason));
        }
        loop {
            let index = self.state.position.stage;
            let stage = &self.job.plan.stages[index.0 as usize];
            let _span = tracing::info_span!("stage", name = stage.name, generation = self.generation.0).entered();
            let Some(end) = self.stage(stage)? else { return Ok(None) };
            self.end_stage(index, end)?;
            if let Some(reason) = self.after_ended_stage()? {
                return Ok(Some(reason));
            }
        }
    }

    /// At the boundary after a stage: the reason to end the run, if there is one. Once the next stage is entered that is decided: the tracker
    /// compares with what was best as it began.
    fn after_ended_stage(&self) -> Result<Option<RunReason>, Error> {
        let stage = self.state.position.stage;
        if stage.0 == 0 || self.state.point != Point::Entering {
            return Ok(None);
        }
        let ended = StageIndex(stage.0 - 1);
        match self.state.tracker.after_stage(&self.job.plan, ended, self.job.spec.stop_when_no_gain) {
            AfterStage::NextStage(_) => Ok(None),
            AfterStage::EndRun(reason) => Ok(Some(reason)),
            AfterStage::Fail(_) => Err(Error::NeverFinite),
        }
    }

    /// Trains one stage from where it stands. `None` for a suspension.
    fn stage(&mut self, stage: &PlannedStage) -> Result<Option<StageEnd>, Error> {
        let started = Instant::now();
        let before = self.state.stage_seconds;
        let _since_here = runtime::memory_use(true);
        if self.state.point == Point::Entering {
            self.enter(stage)?;
        } else {
            self.replica.set_trainable(indices(stage))?;
        }
        if self.state.point == Point::Thawed {
            self.recompute_statistics(stage)?;
        }
        let (outbox, generation) = (Arc::clone(self.outbox), self.generation);
        self.prefix = Prefix::of_stage(self.job, stage, self.replica, move || outbox.is_superseded(generation))?;
        if self.state.point == Point::Entered {
            self.evaluate_start(stage)?;
        }
        if self.state.point == Point::Deciding {
            self.decide(stage)?;
        }
        if let Point::Ending(end) = self.state.point {
            return Ok(Some(end));
        }
        let steps = self.state.position.stage_step..stage.max_steps;
        let order = Order::new(&self.job.plan, &self.job.spec, &self.job.shard_sizes);
        let (dataset, shards) = (&self.job.dataset, self.replica.shards());
        let parts = self.job.spec.gradient_accumulation_steps;
        let first_epoch = self.state.first_epoch;
        let mut feed = Feed::start(dataset, order.clone(), first_epoch, steps, shards, parts, self.prefix.as_ref())?;
        let ended = self.state.tracker.ended_stages(&self.state.ended);
        let rates = Rates::entering(&self.job.plan, &ended).expect("the stage is in the plan");
        let mut pace = Pace::new();
        self.saver.enter_stage();
        self.touch_memory_of_next(stage);
        loop {
            // A rank that is alone hears of it nowhere else.
            if self.outbox.is_superseded(self.generation) {
                return Err(Error::Superseded);
            }
            let waited = Instant::now();
            let batches = feed.next(self.prefix.as_mut(), self.replica.model_mut()).ok_or(Error::DataEnded)??;
            let counts = self.prefix.as_mut().map(Prefix::take_counts).unwrap_or_default();
            let data_wait = waited.elapsed().saturating_sub(counts.time).as_secs_f64();
            let at = self.state.position;
            self.replica.note(at);
            let plan = StepPlan {
                step: at.step,
                samples: order.step_size(at.stage_step),
                weight: self.step_weight(&order, at.stage_step),
                rates: rates.at(at.stage_step, self.state.tracker.reductions()),
            };
            let votes = || Votes {
                suspend: self.outbox.suspension_asked(),
                save: self.saver.is_due(at.step.next()),
                busy: self.saver.is_busy(),
            };
            let report = self.replica.train_step(&plan, batches, votes)?;
            // With nothing in between that can fail (TRAIN-5).
            self.state.position.stage_step += 1;
            self.state.position.step = at.step.next();
            self.state.move_to(Point::Deciding);
            let saved = self.saver.after_step(&report, self.hosted.is_idle_of_checkpoints());
            self.state.stage_seconds = before + started.elapsed().as_secs_f64();
            pace.add(&report, data_wait, counts, plan.samples);
            pace.add_evaluated(std::mem::take(&mut self.evaluated));
            self.after_step(stage, &order, at, &plan, &report, &mut pace)?;
            saved?;
            if let Decision::End(end) = self.decide(stage)? {
                self.state.stage_seconds = before + started.elapsed().as_secs_f64();
                return Ok(Some(end));
            }
            self.state.stage_seconds = before + started.elapsed().as_secs_f64();
            let Votes { suspend, save, busy } = report.votes;
            if suspend {
                // Nobody goes on from a host's memory after that.
                let place = (&mut *self.replica, &*self.state);
                pace.stall(self.saver.save(self.job, place, None, Vec::new(), Instant::now())?);
                return Ok(None);
            }
            if save && !busy {
                pace.stall(self.save(Vec::new())?);
            }
            pace.stall(self.copy_to_host());
        }
    }

    /// The next stage's gradients and optimizer state take memory that this process has never touched. The system finds it meanwhile.
    fn touch_memory_of_next(&self, stage: &PlannedStage) {
        let next = self.job.plan.stages.get(self.state.position.stage.0 as usize + 1);
        let more = next.map_or(0, |next| next.memory_bytes.saturating_sub(stage.memory_bytes));
        let gradients = next.map_or(0, |next| next.all_reduce_bytes.saturating_sub(stage.all_reduce_bytes));
        if more > 0 && self.replica.model().device() == Device::Cpu {
            // A thread that cannot start costs the next stage's begin a moment, nothing else.
            let touch = self.replica.touch_memory(more, gradients);
            let _ = std::thread::Builder::new().name("memory".to_owned()).spawn(touch);
        }
    }

    /// Restores the best weights, and thaws.
    fn enter(&mut self, stage: &PlannedStage) -> Result<(), Error> {
        let restored = match stage.on_enter {
            // After the last stage this was done already; not so where the run resumes.
            OnEnter::RestoreBest => self.restore_best()?,
            OnEnter::Keep => None,
        };
        let extent = self.extent_of_best();
        if let Some(best) = &mut self.state.best {
            // The best weights are those of every group that is ever trained after them, so also of those that thaw only now (TRAIN-4).
            let new: Vec<usize> = indices(stage).into_iter().filter(|group| !best.groups.contains_key(group)).collect();
            best.groups.extend(self.replica.snapshot(&new, Extent::Whole, None));
            if extent == Extent::Weights {
                let groups = std::mem::take(&mut best.groups).into_iter();
                best.groups = groups.map(|(group, copy)| (group, copy.without_optimizer())).collect();
            }
        }
        self.replica.set_trainable(indices(stage))?;
        self.state.traced.restored = restored;
        self.state.move_to(Point::Thawed);
        Ok(())
    }

    fn recompute_statistics(&mut self, stage: &PlannedStage) -> Result<(), Error> {
        if stage.recompute_batch_norm {
            let trained = self.job.ever_trained(self.state.position.stage);
            let given_up = || self.outbox.is_superseded(self.generation);
            let changed = statistics::recompute(self.job, self.replica, &trained, &given_up)?;
            self.replica.restamp(&changed);
        }
        self.state.move_to(Point::Entered);
        Ok(())
    }

    fn evaluate_start(&mut self, stage: &PlannedStage) -> Result<(), Error> {
        let baseline = self.evaluate(Part::Eval)?;
        if self.state.tracker.enter_stage(stage, &baseline) == Standing::Best {
            self.keep_best();
        }
        self.state.move_to(Point::Training);
        Ok(())
    }

    /// Evaluates where that is due, and decides whether the stage goes on.
    fn decide(&mut self, stage: &PlannedStage) -> Result<Decision, Error> {
        let (spec, plan) = (&self.job.spec, &self.job.plan);
        let step = self.state.position.stage_step;
        if stage_end::evaluation_due(stage, spec.eval_steps, plan.steps_per_epoch, step) {
            let evaluation = self.evaluate(Part::Eval)?;
            if self.state.tracker.observe(stage, &evaluation) == Standing::Best {
                self.keep_best();
            }
            self.state.deciding = Some(evaluation);
        }
        let decision = self.state.tracker.decide(stage, plan.steps_per_epoch, step);
        self.state.move_to(match decision {
            Decision::Continue => Point::Training,
            Decision::End(end) => Point::Ending(end),
        });
        Ok(decision)
    }

    /// What a step's samples count for over all shards, in shard order, so that every rank finds the same number.
    fn step_weight(&self, order: &Order, stage_step: u32) -> f64 {
        if self.job.spec.class_weights == ClassWeights::Equal {
            return f64::from(order.step_size(stage_step));
        }
        let index = self.job.dataset.index();
        let label = |sample: &u32| index.label(Part::Train, *sample).map_or(-1, i64::from);
        let weight = |shard: u32| {
            let labels = order.samples(self.state.first_epoch, stage_step, shard);
            self.replica.weight_of(&labels.iter().map(label).collect::<Vec<_>>())
        };
        (0..self.job.plan.logical_shards).map(weight).sum()
    }

    fn keep_best(&mut self) {
        let groups = self.job.ever_trained(self.state.position.stage);
        // What has changed since is let go first, so that there are never two copies of it.
        let extent = self.extent_of_best();
        let mut known = self.state.best.take().map(|best| best.groups).unwrap_or_default();
        known.retain(|group, known| known.stamp == self.replica.stamp_of(*group, extent));
        let groups = self.replica.snapshot_evaluated(&groups, extent, Some(&known));
        self.state.best = Some(Best { groups });
    }

    /// What is kept of the best weights of this stage (TRAIN-3).
    fn extent_of_best(&self) -> Extent {
        let to_come = self.job.plan.stages.iter().skip(self.state.position.stage.0 as usize + 1);
        let restores = to_come.into_iter().any(|stage| stage.on_enter == OnEnter::RestoreBest);
        if restores { Extent::Whole } else { Extent::Weights }
    }

    fn evaluate(&mut self, part: Part) -> Result<Evaluation, Error> {
        let batches = feed::evaluation_batches(self.job.dataset.index().size(part));
        let share = self.replica.evaluation_share(batches);
        let Self { job, replica, prefix, outbox, generation, .. } = self;
        let mut source = feed::evaluation_source(&job.dataset, part, share, prefix.as_ref())?;
        let next = |model: &mut _| match outbox.is_superseded(*generation) {
            true => Some(Err(Error::Superseded)),
            false => source.next(prefix.as_mut(), model).map(|micro| micro.map_err(Error::from)),
        };
        let evaluation = replica.evaluate(self.state.position, next)?;
        let counts = self.prefix.as_mut().map(Prefix::take_counts).unwrap_or_default();
        self.evaluated.add(prefix::Counts { time: Duration::ZERO, ..counts });
        if self.replica.rank() == 0 && part == Part::Eval {
            self.outbox.evaluation(&evaluation);
        }
        Ok(evaluation)
    }

    /// Digest, trace and progress, where they are due.
    fn after_step(
        &mut self,
        stage: &PlannedStage,
        order: &Order,
        at: Position,
        plan: &StepPlan,
        report: &StepReport,
        pace: &mut Pace,
    ) -> Result<(), Error> {
        let done = self.state.position.step;
        if !report.applied {
            tracing::warn!(
                step = done.0,
                grad_norm = report.grad_norm,
                "every trainer skipped an update whose gradient is not finite"
            );
        }
        let digest = match self.job.spec.verification.digest_steps {
            Some(every) if done.0.is_multiple_of(u64::from(every)) => Some(self.replica.digest(done)),
            Some(_) | None => None,
        };
        if let Some(trace) = &mut self.trace {
            // A gang that breaks meanwhile has taken the step all the same.
            let digest = digest.as_ref().and_then(|digest| digest.as_ref().ok()).copied();
            let step = TraceStep { position: at, plan, loss: report.loss, first_epoch: self.state.first_epoch, digest };
            trace.step(&mut self.state.traced, order, self.job, &step).map_err(Error::Trace)?;
        }
        digest.transpose()?;
        let due = done.0.is_multiple_of(u64::from(self.job.spec.logging_steps))
            || self.state.position.stage_step == stage.max_steps;
        if due && self.replica.rank() == 0 {
            let epoch = f64::from(self.state.position.stage_step) / f64::from(self.job.plan.steps_per_epoch);
            self.outbox.progress(self.state.position, &pace.take(), report, &plan.rates, epoch);
        }
        Ok(())
    }

    /// Moves to the boundary after the stage, and saves it with the stage's result.
    fn end_stage(&mut self, index: StageIndex, end: StageEnd) -> Result<(), Error> {
        let digest = self.replica.digest(self.state.position.step)?;
        if let Some(trace) = &self.trace {
            trace.end(self.job, self.replica, index)?;
        }
        let steps = self.state.position.stage_step;
        let deciding = self.state.deciding.clone();
        let result = StageResult {
            stage: index,
            steps,
            epochs: f64::from(steps) / f64::from(self.job.plan.steps_per_epoch),
            seconds: self.state.stage_seconds,
            end,
            eval: self.state.tracker.best.clone().or_else(|| deciding.clone()).ok_or(Error::NeverFinite)?,
            deciding_eval: deciding.ok_or(Error::NeverFinite)?,
            replica_digest: digest.to_hex().to_string(),
            peak_memory_bytes: runtime::memory_use(false).peak,
            saves: self.saver.saves_of_stage(),
            test: self.test_of_first_stage(index)?,
        };
        self.state.results.push(result.clone());
        self.state.tracker.end_stage(index);
        self.state.ended.push(steps);
        self.state.first_epoch += steps.div_ceil(self.job.plan.steps_per_epoch);
        self.state.seconds += self.state.stage_seconds;
        self.state.stage_seconds = 0.0;
        self.state.position.stage = index.next();
        self.state.position.stage_step = 0;
        self.state.move_to(Point::Entering);
        self.restore_best_where_nothing_else_counts()?;
        self.save(vec![Outbox::stage_ended(&result)]).map(drop)
    }

    /// What the best weights of the first of several stages score on the test part. Leaves the replica as it was.
    fn test_of_first_stage(&mut self, index: StageIndex) -> Result<Option<Evaluation>, Error> {
        let is_first_of_several = index.0 == 0 && self.job.plan.stages.len() > 1;
        let Some(best) = self.state.best.as_ref().filter(|_| is_first_of_several) else { return Ok(None) };
        if self.job.dataset.index().size(Part::Test) == 0 {
            return Ok(None);
        }
        let present = self.replica.snapshot(&self.job.ever_trained(index), Extent::Whole, Some(&best.groups));
        self.replica.restore(&best.groups)?;
        let test = self.evaluate(Part::Test);
        self.replica.restore(&present)?;
        test.map(Some)
    }

    fn save(&mut self, then: Vec<super::outbox::Event>) -> Result<Duration, Error> {
        let began = Instant::now();
        let hosting = self.hosted.at_checkpoint(self.job, self.replica, self.state, self.generation);
        let copied = hosting.as_ref().map(|hosting| &hosting.copies);
        let stall = self.saver.save(self.job, (self.replica, self.state), copied, then, began)?;
        if let Some(hosting) = hosting {
            self.hosted.write(hosting);
        }
        Ok(stall)
    }

    /// Copies the state to the host's memory, where that is due apart from checkpoints; how long that took.
    fn copy_to_host(&mut self) -> Duration {
        let began = Instant::now();
        if let Some(hosting) = self.hosted.after_step(self.job, self.replica, self.state, self.generation) {
            self.hosted.write(hosting);
        }
        began.elapsed()
    }

    /// Restores the best weights unless a next stage goes on from the last ones: what nobody will read need not be saved, and a run that ends
    /// here has them before anything that can fail (TRAIN-5).
    fn restore_best_where_nothing_else_counts(&mut self) -> Result<(), Error> {
        let next = self.job.plan.stages.get(self.state.position.stage.0 as usize);
        let ends = self.after_ended_stage()?.is_some();
        if ends || next.is_none_or(|next| next.on_enter == OnEnter::RestoreBest) {
            self.restored_in = self.restore_best()?.map_or(Duration::ZERO, |(_, took)| took);
        }
        Ok(())
    }

    /// Puts the best weights back: the step they are of, and how long that took since a stage ended.
    fn restore_best(&mut self) -> Result<Option<(Step, Duration)>, Error> {
        let (Some(best), Some(evaluation)) = (&self.state.best, &self.state.tracker.best) else { return Ok(None) };
        let began = Instant::now();
        self.replica.restore(&best.groups)?;
        let took = std::mem::take(&mut self.restored_in) + began.elapsed();
        Ok(Some((evaluation.position.step, took)))
    }

    /// Tests the best weights and, on rank 0, waits until the last checkpoint is committed and writes the model.
    fn finish(&mut self, reason: RunReason) -> Result<Ending, Error> {
        let best = self.state.best.as_ref().ok_or(Error::NeverFinite)?;
        self.replica.restore(&best.groups)?;
        let started = Instant::now();
        let has_test = self.job.dataset.index().size(Part::Test) > 0;
        let test = if has_test { Some(self.evaluate(Part::Test)?) } else { None };
        let weights = save::weights_blake3(self.replica)?;
        self.saver.finish()?;
        if self.replica.rank() == 0 {
            save::write_model(self.job, self.replica)?;
        }
        let result = RunResult {
            test,
            best: self.state.tracker.best.clone().ok_or(Error::NeverFinite)?,
            weights_blake3: weights,
            model: self.job.model_url(),
            steps: self.state.position.step,
            seconds: self.state.seconds + started.elapsed().as_secs_f64(),
        };
        Ok(Ending::Finished { result: Box::new(result), reason })
    }
}

fn indices(stage: &PlannedStage) -> Vec<usize> {
    stage.trainable_groups.iter().map(|group| group.0 as usize).collect()
}
