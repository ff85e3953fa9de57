//! What is checked of gangs: what trainers are told, what each holds, where they begin, and every step they take.

use super::ledger::Weights;
use super::{Broken, Memory, World};
use std::collections::{BTreeMap, BTreeSet};
use thaw_core::survivors::Held;
use thaw_proto::ids::Step;
use thaw_proto::pb;
use thaw_proto::pb::coordinator_message::Message;
use thaw_proto::peers::Peers;
use thaw_proto::run::RunState;

/// A run's generation.
pub(super) type Gang = (String, u64);

/// What the members of one generation have come with, and begun with.
#[derive(Debug, Default)]
pub(super) struct Beginning {
    /// Step of the head that it was proposed with; `None` where there was none.
    head: Option<u64>,
    /// What each rank has said that it holds.
    claims: BTreeMap<u32, Option<Held>>,
    begun: Option<(u64, Weights)>,
}

impl World {
    /// A trainer has built its communicator.
    pub(crate) fn has_built(&self, run: &str, generation: u64, incarnation: &str) {
        self.memory().built.entry((run.to_owned(), generation)).or_default().insert(incarnation.to_owned());
    }

    /// A rank says what it holds.
    pub(crate) fn claims(
        &self,
        (run, generation, rank): (&str, u64, u32),
        held: Option<&Held>,
        weights: Option<Weights>,
    ) {
        let broken = {
            let mut memory = self.memory();
            let gang = (run.to_owned(), generation);
            memory.beginnings.entry(gang).or_default().claims.insert(rank, held.cloned());
            match (held, weights) {
                (Some(held), Some(weights)) => memory.differs(run, held.step.0, weights),
                (Some(_) | None, _) => None,
            }
        };
        if let Some(what) = broken {
            self.violated("LEDGER-1", format!("rank {rank} of {run} keeps what it must not: {what}"));
        }
    }

    /// A rank begins to train (KEEP-1 to KEEP-3, LEDGER-2).
    pub(crate) fn begins(
        &self,
        (run, generation, rank): (&str, u64, u32),
        incarnation: &str,
        step: u64,
        weights: Weights,
    ) {
        let mut broken: Broken = Vec::new();
        {
            let mut memory = self.memory();
            if let Some(what) = memory.differs(run, step, weights) {
                broken.push(("LEDGER-1", format!("rank {rank} of {run} begins wrongly: {what}")));
            }
            let last = memory.applied.insert(incarnation.to_owned(), step);
            if let Some(last) = last.filter(|last| *last > step) {
                broken.push(("KEEP-1", format!("rank {rank} has applied step {last} and goes back to {step}")));
            }
            let beginning = memory.beginnings.entry((run.to_owned(), generation)).or_default();
            if *beginning.begun.get_or_insert((step, weights)) != (step, weights) {
                broken.push((
                    "LEDGER-2",
                    format!("rank {rank} of {run} g{generation} begins at another state, step {step}"),
                ));
            }
            beginning.check(step, &mut broken);
        }
        broken.into_iter().for_each(|(id, what)| self.violated(id, format!("{run} g{generation}: {what}")));
    }

    /// A trainer has taken a step from `before` (REP-5).
    pub(crate) fn applies(&self, run: &str, incarnation: &str, before: u64, (step, weights): (u64, Weights)) {
        let mut broken: Broken = Vec::new();
        {
            let mut memory = self.memory();
            let last = memory.applied.insert(incarnation.to_owned(), step);
            if last != Some(before) || step != before + 1 {
                broken.push(("REP-5", format!("{run}: step {step} is taken after {last:?}")));
            }
            if let Some(what) = memory.differs(run, step, weights) {
                broken.push(("LEDGER-1", format!("{run}: {what}")));
            }
        }
        broken.into_iter().for_each(|(id, what)| self.violated(id, what));
    }

    /// A survivor's memory has changed by itself: what this run's trainers hold is no longer what it should be.
    pub(crate) fn rots(&self, run: &str) {
        self.say(format!("memory of {run} rots"));
        self.memory().rotten.insert(run.to_owned());
    }

    /// Rank 0, or who takes itself for it, says that it has written a checkpoint.
    pub(crate) fn reports(&self, run: &str, rank: u32, checkpoint: &pb::CheckpointRef) {
        let key = (run.to_owned(), checkpoint.manifest.clone(), checkpoint.manifest_blake3.clone());
        self.memory().reported.entry(key).or_insert(rank);
    }

