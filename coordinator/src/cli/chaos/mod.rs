//! `chaos`: a run under faults beside the same run without, on real processes and a real etcd.
//!
//! - CHAOS-1: whatever was started here is ended by its id and waited for, and its folders are removed (`cluster`).
//! - CHAOS-2: it fails only where something broke: weights or samples differ from the undisturbed run's, a run did not end well, a trainer
//!   that a fault must spare was started again, or a process was left. A goal that is missed is no failure.
//!   So it does where an event is missing from a watch that was resumed, or comes twice.
//! - CHAOS-3: the seed gives the faults, their order and their victims.
//! - CHAOS-4: a network that links are cut in is gone with this program (`network`).

mod cluster;
mod faults;
mod follow;
mod network;
mod outcome;
mod processes;
mod requests;
mod rows;
mod stages;
mod watchers;

pub(crate) use faults::{Fault, Moment};

use super::args::{ChaosOptions, Format};
use super::train::{interruption, read_spec};
use super::{Failure, client, print};
use cluster::Cluster;
use faults::{Done, Draw, Lengths};
use follow::{Followed, Sight};
use outcome::{Ended, Report};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use thaw_proto::pb::{self, RunState};
use watchers::Watchers;

/// A run that makes no step for this long does not end.
const STANDSTILL: Duration = Duration::from_secs(180);
/// A stage that takes longer is not waited for.
const STAGE: Duration = Duration::from_secs(3600);

pub(super) async fn chaos(options: ChaosOptions, servers: &str) -> Result<ExitCode, Failure> {
    let (mut spec, _) = read_spec(&options.spec)?;
    // Steps and their samples are read from it.
    spec.verification.get_or_insert_default().trace = true;
    if options.faults.contains(&Fault::Partition) && !options.attach && !options.in_namespaces {
        return network::enter().await;
    }
    let interrupted = interruption()?;
    if options.in_namespaces {
        network::end_with_outside(&interrupted)?;
    }
    let folder = own_folder(options.folder.as_deref())?;
    let mut report = Report::default();
    let outcome = tokio::select! {
        outcome = on_a_cluster(&options, servers, spec, &folder, &mut report) => outcome,
        () = interrupted.cancelled() => Err(Failure::failed("interrupted")),
    };
    if let Err(failure) = outcome {
        report.problems.push(failure.text);
    }
    if options.output == Format::Json {
        print(&report.json());
    }
    if report.problems.is_empty() {
        let removed = std::fs::remove_dir_all(&folder);
        removed.map_err(|error| Failure::failed(format!("cannot remove {}: {error}", folder.display())))?;
        return Ok(ExitCode::SUCCESS);
    }
    let problems = report.problems.join("\n");
    Err(Failure::failed(format!("{problems}\nlogs and runs are kept in {}", folder.display())))
}

fn own_folder(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let unique = || std::env::temp_dir().join(format!("thaw-chaos-{}", uuid::Uuid::new_v4()));
    let folder = given.map_or_else(unique, Path::to_owned);
    let made = std::path::absolute(&folder).and_then(|folder| std::fs::create_dir(&folder).map(|()| folder));
    made.map_err(|error| {
        Failure::invalid(format!("--folder {}: {error}; name one that is not there", folder.display()))
    })
}

async fn on_a_cluster(
    options: &ChaosOptions,
    servers: &str,
    spec: pb::RunSpec,
    folder: &Path,
    report: &mut Report,
) -> Result<(), Failure> {
    report.plain = options.output != Format::Json;
    let mut cluster =
        if options.attach { Cluster::attach(options, servers).await? } else { Cluster::start(options, folder).await? };
    let outcome = experiment(&mut cluster, options, spec, report).await;
    report.problems.extend(cluster.stop().await);
    outcome
}

