//! The tokenizer and chat template of a policy, in one of two dialects: this crate's own, trained from a run's data, or that
//! of a [Hugging Face folder](crate::hugging_face::dialect). What follows is the own one: byte-level BPE with control tokens
//! and atoms.
//!
//! Text is never searched for control tokens: they have ids of their own that only the chat template can produce, so an
//! agent or a tool that writes `<|end|>` has written seven characters. *Atoms* (numbers, ids) are kept whole: a pattern of
//! the config isolates them, and each one found in the corpus gets a token. They enter the vocabulary beside the merges
//! (`ignore_merges`), because a merge table learned from counts gives no guarantee that `R07` ends up as one token.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use fulgurite_core::id::ContentHash;
use fulgurite_core::llm::{Message, Role, ToolCall, ToolSpec};
use serde::{Deserialize, Serialize};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior, Tokenizer,
    Trainer,
};

use crate::error::PolicyError;
use crate::hugging_face::dialect::FolderDialect;
use crate::template::ChatTemplate;
use crate::text_cache::TextCache;

/// Ends every message; the policy draws it to end its turn.
pub(crate) const END: &str = "<|end|>";
/// Opens a tool call inside an assistant message.
pub(crate) const TOOL_CALL_OPEN: &str = "<tool_call>";
/// Closes a tool call.
pub(crate) const TOOL_CALL_CLOSE: &str = "</tool_call>";
/// Control tokens in the order of their ids, from 0.
pub(crate) const CONTROL_TOKENS: [&str; 7] =
    [END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", TOOL_CALL_OPEN, TOOL_CALL_CLOSE];

/// How a tokenizer is trained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenizerConfig {
    /// Most token ids: control tokens, 256 bytes, atoms and merges together. 512.
    pub vocab_size: usize,
    /// Regular expression of texts that must be one token each, such as `R\d{2}|\d{1,2}`; `None` has none.
    pub atoms_pattern: Option<String>,
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self { vocab_size: 512, atoms_pattern: None }
    }
}

/// Tokenizer and chat template of one policy. Cheap to clone.
#[derive(Clone)]
pub struct PolicyTokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    tokenizer: Tokenizer,
    /// The tokenizer's file, as written and hashed.
    json: String,
    dialect: Dialect,
    /// Bytes of every id.
    bytes: Vec<Vec<u8>>,
    token_bytes_max: usize,
    cache: Mutex<TextCache>,
}

/// How conversations become ids, and ids answers.
enum Dialect {
    /// This crate's own: contents are encoded apart from the template's text.
    Own { template: ChatTemplate, control: [u32; CONTROL_TOKENS.len()] },
    /// A folder's: the template renders all of it.
    Folder(Box<FolderDialect>),
}

impl std::fmt::Debug for PolicyTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PolicyTokenizer").field("vocabulary", &self.vocabulary()).finish_non_exhaustive()
    }
}

fn failed(error: impl std::fmt::Display) -> PolicyError {
    PolicyError::Tokenizer(error.to_string())
}

/// Splits text into atoms and words. One pattern for both: a second split could cut an atom in two.
fn pre_tokenizer(atoms_pattern: Option<&str>) -> Result<PreTokenizerWrapper, PolicyError> {
    let words = match atoms_pattern {
        Some(atom) => format!(
            r"(?:{atom})| ?(?:(?!(?:{atom}))[\p{{L}}\p{{N}}_])+| ?(?:(?!(?:{atom}))[^\s\p{{L}}\p{{N}}_])+|\s+(?!\S)|\s+"
        ),
        None => r" ?[\p{L}\p{N}_]+| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+".to_owned(),
    };
    let split = Split::new(SplitPattern::Regex(words), SplitDelimiterBehavior::Isolated, false).map_err(|error| {
        PolicyError::InvalidConfig {
            field: "atoms_pattern",
            value: atoms_pattern.unwrap_or_default().to_owned(),
            reason: error.to_string(),
        }
    })?;
    Ok(Sequence::new(vec![split.into(), ByteLevel::new(false, false, false).into()]).into())
}

/// The pieces of a text: (byte-level form, whether it is an atom).
fn pieces(
    text: &str,
    splitter: &PreTokenizerWrapper,
    is_atom: Option<&Split>,
) -> Result<Vec<(String, bool)>, PolicyError> {
    let mut split = PreTokenizedString::from(text);
    splitter.pre_tokenize(&mut split).map_err(failed)?;
    let mut all = Vec::new();
    for (form, (start, end), _) in split.get_splits(OffsetReferential::Original, OffsetType::Byte) {
        let whole = match (is_atom, text.get(start..end)) {
            (Some(pattern), Some(piece)) => pattern.regex.find_iter(piece).next() == Some((0, piece.len())),
            _ => false,
        };
        all.push((form.to_owned(), whole));
    }
    Ok(all)
}

