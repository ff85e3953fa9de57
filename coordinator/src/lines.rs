//! The lines of a run's `events.jsonl`, `metrics.jsonl` and `logs.jsonl`: one flat JSON object each, times in
//! milliseconds since the epoch.

use crate::clock;
use serde::{Deserialize, Serialize};
use thaw_proto::convert::WireEnum;
use thaw_proto::ids::Generation;
use thaw_proto::pb;
use thaw_proto::run::{RunReason, RunState};

/// One log line as the file holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogEntry {
    pub(crate) time_ms: i64,
    /// `coordinator`, or `rank 0`.
    pub(crate) source: String,
    pub(crate) text: String,
}

impl LogEntry {
    pub(crate) fn message(self) -> pb::LogLine {
        pb::LogLine { time: Some(clock::timestamp(self.time_ms)), source: self.source, text: self.text }
    }
}

#[derive(Serialize)]
struct EventLine<'a> {
    time_ms: i64,
    generation: u64,
    state: Option<RunState>,
    reason: Option<RunReason>,
    message: &'a str,
}

/// An event as `events.jsonl` holds it, read again.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct KeptLine {
    pub(crate) time_ms: i64,
    pub(crate) generation: u64,
    pub(crate) state: RunState,
    pub(crate) reason: RunReason,
    pub(crate) message: String,
}

/// `None` for a line that is cut or of another version.
pub(crate) fn read_event(line: &str) -> Option<KeptLine> {
    serde_json::from_str(line).ok()
}

#[derive(Serialize)]
struct ProgressLine<'a> {
    time_ms: i64,
    kind: &'static str,
    generation: u64,
    stage: u32,
    stage_step: u32,
    step: u64,
    epoch: f64,
    loss: f64,
    learning_rates: &'a [f64],
    grad_norm: Option<f64>,
    samples_per_second: f64,
    /// In seconds per step.
    step_time: StepTimeLine,
    prefix_computed: u64,
    prefix_cached: u64,
    all_reduced_bytes: u64,
}

#[derive(Serialize)]
struct StepTimeLine {
    data_wait: f64,
    forward: f64,
    backward: f64,
    straggler_wait: f64,
    exposed_all_reduce: f64,
    clipping: f64,
    optimizer: f64,
    prefix: f64,
    whole: f64,
    checkpoint: f64,
}

#[derive(Serialize)]
struct EvaluationLine {
    time_ms: i64,
    kind: &'static str,
    generation: u64,
    stage: u32,
    stage_step: u32,
    step: u64,
    loss: f64,
    accuracy: f64,
    macro_f1: f64,
    samples: u64,
}

/// A line of `events.jsonl`.
pub(crate) fn event(event: &pb::Event) -> String {
    json(&EventLine {
        time_ms: event.time.as_ref().map_or(0, millis),
        generation: event.generation,
        state: RunState::from_number(event.state).flatten(),
        reason: RunReason::from_number(event.reason).flatten(),
        message: &event.message,
    })
}

/// A line of `logs.jsonl`, for an event of the run.
pub(crate) fn log_of_event(event: &pb::Event) -> String {
    let state =
        RunState::from_number(event.state).flatten().map_or_else(String::new, |state| state.name().to_uppercase());
    let text = if event.message.is_empty() { state } else { format!("{state}: {}", event.message) };
    json(&LogEntry { time_ms: event.time.as_ref().map_or(0, millis), source: "coordinator".to_owned(), text })
}

/// A line of `logs.jsonl`, for a trainer's line.
pub(crate) fn log(line: pb::LogLine) -> String {
    json(&LogEntry {
        time_ms: line.time.as_ref().map_or_else(clock::now_ms, millis),
        source: line.source,
        text: line.text,
    })
}

/// A line of `metrics.jsonl`.
pub(crate) fn progress(progress: &pb::Progress) -> String {
    let position = progress.position.unwrap_or_default();
    let time = progress.step_time.unwrap_or_default();
    json(&ProgressLine {
        time_ms: clock::now_ms(),
        kind: "progress",
        generation: progress.generation,
        stage: position.stage,
        stage_step: position.stage_step,
        step: position.step,
        epoch: progress.epoch,
        loss: progress.loss,
        learning_rates: &progress.learning_rates,
        grad_norm: progress.grad_norm,
        samples_per_second: progress.samples_per_second,
        step_time: StepTimeLine {
            data_wait: time.data_wait,
            forward: time.forward,
            backward: time.backward,
            straggler_wait: time.straggler_wait,
            exposed_all_reduce: time.exposed_all_reduce,
            clipping: time.clipping,
            optimizer: time.optimizer,
            prefix: time.prefix,
            whole: time.whole,
            checkpoint: time.checkpoint,
        },
        prefix_computed: progress.prefix_computed,
        prefix_cached: progress.prefix_cached,
        all_reduced_bytes: progress.all_reduced_bytes,
    })
}

/// A line of `metrics.jsonl`.
pub(crate) fn evaluation(evaluation: &pb::Evaluation, generation: Generation) -> String {
    let position = evaluation.position.unwrap_or_default();
    json(&EvaluationLine {
        time_ms: clock::now_ms(),
        kind: "evaluation",
        generation: generation.0,
        stage: position.stage,
        stage_step: position.stage_step,
        step: position.step,
        loss: evaluation.loss,
        accuracy: evaluation.accuracy,
        macro_f1: evaluation.macro_f1,
        samples: evaluation.samples,
    })
}

fn millis(time: &prost_types::Timestamp) -> i64 {
    time.seconds * 1000 + i64::from(time.nanos) / 1_000_000
}

fn json(line: &impl Serialize) -> String {
    serde_json::to_string(line).expect("lines have string keys and no failing serializer")
}
