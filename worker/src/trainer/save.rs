//! From a replica to bytes and back: checkpoints, and the trained model.
//!
//! SAVE-1: a group that has never trained is not written: its weights are those of the backbone, which the fingerprints name.
//! SAVE-2: the best weights are written once per best, and referenced by every later manifest.

use super::hold::{Hold, HoldPoint};
use super::job::Job;
use super::outbox::{Event, Outbox};
use super::replica::{self, GroupSnapshot, Replica};
use super::session::{Best, State};
use crate::checkpoint::{self, CheckpointStore, Submitted, TensorBytes, Writer, decode, encode};
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use thaw_core::manifest::{self, BlobRef, GroupState, Manifest};
use thaw_graph::ir::DType;
use thaw_proto::ids::{Generation, Step};
use thaw_proto::run::{CheckpointRef, Position};
use thaw_torch::executor::kind_of;
use thaw_torch::model::{self, StateTensor};
use thaw_torch::tch::Tensor;

/// Element types of saved weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoredAs {
    /// As in the archive the run began with.
    Original,
    /// As they are trained.
    Trained,
}

/// How long the last checkpoint may wait for the coordinator to make it the head.
const COMMIT_DEADLINE: Duration = Duration::from_secs(600);
/// Files younger than this may belong to a save in progress.
const SWEEP_GRACE: Duration = Duration::from_secs(600);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error("cannot read the checkpoint {manifest}")]
    Manifest { manifest: String, source: manifest::Error },
    #[error("the checkpoint {manifest} does not fit the model: {problem}")]
    Unfit { manifest: String, problem: String },
    #[error("cannot read or write the model's tensors")]
    Model(#[from] model::Error),
    #[error("cannot make optimizer state")]
    Optimizer(#[from] thaw_torch::optim::Error),
    #[error("the last checkpoint was not committed within {} s; is the coordinator alive?", COMMIT_DEADLINE.as_secs())]
    NotCommitted,
    #[error("cannot write the trained model")]
    Archive(#[from] thaw_graph::writer::Error),
    #[error("cannot read the backbone's weights")]
    Weights(#[from] thaw_graph::archive::Error),
    #[error("cannot write {path}")]
    File { path: PathBuf, source: io::Error },
}

/// The encoded state of one group: weights and buffers, then optimizer state with its update count.
struct Encoded {
    name: String,
    weights: Option<Vec<u8>>,
    optimizer: Option<(Vec<u8>, u64)>,
}

/// Where the best state of the next manifest comes from.
enum BestSource {
    Absent,
    /// As in the last manifest.
    Unchanged,
    New(Vec<Encoded>),
}

/// Saves on a thread of its own and reports each checkpoint once it is durable.
pub(crate) struct Saver {
    writer: Writer<()>,
    outbox: Arc<Outbox>,
    hold: Option<Hold>,
    last: Option<Step>,
    /// The best evaluation's position in the last save that was taken.
    best_at: Option<Position>,
    best_groups: Arc<Mutex<Option<Vec<GroupState>>>>,
    /// Manifests not to be deleted: stage ends for good, others while they are recent.
    kept: Arc<Mutex<Kept>>,
}

#[derive(Default)]
struct Kept {
    stage_ends: Vec<String>,
    recent: Vec<String>,
}

impl Saver {
    /// `resumed` is the manifest this generation began with.
    pub(crate) fn start(
        job: &Job,
        outbox: Arc<Outbox>,
        hold: Option<Hold>,
        resumed: Option<&CheckpointRef>,
    ) -> Result<Self, Error> {
        let store = CheckpointStore::open(&job.run_url)?;
        let kept = Kept { stage_ends: Vec::new(), recent: resumed.iter().map(|head| head.manifest.clone()).collect() };
        Ok(Self {
            writer: Writer::start(Arc::new(store))?,
            outbox,
            hold,
            last: None,
            best_at: None,
            best_groups: Arc::default(),
            kept: Arc::new(Mutex::new(kept)),
        })
    }

    /// Offers the present state to the writer; with `must`, waits for it to take it. `then` is reported after the checkpoint.
    pub(crate) fn save(
        &mut self,
        job: &Job,
        generation: Generation,
        replica: &Replica,
        state: &State,
        must: bool,
        then: Vec<Event>,
    ) -> Result<(), Error> {
        while self.writer.poll()?.is_some() {}
        let step = state.position.step;
        if self.last == Some(step) || (!must && self.writer.in_flight() > 0) {
            return Ok(());
        }
        let ever = job.ever_trained(last_stage(job, state));
        let groups = encode_groups(job, replica, &replica.snapshot(&ever))?;
        let best_at = state.tracker.best.as_ref().map(|best| best.position);
        let best = match &state.best {
            None => BestSource::Absent,
            Some(_) if self.best_at == best_at => BestSource::Unchanged,
            Some(Best { groups }) => BestSource::New(encode_groups(job, replica, groups)?),
        };
        let draft = draft(job, generation, replica, state);
        let work = Work {
            outbox: Arc::clone(&self.outbox),
            hold: self.hold.clone(),
            best_groups: Arc::clone(&self.best_groups),
            kept: Arc::clone(&self.kept),
            keep_last: job.spec.checkpoint.save_total_limit as usize,
            draft,
            groups,
            best,
            then,
        };
        let taken = self.writer.submit(must, move |store| work.run(store))?;
        if taken == Submitted::Accepted {
            self.last = Some(step);
            self.best_at = best_at;
        }
        Ok(())
    }

    /// Waits until the last save is durable and the head pointer names it.
    pub(crate) fn wait_for_commit(&mut self, outbox: &Outbox) -> Result<(), Error> {
        while self.writer.wait()?.is_some() {}
        match self.last {
            Some(step) if !outbox.wait_for_commit(step, COMMIT_DEADLINE) => Err(Error::NotCommitted),
            Some(_) | None => Ok(()),
        }
    }
}

/// The stage whose groups the replica may have changed.
fn last_stage(job: &Job, state: &State) -> thaw_proto::ids::StageIndex {
    let last = u32::try_from(job.plan.stages.len().saturating_sub(1)).expect("a plan has few stages");
    thaw_proto::ids::StageIndex(state.position.stage.0.min(last))
}

/// The manifest without its groups.
fn draft(job: &Job, generation: Generation, replica: &Replica, state: &State) -> Manifest {
    Manifest {
        format_version: manifest::FORMAT_VERSION,
        run: job.run.clone(),
        generation,
        leader_epoch: None,
        position: state.position,
        ended_stage_steps: state.ended.clone(),
        stage_first_epoch: state.first_epoch,
        tracker: state.tracker.clone(),
        stage_results: state.results.clone(),
        seconds: state.seconds,
        stage_seconds: state.stage_seconds,
        world_size: replica.world_size(),
        fingerprints: job.fingerprints.clone(),
        groups: Vec::new(),
        best_groups: None,
    }
}

/// One save, on the writer's thread.
struct Work {
    outbox: Arc<Outbox>,
    hold: Option<Hold>,
    best_groups: Arc<Mutex<Option<Vec<GroupState>>>>,
    kept: Arc<Mutex<Kept>>,
    keep_last: usize,
    draft: Manifest,
    groups: Vec<Encoded>,
    best: BestSource,
    then: Vec<Event>,
}

impl Work {
    fn run(self, store: &CheckpointStore) -> Result<(), checkpoint::Error> {
        let span =
            tracing::info_span!("checkpoint", step = self.draft.position.step.0, generation = self.draft.generation.0);
        let _entered = span.entered();
        let mut manifest = self.draft;
        manifest.groups = put_groups(store, self.groups)?;
        let mut last_best = self.best_groups.lock().unwrap_or_else(PoisonError::into_inner);
        manifest.best_groups = match self.best {
            BestSource::Absent => None,
            BestSource::Unchanged => last_best.clone(),
            BestSource::New(groups) => Some(put_groups(store, groups)?),
        };
        last_best.clone_from(&manifest.best_groups);
        drop(last_best);
        Hold::at(self.hold.as_ref(), HoldPoint::CheckpointWrite, manifest.position.step.0);
        let written = store.put_manifest(manifest.generation, manifest.position.step, manifest.to_json())?;
        self.outbox.send(Outbox::checkpoint(&CheckpointRef {
            position: manifest.position,
            generation: manifest.generation,
            manifest: written.path.clone(),
            manifest_blake3: written.blake3,
        }));
        for event in self.then {
            self.outbox.send(event);
        }
        let keep = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if manifest.position.stage_step == 0 {
                kept.stage_ends.push(written.path.clone());
            }
            kept.recent.push(written.path);
            // One more than asked for: the newest may not be the head yet.
            let surplus = kept.recent.len().saturating_sub(self.keep_last + 1);
            kept.recent.drain(..surplus);
            kept.stage_ends.iter().chain(&kept.recent).cloned().collect::<BTreeSet<_>>()
        };
        store.retain(manifest.generation, &keep.into_iter().collect::<Vec<_>>(), SWEEP_GRACE)?;
        Ok(())
    }
}

fn put_groups(store: &CheckpointStore, groups: Vec<Encoded>) -> Result<Vec<GroupState>, checkpoint::Error> {
    let put = |group: Encoded| {
        let weights = group.weights.map(|bytes| store.put_blob(bytes)).transpose()?;
        let (optimizer, optimizer_steps) = match group.optimizer {
            Some((bytes, steps)) => (Some(store.put_blob(bytes)?), steps),
            None => (None, 0),
        };
        Ok(GroupState { name: group.name, weights, optimizer, optimizer_steps })
    };
    groups.into_iter().map(put).collect()
}

/// Every group of the model, those in `snapshots` with their state.
fn encode_groups(
    job: &Job,
    replica: &Replica,
    snapshots: &BTreeMap<usize, GroupSnapshot>,
) -> Result<Vec<Encoded>, Error> {
    let encode_group = |(index, group): (usize, &thaw_proto::plan::LayerGroup)| {
        let name = group.name.clone();
        let Some(snapshot) = snapshots.get(&index) else { return Ok(Encoded { name, weights: None, optimizer: None }) };
        // Row-major whatever the memory format, so that what is saved does not depend on it.
        let parameters = &replica.model().groups()[index];
        let mut tensors = vec![tensor_bytes("weights", &parameters.to_row_major(&snapshot.flat)?)?];
        for ((buffer, _), value) in parameters.buffers.iter().zip(&snapshot.buffers) {
            tensors.push(tensor_bytes(&format!("buffer.{buffer}"), value)?);
        }
        let optimizer = match &snapshot.optimizer {
            Some(state) => {
                let tensors = state
                    .tensors()
                    .into_iter()
                    .map(|(name, tensor)| tensor_bytes(name, &parameters.to_row_major(tensor)?));
                Some((encode(&tensors.collect::<Result<Vec<_>, _>>()?)?, state.steps()))
            }
            None => None,
        };
        Ok(Encoded { name, weights: Some(encode(&tensors)?), optimizer })
    };
    job.plan.groups.iter().enumerate().map(encode_group).collect()
}

/// Reads the state that a checkpoint names.
pub(crate) fn load(job: &Job, checkpoint: &CheckpointRef, replica: &mut Replica) -> Result<State, Error> {
    let name = || checkpoint.manifest.clone();
    let bytes = job.store.get_manifest(checkpoint)?;
    let manifest = Manifest::from_json(&bytes).map_err(|source| Error::Manifest { manifest: name(), source })?;
    manifest
        .check_belongs(&job.run, &job.plan, &job.fingerprints)
        .map_err(|source| Error::Manifest { manifest: name(), source })?;
    let current = get_groups(job, &manifest.groups, replica, &name())?;
    let best = manifest.best_groups.as_ref().map(|groups| get_groups(job, groups, replica, &name())).transpose()?;
    replica.restore(&current).map_err(|error| unfit(&name(), &error))?;
    Ok(State {
        position: manifest.position,
        ended: manifest.ended_stage_steps,
        first_epoch: manifest.stage_first_epoch,
        tracker: manifest.tracker,
        best: best.map(|groups| Best { groups }),
        results: manifest.stage_results,
        deciding: None,
        seconds: manifest.seconds,
        stage_seconds: manifest.stage_seconds,
    })
}

fn unfit(manifest: &str, error: &replica::Error) -> Error {
    Error::Unfit { manifest: manifest.to_owned(), problem: error.to_string() }
}

fn get_groups(
    job: &Job,
    groups: &[GroupState],
    replica: &Replica,
    manifest: &str,
) -> Result<BTreeMap<usize, GroupSnapshot>, Error> {
    let mut snapshots = BTreeMap::new();
    for (index, group) in groups.iter().enumerate() {
        let Some(weights) = &group.weights else { continue };
        let missing = |what: &str| Error::Unfit {
            manifest: manifest.to_owned(),
            problem: format!("group {} has no {what}", group.name),
        };
        let mut tensors = read(job, weights)?;
        let flat = tensors.remove("weights").ok_or_else(|| missing("weights"))?;
        let parameters = &replica.model().groups()[index];
        let flat = parameters.from_row_major(&flat)?;
        let buffers = parameters
            .buffers
            .iter()
            .map(|(name, _)| tensors.remove(&format!("buffer.{name}")).ok_or_else(|| missing(name)));
        let buffers = buffers.collect::<Result<Vec<_>, _>>()?;
        let optimizer = match &group.optimizer {
            Some(blob) => {
                let tensors = read(job, blob)?.into_iter();
                let mut tensors = tensors
                    .map(|(name, tensor)| Ok((name, parameters.from_row_major(&tensor)?)))
                    .collect::<Result<BTreeMap<_, _>, Error>>()?;
                let state =
                    replica.optimizer().restore(parameters, |name| tensors.remove(name), group.optimizer_steps)?;
                Some(state.ok_or_else(|| missing("optimizer state that fits"))?)
            }
            None => None,
        };
        snapshots.insert(index, GroupSnapshot { flat, buffers, optimizer });
    }
    Ok(snapshots)
}

fn read(job: &Job, blob: &BlobRef) -> Result<BTreeMap<String, Tensor>, Error> {
    let tensors = decode(&job.store.get_blob(blob)?)?;
    tensors.into_iter().map(|tensor| Ok((tensor.name.clone(), tensor_of(tensor)?))).collect()
}

fn tensor_bytes(name: &str, tensor: &Tensor) -> Result<TensorBytes, Error> {
    let StateTensor { name, dtype, shape, bytes } = StateTensor::of(name, tensor)?;
    let shape = shape.into_iter().map(|size| usize::try_from(size).expect("a size is not negative")).collect();
    Ok(TensorBytes { name, dtype: safetensors_dtype(dtype), shape, data: bytes })
}

fn tensor_of(tensor: TensorBytes) -> Result<Tensor, Error> {
    let shape = tensor.shape.iter().map(|&size| i64::try_from(size).expect("sizes of real tensors fit")).collect();
    let dtype = graph_dtype(tensor.dtype).ok_or_else(|| checkpoint::Error::State {
        what: format!("{} has the element type {:?}, which no checkpoint has", tensor.name, tensor.dtype),
        source: None,
    })?;
    Ok(StateTensor { name: tensor.name, dtype, shape, bytes: tensor.data }.to_tensor()?)
}

const DTYPES: [(DType, Dtype); 10] = [
    (DType::Uint8, Dtype::U8),
    (DType::Int8, Dtype::I8),
    (DType::Int16, Dtype::I16),
    (DType::Int32, Dtype::I32),
    (DType::Int64, Dtype::I64),
    (DType::Float16, Dtype::F16),
    (DType::Float32, Dtype::F32),
    (DType::Float64, Dtype::F64),
    (DType::BFloat16, Dtype::BF16),
    (DType::Bool, Dtype::BOOL),
];

fn safetensors_dtype(dtype: DType) -> Dtype {
    DTYPES.iter().find(|pair| pair.0 == dtype).expect("the table has every element type of a graph").1
}

fn graph_dtype(dtype: Dtype) -> Option<DType> {
    DTYPES.iter().find(|pair| pair.1 == dtype).map(|pair| pair.0)
}

/// Every parameter and buffer by its original name, in name order.
fn named_tensors(job: &Job, replica: &Replica, precision: StoredAs) -> BTreeMap<String, Tensor> {
    let graph = &job.graph.graph;
    let original: BTreeMap<&str, DType> =
        graph.parameters.iter().chain(&graph.buffers).map(|weight| (weight.name.as_str(), weight.dtype)).collect();
    let mut named = BTreeMap::new();
    for group in replica.model().groups() {
        for parameter in &group.parameters {
            named.insert(parameter.name.clone(), view(&group.flat, parameter));
        }
        for (name, value) in &group.buffers {
            named.insert(name.clone(), value.shallow_clone());
        }
    }
    if precision == StoredAs::Trained {
        return named;
    }
    for (name, value) in &mut named {
        if let Some(&dtype) = original.get(name.as_str()) {
            *value = value.to_kind(kind_of(dtype));
        }
    }
    named
}

fn view(flat: &Tensor, parameter: &model::FlatParameter) -> Tensor {
    parameter.view(flat).expect("a group's parameters lie in its buffer")
}

/// BLAKE3 over every parameter and buffer of the model in name order, in the precision trained in.
pub(crate) fn weights_blake3(replica: &Replica) -> Result<String, replica::Error> {
    let mut named = BTreeMap::new();
    for group in replica.model().groups() {
        for parameter in &group.parameters {
            named.insert(parameter.name.as_str(), view(&group.flat, parameter));
        }
        for (name, value) in &group.buffers {
            named.insert(name.as_str(), value.shallow_clone());
        }
    }
    let mut hasher = blake3::Hasher::new();
    for (name, value) in named {
        hasher.update(name.as_bytes());
        hasher.update(&StateTensor::of(name, &value)?.bytes);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Writes model.pt2, model.safetensors and labels.json into the run's model folder, each whole or not at all.
pub(crate) fn write_model(job: &Job, replica: &Replica) -> Result<(), Error> {
    let folder = job.model_folder();
    std::fs::create_dir_all(&folder).map_err(|source| Error::File { path: folder.clone(), source })?;
    write_archive(job, replica, &folder.join("model.pt2"))?;
    write_weights(job, replica, &folder.join("model.safetensors"), StoredAs::Original)?;
    let labels = serde_json::to_vec_pretty(&job.plan.classes).expect("names are plain data");
    write_whole(&folder.join("labels.json"), &labels)
}

/// The run's archive with the replica's weights.
pub(crate) fn write_archive(job: &Job, replica: &Replica, path: &Path) -> Result<(), Error> {
    let tensors = named_bytes(job, replica, StoredAs::Original)?;
    let value = |name: &str| {
        let tensor = tensors.get(name)?;
        let shape = tensor.shape.iter().map(|&size| i64::try_from(size).expect("sizes of real tensors fit")).collect();
        Some((graph_dtype(tensor.dtype)?, shape, tensor.data.clone()))
    };
    Ok(job.archive.write(path, value)?)
}

/// Every parameter and buffer under its original name, those that the graph does not use included, as safetensors.
pub(crate) fn write_weights(job: &Job, replica: &Replica, path: &Path, precision: StoredAs) -> Result<(), Error> {
    let mut tensors = named_bytes(job, replica, precision)?;
    let graph = job.archive.graph()?;
    // A buffer that is not persistent is no part of a module's state.
    for weight in graph.parameters.iter().chain(graph.buffers.iter().filter(|buffer| buffer.flag)) {
        if !tensors.contains_key(&weight.name) {
            let name = weight.name.clone();
            let data = job.archive.weight_bytes(&name)?;
            let shape =
                weight.shape.iter().map(|&size| usize::try_from(size).expect("a size is not negative")).collect();
            tensors.insert(name.clone(), TensorBytes { name, dtype: safetensors_dtype(weight.dtype), shape, data });
        }
    }
    // Readers of the Hugging Face kind look for this key.
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    let body = safetensors::serialize(tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), metadata).map_err(
        |source| checkpoint::Error::State { what: "the model cannot be written".to_owned(), source: Some(source) },
    )?;
    write_whole(path, &body)
}

fn named_bytes(job: &Job, replica: &Replica, precision: StoredAs) -> Result<BTreeMap<String, TensorBytes>, Error> {
    let named = named_tensors(job, replica, precision);
    named.into_iter().map(|(name, tensor)| Ok((name.clone(), tensor_bytes(&name, &tensor)?))).collect()
}

fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    use std::io::Write as _;
    let temporary = path.with_extension("partial");
    let write = || {
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|source| {
        let _ = std::fs::remove_file(&temporary);
        Error::File { path: path.to_owned(), source }
    })
}
