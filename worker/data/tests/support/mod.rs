//! Small generated datasets in a temporary folder.

#![allow(dead_code, reason = "each test file uses some of it")]

use image::{Rgb, RgbImage};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use thaw_data::{ElementType, InputWant};
use thaw_proto::spec::Data;

/// A folder that goes away with the test.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Source of a format, with columns `text` and `label`.
    pub(crate) fn source(&self, name: &str, format: &str) -> Value {
        let url = url::Url::from_file_path(self.path().join(name)).unwrap();
        let column = |column| if format == "image_folder" { "" } else { column };
        json!({"path": url, "format": format, "text": column("text"), "label": column("label"), "tokenizer": null})
    }

    /// A spec that trains on `name`, split 0.6 / 0.2 / 0.2.
    pub(crate) fn spec(&self, name: &str, format: &str) -> Value {
        let image =
            (format == "image_folder").then(|| json!({"size": 8, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}));
        json!({
            "train": self.source(name, format), "eval": null, "test": null,
            "split": {"train": 0.6, "eval": 0.2, "test": 0.2, "stratified": true},
            "max_length": 8, "image": image,
        })
    }
}

pub(crate) fn checked(spec: &Value) -> Data {
    serde_json::from_value(spec.clone()).unwrap()
}

/// `label,text` with `each` samples of every class, in turn; texts are unique.
pub(crate) fn csv(classes: &[&str], each: usize) -> String {
    let mut file = "label,text\n".to_owned();
    for number in 0..each {
        for class in classes {
            file += &format!("{class},{class} {number}\n");
        }
    }
    file
}

/// A picture whose pixels follow from its number.
pub(crate) fn picture(number: u32, width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([(x * 7 + number * 31) as u8, (y * 11 + number * 17) as u8, (x * y + number) as u8])
    })
}

pub(crate) fn png(number: u32) -> Vec<u8> {
    encoded(&picture(number, 12, 10), image::ImageFormat::Png)
}

pub(crate) fn encoded(picture: &RgbImage, format: image::ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// `each` images for every class under `images/`.
pub(crate) fn images(folder: &Folder, classes: &[&str], each: u32) {
    for (class_number, class) in classes.iter().enumerate() {
        for number in 0..each {
            folder.write(&format!("images/{class}/{number:03}.png"), png(class_number as u32 * 100 + number));
        }
    }
}

pub(crate) fn wants(inputs: &[(&str, ElementType)]) -> Vec<InputWant> {
    inputs.iter().map(|(name, dtype)| InputWant { name: (*name).to_owned(), dtype: *dtype }).collect()
}

pub(crate) fn text_wants() -> Vec<InputWant> {
    wants(&[("input_ids", ElementType::I64), ("attention_mask", ElementType::I64)])
}

/// Word pieces `a`..`z` and digits, [CLS] text [SEP].
pub(crate) fn tokenizer() -> Vec<u8> {
    let mut vocab = serde_json::Map::new();
    let pieces = ('a'..='z').chain('0'..='9').flat_map(|letter| [letter.to_string(), format!("##{letter}")]);
    for (id, piece) in ["[PAD]", "[UNK]", "[CLS]", "[SEP]"].map(str::to_owned).into_iter().chain(pieces).enumerate() {
        vocab.insert(piece, json!(id));
    }
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    let token = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let text = |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
    let template = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
    serde_json::to_vec(&json!({
        "version": "1.0", "truncation": null,
        "padding": {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [special(0, "[PAD]"), special(1, "[UNK]"), special(2, "[CLS]"), special(3, "[SEP]")],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [token("[CLS]"), text("A", 0), token("[SEP]")],
            "pair": [token("[CLS]"), text("A", 0), token("[SEP]"), text("B", 1), token("[SEP]")],
            "special_tokens": {"[CLS]": template("[CLS]", 2), "[SEP]": template("[SEP]", 3)},
        },
        "decoder": null,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocab},
    }))
    .unwrap()
}
