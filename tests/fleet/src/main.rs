//! Thousands of simulated workers against real coordinators over a real etcd; and as many against torchft's lighthouse.
//!
//! They speak the agents' protocol, a connection each, from the tasks of this one process; what they do not have is trainers. stdout: a
//! line a row. stderr: what went wrong. `make chaos ONLY=control_plane` runs it.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

mod cluster;
mod control_plane;
mod lean;
mod lighthouse;
mod rows;
mod worker;

use clap::Parser;
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(about = "Loads a control plane with simulated workers and prints what that costs.")]
enum Arguments {
    /// Coordinators of Thaw, started here.
    Thaw(control_plane::Options),
    /// A lighthouse of torchft that runs already.
    Lighthouse(lighthouse::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fleet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let most = thaw_runtime::limits::raise_open_files()?;
    let needed = 2 * u64::from(arguments.connections()) + 256;
    anyhow::ensure!(most >= needed, "{most} files may be open, {needed} are needed: raise the hard limit (ulimit -Hn)");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match arguments {
            Arguments::Thaw(options) => control_plane::measure(options).await,
            Arguments::Lighthouse(options) => lighthouse::measure(options).await,
        }
    })
}

impl Arguments {
    fn connections(&self) -> u32 {
        match self {
            Self::Thaw(options) => options.workers,
            Self::Lighthouse(options) => options.workers,
        }
    }
}
