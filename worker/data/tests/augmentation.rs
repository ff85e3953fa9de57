//! Random changes of images: against torchvision, change by change, and what holds for every draw.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use support::{Folder, checked, encoded, images, picture, wants};
use thaw_data::augment::{Draw, Key, Rectangle, Tint, View, draw};
use thaw_data::image::Transform;
use thaw_data::{ArrayData, Dataset, ElementType, Part, build};
use thaw_proto::spec::ImageAugmentation;

const SIZE: u32 = 24;

const SCRIPT: &str = r#"
import json, sys
from PIL import Image
from torchvision.transforms import functional as F

answer = []
for case in json.load(open(sys.argv[1])):
    channels = len(case["mean"])
    image = Image.open(case["path"]).convert("L" if channels == 1 else "RGB")
    if case["crop"]:
        left, top, width, height = case["crop"]
        image = F.resized_crop(image, top, left, height, width, [case["size"]] * 2, antialias=True)
    else:
        image = F.resize(image, [case["size"]] * 2, antialias=True)
    if case["flip"]:
        image = F.hflip(image)
    for name, factor in case["tints"]:
        image = getattr(F, f"adjust_{name}")(image, factor)
    planes = F.normalize(F.to_tensor(image), case["mean"], case["std"])
    if case["erased"]:
        left, top, width, height = case["erased"]
        planes = F.erase(planes, top, left, height, width, 0)
    answer.append(planes.flatten().tolist())
json.dump(answer, open(sys.argv[2], "w"))
"#;

fn everything() -> ImageAugmentation {
    serde_json::from_value(json!({
        "random_resized_crop": {"scale": [0.3, 0.9], "ratio": [0.75, 1.5]},
        "horizontal_flip": 0.5,
        "color_jitter": {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2},
        "random_erasing": {"probability": 0.5, "rectangle": {"scale": [0.05, 0.3], "ratio": [0.5, 2.0]}},
    }))
    .unwrap()
}

fn key(seed: u64, record: u32, view: u32) -> Key {
    Key { seed, record, view: View(view) }
}

fn corners(part: Option<Rectangle>) -> Value {
    part.map_or(Value::Null, |part| json!([part.left, part.top, part.width, part.height]))
}

fn name(tint: Tint) -> &'static str {
    match tint {
        Tint::Brightness => "brightness",
        Tint::Contrast => "contrast",
        Tint::Saturation => "saturation",
    }
}

/// Every change alone on an image that needs no resizing, then draws of everything on images that do.
fn cases() -> Vec<(u32, u32, Draw)> {
    let part = Rectangle { left: 3, top: 5, width: 11, height: 7 };
    let tints = [Tint::Brightness, Tint::Contrast, Tint::Saturation]
        .map(|tint| [0.0, 0.3, 0.75, 1.0, 1.4].map(|by| (tint, by)));
    let mut cases: Vec<(u32, u32, Draw)> =
        tints.into_iter().flatten().map(|tint| (SIZE, SIZE, Draw { tints: vec![tint], ..Draw::default() })).collect();
    let both = vec![(Tint::Contrast, 1.3), (Tint::Saturation, 0.6), (Tint::Brightness, 0.9)];
    cases.push((SIZE, SIZE, Draw { flip: true, tints: both, erased: Some(part), ..Draw::default() }));
    cases.push((40, 30, Draw { crop: Some(part), ..Draw::default() }));
    cases.push((40, 30, Draw { crop: Some(Rectangle { left: 0, top: 0, width: 40, height: 30 }), ..Draw::default() }));
    for view in 0..8 {
        let (width, height) = (30 + view * 7, 90 - view * 8);
        cases.push((
            width,
            height,
            Draw { tints: Vec::new(), ..draw(&everything(), key(1, 2, view), width, height, SIZE) },
        ));
    }
    cases
}

