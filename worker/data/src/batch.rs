//! Micro-batches: the arrays a graph takes, in plain vectors.
//!
//! `DATA-3`: what `load` gives depends on the index, the part, the positions and the view, and on nothing else.

use crate::augment::{self, Draw, View};
use crate::image::Transform;
use crate::index::{self, Index, Part, Source, csv_text, jsonl_text};
use crate::text::{Tokenizer, Tokens};
use crate::{image, name, text};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use thaw_proto::spec::{Data, DataFormat, ImageTransform};

/// Why a dataset could not be opened, or samples not loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("the graph asks for input {input:?} ({wanted}), which {kind} data cannot give; it gives {given}")]
    Input { input: String, wanted: ElementType, kind: &'static str, given: &'static str },
    #[error("the graph asks for {count} inputs, and image data gives one; export a graph with a single image input")]
    InputCount { count: usize },
    #[error("the graph has no input {missing:?}, which text data needs (inputs: {inputs})")]
    NoTokens { missing: &'static str, inputs: String },
    #[error("text data needs a tokenizer; set data.train.tokenizer, or put tokenizer.json beside the graph")]
    NoTokenizer,
    #[error("image data needs data.image (size, mean, std)")]
    NoTransform,
    #[error("prepare the tokenizer")]
    Tokenizer { source: text::Error },
    #[error("prepare the images")]
    Transform { source: image::Error },
    #[error("open the data")]
    Index { source: index::Error },
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: record {record} is no longer what was indexed; restore the file, or submit a new run", path.display())]
    Changed { path: PathBuf, record: u32 },
    #[error("image {} does not decode; replace it and submit the run again", path.display())]
    Image { path: PathBuf, source: image::Error },
    #[error("tokenize record {record} of {} or one beside it", path.display())]
    Tokenize { path: PathBuf, record: u32, source: text::Error },
    #[error("position {position} of the {part} part, which has {size} samples")]
    Position { part: Part, position: u32, size: u32 },
    #[error("a loading thread panicked: {message}")]
    Panicked { message: String },
}

/// Element type of an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    I64,
    F32,
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::I64 => "i64",
            Self::F32 => "f32",
        })
    }
}

/// An input that the graph takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputWant {
    pub name: String,
    pub dtype: ElementType,
}

/// Row-major elements of one array.
#[derive(Debug, Clone, PartialEq)]
pub enum ArrayData {
    I64(Vec<i64>),
    F32(Vec<f32>),
}

/// One input: text `[samples, tokens]` i64, images `[samples, channels, size, size]` f32.
#[derive(Debug, Clone, PartialEq)]
pub struct InputArray {
    pub name: String,
    pub shape: Vec<i64>,
    pub data: ArrayData,
}

/// A micro-batch. Inputs are in the order in which the graph's were given to [`Dataset::open`].
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    pub inputs: Vec<InputArray>,
    /// Class of each sample.
    pub labels: Vec<i64>,
    /// The positions asked for.
    pub samples: Vec<u32>,
    /// Tokens of each text, padding not counted; empty for images.
    pub lengths: Vec<u32>,
}

/// Samples by part and position. Cheap to clone, and read from any thread.
#[derive(Clone)]
pub struct Dataset(Arc<Inner>, Option<Told>);

/// Called from whichever thread loads.
type Told = Arc<dyn Fn() + Send + Sync>;

struct Inner {
    index: Index,
    inputs: Vec<InputWant>,
    preparation: Preparation,
    /// The open file of each part whose records lie within one.
    files: [Option<File>; 3],
}

enum Preparation {
    Text {
        tokenizer: Box<Tokenizer>,
        /// BLAKE3 of the tokenizer's file and the longest length.
        identity: blake3::Hash,
    },
    Images(ImageTransform),
}

const TEXT_INPUTS: [&str; 3] = ["input_ids", "attention_mask", "token_type_ids"];

