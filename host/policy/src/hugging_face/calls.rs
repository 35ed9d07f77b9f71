//! Tool calls in what a model of a folder writes. How they are written was trained into the model, and its chat template says
//! which way that was.

use fulgurite_core::llm::ToolCall;
use serde_json::Value;

use crate::settled_text::begins;

/// A way to write calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallMarkup {
    /// `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, several of them, text around them: Hermes, Qwen.
    Tagged,
    /// `[TOOL_CALLS][{"name": .., "arguments": {..}}, ..]`, or `[TOOL_CALLS]name[ARGS]{..}` each: Mistral.
    Bracketed,
    /// `{"name": .., "parameters": {..}}` and nothing besides, `<|python_tag|>` before it or not, several separated by `;`:
    /// Llama 3.
    Bare,
    /// None: everything is text.
    None,
}

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
const BRACKET: &str = "[TOOL_CALLS]";
const ARGUMENTS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";
const PYTHON: &str = "<|python_tag|>";

impl CallMarkup {
    /// The way that a template writes.
    pub(crate) fn of_template(source: &str) -> Self {
        if source.contains(OPEN) {
            Self::Tagged
        } else if source.contains(BRACKET) {
            Self::Bracketed
        } else if source.contains(PYTHON) || (source.contains("ipython") && source.contains("parameters")) {
            Self::Bare
        } else {
            Self::None
        }
    }

    /// Text without calls, and the calls. What is not a whole call stays text, for the agent to see: a fault of the policy.
    pub(crate) fn parse(self, text: &str, call_index: u64) -> (String, Vec<ToolCall>) {
        let found = match self {
            Self::Tagged => Some(tagged(text)),
            Self::Bracketed => bracketed(text),
            Self::Bare => bare(text),
            Self::None => None,
        };
        let (rest, found) = found.unwrap_or_else(|| (text.to_owned(), vec![]));
        let call = |(number, (name, arguments)): (usize, (String, String))| ToolCall {
            id: format!("call-{call_index}-{number}"),
            name,
            arguments,
        };
        (rest, found.into_iter().enumerate().map(call).collect())
    }

    /// How many bytes of a text that goes on stay as they are whatever follows. The first `from` are known to.
    ///
    /// White space beside a call goes with it, and nobody knows before the end whether there is one: text that begins with
    /// white space is not settled at all.
    pub(crate) fn settled(self, text: &str, from: usize) -> usize {
        let opening = match self {
            Self::None => return text.len(),
            Self::Tagged => OPEN,
            Self::Bracketed => BRACKET,
            Self::Bare => {
                let body = text.trim_start();
                let may_call = body.is_empty() || body.starts_with('{') || begins(body, PYTHON) == Some(0);
                return if may_call { from } else { text.len() };
            }
        };
        if text.starts_with(char::is_whitespace) {
            return from;
        }
        let rest = text.get(from..).unwrap_or_default();
        let end = begins(rest, opening).unwrap_or(rest.len());
        from + rest.get(..end).unwrap_or_default().trim_end().len()
    }
}

/// Name and arguments of a call.
type Call = (String, String);

fn call(value: &Value, arguments: &[&str]) -> Option<Call> {
    let name = value.get("name")?.as_str()?.to_owned();
    let arguments = arguments.iter().find_map(|field| value.get(*field)).filter(|arguments| arguments.is_object())?;
    Some((name, arguments.to_string()))
}

fn tagged(text: &str) -> (String, Vec<Call>) {
    let mut out = String::new();
    let mut calls = Vec::new();
    let mut rest = text;
    while let Some((before, from)) = rest.split_once(OPEN) {
        out.push_str(before);
        let found = from
            .split_once(CLOSE)
            .and_then(|(body, after)| Some((call(&serde_json::from_str(body).ok()?, &["arguments"])?, after)));
        if let Some((call, after)) = found {
            calls.push(call);
            rest = after;
        } else {
            // Only the opening tag is left behind: another call may still begin later.
            out.push_str(OPEN);
            rest = from;
        }
    }
    out.push_str(rest);
    // The line breaks between text and calls are markup.
    let out = if calls.is_empty() { out } else { out.trim().to_owned() };
    (out, calls)
}

fn bracketed(text: &str) -> Option<(String, Vec<Call>)> {
    let (before, mut rest) = text.split_once(BRACKET)?;
    let mut calls = Vec::new();
    if rest.trim_start().starts_with('[') {
        let list: Vec<Value> = serde_json::from_str(rest).ok()?;
        calls = list.iter().map(|value| call(value, &["arguments"])).collect::<Option<_>>()?;
    } else {
        loop {
            let (one, next) = rest.split_once(BRACKET).map_or((rest, None), |(one, next)| (one, Some(next)));
            let (name, arguments) = one.split_once(ARGUMENTS)?;
            let name = name.split_once(CALL_ID).map_or(name, |(name, _)| name).trim();
            let arguments: Value = serde_json::from_str(arguments).ok().filter(Value::is_object)?;
            calls.push((Some(name).filter(|name| !name.is_empty())?.to_owned(), arguments.to_string()));
            match next {
                Some(next) => rest = next,
                None => break,
            }
        }
    }
    (!calls.is_empty()).then(|| (before.trim().to_owned(), calls))
}

fn bare(text: &str) -> Option<(String, Vec<Call>)> {
    let body = text.trim();
    let mut rest = body.strip_prefix(PYTHON).unwrap_or(body);
    let mut calls = Vec::new();
    loop {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        calls.push(call(&values.next()?.ok()?, &["parameters", "arguments"])?);
        rest = rest.get(values.byte_offset()..)?.trim_start();
        if rest.is_empty() {
            return Some((String::new(), calls));
        }
        rest = rest.strip_prefix(';').unwrap_or(rest);
    }
}

