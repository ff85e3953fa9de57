//! Batches: the right record for each position, padding, what a graph may ask for, and loading ahead.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{Folder, checked, csv, encoded, images, picture, text_wants, tokenizer, wants};
use thaw_data::batch::Error;
use thaw_data::image::Transform;
use thaw_data::text::Tokenizer;
use thaw_data::{ArrayData, Dataset, ElementType, Part, Prefetch, Work, build};

fn open(spec: &Value) -> Dataset {
    let data = checked(spec);
    Dataset::open(build(&data, 3, 2).unwrap(), &data, Some(&tokenizer()), &text_wants()).unwrap()
}

fn i64s(data: &ArrayData) -> &[i64] {
    match data {
        ArrayData::I64(values) => values,
        ArrayData::F32(_) => panic!("expected i64"),
    }
}

/// What the tokenizer gives for one text alone.
fn ids(text: &str) -> Vec<i64> {
    Tokenizer::new(&tokenizer(), 8).unwrap().encode(&[text.to_owned()]).unwrap().input_ids
}

#[test]
fn texts_are_padded_to_the_longest_and_cut() {
    let tokens = Tokenizer::new(&tokenizer(), 8)
        .unwrap()
        .encode(&["ab".into(), "a b c d e f g h i".into(), "!".into()])
        .unwrap();
    assert_eq!((tokens.rows, tokens.columns), (3, 8));
    assert_eq!(tokens.input_ids[..8], [2, 4, 7, 3, 0, 0, 0, 0]);
    assert_eq!(tokens.input_ids[8..16], [2, 4, 6, 8, 10, 12, 14, 3]);
    assert_eq!(tokens.input_ids[16..], [2, 1, 3, 0, 0, 0, 0, 0]);
    assert_eq!(tokens.attention_mask[..8], [1, 1, 1, 1, 0, 0, 0, 0]);
    assert_eq!(tokens.attention_mask[8..16], [1; 8]);
    assert_eq!(tokens.token_type_ids, [0; 24]);
    assert!(matches!(Tokenizer::new(b"{}", 8), Err(thaw_data::text::Error::Load { .. })));
    assert!(matches!(Tokenizer::new(&tokenizer(), 2), Err(thaw_data::text::Error::MaxLength { special: 2, .. })));
}

#[test]
fn seeks_survive_quotes_line_ends_and_marks() {
    let folder = Folder::new();
    let mut file = "\u{feff}label,note,text\r\n".to_owned();
    let mut texts = Vec::new();
    for number in 0..12 {
        texts.push(format!("a {number}"));
        file += &match number % 4 {
            0 => format!("x,\"two\r\nlines, \"\"quoted\"\"\",a {number}\r\n"),
            1 => format!("y,,\"a {number}\"\r\n\r\n"),
            2 => format!("\"x\",é,a {number}\n"),
            _ => format!("y,z,\"a\n{number}\"\n"),
        };
    }
    folder.write("x.csv", file.trim_end());
    let dataset = open(&folder.spec("x.csv", "csv"));
    for part in Part::ALL {
        for position in 0..dataset.index().size(part) {
            let batch = dataset.load(part, &[position], None).unwrap();
            let record = dataset.index().records(part)[position as usize];
            assert_eq!(i64s(&batch.inputs[0].data), ids(&texts[record as usize]));
            assert_eq!(batch.labels, [i64::from(record % 2)]);
        }
    }
}

#[test]
fn jsonl_records_are_found_again() {
    let folder = Folder::new();
    let lines: String = (0..15).map(|n| format!(" {{\"text\": \"b{n}\", \"label\": {}}} \r\n\n", n % 3)).collect();
    folder.write("x.jsonl", format!("\u{feff}{lines}"));
    let dataset = open(&folder.spec("x.jsonl", "jsonl"));
    for position in 0..dataset.index().size(Part::Train) {
        let record = dataset.index().records(Part::Train)[position as usize];
        let batch = dataset.load(Part::Train, &[position], None).unwrap();
        assert_eq!(i64s(&batch.inputs[0].data), ids(&format!("b{record}")));
        assert_eq!(batch.labels, [i64::from(record % 3)]);
    }
}

#[test]
fn empty_batches_and_bad_positions() {
    let folder = Folder::new();
    folder.write("x.csv", csv(&["a", "b"], 10));
    let dataset = open(&folder.spec("x.csv", "csv"));
    let batch = dataset.load(Part::Train, &[], None).unwrap();
    assert_eq!(batch.inputs[1].shape, [0, 0]);
    assert!(batch.labels.is_empty());
    assert!(matches!(
        dataset.load(Part::Eval, &[4], None),
        Err(Error::Position { part: Part::Eval, position: 4, size: 4 })
    ));
}

