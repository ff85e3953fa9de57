//! Samples, from the files a run names to the arrays a graph takes. Plain vectors in and out: no libtorch, no async runtime.
//!
//! ```text
//! spec::Data ── index::build ──▶ Index (run folder: data/index.json)
//!                                  │  Dataset::open (+ tokenizer.json)
//!                                  ▼
//!                 Dataset::load(part, positions, view) ──▶ Batch      Prefetch runs it ahead on its own threads
//! ```
//!
//! Laws:
//! - `DATA-1` The index is a function of (source bytes, spec, seed, shards): the same on every machine.
//! - `DATA-2` Every sample of a source is in exactly one part, and every training sample in exactly one shard.
//! - `DATA-3` A batch is a function of (index, part, positions, view): no order of calls, thread or rank changes it.
//! - `DATA-4` Bad input is one typed error that names the file, the line, and the way out. Nothing is skipped silently.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

pub mod augment;
pub mod batch;
pub mod fit;
pub mod image;
pub mod index;
mod name;
pub mod prefetch;
mod random;
pub mod text;

pub use augment::View;
pub use batch::{ArrayData, Batch, Dataset, ElementType, InputArray, InputWant};
pub use index::{Index, Part, build};
pub use prefetch::{Prefetch, Work};
