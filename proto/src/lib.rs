//! The contract: `thaw.v1` messages, ids, checked domain types and the conversions between them.
//!
//! A message arrives as [`pb`], is checked by [`convert`] into the plain types of [`spec`], [`plan`], [`run`] and [`worker`], and everything behind
//! the edge sees only those. [`text`] reads and writes messages as YAML and JSON; [`status`] carries errors over gRPC.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

pub mod convert;
pub mod ids;
pub mod peers;
pub mod plan;
pub mod run;
pub mod spec;
pub mod status;
pub mod text;
pub mod violation;
pub mod worker;

/// The generated messages, clients and servers of package `thaw.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::allow_attributes_without_reason, rustdoc::all, reason = "generated")]
#[rustfmt::skip]
pub mod pb {
    tonic::include_proto!("thaw.v1");
}

/// The compiled protos with their imports and comments, for reflection and dynamic messages.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/thaw_v1.bin"));
