//! Exported PyTorch graphs as data: reading `.pt2` archives, dividing them into layer groups, fitting heads, writing them back. Pure: no libtorch.
//!
//! ```text
//! Archive::open -> with_head -> graph -> segment -> summary
//!                      |                              (planner)
//!                      `-> write, with trained weights
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

pub mod archive;
pub mod boundary;
mod cost;
pub mod cuts;
mod flow;
pub mod groups;
pub mod guards;
pub mod head;
pub mod init;
pub mod ir;
mod memory;
mod modules;
pub mod operators;
pub mod payload;
pub mod reader;
mod schema;
pub mod segment;
mod sizes;
pub mod summary;
pub mod symbols;
#[cfg(test)]
mod test_support;
mod work;
pub mod writer;

pub use archive::{Archive, TensorBytes};
pub use boundary::{Boundary, CutDim, CutValue, InputNeed, boundary, prefix_identity};
pub use cuts::segment;
pub use groups::GroupRule;
pub use head::{Attach, HeadSpec, NewParameter};
pub use init::{Init, buffer_init, scratch_init};
pub use memory::{Activations, activations};
pub use segment::{Segment, SegmentedGraph};
pub use summary::{GroupSummary, InputSummary, Summary, parameter_decays, summary};
pub use work::{GroupWork, Work, work};
