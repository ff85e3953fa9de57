//! One run, random workers and trainers, a machine that is restarted at will. Seeds are fixed, so a failure repeats.
//!
//! Checked after every step: RUN-1 to RUN-6, RUN-11 and RUN-12. Checked at the end, once faults have stopped: RUN-7 and RUN-8, that the run ends and no trainer
//! is left.

mod laws;
mod lives;

use super::script::{checkpoint, result, stage_result};
use super::*;
use crate::gang::FreeSlot;
use crate::scheduler::{self, Waiting};
use crate::test_support::{plan_of, spec};
use laws::check;
use serde_json::json;
use std::collections::{BTreeSet, VecDeque};
use thaw_proto::ids::Slot;

const LAST_STEP: u64 = 60;
const SAVE_STEPS: u64 = 10;
/// Where the first stage ends.
const STAGE_STEP: u64 = 30;
/// Rounds within which a run must end once faults have stopped.
const CALM_ROUNDS: u32 = 4000;

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (value ^ (value >> 31)) % bound
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Phase {
    Loading,
    Ready,
    Building,
    Built,
    Training {
        step: u64,
        awaiting: Option<u64>,
    },
    Standing,
    /// Its gang is broken; it waits for another.
    Interrupted,
}

#[derive(Debug, Clone)]
struct SimTrainer {
    trainer: Trainer,
    phase: Phase,
    generation: Generation,
    rank: Rank,
    resume: u64,
    /// The last step that it has applied, where it holds a state.
    held: Option<u64>,
    /// What it has reported and a new session hears again, as agents have it.
    ledger: Vec<Input>,
}

impl SimWorker {
    /// A trainer reports: to whoever listens now, and to its ledger.
    fn say(&mut self, trainer: usize, input: Input) {
        self.trainers[trainer].ledger.push(input.clone());
        if self.connected {
            self.outbox.push_back(input);
        }
    }
}

/// A worker with two slots, and what is on its way to and from it.
#[derive(Debug, Default)]
struct SimWorker {
    connected: bool,
    trainers: Vec<SimTrainer>,
    inbox: VecDeque<Effect>,
    outbox: VecDeque<Input>,
}

struct World {
    dice: Dice,
    now_ms: u64,
    /// Sets the wall clock before every step, where somebody does.
    setter: Option<Dice>,
    minted: u64,
    workers: Vec<SimWorker>,
    record: RunRecord,
    observed: Observed,
    /// Where training ends.
    last_step: u64,
    /// Whether faults have stopped.
    calm: bool,
    /// Whether trainers survive the loss of a peer.
    keeps: bool,
    /// How often a trainer went on in a new gang with a state that a survivor held.
    carried: u32,
    /// Gangs that were committed smaller with who was left of a larger one, and larger than any wish before had let them be.
    shrunk: u32,
    grown: u32,
    log: Vec<String>,
}

impl World {
    fn new(seed: u64) -> Self {
        let spec = spec(json!({"workers": {"min": 1, "max": 3, "threads_per_trainer": 1}}));
        let mut plan = plan_of(&spec);
        plan.stages[0].workers = (seed % 3 == 1).then_some(1 + (seed % 2) as u32);
        let workers = (0..3).map(|_| SimWorker { connected: true, ..SimWorker::default() }).collect();
        Self {
            dice: Dice(seed),
            keeps: !seed.is_multiple_of(4),
            carried: 0,
            shrunk: 0,
            grown: 0,
            now_ms: 0,
            setter: None,
            minted: 0,
            workers,
            record: RunRecord::new("demo-00000001".into(), spec, plan, "file:///d".into(), 0),
            observed: Observed::default(),
            last_step: LAST_STEP,
            calm: false,
            log: Vec::new(),
        }
    }

    fn now(&mut self) -> Now {
        let unix_ms = self.setter.as_mut().map_or(self.now_ms, |setter| setter.below(2 * self.now_ms + 1));
        Now { unix_ms, steady_ms: self.now_ms }
    }

    fn send(&mut self, input: &Input) {
        let (before, now) = (self.record.clone(), self.now());
        let outcome = step(&Policy::default(), &self.record, &self.observed, now, input);
        self.log.push(format!(
            "{} ms {input:?} -> {}",
            self.now_ms,
            match &outcome {
                Ok(outcome) => format!("{:?} {:?}", outcome.record.state, outcome.effects),
                Err(rejection) => rejection.to_string(),
            }
        ));
        let Ok(outcome) = outcome else { return };
        assert_eq!(outcome.changed, outcome.record != before);
        self.check_no_news(input, &outcome);
        check(&before, &outcome.record, input, &outcome.effects, self.last_step);
        let is_committed = outcome.record.world_sizes.len() > before.world_sizes.len();
        self.shrunk += u32::from(is_committed && !before.leaving.is_empty());
        self.grown += u32::from(is_committed && before.reason == RunReason::Scaled && before.leaving.is_empty());
        self.record = outcome.record;
        self.observed = outcome.observed;
        // The coordinator may be killed between saving and speaking.
        if !self.calm && self.dice.below(200) == 0 {
            self.restart();
            return;
        }
        for effect in outcome.effects {
            let worker = index(&addressee(&effect).worker);
            if self.workers[worker].connected {
                self.workers[worker].inbox.push_back(effect);
            }
        }
    }