    /// A trainer is told something.
    pub(crate) fn told(&self, agent: &str, told: &pb::CoordinatorMessage) {
        let mut broken = Vec::new();
        {
            let mut memory = self.memory();
            let seen = memory.epochs.entry(agent.to_owned()).or_default();
            if told.leader_epoch < *seen {
                broken.push(("AGENT-1", format!("epoch {} after {seen}", told.leader_epoch)));
            }
            *seen = told.leader_epoch.max(*seen);
            match &told.message {
                Some(Message::Start(start)) => {
                    if !memory.members.contains(&start.incarnation) {
                        broken.push(("DRIVE-1", format!("{} starts before it is stored", start.incarnation)));
                    }
                }
                Some(Message::Propose(propose)) => memory.proposed(propose, &mut broken),
                Some(Message::Commit(commit)) => memory.committed_gang(commit, &mut broken),
                Some(Message::Committed(committed)) => {
                    let head = committed.checkpoint.clone().unwrap_or_default();
                    if !memory.runs.get(&committed.run).is_some_and(|seen| seen.heads.contains(&head.manifest)) {
                        broken.push(("DRIVE-1", format!("{} is acknowledged and was never the head", head.manifest)));
                    }
                }
                Some(Message::Stop(_) | Message::Suspend(_) | Message::Welcome(_) | Message::Ping(_)) | None => {}
            }
        }
        broken.into_iter().for_each(|(id, what)| self.violated(id, what));
    }
}

impl Beginning {
    /// KEEP-1 and KEEP-2, from what was claimed alone.
    fn check(&self, step: u64, broken: &mut Broken) {
        let held = || self.claims.values().flatten();
        let reached = |held: &Held| (held.step, held.moves);
        let furthest = held().map(reached).max().filter(|(step, _)| self.head.is_none_or(|head| *step >= Step(head)));
        let wanted = furthest.map_or(self.head.unwrap_or(0), |(step, _)| step.0);
        if step != wanted {
            broken.push((
                "KEEP-1",
                format!("it begins at step {step}, where {:?} are held and {:?} is the head", self.claims, self.head),
            ));
        }
        let digests: BTreeSet<&str> =
            held().filter(|held| Some(reached(held)) == furthest).map(|held| held.digest.as_str()).collect();
        if digests.len() > 1 {
            broken.push(("KEEP-2", format!("it begins though its ranks hold {digests:?} at step {step}")));
        }
    }
}

impl Memory {
    /// How what a trainer holds differs from what it should. Nothing is known of a run whose memory rots.
    pub(super) fn differs(&mut self, run: &str, step: u64, weights: Weights) -> Option<String> {
        let differs = !self.rotten.contains(run) && self.ledger.at(step) != weights;
        differs.then(|| format!("samples are missing or double at step {step}"))
    }

    fn proposed(&mut self, propose: &pb::Propose, broken: &mut Broken) {
        let generation = propose.generation;
        let gang = (propose.run.clone(), generation);
        self.worlds.insert(gang.clone(), propose.peers.as_ref().map_or(0, Peers::len));
        let holder = self.keys.entry(propose.key.clone()).or_insert_with(|| gang.clone());
        if *holder != gang {
            broken.push(("ONCE-1", format!("{holder:?} and {gang:?} have one key")));
        }
        let rank = (gang.0.clone(), gang.1, propose.rank);
        let first = self.ranks.entry(rank).or_insert_with(|| propose.incarnation.clone());
        if *first != propose.incarnation {
            broken
                .push(("ONCE-1", format!("rank {} of {gang:?} is {first} and {}", propose.rank, propose.incarnation)));
        }
        let Some(seen) = self.runs.get(&propose.run) else {
            return broken.push(("DRIVE-1", format!("{} is not stored", propose.run)));
        };
        let record = &seen.record;
        if record.generation.0 < generation {
            broken.push(("RUN-1", format!("generation {generation} is proposed, {} is stored", record.generation)));
        }
        let head = record.head.as_ref().map(pb::CheckpointRef::from);
        let resumed = propose.resume.as_ref().map(|head| head.position.map_or(0, |position| position.step));
        if record.generation.0 == generation && record.state == RunState::Forming && propose.resume != head {
            broken.push(("RUN-3", format!("{gang:?} starts at {:?}, the head is {head:?}", propose.resume)));
        }
        self.beginnings.entry(gang).or_default().head = resumed;
    }

    fn committed_gang(&mut self, commit: &pb::Commit, broken: &mut Broken) {
        let gang = (commit.run.clone(), commit.generation);
        let (built, world) = (self.built.get(&gang).map_or(0, BTreeSet::len), self.worlds.get(&gang).copied());
        if Some(built) != world {
            broken.push(("RUN-1", format!("{gang:?} trains with {built} of {world:?} built")));
        }
        let state =
            self.runs.get(&gang.0).filter(|seen| seen.record.generation.0 == gang.1).map(|seen| seen.record.state);
        if state == Some(RunState::Forming) || state == Some(RunState::Admitted) {
            broken.push(("DRIVE-1", format!("{gang:?} trains, the store has {state:?}")));
        }
    }
}
