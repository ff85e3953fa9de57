//! One boundary's outputs in the node's cache: what they are keyed by, whether keeping them pays, how a row is written and read.

use super::Fresh;
use crate::trainer::job::Job;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use thaw_cache::{Config, Key, Put, Store, Tensor, Tier, TierName, Which};
use thaw_data::augment::View;
use thaw_data::batch::Dataset;
use thaw_data::index::Part;
use thaw_graph::{Boundary, prefix_identity};
use thaw_proto::plan::PlannedStage;
use thaw_proto::spec::{PrefixCache, PrefixCacheMode};
use thaw_torch::SegmentedModel;
use thaw_torch::model::StateTensor;
use thaw_torch::rows::Layout;
use thaw_torch::tch::Kind;

/// Changes whenever the same prefix would give other bytes.
const FORMAT: &str = "thaw prefix rows 2";
/// Boundaries of later stages that one pass fills beside the present one's.
const DEEPER: usize = 2;
/// Element types of what crosses, by their number in a row's description.
const KINDS: [Kind; 8] =
    [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double, Kind::Int64, Kind::Int, Kind::Bool, Kind::Uint8];
/// Samples after which it is known whether keeping pays.
const TRIAL: usize = 256;

/// Where a node keeps prefixes.
#[derive(Debug, Clone)]
pub struct CacheFolders {
    /// On a memory file system.
    pub memory: PathBuf,
    pub disk: PathBuf,
}

impl CacheFolders {
    /// What the cache may take: the spec's mebibytes, else a quarter of what is free or its own already.
    fn config(&self, limits: &PrefixCache) -> Config {
        let bytes = |mebibytes: Option<u32>, free: u64, tier: TierName, folder: &Path| {
            let share = || (free + thaw_cache::held_bytes(tier, folder).unwrap_or(0)) / 4;
            mebibytes.map_or_else(share, |given| u64::from(given) << 20)
        };
        // A memory file system may promise more than the machine has left.
        let free_memory = free_bytes(&self.memory).min(free_memory_bytes());
        let memory = bytes(limits.memory_mib, free_memory, TierName::Memory, &self.memory);
        let disk = bytes(limits.disk_mib, free_bytes(&self.disk), TierName::Disk, &self.disk);
        Config {
            memory: Tier { folder: self.memory.clone(), max_bytes: memory },
            disk: Tier { folder: self.disk.clone(), max_bytes: disk },
        }
    }

    /// Removes what no process has open; in memory only, the disk is for the next runs.
    pub fn clear_memory(&self) {
        let none = Tier { folder: PathBuf::new(), max_bytes: 0 };
        let memory = Tier { folder: self.memory.clone(), max_bytes: u64::MAX };
        if let Err(problem) = thaw_cache::clear(&Config { memory, disk: none }, Which::Unused) {
            tracing::warn!(error = thaw_runtime::chain(&problem), "cannot clear the prefix cache");
        }
    }
}

/// Of the file system that the folder is or will be on; 0 where it does not say.
fn free_bytes(folder: &Path) -> u64 {
    let existing = folder.ancestors().find(|folder| folder.is_dir());
    let found = existing.and_then(|folder| nix::sys::statvfs::statvfs(folder).ok());
    found.map_or(0, |found| found.blocks_available().saturating_mul(found.fragment_size()))
}

/// What the machine could still give; 0 where it does not say.
fn free_memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse::<u64>().ok());
    kibibytes.unwrap_or(0) << 10
}

/// How one value of one row lies in its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Form {
    pub(super) kind: Kind,
    pub(super) layout: Layout,
    /// Tokens, padding not counted; 0 for images.
    pub(super) length: u32,
    pub(super) bytes: usize,
}

/// See the module.
pub(super) struct Shelf {
    boundary: Boundary,
    stores: Option<Stores>,
    keeping: Keeping,
    /// Whether views are written, where they can be kept.
    keeps_views: bool,
}

/// Whether rows are written.
enum Keeping {
    /// Not yet decided: samples so far, time in the prefix, time in writing.
    Trying {
        samples: usize,
        computing: Duration,
        writing: Duration,
    },
    Yes,
    No,
}