#[cfg(test)]
mod tests {
    use fulgurite_core::seed::{Generator, Seed};

    use super::*;

    fn shown(markup: CallMarkup, text: &str) -> String {
        let (text, calls) = markup.parse(text, 3);
        let calls: Vec<_> = calls.iter().map(|call| format!(" {}={}{}", call.id, call.name, call.arguments)).collect();
        text + &calls.concat()
    }

    #[test]
    fn every_family_is_read() {
        let cases = [
            (
                CallMarkup::Tagged,
                "hm\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>",
                "hm call-3-0=f{\"x\":1}",
            ),
            (
                CallMarkup::Tagged,
                "<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\n<tool_call>{\"name\":\"g\",\"arguments\":{}}</tool_call>",
                " call-3-0=f{} call-3-1=g{}",
            ),
            (
                CallMarkup::Bracketed,
                "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"b\": 1, \"a\": 2}}]",
                " call-3-0=f{\"b\":1,\"a\":2}",
            ),
            (
                CallMarkup::Bracketed,
                "ok[TOOL_CALLS]f[ARGS]{\"x\": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{}",
                "ok call-3-0=f{\"x\":1} call-3-1=g{}",
            ),
            (CallMarkup::Bare, "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"x\": 1}}", " call-3-0=f{\"x\":1}"),
            (
                CallMarkup::Bare,
                "\n{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {}}\n",
                " call-3-0=f{} call-3-1=g{}",
            ),
        ];
        for (markup, text, want) in cases {
            assert_eq!(shown(markup, text), want, "{text}");
        }
    }

    #[test]
    fn what_is_not_a_whole_call_stays_text() {
        let cases = [
            (CallMarkup::Tagged, "a<tool_call>{\"name\": \"f\""),
            (CallMarkup::Tagged, "<tool_call>{\"name\": \"f\"}</tool_call>"),
            (CallMarkup::Tagged, "<tool_call>{\"name\": 1, \"arguments\": {}}</tool_call>"),
            (CallMarkup::Tagged, " <tool_call>{\"name\": \"f\", \"arguments\": \"{}\"}</tool_call>"),
            (CallMarkup::Bracketed, "[TOOL_CALLS][{\"name\": \"f\"}]"),
            (CallMarkup::Bracketed, "[TOOL_CALLS]"),
            (CallMarkup::Bracketed, "[TOOL_CALLS][]"),
            (CallMarkup::Bracketed, "[TOOL_CALLS][ARGS]{}"),
            (CallMarkup::Bracketed, "[TOOL_CALLS]f[ARGS][]"),
            (CallMarkup::Bracketed, "[{\"name\": \"f\", \"arguments\": {}}]"),
            (CallMarkup::Bare, "Sure: {\"name\": \"f\", \"parameters\": {}}"),
            (CallMarkup::Bare, "{\"name\": \"f\", \"parameters\": {}} there"),
            (CallMarkup::Bare, "{\"name\": \"f\", \"parameters\": {}};"),
            (CallMarkup::Bare, "{\"answer\": 4}"),
            (CallMarkup::Bare, ""),
            (CallMarkup::None, "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>"),
        ];
        for (markup, text) in cases {
            assert_eq!(shown(markup, text), text);
        }
        let one_opened_too_many = "<tool_call><tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>";
        assert_eq!(shown(CallMarkup::Tagged, one_opened_too_many), "<tool_call> call-3-0=f{}");
    }

    #[test]
    fn templates_say_how_their_models_write() {
        for (source, markup) in [
            ("x <tool_call> y", CallMarkup::Tagged),
            ("x [TOOL_CALLS] y", CallMarkup::Bracketed),
            ("x <|python_tag|> y", CallMarkup::Bare),
            ("ipython, {\"name\": .., \"parameters\": ..}", CallMarkup::Bare),
            ("{{ messages }}", CallMarkup::None),
        ] {
            assert_eq!(CallMarkup::of_template(source), markup, "{source}");
        }
    }

    #[test]
    fn what_is_settled_is_a_beginning_of_every_text_that_follows() {
        let parts = [
            "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>",
            "[TOOL_CALLS]f[ARGS]{}",
            "{\"name\": \"f\", \"parameters\": {}}",
            OPEN,
            CLOSE,
            "{\"name\": \"f\", \"arguments\": {}}",
            BRACKET,
            ARGUMENTS,
            PYTHON,
            "<tool",
            "_call>",
            "[TOOL",
            "f",
            "{}",
            ";",
            "\n",
            " ",
            "a word",
            "\u{e9}",
        ];
        let mut generator = Generator::new(Seed::new(8));
        for markup in [CallMarkup::Tagged, CallMarkup::Bracketed, CallMarkup::Bare, CallMarkup::None] {
            let (mut settled_bytes, mut bytes, mut found) = (0, 0, 0);
            for _ in 0..20_000 {
                let text: String = (0..generator.below(8)).map(|_| parts[generator.below(parts.len())]).collect();
                let (whole, calls) = markup.parse(&text, 0);
                let mut settled = 0;
                for (at, character) in text.char_indices() {
                    settled = markup.settled(&text[..at + character.len_utf8()], settled);
                }
                assert!(whole.starts_with(&text[..settled]), "{markup:?}: {:?} of {text:?}", &text[..settled]);
                settled_bytes += settled;
                bytes += whole.len();
                found += calls.len();
            }
            assert!(
                settled_bytes * 20 > bytes && (found > 100 || markup == CallMarkup::None),
                "{markup:?}: {settled_bytes} {bytes} {found}"
            );
        }
    }
}
