//! The binary `thaw`: the coordinator, the embedded cluster and the client verbs.

mod cli;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run(cli::Args::parse())
}
