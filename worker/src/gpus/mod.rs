//! [`Gpus`]: the GPUs of a generation, brought together over its host collective.
//!
//! Law:
//! - `DEV-5`: NCCL's id is made by rank 0 and goes through the generation's own connections (`COLL-4`); each rank uses it once, and it dies
//!   with the generation.
//! - `DEV-6`: before anybody joins, all ranks know that all can: one that cannot would leave the others waiting.

mod sums;
#[cfg(test)]
mod sums_tests;

pub use sums::{DeviceSums, DeviceTicket, Limits};

use std::sync::Arc;
use sums::{JOIN, SUM, device_error};
use thaw_node::collective::{Collective, Error};
use thaw_torch::nccl::{Communicator, DeviceBuffer, Gpu, UniqueId, capability};
use thaw_torch::tch::{Device, Tensor};

/// Sums over the GPUs of a generation; see [`DeviceSums`].
#[derive(Debug)]
pub struct Gpus {
    gpu: Gpu,
    sums: DeviceSums<DeviceBuffer>,
}

/// What a rank tells the others before they join.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum Greeting {
    /// It trains on the CPU.
    Cpu,
    /// It can sum over GPUs; rank 0 brings the id.
    Gpu { version: String, id: Option<Vec<u8>> },
    /// It has a GPU, but cannot.
    Unable { what: String },
}

impl Gpus {
    /// Brings the GPUs of a gang together. `None` where it trains on CPUs. All ranks of the gang call it at the same point.
    ///
    /// # Errors
    /// [`Error::NotAvailable`] on every rank where one cannot, or where some train on CPUs; as [`DeviceSums::join`].
    pub fn join(host: &Arc<dyn Collective>, device: Device, limits: Limits) -> Result<Option<Self>, Error> {
        let greeting = greeting(device, host.rank().0 == 0);
        let mine = serde_json::to_vec(&greeting).expect("a greeting is plain data");
        let all = host.all_gather(&mine)?;
        let Some(id) = agree(&all).map_err(|what| Error::NotAvailable { what })? else { return Ok(None) };
        Self::with_id(host, device, id, limits).map(Some)
    }

    fn with_id(host: &Arc<dyn Collective>, device: Device, id: UniqueId, limits: Limits) -> Result<Self, Error> {
        let gpu = Gpu::of(device).map_err(device_error(JOIN, 0))?;
        let communicator = Communicator::new(gpu.clone(), id, host.rank().0, host.world_size());
        let sums = DeviceSums::join(communicator, Arc::clone(host), limits)?;
        tracing::debug!(rank = host.rank().0, ?device, "GPUs joined");
        Ok(Self { gpu, sums })
    }

    /// Begins the sum of a tensor over all ranks, in place, behind what the calling thread has given libtorch so far.
    ///
    /// # Errors
    /// [`Error::Device`] for a tensor that is not contiguous, on this GPU, and fp32 or fp64.
    pub fn submit(&mut self, tensor: Tensor) -> Result<DeviceTicket, Error> {
        let buffer = self.gpu.buffer(tensor).map_err(device_error(SUM, 0))?;
        Ok(self.sums.submit(buffer))
    }

    /// Waits for a sum; see [`DeviceSums::wait`].
    ///
    /// # Errors
    /// The first error of any sum.
    pub fn wait(&self, ticket: DeviceTicket) -> Result<Tensor, Error> {
        self.sums.wait(ticket).map(DeviceBuffer::into_tensor)
    }

    /// Ends all sums; see [`DeviceSums::abort`].
    pub fn abort(&self) {
        self.sums.abort();
    }
}

fn greeting(device: Device, brings_id: bool) -> Greeting {
    if !device.is_cuda() {
        return Greeting::Cpu;
    }
    let able = capability().and_then(|found| {
        let id = brings_id.then(UniqueId::new).transpose()?;
        Ok(Greeting::Gpu { version: found.version.to_string(), id: id.map(|id| id.as_bytes().to_vec()) })
    });
    able.unwrap_or_else(|error| Greeting::Unable { what: thaw_runtime::chain(&error) })
}

/// The id that all join with, `None` where all train on CPUs; else why they cannot. The same on every rank.
fn agree(all: &[Vec<u8>]) -> Result<Option<UniqueId>, String> {
    let mut greetings = Vec::with_capacity(all.len());
    for (rank, bytes) in all.iter().enumerate() {
        let greeting: Greeting =
            serde_json::from_slice(bytes).map_err(|error| format!("rank {rank} speaks another protocol ({error})"))?;
        greetings.push(greeting);
    }
    let (mut id, mut version) = (None, None);
    for (rank, greeting) in greetings.into_iter().enumerate() {
        match greeting {
            Greeting::Unable { what } => return Err(format!("rank {rank}: {what}")),
            Greeting::Cpu => {
                if version.get_or_insert(None::<String>).is_some() {
                    return Err(mixed(rank, "CPU", "GPU"));
                }
            }
            Greeting::Gpu { version: found, id: brought } => {
                let Some(first) = version.get_or_insert_with(|| Some(found.clone())) else {
                    return Err(mixed(rank, "GPU", "CPU"));
                };
                if *first != found {
                    return Err(format!("rank {rank} has NCCL {found}, rank 0 has {first}; they must be the same"));
                }
                id = id.or(brought);
            }
        }
    }
    match version.flatten() {
        None => Ok(None),
        Some(_) => match id.as_deref().and_then(UniqueId::from_bytes) {
            Some(id) => Ok(Some(id)),
            None => Err("rank 0 sent no id".to_owned()),
        },
    }
}

fn mixed(rank: usize, here: &str, there: &str) -> String {
    format!("rank {rank} trains on a {here}, rank 0 on a {there}; give all agents the same --device")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(greetings: &[Greeting]) -> Result<Option<UniqueId>, String> {
        agree(&greetings.iter().map(|greeting| serde_json::to_vec(greeting).unwrap()).collect::<Vec<_>>())
    }

    fn gpu(version: &str, id: Option<u8>) -> Greeting {
        Greeting::Gpu { version: version.to_owned(), id: id.map(|byte| vec![byte; 128]) }
    }

    #[test]
    fn ranks_join_only_where_all_can() {
        assert_eq!(told(&[Greeting::Cpu, Greeting::Cpu]), Ok(None));
        let id = UniqueId::from_bytes(&[7; 128]);
        assert_eq!(told(&[gpu("2.28.9", Some(7)), gpu("2.28.9", None)]), Ok(id));
        let unable = Greeting::Unable { what: "not available here: libnccl.so.2 cannot be loaded".to_owned() };
        let why = told(&[gpu("2.28.9", Some(7)), unable]).unwrap_err();
        assert_eq!(why, "rank 1: not available here: libnccl.so.2 cannot be loaded");
        let why = told(&[gpu("2.28.9", Some(7)), Greeting::Cpu]).unwrap_err();
        assert!(why.starts_with("rank 1 trains on a CPU, rank 0 on a GPU"), "{why}");
        let why = told(&[Greeting::Cpu, gpu("2.28.9", None)]).unwrap_err();
        assert!(why.starts_with("rank 1 trains on a GPU, rank 0 on a CPU"), "{why}");
        let why = told(&[gpu("2.28.9", Some(7)), gpu("2.30.4", None)]).unwrap_err();
        assert!(why.starts_with("rank 1 has NCCL 2.30.4, rank 0 has 2.28.9"), "{why}");
        assert!(told(&[gpu("2.28.9", None)]).is_err());
        assert!(agree(&[b"x".to_vec()]).is_err());
    }
}
