//! What a node does without tensors: its agent, the pipes to its trainers, sums and exchanges over processors, and what is kept of a run in
//! memory and on storage. It is a crate of its own so that the simulation runs it without libtorch.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

pub mod agent;
pub mod checkpoint;
pub mod collective;
pub mod host_snapshot;
pub mod pipe;
