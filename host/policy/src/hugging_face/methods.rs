//! Methods of Python's texts, lists and objects that minijinja's own collection lacks, or has with fewer arguments.

use std::sync::LazyLock;

use minijinja::value::{DynObject, Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use regex::Regex;

use super::jinja::{PADDING_BYTES_MAX, RENDERED_BYTES_MAX, bounded, refused};

/// Where a padded text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Left,
    Right,
    Both,
}

/// Calls a method of a value.
pub(super) fn call(state: &mut State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let own = match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => of_text(state, value, text, method, args)?,
        (ValueKind::Seq | ValueKind::Map, _) => of_collection(value, method, args)?,
        _ => None,
    };
    own.map_or_else(|| unknown_method_callback(state, value, method, args), Ok)
}

fn of_text(
    state: &mut State<'_, '_>,
    value: &Value,
    text: &str,
    method: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "split" => {
            let (separator, count) = split_arguments(args)?;
            unknown_method_callback(state, value, method, &[separator.into(), count.into()])?
        }
        "rsplit" => {
            let (separator, count) = split_arguments(args)?;
            match usize::try_from(count) {
                Ok(count) => rsplit(text, separator.as_deref(), count),
                // Without a bound the side does not matter.
                Err(_) => unknown_method_callback(state, value, "split", &[separator.into()])?,
            }
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let from_the_left = method == "partition";
            let found = if from_the_left { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match found {
                Some((before, after)) => [before, separator, after],
                None if from_the_left => [text, "", ""],
                None => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let found = if method == "index" { text.find(part) } else { text.rfind(part) };
            let before = found.and_then(|at| text.get(..at)).ok_or_else(|| refused("substring not found"))?;
            before.chars().count().into()
        }
        "replace" => {
            let (old, new, count): (&str, &str, Option<i64>) = from_args(args)?;
            replace(text, old, new, count)?.into()
        }
        "title" => {
            let () = from_args(args)?;
            title(text).into()
        }
        "swapcase" => {
            let () = from_args(args)?;
            let turned = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            text.chars().map(turned).collect::<String>().into()
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let digits = text.trim_start_matches(['+', '-']);
            let sign = if text.len() == digits.len() { "" } else { text.get(..1).unwrap_or_default() };
            let rest = text.get(sign.len()..).unwrap_or_default();
            format!("{sign}{}", padded(rest, width.saturating_sub(sign.len()), Some("0"), Side::Right)?).into()
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            let side = match method {
                "ljust" => Side::Left,
                "rjust" => Side::Right,
                _ => Side::Both,
            };
            padded(text, width, fill, side)?.into()
        }
        "format" => {
            check_format(text, args)?;
            return Ok(None);
        }
        _ => return Ok(None),
    }))
}

fn of_collection(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(match (value.kind(), method) {
        (_, "copy") => {
            let () = from_args(args)?;
            // Nothing in a template changes a list or an object.
            Some(value.clone())
        }
        (ValueKind::Seq, "index") => {
            let (wanted,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == *wanted);
            Some(at.ok_or_else(|| refused("the list does not hold it"))?.into())
        }
        _ => None,
    })
}

/// Separator and number of cuts, by place or by name; -1 is as many as there are.
fn split_arguments(args: &[Value]) -> Result<(Option<String>, i64), Error> {
    let (separator, count, options): (Option<String>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match separator {
        Some(separator) => Some(separator),
        None => options.get::<Option<String>>("sep")?,
    };
    let count = match count {
        Some(count) => Some(count),
        None => options.get::<Option<i64>>("maxsplit")?,
    };
    options.assert_all_used()?;
    if separator.as_deref() == Some("") {
        return Err(refused("empty separator"));
    }
    Ok((separator, count.unwrap_or(-1)))
}

fn rsplit(text: &str, separator: Option<&str>, count: usize) -> Value {
    let mut parts: Vec<&str> = Vec::new();
    if let Some(separator) = separator {
        parts.extend(text.rsplitn(count.saturating_add(1), separator));
    } else {
        let mut rest = text.trim_end();
        while !rest.is_empty() && parts.len() < count {
            let space = rest.char_indices().rev().find(|(_, c)| c.is_whitespace());
            let start = space.map_or(0, |(at, c)| at + c.len_utf8());
            let (before, word) = rest.split_at_checked(start).unwrap_or(("", rest));
            parts.push(word);
            rest = before.trim_end();
        }
        if !rest.is_empty() {
            parts.push(rest);
        }
    }
    parts.into_iter().rev().map(Value::from).collect()
}

/// A text with at most `count` places of `old` replaced; all where `count` is absent or negative.
pub(super) fn replace(text: &str, old: &str, new: &str, count: Option<i64>) -> Result<String, Error> {
    let count = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let places = text.matches(old).take(count).count();
    let bytes = places.saturating_mul(new.len()).saturating_add(text.len());
    bounded("the length of what `replace` writes", bytes, RENDERED_BYTES_MAX)?;
    Ok(text.replacen(old, new, count))
}

/// Every letter after something else than a letter is large: `it's` becomes `It'S`, which the filter of the name leaves.
fn title(text: &str) -> String {
    let mut written = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        if in_word {
            written.extend(c.to_lowercase());
        } else {
            written.extend(c.to_uppercase());
        }
        in_word = c.is_lowercase() || c.is_uppercase();
    }
    written
}

/// A text that is at least `width` characters wide.
pub(super) fn padded(text: &str, width: usize, fill: Option<&str>, side: Side) -> Result<String, Error> {
    let fill = fill.unwrap_or(" ");
    if fill.chars().count() != 1 {
        return Err(refused("the fill character must be exactly one character long"));
    }
    let missing = width.saturating_sub(text.chars().count());
    bounded("the padding of a text", missing.saturating_mul(fill.len()), PADDING_BYTES_MAX)?;
    let left = match side {
        Side::Left => 0,
        Side::Right => missing,
        // As CPython rounds it.
        Side::Both => missing / 2 + (missing & width & 1),
    };
    Ok(format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left)))
}

/// Refuses widths and precisions that would take the memory: those in the format, and those among its values.
pub(super) fn check_format(format: &str, values: &[Value]) -> Result<(), Error> {
    static NUMBER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new("[0-9]+").ok());
    let numbers = NUMBER.iter().flat_map(|number| number.find_iter(format));
    let written = numbers.map(|number| number.as_str().parse::<usize>().unwrap_or(usize::MAX));
    let mut widths = written.fold(0_usize, usize::saturating_add);
    // A width may be a value: `%*d`, and `{:{}}`.
    let asked = format.matches('*').count() + format.matches('{').count();
    let is_nested = format.contains('*')
        || format
            .split(':')
            .skip(1)
            .any(|part| part.find('{').is_some_and(|open| part.find('}').is_none_or(|close| open < close)));
    if is_nested {
        // Those that are given by name come as one object.
        let inner = |value: &Value| match value.kind() {
            ValueKind::Map => {
                let pairs = value.as_object().and_then(DynObject::try_iter_pairs);
                pairs.into_iter().flatten().map(|(_, value)| value).collect()
            }
            _ => vec![value.clone()],
        };
        let largest = values.iter().flat_map(inner).filter_map(|value| usize::try_from(value).ok()).max().unwrap_or(0);
        widths = widths.saturating_add(largest.saturating_mul(asked));
    }
    bounded("a width in a format", widths, PADDING_BYTES_MAX)
}
