//! `verify`: a run's record checked again, and its plan beside what was measured.

use super::args::{Format, VerifyOptions};
use super::{Failure, print, show};
use std::path::PathBuf;
use std::process::ExitCode;
use thaw_coordinator::verify::{self, Verified};

pub(super) async fn verify(options: VerifyOptions) -> Result<ExitCode, Failure> {
    let folder = folder(&options);
    let found = tokio::task::spawn_blocking(move || {
        verify::verify(&folder, |done, all| {
            if done % 100 == 0 || done == all {
                eprintln!("{done} of {all} blobs");
            }
        })
    });
    let found = found.await.map_err(|error| Failure::from_error(&error))?.map_err(|error| match error {
        verify::Error::NotARun { .. } => Failure::invalid(error.to_string()),
        verify::Error::Read { .. } => Failure::from_error(&error),
    })?;
    print(&match options.output {
        Format::Json | Format::Yaml => serde_json::to_string_pretty(&found).expect("names and numbers are plain data"),
        Format::Table | Format::Wide => show::verified(&found),
    });
    outcome(&found)
}

/// A run's id below the data folder, or the folder itself.
fn folder(options: &VerifyOptions) -> PathBuf {
    let id = show::short(&options.run);
    let in_data = options.data_dir.join("runs").join(id);
    if in_data.is_dir() { in_data } else { PathBuf::from(&options.run) }
}

fn outcome(found: &Verified) -> Result<ExitCode, Failure> {
    if found.holds() {
        return Ok(ExitCode::SUCCESS);
    }
    let wrong = found.checks.iter().filter(|check| !check.holds);
    let wrong: Vec<String> = wrong.map(|check| format!("{}: {}", check.name, check.detail)).collect();
    Err(Failure::failed(wrong.join("\n")))
}
