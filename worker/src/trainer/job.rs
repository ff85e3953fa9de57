//! What a trainer is to do, made ready: the checked spec and plan, the data, the graph with its new head.

use super::prefix::CacheFolders;
use std::path::PathBuf;
use thaw_core::manifest::Fingerprints;
use thaw_data::batch::Dataset;
use thaw_data::fit;
use thaw_data::index::Index;
use thaw_graph::{Archive, SegmentedGraph};
use thaw_node::checkpoint::CheckpointStore;
use thaw_node::collective::Pulse;
use thaw_proto::ids::{RunId, StageIndex};
use thaw_proto::pb;
use thaw_proto::plan::Plan;
use thaw_proto::spec::RunSpec;
use url::Url;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the coordinator sent a trainer no valid {what}: {problem}")]
    Message { what: &'static str, problem: String },
    #[error("{url} is not a local folder; give shared storage as a file:// URL")]
    NotLocal { url: String },
    #[error("cannot load the data index")]
    Index(#[from] thaw_data::index::Error),
    #[error("cannot open the data")]
    Data(#[from] thaw_data::batch::Error),
    #[error("cannot read the backbone")]
    Archive(#[from] thaw_graph::archive::Error),
    #[error("cannot give the backbone its head")]
    Head(#[from] thaw_graph::head::Error),
    #[error("cannot divide the backbone into layer groups")]
    Cuts(#[from] thaw_graph::cuts::Error),
    #[error(transparent)]
    Fit(#[from] fit::Error),
    #[error("the data was indexed as {found}, the plan was made for {planned}; submit the run again")]
    OtherData { found: String, planned: String },
    #[error("cannot open the run's folder")]
    Store(#[from] thaw_node::checkpoint::Error),
}

pub(crate) struct Job {
    pub(crate) run: RunId,
    pub(crate) run_url: Url,
    pub(crate) spec: RunSpec,
    pub(crate) plan: Plan,
    pub(crate) folder: PathBuf,
    pub(crate) shard_sizes: Vec<u64>,
    pub(crate) dataset: Dataset,
    /// The exported graph with the run's head.
    pub(crate) archive: Archive,
    pub(crate) graph: SegmentedGraph,
    pub(crate) fingerprints: Fingerprints,
    pub(crate) store: CheckpointStore,
    /// Tokens of the longest text that the data may give.
    pub(crate) longest_text: u32,
    pub(crate) cache: CacheFolders,
    /// Beaten with wherever training gets on (RING-4).
    pub(crate) pulse: Pulse,
}

impl Job {
    /// Reads everything that `start` names.
    pub(crate) fn load(start: &pb::StartTrainer, cache: CacheFolders, pulse: Pulse) -> Result<Self, Error> {
        let given = start.spec.clone().ok_or_else(|| message("spec", "it is absent"))?;
        let spec = thaw_proto::convert::spec::check(&given).map_err(|problem| message("spec", problem))?;
        let plan = start.plan.clone().ok_or_else(|| message("plan", "it is absent"))?;
        let plan = Plan::try_from(&plan).map_err(|problem| message("plan", problem))?;
        let run_url: Url = start.run_url.parse().map_err(|problem| message("run_url", problem))?;
        let folder = local(&run_url)?;
        let index = Index::load(&folder.join("data"))?;
        if index.fingerprint() != plan.data.fingerprint {
            return Err(Error::OtherData { found: index.fingerprint().to_owned(), planned: plan.data.fingerprint });
        }
        let archive = Archive::open(&local(&spec.backbone.graph)?)?.with_head(&fit::head(&spec, plan.classes.len()))?;
        let graph = thaw_graph::segment(&archive.graph()?, &fit::group_rules(&spec))?;
        let summary = thaw_graph::summary(&graph, archive.fingerprint()?);
        let tokenizer = fit::tokenizer(&spec, &archive)?;
        let data = fit::data(&spec, &summary);
        let longest_text = data.max_length;
        let beats = pulse.clone();
        let dataset = Dataset::open(index, &data, tokenizer.as_deref(), &fit::wants(&summary))?;
        let dataset = dataset.telling(move || beats.beat());
        let fingerprints = Fingerprints {
            spec: blake3::hash(serde_json::to_string(&spec).expect("a spec is plain data").as_bytes())
                .to_hex()
                .to_string(),
            data: plan.data.fingerprint.clone(),
            graph: summary.fingerprint,
        };
        let store = CheckpointStore::open(&run_url)?;
        let shard_sizes = dataset.index().shard_sizes();
        Ok(Self {
            run: RunId(start.run.clone()),
            run_url,
            spec,
            plan,
            folder,
            shard_sizes,
            dataset,
            archive,
            graph,
            fingerprints,
            store,
            longest_text,
            cache,
            pulse,
        })
    }

    /// Groups trained in any stage up to `stage`, ascending.
    pub(crate) fn ever_trained(&self, stage: StageIndex) -> Vec<usize> {
        let reached = self.plan.stages.iter().take(stage.0 as usize + 1);
        let mut groups: Vec<usize> =
            reached.flat_map(|stage| &stage.thawed_groups).map(|group| group.0 as usize).collect();
        groups.sort_unstable();
        groups
    }

    pub(crate) fn model_folder(&self) -> PathBuf {
        self.folder.join("model")
    }

    pub(crate) fn model_url(&self) -> String {
        Url::from_directory_path(self.model_folder()).map_or_else(|()| String::new(), |url| url.to_string())
    }
}

fn message(what: &'static str, problem: impl std::fmt::Display) -> Error {
    Error::Message { what, problem: problem.to_string() }
}

fn local(url: &Url) -> Result<PathBuf, Error> {
    let path = if url.scheme() == "file" { url.to_file_path().ok() } else { None };
    path.ok_or_else(|| Error::NotLocal { url: url.to_string() })
}