    /// What a driver need not feed changes nothing.
    fn check_no_news(&self, input: &Input, outcome: &Outcome) {
        let Input::TrainersSeen { worker, trainers } = input else { return };
        let here: BTreeSet<&Trainer> = self.record.trainers().filter(|trainer| trainer.worker == *worker).collect();
        if here == trainers.iter().collect() && is_no_news(&self.record, &self.observed, trainers) {
            assert!(!outcome.changed && outcome.effects.is_empty() && outcome.events.is_empty());
            assert_eq!(outcome.observed, self.observed);
        }
    }

    fn restart(&mut self) {
        self.observed = Observed::default();
        self.log.push("restart".to_owned());
        for worker in &mut self.workers {
            worker.connected = false;
            worker.inbox.clear();
            worker.outbox.clear();
        }
        let now = self.now();
        let outcome = step(&Policy::default(), &self.record, &self.observed, now, &Input::CoordinatorStarted).unwrap();
        check(&self.record, &outcome.record, &Input::CoordinatorStarted, &outcome.effects, self.last_step);
        self.record = outcome.record;
        self.observed = outcome.observed;
    }

    fn tick(&mut self) {
        self.now_ms += self.dice.below(4000);
        let held: Vec<FreeSlot> = self.record.held_slots().collect();
        let mut free = Vec::new();
        for (worker, state) in self.workers.iter().enumerate().filter(|(_, state)| state.connected) {
            for slot in 0..2 {
                let place = FreeSlot { worker: name(worker), slot: Slot(slot) };
                let lived_in = state.trainers.iter().any(|trainer| trainer.trainer.place() == place);
                if !lived_in && !held.contains(&place) {
                    free.push(place);
                }
            }
        }
        let fresh = (0..3).map(|extra| Incarnation(format!("i{}", self.minted + extra))).collect();
        self.minted += 3;
        let now = self.now();
        let waiting: Vec<Waiting> = wants_slots(&self.record, &self.observed, now).into_iter().collect();
        let none = BTreeMap::new();
        let limits = scheduler::Policy::default();
        let verdicts = scheduler::schedule(&limits, now.unix_ms, &none, &BTreeMap::new(), &waiting, &free);
        self.send(&Input::Tick { resting: None, slots: verdicts.into_values().next(), fresh });
    }

    fn deliver_to_worker(&mut self, worker: usize) {
        let Some(effect) = self.workers[worker].inbox.pop_front() else {
            return;
        };
        let state = &mut self.workers[worker];
        let find = |trainer: &Trainer| state.trainers.iter().position(|other| other.trainer == *trainer);
        match effect {
            Effect::StartTrainer { trainer, generation } => {
                // An agent starts a trainer in an empty slot only.
                if !state.trainers.iter().any(|other| other.trainer.place() == trainer.place()) {
                    state.trainers.push(SimTrainer {
                        trainer,
                        phase: Phase::Loading,
                        generation,
                        rank: Rank(0),
                        resume: 0,
                        held: None,
                        ledger: Vec::new(),
                    });
                }
            }
            Effect::Propose(proposal) => {
                if let Some(at) = find(&proposal.trainer) {
                    let sim = &mut state.trainers[at];
                    sim.phase = Phase::Building;
                    sim.generation = proposal.generation;
                    sim.rank = proposal.rank;
                    sim.resume = proposal.resume.map_or(0, |head| head.position.step.0);
                }
            }
            Effect::Commit { trainer, generation } => {
                if let Some(at) = find(&trainer)
                    && state.trainers[at].phase == Phase::Built
                    && state.trainers[at].generation == generation
                {
                    self.agree(worker, at);
                }
            }
            Effect::StopTrainer { trainer, .. } => {
                if let Some(at) = find(&trainer) {
                    state.trainers.remove(at);
                    state.outbox.push_back(Input::TrainerExited { trainer, ending: Ending::Signal(9) });
                }
            }
            Effect::SuspendTrainer { trainer, generation } => {
                if let Some(at) = find(&trainer)
                    && let Phase::Training { step, .. } = state.trainers[at].phase
                {
                    state.trainers[at].phase = Phase::Standing;
                    if state.trainers[at].rank == Rank(0) {
                        let checkpoint = checkpoint(generation, step);
                        let written = Input::CheckpointWritten { trainer: trainer.clone(), generation, checkpoint };
                        state.say(at, written);
                        state.say(at, Input::Suspended { trainer, generation });
                    }
                }
            }
            Effect::AckCheckpoint { trainer, generation, checkpoint } => {
                if let Some(at) = find(&trainer)
                    && let Phase::Training { awaiting, .. } = &mut state.trainers[at].phase
                    && *awaiting == Some(checkpoint.position.step.0)
                {
                    *awaiting = None;
                    if checkpoint.position.step.0 == self.last_step {
                        let result = Box::new(result(self.last_step));
                        let reason = RunReason::LastStageEnded;
                        state.say(at, Input::Finished { trainer, generation, result, reason });
                    }
                }
            }
        }
    }

