//! Texts to token arrays with a model's own `tokenizer.json`; what Hugging Face's fast tokenizer gives for
//! `truncation=True, padding="longest"`. Runs on the caller's thread only.

use std::sync::Once;
use tokenizers::utils::parallelism::set_parallelism;
use tokenizers::{PaddingDirection, PostProcessor, TruncationParams};

/// Why texts give no tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("read the tokenizer; expected the contents of a Hugging Face tokenizer.json")]
    Load { source: tokenizers::Error },
    #[error("max_length {max_length} leaves no room for text beside {special} special token(s); raise data.max_length")]
    MaxLength { max_length: u32, special: usize },
    #[error("the tokenizer has no padding token; add one to tokenizer.json")]
    NoPadding,
    #[error("tokenize a text")]
    Encode { source: tokenizers::Error },
}

/// Arrays of `[rows, columns]`, row-major; every row padded to the longest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tokens {
    pub rows: usize,
    pub columns: usize,
    pub input_ids: Vec<i64>,
    /// 1 at tokens, 0 at padding.
    pub attention_mask: Vec<i64>,
    pub token_type_ids: Vec<i64>,
    /// Tokens of each row, padding not counted.
    pub lengths: Vec<u32>,
}

/// A model's tokenizer, ready for one run.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    padding: Padding,
}

struct Padding {
    id: u32,
    type_id: u32,
    left: bool,
}

/// Tokens that mean padding, or, last, that models without one are padded with.
const PADDING_TOKENS: [&str; 6] = ["[PAD]", "<pad>", "<|pad|>", "<PAD>", "<|endoftext|>", "</s>"];

impl Tokenizer {
    /// From the bytes of a `tokenizer.json`. Texts longer than `max_length` tokens, special ones included, are cut.
    ///
    /// # Errors
    /// [`Error::Load`], [`Error::MaxLength`], [`Error::NoPadding`].
    pub fn new(bytes: &[u8], max_length: u32) -> Result<Self, Error> {
        static SERIAL: Once = Once::new();
        // The library's thread pool would take cores that trainers have divided among themselves.
        SERIAL.call_once(|| set_parallelism(false));
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|source| Error::Load { source })?;
        let padding = padding(&inner)?;
        let special = inner.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        if max_length as usize <= special {
            // The library would subtract below zero.
            return Err(Error::MaxLength { max_length, special });
        }
        let direction = inner.get_truncation().map(|truncation| truncation.direction).unwrap_or_default();
        let truncation = TruncationParams { max_length: max_length as usize, direction, ..TruncationParams::default() };
        inner.with_truncation(Some(truncation)).map_err(|source| Error::Load { source })?;
        // The file's own padding may be to a fixed length.
        inner.with_padding(None);
        Ok(Self { inner, padding })
    }

    /// Tokens of a micro-batch.
    ///
    /// # Errors
    /// [`Error::Encode`].
    pub fn encode(&self, texts: &[String]) -> Result<Tokens, Error> {
        let encodings = texts
            .iter()
            .map(|text| self.inner.encode_fast(text.as_str(), true).map_err(|source| Error::Encode { source }))
            .collect::<Result<Vec<_>, _>>()?;
        let columns = encodings.iter().map(tokenizers::Encoding::len).max().unwrap_or(0);
        let mut tokens = Tokens { rows: texts.len(), columns, ..Tokens::default() };
        for encoding in &encodings {
            let real = encoding.len();
            tokens.lengths.push(u32::try_from(real).expect("a text is cut to max_length tokens"));
            self.pad(&mut tokens.input_ids, encoding.get_ids(), self.padding.id, columns);
            self.pad(&mut tokens.token_type_ids, encoding.get_type_ids(), self.padding.type_id, columns);
            self.pad(&mut tokens.attention_mask, &vec![1; real], 0, columns);
        }
        Ok(tokens)
    }

    /// Whether padding follows the tokens, so that what is computed of a text does not depend on how far it is padded.
    #[must_use]
    pub fn pads_right(&self) -> bool {
        !self.padding.left
    }

    /// What the input of that name holds at padding.
    #[must_use]
    pub fn filler(&self, input: &str) -> i64 {
        match input {
            "input_ids" => i64::from(self.padding.id),
            "token_type_ids" => i64::from(self.padding.type_id),
            _ => 0,
        }
    }

    fn pad(&self, row: &mut Vec<i64>, values: &[u32], filler: u32, columns: usize) {
        let filling = std::iter::repeat_n(i64::from(filler), columns - values.len());
        let values = values.iter().map(|value| i64::from(*value));
        if self.padding.left {
            row.extend(filling.chain(values));
        } else {
            row.extend(values.chain(filling));
        }
    }
}

fn padding(tokenizer: &tokenizers::Tokenizer) -> Result<Padding, Error> {
    if let Some(given) = tokenizer.get_padding() {
        let left = matches!(given.direction, PaddingDirection::Left);
        return Ok(Padding { id: given.pad_id, type_id: given.pad_type_id, left });
    }
    let id = PADDING_TOKENS.iter().find_map(|token| tokenizer.token_to_id(token)).ok_or(Error::NoPadding)?;
    Ok(Padding { id, type_id: 0, left: false })
}
