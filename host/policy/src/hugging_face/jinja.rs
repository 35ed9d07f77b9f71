//! The environment of chat templates, where minijinja and Python's Jinja differ.
//!
//! Bounded are the fuel, the rendered text, and what one filter or method adds by a number alone (a width, a count). Not
//! bounded is the memory of texts that a template joins by `~`, `+` or `join`: each step costs the same fuel however long the
//! text is, so a template that doubles a text some forty times ends the process. Whoever takes a folder from a stranger runs
//! its template in a process that may die.

use std::sync::LazyLock;

use jiff::Zoned;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, StringInput, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value, escape_formatter, filters};
use regex::Regex;

use super::{methods, python};

/// Instructions that one rendering may take: thousands of messages, or a second of a loop without end.
const FUEL: u64 = 20_000_000;
/// Bytes that a width or a count may add to a text: far more than a prompt is padded by.
pub(super) const PADDING_BYTES_MAX: usize = 1 << 20;
/// Lists that `batch` and `slice` may make, and items that they may fill up: as many as `range` may have.
const LISTS_MAX: usize = 100_000;
/// Bytes that a replacement may write: the longest prompt that is rendered, too.
pub(super) const RENDERED_BYTES_MAX: usize = 16 << 20;

pub(super) fn environment(now: Zoned) -> Environment<'static> {
    let mut environment = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(methods::call);
    environment.set_fuel(Some(FUEL));
    environment.set_formatter(|out, state, value| match python::text(value) {
        Some(text) => Ok(out.write_str(&text)?),
        None => escape_formatter(out, state, value),
    });
    add_tests(&mut environment);
    add_filters(&mut environment);
    environment.add_function("raise_exception", |reason: String| -> Result<String, Error> { Err(refused(reason)) });
    environment.add_function("strftime_now", move |format: String| {
        let written = jiff::fmt::strtime::format(&format, &now);
        written.map_err(|error| refused(error.to_string()))
    });
    environment
}

pub(super) fn refused(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// Refuses a number that would make a text or a list too long.
pub(super) fn bounded(what: &str, number: usize, max: usize) -> Result<(), Error> {
    if number <= max { Ok(()) } else { Err(refused(format!("{what} is {number}: at most {max} are rendered"))) }
}

fn add_tests(environment: &mut Environment<'_>) {
    // minijinja iterates over `none`, as over nothing; templates tell tools that are not there by this.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    // Python asks for a length and an access by index, which texts and objects have too.
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined)
    });
    // Jinja's undefined has a `__call__`, which fails.
    environment.add_test("callable", |value: &Value| matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined));
}

fn add_filters(environment: &mut Environment<'_>) {
    environment.add_filter("tojson", python::tojson);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("string", |state: &State<'_, '_>, value: &Value| match python::text(value) {
        Some(text) => Ok(Value::from(text)),
        None => filters::string(state, value),
    });
    environment.add_filter("int", int);
    environment.add_filter("replace", |text: StringInput<'_>, old: &str, new: &str, count: Option<i64>| {
        methods::replace(text.as_str(), old, new, count)
    });
    environment.add_filter("dictsort", dictsort);
    environment.add_filter("batch", |state: &State<'_, '_>, value: Value, count: usize, fill: Option<Value>| {
        bounded("the count of `batch`", count, LISTS_MAX)?;
        filters::batch(state, value, count, fill)
    });
    environment.add_filter("slice", |state: &State<'_, '_>, value: Value, count: usize, fill: Option<Value>| {
        bounded("the count of `slice`", count, LISTS_MAX)?;
        filters::slice(state, value, count, fill)
    });
    environment.add_filter("indent", indent);
    environment.add_filter("format", |state: &mut State<'_, '_>, text: &Value, values: Rest<ValueOrKwargs>| {
        let given: Vec<Value> = values.iter().map(|value| (**value).clone()).collect();
        methods::check_format(text.as_str().unwrap_or_default(), &given)?;
        filters::format(state, text, values)
    });
    environment.add_filter("center", |text: StringInput<'_>, width: Option<usize>| {
        methods::padded(text.as_str(), width.unwrap_or(80), None, methods::Side::Both)
    });
    environment.add_filter("wordcount", |text: StringInput<'_>| {
        static WORD: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\w+").ok());
        WORD.as_ref().map_or(0, |word| word.find_iter(text.as_str()).count())
    });
    environment.add_filter("truncate", truncate);
}

/// Jinja's undefined is as long as nothing.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() { Ok(0) } else { filters::length(value) }
}

/// A text that is no number is the default, which is 0.
#[expect(clippy::needless_pass_by_value, reason = "filters are called with their options by value")]
fn int(
    state: &State<'_, '_>,
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    options: Kwargs,
) -> Result<Value, Error> {
    let default = match default {
        Some(default) => default,
        None => options.get::<Option<Value>>("default")?.unwrap_or_else(|| Value::from(0)),
    };
    let base = match base {
        Some(base) => Some(base),
        None => options.get::<Option<u32>>("base")?,
    };
    options.assert_all_used()?;
    filters::int(state, value, Some(default), base, Kwargs::from_iter(Vec::<(String, Value)>::new()))
}

/// Options by name, those that are given by place too.
pub(super) fn named(names: &[&'static str], given: Rest<ValueOrKwargs>) -> Result<Kwargs, Error> {
    let given = given.into_values();
    let (by_place, by_name): (&[Value], Kwargs) = from_args(&given)?;
    if by_place.len() > names.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let mut all: Vec<(&str, Value)> = names.iter().copied().zip(by_place.iter().cloned()).collect();
    for name in names.iter().skip(by_place.len()) {
        all.extend(by_name.get::<Option<Value>>(name)?.map(|value| (*name, value)));
    }
    by_name.assert_all_used()?;
    Ok(all.into_iter().collect())
}

fn dictsort(value: &Value, options: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    filters::dictsort(value, named(&["case_sensitive", "by", "reverse"], options)?)
}

fn truncate(state: &mut State<'_, '_>, value: &Value, options: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    minijinja_contrib::filters::truncate(state, value, named(&["length", "killwords", "end", "leeway"], options)?)
}

fn indent(
    text: StringInput<'_>,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<Value, Error> {
    let width = match width {
        Some(width) => Some(width),
        None => options.get::<Option<usize>>("width")?,
    };
    let lines = text.as_str().matches('\n').count() + 1;
    bounded("the padding of `indent`", width.unwrap_or(4).saturating_mul(lines), PADDING_BYTES_MAX)?;
    filters::indent(text, width, first, blank, options)
}
