//! The frozen prefix of a stage: run once per sample where it can be, kept, and put together into batches that enter at the boundary.
//!
//! ```text
//! positions ─▶ Source ─ missing rows, by length ─▶ chunk ─▶ model.prefix ─▶ fresh rows, shelves (node's cache)
//!                 └──────────────── assemble ◀──────────────────────────────────┘
//! ```
//!
//! PFX-1: what a sample's prefix gives is a function of the untouched groups below the boundary, of the sample and its view, and of the shape it is
//!        computed in; that shape follows from the sample alone (its length, rounded up), never from its batch, its rank, or the cache.
//!        So kept, evicted, recomputed, or read from another run are the same bits.
//! PFX-2: a prefix is used only while no group below the boundary has ever been trained in this run, and none of its parameters is shared
//!        with a group above.
//! PFX-3: a cache that is full, slow or damaged costs time and never changes a result.
//! PFX-4: where lengths differ, all ranks run their prefixes in the same steps, for as many steps ahead: ranks wait for each other in every
//!        step, so chunks that fall into different ones would cost the sum of both.

mod chunk;
mod shelf;
mod source;

pub use shelf::CacheFolders;
pub(crate) use source::Source;

use super::job::Job;
use super::replica::Replica;
use chunk::Shapes;
use shelf::{Form, Known, Shelf};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thaw_data::augment::View;
use thaw_data::batch::{Batch, Dataset};
use thaw_data::index::Part;
use thaw_data::prefetch::Work;
use thaw_graph::{Boundary, CutDim, InputNeed};
use thaw_node::collective::Pulse;
use thaw_proto::plan::PlannedStage;
use thaw_torch::SegmentedModel;
use thaw_torch::model::Entry;
use thaw_torch::rows::{self, Rows};
use thaw_torch::tch::{TchError, Tensor};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot load samples")]
    Data(#[from] thaw_data::batch::Error),
    #[error("cannot run the frozen prefix")]
    Model(#[from] thaw_torch::model::Error),
    #[error("cannot put a batch together")]
    Tensor(#[from] TchError),
    #[error("cannot start a loading thread")]
    Thread(#[from] std::io::Error),
    #[error("a newer gang is proposed")]
    Superseded,
    #[error("prefix_cache.mode is `required`, but the stage {stage} cannot use it: {problem}")]
    Required { stage: String, problem: String },
}

/// A micro-batch: its samples, and where it enters the model.
pub(crate) struct Micro {
    /// Without inputs where nothing above the boundary reads them.
    pub(crate) batch: Batch,
    /// `None`: at the graph's inputs.
    pub(crate) cut: Option<Cut>,
}

/// What crosses a boundary for a micro-batch.
pub(crate) struct Cut {
    pub(crate) boundary: Arc<Boundary>,
    /// `[batch, ...]` each.
    pub(crate) values: Vec<Tensor>,
}

impl Micro {
    /// Where it enters, `inputs` being its batch's.
    pub(crate) fn entry<'a>(&'a self, inputs: &'a [Tensor]) -> Entry<'a> {
        match &self.cut {
            None => Entry::Inputs(inputs),
            Some(Cut { boundary, values }) => {
                Entry::Cut { boundary, values, inputs: Some(inputs).filter(|inputs| !inputs.is_empty()) }
            }
        }
    }
}

/// One sample's record in its source; the same whatever the split.
type Record = u32;

/// A sample to run the prefix on.
#[derive(Clone, Copy)]
struct Row<'a> {
    batch: &'a Batch,
    row: usize,
    view: Option<View>,
}

/// Rows of a chunk that has just been computed.
#[derive(Clone)]
struct Fresh {
    /// One for each value that crosses.
    values: Rc<Vec<Rows>>,
    row: usize,
    /// Tokens, padding not counted; 0 for images.
    length: u32,
}

/// What happened since the counts were last taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Samples whose prefix was computed.
    pub(crate) computed: u64,
    /// Samples that came from the cache.
    pub(crate) cached: u64,
    /// In prefix forwards, reads and writes.
    pub(crate) time: Duration,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.computed += other.computed;
        self.cached += other.cached;
        self.time += other.time;
    }
}

