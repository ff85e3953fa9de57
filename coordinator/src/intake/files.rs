//! Plans from the graph and the data set that a spec names, on local or shared disks.
//!
//! Everything a trainer would stumble over when it starts is tried here, with the same code: the graph with its new
//! head, its layer groups, the index, the tokenizer against the graph's inputs.

use super::{Planned, SpecPlanner};
use crate::folder::local_path;
use thaw_core::planner::{DataFacts, GraphFacts, GroupFacts, Work};
use thaw_core::prefix::SampleSize;
use thaw_data::{Dataset, Index, Part, fit, index};
use thaw_graph::{Activations, Archive, GroupWork, Summary};
use thaw_proto::spec::RunSpec;
use thaw_proto::violation::Violations;
use thaw_runtime::chain;

/// Plans from files.
#[derive(Debug, Clone, Copy)]
pub struct FilesPlanner;

impl SpecPlanner for FilesPlanner {
    fn plan(&self, spec: &RunSpec) -> Result<Planned, Violations> {
        // Both are read whatever the other says, so that all mistakes are reported at once.
        let archive = open_archive(spec);
        let index = thaw_data::build(&spec.data, spec.seed, spec.logical_shards)
            .map_err(|error| Violations::one(data_path(spec, &error), chain(&error)));
        let (archive, index) = match (archive, index) {
            (Ok(archive), Ok(index)) => (archive, index),
            (archive, index) => {
                let mut all = archive.err().unwrap_or_default();
                all.0.extend(index.err().unwrap_or_default().0);
                return Err(all);
            }
        };
        let (archive, summary, held) = summarize(spec, &archive, index.classes().len())?;
        let fits = check_fit(spec, &archive, &summary, &index);
        let planned = thaw_core::planner::plan(spec, &graph_facts(&summary, &held), &data_facts(&index));
        let mut plan = match (fits, planned) {
            (Ok(()), Ok(plan)) => plan,
            (fits, planned) => {
                let mut all = fits.err().unwrap_or_default();
                all.0.extend(planned.err().unwrap_or_default().0);
                return Err(all);
            }
        };
        plan.notes.extend(summary.notes);
        Ok(Planned { plan, index: Some(index) })
    }
}

fn graph_mistake(message: String) -> Violations {
    Violations::one("backbone.graph", message)
}

fn open_archive(spec: &RunSpec) -> Result<Archive, Violations> {
    let path = local_path(&spec.backbone.graph).map_err(|error| graph_mistake(error.to_string()))?;
    let archive = Archive::open(&path).map_err(|error| graph_mistake(chain(&error)))?;
    // Refused operators show here, whatever the data says.
    archive.graph().map_err(|error| graph_mistake(chain(&error)))?;
    Ok(archive)
}

/// What training each layer group takes.
struct Training {
    activations: Vec<Activations>,
    work: Vec<GroupWork>,
    sample: SampleSize,
}

/// The archive with the run's head, and what the planner needs of it.
fn summarize(spec: &RunSpec, archive: &Archive, classes: usize) -> Result<(Archive, Summary, Training), Violations> {
    let wanted = fit::head(spec, classes);
    let archive = archive.with_head(&wanted).map_err(|error| Violations::one("backbone.head", chain(&error)))?;
    let rules = fit::group_rules(spec);
    let graph = archive.graph().map_err(|error| graph_mistake(chain(&error)))?;
    let field = if rules.is_empty() { "backbone.graph" } else { "backbone.layer_groups" };
    let segmented = thaw_graph::segment(&graph, &rules).map_err(|error| Violations::one(field, chain(&error)))?;
    let fingerprint = archive.fingerprint().map_err(|error| graph_mistake(chain(&error)))?;
    let summary = thaw_graph::summary(&segmented, fingerprint);
    let tokens = u64::from(fit::data(spec, &summary).max_length);
    let longest = Some(tokens);
    let image = summary.inputs.first().filter(|input| input.dtype.is_float());
    let sizes = image.map(|image| image.shape.iter().skip(1).flatten().map(|size| size.unsigned_abs()));
    let training = Training {
        sample: sizes.map_or(SampleSize::Tokens(tokens), |sizes| SampleSize::Elements(sizes.product())),
        activations: thaw_graph::activations(&segmented, longest),
        work: thaw_graph::work(&segmented, longest),
    };
    Ok((archive, summary, training))
}

/// Opens the data as a trainer will, and loads one sample.
fn check_fit(spec: &RunSpec, archive: &Archive, summary: &Summary, index: &Index) -> Result<(), Violations> {
    let tokenizer =
        fit::tokenizer(spec, archive).map_err(|error| Violations::one("data.train.tokenizer", chain(&error)))?;
    let dataset = Dataset::open(index.clone(), &fit::data(spec, summary), tokenizer.as_deref(), &fit::wants(summary))
        .map_err(|error| Violations::one(fit_path(&error), chain(&error)))?;
    let batch = dataset.load(Part::Train, &[0], None).map_err(|error| Violations::one("data.train", chain(&error)))?;
    let mut violations = Violations::default();
    for (array, input) in batch.inputs.iter().zip(&summary.inputs) {
        let ranks_differ = array.shape.len() != input.shape.len();
        // The batch is the first; token counts differ from batch to batch, and are padded.
        let sizes = array.shape.iter().zip(&input.shape).skip(1);
        let fixed = |(given, wanted): (&i64, &Option<i64>)| wanted.is_some_and(|wanted| wanted != *given);
        if ranks_differ || (input.dtype.is_float() && sizes.into_iter().any(fixed)) {
            let (given, wanted) = (&array.shape, sizes_of(&input.shape));
            let message = format!(
                "input {:?} of the graph takes {wanted}, and a sample gives {given:?}; set data.image to fit",
                input.name
            );
            violations.push("data.image", message);
        }
    }
    violations.or_ok(())
}

