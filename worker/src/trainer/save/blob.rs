//! A group's state as the bytes of its two blobs, weights with buffers and optimizer state, and back.

use super::Error;
use crate::trainer::optimizer::Optimizer;
use crate::trainer::snapshot::{GroupSnapshot, Stamp};
use bytes::Bytes;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use thaw_core::manifest::{BlobRef, GroupState};
use thaw_graph::ir::DType;
use thaw_node::checkpoint::{self, CheckpointStore, TensorBytes, decode, encode};
use thaw_torch::model::{FlatLayout, GroupParameters, StateTensor};
use thaw_torch::tch::Tensor;

/// One group's state on its way to storage.
pub(super) struct Piece {
    pub(super) stamp: Stamp,
    name: String,
    buffers: Vec<String>,
    layout: FlatLayout,
    snapshot: GroupSnapshot,
}

impl Piece {
    pub(super) fn new(group: &GroupParameters, snapshot: GroupSnapshot) -> Self {
        let buffers = group.buffers.iter().map(|(name, _)| name.clone()).collect();
        Self { stamp: snapshot.stamp, name: group.name.clone(), buffers, layout: group.layout(), snapshot }
    }

    /// The state that it is made of: the same memory.
    pub(super) fn share(&self) -> GroupSnapshot {
        self.snapshot.share()
    }

    /// Both blobs' bytes, once the snapshot has its values.
    pub(super) fn encode(&self) -> Result<Encoded, Error> {
        if !self.snapshot.wait() {
            return Err(Error::Snapshot { group: self.name.clone() });
        }
        // Row-major whatever the memory format, so that what is saved does not depend on it.
        let mut tensors = vec![tensor_bytes("weights", &self.layout.to_row_major(&self.snapshot.flat)?)?];
        for (buffer, value) in self.buffers.iter().zip(&self.snapshot.buffers) {
            tensors.push(tensor_bytes(&format!("buffer.{buffer}"), value)?);
        }
        let weights = encode(tensors)?;
        let optimizer = match &self.snapshot.optimizer {
            None => None,
            Some(state) => {
                let tensors = state.tensors().into_iter();
                let tensors = tensors.map(|(name, tensor)| tensor_bytes(name, &self.layout.to_row_major(tensor)?));
                Some((encode(tensors.collect::<Result<_, _>>()?)?, state.steps()))
            }
        };
        Ok(Encoded { weights, optimizer })
    }

    /// Writes both blobs.
    pub(super) fn write(self, store: &CheckpointStore) -> Result<GroupState, Error> {
        let Encoded { weights, optimizer } = self.encode()?;
        let weights = store.put_blob(weights)?;
        let (mut stored, mut optimizer_steps) = (None, 0);
        if let Some((pieces, steps)) = optimizer {
            (stored, optimizer_steps) = (Some(store.put_blob(pieces)?), steps);
        }
        Ok(GroupState { name: self.name, weights: Some(weights), optimizer: stored, optimizer_steps })
    }
}

/// A state as bytes, each blob in pieces.
pub(super) struct Encoded {
    pub(super) weights: Vec<Bytes>,
    /// With the number of updates; absent where the group has none.
    pub(super) optimizer: Option<(Vec<Bytes>, u64)>,
}

/// Blobs on their way at a time: while one waits for the disk to have it, the next is encoded and hashed.
const WRITERS: usize = 3;

/// Writes all pieces; what they are stored as in the order of their stamps.
pub(super) fn write_all(pieces: Vec<Piece>, store: &CheckpointStore) -> Result<Vec<(Stamp, GroupState)>, Error> {
    let writers = WRITERS.min(pieces.len());
    let (waiting, written) = (Mutex::new(pieces.into_iter()), Mutex::new(Vec::new()));
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let writer = || -> Result<(), Error> {
        while let Some(piece) = next() {
            let (stamp, state) = (piece.stamp, piece.write(store)?);
            written.lock().unwrap_or_else(PoisonError::into_inner).push((stamp, state));
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..writers).map(|_| scope.spawn(writer)).collect();
        writers.into_iter().try_for_each(|writer| writer.join().expect("a writer returns its errors"))
    })?;
    let mut written = written.into_inner().unwrap_or_else(PoisonError::into_inner);
    written.sort_by_key(|(stamp, _)| *stamp);
    Ok(written)
}

/// The tensors of a blob by name.
pub(super) type Tensors = BTreeMap<String, Tensor>;

pub(super) fn read(store: &CheckpointStore, blob: &BlobRef) -> Result<Tensors, Error> {
    parse(&store.get_blob(blob)?)
}

/// The tensors in a blob's bytes.
pub(super) fn parse(bytes: &Bytes) -> Result<Tensors, Error> {
    let tensors = decode(bytes)?;
    tensors.into_iter().map(|tensor| Ok((tensor.name.clone(), tensor_of(tensor)?))).collect()
}

/// What a group's blobs hold; the problem in words where they do not fit the group.
pub(super) fn snapshot(
    stamp: Stamp,
    group: &GroupParameters,
    optimizer: &Optimizer,
    weights: &Tensors,
    state: Option<(&Tensors, u64)>,
) -> Result<Result<GroupSnapshot, String>, Error> {
    let layout = group.layout();
    let missing = |what: &str| Ok(Err(format!("group {} has no {what}", group.name)));
    let fits = |own: &Tensor, saved: &&Tensor| own.size() == saved.size() && own.kind() == saved.kind();
    let flat = weights.get("weights").filter(|saved| fits(&group.flat, saved));
    let Some(flat) = flat else { return missing("weights that fit") };
    let mut buffers = Vec::with_capacity(group.buffers.len());
    for (name, own) in &group.buffers {
        let buffer = weights.get(&format!("buffer.{name}")).filter(|saved| fits(own, saved));
        let Some(buffer) = buffer else { return missing(&format!("{name} that fits")) };
        buffers.push(buffer.shallow_clone());
    }
    let state = match state {
        None => None,
        Some((tensors, steps)) => {
            let mut moved = BTreeMap::new();
            for (name, tensor) in tensors {
                moved.insert(name.as_str(), layout.from_row_major(tensor)?);
            }
            let Some(state) = optimizer.restore(group, |name| moved.remove(name), steps)? else {
                return missing("optimizer state that fits");
            };
            Some(state)
        }
    };
    Ok(Ok(GroupSnapshot::of(stamp, layout.from_row_major(flat)?, buffers, state)))
}

/// Of a tensor that nobody writes to while the bytes live.
pub(super) fn tensor_bytes(name: &str, tensor: &Tensor) -> Result<TensorBytes, Error> {
    let StateTensor { name, dtype, shape, bytes } = StateTensor::sharing(name, tensor)?;
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

pub(super) fn safetensors_dtype(dtype: DType) -> Dtype {
    DTYPES.iter().find(|pair| pair.0 == dtype).expect("the table has every element type of a graph").1
}

pub(super) fn graph_dtype(dtype: Dtype) -> Option<DType> {
    DTYPES.iter().find(|pair| pair.1 == dtype).map(|pair| pair.0)
}