/// See the module.
pub(crate) struct Prefix {
    dataset: Dataset,
    boundary: Arc<Boundary>,
    /// The stage's boundary first, then those of later stages that are filled in the same pass.
    shelves: Vec<Shelf>,
    shapes: Shapes,
    /// Steps that it is run for at a time (PFX-4).
    steps_ahead: usize,
    /// Computed and not yet used.
    fresh: BTreeMap<(Part, u32, Option<View>), Fresh>,
    counts: Counts,
    scratch: Vec<u8>,
    given_up: Box<dyn Fn() -> bool>,
    pulse: Pulse,
}

impl Prefix {
    /// The prefix below a stage's lowest group. `None` where there is nothing to gain, with the reason in the log. It is not run for a gang that
    /// is given up.
    pub(crate) fn of_stage(
        job: &Job,
        stage: &PlannedStage,
        replica: &Replica,
        given_up: impl Fn() -> bool + 'static,
    ) -> Result<Option<Self>, Error> {
        let model = replica.model();
        let shapes = Shapes::of(job, model.device());
        let steps_ahead = shapes.steps_ahead(job, stage, replica.world_size());
        match shelf::open_stage(job, stage, model) {
            Ok(Some((boundary, shelves))) => Ok(Some(Self {
                dataset: job.dataset.clone(),
                boundary: Arc::new(boundary),
                shelves,
                shapes,
                steps_ahead,
                fresh: BTreeMap::new(),
                counts: Counts::default(),
                scratch: Vec::new(),
                given_up: Box::new(given_up),
                pulse: job.pulse.clone(),
            })),
            Ok(None) => Ok(None),
            Err(problem) => {
                if job.spec.prefix_cache.mode == thaw_proto::spec::PrefixCacheMode::Required {
                    return Err(Error::Required { stage: stage.name.clone(), problem });
                }
                tracing::info!(stage = stage.name, problem, "the frozen prefix runs with every batch");
                Ok(None)
            }
        }
    }

    pub(crate) fn steps_ahead(&self) -> usize {
        self.steps_ahead
    }

    pub(crate) fn take_counts(&mut self) -> Counts {
        std::mem::take(&mut self.counts)
    }

    fn record(&self, part: Part, position: u32) -> Record {
        self.dataset.index().records(part)[position as usize]
    }

    /// Whether a sample's row is at hand, computed or kept.
    fn has(&self, part: Part, position: u32, view: Option<View>) -> bool {
        let is_fresh = self.fresh.contains_key(&(part, position, view));
        is_fresh || self.shelves[0].contains(part, self.record(part, position), view)
    }

