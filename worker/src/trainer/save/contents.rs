//! A whole state as bytes, and back: what a peer sends and what a host keeps are one format.
//!
//! ```text
//! contents: JSON, everything but tensors │ body: the parts' bytes, each its weights and then its optimizer state
//! ```

use super::Error;
use super::blob::{self, Encoded, Piece};
use crate::trainer::job::Job;
use crate::trainer::optimizer::Optimizer;
use crate::trainer::replica::{Extent, Replica};
use crate::trainer::session;
use crate::trainer::snapshot::{GroupSnapshot, Stamp};
use crate::trainer::state::{Best, Point, State};
use crate::trainer::trace::Traced;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thaw_core::stage_end::RunTracker;
use thaw_core::survivors::Held;
use thaw_proto::ids::Step;
use thaw_proto::run::{Evaluation, Position, StageResult};
use thaw_proto::spec::BatchNormPolicy;
use thaw_torch::model::GroupParameters;

/// Everything that a state holds besides tensors.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Contents {
    decided: Decided,
    /// The last that was drawn, which no present state need have.
    last_stamp: Stamp,
    results: Vec<StageResult>,
    traced: Traced,
    seconds: f64,
    stage_seconds: f64,
    parts: Vec<Part>,
}

/// What all ranks that have come equally far hold alike, besides tensors.
#[derive(Debug, Serialize, Deserialize)]
struct Decided {
    position: Position,
    point: Point,
    moves: u64,
    ended: Vec<u32>,
    first_epoch: u32,
    tracker: RunTracker,
    deciding: Option<Evaluation>,
    /// Of each group's present state.
    stamps: Vec<Stamp>,
    /// Of the best weights, by group.
    best: Option<BTreeMap<usize, Stamp>>,
}

impl Decided {
    fn of(replica: &Replica, state: &State) -> Self {
        let best = state.best.as_ref();
        Self {
            position: state.position,
            point: state.point,
            moves: state.moves,
            ended: state.ended.clone(),
            first_epoch: state.first_epoch,
            tracker: state.tracker.clone(),
            deciding: state.deciding.clone(),
            stamps: (0..replica.model().groups().len()).map(|group| replica.stamp(group)).collect(),
            best: best.map(|best| best.groups.iter().map(|(group, kept)| (*group, kept.stamp)).collect()),
        }
    }
}

/// One state of one group, in the order in which its bytes follow.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Part {
    group: usize,
    stamp: Stamp,
    weights_bytes: usize,
    /// Bytes and updates; absent where it has none.
    optimizer: Option<(usize, u64)>,
}

impl Part {
    /// `None` where no memory has so many.
    fn bytes(&self) -> Option<usize> {
        self.weights_bytes.checked_add(self.optimizer.map_or(0, |(bytes, _)| bytes))
    }
}

/// What a rank says of the state it holds.
pub(super) fn held(replica: &Replica, state: &State) -> Result<Held, session::Error> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(replica.hash()?.as_bytes());
    hasher.update(&serde_json::to_vec(&Decided::of(replica, state)).expect("it is plain data"));
    Ok(Held { step: state.position.step, moves: state.moves, digest: hasher.finalize().to_hex().to_string() })
}

/// A state that is copied while training goes on.
pub(crate) struct Copies {
    /// Without its parts.
    contents: Contents,
    pieces: Vec<(usize, Piece)>,
}

