//! Copies of a replica's state, and their way back.

use super::{Error, Replica};
use crate::trainer::optimizer::OptimizerState;
use crate::trainer::snapshot::{GroupSnapshot, Stamp};
use std::collections::BTreeMap;
use thaw_torch::tch::Tensor;

/// What of a group is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Weights and buffers.
    Weights,
    /// Optimizer state as well.
    Whole,
}

impl Replica {
    /// Copies of `groups`, which fill beside training; those that `known` has unchanged share its memory.
    pub(crate) fn snapshot(
        &mut self,
        groups: &[usize],
        extent: Extent,
        known: Option<&BTreeMap<usize, GroupSnapshot>>,
    ) -> BTreeMap<usize, GroupSnapshot> {
        self.copies(groups, extent, known, false)
    }

    /// `of_mean`: with the mean of the weights in their place, where there is one.
    fn copies(
        &mut self,
        groups: &[usize],
        extent: Extent,
        known: Option<&BTreeMap<usize, GroupSnapshot>>,
        of_mean: bool,
    ) -> BTreeMap<usize, GroupSnapshot> {
        let copy = |&group: &usize| {
            let stamp = self.stamp_of(group, extent);
            let known = known.and_then(|known| known.get(&group)).filter(|known| known.stamp == stamp);
            let parameters = &self.model.groups()[group];
            let buffers = parameters.buffers.iter().map(|(_, buffer)| buffer);
            let state = self.states.get(&group);
            let mean = state.filter(|_| of_mean).and_then(OptimizerState::ema);
            let weights = mean.unwrap_or(&parameters.flat);
            let state = state.filter(|_| extent == Extent::Whole);
            let copied = || self.copier.copy(stamp, weights, buffers, state);
            (group, known.map_or_else(copied, GroupSnapshot::share))
        };
        groups.iter().map(copy).collect()
    }

    /// What names so much of a group's present state.
    pub(crate) fn stamp_of(&self, group: usize, extent: Extent) -> Stamp {
        let stamp = self.stamps[group];
        let left_out = extent == Extent::Weights && self.states.contains_key(&group);
        if left_out { stamp.of_weights() } else { stamp }
    }

    /// [`Replica::snapshot`] of what evaluations see: with the mean of the weights in their place, where that is evaluated. Who goes on from it
    /// has both in one, so that evaluations still see the same.
    pub(crate) fn snapshot_evaluated(
        &mut self,
        groups: &[usize],
        extent: Extent,
        known: Option<&BTreeMap<usize, GroupSnapshot>>,
    ) -> BTreeMap<usize, GroupSnapshot> {
        if !self.evaluates_mean() {
            return self.snapshot(groups, extent, known);
        }
        // The copies are no state that the replica has been in.
        let raw = self.stamps.clone();
        let averaged: Vec<usize> = self.states.keys().copied().collect();
        self.restamp(&averaged);
        let copies = self.copies(groups, extent, known, true);
        self.stamps = raw;
        copies
    }

    pub(super) fn evaluates_mean(&self) -> bool {
        self.settings.ema.is_some_and(|ema| ema.evaluate)
    }

    /// Exchanges the weights and their mean.
    pub(super) fn exchange_mean(&mut self) {
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
        let changed = snapshots.iter().filter(|(group, snapshot)| self.stamps[**group] != snapshot.stamp);
        let changed = changed.map(|(group, snapshot)| (*group, snapshot.share())).collect();
        self.put(&changed)
    }

    /// Becomes what a peer is: its states of these groups, whatever this replica held, and the stamps of all groups.
    pub(crate) fn adopt(&mut self, snapshots: &BTreeMap<usize, GroupSnapshot>, stamps: &[Stamp]) -> Result<(), Error> {
        self.put(snapshots)?;
        self.stamps.copy_from_slice(stamps);
        self.steps = None;
        Ok(())
    }

    fn put(&mut self, snapshots: &BTreeMap<usize, GroupSnapshot>) -> Result<(), Error> {
        self.copier.settle();
        for (&group, snapshot) in snapshots {
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