impl Dataset {
    /// Opens the sources of `index`, after checking that they are what was indexed.
    ///
    /// `tokenizer` holds the bytes of a `tokenizer.json`; text needs it. `inputs` are the graph's, in its order: for text some of
    /// `input_ids`, `attention_mask`, `token_type_ids` (i64), for images one of any name (f32).
    ///
    /// # Errors
    /// Changed sources, a bad tokenizer, or an input the data cannot give.
    pub fn open(index: Index, spec: &Data, tokenizer: Option<&[u8]>, inputs: &[InputWant]) -> Result<Self, Error> {
        index.verify().map_err(|source| Error::Index { source })?;
        let preparation = match index.source(Part::Train).format {
            DataFormat::Csv | DataFormat::Jsonl => {
                check_text_inputs(inputs)?;
                let bytes = tokenizer.ok_or(Error::NoTokenizer)?;
                let tokenizer = Tokenizer::new(bytes, spec.max_length).map_err(|source| Error::Tokenizer { source })?;
                let identity =
                    *blake3::Hasher::new().update(&spec.max_length.to_le_bytes()).update(bytes).finalize().as_bytes();
                Preparation::Text { tokenizer: Box::new(tokenizer), identity: identity.into() }
            }
            DataFormat::ImageFolder => {
                check_image_inputs(inputs)?;
                let transform = spec.image.clone().ok_or(Error::NoTransform)?;
                Transform::new(&transform).map_err(|source| Error::Transform { source })?;
                Preparation::Images(transform)
            }
        };
        let mut files = [None, None, None];
        for part in Part::ALL {
            files[part as usize] = open_file(index.source(part))?;
        }
        Ok(Self(Arc::new(Inner { index, inputs: inputs.to_vec(), preparation, files }), None))
    }

    /// Has `each` called after every sample that is read, so that somebody sees that a large batch from slow storage gets on.
    #[must_use]
    pub fn telling(self, each: impl Fn() + Send + Sync + 'static) -> Self {
        Self(self.0, Some(Arc::new(each)))
    }

    fn tell(&self) {
        if let Some(each) = &self.1 {
            each();
        }
    }

    /// The index it reads by.
    pub fn index(&self) -> &Index {
        &self.0.index
    }

    /// The samples at `positions` of a part, in that order: as they are, or that view of each, where images change at random. No positions
    /// give arrays of zero rows.
    ///
    /// # Errors
    /// Unreadable, changed or undecodable files, by name; a position beyond the part.
    pub fn load(&self, part: Part, positions: &[u32], view: Option<View>) -> Result<Batch, Error> {
        let index = &self.0.index;
        let mut labels = Vec::with_capacity(positions.len());
        let mut records = Vec::with_capacity(positions.len());
        for position in positions {
            let beyond = || Error::Position { part, position: *position, size: index.size(part) };
            labels.push(i64::from(index.label(part, *position).ok_or_else(beyond)?));
            records.push(index.records(part)[*position as usize]);
        }
        let (inputs, lengths) = match &self.0.preparation {
            Preparation::Text { tokenizer, .. } => self.load_texts(part, &records, tokenizer)?,
            Preparation::Images(transform) => (vec![self.load_images(part, &records, view, transform)?], Vec::new()),
        };
        Ok(Batch { inputs, labels, samples: positions.to_vec(), lengths })
    }

    /// Rows of batches that this dataset loaded, as one batch; texts cut or padded to `columns` tokens, which must hold the longest.
    ///
    /// # Panics
    /// If a row is another dataset's, or longer than `columns`.
    #[must_use]
    pub fn gather(&self, rows: &[(&Batch, usize)], columns: usize) -> Batch {
        let mut inputs = Vec::with_capacity(self.0.inputs.len());
        for (position, want) in self.0.inputs.iter().enumerate() {
            let rows = rows.iter().map(|(batch, row)| (&batch.inputs[position], *row));
            inputs.push(match &self.0.preparation {
                Preparation::Text { tokenizer, .. } => gather_tokens(want, rows, columns, tokenizer.filler(&want.name)),
                Preparation::Images(_) => gather_images(want, rows),
            });
        }
        let lengths: Vec<u32> = rows.iter().filter_map(|(batch, row)| batch.lengths.get(*row).copied()).collect();
        assert!(
            lengths.iter().all(|length| *length as usize <= columns),
            "no text is longer than what it is gathered into"
        );
        Batch {
            inputs,
            labels: rows.iter().map(|(batch, row)| batch.labels[*row]).collect(),
            samples: rows.iter().map(|(batch, row)| batch.samples[*row]).collect(),
            lengths,
        }
    }

