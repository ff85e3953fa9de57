//! Fused AdamW and SGD over flat buffers, and clipping by global norm.
//!
//! OPT-1: a step over a flat buffer equals `torch.optim` with `fused=True` over the same two tensors (the part with weight decay and the part
//!        without), bit for bit.
//! OPT-2: state belongs to the caller, who may save it between any two steps; it is made when a group thaws.

use tch::{Kind, Tensor};

use crate::autograd::GradMode;
use crate::model::GroupParameters;
use crate::op::{self, Operator, Value};
use crate::runtime::note_write;

/// Why an update could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Operator(#[from] op::Error),
    #[error("cannot {what}")]
    Tensor { what: &'static str, source: tch::TchError },
}

fn failed(what: &'static str) -> impl Fn(tch::TchError) -> Error {
    move |source| Error::Tensor { what, source }
}

/// AdamW's settings, as `torch.optim.AdamW` names them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

/// A group's moments and step counter.
#[derive(Debug)]
pub struct AdamWState {
    /// As the group's flat buffer.
    pub exp_avg: Tensor,
    /// As the group's flat buffer.
    pub exp_avg_sq: Tensor,
    /// Updates made: fp32, no dimensions.
    pub step: Tensor,
}

impl AdamWState {
    /// Zero moments for a group that thaws.
    ///
    /// # Errors
    /// With libtorch's text.
    pub fn zeros_for(group: &GroupParameters) -> Result<Self, Error> {
        let zeros = || group.flat.f_zeros_like().map_err(failed("allocate optimizer state"));
        let step = Tensor::f_zeros([0_i64; 0], (Kind::Float, group.flat.device()))
            .map_err(failed("allocate optimizer state"))?;
        Ok(Self { exp_avg: zeros()?, exp_avg_sq: zeros()?, step })
    }
}

/// SGD's settings, as `torch.optim.SGD` names them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdSettings {
    pub momentum: f64,
    pub dampening: f64,
    pub nesterov: bool,
    pub weight_decay: f64,
}

/// A group's momentum and step counter.
#[derive(Debug)]
pub struct SgdState {
    /// As the group's flat buffer; absent without momentum. The first update sets it to the gradient.
    pub momentum: Option<Tensor>,
    /// Updates made.
    pub steps: u64,
}

impl SgdState {
    /// State for a group that thaws.
    ///
    /// # Errors
    /// With libtorch's text.
    pub fn zeros_for(group: &GroupParameters, settings: &SgdSettings) -> Result<Self, Error> {
        let has_momentum = settings.momentum != 0.0;
        let momentum = has_momentum.then(|| group.flat.f_zeros_like()).transpose();
        Ok(Self { momentum: momentum.map_err(failed("allocate optimizer state"))?, steps: 0 })
    }
}

/// The update operators, resolved once.
#[derive(Debug)]
pub struct Optimizers {
    adamw: Operator,
    sgd: Operator,
}

impl Optimizers {
    /// Resolves them.
    ///
    /// # Errors
    /// Where this libtorch lacks one.
    pub fn resolve() -> Result<Self, Error> {
        Ok(Self { adamw: op::resolve("aten::_fused_adamw_", "")?, sgd: op::resolve("aten::_fused_sgd_", "")? })
    }

    /// One AdamW update of a group at learning rate `rate`, in place.
    ///
    /// # Errors
    /// With libtorch's text.
    pub fn adamw(
        &self,
        settings: &AdamWSettings,
        rate: f64,
        group: &GroupParameters,
        gradient: &Tensor,
        state: &mut AdamWState,
    ) -> Result<(), Error> {
        let _mode = GradMode::set(false);
        let _same = state.step.f_add_scalar_(1).map_err(failed("count an update"))?;
        for span in spans(group, settings.weight_decay) {
            let of = |tensor: &Tensor| span.of(tensor);
            let (weights, gradient) = (of(&group.flat)?, of(gradient)?);
            let (exp_avg, exp_avg_sq) = (of(&state.exp_avg)?, of(&state.exp_avg_sq)?);
            let arguments = [
                Value::Tensors(&[&weights]),
                Value::Tensors(&[&gradient]),
                Value::Tensors(&[&exp_avg]),
                Value::Tensors(&[&exp_avg_sq]),
                Value::Tensors(&[]),
                Value::Tensors(&[&state.step]),
                Value::Float(rate),
                Value::Float(settings.beta1),
                Value::Float(settings.beta2),
                Value::Float(span.weight_decay),
                Value::Float(settings.eps),
                Value::Bool(false),
                Value::Bool(false),
            ];
            self.adamw.call(&arguments)?;
        }
        note_write(&group.flat);
        Ok(())
    }

