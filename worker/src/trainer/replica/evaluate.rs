//! Exact evaluation over all ranks, and the proof that all hold the same.

use super::{Error, Replica, input_tensors};
use crate::trainer::metrics::{self, Tally};
use crate::trainer::prefix::Micro;
use std::ops::Range;
use thaw_core::sampler;
use thaw_proto::ids::Step;
use thaw_proto::run::{Evaluation, Position};
use thaw_torch::SegmentedModel;
use thaw_torch::model::StateTensor;
use thaw_torch::tch::{Kind, Reduction, Tensor};

impl Replica {
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
        let of_mean = self.evaluates_mean();
        if of_mean {
            self.exchange_mean();
        }
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
        if of_mean {
            self.exchange_mean();
        }
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
        let mine = self.hash()?;
        let all = self.exchange.gather(mine.as_bytes().to_vec())?;
        let ranks: Vec<usize> = (0..all.len()).filter(|&rank| all[rank] != all[0]).collect();
        if ranks.is_empty() { Ok(mine) } else { Err(Error::Diverged { step, ranks }) }
    }

    /// BLAKE3 over all weights, buffers and optimizer state.
    pub(crate) fn hash(&self) -> Result<blake3::Hash, Error> {
        let mut hasher = blake3::Hasher::new();
        for (index, group) in self.model.groups().iter().enumerate() {
            self.settings.pulse.beat();
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
        Ok(hasher.finalize())
    }
}

fn hash(hasher: &mut blake3::Hasher, tensor: &Tensor) -> Result<(), Error> {
    hasher.update(&StateTensor::sharing("", tensor)?.bytes);
    Ok(())
}
