//! Sums and gathers over ranks, on a thread of their own, so that they overlap with what the caller computes meanwhile.

use crate::gpus::{DeviceTicket, Gpus};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thaw_core::sampler::ranks_shards;
use thaw_core::sampler::tree::maximal_subtrees;
use thaw_node::collective::{Collective, Error, Pulse, ReduceQueue, Ticket};
use thaw_proto::ids::Rank;
use thaw_proto::run::Position;
use thaw_torch::runtime::{tensor_in, with_slice_f32_mut, with_slice_f64_mut, with_slices_f32, with_slices_f64};
use thaw_torch::tch::{Kind, Tensor};

enum Work {
    Tensors {
        parts: Vec<Tensor>,
        sum: Tensor,
    },
    /// The only part, and then the sum.
    InPlace(Tensor),
    Numbers {
        parts: Vec<Vec<f64>>,
        sum: Vec<f64>,
    },
    /// A sum of nothing, whose begin and end are noted.
    Arrival {
        parts: usize,
        took: Option<Range<Instant>>,
    },
    Gather {
        mine: Vec<u8>,
        all: Vec<Vec<u8>>,
    },
    /// What is given, and then what is received.
    Copy {
        from: Rank,
        to: Vec<Rank>,
        bytes: Vec<u8>,
    },
}

/// A sum that needs no other rank is its own result.
pub(crate) enum Exchanged<T> {
    Here(T),
    Pending(Ticket),
    /// Between GPUs; an error is that of the submission.
    OnGpu(Result<DeviceTicket, Error>),
}

/// The moment at which every rank has come to the same place.
pub(crate) struct Arrival(Ticket);

/// What the trainers of a generation exchange through.
pub(crate) struct Links {
    pub(crate) host: Arc<dyn Collective>,
    /// Where they train on GPUs, and are several.
    pub(crate) gpus: Option<Gpus>,
}

pub(crate) struct Exchange {
    /// First, so that sums between GPUs end before what they hear of dead peers from.
    gpus: Option<Gpus>,
    queue: ReduceQueue<Work>,
    host: Arc<dyn Collective>,
    alone: bool,
    /// Whether this rank's shards are one node of the tree, so that its sums are made in place.
    one_part: bool,
    /// Of earlier steps, to be written again: fresh memory costs a page fault per 4 KiB.
    spare: Vec<Tensor>,
    summed_bytes: u64,
    /// Waits for operations, which have deadlines, are no standstill (RING-4).
    pulse: Pulse,
}

impl Exchange {
    pub(crate) fn new(links: Links) -> Self {
        let Links { host, gpus } = links;
        let (rank, world_size, shards) = (host.rank().0, host.world_size(), host.shards());
        let one_part = maximal_subtrees(ranks_shards(rank, world_size, shards), shards).len() == 1;
        let (queue, spare) = (ReduceQueue::new(Arc::clone(&host)), Vec::new());
        let pulse = host.record().pulse();
        Self { gpus, queue, host, alone: world_size == 1, one_part, spare, summed_bytes: 0, pulse }
    }

    /// Where training stands, for the record of what is exchanged from here on.
    pub(crate) fn note(&self, position: Position) {
        self.host.record().at(position.stage, position.step);
    }

    /// A copy of a gradient that later shards' are added to: where its sum with other ranks' is made in place, and no copy is made there.
    pub(crate) fn own_copy(&mut self, gradient: &Tensor) -> Tensor {
        if self.alone || self.gpus.is_some() || !self.one_part {
            return gradient.copy();
        }
        match self.take_spare(gradient).or_else(|| shared(&*self.host, gradient.numel(), gradient.kind())) {
            Some(mut own) => {
                own.copy_(gradient);
                own
            }
            None => gradient.copy(),
        }
    }

    fn take_spare(&mut self, like: &Tensor) -> Option<Tensor> {
        let fits = |spare: &Tensor| spare.size() == like.size() && spare.kind() == like.kind();
        self.spare.iter().position(fits).map(|place| self.spare.swap_remove(place))
    }

    /// The lowest of the ranks that share this rank's memory.
    pub(crate) fn first_of_host(&self) -> Rank {
        self.host.first_of_host()
    }