    /// A committed trainer takes over the furthest state of its generation's, as all of them do; none is older than the head.
    fn agree(&mut self, worker: usize, at: usize) {
        let own = self.workers[worker].trainers[at].clone();
        let of_gang = self.workers.iter().flat_map(|worker| &worker.trainers);
        let of_gang = of_gang.filter(|sim| sim.generation == own.generation && sim.phase != Phase::Loading);
        let held = of_gang.filter_map(|sim| sim.held).filter(|step| *step >= own.resume).max();
        self.carried += u32::from(held.is_some());
        let step = held.unwrap_or(own.resume);
        let sim = &mut self.workers[worker].trainers[at];
        sim.held = Some(step);
        sim.phase = Phase::Training { step, awaiting: None };
        let boundary = step == self.last_step && sim.rank == Rank(0);
        if boundary && held.is_some() {
            // The last checkpoint may have been lost with the generation before.
            sim.phase = Phase::Training { step, awaiting: Some(step) };
            let (trainer, generation) = (own.trainer.clone(), own.generation);
            let checkpoint = checkpoint(generation, step);
            self.workers[worker].say(at, Input::CheckpointWritten { trainer, generation, checkpoint });
        }
    }

    fn deliver_from_worker(&mut self, worker: usize) {
        if self.workers[worker].connected
            && let Some(input) = self.workers[worker].outbox.pop_front()
        {
            self.send(&input);
        }
    }

    /// One trainer does the next thing.
    fn work(&mut self, worker: usize) {
        let count = self.workers[worker].trainers.len() as u64;
        if count == 0 {
            return;
        }
        let at = self.dice.below(count) as usize;
        let sim = self.workers[worker].trainers[at].clone();
        let gang_is_whole = self.gang_is_whole(&sim);
        let state = &mut self.workers[worker];
        let (trainer, generation) = (sim.trainer.clone(), sim.generation);
        match sim.phase {
            Phase::Loading => {
                state.trainers[at].phase = Phase::Ready;
                let address = trainer.incarnation.to_string();
                state.say(at, Input::TrainerReady { address, trainer, keeps: self.keeps });
            }
            Phase::Building if gang_is_whole => {
                state.trainers[at].phase = Phase::Built;
                state.say(at, Input::GangBuilt { trainer, generation });
            }
            Phase::Training { .. } | Phase::Building | Phase::Built if !gang_is_whole && self.keeps => {
                state.trainers[at].phase = Phase::Interrupted;
                let message = "a peer is gone".into();
                state.say(at, Input::TrainerInterrupted { trainer, generation, message });
            }
            Phase::Training { .. } if !gang_is_whole => {
                state.trainers[at].phase = Phase::Standing;
                let failed = Input::TrainerFailed {
                    trainer,
                    generation,
                    class: FailureClass::Retry,
                    reason: RunReason::TrainerLost,
                    message: "a peer is gone".into(),
                };
                state.say(at, failed);
            }
            Phase::Training { step, awaiting: None } => {
                let next = (step + 5).min(self.last_step);
                let saves = sim.rank == Rank(0) && (next == self.last_step || next.is_multiple_of(SAVE_STEPS));
                state.trainers[at].phase = Phase::Training { step: next, awaiting: saves.then_some(next) };
                state.trainers[at].held = Some(next);
                if sim.rank == Rank(0) && state.connected {
                    state.outbox.push_back(Input::Progressed { generation, step: Step(next) });
                }
                if sim.rank == Rank(0) && step < STAGE_STEP && next >= STAGE_STEP {
                    let (trainer, result) = (trainer.clone(), Box::new(stage_result(0)));
                    state.say(at, Input::StageEnded { trainer, generation, result });
                }
                if saves {
                    let checkpoint = checkpoint(generation, next);
                    state.say(at, Input::CheckpointWritten { trainer, generation, checkpoint });
                }
            }
            Phase::Ready
            | Phase::Building
            | Phase::Built
            | Phase::Training { .. }
            | Phase::Standing
            | Phase::Interrupted => {}
        }
    }

