//! `DATA-4`: everything that can be wrong with data is one sentence naming the file, the place and the way out.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use serde_json::{Value, json};
use std::error::Error as _;
use support::{Folder, checked, csv, images, png};
use thaw_data::build;

/// Builds with one shard and gives the error with its causes, the folder written as `DIR`.
fn refused(folder: &Folder, spec: &Value) -> String {
    refused_with(folder, spec, 1)
}

fn refused_with(folder: &Folder, spec: &Value, shards: u32) -> String {
    let error = build(&checked(spec), 1, shards).expect_err("bad input is refused");
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text.replace(folder.path().to_str().unwrap(), "DIR")
}

fn of_csv(bytes: impl AsRef<[u8]>) -> String {
    let folder = Folder::new();
    folder.write("x.csv", bytes);
    refused(&folder, &folder.spec("x.csv", "csv"))
}

fn of_jsonl(bytes: impl AsRef<[u8]>) -> String {
    let folder = Folder::new();
    folder.write("x.jsonl", bytes);
    refused(&folder, &folder.spec("x.jsonl", "jsonl"))
}

fn of_images(change: impl FnOnce(&Folder)) -> String {
    let folder = Folder::new();
    images(&folder, &["cat", "dog"], 5);
    change(&folder);
    refused(&folder, &folder.spec("images", "image_folder"))
}

#[test]
fn places() {
    let folder = Folder::new();
    assert_eq!(
        refused(&folder, &folder.spec("x.csv", "csv")),
        "data source DIR/x.csv: there is no such file or folder"
    );
    let mut spec = folder.spec("x.csv", "csv");
    spec["train"]["path"] = json!("s3://lab/x.csv");
    assert_eq!(refused(&folder, &spec), "data source s3://lab/x.csv: only local files (file:///…) can be read");
    folder.write("images/readme.txt", "");
    assert_eq!(
        refused(&folder, &folder.spec("images", "csv")),
        "data source DIR/images: expected a file, which the format csv needs"
    );
    assert_eq!(
        refused(&folder, &folder.spec("images/readme.txt", "image_folder")),
        "data source DIR/images/readme.txt: expected a folder, which the format image_folder needs"
    );
}

#[test]
fn csv_files() {
    assert_eq!(of_csv(""), "DIR/x.csv: holds no samples");
    assert_eq!(of_csv("text,label\n"), "DIR/x.csv: holds no samples");
    assert_eq!(
        of_csv("id,Text,lable\n1,a,b\n"),
        "DIR/x.csv: no column \"text\"; did you mean \"Text\" (columns: \"id\", \"Text\", \"lable\")"
    );
    assert_eq!(of_csv("text,x\na,b\n"), "DIR/x.csv: no column \"label\" (columns: \"text\", \"x\")");
    assert_eq!(of_csv("text,label,text\na,b,c\n"), "DIR/x.csv: column \"text\" appears more than once; rename one");
    assert_eq!(
        of_csv("text,label\na,b\n\"two\nlines\",b\n\na,b,c\n"),
        "DIR/x.csv:6: 3 fields where the header has 2; quote texts that hold commas"
    );
    assert_eq!(
        of_csv("text,label\r\na,b\r\n\r\nc\r\n"),
        "DIR/x.csv:4: 1 fields where the header has 2; quote texts that hold commas"
    );
    assert_eq!(of_csv(b"text,label\na,b\n\xff\xfe,b\n"), "DIR/x.csv:3: not UTF-8; convert the file to UTF-8");
    assert_eq!(of_csv(b"text,lab\xffel\na,b\n"), "DIR/x.csv:1: not UTF-8; convert the file to UTF-8");
    assert_eq!(
        of_csv("text,label\r\na,b\r\n ,b\r\n"),
        "DIR/x.csv:3: \"text\" is empty; fill it in or remove the record"
    );
    assert_eq!(of_csv("text,label\na,b\nc,\n"), "DIR/x.csv:3: \"label\" is empty; fill it in or remove the record");
    assert_eq!(of_csv("label,text\na,b\nb,\"c\nd,e\nf,g\n"), "DIR/x.csv:3: a quote opens here and never closes");
}

