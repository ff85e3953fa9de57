//! Random changes of training images: what is drawn, and how 8-bit pixels change by it.
//!
//! `DATA-5`: a draw is a function of (seed, record, view, the image's size), by operations that every machine rounds alike; no thread, rank,
//! batch or order of calls changes it, and each kind of change has numbers of its own.
//!
//! The same as torchvision's `RandomResizedCrop`, `RandomHorizontalFlip`, `ColorJitter` on a PIL image, and `RandomErasing`, but for where
//! their random numbers come from.

use crate::random::Stream;
use thaw_proto::spec::{ColorJitter, ImageAugmentation, RandomErasing, RandomRectangle};

/// Draws of a rectangle before none is taken to fit.
const ATTEMPTS: usize = 10;

/// One of a sample's draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct View(pub u32);

/// What a draw follows from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Of the run.
    pub seed: u64,
    /// The sample's, in its source.
    pub record: u32,
    pub view: View,
}

/// A part of an image, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rectangle {
    pub left: u32,
    pub top: u32,
    pub width: u32,
    pub height: u32,
}

/// What an image is mixed with: factor 1 leaves it, 0 takes the other alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tint {
    /// Black.
    Brightness,
    /// The mean of its grey version.
    Contrast,
    /// Its grey version. Changes nothing of a grey image.
    Saturation,
}

/// How one image changes. The default leaves it as it is.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Draw {
    /// Of the decoded image, before it is resized.
    pub crop: Option<Rectangle>,
    /// Mirrored left and right.
    pub flip: bool,
    /// One after the other, with their factors (at least 0).
    pub tints: Vec<(Tint, f32)>,
    /// Of the resized image.
    pub erased: Option<Rectangle>,
}

/// The change of an image of `width` times `height` pixels that is resized to `size` by `size`.
#[must_use]
pub fn draw(spec: &ImageAugmentation, key: Key, width: u32, height: u32, size: u32) -> Draw {
    let stream = |purpose: &str| Stream::new(key.seed, purpose, &format!("{}/{}", key.record, key.view.0));
    let crop = |bounds: &RandomRectangle| crop(&mut stream("augmentation: crop"), bounds, width, height);
    let tints = |jitter: &ColorJitter| tints(&mut stream("augmentation: jitter"), jitter);
    let erased = |erasing: &RandomErasing| erased(&mut stream("augmentation: erasing"), erasing, size);
    Draw {
        crop: spec.random_resized_crop.as_ref().map(crop),
        flip: stream("augmentation: flip").unit() < spec.horizontal_flip,
        tints: spec.color_jitter.as_ref().map(tints).unwrap_or_default(),
        erased: spec.random_erasing.as_ref().and_then(erased),
    }
}

/// A rectangle within the bounds, else the largest one in the middle whose ratio is.
fn crop(stream: &mut Stream, bounds: &RandomRectangle, width: u32, height: u32) -> Rectangle {
    if let Some(found) = rectangle(stream, bounds, width, height) {
        return found;
    }
    let (wide, tall) = (f64::from(width), f64::from(height));
    let [narrowest, widest] = bounds.ratio;
    let (wide, tall) = if wide / tall < narrowest {
        (width, whole(wide / narrowest, height))
    } else if wide / tall > widest {
        (whole(tall * widest, width), height)
    } else {
        (width, height)
    };
    Rectangle { left: (width - wide) / 2, top: (height - tall) / 2, width: wide, height: tall }
}

/// A rectangle of a random area, ratio (width over height) and place; `None` where none was found that fits.
fn rectangle(stream: &mut Stream, bounds: &RandomRectangle, width: u32, height: u32) -> Option<Rectangle> {
    for _ in 0..ATTEMPTS {
        let area = f64::from(width) * f64::from(height) * between(stream, bounds.scale);
        let ratio = log_between(stream, bounds.ratio);
        let (wide, tall) = ((area * ratio).sqrt().round(), (area / ratio).sqrt().round());
        if wide >= 1.0 && wide <= f64::from(width) && tall >= 1.0 && tall <= f64::from(height) {
            let (wide, tall) = (wide as u32, tall as u32);
            let left = stream.below(u64::from(width - wide) + 1) as u32;
            let top = stream.below(u64::from(height - tall) + 1) as u32;
            return Some(Rectangle { left, top, width: wide, height: tall });
        }
    }
    None
}

