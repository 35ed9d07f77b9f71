//! Values as Python's `json.dumps` writes them. Chat templates were written for Python, and a model was trained on what
//! came out.
//!
//! What a template prints without `tojson` is minijinja's, which is Python's too but for floats below 1e-4 and from 1e16 on:
//! those are written here, where they are printed or made a text by `string`. Joined by `~` they stay minijinja's, and so do
//! integers beyond 64 bits, which come as floats.

use std::fmt::Write;

use minijinja::value::{Rest, ValueKind, ValueOrKwargs};
use minijinja::{Error, ErrorKind, Value};

use super::jinja::named;

/// `json.dumps` as transformers calls it in the filter `tojson`: nothing is escaped for HTML, text stays Unicode.
pub(crate) fn tojson(value: &Value, options: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let options = named(&["ensure_ascii", "indent", "separators", "sort_keys"], options)?;
    let option = |name| options.get::<Option<Value>>(name);
    let is_set = |name| Ok::<_, Error>(option(name)?.is_some_and(|value| value.is_true()));
    let indent = match option("indent")?.filter(|indent| !indent.is_none()) {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(count) => Some(" ".repeat(usize::try_from(count)?.min(64))),
    };
    let (item, key) = match option("separators")?.filter(|separators| !separators.is_none()) {
        Some(pair) => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
        // Python leaves the space out where a line ends.
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let writer = Writer { indent, item, key, sort_keys: is_set("sort_keys")?, ascii: is_set("ensure_ascii")? };
    let mut out = String::new();
    writer.value(value, 0, &mut out)?;
    Ok(Value::from(out))
}

struct Writer {
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
    ascii: bool,
}

impl Writer {
    fn value(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        let refused = || Error::new(ErrorKind::InvalidOperation, format!("tojson cannot write {}", value.kind()));
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)?),
            ValueKind::String => self.text(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(items.len(), "[]", depth, out, |at, out| {
                    items.get(at).map_or(Ok(()), |item| self.value(item, depth + 1, out))
                })?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    let name = match key.kind() {
                        ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
                        ValueKind::None => "null".to_owned(),
                        ValueKind::Bool => key.to_string().to_lowercase(),
                        ValueKind::Number => number(&key)?,
                        _ => return Err(refused()),
                    };
                    entries.push((name, value.get_item(&key)?));
                }
                if self.sort_keys {
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.list(entries.len(), "{}", depth, out, |at, out| {
                    let Some((name, value)) = entries.get(at) else { return Ok(()) };
                    self.text(name, out);
                    out.push_str(&self.key);
                    self.value(value, depth + 1, out)
                })?;
            }
            _ => return Err(refused()),
        }
        Ok(())
    }

    fn list(
        &self,
        len: usize,
        brackets: &str,
        depth: usize,
        out: &mut String,
        write: impl Fn(usize, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if len == 0 {
            out.push_str(brackets);
            return Ok(());
        }
        let (open, close) = brackets.split_at(1);
        let line = |depth: usize, out: &mut String| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.push_str(&indent.repeat(depth));
            }
        };
        out.push_str(open);
        for at in 0..len {
            if at > 0 {
                out.push_str(&self.item);
            }
            line(depth + 1, out);
            write(at, out)?;
        }
        line(depth, out);
        out.push_str(close);
        Ok(())
    }

    fn text(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if u32::from(c) < 0x20 || (self.ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string cannot fail.
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() { Ok(value.to_string()) } else { f64::try_from(value.clone()).map(float) }
}

/// Lists in lists that are looked into; more cannot come from JSON.
const DEPTH_MAX: usize = 128;

/// What `str` makes of a value where minijinja writes something else: a float that Python gives an exponent, alone or in a
/// list or object. `None` for all else.
pub(crate) fn text(value: &Value) -> Option<String> {
    if !differs(value, DEPTH_MAX) {
        return None;
    }
    let mut out = String::new();
    represent(value, DEPTH_MAX, &mut out);
    Some(out)
}

fn number_differs(value: &Value) -> bool {
    value.kind() == ValueKind::Number
        && !value.is_integer()
        && f64::try_from(value.clone()).is_ok_and(|number| number.is_finite() && float(number).contains('e'))
}

fn differs(value: &Value, depth: usize) -> bool {
    match value.kind() {
        ValueKind::Number => number_differs(value),
        ValueKind::Seq if depth > 0 => {
            value.try_iter().is_ok_and(|mut items| items.any(|item| differs(&item, depth - 1)))
        }
        ValueKind::Map if depth > 0 => value.try_iter().is_ok_and(|mut keys| {
            keys.any(|key| differs(&key, 0) || value.get_item(&key).is_ok_and(|item| differs(&item, depth - 1)))
        }),
        _ => false,
    }
}

fn represent(value: &Value, depth: usize, out: &mut String) {
    let items = || value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::Number if number_differs(value) => {
            out.push_str(&f64::try_from(value.clone()).map(float).unwrap_or_default());
        }
        ValueKind::Seq if depth > 0 => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            for (at, item) in items().enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                represent(&item, depth - 1, out);
            }
            out.push_str(if value.is_tuple() && value.len() == Some(1) { "," } else { "" });
            out.push(close);
        }
        ValueKind::Map if depth > 0 => {
            out.push('{');
            for (at, key) in items().enumerate() {
                out.push_str(if at > 0 { ", " } else { "" });
                represent(&key, 0, out);
                out.push_str(": ");
                represent(&value.get_item(&key).unwrap_or_default(), depth - 1, out);
            }
            out.push('}');
        }
        // Texts in quotes, as in Python. Writing to a string cannot fail.
        _ => {
            let _ = write!(out, "{value:?}");
        }
    }
}

/// Python's `repr` of a float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16 on.
pub(crate) fn float(value: f64) -> String {
    if !value.is_finite() {
        // As json.dumps has them.
        return if value.is_nan() {
            "NaN"
        } else if value > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..16).contains(&exponent) {
        let plain = value.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::*;

    fn render(template: &str) -> String {
        let mut environment = minijinja::Environment::new();
        environment.add_filter("tojson", tojson);
        let x = serde_json::json!({"b": "<é🙂>&'\"\u{7f}\u{1}\n", "a": [1, -0.0, 1.5, true, null, {}, []], "1": 1e16});
        environment.render_str(template, context! { x => Value::from(minijinja::value::Serde(x)) }).unwrap()
    }

    #[test]
    fn json_is_what_python_writes() {
        assert_eq!(
            render("{{ x | tojson }}"),
            "{\"b\": \"<é🙂>&'\\\"\u{7f}\\u0001\\n\", \"a\": [1, -0.0, 1.5, true, null, {}, []], \"1\": 1e+16}"
        );
        assert_eq!(
            render("{{ {'k': [1, {'z': 2}]} | tojson(indent=2) }}"),
            "{\n  \"k\": [\n    1,\n    {\n      \"z\": 2\n    }\n  ]\n}"
        );
        assert_eq!(
            render("{{ x.b | tojson(ensure_ascii=true) }}"),
            "\"<\\u00e9\\ud83d\\ude42>&'\\\"\u{7f}\\u0001\\n\""
        );
        assert_eq!(
            render("{{ {'b': 1, 'a': (2, 3)} | tojson(sort_keys=true, separators=(',', ':')) }}"),
            "{\"a\":[2,3],\"b\":1}"
        );
    }

    #[test]
    fn floats_are_what_python_writes() {
        let cases = [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1e300, "1e+300"),
            (5e-324, "5e-324"),
        ];
        for (value, written) in cases {
            assert_eq!(float(value), written);
        }
    }
}