    /// Whether what a graph computes of a text is the same however far it is padded: padding comes last. True for images.
    #[must_use]
    pub fn pads_right(&self) -> bool {
        match &self.0.preparation {
            Preparation::Text { tokenizer, .. } => tokenizer.pads_right(),
            Preparation::Images(_) => true,
        }
    }

    /// What a part's records hold once they are prepared: the same for equal contents and equal preparation, whatever the split.
    #[must_use]
    pub fn records_identity(&self, part: Part) -> String {
        let source = self.0.index.source(part);
        let preparation = match &self.0.preparation {
            Preparation::Text { identity, .. } => identity.to_hex().to_string(),
            Preparation::Images(ImageTransform { size, mean, std, .. }) => {
                format!("ImageTransform {{ size: {size:?}, mean: {mean:?}, std: {std:?} }}")
            }
        };
        format!("{} {:?} {:?} {preparation}", source.hash, source.format, source.text)
    }

    /// What the views of a part's records hold: the same for equal records, changes and seeds. `None` where nothing changes.
    #[must_use]
    pub fn views_identity(&self, part: Part) -> Option<String> {
        let augmentation = match &self.0.preparation {
            Preparation::Text { .. } => None,
            Preparation::Images(transform) => transform.augmentation.as_ref(),
        }?;
        Some(format!("{} changed by {augmentation:?} with seed {}", self.records_identity(part), self.0.index.seed()))
    }

    fn load_texts(
        &self,
        part: Part,
        records: &[u32],
        tokenizer: &Tokenizer,
    ) -> Result<(Vec<InputArray>, Vec<u32>), Error> {
        let source = self.0.index.source(part);
        let texts = records.iter().map(|record| self.text(part, source, *record)).collect::<Result<Vec<_>, _>>()?;
        let failed = |error| Error::Tokenize { path: source.path.clone(), record: records[0], source: error };
        let tokens = tokenizer.encode(&texts).map_err(failed)?;
        Ok((self.0.inputs.iter().map(|want| token_array(&want.name, &tokens)).collect(), tokens.lengths))
    }

    fn text(&self, part: Part, source: &Source, record: u32) -> Result<String, Error> {
        let (offset, length) = source.range(record);
        let mut bytes = vec![0; length];
        let file = self.0.files[part as usize].as_ref().expect("text sources are opened with the dataset");
        file.read_exact_at(&mut bytes, offset)
            .map_err(|error| Error::Read { path: source.path.clone(), source: error })?;
        let text = match source.text_column {
            Some(column) => csv_text(&bytes, column),
            None => jsonl_text(&bytes, &source.text),
        };
        self.tell();
        text.ok_or_else(|| Error::Changed { path: source.path.clone(), record })
    }

    fn load_images(
        &self,
        part: Part,
        records: &[u32],
        view: Option<View>,
        spec: &ImageTransform,
    ) -> Result<InputArray, Error> {
        let source = self.0.index.source(part);
        let mut transform = Transform::new(spec).map_err(|source| Error::Transform { source })?;
        let mut planes = Vec::new();
        for record in records {
            let path = source.file(*record);
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                Err(source) => return Err(Error::Read { path, source }),
            };
            let draw = |width, height| match (&spec.augmentation, view) {
                (Some(augmentation), Some(view)) => {
                    let key = augment::Key { seed: self.0.index.seed(), record: *record, view };
                    augment::draw(augmentation, key, width, height, spec.size)
                }
                (Some(_) | None, _) => Draw::default(),
            };
            transform.apply_changed(&bytes, draw, &mut planes).map_err(|source| Error::Image { path, source })?;
            self.tell();
        }
        let mut shape = vec![records.len() as i64];
        shape.extend(transform.shape());
        Ok(InputArray { name: self.0.inputs[0].name.clone(), shape, data: ArrayData::F32(planes) })
    }
}