    /// One SGD update of a group at learning rate `rate`, in place.
    ///
    /// # Errors
    /// With libtorch's text.
    pub fn sgd(
        &self,
        settings: &SgdSettings,
        rate: f64,
        group: &GroupParameters,
        gradient: &Tensor,
        state: &mut SgdState,
    ) -> Result<(), Error> {
        let _mode = GradMode::set(false);
        for span in spans(group, settings.weight_decay) {
            let (weights, gradient) = (span.of(&group.flat)?, span.of(gradient)?);
            let momentum = state.momentum.as_ref().map(|tensor| span.of(tensor)).transpose()?;
            let momenta: Vec<&Tensor> = momentum.iter().collect();
            let arguments = [
                Value::Tensors(&[&weights]),
                Value::Tensors(&[&gradient]),
                Value::Tensors(&momenta),
                Value::Float(span.weight_decay),
                Value::Float(settings.momentum),
                Value::Float(rate),
                Value::Float(settings.dampening),
                Value::Bool(settings.nesterov),
                Value::Bool(false),
                Value::Bool(state.steps == 0),
            ];
            self.sgd.call(&arguments)?;
        }
        note_write(&group.flat);
        state.steps += 1;
        Ok(())
    }
}

/// A part of a flat buffer with one weight decay.
struct Span {
    start: i64,
    length: i64,
    weight_decay: f64,
}

impl Span {
    fn of(&self, flat: &Tensor) -> Result<Tensor, Error> {
        flat.f_narrow(0, self.start, self.length).map_err(failed("view a part of a flat buffer"))
    }
}

/// The parts with and without weight decay, empty ones left out.
fn spans(group: &GroupParameters, weight_decay: f64) -> Vec<Span> {
    let signed = |count: usize| i64::try_from(count).expect("a buffer has fewer than 2^63 elements");
    let (middle, end) = (signed(group.decay_elements), signed(group.flat.numel()));
    let parts = [
        Span { start: 0, length: middle, weight_decay },
        Span { start: middle, length: end - middle, weight_decay: 0.0 },
    ];
    parts.into_iter().filter(|span| span.length > 0).collect()
}

/// A gradient's own norm: no dimensions. What [`global_norm`] and [`clip_by_global_norm`] are made of, for whoever has gradients one by one.
///
/// # Errors
/// With libtorch's text.
pub fn norm(gradient: &Tensor) -> Result<Tensor, Error> {
    let _mode = GradMode::set(false);
    gradient.f_norm().map_err(failed(NORM))
}

/// The common norm of gradients with these norms, as `torch.nn.utils.clip_grad_norm_` with no bound returns it. 0 for none.
///
/// # Errors
/// With libtorch's text.
pub fn global_norm(norms: &[Tensor]) -> Result<f64, Error> {
    let _mode = GradMode::set(false);
    match norm_of_norms(norms)? {
        Some(total) => total.f_double_value(&[]).map_err(failed(NORM)),
        None => Ok(0.0),
    }
}

/// Scales gradients in place so that their common norm is at most `max`, as `torch.nn.utils.clip_grad_norm_`. `norms` are their own, in the
/// same order. Returns the common norm before.
///
/// # Errors
/// With libtorch's text.
pub fn clip_by_global_norm(gradients: &[&Tensor], norms: &[Tensor], max: f64) -> Result<f64, Error> {
    let _mode = GradMode::set(false);
    let Some(total) = norm_of_norms(norms)? else { return Ok(0.0) };
    let coefficient =
        total.f_add_scalar(1e-6).and_then(|norm| norm.f_reciprocal()).and_then(|inverse| inverse.f_mul_scalar(max));
    let coefficient = coefficient.and_then(|value| value.f_clamp_max(1.0)).map_err(failed(NORM))?;
    // A product with one changes no bit, and costs a pass over all gradients. The norm is read in any case.
    #[expect(clippy::float_cmp, reason = "exactly one")]
    if coefficient.f_double_value(&[]).map_err(failed(NORM))? != 1.0 {
        for gradient in gradients {
            let _same = gradient.shallow_clone().f_mul_(&coefficient).map_err(failed(NORM))?;
        }
    }
    total.f_double_value(&[]).map_err(failed(NORM))
}

const NORM: &str = "take the gradients' norm";

/// No dimensions. `None` for no gradients.
fn norm_of_norms(norms: &[Tensor]) -> Result<Option<Tensor>, Error> {
    if norms.is_empty() {
        return Ok(None);
    }
    Tensor::f_stack(norms, 0).and_then(|norms| norms.f_norm()).map(Some).map_err(failed(NORM))
}
