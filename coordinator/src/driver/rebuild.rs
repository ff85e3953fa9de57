//! A run as its folder tells it, for a store that has lost it.
//!
//! What a folder has: the spec, the plan, manifests with their stage results, events. What it has not: request ids, world
//! sizes and what the run was scaled to, what a gang did after its last checkpoint.

use super::stored::{StoredEvent, StoredRun, run_key};
use crate::folder::{Lines, RunFolder};
use crate::lines::{self, KeptLine};
use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use thaw_core::manifest::{BlobRef, Manifest, blob_name};
use thaw_core::run_machine::RunRecord;
use thaw_proto::ids::{Attempt, Generation, RunId};
use thaw_proto::plan::Plan;
use thaw_proto::run::{CheckpointRef, RunReason, RunState};
use thaw_proto::{convert, pb, text};

/// Path below the folder of a run that has ended: the run as the store had it.
pub(super) const RECORD: &str = "report/record.json";

/// Added to the highest generation that a folder knows of: one may have been started that left no trace there.
const GENERATION_GAP: u64 = 16;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}: {what}", path.display())]
    Invalid { path: PathBuf, what: String },
    #[error("{} has no events: the run was never accepted", folder.display())]
    NeverAccepted { folder: PathBuf },
}

/// A run to be put into a store.
#[derive(Debug)]
pub struct Rebuilt {
    pub id: RunId,
    pub state: RunState,
    /// Committed updates it goes on from.
    pub step: u64,
    /// What is not as it was, in words.
    pub lost: Vec<String>,
    stored: StoredRun,
}

impl Rebuilt {
    /// What to store, and under which key.
    pub(crate) fn entry(&self) -> (String, Vec<u8>) {
        (run_key(&self.id), self.stored.to_bytes())
    }
}

/// Reads a run's folder and checks the checkpoint it will go on from, every byte. Blocking.
pub(crate) fn rebuild(path: &Path, base: u64) -> Result<Rebuilt, Error> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let id = RunId(name.to_owned());
    let record = path.join(RECORD);
    if let Ok(bytes) = fs::read(&record) {
        let stored = StoredRun::from_bytes(&bytes)
            .map_err(|error| Error::Invalid { path: record, what: thaw_runtime::chain(&error) })?;
        let (state, step) = (stored.record.state, stored.record.position.step.0);
        return Ok(Rebuilt { id, state, step, lost: Vec::new(), stored: stored.rebased(base) });
    }
    let lines = events(path)?;
    let (Some(first), Some(last)) = (lines.first(), lines.last()) else {
        return Err(Error::NeverAccepted { folder: path.to_owned() });
    };
    let mut lost = Vec::new();
    let (spec, plan) = spec_and_plan(path)?;
    let folder = RunFolder::at(path);
    let mut record = RunRecord::new(id.clone(), spec, plan, folder.url().to_string(), first.time_ms.unsigned_abs());
    let manifests = manifests(path, &id, &mut lost)?;
    if let Some((manifest, head)) = newest_whole(path, &manifests, &mut lost) {
        record.position = head.position;
        record.stage_results.clone_from(&manifest.stage_results);
        record.head = Some(head.clone());
    }
    let seen =
        lines.iter().map(|line| line.generation).chain(manifests.iter().map(|(manifest, _)| manifest.generation.0));
    let highest = seen.max().unwrap_or(0);
    if highest > 0 {
        record.generation = Generation(highest + GENERATION_GAP);
        let resumed = lines
            .windows(2)
            .filter(|pair| pair[0].state == RunState::Suspended && pair[1].state == RunState::Pending)
            .count();
        record.attempt = Attempt(1 + u32::try_from(resumed).unwrap_or(u32::MAX - 1));
    }
    let started = lines.iter().find(|line| line.state == RunState::Running);
    record.start_ms = started.map(|line| line.time_ms.unsigned_abs());
    set_state(&mut record, last, &mut lost);
    let checkpoints: VecDeque<CheckpointRef> = manifests
        .into_iter()
        .map(|(_, checkpoint)| checkpoint)
        .filter(|checkpoint| record.head.as_ref().is_some_and(|head| checkpoint.position <= head.position))
        .collect();
    let events = lines.into_iter().map(|line| StoredEvent::rebuilt(line, base)).collect();
    let (state, step) = (record.state, record.position.step.0);
    Ok(Rebuilt { id, state, step, lost, stored: StoredRun::rebuilt(record, events, checkpoints) })
}

