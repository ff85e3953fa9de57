//! One rank's copy of the model and its optimizer, and the step that keeps all copies identical.
//!
//! REP-1: only trainable groups have gradients, optimizer state and a part in the norm; a frozen group is absent.
//! REP-2: gradients, losses and batch-norm statistics are summed over logical shards in the fixed tree, never in rank order.
//! REP-3: the update runs only after every sum it needs has come back clean from the collective.
//! REP-4: a step whose sums do not come back leaves weights, buffers and optimizer state as they were.
//! REP-5: no step is taken twice: a caller that lost count of them gets an error, not other weights.

mod buffers;
mod evaluate;
mod snapshots;
mod step;

pub(crate) use snapshots::Extent;
pub(crate) use step::{ShardBatch, StepPlan, StepReport, Votes};

use super::hold::Hold;
use super::optimizer::{Optimizer, OptimizerState};
use super::reduce::{self, Exchange, Links, bytes_of};
use super::regularize::Pull;
use super::snapshot::{Copier, Stamp};
use buffers::NormBuffers;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use thaw_core::sampler;
use thaw_data::batch::{ArrayData, Batch};
use thaw_node::collective::{Collective, Pulse};
use thaw_proto::ids::{Rank, Step};
use thaw_proto::run::Position;
use thaw_proto::spec;
use thaw_torch::SegmentedModel;
use thaw_torch::tch::{Kind, Tensor};
use thaw_torch::{model, optim, runtime};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("step {asked} is to be taken, and the weights are those of step {held}; this is a mistake in Thaw")]
    Miscounted { asked: Step, held: Step },
    #[error("cannot exchange with the other trainers")]
    Collective(#[from] thaw_node::collective::Error),
    #[error("cannot run the model")]
    Model(#[from] model::Error),
    #[error("cannot update the weights")]
    Update(#[from] optim::Error),
    #[error("cannot use libtorch")]
    Runtime(#[from] runtime::Error),
    #[error("replicas differ after step {step}: ranks {ranks:?} hold other weights or optimizer state than rank 0")]
    Diverged { step: Step, ranks: Vec<usize> },
    #[error("cannot bring numbers to or from the device")]
    Device(#[source] thaw_torch::tch::TchError),
    #[error("cannot move the weights of layer group {group}")]
    Weights { group: String, source: thaw_torch::tch::TchError },
    #[error("cannot put back the weights of layer group {group}")]
    Restore { group: String, source: thaw_torch::tch::TchError },
    #[error("layer group {group} was not copied; the copying thread ended")]
    Snapshot { group: String },
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    #[error("rank {rank} sent an evaluation that does not parse")]
    Tally { rank: usize },
}

/// What is needed to build a replica besides the model.
pub(crate) struct Settings {
    pub(crate) seed: u64,
    pub(crate) logical_shards: u32,
    pub(crate) optimizer: spec::Optimizer,
    pub(crate) ema: Option<spec::Ema>,
    pub(crate) l2_sp: Option<spec::L2Sp>,
    pub(crate) label_smoothing: f64,
    /// In label order; `None` where all classes count the same.
    pub(crate) class_weights: Option<Vec<f64>>,
    pub(crate) thawed_batch_norm: spec::ThawedBatchNorm,
    pub(crate) max_grad_norm: Option<f64>,
    pub(crate) classes: usize,
    pub(crate) hold: Option<Hold>,
    pub(crate) pulse: Pulse,
}

impl Settings {
    /// What samples with these labels count for.
    pub(super) fn weight_of(&self, labels: &[i64]) -> f64 {
        match &self.class_weights {
            None => f64::from(u32::try_from(labels.len()).expect("a micro-batch is part of a global batch")),
            Some(weights) => labels.iter().filter_map(|label| weights.get(usize::try_from(*label).ok()?)).sum(),
        }
    }
}

pub(crate) struct Replica {
    model: SegmentedModel,
    settings: Settings,
    exchange: Exchange,
    /// Whose memory gradients lie in, where they lie where other ranks reach them.
    lender: Option<Arc<dyn Collective>>,
    rank: u32,
    world_size: u32,
    shards: Range<u32>,
    /// Ascending.
    trainable: Vec<usize>,
    /// Present from a group's first thaw on.
    states: BTreeMap<usize, OptimizerState>,
    optimizer: Optimizer,
    pull: Option<Pull>,
    norms: NormBuffers,
    copier: Copier,
    /// Of each group's present state.
    stamps: Vec<Stamp>,
    last_stamp: Stamp,
    /// Steps that the weights have taken, once this replica has taken one since it was given them.
    steps: Option<Step>,
}

impl Replica {
    pub(crate) fn new(mut model: SegmentedModel, settings: Settings, links: Links) -> Result<Self, Error> {
        let (rank, world_size) = (links.host.rank().0, links.host.world_size());
        let shards = sampler::ranks_shards(rank, world_size, settings.logical_shards);
        let lender = lender_of(&links, &shards);
        model.set_gradient_memory(gradient_memory(&lender));
        let exchange = Exchange::new(links);
        let optimizer = Optimizer::new(&settings.optimizer, settings.ema)?;
        let pull = settings.l2_sp.map(|l2_sp| Pull::new(l2_sp, &model));
        let class_weights = settings.class_weights.as_ref();
        let on_device = |weights: &Vec<f64>| {
            Tensor::from_slice(weights).f_to_device_(model.device(), model.master_kind(), false, false)
        };
        let class_weights = class_weights.map(on_device).transpose().map_err(Error::Device)?;
        model.set_loss(model::Loss { label_smoothing: settings.label_smoothing, class_weights });
        let norms = NormBuffers::of(&model.graph().graph);
        let copier = Copier::start().map_err(Error::Thread)?;
        let stamps = vec![Stamp::INITIAL; model.groups().len()];
        Ok(Self {
            model,
            settings,
            exchange,
            lender,
            rank,
            world_size,
            shards,
            trainable: Vec::new(),
            states: BTreeMap::new(),
            optimizer,
            pull,
            norms,
            copier,
            stamps,
            last_stamp: Stamp::INITIAL,
            steps: None,
        })
    }

    /// Takes its place in the next generation, with everything it holds but gradients.
    ///
    /// # Errors
    /// [`Error::Model`].
    pub(crate) fn rejoin(&mut self, links: Links) -> Result<(), Error> {
        let (rank, world_size) = (links.host.rank().0, links.host.world_size());
        let shards = sampler::ranks_shards(rank, world_size, self.settings.logical_shards);
        // Gradients of the generation before lie where its ranks may still write.
        self.model.set_trainable(&[])?;
        self.lender = lender_of(&links, &shards);
        self.model.set_gradient_memory(gradient_memory(&self.lender));
        self.exchange = Exchange::new(links);
        self.model.set_trainable(&self.trainable)?;
        (self.rank, self.world_size, self.shards) = (rank, world_size, shards);
        Ok(())
    }

    /// Has the system find memory for a stage that needs so many bytes more, of which so many are gradients. Ends with it; the caller need not
    /// wait.
    pub(crate) fn touch_memory(&self, bytes: u64, gradients: u64) -> impl FnOnce() + Send + 'static {
        let lender = self.lender.clone();
        move || {
            let lent = if lender.is_some() { gradients.min(bytes) } else { 0 };
            runtime::touch_memory(bytes - lent);
            if let (Some(lender), Ok(lent)) = (lender, usize::try_from(lent)) {
                lender.prepare_leases(lent);
            }
        }
    }

    /// Where training stands, for the record of what is exchanged from here on.
    pub(crate) fn note(&self, position: Position) {
        self.exchange.note(position);
    }

    pub(crate) fn rank(&self) -> u32 {
        self.rank
    }

    pub(crate) fn world_size(&self) -> u32 {
        self.world_size
    }

    /// Whether it does for its host what one rank of each host does.
    pub(crate) fn leads_host(&self) -> bool {
        self.exchange.first_of_host().0 == self.rank
    }

    /// The logical shards this rank computes.
    pub(crate) fn shards(&self) -> Range<u32> {
        self.shards.clone()
    }

    pub(crate) fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    pub(crate) fn model(&self) -> &SegmentedModel {
        &self.model
    }

    /// What names the present state of a group.
    pub(crate) fn stamp(&self, group: usize) -> Stamp {
        self.stamps[group]
    }

    /// A stamp for a state that this replica has not held yet.
    pub(crate) fn draw_stamp(&mut self) -> Stamp {
        self.last_stamp = self.last_stamp.next();
        self.last_stamp
    }

    pub(crate) fn last_stamp(&self) -> Stamp {
        self.last_stamp
    }

    /// Draws no stamp up to this one any more.
    pub(crate) fn skip_stamps(&mut self, last: Stamp) {
        self.last_stamp = self.last_stamp.max(last);
    }

    /// Says that the present state of `groups` is another than before.
    pub(crate) fn restamp(&mut self, groups: &[usize]) {
        for &group in groups {
            self.stamps[group] = self.draw_stamp();
        }
    }

    /// Of a group's weights, buffers and optimizer state.
    pub(crate) fn state_bytes(&self, group: usize) -> u64 {
        let parameters = &self.model.groups()[group];
        let buffers = parameters.buffers.iter().map(|(_, buffer)| buffer);
        let state = self.states.get(&group).map(OptimizerState::tensors).unwrap_or_default();
        let state = state.into_iter().map(|(_, tensor)| tensor);
        std::iter::once(&parameters.flat).chain(buffers).chain(state).map(bytes_of).sum()
    }

    /// For running prefixes; what is trainable stays as it is.
    pub(crate) fn model_mut(&mut self) -> &mut SegmentedModel {
        &mut self.model
    }

    /// Makes exactly `groups` (ascending) trainable. A group thawed for the first time gets zero optimizer state; one that freezes keeps its
    /// weights and loses its optimizer state.
    pub(crate) fn set_trainable(&mut self, groups: Vec<usize>) -> Result<(), Error> {
        self.model.set_trainable(&groups)?;
        let frozen: Vec<usize> = self.states.keys().filter(|group| !groups.contains(group)).copied().collect();
        let thawed: Vec<usize> = groups.iter().filter(|group| !self.states.contains_key(group)).copied().collect();
        self.restamp(&frozen);
        self.restamp(&thawed);
        self.states.retain(|group, _| groups.contains(group));
        for group in thawed {
            self.states.insert(group, self.optimizer.fresh(&self.model.groups()[group])?);
        }
        self.trainable = groups;
        self.exchange.forget();
        Ok(())
    }

    /// What samples with these labels count for in the training loss.
    pub(crate) fn weight_of(&self, labels: &[i64]) -> f64 {
        self.settings.weight_of(labels)
    }

    /// Every rank's bytes, in rank order.
    pub(crate) fn gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, Error> {
        Ok(self.exchange.gather(mine)?)
    }

    /// See [`Collective::copy`].
    pub(crate) fn copy(&mut self, from: Rank, to: &[Rank], bytes: Vec<u8>) -> Result<Vec<u8>, Error> {
        Ok(self.exchange.copy(from, to, bytes)?)
    }

    /// The buffers in which batch norms of all groups count their updates.
    pub(crate) fn update_counters(&self) -> Vec<&Tensor> {
        let all: Vec<usize> = (0..self.model.groups().len()).collect();
        self.norms.counters(&self.model, &all)
    }
}

/// Whose memory gradients are to lie in.
fn lender_of(links: &Links, shards: &Range<u32>) -> Option<Arc<dyn Collective>> {
    // With several shards the sum is not made in the model's buffers, but in what they are added up in.
    let lends = links.gpus.is_none() && links.host.world_size() > 1 && shards.len() == 1;
    lends.then(|| Arc::clone(&links.host))
}

fn gradient_memory(lender: &Option<Arc<dyn Collective>>) -> Option<model::GradientMemory> {
    let host = lender.clone()?;
    Some(Box::new(move |elements, kind| reduce::shared(&*host, elements, kind)))
}

/// The batch's inputs as tensors; real-valued ones in the model's element type.
pub(super) fn input_tensors(batch: &Batch, kind: Kind) -> Vec<Tensor> {
    let inputs = batch.inputs.iter().map(|input| {
        let values = match &input.data {
            ArrayData::I64(values) => Tensor::from_slice(values),
            ArrayData::F32(values) => Tensor::from_slice(values).to_kind(kind),
        };
        values.reshape(&input.shape)
    });
    inputs.collect()
}