#[test]
fn every_change_is_that_of_torchvision() {
    let python = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../.venv/bin/python"));
    if !python.exists() {
        assert!(std::env::var_os("CI").is_none(), "the reference Python is missing; run make setup");
        eprintln!("skipped: no reference Python (make setup installs it)");
        return;
    }
    let folder = Folder::new();
    let (mut asked, mut ours) = (Vec::new(), Vec::new());
    for (number, (width, height, draw)) in cases().into_iter().enumerate() {
        for channels in [1, 3] {
            let bytes = encoded(&picture(number as u32, width, height), image::ImageFormat::Png);
            let path = folder.write(&format!("{number}.png"), &bytes);
            let (mean, std) = (&[0.485, 0.456, 0.406][..channels], &[0.229, 0.224, 0.225][..channels]);
            let spec = json!({"size": SIZE, "mean": mean, "std": std});
            let mut planes = Vec::new();
            let mut transform = Transform::new(&serde_json::from_value(spec.clone()).unwrap()).unwrap();
            transform.apply_changed(&bytes, |_, _| draw.clone(), &mut planes).unwrap();
            let tints: Vec<Value> = draw.tints.iter().map(|(tint, factor)| json!([name(*tint), factor])).collect();
            let mut case = json!({
                "path": path, "crop": corners(draw.crop), "flip": draw.flip, "tints": tints, "erased": corners(draw.erased),
            });
            case.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
            asked.push(case);
            // Without resizing equal to what f32 can tell, else to one step of 8 bits over the smallest deviation.
            let tolerance = if (width, height) == (SIZE, SIZE) { 1e-5 } else { 1.01 / 255.0 / 0.224 };
            ours.push((planes, tolerance));
        }
    }
    let script = folder.write("reference.py", SCRIPT);
    let question = folder.write("asked.json", serde_json::to_vec(&asked).unwrap());
    let answer = folder.path().join("answer.json");
    let status = Command::new(python).arg(script).arg(question).arg(&answer).status().unwrap();
    assert!(status.success());
    let theirs: Vec<Vec<f32>> = serde_json::from_slice(&fs::read(answer).unwrap()).unwrap();
    assert_eq!(ours.len(), theirs.len());
    for ((asked, (ours, tolerance)), theirs) in asked.iter().zip(&ours).zip(&theirs) {
        assert_eq!(ours.len(), theirs.len());
        let worst = ours.iter().zip(theirs).map(|(ours, theirs)| (ours - theirs).abs()).fold(0.0, f32::max);
        assert!(worst <= *tolerance, "{asked}: {worst}");
    }
}

/// Changing this draw changes the result of every augmented run.
#[test]
fn data_5_a_draw_is_frozen_and_follows_from_its_key() {
    let of = |key: Key| draw(&everything(), key, 100, 80, SIZE);
    let found = of(key(7, 3, 1));
    assert_eq!(found, of(key(7, 3, 1)));
    for other in [key(8, 3, 1), key(7, 4, 1), key(7, 3, 2), key(7, 31, 1), key(7, 3, 11)] {
        assert_ne!(found, of(other), "{other:?}");
    }
    assert_eq!(format!("{found:?}"), FROZEN);
    // One kind of change does not shift another's numbers.
    let flips: ImageAugmentation = serde_json::from_value(json!({
        "random_resized_crop": null, "horizontal_flip": 0.5, "color_jitter": null, "random_erasing": null,
    }))
    .unwrap();
    for view in 0..32 {
        assert_eq!(draw(&flips, key(7, 3, view), 100, 80, SIZE).flip, of(key(7, 3, view)).flip);
    }
}

const FROZEN: &str = "Draw { crop: Some(Rectangle { left: 30, top: 6, width: 69, height: 47 }), flip: true, tints: [(Brightness, 0.879059), \
    (Contrast, 0.9078718), (Saturation, 0.90987295)], erased: None }";

#[test]
fn draws_are_spread_as_the_spec_says() {
    let spec = everything();
    let count = 4000;
    let draws: Vec<Draw> = (0..count).map(|view| draw(&spec, key(5, 9, view), 1000, 1000, 1000)).collect();
    let share =
        |holds: &dyn Fn(&Draw) -> bool| draws.iter().filter(|draw| holds(draw)).count() as f64 / f64::from(count);
    let mean = |of: &dyn Fn(&Draw) -> f64| draws.iter().map(of).sum::<f64>() / f64::from(count);
    // Four standard deviations of 4000 draws.
    assert!((share(&|draw| draw.flip) - 0.5).abs() < 0.032);
    assert!((share(&|draw| draw.erased.is_some()) - 0.5).abs() < 0.032);
    let factor = |draw: &Draw, tint: Tint| draw.tints.iter().find(|(other, _)| *other == tint).unwrap().1;
    assert!((mean(&|draw| f64::from(factor(draw, Tint::Brightness))) - 1.0).abs() < 0.4 / 3_f64.sqrt() * 4.0 / 63.0);
    assert!((share(&|draw| draw.tints[0].0 == Tint::Contrast) - 1.0 / 3.0).abs() < 0.03, "their order is random");
    let ratio = |draw: &Draw| draw.crop.map(|part| (f64::from(part.width) / f64::from(part.height)).ln()).unwrap();
    // Large and long ones do not fit, so areas are a little smaller than the middle; ratios stay centred between those that fit.
    assert!((mean(&ratio) - 0.5 * (0.75_f64 * 1.5).ln()).abs() < 0.03, "{}", mean(&ratio));
    let area = |draw: &Draw| draw.crop.map(|part| f64::from(part.width) * f64::from(part.height) / 1e6).unwrap();
    assert!((0.5..0.6).contains(&mean(&area)), "{}", mean(&area));
    let left =
        |draw: &Draw| draw.crop.map(|part| f64::from(part.left) / f64::from(1000 - part.width).max(1.0)).unwrap();
    assert!((mean(&left) - 0.5).abs() < 0.02, "{}", mean(&left));
}

