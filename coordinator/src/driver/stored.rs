//! A run as the store holds it, and as a message shows it.

use crate::clock::timestamp;
use crate::lines::KeptLine;
use crate::store::Revision;
use crate::views::{KeptEvent, Shown};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use thaw_core::run_machine::{Event, RunRecord};
use thaw_proto::convert::WireEnum;
use thaw_proto::ids::{Generation, RunId};
use thaw_proto::pb;
use thaw_proto::run::{CheckpointRef, RunReason, RunState};
use url::Url;

/// Events kept in the store; all are in the run's folder.
const EVENTS: usize = 200;
/// Committed checkpoints remembered.
const CHECKPOINTS: usize = 100;

/// The key of a run.
pub(super) fn run_key(run: &RunId) -> String {
    format!("runs/{run}")
}

/// Below it are all runs.
pub(super) const RUNS: &str = "runs/";

/// The key of a submission's id.
pub(super) fn request_key(request_id: &str) -> String {
    format!("requests/{request_id}")
}

/// Below it are all submissions' ids.
pub(super) const REQUESTS: &str = "requests/";

/// The value under a run's key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct StoredRun {
    pub(super) record: RunRecord,
    /// The newest [`EVENTS`].
    pub(super) events: VecDeque<StoredEvent>,
    /// Those that became the head, oldest first; the newest [`CHECKPOINTS`].
    pub(super) checkpoints: VecDeque<CheckpointRef>,
    /// The trace the run belongs to. `None`: not traced.
    pub(super) traceparent: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredEvent {
    /// The run's revision before the event; 0 at the run's beginning.
    after: u64,
    at_ms: u64,
    generation: Generation,
    state: RunState,
    reason: RunReason,
    message: String,
}

/// The value under a submission's key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredRequest {
    pub(super) run: RunId,
    pub(super) at_ms: i64,
}

impl StoredRequest {
    /// Whether it still answers for the same submission.
    pub(super) fn is_fresh(&self, now_ms: i64) -> bool {
        const DAY_MS: i64 = 24 * 60 * 60 * 1000;
        now_ms - self.at_ms < DAY_MS
    }
}

impl StoredRun {
    pub(super) fn new(record: RunRecord, traceparent: Option<String>) -> Self {
        let event = Event {
            at_ms: record.create_ms,
            generation: record.generation,
            state: record.state,
            reason: record.reason,
            message: "submitted".to_owned(),
        };
        let mut stored = Self { record, events: VecDeque::new(), checkpoints: VecDeque::new(), traceparent };
        stored.push_events(Revision(0), &[event]);
        stored
    }

    /// As it will be after a step of the machine, from the revision it has now.
    pub(super) fn after(&self, now: Revision, record: RunRecord, events: &[Event]) -> Self {
        let mut next = Self { record, ..self.clone() };
        next.push_events(now, events);
        if let Some(head) = next.record.head.as_ref().filter(|head| self.record.head.as_ref() != Some(head)) {
            next.checkpoints.push_back(head.clone());
        }
        next.trim();
        next
    }

    /// From a run's folder.
    pub(super) fn rebuilt(
        record: RunRecord,
        events: VecDeque<StoredEvent>,
        checkpoints: VecDeque<CheckpointRef>,
    ) -> Self {
        let mut stored = Self { record, events, checkpoints, traceparent: None };
        stored.trim();
        stored
    }

    /// For another store, whose revisions begin above `base`.
    pub(super) fn rebased(mut self, base: u64) -> Self {
        for event in &mut self.events {
            event.after = base;
        }
        self
    }

    fn trim(&mut self) {
        while self.events.len() > EVENTS {
            self.events.pop_front();
        }
        while self.checkpoints.len() > CHECKPOINTS {
            self.checkpoints.pop_front();
        }
    }

    fn push_events(&mut self, now: Revision, events: &[Event]) {
        self.events.extend(events.iter().map(|event| StoredEvent {
            after: now.0,
            at_ms: event.at_ms,
            generation: event.generation,
            state: event.state,
            reason: event.reason,
            message: event.message.clone(),
        }));
    }

    /// The bytes to store.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("records have string keys and no failing serializer")
    }

    /// As readers see it, stored at a revision.
    pub(super) fn shown(&self, revision: Revision) -> Shown {
        Shown {
            run: message(&self.record, revision.0),
            events: self.kept_events(),
            checkpoints: self.checkpoints.iter().map(Into::into).collect(),
            // Run URLs are made from local paths.
            folder: Url::parse(&self.record.run_url).ok().and_then(|url| url.to_file_path().ok()).unwrap_or_default(),
        }
    }

    /// The kept events, as messages.
    pub(super) fn kept_events(&self) -> Vec<KeptEvent> {
        self.events.iter().map(|event| KeptEvent { after: event.after, event: event.message() }).collect()
    }
}

impl StoredEvent {
    /// From a run's folder. The revisions it was seen at are gone with the store, so no reader can go on from them.
    pub(super) fn rebuilt(line: KeptLine, base: u64) -> Self {
        Self {
            after: base,
            at_ms: line.time_ms.unsigned_abs(),
            generation: Generation(line.generation),
            state: line.state,
            reason: line.reason,
            message: line.message,
        }
    }

    fn message(&self) -> pb::Event {
        pb::Event {
            time: Some(timestamp_of(self.at_ms)),
            generation: self.generation.0,
            state: self.state.number(),
            reason: self.reason.number(),
            message: self.message.clone(),
        }
    }
}

/// An event of the machine as a message.
pub(super) fn event_message(event: &Event) -> pb::Event {
    pb::Event {
        time: Some(timestamp_of(event.at_ms)),
        generation: event.generation.0,
        state: event.state.number(),
        reason: event.reason.number(),
        message: event.message.clone(),
    }
}

/// A run as a message, at a revision of the store.
pub(super) fn message(record: &RunRecord, revision: u64) -> pb::Run {
    pb::Run {
        name: format!("runs/{}", record.id),
        spec: Some((&record.spec).into()),
        plan: Some((&record.plan).into()),
        state: record.state.number(),
        reason: record.reason.number(),
        message: record.message.clone(),
        attempt: record.attempt.0,
        generation: record.generation.0,
        create_time: Some(timestamp_of(record.create_ms)),
        start_time: record.start_ms.map(timestamp_of),
        end_time: record.end_ms.map(timestamp_of),
        revision,
        head: record.head.as_ref().map(Into::into),
        position: Some((&record.position).into()),
        world_size: record.world_size(),
        stage_results: record.stage_results.iter().map(Into::into).collect(),
        result: record.result.as_ref().map(Into::into),
        world_sizes: record.world_sizes.clone(),
        wanted_world_size: record.wanted_size(),
    }
}

fn timestamp_of(ms: u64) -> prost_types::Timestamp {
    timestamp(i64::try_from(ms).unwrap_or(i64::MAX))
}
