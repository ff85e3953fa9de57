//! L2-SP (Li, Grandvalet and Davoine 2018): the backbone is pulled towards the weights it started from, the head towards 0.
//!
//! Decoupled, as AdamW's decay: before its update a weight moves by rate times the pull, whatever its gradient's scale.

use super::replica::Error;
use thaw_proto::spec;
use thaw_torch::SegmentedModel;
use thaw_torch::tch::Tensor;

#[derive(Debug)]
pub(super) struct Pull {
    settings: spec::L2Sp,
    /// Flat weights of every group as the run started; none for the head, which is the last.
    starts: Vec<Tensor>,
}

impl Pull {
    /// Takes note of the weights that the run starts from.
    pub(super) fn new(settings: spec::L2Sp, model: &SegmentedModel) -> Self {
        let backbone = model.groups().split_last().map_or(&[][..], |(_, backbone)| backbone);
        Self { settings, starts: backbone.iter().map(|group| group.flat.copy()).collect() }
    }

    /// Moves a group's weights.
    pub(super) fn apply(&self, group: usize, model: &SegmentedModel, rate: f64) -> Result<(), Error> {
        let mut flat = model.groups()[group].flat.shallow_clone();
        let moved = match self.starts.get(group) {
            Some(start) => flat.f_lerp_(start, rate * self.settings.alpha),
            None => flat.f_mul_scalar_(1.0 - rate * self.settings.beta),
        };
        moved.map(drop).map_err(|source| Error::Weights { group: model.groups()[group].name.clone(), source })
    }
}