proptest! {
    #[test]
    fn draws_stay_within_their_bounds(
        seed: u64, record: u32, view: u32, width in 1_u32..400, height in 1_u32..400,
        low in 0.01..1.0_f64, narrow in 0.1..2.0_f64, wide in 1.0..4.0_f64, jitter in 0.0..=1.0_f64,
    ) {
        let bounds = json!({"scale": [low, 1.0], "ratio": [narrow, narrow * wide]});
        let spec = serde_json::from_value(json!({
            "random_resized_crop": bounds, "horizontal_flip": 1.0,
            "color_jitter": {"brightness": jitter, "contrast": 0.0, "saturation": jitter},
            "random_erasing": {"probability": 1.0, "rectangle": bounds},
        })).unwrap();
        let found = draw(&spec, key(seed, record, view), width, height, SIZE);
        let fits = |part: Rectangle, width: u32, height: u32| {
            part.width >= 1 && part.height >= 1 && part.left + part.width <= width && part.top + part.height <= height
        };
        prop_assert!(found.crop.is_some_and(|part| fits(part, width, height)));
        prop_assert!(found.erased.is_none_or(|part| fits(part, SIZE, SIZE)));
        prop_assert!(found.flip);
        prop_assert_eq!(found.tints.len(), if jitter > 0.0 { 2 } else { 0 });
        for (tint, factor) in &found.tints {
            prop_assert!(*tint != Tint::Contrast && (1.0 - jitter..=1.0 + jitter + 1e-6).contains(&f64::from(*factor)));
        }
        // Large enough that rounding to pixels is small, and not the fallback of what does not fit.
        if let Some(part) = found.erased.filter(|part| part.width >= 8 && part.height >= 8) {
            let (wide_side, tall_side) = (f64::from(part.width), f64::from(part.height));
            let off = 0.15;
            prop_assert!(wide_side * tall_side >= low * f64::from(SIZE * SIZE) * (1.0 - off));
            prop_assert!((narrow * (1.0 - off)..=narrow * wide * (1.0 + off)).contains(&(tall_side / wide_side)));
        }
    }
}

fn dataset(folder: &Folder, seed: u64, augmentation: &Value) -> Dataset {
    let mut spec = folder.spec("images", "image_folder");
    spec["image"]["augmentation"] = augmentation.clone();
    let data = checked(&spec);
    Dataset::open(build(&data, seed, 1).unwrap(), &data, None, &wants(&[("x", ElementType::F32)])).unwrap()
}

fn pixels(dataset: &Dataset, positions: &[u32], view: Option<u32>) -> Vec<f32> {
    let batch = dataset.load(Part::Train, positions, view.map(View)).unwrap();
    let ArrayData::F32(values) = &batch.inputs[0].data else { panic!("expected f32") };
    values.clone()
}

#[test]
fn a_view_is_the_same_alone_in_any_batch_and_on_any_thread() {
    let folder = Folder::new();
    images(&folder, &["cat", "dog"], 5);
    let all = serde_json::to_value(everything()).unwrap();
    let (plain, changed) = (dataset(&folder, 1, &Value::Null), dataset(&folder, 1, &all));
    assert_eq!(pixels(&changed, &[0, 1, 2], None), pixels(&plain, &[0, 1, 2], None), "as they are");
    assert_eq!(pixels(&plain, &[0, 1], Some(3)), pixels(&plain, &[0, 1], None), "nothing changes them");
    let views: Vec<Vec<f32>> = (0..8).map(|view| pixels(&changed, &[1], Some(view))).collect();
    for (view, found) in views.iter().enumerate() {
        let batch = pixels(&changed, &[2, 1, 0], Some(view as u32));
        assert_eq!(&batch[found.len()..2 * found.len()], found.as_slice());
        assert!(views[..view].iter().all(|other| other != found), "view {view} is new");
    }
    let moved = changed.clone();
    let elsewhere = std::thread::spawn(move || pixels(&moved, &[1], Some(5))).join().unwrap();
    assert_eq!(elsewhere, views[5]);
    assert_ne!(pixels(&dataset(&folder, 2, &all), &[1], Some(5)), views[5], "another seed");
}

/// What is kept of samples as they are is shared by runs with and without augmentation, of any seed; views only by runs with the same.
#[test]
fn identities_tell_views_apart_and_nothing_else() {
    let folder = Folder::new();
    images(&folder, &["cat", "dog"], 5);
    let all = serde_json::to_value(everything()).unwrap();
    let (plain, changed) = (dataset(&folder, 1, &Value::Null), dataset(&folder, 1, &all));
    let identity = plain.records_identity(Part::Train);
    // Keys of earlier versions hold this text.
    assert!(
        identity
            .ends_with(r#" ImageFolder "" ImageTransform { size: 8, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5] }"#),
        "{identity}"
    );
    assert_eq!(changed.records_identity(Part::Train), identity);
    assert_eq!(dataset(&folder, 2, &all).records_identity(Part::Eval), identity);
    assert_eq!(plain.views_identity(Part::Train), None);
    let views = changed.views_identity(Part::Train).unwrap();
    assert_eq!(dataset(&folder, 1, &all).views_identity(Part::Train).unwrap(), views);
    let mut other = all.clone();
    other["horizontal_flip"] = json!(0.25);
    for different in [dataset(&folder, 2, &all), dataset(&folder, 1, &other)] {
        assert_ne!(different.views_identity(Part::Train).unwrap(), views);
    }
}