    /// Whether there is no other rank.
    pub(crate) fn is_alone(&self) -> bool {
        self.alone
    }

    /// Begins the sum of all ranks' `parts`, each rank's being the maximal subtrees of its shards, ascending. A single part is replaced.
    pub(crate) fn sum_tensors(&mut self, mut parts: Vec<Tensor>) -> Exchanged<Tensor> {
        if self.alone && parts.len() == 1 {
            return Exchanged::Here(parts.remove(0));
        }
        self.summed_bytes += bytes_of(&parts[0]);
        if let Some(gpus) = &mut self.gpus {
            // In place, and in rank order within this rank only: between ranks the order is NCCL's.
            let mut parts = parts.into_iter();
            let mut sum = parts.next().expect("a rank has at least one shard");
            parts.for_each(|part| drop(sum.g_add_(&part)));
            return Exchanged::OnGpu(gpus.submit(sum));
        }
        if self.one_part {
            return Exchanged::Pending(self.queue.submit(Work::InPlace(parts.remove(0)), work));
        }
        let sum = self.take_spare(&parts[0]).unwrap_or_else(|| parts[0].empty_like());
        Exchanged::Pending(self.queue.submit(Work::Tensors { parts, sum }, work))
    }

    /// Takes back sums that nobody reads any more, but for those made in the model's own gradients. Those of GPUs are let go.
    pub(crate) fn recycle(&mut self, sums: impl IntoIterator<Item = Tensor>) {
        if !self.alone && self.gpus.is_none() {
            self.spare.extend(sums);
        }
    }

    /// Bytes given to be summed with other ranks' since this was last asked, before the algorithm's factor.
    pub(crate) fn take_summed_bytes(&mut self) -> u64 {
        std::mem::take(&mut self.summed_bytes)
    }

    /// Lets go of what was kept for another set of layer groups.
    pub(crate) fn forget(&mut self) {
        self.spare.clear();
    }

    /// [`Exchange::sum_tensors`] for a few numbers.
    pub(crate) fn sum_numbers(&mut self, mut parts: Vec<Vec<f64>>) -> Exchanged<Vec<f64>> {
        if self.alone && parts.len() == 1 {
            return Exchanged::Here(parts.remove(0));
        }
        self.summed_bytes += (parts[0].len() * size_of::<f64>()) as u64;
        let sum = vec![0.0; parts[0].len()];
        Exchanged::Pending(self.queue.submit(Work::Numbers { parts, sum }, work))
    }

    /// Notes that this rank has computed what the other ranks wait for. `parts` is the number of its maximal subtrees. `None` where nobody
    /// waits, and between GPUs, which run ahead of or behind their hosts.
    pub(crate) fn arrive(&mut self, parts: usize) -> Option<Arrival> {
        if self.alone || self.gpus.is_some() {
            return None;
        }
        self.summed_bytes += size_of::<f64>() as u64;
        Some(Arrival(self.queue.submit(Work::Arrival { parts, took: None }, work)))
    }

    /// For how long since `since` this rank stood ready while others still computed.
    pub(crate) fn waited_for_others(&mut self, arrival: Arrival, since: Instant) -> Result<Duration, Error> {
        match self.wait(arrival.0)? {
            Work::Arrival { took: Some(took), .. } => Ok(took.end.saturating_duration_since(took.start.max(since))),
            _ => unreachable!("a ticket gives back its own work, done"),
        }
    }

    fn wait(&self, ticket: Ticket) -> Result<Work, Error> {
        let _waits = self.pulse.wait();
        self.queue.wait(ticket)
    }

    pub(crate) fn wait_tensor(&mut self, exchanged: Exchanged<Tensor>) -> Result<Tensor, Error> {
        match exchanged {
            Exchanged::Here(sum) => Ok(sum),
            Exchanged::OnGpu(submitted) => {
                let gpus = self.gpus.as_ref().expect("a sum between GPUs was given to them");
                let _waits = self.pulse.wait();
                gpus.wait(submitted?)
            }
            Exchanged::Pending(ticket) => match self.wait(ticket)? {
                Work::Tensors { sum, .. } | Work::InPlace(sum) => Ok(sum),
                _ => unreachable!("a ticket gives back its own work"),
            },
        }
    }

