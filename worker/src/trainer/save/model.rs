//! The trained model as files: the archive it came in, safetensors under the original names, and the digest of both.

use super::Error;
use super::blob::{graph_dtype, safetensors_dtype, tensor_bytes};
use crate::trainer::job::Job;
use crate::trainer::replica::{self, Replica};
use std::collections::{BTreeMap, HashMap};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use thaw_graph::ir::DType;
use thaw_node::checkpoint::{self, TensorBytes};
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
        hasher.update(&StateTensor::sharing(name, &value)?.bytes);
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
        Some((graph_dtype(tensor.dtype)?, shape, tensor.data.to_vec()))
    };
    let _waits = job.pulse.wait();
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
            let data = job.archive.weight_bytes(&name)?.into();
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
    let _waits = job.pulse.wait();
    write_whole(path, &body)
}

fn named_bytes(job: &Job, replica: &Replica, precision: StoredAs) -> Result<BTreeMap<String, TensorBytes>, Error> {
    let named = named_tensors(job, replica, precision);
    named.into_iter().map(|(name, tensor)| Ok((name.clone(), tensor_bytes(&name, &tensor)?))).collect()
}

fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    use std::io::Write as _;
    let write = || {
        // Under a name of its own: the rank 0 of a generation that is over may still be writing the same file. The umask applies.
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut file =
            tempfile::Builder::new().prefix(".thaw-").permissions(Permissions::from_mode(0o666)).tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        std::fs::File::open(folder)?.sync_all()
    };
    write().map_err(|source| Error::File { path: path.to_owned(), source })
}