    /// Whether as many trainers of the generation live as the lowest rank expects: all that were started with it.
    fn gang_is_whole(&self, of: &SimTrainer) -> bool {
        let alive = self.workers.iter().flat_map(|worker| &worker.trainers);
        let ranks: Vec<u32> = alive
            .filter(|sim| {
                sim.generation == of.generation
                    && !matches!(sim.phase, Phase::Standing | Phase::Loading | Phase::Interrupted)
            })
            .map(|sim| sim.rank.0)
            .collect();
        self.record.generation != of.generation || ranks.len() >= self.record.members.len()
    }

    fn kill(&mut self, worker: usize) {
        if !self.workers[worker].trainers.is_empty() {
            let dead = self.workers[worker].trainers.remove(0);
            // Now and then it was its own doing.
            let ending = if self.dice.below(4) == 0 { Ending::Code(101) } else { Ending::Signal(9) };
            self.log.push(format!("{:?} ends: {ending}", dead.trainer));
            self.workers[worker].outbox.push_back(Input::TrainerExited { trainer: dead.trainer, ending });
        }
    }

    fn disconnect(&mut self, worker: usize) {
        if self.workers[worker].connected {
            self.workers[worker].connected = false;
            self.workers[worker].inbox.clear();
            self.workers[worker].outbox.clear();
            self.send(&Input::WorkersLost { workers: vec![name(worker)] });
        }
    }

    /// A hello or a heartbeat.
    fn report(&mut self, worker: usize) {
        let state = &mut self.workers[worker];
        let is_new = !std::mem::replace(&mut state.connected, true);
        let trainers = state.trainers.iter().map(|sim| sim.trainer.clone()).collect();
        state.outbox.push_back(Input::TrainersSeen { worker: name(worker), trainers });
        if is_new {
            state.outbox.extend(state.trainers.iter().flat_map(|sim| sim.ledger.iter().cloned()));
        }
    }

    fn random_action(&mut self) {
        let worker = self.dice.below(3) as usize;
        match self.dice.below(100) {
            0..=19 => self.deliver_to_worker(worker),
            20..=44 => self.deliver_from_worker(worker),
            45..=69 => self.work(worker),
            70..=82 => self.tick(),
            83 => {
                let (to, workers) = ("other-00000002".into(), 1 + self.dice.below(2) as u32);
                self.send(&if workers == 1 { Input::Yield { to } } else { Input::Cede { workers, to } });
            }
            84 => {
                let workers = 1 + self.dice.below(3) as u32;
                self.send(&Input::Scale { workers });
            }
            85..=91 => self.report(worker),
            92..=94 => self.kill(worker),
            95 => self.disconnect(worker),
            96 => self.restart(),
            97 => {
                // A message is lost with its stream's buffer.
                self.workers[worker].inbox.pop_front();
            }
            98 => self.send(&Input::Suspend),
            99 if self.dice.below(20) == 0 => self.send(&Input::Cancel),
            _ => self.send(&Input::Resume),
        }
    }

    /// Faults stop: the run ends, and leaves no trainer behind.
    fn end(&mut self, seed: u64) {
        self.calm = true;
        let ends = (0..CALM_ROUNDS).any(|_| {
            self.calm_round();
            self.record.state.has_ended()
        });
        let tail = self.log.len().saturating_sub(40);
        assert!(ends, "seed {seed} is stuck in {:?}:\n{}", self.record.state, self.log[tail..].join("\n"));
        let nobody = (0..CALM_ROUNDS).any(|_| {
            self.calm_round();
            self.workers.iter().all(|worker| worker.trainers.is_empty())
        });
        assert!(nobody, "seed {seed} leaves trainers behind:\n{}", self.log[tail..].join("\n"));
    }

    /// Everything that is due happens, and nothing breaks.
    fn calm_round(&mut self) {
        for worker in 0..3 {
            self.report(worker);
            self.work(worker);
            for _ in 0..8 {
                self.deliver_to_worker(worker);
                self.deliver_from_worker(worker);
            }
        }
        self.tick();
        if self.record.state == RunState::Suspended {
            self.send(&Input::Resume);
        }
    }
}

fn name(worker: usize) -> WorkerName {
    WorkerName(format!("w{worker}"))
}

fn index(worker: &WorkerName) -> usize {
    worker.as_str()[1..].parse().unwrap()
}

fn addressee(effect: &Effect) -> &Trainer {
    match effect {
        Effect::StartTrainer { trainer, .. }
        | Effect::Commit { trainer, .. }
        | Effect::StopTrainer { trainer, .. }
        | Effect::SuspendTrainer { trainer, .. }
        | Effect::AckCheckpoint { trainer, .. } => trainer,
        Effect::Propose(proposal) => &proposal.trainer,
    }
}
