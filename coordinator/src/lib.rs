//! The coordinator: everything between the pure core and the world. Store, leadership, driver, intake, gRPC.
//!
//! ```text
//! grpc ──▶ driver ──▶ store            one loop: receive, step (thaw-core), save by compare-and-set, then speak
//!   ▲        │  ▲
//!   └────────┘  └── leader             every write carries the leader epoch
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

pub mod clock;
pub mod driver;
pub mod folder;
mod grpc;
pub mod intake;
pub mod journal;
pub mod leader;
mod lines;
pub mod origin;
pub mod recover;
pub mod report;
pub mod server;
pub mod store;
pub mod verify;
pub mod views;
