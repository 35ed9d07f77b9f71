//! Conversations in the dialect of a Hugging Face folder: its template renders them, its tokenizer encodes them.
//!
//! What a template makes of a conversation is text, and nothing says which part of it came from where. Where a turn of the
//! model begins and ends is found by rendering beginnings of the conversation: those before the turn with a generation prompt,
//! and those that end with it. With that
//!
//! * an answer that was drawn comes back as the ids that were drawn, wherever the template has only appended to what was its
//!   prompt. Where it has not (Qwen3 forgets old thoughts, Mistral moves its tools), the text is encoded anew: that is another
//!   prompt, and training begins a new row;
//! * the tokens of a demonstration that the model is to write are known.
//!
//! A template that asks for the date is always told the same one, so that a run does not depend on the day.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use fulgurite_core::id::ContentHash;
use fulgurite_core::llm::{Message, Role, ToolCall, ToolSpec};
use jiff::Zoned;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::calls::CallMarkup;
use super::chat::{self, FolderTemplate, field};
use super::guard::{Author, Guard, MARK};
use super::{Conversation, config};
use crate::error::PolicyError;
use crate::hugging_face::tokenizer::FolderTokenizer;

/// The date that templates are told: the one that Llama 3 has when it is told none.
const DATE: &str = "2024-07-26T12:00:00+00:00[UTC]";

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const GENERATION_CONFIG: &str = "generation_config.json";

/// Files that are kept as they are, where they are there.
const KEPT: [&str; 6] = [
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
];

/// What tells one folder's conversations from another's.
#[derive(Debug)]
pub(crate) struct FolderDialect {
    template: FolderTemplate,
    /// Texts of the files, by their paths.
    files: BTreeMap<String, String>,
    ends: Vec<u32>,
    /// The same as the template writes them.
    end_texts: Vec<String>,
    guard: Guard,
    calls: CallMarkup,
    date: Zoned,
}

/// Where a turn of the model stands in a rendered conversation, in bytes.
struct Turn {
    /// Behind the generation prompt.
    start: usize,
    /// Before the token that ends the turn.
    text_end: usize,
    /// Behind it. The same as `text_end` where the template writes none.
    end: usize,
    /// Whether the turn is rendered as it is when it stands last.
    as_last: bool,
}

impl FolderDialect {
    /// Reads a folder; also gives its tokenizer and the bytes of its ids.
    pub(crate) fn read(dir: &Path) -> Result<(Tokenizer, Self, Vec<Vec<u8>>), PolicyError> {
        let folder = FolderTokenizer::read(dir)?;
        let bytes = folder.bytes(dir)?;
        let tokenizer = folder.tokenizer;
        let Some(template) = FolderTemplate::read(dir)? else {
            let reason = "it has no chat template, and rollouts are conversations: put one into chat_template.jinja";
            return Err(PolicyError::model_file(dir, reason));
        };
        let mut files = BTreeMap::new();
        for name in KEPT {
            let path = dir.join(name);
            if path.is_file() {
                let text = std::fs::read_to_string(&path).map_err(PolicyError::io(&path))?;
                files.insert(name.to_owned(), text);
            }
        }
        // Says later that the folder is one of these.
        let tokenizer_config = files.entry(TOKENIZER_CONFIG.to_owned()).or_insert_with(|| "{}\n".to_owned());
        let ends = end_tokens(dir, &tokenizer, tokenizer_config)?;
        files.insert(GENERATION_CONFIG.to_owned(), generation_config(dir, &ends)?);
        let end_texts = ends.iter().filter_map(|id| tokenizer.id_to_token(*id)).collect::<Vec<_>>();
        let added = tokenizer.get_added_tokens_decoder().into_values();
        let guard = Guard::new(added.map(|token| {
            let ends_turns = end_texts.contains(&token.content);
            (token.content, token.special || ends_turns)
        }));
        let date = DATE.parse().map_err(|error| PolicyError::Internal(format!("the date of templates: {error}")))?;
        let calls = CallMarkup::of_template(template.source());
        Ok((tokenizer, Self { template, files, ends, end_texts, guard, calls, date }, bytes))
    }

