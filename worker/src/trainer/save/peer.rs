//! The state of a training, agreed on and copied between the trainers of a new generation. What is agreed, and what holds of a copy (KEEP-n), is
//! said in [`thaw_core::survivors`].
//!
//! ```text
//! all ranks: claim ─▶ agree ─▶ source ── contents, parts in chunks ─▶ all in need
//! ```

use super::Error;
use super::blob::{self, Encoded, Piece};
use crate::trainer::job::Job;
use crate::trainer::replica::{Extent, Replica};
use crate::trainer::session::{self, Best, Point, State};
use crate::trainer::snapshot::{GroupSnapshot, Stamp};
use crate::trainer::trace::Traced;
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thaw_core::stage_end::RunTracker;
use thaw_core::survivors::{self, Agreed, Disagreement, Held, seal};
use thaw_proto::ids::{Rank, Step};
use thaw_proto::run::{Evaluation, Position, StageResult};
use thaw_proto::spec::BatchNormPolicy;

/// Of a copy; each goes with its hash.
const CHUNK_BYTES: usize = 4 << 20;

/// What a rank says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    /// Absent on a rank that has just started.
    held: Option<Held>,
    last_stamp: Stamp,
}

/// Everything that a copy holds besides tensors.
#[derive(Debug, Serialize, Deserialize)]
struct Contents {
    decided: Decided,
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

/// One state of one group, in the order in which its bytes follow: its weights, then its optimizer state.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Part {
    group: usize,
    stamp: Stamp,
    weights_bytes: usize,
    /// Bytes and updates; absent where it has none.
    optimizer: Option<(usize, u64)>,
}

/// Finds out who has come furthest, and brings everybody there; false where nobody holds anything that is of use. `head`: the step of the
/// head pointer.
///
/// # Errors
/// [`Error::Differ`] (KEEP-2); [`Error::Behind`] on a rank that must be started again, since it holds a state that is older than the head;
/// [`Error::Peer`]; a peer's loss.
pub(crate) fn agree(
    job: &Job,
    replica: &mut Replica,
    state: &mut Option<Box<State>>,
    head: Option<Step>,
) -> Result<bool, session::Error> {
    let own = state.as_deref().map(|state| held(replica, state)).transpose()?;
    let claim = Claim { held: own, last_stamp: replica.last_stamp() };
    let claims = exchange(replica, &claim)?;
    let all: Vec<Option<Held>> = claims.iter().map(|claim| claim.held.clone()).collect();
    let (source, agreed, in_need) = match survivors::agree(Rank(replica.rank()), &all, head) {
        Ok(Agreed::Kept { source, held, in_need }) => (source, held, in_need),
        Ok(Agreed::Head) => return Ok(false),
        Err(Disagreement::Behind) => return Err(Error::Behind.into()),
        Err(Disagreement::Differ { step, rank, ranks }) => {
            let ranks = ranks.into_iter().map(|rank| rank.0).collect();
            return Err(Error::Differ { step, rank: rank.0, ranks }.into());
        }
    };
    let last_stamp = claims.iter().map(|claim| claim.last_stamp).max().unwrap_or(Stamp::INITIAL);
    if !in_need.is_empty() {
        if replica.rank() == source.0 {
            let state = state.as_deref().expect("the source has claimed a state");
            send(job, replica, state, &in_need)?;
        } else if let Some(copied) = receive(replica, source, &in_need)? {
            let taken = copied.put_into(replica)?;
            let found = held(replica, &taken)?;
            if !agreed.is(&found.digest) {
                let problem = format!("it has the digest {}, not {}", found.digest, agreed.digest);
                return Err(Error::Peer { rank: source.0, problem }.into());
            }
            tracing::info!(from = source.0, step = agreed.step.0, "took over a peer's state");
            *state = Some(Box::new(taken));
        }
    }
    // Who has taken over a state has drawn none of the stamps that lead to it (SNAP-2).
    replica.skip_stamps(last_stamp);
    Ok(true)
}

