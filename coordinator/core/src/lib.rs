//! The decisions of Thaw, as pure functions: what a run will do, at which rates, in which sample order, when a stage ends,
//! who is in a gang, and what happens to a run. No I/O, clock, randomness or hash map; every caller (server, trainer, client,
//! simulation) gets the same answer from the same arguments.
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

pub mod culprit;
pub mod gang;
pub mod lr_find;
pub mod manifest;
pub mod planner;
pub mod prefix;
pub mod quarantine;
pub mod run_machine;
pub mod sampler;
pub mod schedule;
pub mod scheduler;
pub mod shared;
pub mod stage_end;
pub mod step_time;
pub mod survivors;
pub mod writers;

#[cfg(test)]
mod test_support;