fn tints(stream: &mut Stream, jitter: &ColorJitter) -> Vec<(Tint, f32)> {
    let widths = [
        (Tint::Brightness, jitter.brightness),
        (Tint::Contrast, jitter.contrast),
        (Tint::Saturation, jitter.saturation),
    ];
    let mut factor = |width: f64| between(stream, [1.0 - width, 1.0 + width]) as f32;
    let mut drawn: Vec<(Tint, f32)> = widths.iter().map(|(tint, width)| (*tint, factor(*width))).collect();
    stream.shuffle(&mut drawn);
    let is_given = |tint: Tint| widths.iter().any(|(other, width)| *other == tint && *width > 0.0);
    drawn.retain(|(tint, _)| is_given(*tint));
    drawn
}

fn erased(stream: &mut Stream, erasing: &RandomErasing, size: u32) -> Option<Rectangle> {
    if stream.unit() >= erasing.probability {
        return None;
    }
    // The image is square, so what is width over height there may be height over width here.
    let turned = rectangle(stream, &erasing.rectangle, size, size)?;
    Some(Rectangle { left: turned.top, top: turned.left, width: turned.height, height: turned.width })
}

fn between(stream: &mut Stream, [low, high]: [f64; 2]) -> f64 {
    low + (high - low) * stream.unit()
}

/// Uniform in its logarithm, by square roots alone: they are exact everywhere, and `exp` is not.
fn log_between(stream: &mut Stream, [low, high]: [f64; 2]) -> f64 {
    let exponent = stream.next_u64() >> 32;
    let (mut found, mut root) = (low, high / low);
    for bit in (0..32).rev() {
        root = root.sqrt();
        if exponent >> bit & 1 == 1 {
            found *= root;
        }
    }
    found
}

fn whole(length: f64, most: u32) -> u32 {
    (length.round() as u32).clamp(1, most)
}

/// The rows and columns of `part`, of an image whose pixels have `channels` bytes each.
pub(crate) fn cropped(pixels: &[u8], channels: usize, width: u32, part: Rectangle) -> Vec<u8> {
    let row = width as usize * channels;
    let columns = part.left as usize * channels..(part.left + part.width) as usize * channels;
    let rows = pixels.chunks_exact(row).skip(part.top as usize).take(part.height as usize);
    rows.flat_map(|row| &row[columns.clone()]).copied().collect()
}

/// Mirrors every row.
pub(crate) fn flip(pixels: &mut [u8], channels: usize, width: u32) {
    for row in pixels.chunks_exact_mut(width as usize * channels) {
        // Reversed bytes are reversed pixels, each back to front.
        row.reverse();
        row.chunks_exact_mut(channels).for_each(<[u8]>::reverse);
    }
}

/// Mixes as PIL's `ImageEnhance` does, to the bit.
pub(crate) fn tint(pixels: &mut [u8], channels: usize, tint: Tint, factor: f32) {
    match tint {
        Tint::Brightness => pixels.iter_mut().for_each(|value| *value = mixed(0, *value, factor)),
        Tint::Contrast => {
            let greys = pixels.chunks_exact(channels);
            let count = greys.len().max(1) as f64;
            let sum: u64 = greys.map(|pixel| u64::from(grey(pixel))).sum();
            let mean = (sum as f64 / count + 0.5) as u8;
            pixels.iter_mut().for_each(|value| *value = mixed(mean, *value, factor));
        }
        Tint::Saturation => {
            for pixel in pixels.chunks_exact_mut(channels) {
                let grey = grey(pixel);
                pixel.iter_mut().for_each(|value| *value = mixed(grey, *value, factor));
            }
        }
    }
}

/// Towards `value` from `other`, cut to 8 bits: fractions are dropped.
fn mixed(other: u8, value: u8, factor: f32) -> u8 {
    // A cast to a narrower type holds at its bounds.
    (f32::from(other) + factor * (f32::from(value) - f32::from(other))) as u8
}

/// ITU-R 601 luma in 16-bit fixed point, as PIL's "L"; of one channel that channel.
pub(crate) fn grey(pixel: &[u8]) -> u8 {
    match *pixel {
        [red, green, blue] => {
            let [red, green, blue] = [red, green, blue].map(u32::from);
            ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16) as u8
        }
        _ => pixel[0],
    }
}

/// Sets a rectangle of the planes of one image to 0.
pub(crate) fn erase(planes: &mut [f32], size: u32, part: Rectangle) {
    let size = size as usize;
    for plane in planes.chunks_exact_mut(size * size) {
        for row in plane.chunks_exact_mut(size).skip(part.top as usize).take(part.height as usize) {
            row[part.left as usize..(part.left + part.width) as usize].fill(0.0);
        }
    }
}
