//! A place to stand still: lets a test stop a trainer at a known point of a known step, to kill it there.

use std::fs;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// Where a trainer can be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HoldPoint {
    Forward,
    AllReduce,
    Update,
    CheckpointWrite,
}

/// `point@step=path`: at `point` of step `step`, creates the file `path` and waits to be killed. Where the file is already there, the point
/// has been reached before and the trainer goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    point: HoldPoint,
    step: u64,
    path: PathBuf,
}

impl Hold {
    /// Holds the calling thread if this is its point. Gives up after a minute, so that a test that failed to kill leaves nothing behind.
    pub(crate) fn at(hold: Option<&Self>, point: HoldPoint, step: u64) {
        let Some(hold) = hold.filter(|hold| hold.point == point && hold.step == step) else { return };
        let id = std::process::id();
        let own = hold.path.with_extension(id.to_string());
        // Who to kill. Linked, so that whoever sees the file finds that in it.
        let appears = fs::write(&own, format!("{id}\n")).and_then(|()| fs::hard_link(&own, &hold.path));
        let _gone = fs::remove_file(&own);
        if appears.is_err() {
            return;
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            std::thread::park_timeout(deadline - Instant::now());
        }
    }
}

impl FromStr for Hold {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shape = || format!("`{text}` is not point@step=path");
        let (point, rest) = text.split_once('@').ok_or_else(shape)?;
        let (step, path) = rest.split_once('=').ok_or_else(shape)?;
        let point = match point {
            "forward" => HoldPoint::Forward,
            "all-reduce" => HoldPoint::AllReduce,
            "update" => HoldPoint::Update,
            "checkpoint-write" => HoldPoint::CheckpointWrite,
            other => return Err(format!("`{other}` is not one of forward, all-reduce, update, checkpoint-write")),
        };
        Ok(Self { point, step: step.parse().map_err(|_| shape())?, path: path.into() })
    }
}