fn open_file(source: &Source) -> Result<Option<File>, Error> {
    match source.format {
        DataFormat::Csv | DataFormat::Jsonl => {
            let file =
                File::open(&source.path).map_err(|error| Error::Read { path: source.path.clone(), source: error })?;
            Ok(Some(file))
        }
        DataFormat::ImageFolder => Ok(None),
    }
}

fn token_array(name: &str, tokens: &Tokens) -> InputArray {
    let data = match name {
        "input_ids" => &tokens.input_ids,
        "attention_mask" => &tokens.attention_mask,
        _ => &tokens.token_type_ids,
    };
    InputArray {
        name: name.to_owned(),
        shape: vec![tokens.rows as i64, tokens.columns as i64],
        data: ArrayData::I64(data.clone()),
    }
}

/// Rows of token arrays as one array of `[rows, columns]`.
fn gather_tokens<'a>(
    want: &InputWant,
    rows: impl Iterator<Item = (&'a InputArray, usize)>,
    columns: usize,
    filler: i64,
) -> InputArray {
    let mut data = Vec::new();
    let mut count = 0;
    for (array, row) in rows {
        let ArrayData::I64(values) = &array.data else { unreachable!("texts give integers") };
        let width = values.len() / usize::try_from(array.shape[0]).expect("a batch has rows");
        let kept = width.min(columns);
        data.extend_from_slice(&values[row * width..row * width + kept]);
        data.extend(std::iter::repeat_n(filler, columns - kept));
        count += 1;
    }
    InputArray { name: want.name.clone(), shape: vec![count, columns as i64], data: ArrayData::I64(data) }
}

/// Rows of image arrays as one array of `[rows, channels, size, size]`.
fn gather_images<'a>(want: &InputWant, rows: impl Iterator<Item = (&'a InputArray, usize)>) -> InputArray {
    let mut data = Vec::new();
    let mut shape = vec![0];
    for (array, row) in rows {
        let ArrayData::F32(values) = &array.data else { unreachable!("images give reals") };
        let size = values.len() / usize::try_from(array.shape[0]).expect("a batch has rows");
        data.extend_from_slice(&values[row * size..(row + 1) * size]);
        shape = array.shape.clone();
        shape[0] = 0;
    }
    shape[0] = (data.len() as i64).checked_div(shape[1..].iter().product()).unwrap_or(0);
    InputArray { name: want.name.clone(), shape, data: ArrayData::F32(data) }
}

fn check_text_inputs(inputs: &[InputWant]) -> Result<(), Error> {
    for InputWant { name, dtype } in inputs {
        if !TEXT_INPUTS.contains(&name.as_str()) || *dtype != ElementType::I64 {
            let given = "input_ids, attention_mask, token_type_ids (i64)";
            return Err(Error::Input { input: name.clone(), wanted: *dtype, kind: "text", given });
        }
    }
    if inputs.iter().all(|want| want.name != TEXT_INPUTS[0]) {
        return Err(Error::NoTokens {
            missing: TEXT_INPUTS[0],
            inputs: name::list(inputs.iter().map(|want| want.name.as_str())),
        });
    }
    Ok(())
}

fn check_image_inputs(inputs: &[InputWant]) -> Result<(), Error> {
    match inputs {
        [InputWant { dtype: ElementType::F32, .. }] => Ok(()),
        [InputWant { name, dtype }] => {
            let given = "one array of f32, [samples, channels, size, size]";
            Err(Error::Input { input: name.clone(), wanted: *dtype, kind: "image", given })
        }
        _ => Err(Error::InputCount { count: inputs.len() }),
    }
}