#[test]
fn each_sample_that_is_read_is_told_of() {
    let folder = Folder::new();
    folder.write("x.csv", csv(&["a", "b"], 10));
    images(&folder, &["cat", "dog"], 5);
    let data = checked(&folder.spec("images", "image_folder"));
    let pictures = Dataset::open(build(&data, 1, 1).unwrap(), &data, None, &wants(&[("x", ElementType::F32)])).unwrap();
    for dataset in [open(&folder.spec("x.csv", "csv")), pictures] {
        let told = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&told);
        let dataset = dataset.telling(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        });
        dataset.clone().load(Part::Train, &[2, 0, 1], None).unwrap();
        assert_eq!(told.load(Ordering::Relaxed), 3);
    }
}

#[test]
fn a_graph_that_asks_for_more_is_refused() {
    let folder = Folder::new();
    folder.write("x.csv", csv(&["a", "b"], 10));
    images(&folder, &["cat", "dog"], 5);
    let refused = |format: &str, name: &str, tokens: Option<&[u8]>, inputs: &[(&str, ElementType)]| {
        let data = checked(&folder.spec(name, format));
        Dataset::open(build(&data, 1, 1).unwrap(), &data, tokens, &wants(inputs)).err().expect("refused").to_string()
    };
    let (long, float) = (ElementType::I64, ElementType::F32);
    let tokens = tokenizer();
    assert_eq!(
        refused("csv", "x.csv", Some(&tokens), &[("input_ids", long), ("bbox", long)]),
        "the graph asks for input \"bbox\" (i64), which text data cannot give; it gives input_ids, attention_mask, token_type_ids (i64)"
    );
    assert_eq!(
        refused("csv", "x.csv", Some(&tokens), &[("attention_mask", long)]),
        "the graph has no input \"input_ids\", which text data needs (inputs: \"attention_mask\")"
    );
    assert_eq!(
        refused("csv", "x.csv", None, &[("input_ids", long)]),
        "text data needs a tokenizer; set data.train.tokenizer, or put tokenizer.json beside the graph"
    );
    assert_eq!(
        refused("image_folder", "images", None, &[("input_ids", long)]),
        "the graph asks for input \"input_ids\" (i64), which image data cannot give; it gives one array of f32, [samples, channels, size, size]"
    );
    assert_eq!(
        refused("image_folder", "images", None, &[("x", float), ("y", float)]),
        "the graph asks for 2 inputs, and image data gives one; export a graph with a single image input"
    );
}

