//! The worker: the trainers that an agent ([`thaw_node::agent`]) starts, and the GPUs they use.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

pub mod device;
pub mod gpus;
pub mod trainer;
