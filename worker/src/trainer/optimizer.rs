//! The optimizer of a run and the state of each group that has thawed, as values that can be copied, saved and read back.

use thaw_proto::spec;
use thaw_torch::model::GroupParameters;
use thaw_torch::optim::{AdamWSettings, AdamWState, Error, Optimizers, SgdSettings, SgdState};
use thaw_torch::tch::{TchError, Tensor};

/// The update rule with its settings; the rate comes with each step.
#[derive(Debug)]
pub(crate) struct Optimizer {
    rule: Rule,
    /// What the mean of the weights keeps of itself at each update, where one is kept.
    ema_decay: Option<f64>,
    operators: Optimizers,
}

#[derive(Debug, Clone, Copy)]
enum Rule {
    AdamW(AdamWSettings),
    Sgd(SgdSettings),
}

/// One group's state.
#[derive(Debug)]
pub(crate) struct OptimizerState {
    rule: RuleState,
    /// Exponential mean of the group's flat weights; at a thaw the weights themselves.
    ema: Option<Tensor>,
}

#[derive(Debug)]
enum RuleState {
    AdamW(AdamWState),
    Sgd(SgdState),
}

impl Optimizer {
    pub(crate) fn new(optimizer: &spec::Optimizer, ema: Option<spec::Ema>) -> Result<Self, Error> {
        let rule = match *optimizer {
            spec::Optimizer::AdamW { weight_decay, beta1, beta2, epsilon } => {
                Rule::AdamW(AdamWSettings { beta1, beta2, eps: epsilon, weight_decay })
            }
            spec::Optimizer::Sgd { weight_decay, momentum, nesterov } => {
                Rule::Sgd(SgdSettings { momentum, dampening: 0.0, nesterov, weight_decay })
            }
        };
        Ok(Self { rule, ema_decay: ema.map(|ema| ema.decay), operators: Optimizers::resolve()? })
    }

    /// Zero state for a group that thaws.
    pub(crate) fn fresh(&self, group: &GroupParameters) -> Result<OptimizerState, Error> {
        let rule = match &self.rule {
            Rule::AdamW(_) => RuleState::AdamW(AdamWState::zeros_for(group)?),
            Rule::Sgd(settings) => RuleState::Sgd(SgdState::zeros_for(group, settings)?),
        };
        Ok(OptimizerState { rule, ema: self.ema_decay.map(|_| group.flat.copy()) })
    }

    /// Updates the group's weights in place.
    pub(crate) fn step(
        &self,
        group: &GroupParameters,
        gradient: &Tensor,
        rate: f64,
        state: &mut OptimizerState,
    ) -> Result<(), Error> {
        match (&self.rule, &mut state.rule) {
            (Rule::AdamW(settings), RuleState::AdamW(state)) => {
                self.operators.adamw(settings, rate, group, gradient, state)?;
            }
            (Rule::Sgd(settings), RuleState::Sgd(state)) => {
                self.operators.sgd(settings, rate, group, gradient, state)?;
            }
            (Rule::AdamW(_), RuleState::Sgd(_)) | (Rule::Sgd(_), RuleState::AdamW(_)) => {
                unreachable!("state is made by the optimizer that uses it")
            }
        }
        if let (Some(decay), Some(ema)) = (self.ema_decay, &mut state.ema) {
            let _same = ema.lerp_(&group.flat, 1.0 - decay);
        }
        Ok(())
    }

    /// The state that [`OptimizerState::tensors`] and [`OptimizerState::steps`] described. `None` where a tensor is missing or does not fit.
    pub(crate) fn restore(
        &self,
        group: &GroupParameters,
        mut tensor: impl FnMut(&str) -> Option<Tensor>,
        steps: u64,
    ) -> Result<Option<OptimizerState>, Error> {
        let mut state = self.fresh(group)?;
        for (name, target) in state.tensors() {
            let Some(saved) = tensor(name) else { return Ok(None) };
            if saved.size() != target.size() || saved.kind() != target.kind() {
                return Ok(None);
            }
            target.shallow_clone().copy_(&saved);
        }
        match &mut state.rule {
            RuleState::AdamW(state) => state.step = counter(steps, &state.step),
            RuleState::Sgd(state) => state.steps = steps,
        }
        Ok(Some(state))
    }
}

impl OptimizerState {
    /// What is saved besides the number of updates.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut tensors = match &self.rule {
            RuleState::AdamW(state) => vec![("exp_avg", &state.exp_avg), ("exp_avg_sq", &state.exp_avg_sq)],
            RuleState::Sgd(state) => state.momentum.iter().map(|momentum| ("momentum", momentum)).collect(),
        };
        tensors.extend(self.ema.iter().map(|ema| ("ema", ema)));
        tensors
    }

    /// The mean of the weights, where one is kept.
    pub(crate) fn ema(&self) -> Option<&Tensor> {
        self.ema.as_ref()
    }

    /// Updates the group has had.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the counter holds whole numbers that are not negative"
    )]
    pub(crate) fn steps(&self) -> u64 {
        match &self.rule {
            RuleState::AdamW(state) => state.step.double_value(&[]) as u64,
            RuleState::Sgd(state) => state.steps,
        }
    }

    /// Takes over another group state's values, into its own memory where it has it.
    pub(crate) fn copy_from(&mut self, other: &Self) -> Result<(), TchError> {
        let fits = |(mine, other): (&(_, &Tensor), &(_, &Tensor))| mine.1.size() == other.1.size();
        let (mine, theirs) = (self.tensors(), other.tensors());
        if mine.len() != theirs.len() || !mine.iter().zip(&theirs).all(fits) {
            *self = other.map(Tensor::copy);
            return Ok(());
        }
        for ((_, mine), (_, theirs)) in mine.into_iter().zip(theirs) {
            mine.shallow_clone().f_copy_(theirs)?;
        }
        match (&mut self.rule, &other.rule) {
            (RuleState::AdamW(mine), RuleState::AdamW(theirs)) => mine.step = theirs.step.copy(),
            (RuleState::Sgd(mine), RuleState::Sgd(theirs)) => mine.steps = theirs.steps,
            (RuleState::AdamW(_), RuleState::Sgd(_)) | (RuleState::Sgd(_), RuleState::AdamW(_)) => {
                unreachable!("a run has one optimizer")
            }
        }
        Ok(())
    }

    /// The state with `copy` of each of its tensors.
    pub(crate) fn map(&self, mut copy: impl FnMut(&Tensor) -> Tensor) -> Self {
        let rule = match &self.rule {
            RuleState::AdamW(state) => RuleState::AdamW(AdamWState {
                exp_avg: copy(&state.exp_avg),
                exp_avg_sq: copy(&state.exp_avg_sq),
                step: copy(&state.step),
            }),
            RuleState::Sgd(state) => {
                RuleState::Sgd(SgdState { momentum: state.momentum.as_ref().map(&mut copy), steps: state.steps })
            }
        };
        Self { rule, ema: self.ema.as_ref().map(copy) }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "the kernel counts in fp32, so the counter has never passed 2^24 unrounded"
)]
fn counter(steps: u64, like: &Tensor) -> Tensor {
    Tensor::from(steps as f64).to_device_(like.device(), like.kind(), false, false)
}