/// Which samples are kept; for other threads.
#[derive(Clone)]
pub(super) struct Known {
    dataset: Dataset,
    stores: Option<Stores>,
}

/// Where rows are. Without it, where the cache cannot be opened, nothing is kept, and the prefix is computed in the same shapes all the same
/// (PFX-1, PFX-3).
#[derive(Clone)]
struct Stores {
    /// Samples as they are, by part; parts with the same records share a store.
    plain: [Arc<Store>; 3],
    /// Views of training samples. `None` where every epoch has new ones, which nobody reads again.
    views: Option<Arc<Store>>,
}

impl Stores {
    /// The store of a part, and the number of the view in it.
    fn of(&self, part: Part, view: Option<View>) -> Option<(&Arc<Store>, u16)> {
        match view {
            None => Some((&self.plain[part as usize], 0)),
            Some(View(view)) => Some((self.views.as_ref()?, u16::try_from(view).ok()?)),
        }
    }

    fn contains(&self, part: Part, record: u32, view: Option<View>) -> bool {
        self.of(part, view).is_some_and(|(store, view)| store.contains(record, view))
    }
}

impl Known {
    pub(super) fn contains(&self, part: Part, position: u32, view: Option<View>) -> bool {
        let record = self.dataset.index().records(part).get(position as usize);
        record.zip(self.stores.as_ref()).is_some_and(|(record, stores)| stores.contains(part, *record, view))
    }
}

/// The boundary below a stage, its shelf, and those of later stages that are worth filling in the same pass.
///
/// `Ok(None)`: there is nothing frozen, or the cache is off. The error says what stands against it.
pub(super) fn open_stage(
    job: &Job,
    stage: &PlannedStage,
    model: &SegmentedModel,
) -> Result<Option<(Boundary, Vec<Shelf>)>, String> {
    let lowest = |stage: &PlannedStage| stage.trainable_groups.iter().map(|group| group.0 as usize).min().unwrap_or(0);
    let boundary = lowest(stage);
    if job.spec.prefix_cache.mode == PrefixCacheMode::Off || boundary == 0 {
        return Ok(None);
    }
    let present = job.plan.stages.iter().position(|other| other.name == stage.name).unwrap_or(0);
    let trained_below = |boundary: usize, stages: usize| {
        let stages = job.plan.stages.iter().take(stages);
        stages.flat_map(|stage| &stage.trainable_groups).any(|group| (group.0 as usize) < boundary)
    };
    if trained_below(boundary, present) {
        return Err("a group below it was trained in an earlier stage".to_owned());
    }
    if !job.dataset.pads_right() {
        return Err("the tokenizer pads on the left, so what is computed of a text depends on its batch".to_owned());
    }
    let mut boundaries = vec![boundary];
    for (later, stage) in job.plan.stages.iter().enumerate().skip(present + 1) {
        let deeper = lowest(stage);
        let is_new = deeper > 0 && deeper < boundary && !boundaries.contains(&deeper);
        if is_new && !trained_below(deeper, later) && boundaries.len() <= DEEPER {
            boundaries.push(deeper);
        }
    }
    let mut shelves: Vec<Shelf> = Vec::new();
    for segment in boundaries {
        match thaw_graph::boundary(model.graph(), segment) {
            Ok(found) => shelves.extend(Shelf::open(job, stage, model, found, shelves.is_empty())?),
            Err(problem) if shelves.is_empty() => return Err(problem.to_string()),
            Err(_) => {}
        }
    }
    Ok(shelves.first().map(|first| first.boundary.clone()).map(|boundary| (boundary, shelves)))
}

