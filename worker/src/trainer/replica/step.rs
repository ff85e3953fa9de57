//! One optimizer update: this rank's shards, the sums over all ranks, the update.

use super::{Error, Replica};
use crate::trainer::accumulate::{Share, run_shard};
use crate::trainer::hold::{Hold, HoldPoint};
use crate::trainer::pace::StepSeconds;
use crate::trainer::prefix::Micro;
use crate::trainer::reduce::{Arrival, Exchanged};
use crate::trainer::shard_tree::ShardTree;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use thaw_proto::ids::Step;
use thaw_torch::optim;
use thaw_torch::tch::Tensor;

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

/// What a step found.
pub(crate) struct StepReport {
    /// Mean cross-entropy over the step's samples.
    pub(crate) loss: f64,
    /// Over trainable groups, before clipping.
    pub(crate) grad_norm: f64,
    /// False where a non-finite gradient made every rank skip the update.
    pub(crate) applied: bool,
    /// Of all ranks.
    pub(crate) votes: Votes,
    /// Without what comes before the step.
    pub(crate) seconds: StepSeconds,
    /// Given to be summed with the other ranks'.
    pub(crate) all_reduced_bytes: u64,
}

/// What this rank has computed in a step, with the sums of its gradients on their way.
struct Computed {
    /// By group, in the order in which they were begun.
    sums: Vec<(usize, Exchanged<Tensor>)>,
    /// Every rank's last gradient.
    arrival: Option<Arrival>,
    /// Of each shard: its part of the loss, and what all ranks add up besides.
    numbers: Vec<(u32, Share, Vec<f64>)>,
    /// Running statistics by shard, weighted.
    moved: ShardTree<Tensor>,
    forward: f64,
    backward: f64,
}

/// A gradient summed over all ranks, and its norm.
type Normed = (Tensor, Tensor);

/// What all ranks have summed.
struct Summed {
    gradients: BTreeMap<usize, Normed>,
    /// Absent on a rank that is alone: it reads them behind the update, where the host has waited for the GPU anyway.
    numbers: Option<Vec<f64>>,
    statistics: Option<Tensor>,
    straggler_wait: Duration,
    exposed_all_reduce: Duration,
    norming: Duration,
}

impl Replica {
    /// One optimizer update over this rank's shards, in ascending shard order.
    pub(crate) fn train_step(
        &mut self,
        plan: &StepPlan,
        batches: Vec<ShardBatch>,
        votes: impl Fn() -> Votes,
    ) -> Result<StepReport, Error> {
        let started = Instant::now();
        if let Some(held) = self.steps.filter(|held| *held != plan.step) {
            return Err(Error::Miscounted { asked: plan.step, held });
        }
        // Where one shard is all there is, the operator's own update of its statistics is the right one.
        let several = self.settings.logical_shards > 1;
        let before = several.then(|| self.norms.statistics(&self.model, &self.trainable)).flatten();
        let counted = self.norms.counters(&self.model, &self.trainable).into_iter().map(Tensor::copy).collect();
        let several_here = batches.len() > 1;
        let mut computed = self.compute(plan, batches, before.as_ref(), &votes)?;
        Hold::at(self.settings.hold.as_ref(), HoldPoint::AllReduce, plan.step.0);
        let (forward, backward) = (computed.forward, computed.backward);
        let alone = self.exchange.is_alone().then(|| std::mem::take(&mut computed.numbers));
        let summed = match self.collect(computed, before.is_some()) {
            Ok(summed) => summed,
            Err(error) => {
                // The forward has moved what only a whole step may move (REP-4).
                if let Some(before) = &before {
                    self.norms.put_statistics(&self.model, &self.trainable, before);
                }
                self.count_updates(counted, false);
                return Err(error);
            }
        };
        // Since the last step: an evaluation of the mean, or putting back the best weights, waits too.
        let waited_before = self.copier.take_waited();
        let updated = Instant::now();
        let (grad_norm, applied, clipping) = self.update(plan, &summed.gradients)?;
        self.steps = Some(plan.step.next());
        // Of a single shard they are the model's own buffers.
        if several_here {
            self.exchange.recycle(summed.gradients.into_values().map(|(sum, _)| sum));
        }
        let waited = self.copier.take_waited();
        let optimizer = updated.elapsed() - clipping - waited;
        let numbers = match (summed.numbers, alone) {
            (Some(numbers), _) => numbers,
            (None, own) => {
                let own = self.with_losses(own.unwrap_or_default())?;
                let sum = self.exchange.sum_numbers(own);
                self.exchange.wait_numbers(sum)?
            }
        };
        if let Some(statistics) = &summed.statistics {
            self.norms.put_statistics(&self.model, &self.trainable, statistics);
        }
        self.count_updates(counted, numbers[1] > 0.0);
        let seconds = StepSeconds {
            forward,
            backward,
            straggler_wait: summed.straggler_wait.as_secs_f64(),
            exposed_all_reduce: summed.exposed_all_reduce.as_secs_f64(),
            clipping: (summed.norming + clipping).as_secs_f64(),
            optimizer: optimizer.as_secs_f64(),
            checkpoint: (waited_before + waited).as_secs_f64(),
            whole: started.elapsed().as_secs_f64(),
            ..StepSeconds::default()
        };
        let votes = Votes::counted(&numbers[2..]);
        let all_reduced_bytes = self.exchange.take_summed_bytes();
        Ok(StepReport { loss: numbers[0], grad_norm, applied, votes, seconds, all_reduced_bytes })
    }

