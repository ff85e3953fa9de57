//! A run as the store holds it, and as a message shows it.

use crate::clock::timestamp;
use crate::lines::KeptLine;
use crate::store::Revision;
use crate::views::{KeptEvent, Shown};
use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
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

/// Bytes of JSON that are stored as they are. Of a gang of thousands nearly all is names and numbers in order, which deflate to a tenth: what
/// a run holds in the store stays below 64 KiB.
const PLAIN: usize = 48 << 10;

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
        let mut next = Self {
            record,
            events: self.events.clone(),
            checkpoints: self.checkpoints.clone(),
            traceparent: self.traceparent.clone(),
        };
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

    /// As a file has it.
    pub(super) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("records have string keys and no failing serializer")
    }

    /// The bytes to store.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let json = self.to_json();
        if json.len() <= PLAIN {
            return json;
        }
        let mut deflated = ZlibEncoder::new(Vec::new(), Compression::fast());
        let written = deflated.write_all(&json).and_then(|()| deflated.finish());
        written.expect("a vector takes all that is written")
    }

    /// What was stored.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(&stored_json(bytes)?)
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

/// The JSON of a stored run.
///
/// # Errors
/// It is neither JSON nor deflated.
pub fn stored_json(bytes: &[u8]) -> Result<Cow<'_, [u8]>, serde_json::Error> {
    if bytes.first() == Some(&b'{') {
        return Ok(Cow::Borrowed(bytes));
    }
    let mut json = Vec::new();
    ZlibDecoder::new(bytes).read_to_end(&mut json).map_err(serde::de::Error::custom)?;
    Ok(Cow::Owned(json))
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
        spec: Some((&*record.spec).into()),
        plan: Some((&*record.plan).into()),
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use thaw_core::run_machine::{Member, Trainer};
    use thaw_proto::ids::{Rank, Slot};
    use thaw_proto::plan::{DataSummary, Plan};
    use thaw_proto::spec::RunSpec;
    use uuid::Uuid;

    pub(in super::super) fn gang_of(count: u32) -> StoredRun {
        let raw = thaw_proto::text::parse_spec(
            "{name: a, backbone: {graph: file:///g.pt2}, data: {train: {path: file:///t.csv, format: csv, text: text, label: label}}, \
             strategy: full_fine_tuning, global_batch_size: 4096, workers: {min: 1, max: 4096}, until: {max_steps: 1}}",
        );
        let spec = RunSpec::try_from(&raw.unwrap()).unwrap();
        let plan = Plan {
            groups: Vec::new(),
            stages: Vec::new(),
            classes: Vec::new(),
            data: DataSummary::default(),
            logical_shards: 4096,
            global_batch_size: 4096,
            steps_per_epoch: 1,
            notes: Vec::new(),
            feature_size: 1,
        };
        let mut record = RunRecord::new("a-00000001".into(), spec, plan, "file:///runs/a-00000001/".to_owned(), 1);
        let drawn = Uuid::new_v4().as_u128();
        let trainer = |at: u32| Trainer {
            worker: format!("worker-{at:05}").as_str().into(),
            slot: Slot(0),
            incarnation: Uuid::from_u128(drawn ^ u128::from(at)).to_string().as_str().into(),
        };
        record.members =
            (0..count).map(|at| Member { rank: Rank(at), trainer: trainer(at) }).collect::<Vec<_>>().into();
        StoredRun::new(record, None)
    }

    #[test]
    fn the_largest_gang_is_stored_in_64_kib() {
        for (count, is_plain) in [(8, true), (4096, false)] {
            let stored = gang_of(count);
            let bytes = stored.to_bytes();
            assert!(bytes.len() <= 64 << 10, "{count} members take {} bytes", bytes.len());
            assert_eq!(bytes.starts_with(b"{"), is_plain);
            assert_eq!(StoredRun::from_bytes(&bytes).unwrap(), stored);
        }
        assert!(StoredRun::from_bytes(b"neither").is_err());
        assert!(StoredRun::from_bytes(b"").is_err());
    }
}