impl PolicyTokenizer {
    /// Trains a tokenizer on texts. The same texts and config give the same bytes.
    ///
    /// # Errors
    /// When the pattern is not a regular expression, or the vocabulary cannot hold control tokens, bytes and atoms.
    pub fn train(corpus: impl Iterator<Item = String>, config: &TokenizerConfig) -> Result<Self, PolicyError> {
        let atoms_pattern = config.atoms_pattern.as_deref().filter(|pattern| !pattern.is_empty());
        let splitter = pre_tokenizer(atoms_pattern)?;
        let atom_split = atoms_pattern
            .map(|pattern| {
                let whole = SplitPattern::Regex(format!("(?:{pattern})"));
                Split::new(whole, SplitDelimiterBehavior::Isolated, false).map_err(failed)
            })
            .transpose()?;

        let mut atoms = BTreeSet::new();
        let mut words = Vec::new();
        for text in corpus {
            for (form, is_atom) in pieces(&text, &splitter, atom_split.as_ref())? {
                if is_atom {
                    atoms.insert(form);
                } else {
                    words.push(form);
                }
            }
        }
        // Single bytes have a token already.
        let atoms: Vec<String> = atoms.into_iter().filter(|atom| atom.chars().count() > 1).collect();
        let needed = CONTROL_TOKENS.len() + 256 + atoms.len();
        if config.vocab_size < needed {
            return Err(PolicyError::InvalidConfig {
                field: "vocab_size",
                value: config.vocab_size.to_string(),
                reason: format!("control tokens, bytes and {} atoms need {needed}", atoms.len()),
            });
        }

        let control = CONTROL_TOKENS.map(|token| AddedToken::from(token, true).normalized(false));
        let mut trainer = BpeTrainerBuilder::new()
            .vocab_size(config.vocab_size - atoms.len())
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(control.to_vec())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        trainer.feed(words.into_iter(), |word| Ok(vec![word.to_owned()])).map_err(failed)?;
        let mut model = BPE::default();
        trainer.train(&mut model).map_err(failed)?;

        // The model's fields are private, so its JSON form is where atoms are added.
        let mut value = serde_json::to_value(&model).map_err(failed)?;
        if let Some(fields) = value.as_object_mut() {
            fields.insert("ignore_merges".to_owned(), true.into());
            if let Some(vocabulary) = fields.get_mut("vocab").and_then(|vocabulary| vocabulary.as_object_mut()) {
                for atom in atoms {
                    let id = vocabulary.len();
                    vocabulary.entry(atom).or_insert_with(|| id.into());
                }
            }
        }
        // Through text: its reader borrows strings, which a value does not lend.
        let model: BPE = serde_json::from_str(&value.to_string()).map_err(failed)?;
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(splitter));
        tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
        tokenizer.add_special_tokens(&control);
        let json = tokenizer.to_string(true).map_err(failed)?;
        Self::from_parts(json, ChatTemplate::default_source().to_owned())
    }

    /// The tokenizer with another chat template: jinja source that sees `messages` (each with `role` and `content`),
    /// `tools` (JSON texts) and `add_generation_prompt`. Contents are opaque to it: it decides where they stand, not what
    /// they say.
    ///
    /// # Errors
    /// When the template does not parse.
    pub fn with_template(&self, source: &str) -> Result<Self, PolicyError> {
        if let Dialect::Folder(_) = self.inner.dialect {
            let reason = "a folder's template is changed in the folder, as chat_template.jinja";
            return Err(PolicyError::Template(reason.to_owned()));
        }
        Self::from_parts(self.inner.json.clone(), source.to_owned())
    }

    fn from_parts(json: String, template: String) -> Result<Self, PolicyError> {
        let mut tokenizer: Tokenizer = json.parse().map_err(failed)?;
        // Texts are never searched for control tokens; see the module's head.
        tokenizer.set_encode_special_tokens(true);
        let id = |token: &str| {
            tokenizer.token_to_id(token).ok_or_else(|| PolicyError::Tokenizer(format!("it lacks the token `{token}`")))
        };
        let mut control = [0; CONTROL_TOKENS.len()];
        for (slot, token) in control.iter_mut().zip(CONTROL_TOKENS) {
            *slot = id(token)?;
        }
        let byte_of = byte_alphabet();
        let vocabulary = u32::try_from(tokenizer.get_vocab_size(true)).map_err(failed)?;
        let mut bytes = Vec::new();
        for id in 0..vocabulary {
            let token = tokenizer.id_to_token(id).ok_or_else(|| failed(format!("it has no token of id {id}")))?;
            let plain = CONTROL_TOKENS.contains(&token.as_str());
            let spelled = token.chars().map(|c| byte_of.get(&c).copied()).collect::<Option<Vec<u8>>>();
            bytes.push(if plain { token.into_bytes() } else { spelled.unwrap_or_else(|| token.into_bytes()) });
        }
        let dialect = Dialect::Own { template: ChatTemplate::new(template)?, control };
        Ok(Self::assembled(tokenizer, json, dialect, bytes))
    }

    fn assembled(tokenizer: Tokenizer, json: String, dialect: Dialect, bytes: Vec<Vec<u8>>) -> Self {
        let token_bytes_max = bytes.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let cache = Mutex::default();
        Self { inner: Arc::new(Inner { tokenizer, json, dialect, bytes, token_bytes_max, cache }) }
    }

    /// Reads tokenizer, chat template and end tokens of a Hugging Face folder.
    ///
    /// Its sampling defaults (`temperature` and the like of `generation_config.json`) are not taken: a policy that trains
    /// samples from what it is trained on, at temperature 1 unless the run's config says otherwise. Its end tokens are.
    ///
    /// # Errors
    /// When a file is missing, damaged or not supported, there is no chat template, or no token ends a turn.
    pub fn of_folder(dir: &Path) -> Result<Self, PolicyError> {
        let (tokenizer, dialect, bytes) = FolderDialect::read(dir)?;
        Ok(Self::assembled(tokenizer, String::new(), Dialect::Folder(Box::new(dialect)), bytes))
    }

    /// Reads what [`save`](Self::save) wrote. A folder with a `tokenizer_config.json` is read as a Hugging Face folder; in any
    /// other, `tokenizer.json` is this crate's own, and without a `chat_template.jinja` the built-in template is used.
    ///
    /// # Errors
    /// When a file cannot be read or parsed, or the vocabulary lacks a control token.
    pub fn load(dir: &Path) -> Result<Self, PolicyError> {
        if dir.join("tokenizer_config.json").is_file() {
            return Self::of_folder(dir);
        }
        let path = dir.join("tokenizer.json");
        let json = std::fs::read_to_string(&path).map_err(PolicyError::io(&path))?;
        let path = dir.join("chat_template.jinja");
        let template = match std::fs::read_to_string(&path) {
            Ok(template) => template,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => ChatTemplate::default_source().to_owned(),
            Err(error) => return Err(PolicyError::io(&path)(error)),
        };
        Self::from_parts(json, template)
    }

    /// Writes tokenizer and template into a folder, synchronised with the disk: `tokenizer.json` and `chat_template.jinja`,
    /// or a Hugging Face folder's files as they were read.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), PolicyError> {
        match &self.inner.dialect {
            Dialect::Own { template, .. } => {
                crate::checkpoint::write_file(&dir.join("tokenizer.json"), self.inner.json.as_bytes())?;
                crate::checkpoint::write_file(&dir.join("chat_template.jinja"), template.source().as_bytes())
            }
            Dialect::Folder(folder) => folder.save(dir),
        }
    }

    /// Whether it is that of a Hugging Face folder.
    #[must_use]
    pub fn is_of_folder(&self) -> bool {
        matches!(self.inner.dialect, Dialect::Folder(_))
    }

    /// Number of token ids.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.inner.bytes.len()
    }

    /// Hash of tokenizer and template.
    #[must_use]
    pub fn hash(&self) -> ContentHash {
        match &self.inner.dialect {
            Dialect::Own { template, .. } => {
                ContentHash::of(format!("{}\0{}", self.inner.json, template.source()).as_bytes())
            }
            Dialect::Folder(folder) => folder.hash(),
        }
    }

    /// Token ids of plain text. Control tokens in it are ordinary characters.
    ///
    /// # Errors
    /// When the tokenizer itself fails.
    pub fn encode(&self, text: &str) -> Result<Arc<[u32]>, PolicyError> {
        if let Some(ids) = self.cache().get(text) {
            return Ok(ids);
        }
        let ids: Arc<[u32]> = match &self.inner.dialect {
            Dialect::Own { .. } => self.inner.tokenizer.encode_fast(text, false).map_err(failed)?.get_ids().into(),
            Dialect::Folder(folder) => folder.encode_text(&self.inner.tokenizer, text)?.into(),
        };
        self.cache().remember(text, &ids);
        Ok(ids)
    }

    /// Text of token ids; bytes that are not UTF-8 become U+FFFD. Ids outside the vocabulary are left out.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        String::from_utf8_lossy(&self.decode_bytes(ids)).into_owned()
    }

    /// Bytes of token ids.
    pub(crate) fn decode_bytes(&self, ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|id| self.bytes(*id)).copied().collect()
    }

    /// Bytes of the longest token.
    pub(crate) fn token_bytes_max(&self) -> usize {
        self.inner.token_bytes_max
    }

    /// Bytes of one id; empty outside the vocabulary.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        self.inner.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// The ids of a prompt that asks for an answer. `recorded` gives the ids of a message that repeats an earlier completion,
    /// its end token included when it was drawn: they are never made anew where the template only appends.
    pub(crate) fn encode_prompt<'a>(
        &self,
        messages: &[Message],
        tools: &[ToolSpec],
        recorded: impl Fn(&Message) -> Option<&'a [u32]>,
    ) -> Result<Vec<u32>, PolicyError> {
        match &self.inner.dialect {
            Dialect::Own { template, control } => {
                Ok(self.encode_own(template, control, messages, tools, true, recorded)?.ids)
            }
            Dialect::Folder(folder) => folder.encode_prompt(&self.inner.tokenizer, messages, tools, recorded),
        }
    }

    /// A whole conversation, and for each id whether a message of the `trainable` roles wrote it: its content, its tool calls
    /// or the end token after them.
    pub(crate) fn encode_demonstration(
        &self,
        messages: &[Message],
        trainable: &[Role],
    ) -> Result<(Vec<u32>, Vec<bool>), PolicyError> {
        match &self.inner.dialect {
            Dialect::Own { template, control } => {
                let chat = self.encode_own(template, control, messages, &[], false, |_| None)?;
                let is_trained = |author: &Option<usize>| {
                    author.and_then(|at| messages.get(at)).is_some_and(|message| trainable.contains(&message.role))
                };
                let mask = chat.author.iter().map(is_trained).collect();
                Ok((chat.ids, mask))
            }
            Dialect::Folder(folder) => folder.encode_demonstration(&self.inner.tokenizer, messages, trainable),
        }
    }

    /// Reads a completion: its text without markup and end token, and the tool calls in it. Markup that does not hold a
    /// JSON object with a name and an object of arguments stays text, for the agent to see.
    pub(crate) fn parse_completion(&self, ids: &[u32], call_index: u64) -> (String, Vec<ToolCall>) {
        let ids = match ids.split_last() {
            Some((last, rest)) if self.is_end(*last) => rest,
            _ => ids,
        };
        match &self.inner.dialect {
            Dialect::Own { control, .. } => self.parse_own(control, ids, call_index),
            Dialect::Folder(folder) => folder.parse(&self.decode(ids), call_index),
        }
    }

    /// Whether an id begins a tool call by itself.
    pub(crate) fn opens_call(&self, id: u32) -> bool {
        match &self.inner.dialect {
            Dialect::Own { control: [.., open, _], .. } => *open == id,
            Dialect::Folder(_) => false,
        }
    }

    /// How many bytes of a completion's text, of which the first `from` are settled already, no later token can turn into
    /// markup of a tool call.
    pub(crate) fn settled(&self, text: &str, from: usize) -> usize {
        match &self.inner.dialect {
            Dialect::Own { .. } => text.len(),
            Dialect::Folder(folder) => folder.settled(text, from),
        }
    }

    /// The ids that are no text.
    pub(crate) fn control_ids(&self) -> BTreeSet<u32> {
        match &self.inner.dialect {
            Dialect::Own { control, .. } => control.iter().copied().collect(),
            Dialect::Folder(_) => self.inner.tokenizer.get_added_tokens_decoder().into_keys().collect(),
        }
    }

    /// Whether an id ends a completion.
    pub(crate) fn is_end(&self, id: u32) -> bool {
        self.ends().contains(&id)
    }

    /// The ids that end a completion; at least one.
    pub(crate) fn ends(&self) -> &[u32] {
        match &self.inner.dialect {
            Dialect::Own { control: [end, ..], .. } => std::slice::from_ref(end),
            Dialect::Folder(folder) => folder.ends(),
        }
    }

    /// A role's name in the template.
    pub(crate) const fn role_name(role: Role) -> &'static str {
        role.as_str()
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, TextCache> {
        self.inner.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The printable characters by which byte-level BPE writes bytes (as GPT-2 defined them).
pub(crate) fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut shifted = 0_u32;
    (0..=u8::MAX)
        .map(|byte| {
            if printable(byte) {
                (char::from(byte), byte)
            } else {
                let c = char::from_u32(256 + shifted).unwrap_or_default();
                shifted += 1;
                (c, byte)
            }
        })
        .collect()
}