    /// Writes the files into a folder, synchronised with the disk.
    pub(crate) fn save(&self, dir: &Path) -> Result<(), PolicyError> {
        for (name, text) in &self.files {
            let path = dir.join(name);
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(PolicyError::io(parent))?;
            }
            crate::checkpoint::write_file(&path, text.as_bytes())?;
        }
        Ok(())
    }

    pub(crate) fn hash(&self) -> ContentHash {
        let mut text = String::new();
        for part in self.files.iter().flat_map(|(name, text)| [name, text]) {
            text.push_str(part);
            text.push('\0');
        }
        ContentHash::of(text.as_bytes())
    }

    /// The ids that end a completion.
    pub(crate) fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// Ids of a text in which no added token counts.
    pub(crate) fn encode_text(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, PolicyError> {
        let mut ids = Vec::new();
        encode(tokenizer, &self.guard.content(text, Author::Stranger), &mut ids)?;
        Ok(ids)
    }

    /// Text and tool calls of a completion.
    pub(crate) fn parse(&self, text: &str, call_index: u64) -> (String, Vec<ToolCall>) {
        self.calls.parse(text, call_index)
    }

    /// How much of a text that goes on is text for good; see [`CallMarkup::settled`].
    pub(crate) fn settled(&self, text: &str, from: usize) -> usize {
        self.calls.settled(text, from)
    }

    /// The ids of a prompt; see [`PolicyTokenizer::encode_prompt`](crate::PolicyTokenizer::encode_prompt).
    pub(crate) fn encode_prompt<'a>(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        tools: &[ToolSpec],
        recorded: impl Fn(&Message) -> Option<&'a [u32]>,
    ) -> Result<Vec<u32>, PolicyError> {
        let conversation = self.guarded(messages, tools)?;
        let whole = self.render(&conversation, conversation.messages.len(), true)?;
        let mut ids = Vec::new();
        let mut written = 0;
        for (at, message) in messages.iter().enumerate() {
            let Some(drawn) = recorded(message) else { continue };
            let Ok(turn) = self.turn(&conversation, &whole, at) else { continue };
            let ended = drawn.last().is_some_and(|id| self.ends.contains(id));
            let rendered = || plain(whole.get(turn.start..turn.text_end).unwrap_or_default());
            let repeats = || self.means_the_same(&rendered(), &Self::spelled(tokenizer, drawn, ended));
            if turn.start < written || !(turn.as_last || repeats()) {
                continue;
            }
            encode(tokenizer, whole.get(written..turn.start).unwrap_or_default(), &mut ids)?;
            ids.extend_from_slice(drawn);
            written = if ended { turn.end } else { turn.text_end };
        }
        encode(tokenizer, whole.get(written..).unwrap_or_default(), &mut ids)?;
        Ok(ids)
    }

    /// A whole conversation and what of it the assistant writes; see
    /// [`PolicyTokenizer::encode_demonstration`](crate::PolicyTokenizer::encode_demonstration).
    pub(crate) fn encode_demonstration(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        trainable: &[Role],
    ) -> Result<(Vec<u32>, Vec<bool>), PolicyError> {
        if let Some(role) = trainable.iter().find(|role| **role != Role::Assistant) {
            let reason = "a folder's template tells only what the assistant writes: train on `assistant` alone";
            return Err(PolicyError::Template(format!("messages of the role `{}`: {reason}", role.as_str())));
        }
        let conversation = self.guarded(messages, &[])?;
        let whole = self.render(&conversation, conversation.messages.len(), false)?;
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        let mut written = 0;
        let trained = |message: &Message| trainable.contains(&message.role);
        for (at, _) in messages.iter().enumerate().filter(|(_, message)| trained(message)) {
            let refused = |reason: &str| {
                let hint = "end the demonstration there, or give the folder a template that only appends";
                PolicyError::Template(format!("messages[{at}] of the demonstration: {reason}; {hint}"))
            };
            let turn = self.turn(&conversation, &whole, at).map_err(|reason| refused(&reason))?;
            if turn.start < written || turn.end == turn.text_end {
                return Err(refused("the template writes no token that ends it"));
            }
            encode(tokenizer, whole.get(written..turn.start).unwrap_or_default(), &mut ids)?;
            mask.resize(ids.len(), false);
            encode(tokenizer, whole.get(turn.start..turn.end).unwrap_or_default(), &mut ids)?;
            mask.resize(ids.len(), true);
            written = turn.end;
        }
        encode(tokenizer, whole.get(written..).unwrap_or_default(), &mut ids)?;
        mask.resize(ids.len(), false);
        Ok((ids, mask))
    }

    /// Finds the turn of the message `at`, or says why it cannot be found.
    fn turn(&self, conversation: &Conversation, whole: &str, at: usize) -> Result<Turn, String> {
        let before = self.render(conversation, at, true).map_err(|error| error.to_string())?;
        let Some(rest) = whole.strip_prefix(&before) else {
            return Err("what stands before it is rendered in another way once more follows".to_owned());
        };
        let start = before.len();
        let alone = self.render(conversation, at + 1, false).ok();
        let place = |found: Option<(usize, usize)>| found.map(|(from, to)| (start + from, start + to));
        if let Some(last) = alone.as_deref().filter(|alone| whole.starts_with(alone)).and_then(|t| t.get(start..)) {
            let found = self.end_texts.iter().filter_map(|end| last.rfind(end).map(|from| (from, from + end.len())));
            let whole_turn = (last.len(), last.len());
            let (text_end, end) = place(found.max().or(Some(whole_turn))).unwrap_or_default();
            return Ok(Turn { start, text_end, end, as_last: true });
        }
        // Contents spell no end token, so the first one is the turn's own.
        let found = self.end_texts.iter().filter_map(|end| rest.find(end).map(|from| (from, from + end.len())));
        let (text_end, end) = place(found.min()).ok_or("the template writes no token that ends it")?;
        Ok(Turn { start, text_end, end, as_last: false })
    }

    /// Whether two answers differ in white space at most, also inside of their calls.
    fn means_the_same(&self, a: &str, b: &str) -> bool {
        let read = |answer: &str| {
            let (text, calls) = self.calls.parse(answer, 0);
            let arguments = |call: &ToolCall| serde_json::from_str::<Value>(&call.arguments).ok();
            let calls: Vec<_> = calls.into_iter().map(|call| (arguments(&call), call.name)).collect();
            (text.trim().to_owned(), calls)
        };
        read(a) == read(b)
    }

    /// What drawn ids say, without the end token.
    fn spelled(tokenizer: &Tokenizer, drawn: &[u32], ended: bool) -> String {
        let text = drawn.len() - usize::from(ended);
        tokenizer.decode(drawn.get(..text).unwrap_or_default(), false).unwrap_or_default()
    }

    /// The first `count` messages as text, marks in it.
    fn render(&self, conversation: &Conversation, count: usize, prompt: bool) -> Result<String, PolicyError> {
        let messages = conversation.messages.get(..count).unwrap_or_default();
        self.template.render(messages, conversation.tools.as_deref(), prompt, &self.date)
    }

    /// The conversation with a mark in everything that could become a token.
    fn guarded(&self, messages: &[Message], tools: &[ToolSpec]) -> Result<Conversation, PolicyError> {
        let mut conversation = Conversation::of_core(messages, tools)?;
        for (message, value) in messages.iter().zip(&mut conversation.messages) {
            let author = if message.role == Role::Assistant { Author::Assistant } else { Author::Stranger };
            for (name, value) in value.as_object_mut().into_iter().flatten() {
                match (name.as_str(), &mut *value) {
                    ("role", _) => {}
                    ("content", Value::String(text)) => *text = self.guard.content(text, author).into_owned(),
                    (_, other) => self.guard.value(other),
                }
            }
        }
        for tool in conversation.tools.iter_mut().flatten() {
            self.guard.value(tool);
        }
        Ok(conversation)
    }
}

