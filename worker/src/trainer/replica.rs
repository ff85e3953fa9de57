//! One rank's copy of the model and its optimizer, and the step that keeps all copies identical.
//!
//! REP-1: only trainable groups have gradients, optimizer state and a part in the norm; a frozen group is absent.
//! REP-2: gradients, losses and batch-norm statistics are summed over logical shards in the fixed tree, never in rank order.
//! REP-3: the update runs only after every sum it needs has come back clean from the collective.

use super::accumulate::{Share, run_shard};
use super::hold::{Hold, HoldPoint};
use super::metrics::{self, Tally};
use super::optimizer::{Optimizer, OptimizerState};
use super::prefix::Micro;
use super::reduce::{Exchange, Links, bytes_of};
use super::regularize::Pull;
use super::shard_tree::ShardTree;
use super::snapshot::{Copier, GroupSnapshot, Stamp};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};
use thaw_core::sampler;
use thaw_data::batch::{ArrayData, Batch};
use thaw_graph::ir::{Arg, Graph, ValueId};
use thaw_proto::ids::Step;
use thaw_proto::run::{Evaluation, Position};
use thaw_proto::spec;
use thaw_torch::SegmentedModel;
use thaw_torch::model::StateTensor;
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
}

/// What a rank says to the others with a step; one rank saying it is enough. Read late in the step, and the same on every rank after it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Votes {
    /// Asked to save and stand still.
    pub(crate) suspend: bool,
    /// A checkpoint is due after this step.
    pub(crate) save: bool,
    /// The last checkpoint is still being written.
    pub(crate) busy: bool,
}

impl Votes {
    fn numbers(self) -> [f64; 3] {
        [self.suspend, self.save, self.busy].map(|vote| f64::from(u8::from(vote)))
    }

    fn counted(numbers: &[f64]) -> Self {
        Self { suspend: numbers[0] > 0.0, save: numbers[1] > 0.0, busy: numbers[2] > 0.0 }
    }
}

/// What a step found. Times are wall seconds.
pub(crate) struct StepReport {
    /// Mean cross-entropy over the step's samples.
    pub(crate) loss: f64,
    /// Over trainable groups, before clipping.
    pub(crate) grad_norm: f64,
    /// False where a non-finite gradient made every rank skip the update.
    pub(crate) applied: bool,
    /// Of all ranks.
    pub(crate) votes: Votes,
    pub(crate) forward: f64,
    pub(crate) backward: f64,
    pub(crate) exposed_all_reduce: f64,
    pub(crate) optimizer: f64,
    /// Waiting for the copy of what the update was about to change.
    pub(crate) checkpoint: f64,
    /// The whole step: the five above, and what lies between them.
    pub(crate) seconds: f64,
    /// Given to be summed with the other ranks'.
    pub(crate) all_reduced_bytes: u64,
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
    copier: Copier,
    /// Of each group's present state.
    stamps: Vec<Stamp>,
    last_stamp: Stamp,
}