    /// Runs this rank's shards, each from the running statistics `before`, and begins a group's sum as soon as its gradient is final.
    fn compute(
        &mut self,
        plan: &StepPlan,
        batches: Vec<ShardBatch>,
        before: Option<&Tensor>,
        votes: &impl Fn() -> Votes,
    ) -> Result<Computed, Error> {
        let Self { model, settings, exchange, trainable, norms, .. } = self;
        let tree = || ShardTree::new(settings.logical_shards);
        let mut gradients: BTreeMap<usize, ShardTree<Tensor>> =
            trainable.iter().map(|&group| (group, tree())).collect();
        let (mut sums, mut arrival) = (Vec::with_capacity(trainable.len()), None);
        let (mut numbers, mut moved) = (Vec::with_capacity(batches.len()), tree());
        let (mut forward, mut backward) = (0.0, 0.0);
        let last = batches.len().saturating_sub(1);
        for (index, ShardBatch { shard, micros }) in batches.into_iter().enumerate() {
            Hold::at(settings.hold.as_ref(), HoldPoint::Forward, plan.step.0);
            let only = last == 0;
            let mut give = |group: usize, gradient: &Tensor, kept: bool| {
                let tree = gradients.get_mut(&group).expect("one tree per trainable group");
                // A later shard writes into the same buffer.
                let own = match () {
                    () if only || kept => gradient.shallow_clone(),
                    () if index == 0 => exchange.own_copy(gradient),
                    () => gradient.copy(),
                };
                tree.push(shard, own, add_tensor);
                if index == last {
                    let parts = tree.take();
                    if trainable.first() == Some(&group) {
                        arrival = exchange.arrive(parts.len());
                    }
                    sums.push((group, exchange.sum_tensors(parts)));
                }
            };
            if micros.is_empty() {
                for &group in trainable.iter().rev() {
                    give(group, &model.groups()[group].flat.zeros_like(), true);
                }
                numbers.push((shard, Share::default(), shard_numbers(false, index == last, votes)));
                if let Some(before) = before {
                    moved.push(shard, before.zeros_like(), add_tensor);
                }
                continue;
            }
            if let Some(before) = before {
                norms.put_statistics(model, trainable, before);
            }
            let report = run_shard(model, settings, plan, shard, &micros, &mut give)?;
            forward += report.forward;
            backward += report.backward;
            numbers.push((shard, report.loss, shard_numbers(report.moved_statistics, index == last, votes)));
            if let Some(after) = before.and_then(|_| norms.statistics(model, trainable)) {
                moved.push(shard, after * report.weight, add_tensor);
            }
        }
        Ok(Computed { sums, arrival, numbers, moved, forward, backward })
    }

    /// Waits for what all ranks add up. A sum's norm is taken while the next one is still on its way.
    fn collect(&mut self, mut computed: Computed, has_statistics: bool) -> Result<Summed, Error> {
        let waited = Instant::now();
        let numbers = if self.exchange.is_alone() {
            None
        } else {
            let own = self.with_losses(std::mem::take(&mut computed.numbers))?;
            Some(self.exchange.sum_numbers(own))
        };
        let statistics = has_statistics.then(|| self.exchange.sum_tensors(computed.moved.take()));
        let mut gradients = BTreeMap::new();
        let mut norming = Duration::ZERO;
        for (group, ticket) in computed.sums {
            let sum = self.exchange.wait_tensor(ticket)?;
            let began = Instant::now();
            let norm = optim::norm(&sum)?;
            norming += began.elapsed();
            gradients.insert(group, (sum, norm));
        }
        let numbers = numbers.map(|numbers| self.exchange.wait_numbers(numbers)).transpose()?;
        let statistics = statistics.map(|ticket| self.exchange.wait_tensor(ticket)).transpose()?;
        let whole = waited.elapsed() - norming;
        let behind = computed.arrival.map(|arrival| self.exchange.waited_for_others(arrival, waited)).transpose()?;
        let straggler_wait = behind.unwrap_or_default().min(whole);
        let exposed_all_reduce = whole - straggler_wait;
        Ok(Summed { gradients, numbers, statistics, straggler_wait, exposed_all_reduce, norming })
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
    /// Returns their norm, whether it was finite, and what finding it and clipping took.
    fn update(&mut self, plan: &StepPlan, sums: &BTreeMap<usize, Normed>) -> Result<(f64, bool, Duration), Error> {
        let began = Instant::now();
        let norms: Vec<Tensor> = self.trainable.iter().map(|group| sums[group].1.shallow_clone()).collect();
        let norm = match self.settings.max_grad_norm {
            Some(most) => {
                let gradients: Vec<&Tensor> = self.trainable.iter().map(|group| &sums[group].0).collect();
                optim::clip_by_global_norm(&gradients, &norms, most)?
            }
            None => optim::global_norm(&norms)?,
        };
        let clipping = began.elapsed();
        // A forward has moved the running statistics, whatever becomes of the update.
        let trainable = self.trainable.clone();
        self.restamp(&trainable);
        if !norm.is_finite() {
            return Ok((norm, false, clipping));
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
            self.settings.pulse.beat();
        }
        Ok((norm, true, clipping))
    }

    /// One update of the statistics a step, however many shards this rank computed.
    fn count_updates(&self, before: Vec<Tensor>, moved: bool) {
        for (counter, before) in self.norms.counters(&self.model, &self.trainable).into_iter().zip(before) {
            counter.shallow_clone().copy_(&(before + i64::from(moved)));
        }
    }
}

/// What a shard adds to the numbers that all ranks sum: room for its loss, whether it moved running statistics, and, with the rank's last
/// shard, votes.
fn shard_numbers(moved: bool, is_last: bool, votes: &impl Fn() -> Votes) -> Vec<f64> {
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
