//! Random changes of training images.

use crate::convert::checker::{Checker, Interval};
use crate::pb;
use crate::spec::{ColorJitter, ImageAugmentation, RandomErasing, RandomRectangle};

/// What the messages of the proto are when absent.
const CROP: RandomRectangle = RandomRectangle { scale: [0.08, 1.0], ratio: [3.0 / 4.0, 4.0 / 3.0] };
const ERASED: RandomRectangle = RandomRectangle { scale: [0.02, 0.33], ratio: [0.3, 3.3] };
const ERASING_PROBABILITY: f64 = 0.5;

/// `channels`: of the images.
pub(super) fn read(at: &mut Checker, raw: &pb::ImageAugmentation, channels: usize) -> ImageAugmentation {
    let crop = raw.random_resized_crop.as_ref();
    let found = ImageAugmentation {
        random_resized_crop: crop
            .map(|raw| at.within("random_resized_crop", |at| rectangle(at, &raw.scale, &raw.ratio, CROP))),
        horizontal_flip: at.real("horizontal_flip", raw.horizontal_flip, Interval::Closed(0.0, 1.0), 0.0),
        color_jitter: raw.color_jitter.as_ref().map(|raw| at.within("color_jitter", |at| jitter(at, raw, channels))),
        random_erasing: raw.random_erasing.as_ref().map(|raw| at.within("random_erasing", |at| erasing(at, raw))),
    };
    let others = [raw.random_resized_crop.is_some(), raw.color_jitter.is_some(), raw.random_erasing.is_some()];
    // A probability out of range is reported on its own.
    if others == [false; 3] && matches!(raw.horizontal_flip, None | Some(0.0)) {
        at.refuse(
            "",
            "changes nothing: give random_resized_crop, horizontal_flip, color_jitter or random_erasing, or leave it out",
        );
    }
    found
}

fn jitter(at: &mut Checker, raw: &pb::ColorJitter, channels: usize) -> ColorJitter {
    let allowed = Interval::Closed(0.0, 1.0);
    let found = ColorJitter {
        brightness: at.real("brightness", raw.brightness, allowed, 0.0),
        contrast: at.real("contrast", raw.contrast, allowed, 0.0),
        saturation: at.real("saturation", raw.saturation, allowed, 0.0),
    };
    if [raw.brightness, raw.contrast, raw.saturation].iter().all(|given| matches!(given, None | Some(0.0))) {
        at.refuse("", "changes nothing: give brightness, contrast or saturation above 0, or leave it out");
    }
    if found.saturation > 0.0 && channels == 1 {
        at.refuse("saturation", "needs three channels, and data.image.mean has one (grey): leave it out");
    }
    found
}

fn erasing(at: &mut Checker, raw: &pb::RandomErasing) -> RandomErasing {
    RandomErasing {
        probability: at.real("probability", raw.probability, Interval::LeftOpen(0.0, 1.0), ERASING_PROBABILITY),
        rectangle: rectangle(at, &raw.scale, &raw.ratio, ERASED),
    }
}

fn rectangle(at: &mut Checker, scale: &[f64], ratio: &[f64], absent: RandomRectangle) -> RandomRectangle {
    RandomRectangle {
        scale: bounds(at, "scale", scale, Interval::LeftOpen(0.0, 1.0), absent.scale),
        ratio: bounds(at, "ratio", ratio, Interval::Closed(0.01, 100.0), absent.ratio),
    }
}

/// Two ascending numbers, or none for `absent`.
fn bounds(at: &mut Checker, field: &str, given: &[f64], allowed: Interval, absent: [f64; 2]) -> [f64; 2] {
    match *given {
        [] => absent,
        [low, high] => {
            let found = [(0, low), (1, high)]
                .map(|(place, value)| at.real(&format!("{field}[{place}]"), Some(value), allowed, absent[place]));
            if low > high {
                at.refuse(field, format!("must ascend (smallest, largest), not {low}, {high}: exchange the two"));
            }
            found
        }
        _ => {
            at.refuse(field, format!("must have two numbers (smallest, largest), not {}", given.len()));
            absent
        }
    }
}