#[test]
fn jsonl_files() {
    assert_eq!(of_jsonl("\n\n"), "DIR/x.jsonl: holds no samples");
    assert!(
        of_jsonl("{\"text\":\"a\",\"label\":1}\n\n{\"text\":")
            .starts_with("DIR/x.jsonl:3: not valid JSON; each line must hold one object: EOF while parsing")
    );
    assert_eq!(
        of_jsonl("[1]\n"),
        "DIR/x.jsonl:1: an array where an object is expected; each line must hold one object"
    );
    assert_eq!(
        of_jsonl("{\"text\":\"a\",\"label\":1}\n{\"texts\":\"a\",\"label\":1}\n"),
        "DIR/x.jsonl:2: no key \"text\"; did you mean \"texts\" (keys: \"texts\", \"label\")"
    );
    assert_eq!(of_jsonl("{\"text\":7,\"label\":1}\n"), "DIR/x.jsonl:1: \"text\" is a number, expected a string");
    assert_eq!(
        of_jsonl("{\"text\":\"a\",\"label\":null}\n"),
        "DIR/x.jsonl:1: \"label\" is null, expected a string or a number"
    );
    assert_eq!(
        of_jsonl("{\"text\":\"\",\"label\":1}\n"),
        "DIR/x.jsonl:1: \"text\" is empty; fill it in or remove the record"
    );
    assert_eq!(of_jsonl(b"{\"text\":\"\xff\",\"label\":1}\n"), "DIR/x.jsonl:1: not UTF-8; convert the file to UTF-8");
}

#[test]
fn image_folders() {
    let folder = Folder::new();
    folder.write("images/.hidden/x.png", png(1));
    assert_eq!(
        refused(&folder, &folder.spec("images", "image_folder")),
        "DIR/images: has no class folders; put the images into one folder per class"
    );
    assert_eq!(
        of_images(|folder| std::fs::create_dir(folder.path().join("images/bird")).unwrap()),
        "DIR/images/bird: class \"bird\" has no images; add some or remove the folder"
    );
    assert_eq!(
        of_images(|folder| drop(folder.write("images/stray.PNG", png(1)))),
        "DIR/images/stray.PNG: an image outside the class folders; move it into the folder of its class"
    );
    assert_eq!(
        of_images(|folder| drop(folder.write("images/cat/notes.png", "words"))),
        "image DIR/images/cat/notes.png cannot be used; replace or remove it: neither PNG nor JPEG by its first bytes"
    );
    let cut = of_images(|folder| drop(folder.write("images/cat/cut.png", &png(1)[..60])));
    assert!(
        cut.starts_with("image DIR/images/cat/cut.png cannot be used; replace or remove it: decode the image: "),
        "{cut}"
    );
    let headless = of_images(|folder| drop(folder.write("images/cat/head.png", &png(1)[..20])));
    assert!(headless.contains("head.png cannot be used; replace or remove it: read the image header: "), "{headless}");
}

#[test]
fn classes_and_parts() {
    let folder = Folder::new();
    folder.write("one.csv", csv(&["math"], 9));
    assert_eq!(
        refused(&folder, &folder.spec("one.csv", "csv")),
        "DIR/one.csv: all samples are of class \"math\"; at least two classes are needed"
    );
    folder.write("few.csv", csv(&["mail", "math"], 9) + "rare,x\nrare,y\n");
    assert_eq!(
        refused(&folder, &folder.spec("few.csv", "csv")),
        "DIR/few.csv: class \"rare\" has 2 sample(s), too few for 3 parts; add samples or give evaluation and test sources of their own"
    );
    folder.write("good.csv", csv(&["mail", "math"], 10));
    assert_eq!(
        refused_with(&folder, &folder.spec("good.csv", "csv"), 13),
        "DIR/good.csv: 12 training samples are fewer than 13 logical shards; lower logical_shards"
    );
    folder.write("eval.csv", csv(&["mail", "maths"], 2));
    let mut spec = folder.spec("good.csv", "csv");
    spec["eval"] = folder.source("eval.csv", "csv");
    spec["split"]["eval"] = json!(0.0);
    assert_eq!(
        refused(&folder, &spec),
        "DIR/eval.csv:3: label \"maths\" of the eval part does not occur in training; did you mean \"math\""
    );
    images(&folder, &["mail", "math"], 1);
    spec["eval"] = folder.source("images", "image_folder");
    assert_eq!(
        refused(&folder, &spec),
        "data source DIR/images: an image folder cannot stand beside a training source of another kind; give text with text, images with images"
    );
    images(&folder, &["zebra"], 1);
    assert_eq!(
        refused(&folder, &spec),
        "DIR/images: label \"zebra\" of the eval part does not occur in training (classes: \"mail\", \"math\")"
    );
}
