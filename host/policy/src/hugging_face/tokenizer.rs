//! `tokenizer.json` of a Hugging Face folder.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};

use super::chat::field;
use crate::error::PolicyError;
use crate::tokenizer::byte_alphabet;

/// The tokenizer of a folder.
#[derive(Debug)]
pub(crate) struct FolderTokenizer {
    pub(super) tokenizer: Tokenizer,
}

impl FolderTokenizer {
    /// Reads `tokenizer.json`, and from `tokenizer_config.json` the added tokens that it lacks.
    ///
    /// # Errors
    /// When the file is missing or cannot be parsed, or an added token has another id than it says.
    pub(crate) fn read(dir: &Path) -> Result<Self, PolicyError> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            let hint = "a slow tokenizer is turned into it by transformers' `AutoTokenizer` and `save_pretrained`";
            return Err(PolicyError::model_file(dir, format!("it has no tokenizer.json: {hint}")));
        }
        let json = std::fs::read_to_string(&path).map_err(PolicyError::io(&path))?;
        let wrong = |reason: String| PolicyError::model_file(&path, reason);
        let mut tokenizer: Tokenizer = json.parse().map_err(|error| {
            let fix = "copy it again, or write it anew with transformers' `AutoTokenizer` and `save_pretrained`";
            wrong(format!("it is not a tokenizer: {error}; {fix}"))
        })?;
        // Both may be stored from training and would cut or fill prompts.
        tokenizer.with_truncation(None).map_err(|error| wrong(format!("`truncation`: {error}")))?;
        tokenizer.with_padding(None);
        add_missing(&mut tokenizer, &dir.join("tokenizer_config.json"))?;
        Ok(Self { tokenizer })
    }

    /// Ids of a rendered conversation. Added tokens in it count, and nothing is put in front: the template has written what
    /// begins the text.
    pub(crate) fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, PolicyError> {
        let encoded = self.tokenizer.encode_fast(text, false);
        Ok(encoded.map_err(|error| PolicyError::Tokenizer(error.to_string()))?.get_ids().to_vec())
    }

    /// Text of ids, added tokens included.
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, false).unwrap_or_default()
    }

    /// Bytes of every id: what it adds to a text. Empty where no token has the id.
    ///
    /// # Errors
    /// When the decoder is of a kind whose tokens are not texts by themselves.
    pub(crate) fn bytes(&self, path: &Path) -> Result<Vec<Vec<u8>>, PolicyError> {
        let decoder = serde_json::to_string(&self.tokenizer.get_decoder()).unwrap_or_default();
        let byte_of = byte_alphabet();
        // Byte-level BPE writes every byte as a character of its own; SentencePiece writes spaces as U+2581 and bytes that
        // no token has as `<0x..>`.
        let byte_level = decoder.contains("\"ByteLevel\"");
        if !byte_level && !decoder.contains("\"ByteFallback\"") && !decoder.contains("\"Metaspace\"") {
            let reason = "`decoder` is of an unknown kind: supported are ByteLevel, and Metaspace or ByteFallback";
            return Err(PolicyError::model_file(path.join("tokenizer.json"), reason));
        }
        let spelled = |token: &str| {
            if byte_level {
                let bytes = token.chars().map(|c| byte_of.get(&c).copied()).collect::<Option<Vec<u8>>>();
                return bytes.unwrap_or_else(|| token.as_bytes().to_vec());
            }
            let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                Some(byte) => vec![byte],
                None => token.replace('\u{2581}', " ").into_bytes(),
            }
        };
        let added = self.tokenizer.get_added_tokens_decoder();
        let mut all = vec![Vec::new(); self.vocabulary()];
        let vocabulary: BTreeMap<String, u32> = self.tokenizer.get_vocab(false).into_iter().collect();
        for (token, id) in vocabulary {
            if let Some(bytes) = all.get_mut(id as usize) {
                *bytes = spelled(&token);
            }
        }
        for (id, token) in added {
            if let Some(bytes) = all.get_mut(id as usize) {
                *bytes = token.content.into_bytes();
            }
        }
        Ok(all)
    }

    /// Ids that it can make: one more than the largest.
    pub(crate) fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }
}

/// Adds the tokens of `added_tokens_decoder` that `tokenizer.json` does not know, in the order of their ids.
fn add_missing(tokenizer: &mut Tokenizer, path: &Path) -> Result<(), PolicyError> {
    if !path.is_file() {
        return Ok(());
    }
    let text = std::fs::read(path).map_err(PolicyError::io(path))?;
    let wrong = |reason: String| PolicyError::model_file(path, reason);
    let config: Value = serde_json::from_slice(&text).map_err(|error| wrong(format!("it is not JSON: {error}")))?;
    if field(&config, "split_special_tokens").as_bool() == Some(true) {
        let reason = "`split_special_tokens` is true: supported are tokenizers that find special tokens in a text";
        return Err(wrong(format!("{reason}; set it to false")));
    }
    let mut added = Vec::new();
    for (id, token) in field(&config, "added_tokens_decoder").as_object().into_iter().flatten() {
        let number = id.parse::<u32>().map_err(|_| wrong(format!("`added_tokens_decoder` has the id `{id}`")))?;
        let token: AddedToken = serde_json::from_value(token.clone())
            .map_err(|error| wrong(format!("`added_tokens_decoder.{id}`: {error}")))?;
        added.push((number, token));
    }
    added.sort_by_key(|(id, _)| *id);
    for (id, token) in added {
        let content = token.content.clone();
        if tokenizer.token_to_id(&content).is_some() {
            continue;
        }
        if token.special {
            tokenizer.add_special_tokens(&[token]);
        } else {
            tokenizer.add_tokens(&[token]);
        }
        let found = tokenizer.token_to_id(&content);
        if found != Some(id) {
            let found = found.map_or_else(|| "none".to_owned(), |found| found.to_string());
            return Err(wrong(format!("`added_tokens_decoder.{id}` is `{content}`: tokenizer.json gives it {found}")));
        }
    }
    Ok(())
}
