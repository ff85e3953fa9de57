//! What a toy keeps when its gang breaks, and how a new gang agrees on what to go on from: by the trainers' own rules, over toys' weights.

use super::gang::Gang;
use super::{Over, PEER_LIMIT, Toy};
use crate::world::Weights;
use serde::{Deserialize, Serialize};
use thaw_core::survivors::{self, Agreed, Disagreement, Held, open, seal};
use thaw_node::collective::Collective as _;
use thaw_proto::ids::{Rank, Step};
use thaw_proto::pb;
use tokio::time::timeout;

/// Of a copy; so small that there are several.
const CHUNK_BYTES: usize = 16;

/// All of a toy's training.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct State {
    pub(super) step: u64,
    /// Since the beginning, or the checkpoint it resumed from.
    pub(super) moves: u64,
    pub(super) weights: Weights,
}

/// What goes before the chunks of a copy.
#[derive(Debug, Serialize, Deserialize)]
struct Contents {
    step: u64,
    moves: u64,
}

impl State {
    fn held(&self) -> Held {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.step.to_le_bytes()).update(&self.moves.to_le_bytes()).update(&self.weights);
        Held { step: Step(self.step), moves: self.moves, digest: hasher.finalize().to_hex().to_string() }
    }
}

impl Toy {
    /// Brings this rank to where its generation begins, from a peer, from storage, or with what it holds (KEEP-1 to KEEP-3).
    pub(super) async fn agree(&mut self, gang: &mut Gang, resume: Option<&pb::CheckpointRef>) -> Result<State, Over> {
        let own = self.held.as_ref().map(State::held);
        let weights = self.held.as_ref().map(|state| state.weights);
        let who = (self.start.run.as_str(), self.generation, gang.rank());
        self.world.claims(who, own.as_ref(), weights);
        let claim = serde_json::to_vec(&own).unwrap_or_default();
        let all = self.meet(gang, claim).await?;
        let read = |bytes: &Vec<u8>| serde_json::from_slice(bytes);
        let all: Vec<Option<Held>> =
            all.iter().map(read).collect::<Result<_, _>>().map_err(|_| Over::unfit("a claim cannot be read"))?;
        let head = resume.map(|head| Step(head.position.map_or(0, |position| position.step)));
        let state = match survivors::agree(Rank(gang.rank()), &all, head) {
            Ok(Agreed::Head) => self.load_head(resume).await?,
            Ok(Agreed::Kept { source, held, in_need }) => {
                let copied = match in_need.is_empty() {
                    true => None,
                    false => self.copy(gang, source, &held, &in_need).await?,
                };
                match copied.or_else(|| self.held.clone()) {
                    Some(state) => state,
                    None => return Err(Over::unfit("it holds nothing and was given nothing")),
                }
            }
            Err(Disagreement::Behind) => {
                self.world.say(format!("{} is behind the head of {}", self.life, self.start.run));
                return Err(Over::Fails(pb::FailureClass::Retry, pb::RunReason::TrainerLost, "it is behind the head"));
            }
            Err(Disagreement::Differ { .. }) => {
                return Err(Over::Fails(pb::FailureClass::Fatal, pb::RunReason::ReplicasDiverged, "replicas differ"));
            }
        };
        let who = (self.start.run.as_str(), self.generation, gang.rank());
        self.world.begins(who, &self.start.incarnation, state.step, state.weights);
        self.held = Some(state.clone());
        Ok(state)
    }

    /// Gives what it holds to those in need, or takes it over, or is there while others do.
    async fn copy(
        &mut self,
        gang: &mut Gang,
        source: Rank,
        held: &Held,
        in_need: &[Rank],
    ) -> Result<Option<State>, Over> {
        let gives = gang.rank() == source.0;
        let (mut contents, mut chunks) = (Vec::new(), vec![Vec::new(); blake3::OUT_LEN.div_ceil(CHUNK_BYTES)]);
        if gives {
            let Some(State { step, moves, weights }) = self.held.clone() else {
                return Err(Over::unfit("it is to give what it does not hold"));
            };
            contents = seal(serde_json::to_vec(&Contents { step, moves }).unwrap_or_default());
            for (room, chunk) in chunks.iter_mut().zip(weights.chunks(CHUNK_BYTES)) {
                *room = seal(chunk.to_vec());
                if self.dice.permille(self.hazards.garbled) {
                    self.world.say(format!("a chunk of {} is garbled", self.start.run));
                    room[0] ^= 1;
                }
            }
        }
        let contents = Self::give(gang, source, in_need, contents).await?;
        let mut received = Vec::new();
        for chunk in chunks {
            received.push(Self::give(gang, source, in_need, chunk).await?);
        }
        if gives || !in_need.contains(&Rank(gang.rank())) {
            return Ok(None);
        }
        let damaged = |_| Over::Fails(pb::FailureClass::Retry, pb::RunReason::TrainerLost, "a copy arrived damaged");
        let contents = open(contents).map_err(damaged)?;
        let contents: Contents = serde_json::from_slice(&contents).map_err(|_| Over::unfit("a copy cannot be read"))?;
        let mut weights = Vec::new();
        for chunk in received {
            weights.extend(open(chunk).map_err(damaged)?);
        }
        let weights = Weights::try_from(weights).map_err(|_| Over::unfit("a copy has another length"))?;
        let state = State { step: contents.step, moves: contents.moves, weights };
        if !held.is(&state.held().digest) {
            return Err(Over::unfit("a copy has another digest"));
        }
        self.world.say(format!("{} takes over step {} of {}", self.life, state.step, self.start.run));
        Ok(Some(state))
    }

    /// The bytes of rank `source`, on the ranks in need.
    async fn give(gang: &mut Gang, source: Rank, in_need: &[Rank], bytes: Vec<u8>) -> Result<Vec<u8>, Over> {
        let to = in_need.to_vec();
        let copying = gang.operate(move |tree| tree.copy(source, &to, &bytes));
        Ok(timeout(PEER_LIMIT, copying).await.map_err(|_| Over::Broken("a copy does not come"))??)
    }

    async fn load_head(&mut self, resume: Option<&pb::CheckpointRef>) -> Result<State, Over> {
        let (step, weights) = match resume {
            Some(head) => self.load(head).await?,
            None => (0, Weights::default()),
        };
        Ok(State { step, moves: 0, weights })
    }

    /// Something that it keeps changes by itself.
    pub(super) fn rot(&mut self) {
        if let Some(state) = &mut self.held
            && self.dice.permille(self.hazards.rot)
        {
            state.weights[0] ^= 1;
            self.world.rots(&self.start.run);
        }
    }
}