impl Shelf {
    /// `None` for a deeper boundary that has no room.
    fn open(
        job: &Job,
        stage: &PlannedStage,
        model: &SegmentedModel,
        boundary: Boundary,
        is_present: bool,
    ) -> Result<Option<Self>, String> {
        let prefix = fingerprint(job, model, boundary.segment)?;
        let epochs = stage.max_steps / job.plan.steps_per_epoch.max(1);
        let keeping = if is_present && epochs < 2 { Keeping::No } else { Keeping::undecided() };
        let stores = match Self::open_stores(job, &prefix) {
            Ok(stores) => Some(stores),
            Err(problem) if job.spec.prefix_cache.mode == PrefixCacheMode::Required => {
                return Err(thaw_runtime::chain(&problem));
            }
            Err(problem) => {
                tracing::warn!(error = thaw_runtime::chain(&problem), "the frozen prefix is not kept");
                None
            }
        };
        // A stage reads its first view again once it has been through all.
        let keeps_views = !is_present || epochs > job.spec.prefix_cache.views.unwrap_or(1);
        Ok(Some(Self { boundary, stores, keeping, keeps_views }))
    }

    fn open_stores(job: &Job, prefix: &str) -> Result<Stores, thaw_cache::Error> {
        let mut config = job.cache.config(&job.spec.prefix_cache);
        let writer = uuid::Uuid::new_v4().to_string();
        let mut open = |identity: &str| {
            let key = Key::of(&[("prefix", prefix.as_bytes()), ("records", identity.as_bytes())]);
            let opened = match Store::open(&config, key, &writer) {
                Err(problem @ thaw_cache::Error::NotMemory { .. }) => {
                    tracing::warn!(%problem, "the frozen prefix is kept on disk only");
                    config.memory.max_bytes = 0;
                    Store::open(&config, key, &writer)
                }
                opened => opened,
            };
            opened.map(Arc::new)
        };
        let mut plain: Vec<Arc<Store>> = Vec::new();
        let identities = Part::ALL.map(|part| job.dataset.records_identity(part));
        for (place, identity) in identities.iter().enumerate() {
            let same = identities[..place].iter().position(|other| other == identity);
            plain.push(match same {
                Some(same) => Arc::clone(&plain[same]),
                None => open(identity)?,
            });
        }
        let views = job.dataset.views_identity(Part::Train).filter(|_| job.spec.prefix_cache.views.is_some());
        let views = views.map(|identity| open(&identity)).transpose()?;
        Ok(Stores { plain: plain.try_into().expect("one for each part"), views })
    }

    pub(super) fn boundary(&self) -> &Boundary {
        &self.boundary
    }

    pub(super) fn known(&self, dataset: &Dataset) -> Known {
        Known { dataset: dataset.clone(), stores: self.stores.clone() }
    }

    pub(super) fn contains(&self, part: Part, record: u32, view: Option<View>) -> bool {
        self.stores.as_ref().is_some_and(|stores| stores.contains(part, record, view))
    }

    /// Writes a row, where that pays and there is room.
    pub(super) fn keep(&mut self, part: Part, record: u32, view: Option<View>, row: &Fresh) {
        let is_wanted = view.is_none() || self.keeps_views;
        if matches!(self.keeping, Keeping::No) || !is_wanted || self.contains(part, record, view) {
            return;
        }
        let found = self.stores.as_ref().and_then(|stores| stores.of(part, view));
        let Some((store, view)) = found.map(|(store, view)| (Arc::clone(store), view)) else { return };
        let began = Instant::now();
        let by_tokens = |index: usize| self.boundary.values[index].dims.first() == Some(&thaw_graph::CutDim::Tokens);
        let pieces: Vec<&[u8]> = (0..row.values.len()).map(|index| row.bytes(index, by_tokens(index))).collect();
        let describe = |(index, piece): (usize, &&[u8])| Form { bytes: piece.len(), ..row.form(index) }.describe();
        let tensors: Vec<Tensor> = pieces.iter().enumerate().map(describe).collect();
        match store.put(record, view, &tensors, &pieces) {
            Ok(Put::Stored(_) | Put::Present) => {}
            Ok(Put::Full) => {
                tracing::info!(
                    segment = self.boundary.segment,
                    "the prefix cache is full; the rest is computed anew each epoch"
                );
                self.keeping = Keeping::No;
            }
            Err(problem) => {
                tracing::warn!(error = thaw_runtime::chain(&problem), "cannot write to the prefix cache");
                self.keeping = Keeping::No;
            }
        }
        if let Keeping::Trying { writing, .. } = &mut self.keeping {
            *writing += began.elapsed();
        }
    }

