//! Sums and exchanges over the trainers of one generation.
//!
//! Law:
//! - `SUM-2`: a reduction adds along the tree over logical shards ([`thaw_core::sampler::tree`]), so its result is the same bits on every rank and for
//!   every world size.
//! - `COLL-1`: every operation has a deadline, and [`Collective::abort`] from another thread ends it at once; so do connecting and [`Abort`].
//! - `COLL-2`: an interrupted operation never looks finished: it returns an error, what it wrote to `out` has no meaning,
//!   and every later operation of that collective fails too.
//! - `COLL-3`: all ranks call the same operations in the same order; where they do not, both sides get
//!   [`Error::Mismatch`], never a wrong sum.
//!
//! Gradients on GPUs are summed by NCCL beside it (`thaw_worker::gpus`); everything small stays with the host's collective, which also tells
//! of a dead peer and carries NCCL's id.
//!
//! It never decides who belongs to the gang, and never mends itself: after an error a new generation builds a new one.

mod abort;
mod error;
mod gang;
mod handshake;
mod hosts;
mod local;
mod peers;
mod queue;
mod ring;
mod tcp;
#[cfg(test)]
mod tests;
mod tree;
mod wire;

pub use abort::Abort;
pub use error::{Error, Refusal};
pub use gang::Tree;
pub use handshake::{HostId, Listener, Membership, Options};
pub use peers::Links;
pub use queue::{ReduceQueue, Ticket};
pub use ring::{Entry, Movement, Pulse, Record, Ring, RingAddress, Wait};

use thaw_proto::ids::Rank;
use thaw_shm::Lease;

/// The trainers of one generation, as one of them sees them.
pub trait Collective: Send + Sync {
    /// This trainer's position in the gang.
    fn rank(&self) -> Rank;

    /// How many trainers the gang has.
    fn world_size(&self) -> u32;

    /// The lowest of the ranks that share this rank's memory; itself where it shares none.
    fn first_of_host(&self) -> Rank;

    /// How many logical shards the reductions add over.
    fn shards(&self) -> u32;

    /// Adds over all shards, in tree order. `parts` are this rank's sums of its maximal subtrees
    /// ([`thaw_core::sampler::tree::maximal_subtrees`]), ascending, each
    /// as long as `out`; none where the rank holds no shard. On success every rank has the same bits in `out`.
    ///
    /// # Errors
    /// See [`Error`]; then `out` has no meaning.
    fn reduce_shards_f32(&self, parts: &[&[f32]], out: &mut [f32]) -> Result<(), Error>;

    /// [`Collective::reduce_shards_f32`] in double precision.
    ///
    /// # Errors
    /// See [`Error`]; then `out` has no meaning.
    fn reduce_shards_f64(&self, parts: &[&[f64]], out: &mut [f64]) -> Result<(), Error>;

    /// [`Collective::reduce_shards_f32`] for a rank with one part, which the sum replaces. Ranks may choose either, each for itself. Fastest
    /// where all choose this one, with values in memory that they leased.
    ///
    /// # Errors
    /// See [`Error`]; then the values have no meaning.
    fn reduce_in_place_f32(&self, values: &mut [f32]) -> Result<(), Error>;

    /// [`Collective::reduce_in_place_f32`] in double precision.
    ///
    /// # Errors
    /// See [`Error`]; then the values have no meaning.
    fn reduce_in_place_f64(&self, values: &mut [f64]) -> Result<(), Error>;

    /// Memory that the other ranks of this host read and write where it lies, during reductions in place. `None` where there are none, or no
    /// room is left.
    fn lease(&self, bytes: usize) -> Option<Lease>;

    /// Has the system find pages for leases that come to so many bytes: who takes them later does not wait for it.
    fn prepare_leases(&self, bytes: usize);

    /// Gives every rank the bytes of every rank, in rank order. Lengths may differ.
    ///
    /// # Errors
    /// See [`Error`].
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error>;

    /// Gives the ranks in `to` the bytes of rank `from`; all ranks call it, with the same ranks. Returns them where this rank is in `to`, and
    /// nothing elsewhere. `bytes` is read on `from` alone.
    ///
    /// # Errors
    /// See [`Error`].
    fn copy(&self, from: Rank, to: &[Rank], bytes: &[u8]) -> Result<Vec<u8>, Error>;

    /// The first peer that is known to be gone, without any operation.
    fn lost_peer(&self) -> Option<Rank>;

    /// What its operations are recorded in.
    fn record(&self) -> &Record;

    /// Ends the operation in flight, here and by that on the peers, and every later one. Callable from any thread, at any
    /// time, more than once; never blocks on an operation.
    fn abort(&self);
}

/// A number that can be summed: `f32` or `f64`.
pub(crate) trait Element: bytemuck::Pod + Default + std::ops::Add<Output = Self> {
    const KIND: wire::Kind;
}

impl Element for f32 {
    const KIND: wire::Kind = wire::Kind::ReduceF32;
}

impl Element for f64 {
    const KIND: wire::Kind = wire::Kind::ReduceF64;
}