fn sizes_of(shape: &[Option<i64>]) -> String {
    let sizes: Vec<String> =
        shape.iter().map(|size| size.map_or_else(|| "any".to_owned(), |size| size.to_string())).collect();
    format!("[{}]", sizes.join(", "))
}

fn fit_path(error: &thaw_data::batch::Error) -> &'static str {
    use thaw_data::batch::Error;
    match error {
        Error::NoTokenizer | Error::Tokenizer { .. } => "data.train.tokenizer",
        Error::NoTransform | Error::Transform { .. } => "data.image",
        Error::Input { .. } | Error::InputCount { .. } | Error::NoTokens { .. } => "backbone.graph",
        _ => "data.train",
    }
}

/// The field of the spec that a data error is about.
fn data_path(spec: &RunSpec, error: &index::Error) -> String {
    use index::Error;
    let part = match error {
        Error::UnseenLabel { part, .. } => return format!("data.{part}"),
        Error::EmptyPart { part, .. } => return format!("data.split.{part}"),
        Error::ClassTooSmall { .. } | Error::NoTrainSample { .. } => return "data.split".to_owned(),
        Error::FewerThanShards { .. } => return "logical_shards".to_owned(),
        other => part_of(spec, &other.to_string()),
    };
    match error {
        Error::NoColumn { column, .. } | Error::NoKey { key: column, .. } => {
            let source = match part {
                "eval" => spec.data.eval.as_ref(),
                "test" => spec.data.test.as_ref(),
                _ => Some(&spec.data.train),
            };
            let field = if source.is_some_and(|source| source.text == *column) { "text" } else { "label" };
            format!("data.{part}.{field}")
        }
        Error::Scheme { .. } | Error::Missing { .. } | Error::Kind { .. } => format!("data.{part}.path"),
        _ => format!("data.{part}"),
    }
}

/// The source whose path an error names; the training source where it names none.
fn part_of(spec: &RunSpec, error: &str) -> &'static str {
    let names = |source: &Option<thaw_proto::spec::DataSource>| {
        let source = source.as_ref().filter(|source| source.path != spec.data.train.path);
        source.is_some_and(|source| match source.path.to_file_path() {
            Ok(path) => error.contains(&path.display().to_string()),
            Err(()) => error.contains(source.path.as_str()),
        })
    };
    if names(&spec.data.eval) {
        "eval"
    } else if names(&spec.data.test) {
        "test"
    } else {
        "train"
    }
}

fn data_facts(index: &Index) -> DataFacts {
    DataFacts { classes: index.classes().to_vec(), summary: index.summary(), shard_sizes: index.shard_sizes() }
}

fn graph_facts(summary: &Summary, training: &Training) -> GraphFacts {
    // The planner wants what crosses the cut below a group: what leaves the one before it.
    let below = std::iter::once(0).chain(summary.groups.iter().map(|group| group.boundary_bytes_per_sample));
    let each = training.activations.iter().zip(&training.work);
    let group =
        |((group, below), (held, work)): ((&thaw_graph::GroupSummary, u64), (&Activations, &GroupWork))| GroupFacts {
            name: group.name.clone(),
            parameters: group.parameters,
            decay_parameters: group.decay_parameters,
            buffers: group.buffers,
            // A multiply-add is two operations.
            forward_flops: group.forward_flops / 2,
            embedding: group.embedding,
            boundary_bytes_per_sample: below,
            saved_bytes_per_sample: held.saved,
            alive_bytes_per_sample: held.alive,
            rise_bytes_per_sample: held.rise,
            weight_gradient_bytes: held.weight_gradients,
            forward: work_facts(work.forward),
            backward: work_facts(work.backward),
            lowest_backward: work_facts(work.lowest_backward),
        };
    GraphFacts {
        groups: summary.groups.iter().zip(below).zip(each).map(group).collect(),
        feature_size: u32::try_from(summary.feature_size).unwrap_or(u32::MAX),
        convolutional: summary.convolutional,
        sample: training.sample,
    }
}

fn work_facts(work: thaw_graph::Work) -> Work {
    let thaw_graph::Work { flops, bytes, weight_bytes, operators } = work;
    Work { flops, bytes, weight_bytes, operators }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> RunSpec {
        let raw = thaw_proto::text::parse_spec(text).unwrap();
        thaw_proto::convert::spec::check(&raw).unwrap()
    }

    #[test]
    fn mistakes_of_graph_and_data_come_together() {
        let folder = tempfile::tempdir().unwrap();
        let csv = folder.path().join("d.csv");
        std::fs::write(&csv, "words,section\na b,x\nc d,y\n").unwrap();
        let pickle = folder.path().join("m.pt2");
        std::fs::write(&pickle, b"\x80\x04}q\x00.").unwrap();
        let text = format!(
            "name: a\nglobal_batch_size: 4\nbackbone: {{graph: 'file://{}'}}\n\
             data: {{train: {{path: 'file://{}', format: csv, text: words, label: label}}}}\n",
            pickle.display(),
            csv.display()
        );
        let violations = FilesPlanner.plan(&spec(&text)).unwrap_err();
        let paths: Vec<_> = violations.0.iter().map(|violation| violation.path.as_str()).collect();
        assert_eq!(paths, ["backbone.graph", "data.train.label"], "{violations}");
        let missing = text.replace("d.csv", "e.csv").replace("m.pt2", "n.pt2");
        let violations = FilesPlanner.plan(&spec(&missing)).unwrap_err();
        let paths: Vec<_> = violations.0.iter().map(|violation| violation.path.as_str()).collect();
        assert_eq!(paths, ["backbone.graph", "data.train.path"], "{violations}");
    }
}