impl Copies {
    /// Of the present state. The copies fill beside training.
    pub(super) fn of(job: &Job, replica: &mut Replica, state: &State) -> Self {
        let groups = copied_groups(job, replica, state);
        let best = state.best.as_ref().map(|best| &best.groups);
        let mut wanted: Vec<_> = replica.snapshot(&groups, Extent::Whole, best).into_iter().collect();
        let is_present =
            |group: usize, kept: &GroupSnapshot| groups.contains(&group) && replica.stamp(group) == kept.stamp;
        let apart = best.into_iter().flatten().filter(|(group, kept)| !is_present(**group, kept));
        wanted.extend(apart.map(|(group, kept)| (*group, kept.share())));
        let piece = |(group, snapshot)| (group, Piece::new(&replica.model().groups()[group], snapshot));
        Self {
            contents: Contents {
                decided: Decided::of(replica, state),
                last_stamp: replica.last_stamp(),
                results: state.results.clone(),
                traced: state.traced.clone(),
                seconds: state.seconds,
                stage_seconds: state.stage_seconds,
                parts: Vec::new(),
            },
            pieces: wanted.into_iter().map(piece).collect(),
        }
    }

    /// Its copy of a group's state with this stamp.
    pub(super) fn find(&self, group: usize, stamp: Stamp) -> Option<GroupSnapshot> {
        self.pieces.iter().find(|(of, piece)| *of == group && piece.stamp == stamp).map(|(_, piece)| piece.share())
    }

    /// Contents, and body in pieces; once the copies have their values.
    pub(super) fn encode(self) -> Result<(Vec<u8>, Vec<Bytes>), Error> {
        let (mut contents, mut body) = (self.contents, Vec::new());
        let length = |pieces: &[Bytes]| pieces.iter().map(Bytes::len).sum::<usize>();
        for (group, piece) in self.pieces {
            let Encoded { weights, optimizer } = piece.encode()?;
            let weights_bytes = length(&weights);
            body.extend(weights);
            let optimizer = optimizer.map(|(pieces, steps)| {
                let bytes = length(&pieces);
                body.extend(pieces);
                (bytes, steps)
            });
            contents.parts.push(Part { group, stamp: piece.stamp, weights_bytes, optimizer });
        }
        Ok((serde_json::to_vec(&contents).expect("it is plain data"), body))
    }
}

/// Groups whose present state may differ from what a run begins with.
fn copied_groups(job: &Job, replica: &Replica, state: &State) -> Vec<usize> {
    match job.spec.frozen_batch_norm {
        BatchNormPolicy::Frozen => job.ever_trained(super::last_stage(job, state.position.stage)),
        BatchNormPolicy::Recompute => (0..replica.model().groups().len()).collect(),
    }
}

/// A state that has been read and checked whole, and not been put anywhere (KEEP-3).
#[derive(Debug)]
pub(super) struct Whole {
    contents: Contents,
    /// By group and stamp.
    states: BTreeMap<(usize, Stamp), GroupSnapshot>,
}

impl Contents {
    /// Reads them; what is wrong with them in words otherwise.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes).map_err(|error| format!("its contents cannot be read: {error}"))
    }

    /// Of the body.
    pub(super) fn body_bytes(&self) -> Result<usize, String> {
        let all = self.parts.iter().try_fold(0_usize, |sum, part| sum.checked_add(part.bytes()?));
        all.ok_or_else(|| "its parts are larger than any memory".to_owned())
    }

    /// How far it has come: the last step it has applied, and moves.
    pub(super) fn reached(&self) -> (Step, u64) {
        (self.decided.position.step, self.decided.moves)
    }

    /// With its body, as the states of these layer groups; what does not fit in words otherwise.
    pub(super) fn decode(
        self,
        mut body: Bytes,
        groups: &[GroupParameters],
        optimizer: &Optimizer,
    ) -> Result<Whole, String> {
        let whole = self.body_bytes()?;
        if body.len() != whole {
            return Err(format!("it has {} bytes instead of {whole}", body.len()));
        }
        if self.decided.stamps.len() != groups.len() {
            return Err(format!("it has {} layer groups instead of {}", self.decided.stamps.len(), groups.len()));
        }
        let mut states = BTreeMap::new();
        for part in &self.parts {
            let group = groups.get(part.group).ok_or_else(|| format!("there is no layer group {}", part.group))?;
            let mut read = |bytes| blob::parse(&body.split_to(bytes)).map_err(|error| thaw_runtime::chain(&error));
            let weights = read(part.weights_bytes)?;
            let of_optimizer = match part.optimizer {
                Some((bytes, steps)) => Some((read(bytes)?, steps)),
                None => None,
            };
            let of_optimizer = of_optimizer.as_ref().map(|(tensors, steps)| (tensors, *steps));
            let snapshot = blob::snapshot(part.stamp, group, optimizer, &weights, of_optimizer);
            states.insert((part.group, part.stamp), snapshot.map_err(|error| thaw_runtime::chain(&error))??);
        }
        let lost = |(group, stamp): &(&usize, &Stamp)| !states.contains_key(&(**group, **stamp));
        if let Some((group, _)) = self.decided.best.iter().flatten().find(lost) {
            return Err(format!("the best state of layer group {group} is missing"));
        }
        Ok(Whole { contents: self, states })
    }
}

