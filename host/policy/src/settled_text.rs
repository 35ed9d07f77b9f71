//! Text of a completion that is still being drawn: as much of it as no later token can change.
//!
//! What is held back: bytes that do not end a character yet, text that may be the beginning of a stop text, and everything from
//! where the markup of a tool call may begin, because a whole call is no text. What was handed out is always a beginning of the
//! text that the ended completion has.

use crate::tokenizer::PolicyTokenizer;

pub(crate) struct SettledText {
    tokenizer: PolicyTokenizer,
    stops: Vec<String>,
    text: String,
    /// Bytes behind `text` that do not end a character.
    open: Vec<u8>,
    /// Bytes of `text` that were handed out.
    taken: usize,
    /// Whether a token began a tool call: nothing behind it is settled.
    closed: bool,
}

impl SettledText {
    pub(crate) fn new(tokenizer: PolicyTokenizer, stops: Vec<String>) -> Self {
        Self { tokenizer, stops, text: String::new(), open: vec![], taken: 0, closed: false }
    }

    /// Takes in the next token.
    pub(crate) fn push(&mut self, token: u32) {
        self.closed |= self.tokenizer.opens_call(token);
        if self.closed {
            return;
        }
        self.open.extend_from_slice(self.tokenizer.bytes(token));
        let mut rest = vec![];
        let mut chunks = self.open.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            self.text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let begins_a_character = || std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
            if chunks.peek().is_none() && begins_a_character() {
                rest = invalid.to_vec();
            } else if !invalid.is_empty() {
                self.text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.open = rest;
    }

    /// What has been settled since the last time; `None` when nothing has.
    pub(crate) fn take(&mut self) -> Option<String> {
        let from = self.taken;
        let rest = self.text.get(from..)?;
        let stop = self.stops.iter().filter_map(|stop| begins(rest, stop)).min().unwrap_or(rest.len());
        let end = self.tokenizer.settled(&self.text, from).min(from + stop);
        let settled = self.text.get(from..end).filter(|settled| !settled.is_empty())?.to_owned();
        self.taken = end;
        Some(settled)
    }

    /// The text of all tokens so far, settled or not.
    pub(crate) fn so_far(&self) -> &str {
        &self.text
    }
}

/// Where `wanted` stands in a text, or may once the text goes on.
pub(crate) fn begins(text: &str, wanted: &str) -> Option<usize> {
    let first = wanted.chars().next()?;
    let may_begin =
        |at: &usize| text.get(*at..).is_some_and(|from| from.starts_with(wanted) || wanted.starts_with(from));
    text.match_indices(first).map(|(at, _)| at).find(may_begin)
}

#[cfg(test)]
#[path = "settled_text_tests.rs"]
mod tests;
