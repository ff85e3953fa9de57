//! The data part of the run spec: sources, the split, image preparation.

use super::augmentation;
use crate::convert::checker::{Checker, Interval};
use crate::pb;
use crate::spec::{Data, DataFormat, DataSource, ImageTransform, Split};

/// What `ImageTransform` and the split are when absent, from the proto.
const IMAGE_SIZE: u32 = 224;
const IMAGE_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const IMAGE_STD: [f64; 3] = [0.229, 0.224, 0.225];
const MAX_LENGTH: u32 = 128;
const SHARES_TOLERANCE: f64 = 1e-6;

pub(super) fn data(at: &mut Checker, raw: &pb::Data) -> Data {
    let train = at.within("train", |at| source(at, &raw.train.clone().unwrap_or_default()));
    let eval = raw.eval.as_ref().map(|raw| at.within("eval", |at| source(at, raw)));
    let test = raw.test.as_ref().map(|raw| at.within("test", |at| source(at, raw)));
    let images = train.as_ref().is_some_and(|train| train.format == DataFormat::ImageFolder);
    for (field, other) in [("eval.format", &eval), ("test.format", &test)] {
        if let (Some(train), Some(Some(other))) = (&train, other)
            && (train.format == DataFormat::ImageFolder) != (other.format == DataFormat::ImageFolder)
        {
            at.refuse(
                field,
                "must be of the same kind as train.format: text (csv, jsonl) or image_folder in all parts",
            );
        }
    }
    let split = split(at, raw.split.as_ref(), eval.is_some(), test.is_some());
    let max_length = at.whole("max_length", raw.max_length, 1..=131_072, MAX_LENGTH);
    let known = train.is_some();
    if images && raw.max_length.is_some() {
        at.refuse("max_length", "must be absent for image_folder: remove it");
    }
    if known && !images && raw.image.is_some() {
        at.refuse("image", "must be absent for text (csv, jsonl): remove it, or set format to image_folder");
    }
    let image = (images || raw.image.is_some())
        .then(|| at.within("image", |at| image_transform(at, &raw.image.clone().unwrap_or_default())));
    let stand_in = |source: Option<DataSource>| source.unwrap_or_else(unreadable);
    Data { train: stand_in(train), eval: eval.map(stand_in), test: test.map(stand_in), split, max_length, image }
}

/// Stands for a source whose mistake has been noted.
fn unreadable() -> DataSource {
    let path = url::Url::parse("file:///").expect("is a URL");
    DataSource { path, format: DataFormat::Csv, text: String::new(), label: String::new(), tokenizer: None }
}

/// `None` where the format is missing or unknown, which has been noted.
fn source(at: &mut Checker, raw: &pb::DataSource) -> Option<DataSource> {
    let path = at.url("path", &raw.path, "URL of a file (csv, jsonl) or folder (image_folder)");
    let format: Option<DataFormat> = at.choice("format", raw.format);
    if raw.format == 0 {
        at.refuse("format", "is required: one of csv, jsonl, image_folder");
    }
    let format = format?;
    let tokenizer = at.url_or_none("tokenizer", &raw.tokenizer);
    match format {
        DataFormat::Csv | DataFormat::Jsonl => {
            at.text("text", &raw.text, "the column or key of the text");
            at.text("label", &raw.label, "the column or key of the label");
        }
        DataFormat::ImageFolder => {
            at.no_text("text", &raw.text, "for image_folder");
            at.no_text("label", &raw.label, "for image_folder (the folder's name is the label)");
            at.no_text("tokenizer", &raw.tokenizer, "for image_folder");
        }
    }
    Some(DataSource { path, format, text: raw.text.clone(), label: raw.label.clone(), tokenizer })
}

fn split(at: &mut Checker, raw: Option<&pb::Split>, has_eval: bool, has_test: bool) -> Split {
    let raw = raw.copied().unwrap_or_default();
    let stratified = raw.stratified.unwrap_or(true);
    let shares = [raw.train, raw.eval, raw.test];
    if shares == [0.0; 3] {
        let (train, eval, test) = default_shares(has_eval, has_test);
        return Split { train, eval, test, stratified };
    }
    at.within("split", |at| {
        let mut in_range = true;
        for (field, share) in [("train", raw.train), ("eval", raw.eval), ("test", raw.test)] {
            if !(0.0..=1.0).contains(&share) {
                at.refuse(field, format!("must be in [0, 1], not {share}"));
                in_range = false;
            }
        }
        if in_range {
            check_shares(at, raw, has_eval, has_test);
        }
    });
    Split { train: raw.train, eval: raw.eval, test: raw.test, stratified }
}

fn check_shares(at: &mut Checker, raw: pb::Split, has_eval: bool, has_test: bool) {
    if raw.train == 0.0 {
        at.refuse("train", "must be > 0: no sample would be left to train on");
    }
    for (field, share, has_source) in [("eval", raw.eval, has_eval), ("test", raw.test, has_test)] {
        if has_source && share > 0.0 {
            at.refuse(field, format!("must be absent where data.{field} is given, not {share}: remove one of the two"));
        }
    }
    if !has_eval && raw.eval == 0.0 {
        at.refuse("eval", "must be > 0: give a share, or a source of its own in data.eval");
    }
    let sum = raw.train + raw.eval + raw.test;
    if (sum - 1.0).abs() > SHARES_TOLERANCE {
        at.refuse("", format!("must sum to 1, not {}", (sum * 1e6).round() / 1e6));
    }
}

/// 0.8 / 0.1 / 0.1; the share of a part with a source of its own goes to train, and so does test's where eval has one.
fn default_shares(has_eval: bool, has_test: bool) -> (f64, f64, f64) {
    match (has_eval, has_test) {
        (false, false) => (0.8, 0.1, 0.1),
        (false, true) => (0.9, 0.1, 0.0),
        (true, _) => (1.0, 0.0, 0.0),
    }
}

fn image_transform(at: &mut Checker, raw: &pb::ImageTransform) -> ImageTransform {
    let size = at.whole("size", raw.size, 8..=4096, IMAGE_SIZE);
    let mean = channels(at, "mean", &raw.mean, &IMAGE_MEAN, Interval::Closed(0.0, 1.0));
    // A grey mean with no deviation beside it, or the other way round, would mix 1 and 3 channels; the length rule below says so.
    let std = channels(at, "std", &raw.std, &IMAGE_STD, Interval::Positive);
    let well_formed = |values: &[f64]| matches!(values.len(), 1 | 3);
    if well_formed(&mean) && well_formed(&std) && mean.len() != std.len() {
        at.refuse("std", format!("must have as many numbers as mean ({}), not {}: give both", mean.len(), std.len()));
    }
    let augmentation = raw.augmentation.as_ref();
    let augmentation = augmentation.map(|raw| at.within("augmentation", |at| augmentation::read(at, raw, mean.len())));
    ImageTransform { size, mean, std, augmentation }
}

fn channels(at: &mut Checker, field: &str, given: &[f64], default: &[f64], interval: Interval) -> Vec<f64> {
    if given.is_empty() {
        return default.to_vec();
    }
    if !matches!(given.len(), 1 | 3) {
        at.refuse(field, format!("must have 1 or 3 numbers, one per channel, not {}", given.len()));
    }
    for (index, &value) in given.iter().enumerate() {
        at.real(&format!("{field}[{index}]"), Some(value), interval, 0.5);
    }
    given.to_vec()
}
