//! Completions of a given shape: a grammar says before each draw which tokens may come.
//!
//! The grammar is [llguidance](https://docs.rs/llguidance)'s, over the bytes of the policy's tokens. Control tokens are no
//! text to it: none but the end token can be drawn, and that one only where the shape is complete.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use fulgurite_core::llm::{Constraint, LlmError};
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::tokenizer::PolicyTokenizer;

/// Compiled grammars that are kept, the last used ones: agents ask with the same few again and again.
const GRAMMARS_MAX: usize = 32;
/// Marks the bytes of a token that is no text.
const CONTROL_MARK: u8 = 0xff;

/// Bounds of one grammar. A guest writes it, so compiling takes some 20 ms at most, and a step some 15 ms.
fn limits() -> ParserLimits {
    ParserLimits {
        // About 20 ms.
        initial_lexer_fuel: 1_000_000,
        // Some megabytes.
        max_lexer_states: 10_000,
        max_grammar_size: 20_000,
        // The text of an error goes to a guest.
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Compiles constraints for one tokenizer.
pub(crate) struct Grammars {
    factory: ParserFactory,
    /// Least recently used first.
    compiled: Mutex<VecDeque<(Constraint, Matcher)>>,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

/// How far one completion has come in its grammar.
pub(crate) struct Progress(Matcher);

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Progress").finish_non_exhaustive()
    }
}

fn refused(reason: impl std::fmt::Display) -> LlmError {
    LlmError::InvalidRequest(format!("`constraint` cannot be used: {reason}"))
}

fn grammar(constraint: &Constraint) -> Result<TopLevelGrammar, LlmError> {
    match constraint {
        Constraint::Regex(expression) => Ok(TopLevelGrammar::from_regex(expression)),
        Constraint::JsonSchema(text) => {
            let mut schema: Value =
                serde_json::from_str(text).map_err(|error| refused(format!("the schema is not JSON: {error}")))?;
            if let Some(fields) = schema.as_object_mut() {
                // Any white space would let a model write nothing else until its tokens are used up.
                let spaces = json!({"whitespace_flexible": false, "item_separator": ", ?", "key_separator": ": ?"});
                fields.insert("x-guidance".to_owned(), spaces);
            }
            Ok(TopLevelGrammar::from_json_schema(schema))
        }
    }
}

impl Grammars {
    pub(crate) fn new(tokenizer: &PolicyTokenizer) -> Result<Self, LlmError> {
        let failed = |error: &dyn std::fmt::Display| LlmError::Unavailable(format!("no grammar can be made: {error}"));
        let ids = u32::try_from(tokenizer.vocabulary()).map_err(|error| failed(&error))?;
        let control = tokenizer.control_ids();
        let words: Vec<Vec<u8>> = (0..ids)
            .map(|id| {
                let bytes = tokenizer.bytes(id);
                if control.contains(&id) { [&[CONTROL_MARK], bytes].concat() } else { bytes.to_vec() }
            })
            .collect();
        // A grammar knows one end. Where a model has several, a constrained completion ends with the first.
        let end = *tokenizer.ends().first().ok_or_else(|| failed(&"the tokenizer has no end token"))?;
        let trie = TokTrie::from(&TokRxInfo::new(ids, end), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory =
            ParserFactory::new(&environment, InferenceCapabilities::default(), &[]).map_err(|error| failed(&error))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self { factory, compiled: Mutex::default() })
    }

    /// The start of a completion with this shape.
    ///
    /// # Errors
    /// [`LlmError::InvalidRequest`] when it does not parse, is too large, or nothing can fit it.
    pub(crate) fn start(&self, constraint: &Constraint) -> Result<Progress, LlmError> {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = compiled.iter().position(|(known, _)| known == constraint)
            && let Some(entry) = compiled.remove(at)
        {
            let progress = Progress(entry.1.deep_clone());
            compiled.push_back(entry);
            return Ok(progress);
        }
        drop(compiled);
        let parser = self.factory.create_parser(grammar(constraint)?).map_err(refused)?;
        let mut matcher = Matcher::new(Ok(parser));
        let mask = matcher.compute_mask().map_err(refused)?;
        if mask.is_zero() {
            return Err(refused("no text fits it"));
        }
        let progress = Progress(matcher.deep_clone());
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.push_back((constraint.clone(), matcher));
        if compiled.len() > GRAMMARS_MAX {
            compiled.pop_front();
        }
        Ok(progress)
    }
}

/// Tokens that may come next.
pub(crate) struct Mask(SimpleVob);

impl Mask {
    pub(crate) fn allows(&self, token: u32) -> bool {
        (token as usize) < self.0.len() && self.0.is_allowed(token)
    }
}

impl Progress {
    /// What may come next.
    ///
    /// # Errors
    /// When a step takes more work than a grammar may.
    pub(crate) fn mask(&mut self) -> Result<Mask, LlmError> {
        self.0.compute_mask().map(Mask).map_err(refused)
    }

    /// Takes a drawn token in. Whether the shape is complete and nothing may follow.
    ///
    /// # Errors
    /// When the token was not allowed.
    pub(crate) fn advance(&mut self, token: u32) -> Result<bool, LlmError> {
        self.0.consume_token(token).map_err(refused)?;
        Ok(self.0.is_stopped())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::TokenizerConfig;

    fn grammars() -> (PolicyTokenizer, Grammars) {
        let texts = ["a room for people", "a room"].map(String::from);
        let tokenizer = PolicyTokenizer::train(texts.into_iter(), &TokenizerConfig::default()).unwrap();
        let grammars = Grammars::new(&tokenizer).unwrap();
        (tokenizer, grammars)
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_the_field_and_the_reason() {
        let (_, grammars) = grammars();
        let refused = |constraint: Constraint| match grammars.start(&constraint) {
            Err(LlmError::InvalidRequest(text)) => text,
            other => panic!("{constraint:?}: {other:?}"),
        };
        let schema = |text: &str| refused(Constraint::JsonSchema(text.to_owned()));
        let fields: Vec<String> = (0..2_500).map(|n| format!("\"p{n}\":{{\"type\":\"integer\"}}")).collect();
        let wide = format!("{{\"type\":\"object\",\"properties\":{{{}}}}}", fields.join(","));
        for (text, reason) in [
            (schema("{"), "the schema is not JSON"),
            (schema(r#"{"type": "nothing"}"#), "nothing"),
            (schema(r#"{"type": "integer", "minimum": 5, "maximum": 4}"#), "nsatisfiable"),
            (schema("false"), "nsatisfiable"),
            (refused(Constraint::Regex("(".to_owned())), "unclosed"),
            (refused(Constraint::Regex("a(?=b)".to_owned())), "look-around"),
            (schema(&wide), "grammar size"),
        ] {
            assert!(text.starts_with("`constraint` cannot be used: ") && text.contains(reason), "{reason}: {text}");
        }
    }

    #[test]
    fn a_grammar_is_compiled_once_and_few_are_kept() {
        let (tokenizer, grammars) = grammars();
        for round in 0..3 {
            for n in 0..GRAMMARS_MAX + 5 {
                let mut progress = grammars.start(&Constraint::Regex(format!("a{{{}}}", n + 1))).unwrap();
                let mask = progress.mask().unwrap();
                let [a] = *tokenizer.encode("a").unwrap() else { panic!() };
                assert!(mask.allows(a) && !mask.allows(tokenizer.ends()[0]) && !mask.allows(1_000_000));
                assert_eq!(progress.advance(a).unwrap(), n == 0, "{round}");
            }
            assert_eq!(grammars.compiled.lock().unwrap().len(), GRAMMARS_MAX);
        }
    }
}
