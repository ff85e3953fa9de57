//! Whose doing an end is: what it uses up (RUN-7), when the next start is (RUN-13), and which slot it is held against (RUN-14).

use super::turn::Turn;
use super::{FailureClass, Trainer};
use crate::quarantine::Blame;
use std::fmt;
use thaw_mutants::planted;
use thaw_proto::run::{RunReason, RunState};

/// Blames that a run remembers; the oldest go first.
const MOST_BLAMES: usize = 32;

/// SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV and SIGSYS: what a process does to itself. The others come from somebody else.
const CRASHES: [i32; 7] = [4, 5, 6, 7, 8, 11, 31];

/// How a trainer's process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Code(i32),
    Signal(i32),
    /// Nobody has seen how.
    Unknown,
}

impl fmt::Display for Ending {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(formatter, "exit code {code}"),
            Self::Signal(signal) => write!(formatter, "signal {signal}"),
            Self::Unknown => formatter.write_str("for an unknown reason"),
        }
    }
}

/// Whose doing the loss of trainers is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The trainer's: an error of its own, or a crash.
    Own,
    /// The slot's: the trainer stood still there, or could not do what all others can.
    Place,
    /// Something else's: a worker, a network, a store, a peer, somebody who killed it, a change of leaders.
    Other,
}

impl Ending {
    pub(super) fn fault(self) -> Fault {
        match self {
            Self::Code(0) | Self::Unknown => Fault::Other,
            // How shells and containers say that it was a signal.
            Self::Code(code) if code > 128 => Self::Signal(code - 128).fault(),
            Self::Code(_) => Fault::Own,
            Self::Signal(signal) if CRASHES.contains(&signal) => Fault::Own,
            Self::Signal(_) => Fault::Other,
        }
    }
}

/// Whose doing a failure is that a trainer, or its agent for it, reports.
pub(super) fn fault_of(class: FailureClass, reason: RunReason) -> Fault {
    match class {
        FailureClass::Retry if reason == RunReason::TrainerError => Fault::Own,
        FailureClass::Retry if reason == RunReason::TrainerHung => Fault::Place,
        // A peer is gone, or the coordinator does not answer.
        FailureClass::Retry | FailureClass::Fenced => Fault::Other,
        FailureClass::Invalid | FailureClass::Fatal => Fault::Own,
    }
}

impl Turn {
    /// Holds the end of a trainer against its slot where it is to blame (RUN-14). A trainer that says why it fails ends after that, so the
    /// first word counts: what this returns is another's doing from the second on.
    pub(super) fn judge(&mut self, trainer: &Trainer, fault: Fault) -> Fault {
        if !self.observed.judged.insert(trainer.incarnation.clone()) {
            return Fault::Other;
        }
        match fault {
            Fault::Own | Fault::Place => self.blame(trainer),
            Fault::Other => return Fault::Other,
        }
        // Several can fail at one step, and the second be heard of when the others have been proposed the next generation. It has not
        // begun that one.
        let forms = matches!(self.record.state, RunState::Admitted | RunState::Forming);
        let one = &trainer.incarnation;
        let is_before = forms && self.observed.holders.contains(one) && !self.observed.built.contains(one);
        if is_before { Fault::Place } else { fault }
    }

    fn blame(&mut self, trainer: &Trainer) {
        let step = self.record.lost_at.max(self.observed.step);
        self.record.blames.push(Blame { place: trainer.place(), at_ms: self.now.unix_ms, step });
        if self.record.blames.len() > MOST_BLAMES {
            self.record.blames.remove(0);
        }
        self.changed = true;
    }

    /// A gang is lost (RUN-7).
    pub(super) fn count_failure(&mut self, fault: Fault) {
        self.changed = true;
        self.record.failures_without_progress += u32::from(!planted("failures-uncounted"));
        self.record.own_failures += u32::from(fault == Fault::Own);
        self.record.lost_at = self.record.lost_at.max(self.observed.step);
        self.observed.failed_ms = Some(self.now.steady_ms);
        self.observed.own_counted = fault == Fault::Own;
        let before = self.record.failures_without_progress.saturating_sub(1);
        self.observed.restart_ms = self.now.steady_ms + self.backoff_ms(self.policy.backoff_ms, before);
    }

    /// Another end of the same failure shows whose doing it was; whether it changes that.
    pub(super) fn amend_failure(&mut self, fault: Fault) -> bool {
        if fault != Fault::Own || self.observed.own_counted || self.observed.failed_ms.is_none() {
            return false;
        }
        self.changed = true;
        self.observed.own_counted = true;
        self.record.own_failures += 1;
        true
    }

    /// A new step is committed, or applied beyond where a gang was lost.
    pub(super) fn made_progress(&mut self) {
        self.changed |= self.record.failures_without_progress > 0 || self.record.own_failures > 0;
        self.record.failures_without_progress = 0;
        self.record.own_failures = 0;
    }

    /// Fails the run where it may not try again (RUN-7); whether it did.
    pub(super) fn give_up(&mut self, last: &str) -> bool {
        let (own, all, step) = (self.record.own_failures, self.record.failures_without_progress, self.record.lost_at);
        let (reason, message) = if own >= self.policy.most_step_failures {
            // It was the step and not the slots.
            self.record.blames.retain(|blame| blame.step < step);
            let why = "trainers failed by their own doing";
            (RunReason::StepFailed, format!("{why} {own} times in a row with no step after {step}; the last: {last}"))
        } else if all >= self.policy.most_failures {
            let message = format!("{all} generations in a row ended without a new step; the last: {last}");
            (RunReason::NoProgress, message)
        } else {
            return false;
        };
        self.release_members();
        self.enter(RunState::Failed, reason, message, None);
        true
    }

    /// RUN-13: from 1 ms to `base_ms`, doubled with every time after the first; nothing for no times. All of it is drawn, so that runs that one
    /// fault ends do not start again together. The core draws no random numbers: what stands for one is a hash of the run's id, half of which
    /// is random, and of its generation, so a replay waits as long.
    pub(super) fn backoff_ms(&self, base_ms: u64, times: u32) -> u64 {
        let Some(doublings) = times.checked_sub(1) else { return 0 };
        let factor = 1_u64.checked_shl(doublings).unwrap_or(u64::MAX);
        let most = base_ms.saturating_mul(factor).clamp(1, self.policy.backoff_cap_ms.max(1));
        let mut hasher = blake3::Hasher::new_derive_key("thaw.v1 wait before a start");
        hasher.update(self.record.id.as_str().as_bytes());
        hasher.update(&self.record.generation.0.to_le_bytes());
        hasher.update(&times.to_le_bytes());
        let hash = hasher.finalize();
        let (drawn, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
        1 + u64::from_le_bytes(*drawn) % most
    }
}
