//! The state of a training, agreed on and copied between the trainers of a new generation. What is agreed, and what holds of a copy (KEEP-n), is
//! said in [`thaw_core::survivors`].
//!
//! ```text
//! all ranks: claim ─▶ agree ─▶ source ── contents, body in chunks ─▶ all in need
//!              ▲         │
//!              └─ load ──┘ a snapshot of the host, where nobody holds a state of use
//! ```

use super::Error;
use super::contents::{Contents, Copies, Whole, held};
use crate::trainer::job::Job;
use crate::trainer::replica::Replica;
use crate::trainer::session;
use crate::trainer::snapshot::Stamp;
use crate::trainer::state::State;
use bytes::BytesMut;
use serde::{Deserialize, Serialize};
use thaw_core::survivors::{self, Agreed, Disagreement, Head, Held, Snapshot, seal};
use thaw_node::host_snapshot::HostSnapshot;
use thaw_proto::ids::Rank;

/// Of a copy; each goes with its hash.
const CHUNK_BYTES: usize = 4 << 20;

/// What a rank says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    /// Absent on a rank that has just started.
    held: Option<Held>,
    /// That it could load.
    snapshot: Option<Snapshot>,
    last_stamp: Stamp,
}

/// Where a generation goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begun {
    /// At the head, which every rank loads by itself.
    Head,
    /// At what all ranks now hold.
    Kept,
    /// The same, which a host had kept when no trainer did.
    Loaded(Snapshot),
}

/// Finds out who has come furthest, and brings everybody there. Leaves no `snapshot`, where it succeeds.
///
/// # Errors
/// [`Error::Differ`] (KEEP-2); [`Error::Behind`] on a rank that must be started again, since it holds a state that is older than the head;
/// [`Error::Peer`]; a peer's loss.
pub(crate) fn agree(
    job: &Job,
    replica: &mut Replica,
    state: &mut Option<Box<State>>,
    snapshot: &mut Option<HostSnapshot>,
    head: Option<Head>,
) -> Result<Begun, session::Error> {
    let mut loaded = None;
    let (all, last_stamp) = loop {
        let own = state.as_deref().map(|state| held(replica, state)).transpose()?;
        let of_host = snapshot.as_ref().map(HostSnapshot::snapshot);
        let claims = exchange(replica, &Claim { held: own, snapshot: of_host, last_stamp: replica.last_stamp() })?;
        let last_stamp = claims.iter().map(|claim| claim.last_stamp).max().unwrap_or(Stamp::INITIAL);
        let (all, snapshots): (Vec<_>, Vec<_>) = claims.into_iter().map(|claim| (claim.held, claim.snapshot)).unzip();
        let Some(chosen) = survivors::to_load(&all, &snapshots, head) else { break (all, last_stamp) };
        loaded = Some(chosen);
        // Claimed no more, whatever becomes of it (KEEP-5).
        if let Some(chosen) = snapshot.take_if(|snapshot| snapshot.snapshot() == chosen) {
            load(chosen, replica, state)?;
        }
    };
    *snapshot = None;
    let (source, agreed, in_need) = match survivors::agree(Rank(replica.rank()), &all, head.map(|head| head.step)) {
        Ok(Agreed::Kept { source, held, in_need }) => (source, held, in_need),
        Ok(Agreed::Head) => return Ok(Begun::Head),
        Err(Disagreement::Behind) => return Err(Error::Behind.into()),
        Err(Disagreement::Differ { step, rank, ranks }) => {
            let ranks = ranks.into_iter().map(|rank| rank.0).collect();
            return Err(Error::Differ { step, rank: rank.0, ranks }.into());
        }
    };
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
    Ok(loaded.map_or(Begun::Kept, Begun::Loaded))
}

/// Makes what the host has kept this trainer's state; one that cannot be used leaves everything as it is.
fn load(snapshot: HostSnapshot, replica: &mut Replica, state: &mut Option<Box<State>>) -> Result<(), session::Error> {
    let Snapshot { step, moves, .. } = snapshot.snapshot();
    let whole = snapshot.read().map_err(|error| thaw_runtime::chain(&error)).and_then(|(contents, body)| {
        let contents = Contents::parse(&contents)?;
        if contents.reached() != (step, moves) {
            return Err("it has come to another step than it says".to_owned());
        }
        contents.decode(body, replica.model().groups(), replica.optimizer())
    });
    match whole {
        Ok(whole) => *state = Some(Box::new(whole.put_into(replica)?)),
        Err(problem) => tracing::warn!(step = step.0, problem, "the state that this host has kept cannot be used"),
    }
    Ok(())
}

fn exchange(replica: &mut Replica, claim: &Claim) -> Result<Vec<Claim>, session::Error> {
    let all = replica.gather(serde_json::to_vec(claim).expect("a claim is plain data"))?;
    let read = |(rank, bytes): (u32, &Vec<u8>)| {
        serde_json::from_slice(bytes).map_err(|error| Error::Peer { rank, problem: error.to_string() }.into())
    };
    (0..).zip(&all).map(read).collect()
}

fn send(job: &Job, replica: &mut Replica, state: &State, to: &[Rank]) -> Result<(), session::Error> {
    let (contents, body) = Copies::of(job, replica, state).encode()?;
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

/// `None` on a rank that does not need it.
fn receive(replica: &mut Replica, from: Rank, to: &[Rank]) -> Result<Option<Whole>, session::Error> {
    // By all, since all follow the copying: ranks call the same operations (COLL-3).
    let contents = checked(replica.copy(from, &others(replica), Vec::new())?, from)?;
    let wrong = |problem: String| Error::Peer { rank: from.0, problem };
    let contents = Contents::parse(&contents).map_err(wrong)?;
    let whole = contents.body_bytes().map_err(wrong)?;
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
    Ok(Some(contents.decode(body.freeze(), replica.model().groups(), replica.optimizer()).map_err(wrong)?))
}
