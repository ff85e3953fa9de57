//! `train`, `plan` and `watch`: from a spec to its outcome.

use super::args::{Format, PlanOptions, TrainOptions};
use super::client::{Again, Coordinators};
use super::embedded::{Cluster, WorkerLogs};
use super::progress::View;
use super::{Failure, client, print, print_as, show};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use thaw_coordinator::intake::{FilesPlanner, SpecPlanner};
use thaw_proto::pb;
use thaw_proto::pb::watch_run_response::Update;
use thaw_proto::spec::RunSpec;
use tokio_util::sync::CancellationToken;

/// Before a watch is opened again.
const REOPEN: Duration = Duration::from_millis(50);

/// Reads and checks a spec; paths in it are relative to its folder.
pub(super) fn read_spec(path: &Path) -> Result<(pb::RunSpec, RunSpec), Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::invalid(format!("cannot read the spec {}: {error}", path.display())))?;
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(thaw_proto::text::check_spec_at(&text, folder)?)
}

/// Plans in this process; needs no coordinator.
pub(super) async fn plan(options: PlanOptions) -> Result<ExitCode, Failure> {
    let (_, spec) = read_spec(&options.spec)?;
    let planned = tokio::task::spawn_blocking(move || FilesPlanner.plan(&spec))
        .await
        .map_err(|error| Failure::from_error(&error))??;
    let message = pb::Plan::from(&planned.plan);
    print_as(&message, options.output, || show::plan(&message));
    Ok(ExitCode::SUCCESS)
}

/// A cluster of its own, one run, and its outcome as the exit code.
pub(super) async fn train(options: TrainOptions) -> Result<ExitCode, Failure> {
    let (spec, _) = read_spec(&options.spec)?;
    let interrupted = interruption()?;
    let mut cluster = Cluster::start(&options.cluster, options.listen, WorkerLogs::Failures).await?;
    let outcome = tokio::select! {
        outcome = train_on(&mut cluster, spec, options.output) => outcome,
        () = interrupted.cancelled() => Err(Failure::failed("interrupted; run `thaw up` with the same --data-dir to go on")),
    };
    cluster.stop().await;
    outcome
}

/// Cancelled at the first signal.
pub(super) fn interruption() -> Result<CancellationToken, Failure> {
    thaw_runtime::shutdown::signal().map_err(|error| Failure::failed(format!("cannot listen to signals: {error}")))
}

async fn train_on(cluster: &mut Cluster, spec: pb::RunSpec, output: Format) -> Result<ExitCode, Failure> {
    let mut runs = cluster.coordinators()?;
    cluster.wait_for_workers().await?;
    let run = client::submit(&mut runs, spec).await?;
    eprintln!("run {} in {}", show::short(&run.name), cluster.run_folder(&run).display());
    if let Some(plan) = &run.plan {
        eprintln!("{}", show::plan(plan));
    }
    let ended = follow(&mut runs, &run.name).await?;
    let summary = cluster.run_folder(&ended).join("report/summary.json");
    finish(&ended, output, Some(&summary))
}

/// Follows a run to its end.
pub(super) async fn watch(runs: &mut Coordinators, name: &str, output: Format) -> Result<ExitCode, Failure> {
    let ended = follow(runs, name).await?;
    finish(&ended, output, None)
}

async fn follow(coordinators: &mut Coordinators, name: &str) -> Result<pb::Run, Failure> {
    let request = pb::WatchRunRequest { name: name.to_owned(), after_revision: 0, include_progress: true };
    let mut view = View::new();
    let mut latest = pb::Run::default();
    loop {
        let mut updates = coordinators.call(Again::Yes, async |mut runs| runs.watch_run(request.clone()).await).await?;
        loop {
            match updates.message().await {
                Ok(Some(response)) => match response.update {
                    Some(Update::Run(run)) => {
                        view.run(&run);
                        latest = run;
                    }
                    Some(Update::Progress(progress)) => view.progress(&latest, &progress),
                    Some(Update::Evaluation(evaluation)) => view.evaluation(&latest, &evaluation),
                    None => {}
                },
                Ok(None) => break,
                // Another coordinator leads, or will.
                Err(broken) => {
                    coordinators.after_stream(&broken)?;
                    break;
                }
            }
        }
        if has_ended(latest.state()) {
            view.finish();
            return Ok(latest);
        }
        tokio::time::sleep(REOPEN).await;
    }
}

fn finish(run: &pb::Run, output: Format, summary: Option<&Path>) -> Result<ExitCode, Failure> {
    match (output, summary) {
        (Format::Json, Some(path)) => print(
            &std::fs::read_to_string(path)
                .map_err(|error| Failure::failed(format!("cannot read the summary {}: {error}", path.display())))?,
        ),
        _ => print_as(run, output, || show::closing(run)),
    }
    match run.state() {
        pb::RunState::Succeeded => Ok(ExitCode::SUCCESS),
        state => {
            let text = format!(
                "run {} is {}: {}{}",
                show::short(&run.name),
                show::state(state),
                show::reason(run.reason()),
                if run.message.is_empty() { String::new() } else { format!(": {}", run.message) }
            );
            Err(match run.reason() {
                pb::RunReason::StepFailed => Failure::of_step(text),
                _ => Failure::failed(text),
            })
        }
    }
}

fn has_ended(state: pb::RunState) -> bool {
    matches!(state, pb::RunState::Succeeded | pb::RunState::Failed | pb::RunState::Cancelled)
}
