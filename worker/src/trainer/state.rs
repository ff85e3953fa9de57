//! Where training stands, beside what the replica holds.

use super::job::Job;
use super::snapshot::GroupSnapshot;
use super::trace::Traced;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thaw_core::stage_end::{Judge, RunTracker};
use thaw_proto::run::{Evaluation, Position, StageEnd, StageResult};

/// What comes next at a position, so that a gang that breaks between two steps goes on from there in the next generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Point {
    /// The stage is to be entered.
    Entering,
    /// The stage's weights are there. Its statistics are to be recomputed, where it does that.
    Thawed,
    /// What the stage starts from is to be evaluated.
    Entered,
    /// A step.
    Training,
    /// The last step is applied, and what follows from it is to be decided.
    Deciding,
    /// The stage is to be ended.
    Ending(StageEnd),
}

/// The best weights so far, as they were evaluated.
pub(crate) struct Best {
    pub(crate) groups: BTreeMap<usize, GroupSnapshot>,
}

/// Everything about the training that is not in the replica; what a manifest records.
pub(crate) struct State {
    pub(crate) position: Position,
    /// Updates of each ended stage.
    pub(crate) ended: Vec<u32>,
    /// Epoch, counted from the run's start, with which the present stage began.
    pub(crate) first_epoch: u32,
    pub(crate) tracker: RunTracker,
    pub(crate) best: Option<Best>,
    pub(crate) results: Vec<StageResult>,
    /// The last evaluation of the present stage; made anew after a resume before it is needed.
    pub(crate) deciding: Option<Evaluation>,
    pub(crate) point: Point,
    /// Changes of `position` and `point` since the run's beginning or the checkpoint it resumed from. The same on every rank that has come as
    /// far, and higher on one that has come further (KEEP-1).
    pub(crate) moves: u64,
    /// Where the spec asks for a trace.
    pub(crate) traced: Traced,
    /// Before this stage.
    pub(crate) seconds: f64,
    pub(crate) stage_seconds: f64,
}

impl State {
    pub(crate) fn beginning(job: &Job) -> Self {
        Self {
            position: Position::default(),
            ended: Vec::new(),
            first_epoch: 0,
            tracker: RunTracker::new(Judge::of_run(&job.spec)),
            best: None,
            results: Vec::new(),
            deciding: None,
            point: Point::Entering,
            moves: 0,
            traced: Traced::default(),
            seconds: 0.0,
            stage_seconds: 0.0,
        }
    }

    pub(super) fn move_to(&mut self, point: Point) {
        self.point = point;
        self.moves += 1;
    }
}
