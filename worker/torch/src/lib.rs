//! libtorch for Thaw: operators by name, the graph executor, gradients, fused optimizers. The only crate with `unsafe`.
//!
//! From the bottom up: `csrc/shim.cpp` calls the dispatcher and the autograd engine; [`op`] and [`autograd`] make that safe;
//! [`executor`] runs a `thaw-graph` graph with it; [`model`] owns weights and trains segment by segment; [`optim`] updates them.
//! Tensors are `tch`'s throughout.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

pub mod autograd;
pub mod cuda;
pub mod executor;
mod ffi;
pub mod model;
pub mod nccl;
pub mod op;
pub mod optim;
pub mod rows;
pub mod runtime;

pub use executor::{MemoryFormat, Precision};
pub use model::SegmentedModel;
pub use tch;
