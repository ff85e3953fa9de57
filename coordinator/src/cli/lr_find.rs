//! `lr-find`: one stage of a spec with a rate that rises until the loss does, and the rate that suggests itself (Smith 2017).

use super::args::{Format, LrFindOptions};
use super::client::Again;
use super::embedded::{Cluster, WorkerLogs};
use super::train::{interruption, read_spec};
use super::{Failure, client, print, show};
use serde::Deserialize;
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use thaw_coordinator::intake::{FilesPlanner, SpecPlanner};
use thaw_core::lr_find::{HIGHEST_RATE, Point, RangeTest, STEPS, Verdict, rate};
use thaw_proto::pb;
use thaw_proto::pb::watch_run_response::Update;
use thaw_proto::plan::{Plan, PlannedStage};

const PLOT_COLUMNS: usize = 64;
const PLOT_ROWS: usize = 14;

/// Runs the test in a cluster of its own, and prints the suggestion.
pub(super) async fn lr_find(options: LrFindOptions) -> Result<ExitCode, Failure> {
    let (given, checked) = read_spec(&options.spec)?;
    let planned = tokio::task::spawn_blocking(move || FilesPlanner.plan(&checked))
        .await
        .map_err(|error| Failure::from_error(&error))??;
    let stage = stage_of(&planned.plan, options.stage.as_deref())?;
    let spec = test_spec(given, &planned.plan, stage);
    eprintln!("stage {}: at most {STEPS} updates, rate up to {HIGHEST_RATE}", stage.name);
    let interrupted = interruption()?;
    let mut cluster = Cluster::start(&options.cluster, options.listen, WorkerLogs::Failures).await?;
    let test = tokio::select! {
        test = test_on(&mut cluster, spec) => test,
        () = interrupted.cancelled() => Err(Failure::failed("interrupted")),
    };
    cluster.stop().await;
    report(&test?, options.output)
}

fn stage_of<'a>(plan: &'a Plan, name: Option<&str>) -> Result<&'a PlannedStage, Failure> {
    let first = plan.stages.first().ok_or_else(|| Failure::invalid("the spec has no stage"))?;
    let Some(name) = name else { return Ok(first) };
    plan.stages.iter().find(|stage| stage.name == name).ok_or_else(|| {
        let names: Vec<&str> = plan.stages.iter().map(|stage| stage.name.as_str()).collect();
        Failure::invalid(format!("--stage {name}: no such stage; the plan has {}", names.join(", ")))
    })
}

/// The spec with that stage alone, its groups' rates in their proportions and the highest of them at the end of the test's range.
fn test_spec(mut spec: pb::RunSpec, plan: &Plan, stage: &PlannedStage) -> pb::RunSpec {
    let names = stage.trainable_groups.iter().map(|group| plan.groups[group.0 as usize].name.clone());
    let names: Vec<String> = names.collect();
    let highest = stage.learning_rates.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let rates = stage.learning_rates.iter().map(|rate| rate / highest * HIGHEST_RATE);
    let rates = names.iter().cloned().zip(rates).collect();
    let scheduler = pb::LrScheduler { r#type: pb::LrSchedulerType::RangeTest.into(), ..pb::LrScheduler::default() };
    let until = pb::Until { max_steps: Some(STEPS), ..pb::Until::default() };
    spec.strategy = pb::Strategy::Custom.into();
    spec.until = None;
    spec.lr_scheduler = None;
    spec.learning_rates.clear();
    spec.thaw_units = None;
    spec.ema = None;
    spec.eval_steps = None;
    spec.logging_steps = Some(1);
    spec.verification = None;
    spec.checkpoint = Some(pb::Checkpoint { save_steps: Some(1_000_000), ..spec.checkpoint.unwrap_or_default() });
    spec.stages = vec![pb::Stage {
        name: "range-test".to_owned(),
        thaw: names,
        learning_rates: rates,
        until: Some(until),
        lr_scheduler: Some(scheduler),
        ..pb::Stage::default()
    }];
    spec
}

async fn test_on(cluster: &mut Cluster, spec: pb::RunSpec) -> Result<RangeTest, Failure> {
    let mut runs = cluster.coordinators()?;
    cluster.wait_for_workers().await?;
    let run = client::submit(&mut runs, spec).await?;
    let request = pb::WatchRunRequest { name: run.name.clone(), after_revision: 0, include_progress: true };
    let mut updates = runs.call(Again::Yes, async |mut runs| runs.watch_run(request.clone()).await).await?;
    let (mut latest, mut seen, mut has_ended) = (run.clone(), RangeTest::default(), false);
    while let Some(response) = updates.message().await? {
        match response.update {
            Some(Update::Run(run)) => latest = run,
            Some(Update::Progress(progress)) if !has_ended => {
                let step = progress.position.unwrap_or_default().stage_step;
                eprintln!("{step:>3}/{STEPS}  rate {:.2e}  loss {:.4}", rate_after(step), progress.loss);
                if seen.push(rate_after(step), progress.loss) == Verdict::Diverged {
                    has_ended = true;
                    eprintln!("the loss has left its valley; that is enough");
                    let cancel = pb::CancelRunRequest { name: run.name.clone() };
                    runs.call(Again::Yes, async |mut runs| runs.cancel_run(cancel.clone()).await).await?;
                }
            }
            Some(_) | None => {}
        }
    }
    // What came to be watched may have been thinned out; the run's folder has every step.
    let test = read_steps(&cluster.run_folder(&run).join("metrics.jsonl"))?;
    if test.points().is_empty() {
        return Err(Failure::failed(format!(
            "the test made no update: run {} is {}: {}",
            show::short(&run.name),
            show::state(latest.state()),
            latest.message
        )));
    }
    Ok(test)
}

/// The highest group's rate in the update after which `stage_step` are done.
fn rate_after(stage_step: u32) -> f64 {
    rate(HIGHEST_RATE, stage_step.saturating_sub(1), STEPS)
}

#[derive(Deserialize)]
struct Line {
    kind: String,
    #[serde(default)]
    stage_step: u32,
    #[serde(default)]
    loss: Option<f64>,
}

fn read_steps(path: &Path) -> Result<RangeTest, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::failed(format!("cannot read the metrics {}: {error}", path.display())))?;
    let mut test = RangeTest::default();
    for line in text.lines() {
        let Ok(line) = serde_json::from_str::<Line>(line) else { continue };
        if line.kind != "progress" {
            continue;
        }
        if test.push(rate_after(line.stage_step), line.loss.unwrap_or(f64::NAN)) == Verdict::Diverged {
            break;
        }
    }
    Ok(test)
}

