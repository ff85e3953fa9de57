//! `chaos`: a run under faults beside the same run without, on real processes and a real etcd.
//!
//! - CHAOS-1: whatever was started here is ended by its id and waited for, and its folders are removed (`cluster`).
//! - CHAOS-2: it fails only where something broke: weights or samples differ from the undisturbed run's, a run did not end well, a trainer
//!   that a fault must spare was started again, or a process was left. A goal that is missed is no failure.
//! - CHAOS-3: the seed gives the faults, their order and their victims.

mod cluster;
mod faults;
mod follow;
mod processes;
mod requests;
mod rows;

pub(crate) use faults::Fault;

use super::args::{ChaosOptions, Format};
use super::train::{interruption, read_spec};
use super::{Failure, client, print};
use cluster::Cluster;
use faults::{Done, Draw};
use follow::{Followed, Steps};
use rows::{Goal, Row};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use thaw_coordinator::verify;
use thaw_proto::pb::{self, RunState};

/// A run that makes no step for this long does not end.
const STANDSTILL: Duration = Duration::from_secs(180);

/// Over less, a rate says nothing.
const LEAST_WINDOW: Duration = Duration::from_secs(3);

pub(super) async fn chaos(options: ChaosOptions, servers: &str) -> Result<ExitCode, Failure> {
    let (mut spec, _) = read_spec(&options.spec)?;
    // Steps and their samples are read from it.
    spec.verification.get_or_insert_default().trace = true;
    let interrupted = interruption()?;
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

/// What was found so far.
#[derive(Debug, Default)]
struct Report {
    rows: Vec<Row>,
    problems: Vec<String>,
    plain: bool,
}

impl Report {
    fn row(&mut self, row: Row) {
        if self.plain {
            print(&row.line());
        }
        self.rows.push(row);
    }

    fn json(&self) -> String {
        let document = serde_json::json!({"rows": self.rows, "problems": self.problems});
        serde_json::to_string_pretty(&document).expect("names and numbers are plain data")
    }
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

/// A run that has ended, with its steps.
struct Ended {
    run: pb::Run,
    steps: Steps,
    folder: PathBuf,
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
        let followed = submit(cluster, spec.clone()).await?;
        Some(ended(cluster, followed).await?)
    };
    say("the run with faults");
    let followed = submit(cluster, spec).await?;
    let done = disturb(cluster, &followed, options).await?;
    let disturbed = ended(cluster, followed).await?;
    faults_rows(report, &done, reference.as_ref(), &disturbed);
    if let Some(reference) = &reference {
        compare(report, &done, reference, &disturbed);
    }
    samples(report, reference.as_ref(), &disturbed)
}

fn say(text: &str) {
    eprintln!("chaos: {text}");
}

async fn submit(cluster: &Cluster, spec: pb::RunSpec) -> Result<Followed, Failure> {
    let mut coordinators = cluster.client()?;
    let run = client::submit(&mut coordinators, spec).await?;
    let folder = cluster.data_dir().join(&run.name);
    Ok(Followed::start(coordinators, &run, &folder))
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
async fn disturb(cluster: &mut Cluster, run: &Followed, options: &ChaosOptions) -> Result<Vec<Done>, Failure> {
    let mut draw = Draw::new(options.seed);
    let schedule = faults::schedule(&mut draw, &options.faults, options.count);
    let every = Duration::from_secs_f64(options.every);
    let outage = Duration::from_secs_f64(options.outage);
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
        head = faults::head_step(&run.run());
        due = Instant::now() + every;
        let done = faults::inflict(cluster, run, *fault, &mut draw, outage).await?;
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

/// Two rows for each kind of fault, and what the gang noticed of those that it must not notice.
fn faults_rows(report: &mut Report, done: &[Done], reference: Option<&Ended>, disturbed: &Ended) {
    let mut kinds: BTreeMap<Fault, Vec<&Done>> = BTreeMap::new();
    for one in done {
        kinds.entry(one.fault).or_default().push(one);
    }
    for (fault, all) in kinds {
        let (recovered, detected) = goals(fault);
        let times = |of: fn(&Done) -> Option<Duration>| -> Vec<f64> {
            all.iter().filter_map(|one| of(one)).map(|time| time.as_secs_f64()).collect()
        };
        let kept: usize = all.iter().map(|one| one.kept).sum();
        let others: usize = all.iter().map(|one| one.others).sum();
        let missed = all.iter().filter(|one| one.missed.is_some()).count();
        let name = fault.name();
        let row = Row::new(name, times(|one| one.recovered), recovered);
        report.row(row.with("kept", format!("{kept}/{others}")).with("missed", missed).with("unit", "s"));
        if !fault.spares_the_gang() {
            report.row(Row::new(format!("{name}.detected"), times(|one| one.detected), detected).with("unit", "s"));
            continue;
        }
        // CHAOS-2
        if kept < others {
            report.problems.push(format!("{} of {others} trainers did not outlive {name}", others - kept));
        }
        if let Some(reference) = reference {
            let before_next = |one: &Done| done.iter().map(|other| other.at).find(|at| *at > one.at);
            let rates = all.iter().filter_map(|one| rate(one, before_next(one), reference, disturbed)).collect();
            report.row(Row::new(format!("{name}.step_rate"), rates, Goal::AtLeast(0.99)));
        }
        if fault == Fault::Outage {
            outage_rows(report, &all, disturbed);
        }
    }
}

fn goals(fault: Fault) -> (Goal, Goal) {
    match fault {
        Fault::KillTrainer => (Goal::P50AndP99(1.0, 2.5), Goal::None),
        Fault::StopTrainer | Fault::StopAgent => (Goal::None, Goal::P99(2.5)),
        Fault::KillAgent | Fault::Outage => (Goal::None, Goal::None),
        Fault::KillLeader => (Goal::P99(4.0), Goal::None),
        Fault::HandOver => (Goal::P99(0.3), Goal::None),
    }
}

/// Time that the undisturbed run took for the steps made during a fault, over the fault's time: 1 is undisturbed. No further than to `next`.
fn rate(one: &Done, next: Option<Instant>, reference: &Ended, disturbed: &Ended) -> Option<f64> {
    let length = if one.fault == Fault::Outage { one.length } else { one.recovered?.max(LEAST_WINDOW) };
    let until = next.map_or(one.at + length, |next| next.min(one.at + length));
    let firsts = disturbed.steps.firsts();
    let made = firsts.iter().filter(|(_, at)| (one.at..=until).contains(*at)).map(|(step, _)| *step);
    let (first, last) = (made.clone().min()?, made.max()?);
    let expected = reference.steps.firsts();
    let took = *firsts.get(&last)? - *firsts.get(&first)?;
    let undisturbed = *expected.get(&last)? - *expected.get(&first)?;
    (took > Duration::ZERO).then(|| undisturbed.as_secs_f64() / took.as_secs_f64())
}

/// What went on while there was no coordinator.
fn outage_rows(report: &mut Report, all: &[&Done], disturbed: &Ended) {
    let during = |one: &&Done| {
        let until = one.at + one.length;
        let steps = disturbed.steps.all.iter().filter(|applied| (one.at..=until).contains(&applied.at));
        let stages: std::collections::BTreeSet<u32> = steps.clone().map(|applied| applied.stage).collect();
        (count(steps.count()), count(stages.len().saturating_sub(1)))
    };
    let (steps, changes): (Vec<f64>, Vec<f64>) = all.iter().map(during).unzip();
    report.row(Row::new("outage.steps", steps, Goal::None));
    report.row(Row::new("outage.stage_changes", changes, Goal::None));
    let heads = all.iter().map(|one| count(usize::from(one.head_moved))).collect();
    report.row(Row::new("outage.checkpoint_after", heads, Goal::AtLeast(1.0)));
}

/// Goodput and weights.
fn compare(report: &mut Report, done: &[Done], reference: &Ended, disturbed: &Ended) {
    let span = |steps: &Steps| {
        let firsts = steps.firsts();
        let (first, last) = (firsts.first_key_value()?.1, firsts.last_key_value()?.1);
        Some((*last - *first).as_secs_f64())
    };
    if let (Some(undisturbed), Some(with_faults)) = (span(&reference.steps), span(&disturbed.steps)) {
        let share = Row::new("goodput", vec![undisturbed / with_faults], Goal::AtLeast(0.95));
        let between = with_faults / count(done.len().max(1));
        let share = share.with("faults", done.len()).with("seconds_a_fault", format!("{between:.1}"));
        report.row(share.with("steps", disturbed.steps.next()));
    }
    let weights = |ended: &Ended| ended.run.result.as_ref().map(|result| result.weights_blake3.clone());
    let equal = weights(reference).is_some() && weights(reference) == weights(disturbed);
    report
        .row(Row::new("weights_equal", vec![count(usize::from(equal))], Goal::AtLeast(1.0)).with("faults", done.len()));
    if !equal {
        let (with, without) = (weights(disturbed), weights(reference));
        report.problems.push(format!("the weights are {with:?}, without faults they are {without:?}"));
    }
}

/// The ledger: each step there once, with the samples it has without faults, and each epoch using each sample once.
fn samples(report: &mut Report, reference: Option<&Ended>, disturbed: &Ended) -> Result<(), Failure> {
    ledger(report, reference, disturbed);
    let verified = verify::verify(&disturbed.folder, |_, _| {}).map_err(|error| Failure::from_error(&error))?;
    for check in verified.checks.iter().filter(|check| !check.holds) {
        report.problems.push(format!("{}: {}", check.name, check.detail));
    }
    Ok(())
}

fn ledger(report: &mut Report, reference: Option<&Ended>, disturbed: &Ended) {
    let made = disturbed.run.result.as_ref().map_or(0, |result| result.steps);
    let found = &disturbed.steps.samples;
    let missing = (0..made).filter(|step| !found.contains_key(step)).count();
    let differs =
        |reference: &Ended| (0..made).filter(|step| found.get(step) != reference.steps.samples.get(step)).count();
    let differing = reference.map_or(0, differs) + usize::try_from(disturbed.steps.contradicted).unwrap_or(usize::MAX);
    let row = Row::new("ledger", vec![count(missing + differing)], Goal::AtMost(0.0));
    let again = disturbed.steps.all.len() - found.len();
    report.row(
        row.with("steps", made).with("missing", missing).with("other_samples", differing).with("made_again", again),
    );
    if missing + differing > 0 {
        report
            .problems
            .push(format!("{missing} steps are missing, {differing} have other samples than without faults"));
    }
}

#[expect(clippy::cast_precision_loss, reason = "what is counted here stays far below 2^53")]
fn count(things: usize) -> f64 {
    things as f64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    fn made(weights: &str, lines: &[&str], steps: u64) -> Ended {
        let result = pb::RunResult { weights_blake3: weights.to_owned(), steps, ..Default::default() };
        let run = pb::Run { result: Some(result), ..Default::default() };
        Ended { run, steps: Steps::of(lines), folder: PathBuf::new() }
    }

    fn line(step: u64, sample: u32) -> String {
        format!("{{\"step\":{step},\"stage\":0,\"shards\":[{{\"shard\":0,\"samples\":[{sample}]}}],\"loss\":1}}")
    }

    /// CHAOS-2.
    #[test]
    fn other_weights_and_other_samples_are_problems_and_a_missed_goal_is_none() {
        let (first, second, other) = (line(0, 4), line(1, 5), line(1, 6));
        let reference = made("aa", &[&first, &second], 2);
        let problems = |disturbed: &Ended| {
            let mut report = Report::default();
            compare(&mut report, &[], &reference, disturbed);
            ledger(&mut report, Some(&reference), disturbed);
            report.problems.len()
        };
        // A step that was made again counts once.
        assert_eq!(problems(&made("aa", &[&first, &first, &second], 2)), 0);
        assert_eq!(problems(&made("bb", &[&first, &second], 2)), 1);
        assert_eq!(problems(&made("aa", &[&first], 2)), 1, "a step is missing");
        assert_eq!(problems(&made("aa", &[&first, &other], 2)), 1, "another sample");
        assert_eq!(problems(&made("aa", &[&first, &other, &second], 2)), 1, "another sample before a loss");
        let mut report = Report::default();
        report.row(Row::new("slow", vec![9.0], Goal::P99(1.0)));
        assert_eq!(report.problems, Vec::<String>::new());
    }
}
