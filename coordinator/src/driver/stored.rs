//! A run as the store holds it, and as a message shows it.
//!
//! A value is JSON, packed by zlib behind the byte [`PACKED`]. Values of the first version are the JSON alone, which
//! begins with a brace; they are read too, and packed with the run's next change.

use crate::clock::timestamp;
use crate::lines::KeptLine;
use crate::store::Revision;
use crate::views::{KeptEvent, Shown};
use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Read as _, Write as _};
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
/// Those of a run that has ended, where its trainers kept fewer on the disk.
const CHECKPOINTS_OF_ENDED: usize = 20;
/// First byte of a packed value.
const PACKED: u8 = 2;
/// No run is larger unpacked; a value that is not ours must not fill the memory.
const MOST_BYTES: u64 = 64 << 20;

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

/// Why a value is no run.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    #[error("format {0} is unknown here: another version wrote it")]
    Format(u8),
    #[error("it is empty")]
    Empty,
    #[error("it cannot be unpacked")]
    Packed(#[source] io::Error),
    #[error("it is no run of this version")]
    Json(#[source] serde_json::Error),
}

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
        Self::is_fresh_at(self.at_ms, now_ms)
    }

    /// Of one that came at `at_ms`.
    pub(super) fn is_fresh_at(at_ms: i64, now_ms: i64) -> bool {
        const DAY_MS: i64 = 24 * 60 * 60 * 1000;
        now_ms - at_ms < DAY_MS
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
        let (events_before, checkpoints) = (self.events.clone(), self.checkpoints.clone());
        let mut next = Self { record, events: events_before, checkpoints, traceparent: self.traceparent.clone() };
        next.push_events(now, events);
        if let Some(head) = next.record.head.as_ref().filter(|head| self.record.head.as_ref() != Some(head)) {
            next.checkpoints.push_back(head.clone());
        }
        if next.record.state.has_ended() {
            // Its spans are over.
            next.traceparent = None;
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
        let ended = self.record.state.has_ended();
        // Trainers leave one more than the spec says, and those at the ends of stages.
        let on_disk = (self.record.spec.checkpoint.save_total_limit as usize).saturating_add(1);
        let most = if ended { on_disk.clamp(CHECKPOINTS_OF_ENDED, CHECKPOINTS) } else { CHECKPOINTS };
        let surplus = self.checkpoints.len().saturating_sub(most);
        let results = self.record.stage_results.iter();
        let stage_ends: BTreeSet<u64> = results
            .scan(0, |step, result| {
                *step += u64::from(result.steps);
                Some(*step)
            })
            .collect();
        let mut place = 0..;
        self.checkpoints.retain(|checkpoint| {
            let is_new = place.next().is_some_and(|place| place >= surplus);
            is_new || (ended && stage_ends.contains(&checkpoint.position.step.0))
        });
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
        let mut packed = ZlibEncoder::new(vec![PACKED], Compression::default());
        packed.write_all(&self.to_json()).and_then(|()| packed.finish()).expect("a vector takes every byte")
    }

    /// What [`StoredRun::to_bytes`] has made, or the first version.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, Unreadable> {
        match bytes.split_first() {
            Some((&PACKED, packed)) => {
                let mut json = Vec::new();
                ZlibDecoder::new(packed).take(MOST_BYTES).read_to_end(&mut json).map_err(Unreadable::Packed)?;
                serde_json::from_slice(&json).map_err(Unreadable::Json)
            }
            Some((b'{', _)) => serde_json::from_slice(bytes).map_err(Unreadable::Json),
            Some((format, _)) => Err(Unreadable::Format(*format)),
            None => Err(Unreadable::Empty),
        }
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
    use thaw_proto::ids::{Rank, Slot, StageIndex, Step};
    use thaw_proto::plan::{DataSummary, Plan};
    use thaw_proto::run::{Evaluation, Position, StageEnd, StageResult};
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
        let stored = gang_of(4096);
        let bytes = stored.to_bytes();
        assert!(bytes.len() <= 64 << 10, "{} bytes", bytes.len());
        assert_eq!(StoredRun::from_bytes(&bytes).unwrap(), stored);
    }

    /// As the first version stored it, before anything was packed and before records had the newer fields.
    const FIRST: &str = include_str!("../../tests/fixtures/run_of_the_first_version.json");

    fn first() -> StoredRun {
        StoredRun::from_bytes(FIRST.as_bytes()).unwrap()
    }

    fn checkpoint(step: u64) -> CheckpointRef {
        CheckpointRef {
            position: Position { step: Step(step), ..Position::default() },
            generation: Generation(1),
            manifest: format!("manifests/00000001-{step:010}.json"),
            manifest_blake3: blake3::hash(&step.to_le_bytes()).to_hex().to_string(),
        }
    }

    #[test]
    fn runs_of_the_first_version_are_read_and_packed_with_their_next_change() {
        let stored = first();
        assert_eq!((stored.record.state, stored.record.position.step), (RunState::Running, Step(40)));
        assert_eq!((stored.events.len(), stored.checkpoints.len()), (3, 1));
        // What it had no field for has its default.
        assert_eq!((stored.record.queued_ms, stored.record.joining.len(), stored.record.scale), (0, 0, None));
        let bytes = stored.after(Revision(9), stored.record.clone(), &[]).to_bytes();
        assert_eq!(bytes[0], PACKED);
        assert_eq!(StoredRun::from_bytes(&bytes).unwrap(), stored);
        assert!(bytes.len() * 2 < stored.to_json().len(), "{} of {} B", bytes.len(), stored.to_json().len());
        // Equal runs are equal bytes, which is how a leader finds its own write again.
        assert_eq!(bytes, stored.to_bytes());
        assert_eq!(StoredRun::from_bytes(&stored.to_json()).unwrap(), stored);
    }

    #[test]
    fn what_is_no_run_says_why() {
        let whole = first().to_bytes();
        let mut turned = whole.clone();
        *turned.last_mut().unwrap() ^= 1;
        assert!(matches!(StoredRun::from_bytes(&[]), Err(Unreadable::Empty)));
        assert!(matches!(StoredRun::from_bytes(&[7, 1, 2]), Err(Unreadable::Format(7))));
        assert!(matches!(StoredRun::from_bytes(&whole[..whole.len() / 2]), Err(Unreadable::Packed(_))));
        assert!(matches!(StoredRun::from_bytes(&turned), Err(Unreadable::Packed(_))), "its checksum is compared");
        assert!(matches!(StoredRun::from_bytes(b"{}"), Err(Unreadable::Json(_))));
    }

    #[test]
    fn an_ended_run_keeps_the_checkpoints_that_its_trainers_left_and_every_event() {
        let mut stored = StoredRun { traceparent: Some("00-aa-bb-01".to_owned()), ..first() };
        let said: Vec<Event> = (0..150).map(|index| event(index, RunState::Running)).collect();
        stored.push_events(Revision(9), &said);
        stored.checkpoints = (0..100).map(checkpoint).collect();
        let events = stored.events.len();
        let next = stored.after(Revision(9), stored.record.clone(), &[]);
        assert_eq!((next.checkpoints.len(), next.events.len()), (100, events));
        assert!(next.traceparent.is_some());
        let ended = RunRecord { state: RunState::Succeeded, stage_results: Vec::new(), ..stored.record.clone() };
        let limited = |limit: u32| {
            let mut record = ended.clone();
            record.spec.checkpoint.save_total_limit = limit;
            stored.after(Revision(9), record, &[event(150, RunState::Succeeded)])
        };
        assert_eq!(limited(3).checkpoints.len(), CHECKPOINTS_OF_ENDED);
        assert_eq!(limited(40).checkpoints.len(), 41);
        assert_eq!(limited(1000).checkpoints.len(), 100);
        let last = limited(3);
        assert_eq!((last.events.len(), &last.traceparent), (events + 1, &None));
        assert_eq!(last.checkpoints.back(), stored.checkpoints.back(), "the newest stay");
        // Those at the ends of stages stay on the disk, however many follow.
        let mut staged = ended.clone();
        staged.stage_results = [40, 30].map(stage_result).to_vec();
        let steps = |run: StoredRun| run.checkpoints.iter().map(|one| one.position.step.0).collect::<Vec<_>>();
        let left = steps(stored.after(Revision(9), staged, &[]));
        assert_eq!((&left[..3], left.len()), (&[40, 70, 80][..], CHECKPOINTS_OF_ENDED + 2));
    }

    fn stage_result(steps: u32) -> StageResult {
        let eval = Evaluation {
            position: Position::default(),
            loss: 0.5,
            accuracy: 0.5,
            macro_f1: 0.5,
            samples: 4,
            confusion: vec![1; 4],
        };
        StageResult {
            stage: StageIndex(0),
            steps,
            epochs: 1.0,
            seconds: 1.0,
            end: StageEnd::MaxSteps,
            eval: eval.clone(),
            deciding_eval: eval,
            replica_digest: String::new(),
            peak_memory_bytes: 0,
            saves: 0,
            test: None,
        }
    }

    fn event(index: u64, state: RunState) -> Event {
        let message = format!("rank {index} ended: signal 9");
        Event {
            at_ms: 1_700_000_000_000 + 731 * index,
            generation: Generation(1),
            state,
            reason: RunReason::Training,
            message,
        }
    }
}