    pub(crate) fn wait_numbers(&mut self, exchanged: Exchanged<Vec<f64>>) -> Result<Vec<f64>, Error> {
        match exchanged {
            Exchanged::Here(sum) => Ok(sum),
            Exchanged::OnGpu(_) => unreachable!("numbers are summed on the host"),
            Exchanged::Pending(ticket) => match self.wait(ticket)? {
                Work::Numbers { sum, .. } => Ok(sum),
                _ => unreachable!("a ticket gives back its own work"),
            },
        }
    }

    /// See [`Collective::copy`].
    pub(crate) fn copy(&mut self, from: Rank, to: &[Rank], bytes: Vec<u8>) -> Result<Vec<u8>, Error> {
        let ticket = self.queue.submit(Work::Copy { from, to: to.to_vec(), bytes }, work);
        match self.wait(ticket)? {
            Work::Copy { bytes, .. } => Ok(bytes),
            _ => unreachable!("a ticket gives back its own work"),
        }
    }

    /// Every rank's bytes, in rank order.
    pub(crate) fn gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, Error> {
        let ticket = self.queue.submit(Work::Gather { mine, all: Vec::new() }, work);
        match self.wait(ticket)? {
            Work::Gather { all, .. } => Ok(all),
            _ => unreachable!("a ticket gives back its own work"),
        }
    }
}

pub(super) fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}

fn work(collective: &dyn Collective, work: &mut Work) -> Result<(), Error> {
    match work {
        Work::Tensors { parts, sum } => sum_tensors(collective, parts, sum),
        Work::InPlace(values) => sum_in_place(collective, values),
        Work::Numbers { parts, sum } => {
            let parts: Vec<&[f64]> = parts.iter().map(Vec::as_slice).collect();
            collective.reduce_shards_f64(&parts, sum)
        }
        Work::Arrival { parts, took } => {
            let began = Instant::now();
            let nothing = vec![[0.0].as_slice(); *parts];
            collective.reduce_shards_f64(&nothing, &mut [0.0])?;
            *took = Some(began..Instant::now());
            Ok(())
        }
        Work::Gather { mine, all } => {
            *all = collective.all_gather(mine)?;
            Ok(())
        }
        Work::Copy { from, to, bytes } => {
            *bytes = collective.copy(*from, to, bytes)?;
            Ok(())
        }
    }
}

/// Room for a gradient in memory that the other ranks of the host reach, all zero; none where there is none.
pub(super) fn shared(collective: &dyn Collective, elements: usize, kind: Kind) -> Option<Tensor> {
    let lease = collective.lease(elements.checked_mul(kind.elt_size_in_bytes())?)?;
    // Without it sums pass through windows: slower, not wrong.
    tensor_in(lease, kind, elements).inspect_err(|error| tracing::warn!(%error, "gradients are not shared")).ok()
}

/// As for [`sum_tensors`].
fn sum_in_place(collective: &dyn Collective, values: &mut Tensor) -> Result<(), Error> {
    if values.kind() == Kind::Double {
        with_slice_f64_mut(values, |values| collective.reduce_in_place_f64(values)).expect(LENT)
    } else {
        with_slice_f32_mut(values, |values| collective.reduce_in_place_f32(values)).expect(LENT)
    }
}

const LENT: &str = "gradients are contiguous and on the CPU, in the master type";

/// Master weights are fp32 or fp64, contiguous and on the CPU, so lending their memory cannot fail.
fn sum_tensors(collective: &dyn Collective, parts: &[Tensor], sum: &mut Tensor) -> Result<(), Error> {
    if sum.kind() == Kind::Double {
        with_slices_f64(parts, |parts| {
            with_slice_f64_mut(sum, |sum| collective.reduce_shards_f64(parts, sum)).expect(LENT)
        })
    } else {
        with_slices_f32(parts, |parts| {
            with_slice_f32_mut(sum, |sum| collective.reduce_shards_f32(parts, sum)).expect(LENT)
        })
    }
    .expect(LENT)
}