    /// Runs the prefix over one chunk: rows of loaded batches of one length class, at most a chunk's worth.
    fn compute(&mut self, model: &mut SegmentedModel, part: Part, rows: &[Row<'_>]) -> Result<(), Error> {
        if (self.given_up)() {
            return Err(Error::Superseded);
        }
        let began = Instant::now();
        let first = rows[0];
        let class = self.shapes.class(first.batch.lengths.get(first.row).copied());
        let mut padded: Vec<(&Batch, usize)> = rows.iter().map(|row| (row.batch, row.row)).collect();
        // Always full (PFX-1): kernels may choose their way by the number of rows.
        padded.resize(self.shapes.samples(class), padded[0]);
        let chunk = self.dataset.gather(&padded, class);
        let inputs = super::replica::input_tensors(&chunk, model.master_kind());
        let boundaries: Vec<&Boundary> = self.shelves.iter().map(Shelf::boundary).collect();
        let found = model.prefix(&inputs, &boundaries)?;
        for (index, values) in found.iter().enumerate() {
            let values = values.iter().map(Rows::of).collect::<Result<Vec<_>, _>>()?;
            let values = Rc::new(values);
            for (row, Row { batch, row: place, view }) in rows.iter().copied().enumerate() {
                let position = batch.samples[place];
                let length = batch.lengths.get(place).copied().unwrap_or(0);
                let fresh = Fresh { values: Rc::clone(&values), row, length };
                let record = self.record(part, position);
                self.shelves[index].keep(part, record, view, &fresh);
                if index == 0 {
                    self.fresh.insert((part, position, view), fresh);
                }
            }
        }
        tracing::debug!(columns = class, samples = rows.len(), room = padded.len(), took = ?began.elapsed(), "ran a chunk of the frozen prefix");
        self.counts.computed += rows.len() as u64;
        self.counts.time += began.elapsed();
        self.shelves.iter_mut().for_each(|shelf| shelf.judge(rows.len(), began.elapsed()));
        self.shelves.iter().for_each(Shelf::refresh);
        Ok(())
    }

    /// The rows of a micro-batch, whose samples are all at hand. `Err(position)`: that one is not, after all.
    fn assemble(&mut self, work: &Work, batch: Batch) -> Result<Result<Micro, u32>, Error> {
        let (part, view) = (work.part, work.view);
        let began = Instant::now();
        let mut kept = Vec::with_capacity(batch.samples.len());
        for &position in &batch.samples {
            if let Some(fresh) = self.fresh.get(&(part, position, view)) {
                kept.push(Kept::Fresh(fresh.clone()));
                continue;
            }
            let record = self.record(part, position);
            let start = self.scratch.len();
            let Some(forms) = self.shelves[0].read(part, record, view, &mut self.scratch) else {
                self.scratch.clear();
                return Ok(Err(position));
            };
            kept.push(Kept::Read { start, forms });
            self.pulse.beat();
            self.counts.cached += 1;
        }
        for position in &batch.samples {
            self.fresh.remove(&(part, *position, view));
        }
        let columns = batch.inputs.first().and_then(|input| input.shape.get(1)).copied();
        let mut values = Vec::with_capacity(self.boundary.values.len());
        for (index, cut) in self.boundary.values.iter().enumerate() {
            let first = kept.first().map(|row| row.form(index));
            let Some(Form { kind, layout, .. }) = first else { break };
            let longest = kept.iter().map(|row| i64::from(row.form(index).length)).max().unwrap_or(0);
            let dims: Vec<i64> = cut
                .dims
                .iter()
                .map(|dim| match dim {
                    CutDim::Known(size) => *size,
                    CutDim::Tokens => columns.unwrap_or(longest),
                })
                .collect();
            let by_tokens = cut.dims.first() == Some(&CutDim::Tokens);
            values.push(rows::assemble(kind, kept.len(), &dims, layout, |row, room| {
                kept[row].copy(index, by_tokens, &self.scratch, room);
                Ok::<_, TchError>(())
            })?);
        }
        self.scratch.clear();
        self.counts.time += began.elapsed();
        Ok(Ok(Micro { batch, cut: Some(Cut { boundary: Arc::clone(&self.boundary), values }) }))
    }

    /// Which samples are kept, for the thread that loads ahead.
    fn known(&self) -> Known {
        self.shelves[0].known(&self.dataset)
    }

    /// Whether what is above the boundary reads the batch itself.
    fn needs_inputs(&self) -> bool {
        // Sizes are those of the values, but for texts, whose length some values do not have.
        let of_texts = self.boundary.inputs == InputNeed::Sizes && self.shapes.are_texts();
        self.boundary.inputs == InputNeed::Contents || of_texts
    }
}

/// Where a row of a micro-batch comes from.
enum Kept {
    Fresh(Fresh),
    /// From here on in the scratch buffer, value after value.
    Read {
        start: usize,
        forms: Vec<Form>,
    },
}

impl Kept {
    /// How the value of that number lies in its bytes.
    fn form(&self, value: usize) -> Form {
        match self {
            Self::Fresh(fresh) => fresh.form(value),
            Self::Read { forms, .. } => forms[value],
        }
    }

    /// Copies the value of that number to where its row begins.
    fn copy(&self, value: usize, by_tokens: bool, scratch: &[u8], room: &mut [u8]) {
        let bytes = match self {
            Self::Fresh(fresh) => fresh.bytes(value, by_tokens),
            Self::Read { start, forms } => {
                let start = start + forms[..value].iter().map(|form| form.bytes).sum::<usize>();
                &scratch[start..start + forms[value].bytes]
            }
        };
        room[..bytes.len()].copy_from_slice(bytes);
    }
}

impl Fresh {
    fn form(&self, value: usize) -> Form {
        let rows = &self.values[value];
        Form { kind: rows.kind(), layout: rows.layout(), length: self.length, bytes: 0 }
    }

    /// A value's bytes; of a text its tokens only.
    fn bytes(&self, value: usize, by_tokens: bool) -> &[u8] {
        self.values[value].bytes(self.row, by_tokens.then_some(self.length as usize))
    }
}
