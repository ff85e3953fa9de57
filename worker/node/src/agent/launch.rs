//! What a trainer is to its agent: something with three pipes that lives, can be killed, and ends. A process; in a simulation,
//! a task.

use crate::collective::Ring;
use async_trait::async_trait;
use std::fmt;
use std::io;
use std::process::ExitStatus;
use tokio::io::{AsyncRead, AsyncWrite};

/// Starts trainers.
#[async_trait]
pub trait Launch: Send + Sync + fmt::Debug {
    /// What is started, for messages.
    fn name(&self) -> String;

    /// Starts one.
    async fn launch(&self) -> io::Result<Running>;
}

/// A trainer's life. Dropping it ends it.
#[async_trait]
pub trait Life: Send {
    /// The process's id, or what stands for it.
    fn id(&self) -> u32;

    /// Its end. Cancel-safe; may be called again.
    async fn wait(&mut self) -> io::Result<ExitStatus>;

    /// Asks for its end, which [`Life::wait`] then tells.
    fn start_kill(&mut self) -> io::Result<()>;
}

/// A trainer and its pipes: frames in, frames out, lines of its log; and the memory it shares with its agent.
pub struct Running {
    pub child: Box<dyn Life>,
    pub stdin: Box<dyn AsyncWrite + Send + Unpin>,
    pub stdout: Box<dyn AsyncRead + Send + Unpin>,
    pub stderr: Box<dyn AsyncRead + Send + Unpin>,
    /// Where it records its operations over all ranks; it has been told.
    pub ring: Option<Ring>,
}