#[cfg(test)]
impl PolicyTokenizer {
    /// A conversation in the own dialect, with authors.
    pub(crate) fn own_chat<'a>(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        recorded: impl Fn(&Message) -> Option<&'a [u32]>,
    ) -> crate::template::EncodedChat {
        let Dialect::Own { template, control } = &self.inner.dialect else { panic!("a folder's dialect") };
        self.encode_own(template, control, messages, &[], add_generation_prompt, recorded).unwrap()
    }

    pub(crate) fn own_control(&self) -> [u32; CONTROL_TOKENS.len()] {
        let Dialect::Own { control, .. } = &self.inner.dialect else { panic!("a folder's dialect") };
        *control
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn corpus() -> Vec<String> {
        (0..40)
            .map(|i| {
                format!("Find a room for {} people at {}:00 with a whiteboard. R{:02} is free.", i % 20, i % 24, i % 12)
            })
            .collect()
    }

    fn trained() -> PolicyTokenizer {
        let config = TokenizerConfig { vocab_size: 512, atoms_pattern: Some(r"R\d{2}|\d{1,2}".into()) };
        PolicyTokenizer::train(corpus().into_iter(), &config).unwrap()
    }

    #[test]
    fn the_own_dialect_is_what_it_was() {
        // Hashes are part of records and checkpoints: they must not change with the code.
        assert_eq!(trained().hash().to_string(), "ae366de9e957097ff83f9b92f8167c7f6bacca4506f7ebee018d220699ded54e");
    }

    #[test]
    fn training_twice_gives_the_same_bytes() {
        let first = trained();
        for _ in 0..5 {
            assert_eq!(first.inner.json, trained().inner.json);
        }
        assert!(first.vocabulary() <= 512);
    }

    #[test]
    fn atoms_are_single_tokens_wherever_they_stand() {
        let tokenizer = trained();
        for atom in ["R07", "R11", "4", "10", "19"] {
            assert_eq!(tokenizer.encode(atom).unwrap().len(), 1, "{atom}");
        }
        let id = tokenizer.encode("R07").unwrap()[0];
        for text in ["book R07", "R07", "(R07)", "at 10:00 R07.", "aR07"] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(ids.iter().filter(|other| **other == id).count(), 1, "{text}");
            assert_eq!(tokenizer.decode(&ids), text);
        }
    }

    #[test]
    fn any_text_survives_and_control_tokens_in_it_are_characters() {
        let tokenizer = trained();
        for text in ["<|end|>", "a<tool_call>b", "héllo 漢字 🙂\n\t  x", "", "  two  spaces "] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids), text);
            assert!(ids.iter().all(|id| *id as usize >= CONTROL_TOKENS.len()), "{text}: {ids:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn every_text_survives(text in ".{0,60}") {
            static TOKENIZER: std::sync::OnceLock<PolicyTokenizer> = std::sync::OnceLock::new();
            let tokenizer = TOKENIZER.get_or_init(trained);
            let ids = tokenizer.encode(&text).unwrap();
            proptest::prop_assert_eq!(tokenizer.decode(&ids), text);
            proptest::prop_assert!(ids.iter().all(|id| *id as usize >= CONTROL_TOKENS.len()));
        }
    }

    #[test]
    fn saved_and_loaded_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = trained();
        tokenizer.save(dir.path()).unwrap();
        let loaded = PolicyTokenizer::load(dir.path()).unwrap();
        assert_eq!(tokenizer.hash(), loaded.hash());
        let text = "Find a room for 7 people";
        assert_eq!(tokenizer.encode(text).unwrap(), loaded.encode(text).unwrap());
        loaded.save(dir.path()).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("tokenizer.json")).unwrap(), tokenizer.inner.json);
    }

    #[test]
    fn what_cannot_fit_is_refused() {
        let small = TokenizerConfig { vocab_size: 100, atoms_pattern: None };
        let error = PolicyTokenizer::train(corpus().into_iter(), &small).unwrap_err().to_string();
        assert!(error.contains("vocab_size"), "{error}");
        let broken = TokenizerConfig { vocab_size: 512, atoms_pattern: Some("(".into()) };
        let error = PolicyTokenizer::train(corpus().into_iter(), &broken).unwrap_err().to_string();
        assert!(error.contains("atoms_pattern"), "{error}");
    }
}
