//! `recover`: a lost store, rebuilt from the folders of its runs.

use super::args::RecoverOptions;
use super::{Failure, print, show};
use std::path::PathBuf;
use std::process::ExitCode;
use thaw_coordinator::recover::{self, Recovered};

pub(super) async fn recover(options: RecoverOptions) -> Result<ExitCode, Failure> {
    let url = options.store.url()?;
    let absolute = |path: &PathBuf| {
        path.canonicalize()
            .map_err(|error| Failure::invalid(format!("cannot find the folder {}: {error}", path.display())))
    };
    let folders = std::iter::once(&options.data_dir).chain(&options.also_in).map(absolute);
    let folders = folders.collect::<Result<Vec<_>, _>>()?;
    let recovered = recover::recover(&url, &options.store.access(), &folders, options.replace).await;
    let recovered = recovered.map_err(|error| match error {
        recover::Error::Led { .. } | recover::Error::NotEmpty { .. } => Failure::invalid(error.to_string()),
        error => Failure::from_error(&error),
    })?;
    print(&show::recovered(&recovered));
    Ok(outcome(&recovered))
}

/// Success only where every folder became a run.
fn outcome(recovered: &Recovered) -> ExitCode {
    match recovered.left_out.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