async fn experiment(
    cluster: &mut Cluster,
    options: &ChaosOptions,
    spec: pb::RunSpec,
    report: &mut Report,
) -> Result<(), Failure> {
    if options.requests {
        requests::measure(cluster, &spec, report).await?;
    }
    if options.count == 0 || options.faults.is_empty() {
        return Ok(());
    }
    let reference = if options.no_reference {
        None
    } else {
        say("the run without faults");
        let workers = options.reference_workers;
        let undisturbed = workers.map_or_else(|| spec.clone(), |workers| over_workers(spec.clone(), workers));
        let (_, followed) = submit(cluster, undisturbed).await?;
        let observing = stages::observe(cluster, followed.sight.clone());
        let (kept, ended) = tokio::join!(observing, ended(cluster, followed));
        let ended = ended?;
        stages::rows(report, &ended, &kept);
        Some(ended)
    };
    say("the run with faults");
    let (run, followed) = submit(cluster, spec).await?;
    let watchers = match options.watchers {
        0 => None,
        clients => {
            let draw = Draw::new(!options.seed);
            Some(Watchers::start(clients, &run, &cluster.addresses(), cluster.etcd_address(), draw)?)
        }
    };
    let done = disturb(cluster, &followed.sight, options).await?;
    let disturbed = ended(cluster, followed).await?;
    outcome::faults(report, &done, &disturbed);
    outcome::goodput(report, &done, &disturbed.steps);
    if let Some(reference) = &reference {
        outcome::weights(report, &done, reference, &disturbed);
    }
    if let Some(watchers) = watchers {
        watchers.finish(report).await?;
    }
    outcome::samples(report, reference.as_ref(), &disturbed)
}

fn say(text: &str) {
    eprintln!("chaos: {text}");
}

/// The same run over so many workers: its shards, and so its sums, stay those that the spec comes to.
fn over_workers(mut spec: pb::RunSpec, number: u32) -> pb::RunSpec {
    let workers = spec.workers.get_or_insert_default();
    let most = workers.max.unwrap_or_else(|| workers.min.unwrap_or(1));
    (workers.min, workers.max) = (Some(number), Some(number));
    spec.logical_shards.get_or_insert(most);
    spec.stages.iter_mut().for_each(|stage| stage.workers = None);
    spec
}

/// The run as it was made, and how it is followed.
async fn submit(cluster: &Cluster, spec: pb::RunSpec) -> Result<(pb::Run, Followed), Failure> {
    let mut coordinators = cluster.client()?;
    let run = client::submit(&mut coordinators, spec).await?;
    let folder = cluster.data_dir().join(&run.name);
    let followed = Followed::start(coordinators, &run, &folder);
    Ok((run, followed))
}

async fn ended(cluster: &Cluster, followed: Followed) -> Result<Ended, Failure> {
    let (run, steps) = followed.end(STANDSTILL).await?;
    if run.state() != RunState::Succeeded {
        return Err(Failure::failed(format!("{} ended as {}: {}", run.name, run.state().as_str_name(), run.message)));
    }
    let folder = cluster.data_dir().join(&run.name);
    Ok(Ended { run, steps, folder })
}

/// The schedule, fault by fault, until it is over or the run is.
async fn disturb(cluster: &mut Cluster, run: &Sight, options: &ChaosOptions) -> Result<Vec<Done>, Failure> {
    let mut draw = Draw::new(options.seed);
    let schedule = faults::schedule(&mut draw, &options.faults, options.count);
    let every = Duration::from_secs_f64(options.every);
    let lengths =
        Lengths { outage: Duration::from_secs_f64(options.outage), load: Duration::from_secs_f64(options.load) };
    let (mut all, mut head) = (Vec::new(), None);
    let mut due = Instant::now() + every;
    for (index, fault) in schedule.iter().enumerate() {
        if !faults::settled(cluster, run, head).await {
            break;
        }
        tokio::time::sleep_until(due.into()).await;
        // Meanwhile it may have ended.
        if !faults::settled(cluster, run, head).await {
            break;
        }
        if options.at == Moment::StageChange && !run.until_stage_ends(STAGE).await {
            break;
        }
        head = faults::head_step(&run.run());
        due = Instant::now() + every;
        let done = faults::inflict(cluster, run, *fault, &mut draw, lengths).await?;
        let seconds =
            |time: Option<Duration>| time.map_or("-".to_owned(), |time| format!("{:.3} s", time.as_secs_f64()));
        say(&format!(
            "{} of {}: {} detected {} recovered {} kept {} of {}{}",
            index + 1,
            schedule.len(),
            fault.name(),
            seconds(done.detected),
            seconds(done.recovered),
            done.kept,
            done.others,
            done.missed.as_ref().map_or(String::new(), |missed| format!(" ({missed})"))
        ));
        all.push(done);
    }
    Ok(all)
}

#[expect(clippy::cast_precision_loss, reason = "what is counted here stays far below 2^53")]
fn count(things: usize) -> f64 {
    things as f64
}
