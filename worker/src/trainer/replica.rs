//! One rank's copy of the model and its optimizer, and the step that keeps all copies identical.
//!
//! REP-1: only trainable groups have gradients, optimizer state and a part in the norm; a frozen group is absent.
//! REP-2: gradients, losses and batch-norm statistics are summed over logical shards in the fixed tree, never in rank order.
//! REP-3: the update runs only after every sum it needs has come back clean from the collective.

use super::accumulate::run_shard;
use super::hold::{Hold, HoldPoint};
use super::metrics::{self, Tally};
use super::optimizer::{Optimizer, OptimizerState};
use super::prefix::Micro;
use super::reduce::Exchange;
use super::regularize::Pull;
use super::shard_tree::ShardTree;
use crate::collective::Collective;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Instant;
use thaw_core::sampler;
use thaw_data::batch::{ArrayData, Batch};
use thaw_graph::ir::{Arg, Graph, ValueId};
use thaw_proto::ids::Step;
use thaw_proto::run::{Evaluation, Position};
use thaw_proto::spec;
use thaw_torch::SegmentedModel;
use thaw_torch::tch::{Kind, Reduction, Tensor};
use thaw_torch::{model, optim, runtime};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot exchange with the other trainers")]
    Collective(#[from] crate::collective::Error),
    #[error("cannot run the model")]
    Model(#[from] model::Error),
    #[error("cannot update the weights")]
    Update(#[from] optim::Error),
    #[error("cannot use libtorch")]
    Runtime(#[from] runtime::Error),
    #[error("replicas differ after step {step}: ranks {ranks:?} hold other weights or optimizer state than rank 0")]
    Diverged { step: Step, ranks: Vec<usize> },
    #[error("cannot move the weights of layer group {group}")]
    Weights { group: String, source: thaw_torch::tch::TchError },
    #[error("cannot put back the weights of layer group {group}")]
    Restore { group: String, source: thaw_torch::tch::TchError },
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

/// One logical shard's part of a step in micro-batches; none where the shard has no sample left in the epoch.
pub(crate) struct ShardBatch {
    pub(crate) shard: u32,
    pub(crate) micros: Vec<Micro>,
}

/// What one step does besides its data.
pub(crate) struct StepPlan {
    /// Updates done before this one.
    pub(crate) step: Step,
    /// Samples over all shards.
    pub(crate) samples: u32,
    /// Weight of those samples: their number where all classes count the same.
    pub(crate) weight: f64,
    /// Rate per trainable group, ascending.
    pub(crate) rates: Vec<f64>,
    /// Whether this rank has been asked to stand still; one rank asking is enough.
    pub(crate) suspend: bool,
}

/// What a step found. Times are wall seconds.
pub(crate) struct StepReport {
    /// Mean cross-entropy over the step's samples.
    pub(crate) loss: f64,
    /// Over trainable groups, before clipping.
    pub(crate) grad_norm: f64,
    /// False where a non-finite gradient made every rank skip the update.
    pub(crate) applied: bool,
    /// Whether any rank was asked to stand still; the same on every rank.
    pub(crate) suspend: bool,
    pub(crate) forward: f64,
    pub(crate) backward: f64,
    pub(crate) exposed_all_reduce: f64,
    pub(crate) optimizer: f64,
    /// The whole step: the four above, and what lies between them.
    pub(crate) seconds: f64,
    /// Given to be summed with the other ranks'.
    pub(crate) all_reduced_bytes: u64,
}

/// Weights, buffers and optimizer state of one group at one step.
pub(crate) struct GroupSnapshot {
    pub(crate) flat: Tensor,
    pub(crate) buffers: Vec<Tensor>,
    pub(crate) optimizer: Option<OptimizerState>,
}

pub(crate) struct Replica {
    model: SegmentedModel,
    settings: Settings,
    exchange: Exchange,
    rank: u32,
    world_size: u32,
    shards: Range<u32>,
    /// Ascending.
    trainable: Vec<usize>,
    /// Present from a group's first thaw on.
    states: BTreeMap<usize, OptimizerState>,
    optimizer: Optimizer,
    pull: Option<Pull>,
    /// Names of the buffers that batch norms move.
    running_statistics: BTreeSet<String>,
    /// Names of the buffers in which batch norms count their updates.
    update_counters: BTreeSet<String>,
}

impl Replica {
    pub(crate) fn new(
        mut model: SegmentedModel,
        settings: Settings,
        collective: Box<dyn Collective>,
    ) -> Result<Self, Error> {
        let (rank, world_size) = (collective.rank().0, collective.world_size());
        let shards = sampler::ranks_shards(rank, world_size, settings.logical_shards);
        let exchange = Exchange::new(collective);
        let optimizer = Optimizer::new(&settings.optimizer, settings.ema)?;
        let pull = settings.l2_sp.map(|l2_sp| Pull::new(l2_sp, &model));
        let class_weights = settings.class_weights.as_ref();
        let class_weights = class_weights.map(|weights| Tensor::from_slice(weights).to_kind(model.master_kind()));
        model.set_loss(model::Loss { label_smoothing: settings.label_smoothing, class_weights });
        let running_statistics = running_statistics(&model.graph().graph);
        let update_counters = update_counters(&model.graph().graph);
        Ok(Self {
            model,
            settings,
            exchange,
            rank,
            world_size,
            shards,
            trainable: Vec::new(),
            states: BTreeMap::new(),
            optimizer,
            pull,
            running_statistics,
            update_counters,
        })
    }

    pub(crate) fn rank(&self) -> u32 {
        self.rank
    }

    pub(crate) fn world_size(&self) -> u32 {
        self.world_size
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

    /// For running prefixes; what is trainable stays as it is.
    pub(crate) fn model_mut(&mut self) -> &mut SegmentedModel {
        &mut self.model
    }

    /// Makes exactly `groups` (ascending) trainable. A group thawed for the first time gets zero optimizer state; one that freezes keeps its
    /// weights and loses its optimizer state.
    pub(crate) fn set_trainable(&mut self, groups: Vec<usize>) -> Result<(), Error> {
        self.model.set_trainable(&groups)?;
        self.states.retain(|group, _| groups.contains(group));
        for &group in &groups {
            if !self.states.contains_key(&group) {
                self.states.insert(group, self.optimizer.fresh(&self.model.groups()[group])?);
            }
        }
        self.trainable = groups;
        self.exchange.forget();
        Ok(())
    }

    /// One optimizer update over this rank's shards, in ascending shard order.
    pub(crate) fn train_step(&mut self, plan: &StepPlan, batches: Vec<ShardBatch>) -> Result<StepReport, Error> {
        let started = Instant::now();
        let mut losses = ShardTree::new(self.settings.logical_shards);
        let mut moved = ShardTree::new(self.settings.logical_shards);
        let mut gradients: BTreeMap<usize, ShardTree<Tensor>> =
            self.trainable.iter().map(|&group| (group, ShardTree::new(self.settings.logical_shards))).collect();
        let before = self.statistics();
        let counted: Vec<Tensor> =
            handles(&self.model, &self.trainable, &self.update_counters).into_iter().map(Tensor::copy).collect();
        let suspend = f64::from(u8::from(plan.suspend));
        let (mut forward, mut backward) = (0.0, 0.0);
        let last = batches.len().saturating_sub(1);
        let mut tickets = Vec::with_capacity(self.trainable.len());
        for (index, ShardBatch { shard, micros }) in batches.into_iter().enumerate() {
            Hold::at(self.settings.hold.as_ref(), HoldPoint::Forward, plan.step.0);
            let exchange = &mut self.exchange;
            let only = last == 0;
            let mut give = |group: usize, gradient: &Tensor, kept: bool| {
                let tree = gradients.get_mut(&group).expect("one tree per trainable group");
                // A later shard writes into the same buffer.
                let own = if only || kept { gradient.shallow_clone() } else { gradient.copy() };
                tree.push(shard, own, add_tensor);
                if index == last {
                    tickets.push((group, exchange.sum_tensors(tree.take())));
                }
            };
            if micros.is_empty() {
                for &group in self.trainable.iter().rev() {
                    give(group, &self.model.groups()[group].flat.zeros_like(), true);
                }
                losses.push(shard, vec![0.0, suspend, 0.0], |left, right| add_numbers(left, &right));
                if let Some(before) = &before {
                    moved.push(shard, before.zeros_like(), add_tensor);
                }
                continue;
            }
            if let Some(before) = &before {
                put_statistics(&self.model, &self.trainable, &self.running_statistics, before);
            }
            let report = run_shard(&mut self.model, &self.settings, plan, shard, &micros, &mut give)?;
            forward += report.forward;
            backward += report.backward;
            let numbers = vec![report.loss, suspend, f64::from(u8::from(report.moved_statistics))];
            losses.push(shard, numbers, |left, right| add_numbers(left, &right));
            if before.is_some()
                && let Some(after) = statistics(&self.model, &self.trainable, &self.running_statistics)
            {
                moved.push(shard, after * report.weight, add_tensor);
            }
        }
        Hold::at(self.settings.hold.as_ref(), HoldPoint::AllReduce, plan.step.0);
        let waited = Instant::now();
        let numbers = self.exchange.sum_numbers(losses.take());
        let statistics = before.map(|_| self.exchange.sum_tensors(moved.take()));
        let mut sums = BTreeMap::new();
        for (group, ticket) in tickets {
            sums.insert(group, self.exchange.wait_tensor(ticket)?);
        }
        let numbers = self.exchange.wait_numbers(numbers)?;
        let statistics = statistics.map(|ticket| self.exchange.wait_tensor(ticket)).transpose()?;
        let exposed_all_reduce = waited.elapsed().as_secs_f64();
        let updated = Instant::now();
        let (grad_norm, applied) = self.update(plan, &sums)?;
        self.exchange.recycle(sums.into_values());
        if let Some(statistics) = statistics {
            put_statistics(&self.model, &self.trainable, &self.running_statistics, &statistics);
        }
        // One update of the statistics a step, however many shards this rank computed.
        for (counter, before) in handles(&self.model, &self.trainable, &self.update_counters).into_iter().zip(&counted)
        {
            counter.shallow_clone().copy_(&(before + i64::from(numbers[2] > 0.0)));
        }
        let optimizer = updated.elapsed().as_secs_f64();
        let (loss, suspend) = (numbers[0], numbers[1] > 0.0);
        let all_reduced_bytes = self.exchange.take_summed_bytes();
        let seconds = started.elapsed().as_secs_f64();
        Ok(StepReport {
            loss,
            grad_norm,
            applied,
            suspend,
            forward,
            backward,
            exposed_all_reduce,
            optimizer,
            seconds,
            all_reduced_bytes,
        })
    }

    /// Applies reduced gradients, which are identical on every rank, so every rank decides the same.
    fn update(&mut self, plan: &StepPlan, sums: &BTreeMap<usize, Tensor>) -> Result<(f64, bool), Error> {
        let gradients: Vec<&Tensor> = self.trainable.iter().map(|group| &sums[group]).collect();
        let norm = match self.settings.max_grad_norm {
            Some(most) => optim::clip_by_global_norm(&gradients, most)?,
            None => optim::global_norm(&gradients)?,
        };
        if !norm.is_finite() {
            return Ok((norm, false));
        }
        for (index, (&group, &rate)) in self.trainable.iter().zip(&plan.rates).enumerate() {
            if index + 1 == self.trainable.len() {
                // With the groups below already updated: the worst moment to die.
                Hold::at(self.settings.hold.as_ref(), HoldPoint::Update, plan.step.0);
            }
            if let Some(pull) = &self.pull {
                pull.apply(group, &self.model, rate)?;
            }
            let state = self.states.get_mut(&group).expect("a trainable group has optimizer state");
            self.optimizer.step(&self.model.groups()[group], &sums[&group], rate, state)?;
        }
        Ok((norm, true))
    }

    /// What samples with these labels count for in the training loss.
    pub(crate) fn weight_of(&self, labels: &[i64]) -> f64 {
        self.settings.weight_of(labels)
    }

    /// Every rank's bytes, in rank order.
    pub(crate) fn gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, Error> {
        Ok(self.exchange.gather(mine)?)
    }

    /// The buffers in which batch norms of all groups count their updates.
    pub(crate) fn update_counters(&self) -> impl Iterator<Item = &Tensor> {
        let buffers = self.model.groups().iter().flat_map(|group| &group.buffers);
        buffers.filter(|(name, _)| self.update_counters.contains(name)).map(|(_, buffer)| buffer)
    }

    /// This rank's contiguous share of `batches` fixed batches.
    pub(crate) fn evaluation_share(&self, batches: u32) -> Range<u32> {
        sampler::ranks_shards(self.rank, self.world_size, batches)
    }

    /// Exact over all ranks; `next` gives the batches of [`Replica::evaluation_share`] in order.
    pub(crate) fn evaluate<E: From<Error>>(
        &mut self,
        position: Position,
        mut next: impl FnMut(&mut SegmentedModel) -> Option<Result<Micro, E>>,
    ) -> Result<Evaluation, E> {
        let classes = self.settings.classes;
        let mut tally = Tally::new(classes);
        self.swap_in_mean();
        let tallied = loop {
            match next(&mut self.model) {
                None => break Ok(()),
                Some(Err(error)) => break Err(error),
                Some(Ok(micro)) => {
                    if let Err(error) = self.tally(&micro, &mut tally) {
                        break Err(E::from(error));
                    }
                }
            }
        };
        self.swap_in_mean();
        tallied?;
        let gathered = self.exchange.gather(tally.to_bytes()).map_err(|error| E::from(error.into()))?;
        let tallies = gathered
            .iter()
            .enumerate()
            .map(|(rank, bytes)| Tally::from_bytes(bytes, classes).ok_or(Error::Tally { rank }));
        let tallies: Vec<Tally> = tallies.collect::<Result<_, _>>().map_err(E::from)?;
        Ok(metrics::evaluation(position, &tallies, classes))
    }

    fn tally(&mut self, micro: &Micro, tally: &mut Tally) -> Result<(), Error> {
        let inputs = input_tensors(&micro.batch, self.model.master_kind());
        let labels = Tensor::from_slice(&micro.batch.labels);
        let logits = self.model.forward(micro.entry(&inputs))?;
        let losses = logits.cross_entropy_loss(&labels, None::<&Tensor>, Reduction::None, -100, 0.0);
        let predictions = logits.argmax(-1, false);
        let losses = Vec::<f64>::try_from(losses.to_kind(Kind::Double)).unwrap_or_default();
        let predictions = Vec::<i64>::try_from(predictions).unwrap_or_default();
        tally.add(&micro.batch.labels, &losses, &predictions);
        Ok(())
    }

    /// BLAKE3 over all weights, buffers and optimizer state, after checking that every rank holds the same.
    pub(crate) fn digest(&mut self, step: Step) -> Result<blake3::Hash, Error> {
        let mut hasher = blake3::Hasher::new();
        for (index, group) in self.model.groups().iter().enumerate() {
            hash(&mut hasher, &group.flat)?;
            for (_, buffer) in &group.buffers {
                hash(&mut hasher, buffer)?;
            }
            if let Some(state) = self.states.get(&index) {
                for (_, tensor) in state.tensors() {
                    hash(&mut hasher, tensor)?;
                }
                hasher.update(&state.steps().to_le_bytes());
            }
        }
        let mine = hasher.finalize();
        let all = self.exchange.gather(mine.as_bytes().to_vec())?;
        let ranks: Vec<usize> = (0..all.len()).filter(|&rank| all[rank] != all[0]).collect();
        if ranks.is_empty() { Ok(mine) } else { Err(Error::Diverged { step, ranks }) }
    }

    /// The running statistics of trainable groups where several shards move them; else the operator's own update is the right one.
    fn statistics(&self) -> Option<Tensor> {
        let several = self.settings.logical_shards > 1;
        several.then(|| statistics(&self.model, &self.trainable, &self.running_statistics)).flatten()
    }

    /// Copies of the groups that have ever been trained.
    pub(crate) fn snapshot(&self, groups: &[usize]) -> BTreeMap<usize, GroupSnapshot> {
        let copy = |&group: &usize| {
            let parameters = &self.model.groups()[group];
            let snapshot = GroupSnapshot {
                flat: parameters.flat.copy(),
                buffers: parameters.buffers.iter().map(|(_, buffer)| buffer.copy()).collect(),
                optimizer: self.states.get(&group).map(OptimizerState::copy),
            };
            (group, snapshot)
        };
        groups.iter().map(copy).collect()
    }

    /// [`Replica::snapshot`] of what evaluations see: with the mean of the weights in their place, where that is evaluated.
    pub(crate) fn snapshot_evaluated(&mut self, groups: &[usize]) -> BTreeMap<usize, GroupSnapshot> {
        self.swap_in_mean();
        let snapshot = self.snapshot(groups);
        self.swap_in_mean();
        snapshot
    }

    /// Exchanges the weights and their mean, where evaluations are of the mean; a second call exchanges them back.
    fn swap_in_mean(&mut self) {
        if !self.settings.ema.is_some_and(|ema| ema.evaluate) {
            return;
        }
        for (&group, state) in &self.states {
            if let Some(mean) = state.ema() {
                let mut flat = self.model.groups()[group].flat.shallow_clone();
                let weights = flat.copy();
                flat.copy_(mean);
                mean.shallow_clone().copy_(&weights);
            }
        }
    }

    /// Puts copies back, with their optimizer state; a group without any gets fresh state when it is next trained.
    pub(crate) fn restore(&mut self, snapshots: &BTreeMap<usize, GroupSnapshot>) -> Result<(), Error> {
        for (&group, snapshot) in snapshots {
            let parameters = &self.model.groups()[group];
            let buffers = parameters.buffers.iter().map(|(_, buffer)| buffer).zip(&snapshot.buffers);
            for (target, saved) in std::iter::once((&parameters.flat, &snapshot.flat)).chain(buffers) {
                target
                    .shallow_clone()
                    .f_copy_(saved)
                    .map_err(|source| Error::Restore { group: parameters.name.clone(), source })?;
            }
            match &snapshot.optimizer {
                Some(state) => self.states.insert(group, state.copy()),
                None => self.states.remove(&group),
            };
        }
        Ok(())
    }
}

fn add_tensor(left: &mut Tensor, right: Tensor) {
    let _ = left.g_add_(&right);
}

fn add_numbers(left: &mut [f64], right: &[f64]) {
    for (left, right) in left.iter_mut().zip(right) {
        *left += right;
    }
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

fn hash(hasher: &mut blake3::Hasher, tensor: &Tensor) -> Result<(), Error> {
    hasher.update(&model::StateTensor::of("", tensor)?.bytes);
    Ok(())
}

/// Names of the buffers that a batch norm writes.
fn running_statistics(graph: &Graph) -> BTreeSet<String> {
    let norms = graph.nodes.iter().filter(|node| node.operator.contains("batch_norm"));
    let arguments = norms.flat_map(|node| &node.arguments).filter(|argument| argument.name.starts_with("running_"));
    let values: BTreeSet<ValueId> = arguments
        .filter_map(|argument| if let Arg::Tensor(value) = argument.value { Some(value) } else { None })
        .collect();
    graph.buffers.iter().filter(|buffer| values.contains(&buffer.value)).map(|buffer| buffer.name.clone()).collect()
}

/// Names of the buffers that the graph itself counts up.
fn update_counters(graph: &Graph) -> BTreeSet<String> {
    let counts = graph.nodes.iter().filter(|node| node.operator == "aten::add_");
    let values: BTreeSet<ValueId> = counts.filter_map(|node| node.tensor("self")).collect();
    graph.buffers.iter().filter(|buffer| values.contains(&buffer.value)).map(|buffer| buffer.name.clone()).collect()
}

/// Handles to those buffers of `groups` that are named, in order.
fn handles<'a>(model: &'a SegmentedModel, groups: &[usize], names: &BTreeSet<String>) -> Vec<&'a Tensor> {
    let buffers = groups.iter().flat_map(|&group| &model.groups()[group].buffers);
    buffers.filter(|(name, _)| names.contains(name)).map(|(_, buffer)| buffer).collect()
}

/// The running statistics of `groups` as one vector; `None` where there are none.
fn statistics(model: &SegmentedModel, groups: &[usize], names: &BTreeSet<String>) -> Option<Tensor> {
    let parts: Vec<Tensor> = handles(model, groups, names).into_iter().map(|buffer| buffer.flatten(0, -1)).collect();
    if parts.is_empty() { None } else { Some(Tensor::cat(&parts, 0)) }
}

fn put_statistics(model: &SegmentedModel, groups: &[usize], names: &BTreeSet<String>, flat: &Tensor) {
    let mut offset = 0;
    for buffer in handles(model, groups, names) {
        let length = i64::try_from(buffer.numel()).expect("sizes of real tensors fit");
        buffer.shallow_clone().copy_(&flat.narrow(0, offset, length).view_as(buffer));
        offset += length;
    }
}