/// A rendered text as its reader sees it.
fn plain(marked: &str) -> String {
    marked.replace(MARK, "")
}

/// Appends the ids of rendered text: added tokens count, and nothing is found across a mark.
fn encode(tokenizer: &Tokenizer, rendered: &str, ids: &mut Vec<u32>) -> Result<(), PolicyError> {
    for piece in rendered.split(MARK).filter(|piece| !piece.is_empty()) {
        let encoded = tokenizer.encode_fast(piece, false);
        ids.extend_from_slice(encoded.map_err(|error| PolicyError::Tokenizer(error.to_string()))?.get_ids());
    }
    Ok(())
}

/// The ids that end a turn: those that generation stops at, and the tokenizer's own end token, which some folders forget there.
fn end_tokens(dir: &Path, tokenizer: &Tokenizer, tokenizer_config: &str) -> Result<Vec<u32>, PolicyError> {
    let path = dir.join(TOKENIZER_CONFIG);
    let settings: Value = serde_json::from_str(tokenizer_config)
        .map_err(|error| PolicyError::model_file(&path, format!("it is not JSON: {error}")))?;
    let named = field(&settings, "eos_token");
    let named = named.as_str().or_else(|| field(named, "content").as_str());
    let mut ids: BTreeSet<u32> = config::end_tokens(dir)?.into_iter().collect();
    ids.extend(named.and_then(|token| tokenizer.token_to_id(token)));
    if let Some(id) = ids.iter().find(|id| tokenizer.id_to_token(**id).is_none()) {
        let reason = format!("`eos_token_id` has {id}, of which tokenizer.json knows nothing");
        return Err(PolicyError::model_file(dir.join(GENERATION_CONFIG), reason));
    }
    if ids.is_empty() {
        let reason = "no token ends a turn: name it as `eos_token_id` in generation_config.json";
        return Err(PolicyError::model_file(dir, reason));
    }
    Ok(ids.into_iter().collect())
}

/// `generation_config.json` with these end tokens.
fn generation_config(dir: &Path, ends: &[u32]) -> Result<String, PolicyError> {
    let path = dir.join(GENERATION_CONFIG);
    let mut settings = if path.is_file() { chat::read_json(&path)? } else { json!({}) };
    let Some(fields) = settings.as_object_mut() else {
        return Err(PolicyError::model_file(path, "it must hold a JSON object"));
    };
    fields.insert("eos_token_id".to_owned(), json!(ends));
    let text = serde_json::to_string_pretty(&settings);
    text.map(|text| text + "\n").map_err(|error| PolicyError::model_file(path, error.to_string()))
}

#[cfg(test)]
#[path = "dialect_tests.rs"]
mod tests;