fn held(replica: &Replica, state: &State) -> Result<Held, session::Error> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(replica.hash()?.as_bytes());
    hasher.update(&serde_json::to_vec(&Decided::of(replica, state)).expect("it is plain data"));
    Ok(Held { step: state.position.step, moves: state.moves, digest: hasher.finalize().to_hex().to_string() })
}

fn exchange(replica: &mut Replica, claim: &Claim) -> Result<Vec<Claim>, session::Error> {
    let all = replica.gather(serde_json::to_vec(claim).expect("a claim is plain data"))?;
    let read = |(rank, bytes): (u32, &Vec<u8>)| {
        serde_json::from_slice(bytes).map_err(|error| Error::Peer { rank, problem: error.to_string() }.into())
    };
    (0..).zip(&all).map(read).collect()
}

/// Groups whose present state may differ from what a run begins with.
fn copied_groups(job: &Job, replica: &Replica, state: &State) -> Vec<usize> {
    match job.spec.frozen_batch_norm {
        BatchNormPolicy::Frozen => job.ever_trained(super::last_stage(job, state.position.stage)),
        BatchNormPolicy::Recompute => (0..replica.model().groups().len()).collect(),
    }
}

fn send(job: &Job, replica: &mut Replica, state: &State, to: &[Rank]) -> Result<(), session::Error> {
    let groups = copied_groups(job, replica, state);
    let mut wanted = replica.snapshot(&groups, Extent::Whole, None).into_iter().collect::<Vec<_>>();
    let best = state.best.iter().flat_map(|best| &best.groups);
    let is_present = |group: usize, kept: &GroupSnapshot| groups.contains(&group) && replica.stamp(group) == kept.stamp;
    let apart = best.filter(|(group, kept)| !is_present(**group, kept));
    wanted.extend(apart.map(|(group, kept)| (*group, kept.share())).collect::<Vec<_>>());
    let mut parts = Vec::with_capacity(wanted.len());
    let mut body: Vec<Bytes> = Vec::new();
    for (group, snapshot) in wanted {
        let stamp = snapshot.stamp;
        let Encoded { weights, optimizer } = Piece::new(&replica.model().groups()[group], snapshot).encode()?;
        let length = |pieces: &[Bytes]| pieces.iter().map(Bytes::len).sum::<usize>();
        let weights_bytes = length(&weights);
        body.extend(weights);
        let optimizer = optimizer.map(|(pieces, steps)| {
            let bytes = length(&pieces);
            body.extend(pieces);
            (bytes, steps)
        });
        parts.push(Part { group, stamp, weights_bytes, optimizer });
    }
    let contents = Contents {
        decided: Decided::of(replica, state),
        results: state.results.clone(),
        traced: state.traced.clone(),
        seconds: state.seconds,
        stage_seconds: state.stage_seconds,
        parts,
    };
    let contents = serde_json::to_vec(&contents).expect("it is plain data");
    let from = Rank(replica.rank());
    replica.copy(from, &others(replica), seal(contents))?;
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    for mut piece in body {
        while !piece.is_empty() {
            let taken = piece.split_to(piece.len().min(CHUNK_BYTES - chunk.len()));
            chunk.extend_from_slice(&taken);
            if chunk.len() == CHUNK_BYTES {
                copy_chunk(replica, from, to, seal(std::mem::take(&mut chunk)))?;
            }
        }
    }
    if !chunk.is_empty() {
        copy_chunk(replica, from, to, seal(chunk))?;
    }
    Ok(())
}

/// All ranks meet after each chunk: the deadline of what comes next is not for the whole copy, however large.
fn copy_chunk(replica: &mut Replica, from: Rank, to: &[Rank], chunk: Vec<u8>) -> Result<Vec<u8>, session::Error> {
    let copied = replica.copy(from, to, chunk)?;
    let _all_have_it = replica.gather(Vec::new())?;
    Ok(copied)
}

fn others(replica: &Replica) -> Vec<Rank> {
    (0..replica.world_size()).map(Rank).collect()
}

