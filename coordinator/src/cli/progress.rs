//! The live view of a run: one bar on a terminal, plain lines elsewhere. Writes to stderr only.

use super::show;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use thaw_proto::pb;

/// Plain lines come at most this often.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

pub(super) struct View {
    bar: ProgressBar,
    terminal: bool,
    stage: Option<u32>,
    last_line: Option<Instant>,
    shown_message: String,
    results_shown: usize,
    started: Instant,
}

impl View {
    pub(super) fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr_with_hz(5) } else { ProgressDrawTarget::hidden() };
        let style = ProgressStyle::with_template("{prefix:>10} {bar:32} {pos}/{len} {msg}")
            .expect("the template is a constant")
            .progress_chars("━╸─");
        let bar = ProgressBar::with_draw_target(Some(0), target).with_style(style);
        Self {
            bar,
            terminal,
            stage: None,
            last_line: None,
            shown_message: String::new(),
            results_shown: 0,
            started: Instant::now(),
        }
    }

    /// The run has changed.
    pub(super) fn run(&mut self, run: &pb::Run) {
        let mut line = format!("{} {}", show::state(run.state()), show::reason(run.reason()));
        if !run.message.is_empty() {
            line = format!("{line}: {}", run.message);
        }
        if line != self.shown_message {
            self.say(&line);
            self.shown_message = line;
        }
        for result in run.stage_results.iter().skip(self.results_shown) {
            let eval = result.eval.clone().unwrap_or_default();
            let name = show::stage_name(run, result.stage);
            let end = result.end().as_str_name().trim_start_matches("STAGE_END_").to_lowercase();
            self.say(&format!(
                "stage {name} ended ({end}) after {} steps, {:.1} s; best so far: loss {:.4}, accuracy {:.4}",
                result.steps, result.seconds, eval.loss, eval.accuracy
            ));
        }
        self.results_shown = self.results_shown.max(run.stage_results.len());
    }

    pub(super) fn evaluation(&mut self, run: &pb::Run, evaluation: &pb::Evaluation) {
        let position = evaluation.position.unwrap_or_default();
        let name = show::stage_name(run, position.stage);
        self.say(&format!(
            "{name} step {}: evaluation loss {:.4}, accuracy {:.4}, macro F1 {:.4}",
            position.stage_step, evaluation.loss, evaluation.accuracy, evaluation.macro_f1
        ));
    }

    pub(super) fn progress(&mut self, run: &pb::Run, progress: &pb::Progress) {
        let position = progress.position.unwrap_or_default();
        let name = show::stage_name(run, position.stage);
        let most = run
            .plan
            .as_ref()
            .and_then(|plan| plan.stages.get(position.stage as usize))
            .map_or(0, |stage| stage.max_steps);
        if self.stage != Some(position.stage) {
            self.stage = Some(position.stage);
            self.bar.set_length(u64::from(most));
            self.bar.set_prefix(name.clone());
        }
        self.bar.set_position(u64::from(position.stage_step));
        let left = time_left(run, progress, most);
        let text = format!(
            "loss {:.4}  rate {}  {:.1} samples/s  {left} left",
            progress.loss,
            show::rates(&progress.learning_rates),
            progress.samples_per_second
        );
        self.bar.set_message(text.clone());
        let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL);
        if !self.terminal && due {
            self.last_line = Some(Instant::now());
            self.say(&format!("{name} step {}/{most}  {text}", position.stage_step));
        }
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn say(&self, line: &str) {
        let seconds = self.started.elapsed().as_secs();
        let line = format!("{:>3}:{:02} {line}", seconds / 60, seconds % 60);
        if self.terminal {
            self.bar.println(line);
        } else {
            eprintln!("{line}");
        }
    }
}

/// What is left of the stage at the present speed; `?` where the speed is unknown.
fn time_left(run: &pb::Run, progress: &pb::Progress, most: u32) -> String {
    let done = progress.position.unwrap_or_default().stage_step;
    let batch = run.plan.as_ref().map_or(0, |plan| plan.global_batch_size);
    if progress.samples_per_second <= 0.0 || batch == 0 {
        return "?".to_owned();
    }
    let seconds = f64::from(most.saturating_sub(done)) * f64::from(batch) / progress.samples_per_second;
    let whole = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX).as_secs();
    if whole >= 3600 {
        format!("{}:{:02} h", whole / 3600, whole / 60 % 60)
    } else {
        format!("{}:{:02}", whole / 60, whole % 60)
    }
}