fn set_state(record: &mut RunRecord, last: &KeptLine, lost: &mut Vec<String>) {
    match last.state {
        RunState::Succeeded | RunState::Failed | RunState::Cancelled => {
            (record.state, record.reason) = (last.state, last.reason);
            record.message.clone_from(&last.message);
            record.end_ms = Some(last.time_ms.unsigned_abs());
            if last.state == RunState::Succeeded {
                lost.push("its result is in report/summary.json alone".to_owned());
            }
        }
        RunState::Suspended | RunState::Suspending => {
            record.state = RunState::Suspended;
            record.reason = RunReason::UserRequest;
            record.message = format!("suspended at step {}; recovered from its folder", record.position.step);
        }
        RunState::Pending
        | RunState::Admitted
        | RunState::Forming
        | RunState::Running
        | RunState::Resizing
        | RunState::Preempting => {
            record.reason = RunReason::CoordinatorRestarted;
            record.message = format!("recovered from its folder at step {}", record.position.step);
            lost.push("updates after its last checkpoint, and the sizes of earlier gangs".to_owned());
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

fn events(path: &Path) -> Result<Vec<KeptLine>, Error> {
    let path = RunFolder::at(path).lines_path(Lines::Events);
    match fs::read_to_string(&path) {
        // A line may be cut where the disk was full or the machine died.
        Ok(text) => Ok(text.lines().filter_map(lines::read_event).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(Error::Read { path, source }),
    }
}

fn spec_and_plan(folder: &Path) -> Result<(thaw_proto::spec::RunSpec, Plan), Error> {
    let path = folder.join("spec.yaml");
    let text_of = |path: &Path| read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let invalid = |path: &Path, what: String| Error::Invalid { path: path.to_owned(), what };
    let raw = text::parse_spec(&text_of(&path)?).map_err(|error| invalid(&path, error.to_string()))?;
    let spec = convert::spec::check(&raw).map_err(|error| invalid(&path, error.to_string()))?;
    let path = folder.join("plan.json");
    let raw: pb::Plan = text::parse(&text_of(&path)?).map_err(|error| invalid(&path, error.to_string()))?;
    let plan = Plan::try_from(&raw).map_err(|error| invalid(&path, error.to_string()))?;
    Ok((spec, plan))
}

/// Every manifest that can be read, oldest first: generations and steps are in their names, with leading zeros.
fn manifests(folder: &Path, run: &RunId, lost: &mut Vec<String>) -> Result<Vec<(Manifest, CheckpointRef)>, Error> {
    let path = folder.join("manifests");
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::Read { path, source }),
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        let bytes = read(&path)?;
        match Manifest::from_json(&bytes) {
            Ok(manifest) if manifest.run == *run && path.ends_with(manifest.file_name()) => {
                let checkpoint = CheckpointRef {
                    position: manifest.position,
                    generation: manifest.generation,
                    manifest: manifest.file_name(),
                    manifest_blake3: blake3::hash(&bytes).to_hex().to_string(),
                };
                found.push((manifest, checkpoint));
            }
            Ok(_) => lost.push(format!("{} is another run's, or has another's name", path.display())),
            Err(error) => lost.push(format!("{}: {error}", path.display())),
        }
    }
    Ok(found)
}

/// The newest of the newest generation whose blobs are all there.
fn newest_whole<'a>(
    folder: &Path,
    manifests: &'a [(Manifest, CheckpointRef)],
    lost: &mut Vec<String>,
) -> Option<&'a (Manifest, CheckpointRef)> {
    manifests.iter().rev().find(|(manifest, checkpoint)| {
        match manifest.blobs().into_iter().find_map(|blob| damage(folder, blob)) {
            None => true,
            Some(what) => {
                lost.push(format!("checkpoint {}: {what}", checkpoint.manifest));
                false
            }
        }
    })
}

fn damage(folder: &Path, blob: &BlobRef) -> Option<String> {
    let path = folder.join(blob_name(&blob.blake3));
    let hash = || -> io::Result<String> {
        let mut file = fs::File::open(&path)?;
        let mut hasher = blake3::Hasher::new();
        let mut chunk = vec![0; 1 << 20];
        loop {
            match file.read(&mut chunk)? {
                0 => return Ok(hasher.finalize().to_hex().to_string()),
                read => hasher.update(&chunk[..read]),
            };
        }
    };
    match hash() {
        Ok(found) if found == blob.blake3 => None,
        Ok(_) => Some(format!("{} is damaged", path.display())),
        Err(error) => Some(format!("{} cannot be read: {error}", path.display())),
    }
}
