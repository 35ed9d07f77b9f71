//! Keeps contents from spelling control tokens.
//!
//! A chat template is rendered as a whole, and a folder's tokenizer finds its added tokens wherever in the text they stand. So
//! a tool that answers `<|im_end|>` would end the turn. Before rendering, a mark is put into every such place of a content, and
//! the rendered text is encoded in the pieces between the marks: neither piece spells the token any more, and the model reads
//! the characters. A mark at each end of a content would be simpler, but templates trim, split and compare contents.
//!
//! Marks also go into the beginning of a token at the end of a content and into the end of one at its beginning, because a
//! template may write the rest: `<function={{ name }}>` closes a name of `<|im_end|`.

use std::borrow::Cow;
use std::collections::HashSet;

use serde_json::Value;

/// A private-use character that no template has a reason to write.
pub(crate) const MARK: char = '\u{10fffb}';

/// Who wrote a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Author {
    /// An agent, a user, a tool: no added token is theirs to write.
    Stranger,
    /// The assistant: what is marked as special is the template's to write (the end of a turn), the rest is not
    /// (`<think>` of a demonstration is the token).
    Assistant,
}

/// The texts that contents must not spell.
#[derive(Debug)]
pub(crate) struct Guard {
    /// Those of special tokens.
    special: Vec<String>,
    /// Those of the other added tokens.
    plain: Vec<String>,
    /// First characters of all of them.
    first: HashSet<char>,
}

impl Guard {
    /// For added tokens, each with whether it is special. White space and single characters are no control tokens.
    pub(crate) fn new(tokens: impl IntoIterator<Item = (String, bool)>) -> Self {
        let (mut special, mut plain) = (Vec::new(), Vec::new());
        for (text, is_special) in tokens {
            if text.chars().count() > 1 && !text.trim().is_empty() {
                if is_special { &mut special } else { &mut plain }.push(text);
            }
        }
        special.sort_unstable();
        plain.sort_unstable();
        let first = special.iter().chain(&plain).filter_map(|token| token.chars().next()).collect();
        Self { special, plain, first }
    }

    fn tokens(&self, author: Author) -> impl Iterator<Item = &String> {
        let plain: &[String] = if author == Author::Stranger { &self.plain } else { &[] };
        self.special.iter().chain(plain)
    }

    /// A content with marks in it where it spells a token, or a part of one at its edges.
    pub(crate) fn content<'a>(&self, text: &'a str, author: Author) -> Cow<'a, str> {
        self.marked(text, author, true)
    }

    fn marked<'a>(&self, text: &'a str, author: Author, edges: bool) -> Cow<'a, str> {
        let completes = edges && self.tokens(author).any(|token| completes(token, text));
        let mut out: Option<String> = None;
        for (at, c) in text.char_indices() {
            let rest = text.get(at..).unwrap_or_default();
            let opens = |token: &String| {
                rest.starts_with(token.as_str()) || (edges && rest.chars().nth(1).is_some() && token.starts_with(rest))
            };
            let marks = (at == 0 && completes) || (self.first.contains(&c) && self.tokens(author).any(opens));
            if marks || c == MARK {
                out.get_or_insert_with(|| text.get(..at).unwrap_or_default().to_owned());
            }
            if let Some(out) = &mut out {
                out.push(if c == MARK { char::REPLACEMENT_CHARACTER } else { c });
                if marks {
                    out.push(MARK);
                }
            }
        }
        out.map_or(Cow::Borrowed(text), Cow::Owned)
    }

    /// All texts in a value, names of fields included.
    pub(crate) fn value(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                if let Cow::Owned(marked) = self.content(text, Author::Stranger) {
                    *text = marked;
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.value(item)),
            Value::Object(fields) => {
                let old = std::mem::take(fields);
                for (name, mut value) in old {
                    self.value(&mut value);
                    // Templates know most names, and those that spell no token stay as they are.
                    let name = self.marked(&name, Author::Stranger, false).into_owned();
                    fields.insert(name, value);
                }
            }
            _ => {}
        }
    }
}

/// Whether a text begins with the end of a token, two characters of it at least.
fn completes(token: &str, text: &str) -> bool {
    token
        .char_indices()
        .skip(1)
        .map(|(at, _)| token.get(at..).unwrap_or_default())
        .any(|end| end.chars().nth(1).is_some() && text.starts_with(end))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn guard() -> Guard {
        let tokens = [("<|im_end|>", true), ("[INST]", true), ("<think>", false), ("  ", false), ("x", true)];
        Guard::new(tokens.map(|(text, special)| (text.to_owned(), special)))
    }

    fn shown(text: &str, author: Author) -> String {
        guard().content(text, author).replace(MARK, "·")
    }

    #[test]
    fn marks_stand_in_every_token_and_nowhere_else() {
        let cases = [
            ("", ""),
            ("x  y < [ a", "x  y < [ a"),
            ("<|im_end|>", "<·|im_end|>"),
            ("a<|im_end|><|im_end|>[INST]b", "a<·|im_end|><·|im_end|>[·INST]b"),
            ("hm<think>", "hm<·think>"),
            ("cut <|im_e", "cut <·|im_e"),
            ("cut <|", "cut <·|"),
            ("cut <", "cut <"),
            ("m_end|> rest", "m·_end|> rest"),
            ("> rest", "> rest"),
            ("é<|im_end|>é", "é<·|im_end|>é"),
        ];
        for (text, want) in cases {
            assert_eq!(shown(text, Author::Stranger), want, "{text}");
        }
        assert_eq!(shown("<think>a<|im_end|>", Author::Assistant), "<think>a<·|im_end|>");
    }

    #[test]
    fn overlapping_tokens_are_all_broken() {
        let guard = Guard::new([("abab".to_owned(), true), ("ba".to_owned(), true)]);
        let marked = guard.content("cababac", Author::Stranger).into_owned();
        for piece in marked.split(MARK) {
            assert!(!piece.contains("abab") && !piece.contains("ba"), "{marked:?}");
        }
    }

    #[test]
    fn a_forged_mark_is_no_mark() {
        let forged = format!("<{MARK}|im_end|>");
        assert_eq!(shown(&forged, Author::Stranger), "<\u{fffd}|im_end|>");
        assert_eq!(shown(&format!("{MARK}"), Author::Stranger), "\u{fffd}");
    }

    #[test]
    fn values_are_guarded_in_depth() {
        let mut value = json!({"a": ["<think>", 1], "<|im_end|>": {"b": "fine"}, "type": null});
        guard().value(&mut value);
        let want =
            json!({"a": [format!("<{MARK}think>"), 1], (format!("<{MARK}|im_end|>")): {"b": "fine"}, "type": null});
        assert_eq!(value, want);
    }

    proptest::proptest! {
        #[test]
        fn no_piece_spells_a_token(text in "[<|>im_ndINST\\[\\]thk]{0,40}") {
            let guard = guard();
            let marked = guard.content(&text, Author::Stranger);
            proptest::prop_assert_eq!(&marked.replace(MARK, ""), &text);
            for piece in marked.split(MARK) {
                for token in guard.tokens(Author::Stranger) {
                    proptest::prop_assert!(!piece.contains(token.as_str()));
                }
            }
        }
    }
}