fn report(test: &RangeTest, output: Format) -> Result<ExitCode, Failure> {
    let suggestion = test.suggestion();
    match output {
        Format::Json | Format::Yaml => {
            let points: Vec<_> = test.points().iter().map(|point| {
                serde_json::json!({"learning_rate": point.rate, "loss": point.loss, "smoothed_loss": point.smoothed})
            }).collect();
            let document = serde_json::json!({"learning_rate": suggestion, "points": points});
            print(&serde_json::to_string_pretty(&document).expect("numbers are plain data"));
        }
        Format::Table | Format::Wide => print(&plot(test.points(), suggestion)),
    }
    match suggestion {
        Some(rate) => {
            eprintln!("suggested: learning_rate: {rate:.1e}");
            Ok(ExitCode::SUCCESS)
        }
        None => Err(Failure::failed("the loss never fell, so no rate suggests itself; check data and labels")),
    }
}

/// Smoothed loss over the logarithm of the rate; the suggestion is marked.
fn plot(points: &[Point], suggestion: Option<f64>) -> String {
    let finite = |value: fn(&Point) -> f64| points.iter().map(value).filter(|value| value.is_finite());
    let (low, high) =
        finite(|point| point.smoothed).fold((f64::MAX, f64::MIN), |(low, high), loss| (low.min(loss), high.max(loss)));
    let (first, last) = (points[0].rate.log10(), points[points.len() - 1].rate.log10());
    let mut rows = vec![vec![' '; PLOT_COLUMNS]; PLOT_ROWS];
    for point in points.iter().filter(|point| point.smoothed.is_finite()) {
        let column = place(point.rate.log10(), first, last, PLOT_COLUMNS);
        let row = PLOT_ROWS - 1 - place(point.smoothed, low, high, PLOT_ROWS);
        rows[row][column] = if suggestion == Some(point.rate) { '◆' } else { '•' };
    }
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let loss = match index {
            0 => format!("{high:.3}"),
            last if last + 1 == PLOT_ROWS => format!("{low:.3}"),
            _ => String::new(),
        };
        let _ = writeln!(text, "{loss:>9} │{}", row.iter().collect::<String>().trim_end());
    }
    let _ = writeln!(text, "{:>9} └{}", "", "─".repeat(PLOT_COLUMNS));
    let (first, last) = (format!("{:.0e}", points[0].rate), format!("{:.0e}", points[points.len() - 1].rate));
    let _ = writeln!(text, "{:>11}{first}{last:>width$}  learning_rate", "", width = PLOT_COLUMNS - first.len());
    if let Some(rate) = suggestion {
        let _ = write!(text, "◆ learning_rate: {rate:.1e}");
    }
    text
}

/// Which of `cells` equal parts of `low..=high` holds a value.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a share of a few cells, not negative"
)]
fn place(value: f64, low: f64, high: f64, cells: usize) -> usize {
    let share = if high > low { (value - low) / (high - low) } else { 0.0 };
    ((share * cells as f64) as usize).min(cells - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_marks_the_suggestion_and_names_its_ends() {
        let points: Vec<Point> = (0..50_u32)
            .map(|step| {
                let smoothed = (f64::from(step) - 30.0).powi(2);
                Point { rate: rate(10.0, step, 50), loss: smoothed, smoothed }
            })
            .collect();
        let drawn = plot(&points, Some(points[20].rate));
        assert_eq!(drawn.matches('◆').count(), 2, "one in the plot and one below it\n{drawn}");
        assert!(drawn.contains("900.000") && drawn.contains("0.000") && drawn.contains("1e-7"), "{drawn}");
        assert!(drawn.lines().all(|line| line.chars().count() < 100), "{drawn}");
    }

    #[test]
    fn a_flat_loss_is_drawn_too() {
        let point = |rate| Point { rate, loss: 1.0, smoothed: 1.0 };
        assert!(plot(&[point(1e-7), point(1e-6)], None).contains('•'));
    }
}