impl Replica {
    pub(crate) fn new(mut model: SegmentedModel, settings: Settings, links: Links) -> Result<Self, Error> {
        let (rank, world_size) = (links.host.rank().0, links.host.world_size());
        let shards = sampler::ranks_shards(rank, world_size, settings.logical_shards);
        let exchange = Exchange::new(links);
        let optimizer = Optimizer::new(&settings.optimizer, settings.ema)?;
        let pull = settings.l2_sp.map(|l2_sp| Pull::new(l2_sp, &model));
        let class_weights = settings.class_weights.as_ref();
        let on_device = |weights: &Vec<f64>| {
            Tensor::from_slice(weights).f_to_device_(model.device(), model.master_kind(), false, false)
        };
        let class_weights = class_weights.map(on_device).transpose().map_err(Error::Device)?;
        model.set_loss(model::Loss { label_smoothing: settings.label_smoothing, class_weights });
        let running_statistics = running_statistics(&model.graph().graph);
        let update_counters = update_counters(&model.graph().graph);
        let copier = Copier::start().map_err(Error::Thread)?;
        let stamps = vec![Stamp::INITIAL; model.groups().len()];
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
            copier,
            stamps,
            last_stamp: Stamp::INITIAL,
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

    /// What names the present state of a group.
    pub(crate) fn stamp(&self, group: usize) -> Stamp {
        self.stamps[group]
    }

    /// A stamp for a state that this replica has not held yet.
    pub(crate) fn draw_stamp(&mut self) -> Stamp {
        self.last_stamp = self.last_stamp.next();
        self.last_stamp
    }

    fn restamp(&mut self, groups: &[usize]) {
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

    /// One optimizer update over this rank's shards, in ascending shard order.
    pub(crate) fn train_step(
        &mut self,
        plan: &StepPlan,
        batches: Vec<ShardBatch>,
        votes: impl Fn() -> Votes,
    ) -> Result<StepReport, Error> {
        let started = Instant::now();
        let mut found = Vec::with_capacity(batches.len());
        let mut moved = ShardTree::new(self.settings.logical_shards);
        let mut gradients: BTreeMap<usize, ShardTree<Tensor>> =
            self.trainable.iter().map(|&group| (group, ShardTree::new(self.settings.logical_shards))).collect();
        let before = self.statistics();
        let counted: Vec<Tensor> =
            handles(&self.model, &self.trainable, &self.update_counters).into_iter().map(Tensor::copy).collect();
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
                found.push((shard, Share::default(), numbers(false, index == last, &votes)));
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
            let own = numbers(report.moved_statistics, index == last, &votes);
            found.push((shard, report.loss, own));
            if before.is_some()
                && let Some(after) = statistics(&self.model, &self.trainable, &self.running_statistics)
            {
                moved.push(shard, after * report.weight, add_tensor);
            }
        }
        Hold::at(self.settings.hold.as_ref(), HoldPoint::AllReduce, plan.step.0);
        let waited = Instant::now();
        // A rank alone reads them behind the update, where the host has waited for the GPU anyway.
        let shared = if self.exchange.is_alone() {
            None
        } else {
            let numbers = self.with_losses(std::mem::take(&mut found))?;
            Some(self.exchange.sum_numbers(numbers))
        };
        let statistics = before.map(|_| self.exchange.sum_tensors(moved.take()));
        let mut sums = BTreeMap::new();
        let mut norming = Duration::ZERO;
        for (group, ticket) in tickets {
            let sum = self.exchange.wait_tensor(ticket)?;
            let began = Instant::now();
            // While the next sum is still on its way.
            let norm = optim::norm(&sum)?;
            norming += began.elapsed();
            sums.insert(group, (sum, norm));
        }
        let shared = shared.map(|numbers| self.exchange.wait_numbers(numbers)).transpose()?;
        let statistics = statistics.map(|ticket| self.exchange.wait_tensor(ticket)).transpose()?;
        let exposed_all_reduce = (waited.elapsed() - norming).as_secs_f64();
        let updated = Instant::now();
        let (grad_norm, applied) = self.update(plan, &sums)?;
        self.exchange.recycle(sums.into_values().map(|(sum, _)| sum));
        let numbers = match shared {
            Some(numbers) => numbers,
            None => {
                let alone = self.exchange.sum_numbers(self.with_losses(found)?);
                self.exchange.wait_numbers(alone)?
            }
        };
        if let Some(statistics) = statistics {
            put_statistics(&self.model, &self.trainable, &self.running_statistics, &statistics);
        }
        // One update of the statistics a step, however many shards this rank computed.
        for (counter, before) in handles(&self.model, &self.trainable, &self.update_counters).into_iter().zip(&counted)
        {
            counter.shallow_clone().copy_(&(before + i64::from(numbers[1] > 0.0)));
        }
        let checkpoint = self.copier.take_waited().as_secs_f64();
        let optimizer = (norming + updated.elapsed()).as_secs_f64() - checkpoint;
        let all_reduced_bytes = self.exchange.take_summed_bytes();
        let seconds = started.elapsed().as_secs_f64();
        Ok(StepReport {
            loss: numbers[0],
            grad_norm,
            applied,
            votes: Votes::counted(&numbers[2..]),
            forward,
            backward,
            exposed_all_reduce,
            optimizer,
            checkpoint,
            seconds,
            all_reduced_bytes,
        })
    }

    /// The numbers of this rank's shards in tree order, with the losses read.
    fn with_losses(&self, found: Vec<(u32, Share, Vec<f64>)>) -> Result<Vec<Vec<f64>>, Error> {
        let mut tree = ShardTree::new(self.settings.logical_shards);
        for (shard, loss, mut numbers) in found {
            numbers[0] = loss.read()?;
            tree.push(shard, numbers, |left, right| add_numbers(left, &right));
        }
        Ok(tree.take())
    }

    /// Applies reduced gradients, which are identical on every rank, so every rank decides the same.
    /// Each comes with its norm.
    fn update(&mut self, plan: &StepPlan, sums: &BTreeMap<usize, (Tensor, Tensor)>) -> Result<(f64, bool), Error> {
        let norms: Vec<Tensor> = self.trainable.iter().map(|group| sums[group].1.shallow_clone()).collect();
        let norm = match self.settings.max_grad_norm {
            Some(most) => {
                let gradients: Vec<&Tensor> = self.trainable.iter().map(|group| &sums[group].0).collect();
                optim::clip_by_global_norm(&gradients, &norms, most)?
            }
            None => optim::global_norm(&norms)?,
        };
        // A forward has moved the running statistics, whatever becomes of the update.
        let trainable = self.trainable.clone();
        self.restamp(&trainable);
        if !norm.is_finite() {
            return Ok((norm, false));
        }
        self.copier.settle();
        for (index, (&group, &rate)) in self.trainable.iter().zip(&plan.rates).enumerate() {
            if index + 1 == self.trainable.len() {
                // With the groups below already updated: the worst moment to die.
                Hold::at(self.settings.hold.as_ref(), HoldPoint::Update, plan.step.0);
            }
            if let Some(pull) = &self.pull {
                pull.apply(group, &self.model, rate)?;
            }
            let state = self.states.get_mut(&group).expect("a trainable group has optimizer state");
            self.optimizer.step(&self.model.groups()[group], &sums[&group].0, rate, state)?;
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
        let raw = self.swap_in_mean();
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
        self.swap_out_mean(raw);
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
        let labels = labels.f_to_device(logits.device()).map_err(Error::Device)?;
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

    /// Copies of `groups`, which fill beside training; those that `known` has unchanged share its memory.
    pub(crate) fn snapshot(
        &mut self,
        groups: &[usize],
        known: Option<&BTreeMap<usize, GroupSnapshot>>,
    ) -> BTreeMap<usize, GroupSnapshot> {
        let copy = |&group: &usize| {
            let stamp = self.stamps[group];
            let known = known.and_then(|known| known.get(&group)).filter(|known| known.stamp == stamp);
            let parameters = &self.model.groups()[group];
            let buffers = parameters.buffers.iter().map(|(_, buffer)| buffer);
            let copied = || self.copier.copy(stamp, &parameters.flat, buffers, self.states.get(&group));
            (group, known.map_or_else(copied, GroupSnapshot::share))
        };
        groups.iter().map(copy).collect()
    }

    /// [`Replica::snapshot`] of what evaluations see: with the mean of the weights in their place, where that is evaluated.
    pub(crate) fn snapshot_evaluated(
        &mut self,
        groups: &[usize],
        known: Option<&BTreeMap<usize, GroupSnapshot>>,
    ) -> BTreeMap<usize, GroupSnapshot> {
        let raw = self.swap_in_mean();
        let snapshot = self.snapshot(groups, known);
        self.swap_out_mean(raw);
        snapshot
    }

    /// Exchanges the weights and their mean, where evaluations are of the mean. Returns the stamps of the raw weights.
    fn swap_in_mean(&mut self) -> Option<Vec<Stamp>> {
        if !self.settings.ema.is_some_and(|ema| ema.evaluate) {
            return None;
        }
        let raw = self.stamps.clone();
        self.exchange_mean();
        let groups: Vec<usize> = self.states.keys().copied().collect();
        self.restamp(&groups);
        Some(raw)
    }

    fn swap_out_mean(&mut self, raw: Option<Vec<Stamp>>) {
        if let Some(raw) = raw {
            self.exchange_mean();
            self.stamps = raw;
        }
    }

    fn exchange_mean(&mut self) {
        self.copier.settle();
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
        self.copier.settle();
        for (&group, snapshot) in snapshots {
            if self.stamps[group] == snapshot.stamp {
                continue;
            }
            let parameters = &self.model.groups()[group];
            if !snapshot.wait() {
                return Err(Error::Snapshot { group: parameters.name.clone() });
            }
            let buffers = parameters.buffers.iter().map(|(_, buffer)| buffer).zip(&snapshot.buffers);
            for (target, saved) in std::iter::once((&parameters.flat, &snapshot.flat)).chain(buffers) {
                target
                    .shallow_clone()
                    .f_copy_(saved)
                    .map_err(|source| Error::Restore { group: parameters.name.clone(), source })?;
            }
            match (&snapshot.optimizer, self.states.get_mut(&group)) {
                (Some(saved), Some(state)) => state
                    .copy_from(saved)
                    .map_err(|source| Error::Restore { group: parameters.name.clone(), source })?,
                (Some(saved), None) => drop(self.states.insert(group, saved.map(Tensor::copy))),
                (None, _) => drop(self.states.remove(&group)),
            }
            self.stamps[group] = snapshot.stamp;
        }
        Ok(())
    }
}

/// What a shard adds to the numbers that all ranks sum: room for its loss, whether it moved running statistics, and, with the rank's last shard, votes.
fn numbers(moved: bool, is_last: bool, votes: &impl Fn() -> Votes) -> Vec<f64> {
    let votes = if is_last { votes() } else { Votes::default() };
    [0.0, f64::from(u8::from(moved))].into_iter().chain(votes.numbers()).collect()
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
    hasher.update(&StateTensor::sharing("", tensor)?.bytes);
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
