//! Image files to normalized planes: decode, convert, resize, scale, normalize. What torchvision's
//! `Resize(antialias=True)`, `ToTensor`, `Normalize` do to a PIL image, to within one step of 8 bits.
//!
//! Only PNG and JPEG, recognized by their first bytes, never by name.

use crate::augment::{self, Draw};
use fast_image_resize::images::Image;
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::{DynamicImage, GrayImage, ImageFormat, ImageReader};
use std::io::Cursor;
use thaw_proto::spec::ImageTransform;

/// Why an image file gives no tensor. The caller adds the file's name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("neither PNG nor JPEG by its first bytes")]
    Format,
    #[error("read the image header")]
    Header { source: image::ImageError },
    #[error("decode the image")]
    Decode { source: image::ImageError },
    #[error("the image has no pixels")]
    NoPixels,
    #[error("{channels} channels asked for; there can be 1 (gray) or 3 (red, green, blue)")]
    Channels { channels: usize },
    #[error("resize the image")]
    Resize { source: fast_image_resize::ResizeError },
}

/// Checks an image file without keeping it: first bytes, header, and its end; all of it when `decode` is set or the end is missing.
///
/// # Errors
/// What [`Transform::apply`] would report.
pub fn inspect(bytes: &[u8], decode: bool) -> Result<(), Error> {
    let format = format_of(bytes)?;
    let (width, height) = reader(bytes, format).into_dimensions().map_err(|source| Error::Header { source })?;
    if width == 0 || height == 0 {
        return Err(Error::NoPixels);
    }
    if decode || !has_end(bytes, format) {
        decode_all(bytes)?;
    }
    Ok(())
}

/// The preparation of a run's images; one per thread, since it keeps buffers.
pub struct Transform {
    size: u32,
    mean: Vec<f32>,
    std: Vec<f32>,
    resizer: Resizer,
}

impl Transform {
    /// As many channels as `spec.mean` has entries: 1 or 3.
    ///
    /// # Errors
    /// [`Error::Channels`].
    pub fn new(spec: &ImageTransform) -> Result<Self, Error> {
        let channels = spec.mean.len();
        if !matches!(channels, 1 | 3) || spec.std.len() != channels {
            return Err(Error::Channels { channels });
        }
        let single = |values: &[f64]| values.iter().map(|value| *value as f32).collect();
        Ok(Self { size: spec.size, mean: single(&spec.mean), std: single(&spec.std), resizer: Resizer::new() })
    }

    /// Shape of one image, `[channels, size, size]`.
    pub fn shape(&self) -> [i64; 3] {
        [self.mean.len() as i64, i64::from(self.size), i64::from(self.size)]
    }

    /// Appends one image to `planes`: `[channels, size, size]`, f32, normalized.
    ///
    /// # Errors
    /// Where the bytes are no image that decodes.
    pub fn apply(&mut self, bytes: &[u8], planes: &mut Vec<f32>) -> Result<(), Error> {
        self.apply_changed(bytes, |_, _| Draw::default(), planes)
    }

    /// The same of an image that changes by what `draw` says for its width and height.
    ///
    /// # Errors
    /// As [`Transform::apply`].
    pub fn apply_changed(
        &mut self,
        bytes: &[u8],
        draw: impl FnOnce(u32, u32) -> Draw,
        planes: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let decoded = decode_all(bytes)?;
        let (width, height) = (decoded.width(), decoded.height());
        if width == 0 || height == 0 {
            return Err(Error::NoPixels);
        }
        let (pixels, kind) = match self.mean.len() {
            1 => (gray(decoded).into_raw(), PixelType::U8),
            _ => (decoded.into_rgb8().into_raw(), PixelType::U8x3),
        };
        let channels = self.mean.len();
        let draw = draw(width, height);
        let mut pixels = match draw.crop {
            Some(part) => {
                let part_alone = augment::cropped(&pixels, channels, width, part);
                self.resize(part_alone, kind, part.width, part.height)?
            }
            None => self.resize(pixels, kind, width, height)?,
        };
        if draw.flip {
            augment::flip(&mut pixels, channels, self.size);
        }
        for (tint, factor) in draw.tints {
            augment::tint(&mut pixels, channels, tint, factor);
        }
        let start = planes.len();
        planes.reserve(pixels.len());
        for (channel, (mean, std)) in self.mean.iter().zip(&self.std).enumerate() {
            planes.extend(
                pixels.iter().skip(channel).step_by(channels).map(|value| (f32::from(*value) / 255.0 - mean) / std),
            );
        }
        if let Some(part) = draw.erased {
            augment::erase(&mut planes[start..], self.size, part);
        }
        Ok(())
    }

    fn resize(&mut self, pixels: Vec<u8>, kind: PixelType, width: u32, height: u32) -> Result<Vec<u8>, Error> {
        if (width, height) == (self.size, self.size) {
            return Ok(pixels);
        }
        let source =
            Image::from_vec_u8(width, height, pixels, kind).expect("the decoder gives width times height pixels");
        let mut resized = Image::new(self.size, self.size, kind);
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
        self.resizer.resize(&source, &mut resized, &options).map_err(|source| Error::Resize { source })?;
        Ok(resized.into_vec())
    }
}

fn format_of(bytes: &[u8]) -> Result<ImageFormat, Error> {
    match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg)) => Ok(format),
        _ => Err(Error::Format),
    }
}

/// With the library's default limits, so that a small file cannot ask for all memory.
fn reader(bytes: &[u8], format: ImageFormat) -> ImageReader<Cursor<&[u8]>> {
    ImageReader::with_format(Cursor::new(bytes), format)
}

fn decode_all(bytes: &[u8]) -> Result<DynamicImage, Error> {
    reader(bytes, format_of(bytes)?).decode().map_err(|source| Error::Decode { source })
}

/// Whether the file holds its format's end marker; one cut short does not.
fn has_end(bytes: &[u8], format: ImageFormat) -> bool {
    let marker: &[u8] = if format == ImageFormat::Png { b"IEND\xae\x42\x60\x82" } else { b"\xff\xd9" };
    // Some writers pad; a thumbnail's own end marker lies at the beginning.
    let tail = &bytes[bytes.len().saturating_sub(64)..];
    tail.windows(marker.len()).any(|window| window == marker)
}

/// The decoder's own conversion weighs by Rec. 709; PIL's does not.
fn gray(decoded: DynamicImage) -> GrayImage {
    if !decoded.color().has_color() {
        return decoded.into_luma8();
    }
    let colored = decoded.into_rgb8();
    let luma = colored.pixels().map(|pixel| augment::grey(&pixel.0)).collect();
    GrayImage::from_raw(colored.width(), colored.height(), luma).expect("one value for each pixel")
}