fn checked(bytes: Vec<u8>, rank: Rank) -> Result<Vec<u8>, Error> {
    survivors::open(bytes).map_err(|problem| Error::Damaged { rank: rank.0, problem })
}

/// A state that has been read whole and not been put anywhere.
struct Copied {
    contents: Contents,
    /// By group and stamp.
    states: BTreeMap<(usize, Stamp), GroupSnapshot>,
    /// Whose it was.
    rank: Rank,
}

/// `None` on a rank that does not need it.
fn receive(replica: &mut Replica, from: Rank, to: &[Rank]) -> Result<Option<Copied>, session::Error> {
    // By all, since all follow the copying: ranks call the same operations (COLL-3).
    let contents = checked(replica.copy(from, &others(replica), Vec::new())?, from)?;
    let wrong = |problem: String| Error::Peer { rank: from.0, problem };
    let contents: Contents = serde_json::from_slice(&contents).map_err(|error| wrong(error.to_string()))?;
    let length = |part: &Part| part.weights_bytes + part.optimizer.map_or(0, |(bytes, _)| bytes);
    let whole: usize = contents.parts.iter().map(length).sum();
    let needs = to.contains(&Rank(replica.rank()));
    let mut body = BytesMut::new();
    for _ in 0..whole.div_ceil(CHUNK_BYTES) {
        let chunk = copy_chunk(replica, from, to, Vec::new())?;
        if needs {
            body.extend_from_slice(&checked(chunk, from)?);
        }
    }
    if !needs {
        return Ok(None);
    }
    if body.len() != whole {
        return Err(wrong(format!("it has {} bytes instead of {whole}", body.len())).into());
    }
    let (mut body, mut states) = (body.freeze(), BTreeMap::new());
    for part in &contents.parts {
        let Some(group) = replica.model().groups().get(part.group) else {
            return Err(wrong(format!("there is no layer group {}", part.group)).into());
        };
        let weights = blob::parse(&body.split_to(part.weights_bytes))?;
        let optimizer =
            part.optimizer.map(|(bytes, steps)| Ok::<_, Error>((blob::parse(&body.split_to(bytes))?, steps)));
        let optimizer = optimizer.transpose()?;
        let of_optimizer = optimizer.as_ref().map(|(tensors, steps)| (tensors, *steps));
        let snapshot =
            blob::snapshot(part.stamp, group, replica.optimizer(), &weights, of_optimizer)?.map_err(wrong)?;
        states.insert((part.group, part.stamp), snapshot);
    }
    Ok(Some(Copied { contents, states, rank: from }))
}

impl Copied {
    fn put_into(self, replica: &mut Replica) -> Result<State, session::Error> {
        let Self { contents, states, rank } = self;
        let Contents { decided, results, traced, seconds, stage_seconds, parts: _ } = contents;
        let missing = |group: usize| Error::Peer { rank: rank.0, problem: format!("layer group {group} is missing") };
        if decided.stamps.len() != replica.model().groups().len() {
            return Err(missing(decided.stamps.len()).into());
        }
        let best = match &decided.best {
            None => None,
            Some(stamps) => {
                let find = |(group, stamp): (&usize, &Stamp)| {
                    let kept = states.get(&(*group, *stamp)).ok_or_else(|| missing(*group))?;
                    Ok::<_, Error>((*group, kept.share()))
                };
                Some(Best { groups: stamps.iter().map(find).collect::<Result<_, _>>()? })
            }
        };
        let present = decided.stamps.iter().enumerate();
        let present = present.filter_map(|(group, stamp)| Some((group, states.get(&(group, *stamp))?.share())));
        replica.adopt(&present.collect(), &decided.stamps)?;
        let Decided { position, point, moves, ended, first_epoch, tracker, deciding, stamps: _, best: _ } = decided;
        Ok(State {
            position,
            ended,
            first_epoch,
            tracker,
            best,
            results,
            deciding,
            point,
            moves,
            seconds,
            stage_seconds,
            traced,
        })
    }
}
