//! Toys as the agent starts and ends them.

use super::{Hazards, Newborn};
use crate::dice::Dice;
use crate::world::World;
use async_trait::async_trait;
use std::fmt;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use thaw_node::agent::launch::{Launch, Life, Running};
use thaw_runtime::standstill;
use tokio::io::duplex;
use tokio::task::{JoinError, JoinHandle};

const PIPE_BYTES: usize = 1 << 16;

/// Starts toy trainers on one agent's host.
pub(crate) struct Toys {
    pub(crate) world: World,
    pub(crate) host: String,
    /// Names this life of the agent.
    pub(crate) life: String,
    pub(crate) dice: Arc<Mutex<Dice>>,
    pub(crate) hazards: Hazards,
}

impl fmt::Debug for Toys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Toys")
    }
}

struct ToyLife {
    task: JoinHandle<i32>,
    ended: Option<ExitStatus>,
}

#[async_trait]
impl Launch for Toys {
    fn name(&self) -> String {
        "toy".to_owned()
    }

    async fn launch(&self) -> io::Result<Running> {
        let (stdin, hears) = duplex(PIPE_BYTES);
        let (says, stdout) = duplex(PIPE_BYTES);
        let (log, stderr) = duplex(64);
        let seed = self.dice.lock().unwrap_or_else(PoisonError::into_inner).draw();
        let newborn = Newborn {
            world: self.world.clone(),
            host: self.host.clone(),
            life: self.life.clone(),
            dice: Dice::new(seed, "toy"),
            hazards: self.hazards,
            _log: log,
        };
        // The machine stands still, not the agent alone.
        let task = tokio::spawn(standstill::within(standstill::present(), newborn.live(hears, says)));
        let child = Box::new(ToyLife { task, ended: None });
        Ok(Running { child, stdin: Box::new(stdin), stdout: Box::new(stdout), stderr: Box::new(stderr), ring: None })
    }
}

#[async_trait]
impl Life for ToyLife {
    fn id(&self) -> u32 {
        1
    }

    async fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(ended) = self.ended {
            return Ok(ended);
        }
        let status = match (&mut self.task).await {
            Ok(code) => ExitStatus::from_raw(code << 8),
            Err(end) => ExitStatus::from_raw(if JoinError::is_panic(&end) { 6 } else { 9 }),
        };
        self.ended = Some(status);
        Ok(status)
    }

    fn start_kill(&mut self) -> io::Result<()> {
        self.task.abort();
        Ok(())
    }
}

impl Drop for ToyLife {
    fn drop(&mut self) {
        self.task.abort();
    }
}