#[test]
fn images_become_normalized_planes() {
    let folder = Folder::new();
    images(&folder, &["cat", "dog"], 5);
    folder.write("images/dog/deep/er.jpg", encoded(&picture(9, 20, 30), image::ImageFormat::Jpeg));
    let data = checked(&folder.spec("images", "image_folder"));
    let dataset = Dataset::open(build(&data, 1, 1).unwrap(), &data, None, &wants(&[("x", ElementType::F32)])).unwrap();
    let batch = dataset.load(Part::Train, &[2, 0], None).unwrap();
    assert_eq!((batch.inputs[0].name.as_str(), batch.inputs[0].shape.as_slice()), ("x", [2, 3, 8, 8].as_slice()));
    let ArrayData::F32(values) = &batch.inputs[0].data else { panic!("expected f32") };
    assert_eq!(values.len(), 2 * 3 * 64);
    assert!(values.iter().all(|value| (-1.0..=1.0).contains(value)));
    assert_eq!(dataset.load(Part::Train, &[], None).unwrap().inputs[0].shape, [0, 3, 8, 8]);

    let same = serde_json::from_value(json!({"size": 8, "mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 4.0]})).unwrap();
    let (source, mut planes) = (picture(5, 8, 8), Vec::new());
    Transform::new(&same).unwrap().apply(&encoded(&source, image::ImageFormat::Png), &mut planes).unwrap();
    for (channel, (mean, std)) in [(0.1, 1.0), (0.2, 2.0), (0.3, 4.0)].into_iter().enumerate() {
        for (x, y, pixel) in source.enumerate_pixels() {
            let expected = (f32::from(pixel.0[channel]) / 255.0 - mean) / std;
            assert_eq!(planes[channel * 64 + (y * 8 + x) as usize].to_bits(), expected.to_bits());
        }
    }
}

#[test]
fn an_image_that_stops_decoding_is_named_in_its_place() {
    let folder = Folder::new();
    images(&folder, &["cat", "dog"], 10);
    let data = checked(&folder.spec("images", "image_folder"));
    let dataset = Dataset::open(build(&data, 1, 1).unwrap(), &data, None, &wants(&[("x", ElementType::F32)])).unwrap();
    let size = dataset.index().size(Part::Train);
    let record = dataset.index().records(Part::Train)[3];
    let name = format!("{}/{:03}.png", ["cat", "dog"][record as usize / 10], record % 10);
    let broken = folder.write(&format!("images/{name}"), "not any more");
    let work = (0..size).map(|position| Work { part: Part::Train, samples: vec![position], view: None });
    let mut prefetch = Prefetch::spawn(dataset, work, 4, 2).unwrap();
    for position in 0..3 {
        assert_eq!(prefetch.next().unwrap().unwrap().samples, [position]);
    }
    let error = prefetch.next().unwrap().unwrap_err();
    assert!(matches!(error, Error::Image { ref path, .. } if *path == broken), "{error}");
    assert!(prefetch.next().is_none());
}

#[test]
fn a_source_that_shrinks_under_the_run_is_an_error() {
    let folder = Folder::new();
    let path = folder.write("x.csv", csv(&["a", "b"], 10));
    let dataset = open(&folder.spec("x.csv", "csv"));
    fs::File::options().write(true).open(path).unwrap().set_len(12).unwrap();
    assert!(matches!(dataset.load(Part::Train, &[0], None), Err(Error::Read { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// `DATA-3`: a sample's row does not depend on the batch around it, but for padding, nor on threads.
    #[test]
    fn rows_do_not_depend_on_the_batch(picks in prop::collection::vec(0_u32..24, 1..12), threads in 1_usize..4) {
        let folder = Folder::new();
        folder.write("x.csv", csv(&["a", "bcd"], 20));
        let dataset = open(&folder.spec("x.csv", "csv"));
        let batch = dataset.load(Part::Train, &picks, None).unwrap();
        let columns = batch.inputs[0].shape[1] as usize;
        for (row, pick) in i64s(&batch.inputs[0].data).chunks(columns).zip(&picks) {
            let alone = dataset.load(Part::Train, &[*pick], None).unwrap();
            let alone = i64s(&alone.inputs[0].data);
            prop_assert_eq!(&row[..alone.len()], alone);
            prop_assert!(row[alone.len()..].iter().all(|id| *id == 0));
        }
        let work = std::iter::repeat_n(Work { part: Part::Train, samples: picks, view: None }, 5);
        for loaded in Prefetch::spawn(dataset, work, 3, threads).unwrap() {
            prop_assert_eq!(loaded.unwrap(), batch.clone());
        }
    }
}

#[test]
fn gathered_rows_are_what_loading_them_together_gives() {
    let folder = Folder::new();
    folder.write("x.csv", csv(&["x", "y"], 9));
    let dataset = open(&folder.spec("x.csv", "csv"));
    let one = dataset.load(Part::Train, &[0, 3, 1], None).unwrap();
    let other = dataset.load(Part::Train, &[2], None).unwrap();
    let whole = dataset.load(Part::Train, &[3, 2, 0], None).unwrap();
    let columns = whole.inputs[0].shape[1] as usize;
    assert_eq!(dataset.gather(&[(&one, 1), (&other, 0), (&one, 0)], columns), whole);
    let wider = dataset.gather(&[(&one, 1)], columns + 3);
    assert_eq!(wider.inputs[1].shape, [1, columns as i64 + 3]);
    assert_eq!(i64s(&wider.inputs[1].data).iter().sum::<i64>(), i64::from(wider.lengths[0]), "padding is masked");
    assert!(dataset.pads_right());
}

#[test]
fn gathered_images_keep_their_pixels_and_identity_follows_contents_not_the_split() {
    let folder = Folder::new();
    images(&folder, &["x", "y"], 8);
    let open = |seed| {
        let data = checked(&folder.spec("images", "image_folder"));
        Dataset::open(build(&data, seed, 2).unwrap(), &data, None, &wants(&[("x", ElementType::F32)])).unwrap()
    };
    let dataset = open(3);
    let one = dataset.load(Part::Train, &[1, 0], None).unwrap();
    let whole = dataset.load(Part::Train, &[0, 1], None).unwrap();
    assert_eq!(dataset.gather(&[(&one, 1), (&one, 0)], 0), whole);
    assert_eq!(dataset.records_identity(Part::Train), open(4).records_identity(Part::Eval));
    folder.write("images/x/000.png", support::png(77));
    assert_ne!(dataset.records_identity(Part::Train), open(3).records_identity(Part::Train));
}
