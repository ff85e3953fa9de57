//! A deterministic simulation of the cluster: the real coordinator (driver, leader, gRPC) and the real agent over a simulated
//! network and clock (turmoil), over a model of etcd, with trainers that have no tensors but the real checkpoint store and collective,
//! and that keep and agree on what they have trained by the real trainers' rules.
//!
//! ```text
//! seed ─▶ plan: topology, workload, faults ─▶ coordinators ◀─ gRPC ─▶ agents ◀─ frames ─▶ toy trainers ─▶ storage
//!                                               │  ▲                                                        │
//!                                               ▼  │                                                        │
//!                                           model of etcd ── every change ──▶ invariants ◀──────────────────┘
//! ```
//!
//! - SIM-1: equal seeds give equal logs: chance, time and order come from the seed alone, and one thread runs at a time.
//! - SIM-2: in the storm anything may happen, and every invariant holds; in the calm after it every run ends.

#![allow(clippy::print_stdout, reason = "its lines are what it is for")]

mod cluster;
mod dice;
pub mod etcd;
mod net;
/// What the coordinator's own tests plan, too.
#[path = "../../../coordinator/tests/common/one_stage.rs"]
mod one_stage;
mod plan;
mod trainer;
mod user;
mod world;

pub use cluster::{Outcome, simulate};
