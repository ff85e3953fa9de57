//! The worker: the agent of a node, and the trainers it starts.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

pub mod agent;
pub mod checkpoint;
pub mod collective;
pub mod device;
pub mod host_snapshot;
pub mod pipe;
pub mod trainer;