impl Whole {
    /// Makes the replica what it was a copy of.
    pub(super) fn put_into(self, replica: &mut Replica) -> Result<State, session::Error> {
        let Self { contents, states } = self;
        let Contents { decided, last_stamp, results, traced, seconds, stage_seconds, parts: _ } = contents;
        let best = decided.best.map(|stamps| {
            let find = |(group, stamp): (usize, Stamp)| (group, states[&(group, stamp)].share());
            Best { groups: stamps.into_iter().map(find).collect() }
        });
        let present = decided.stamps.iter().enumerate();
        let present = present.filter_map(|(group, stamp)| Some((group, states.get(&(group, *stamp))?.share())));
        replica.adopt(&present.collect(), &decided.stamps)?;
        // Who has taken over a state has drawn none of the stamps that lead to it (SNAP-2).
        replica.skip_stamps(last_stamp);
        Ok(State {
            position: decided.position,
            ended: decided.ended,
            first_epoch: decided.first_epoch,
            tracker: decided.tracker,
            best,
            results,
            deciding: decided.deciding,
            point: decided.point,
            moves: decided.moves,
            seconds,
            stage_seconds,
            traced,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use thaw_core::stage_end::Judge;
    use thaw_proto::spec;
    use thaw_torch::tch::Tensor;

    fn group(name: &str, weights: &[f32]) -> GroupParameters {
        GroupParameters {
            name: name.to_owned(),
            flat: Tensor::from_slice(weights),
            decay_elements: weights.len(),
            parameters: Vec::new(),
            buffers: vec![("mean".to_owned(), Tensor::from_slice(&[7_i64]))],
        }
    }

    fn groups() -> Vec<GroupParameters> {
        vec![group("first", &[0.0; 3]), group("second", &[0.0; 2])]
    }

    fn optimizer() -> Optimizer {
        let rule = spec::Optimizer::AdamW { weight_decay: 0.0, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
        Optimizer::new(&rule, None).unwrap()
    }

    fn stamp(number: u32) -> Stamp {
        (0..number).fold(Stamp::INITIAL, |stamp, _| stamp.next())
    }

    /// Step 5 of a run whose second layer group trains, and was best before that.
    fn copies() -> Copies {
        let state = |stamp: Stamp, weights: &[f32], trains: bool| {
            let group = group("second", weights);
            let state = trains.then(|| optimizer().fresh(&group).unwrap());
            let buffers = vec![Tensor::from_slice(&[9_i64])];
            (1, Piece::new(&group, GroupSnapshot::of(stamp, Tensor::from_slice(weights), buffers, state)))
        };
        let position = Position { step: Step(5), ..Position::default() };
        let decided = Decided {
            position,
            point: Point::Training,
            moves: 11,
            ended: vec![2],
            first_epoch: 1,
            tracker: RunTracker::new(Judge { metric: spec::Metric::EvalLoss, min_delta: 0.1 }),
            deciding: None,
            stamps: vec![Stamp::INITIAL, stamp(4)],
            best: Some(BTreeMap::from([(1, stamp(3))])),
        };
        let contents = Contents {
            decided,
            last_stamp: stamp(6),
            results: Vec::new(),
            traced: Traced::default(),
            seconds: 0.1,
            stage_seconds: 0.2,
            parts: Vec::new(),
        };
        Copies { contents, pieces: vec![state(stamp(4), &[1.5, -2.0], true), state(stamp(3), &[0.5, 0.25], false)] }
    }

    fn encoded() -> (Contents, Bytes) {
        let (contents, body) = copies().encode().unwrap();
        (Contents::parse(&contents).unwrap(), Bytes::from(body.concat()))
    }

    fn problem(contents: Contents, body: Bytes) -> String {
        contents.decode(body, &groups(), &optimizer()).unwrap_err()
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let (contents, body) = encoded();
        assert_eq!((contents.reached(), contents.body_bytes().unwrap()), ((Step(5), 11), body.len()));
        let whole = contents.decode(body, &groups(), &optimizer()).unwrap();
        let present = &whole.states[&(1, stamp(4))];
        assert_eq!(Vec::<f32>::try_from(&present.flat).unwrap(), [1.5, -2.0]);
        assert_eq!((present.buffers[0].int64_value(&[0]), present.optimizer.as_ref().unwrap().steps()), (9, 0));
        let best = &whole.states[&(1, stamp(3))];
        assert_eq!((best.flat.double_value(&[0]), best.optimizer.is_none()), (0.5, true));
        assert_eq!((whole.states.len(), whole.contents.last_stamp), (2, stamp(6)));
        assert_eq!((whole.contents.seconds, whole.contents.decided.ended), (0.1, vec![2]));
        let own = copies();
        assert!(own.find(1, stamp(3)).is_some() && own.find(0, stamp(3)).is_none() && own.find(1, stamp(5)).is_none());
    }

    /// KEEP-3: before anything is put anywhere.
    #[test]
    fn what_does_not_fit_is_named() {
        type Change = fn(&mut Contents);
        let table: [(Change, &str); 8] = [
            (|contents| contents.parts[1].group = 2, "there is no layer group 2"),
            // As wide as the other group, which has a part of that name too.
            (|contents| contents.parts[1].group = 0, "group first has no weights that fit"),
            (|contents| contents.parts[0].weights_bytes = usize::MAX, "larger than any memory"),
            (|contents| contents.parts[0].weights_bytes += 1, "bytes instead of"),
            (|contents| contents.parts.swap(0, 1), "group second has no weights that fit"),
            (|contents| contents.parts[1].stamp = stamp(5), "the best state of layer group 1 is missing"),
            (|contents| contents.decided.stamps.push(stamp(1)), "it has 3 layer groups instead of 2"),
            (|contents| contents.parts.truncate(1), "bytes instead of"),
        ];
        for (change, expected) in table {
            let (mut contents, body) = encoded();
            change(&mut contents);
            let found = problem(contents, body);
            assert!(found.contains(expected), "{found:?} is not {expected:?}");
        }
        let (contents, body) = encoded();
        let state = contents.parts[0].bytes().unwrap();
        // Its optimizer state where its weights should be.
        let turned = [&body[contents.parts[0].weights_bytes..state], &body[..contents.parts[0].weights_bytes]].concat();
        let found = problem(contents, [&turned, &body[state..]].concat().into());
        assert!(found.contains("group second has no weights that fit"), "{found}");
        let whole = copies().encode().unwrap().0;
        for end in 0..whole.len() {
            assert!(Contents::parse(&whole[..end]).is_err(), "{end} bytes");
        }
    }

    #[test]
    fn no_cut_or_changed_byte_panics() {
        let (_, body) = encoded();
        for at in 0..body.len() {
            assert!(problem(encoded().0, body.slice(..at)).contains("bytes instead of"));
            let mut changed = body.to_vec();
            changed[at] ^= 0x55;
            let _either = encoded().0.decode(changed.into(), &groups(), &optimizer());
        }
    }
}