    /// Reads a row behind what `into` holds. `None` where it is not kept, or damaged.
    pub(super) fn read(&self, part: Part, record: u32, view: Option<View>, into: &mut Vec<u8>) -> Option<Vec<Form>> {
        let (store, view) = self.stores.as_ref()?.of(part, view)?;
        let found = store.get(record, view, into)?;
        found.tensors().iter().map(Form::described).collect()
    }

    /// Learns what other trainers and runs have kept meanwhile.
    pub(super) fn refresh(&self) {
        let stores = self.stores.iter().flat_map(|stores| stores.plain.iter().chain(&stores.views));
        for store in stores {
            if let Err(problem) = store.refresh() {
                tracing::warn!(error = thaw_runtime::chain(&problem), "cannot look into the prefix cache");
            }
        }
    }

    /// Decides, after a trial, whether keeping costs less than computing again.
    pub(super) fn judge(&mut self, samples: usize, took: Duration) {
        let Keeping::Trying { samples: so_far, computing, writing } = &mut self.keeping else { return };
        *so_far += samples;
        *computing += took;
        if *so_far < TRIAL {
            return;
        }
        // A row is written once and read at least once, at about the same cost.
        let pays = *writing * 2 < *computing;
        let segment = self.boundary.segment;
        tracing::info!(segment, ?computing, ?writing, pays, "measured what keeping the frozen prefix costs");
        self.keeping = if pays { Keeping::Yes } else { Keeping::No };
    }
}

impl Keeping {
    fn undecided() -> Self {
        Self::Trying { samples: 0, computing: Duration::ZERO, writing: Duration::ZERO }
    }
}

impl Form {
    /// Set in a described element type where the layout is channels last.
    const CHANNELS_LAST: u8 = 0x80;

    /// What the cache keeps beside the bytes.
    fn describe(self) -> Tensor {
        // A type that is not in the list reads as a miss.
        let kind = KINDS.iter().position(|kind| *kind == self.kind).unwrap_or(KINDS.len()) as u8;
        let layout = if self.layout == Layout::ChannelsLast { Self::CHANNELS_LAST } else { 0 };
        let bytes = u32::try_from(self.bytes).unwrap_or(u32::MAX);
        Tensor { dtype: kind | layout, dims: vec![self.length], bytes }
    }

    fn described(tensor: &Tensor) -> Option<Self> {
        let kind = KINDS.get(usize::from(tensor.dtype & !Self::CHANNELS_LAST))?;
        let layout = if tensor.dtype & Self::CHANNELS_LAST != 0 { Layout::ChannelsLast } else { Layout::RowMajor };
        let [length] = tensor.dims.as_slice() else { return None };
        Some(Self { kind: *kind, layout, length: *length, bytes: tensor.bytes as usize })
    }
}

/// Everything that decides a row's bytes but the sample.
fn fingerprint(job: &Job, model: &SegmentedModel, segment: usize) -> Result<String, String> {
    let mut hasher = blake3::Hasher::new_derive_key(FORMAT);
    let spec = &job.spec;
    let shape = (spec.precision, spec.workers.threads_per_trainer, spec.prefix_cache.chunk_size, job.longest_text);
    hasher.update(format!("{shape:?} {}", env!("CARGO_PKG_VERSION")).as_bytes());
    if model.device().is_cuda() {
        // Other kernels, so other last bits.
        hasher.update(b"cuda");
    }
    hasher.update(prefix_identity(model.graph(), segment).as_bytes());
    for group in &model.groups()[..segment] {
        job.pulse.beat();
        for tensor in std::iter::once(&group.flat).chain(group.buffers.iter().map(|(_, buffer)| buffer)) {
            hasher.update(&StateTensor::sharing("", tensor).map_err(|problem| problem.to_string())?.bytes);
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}
