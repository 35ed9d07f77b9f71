//! SQL functions whose built-in form would not repeat: random numbers and the current time.
//!
//! They are replaced under their own names. A time function with a literal time keeps SQLite's meaning: it is evaluated by
//! SQLite itself, on a second, empty connection whose functions are not replaced, with the virtual time in the place of
//! `now`. `localtime` and `utc` are denied, because they ask the machine where it stands.

use std::sync::{Arc, Mutex, PoisonError};

use fulgurite_core::seed::{Generator, Seed};
use rusqlite::functions::{Context, FunctionFlags};
use rusqlite::types::Value;
use rusqlite::{Connection, Error, Result, params_from_iter};

/// Functions of time, with the place of their first time argument.
const TIME_FUNCTIONS: [(&str, usize); 7] =
    [("date", 0), ("time", 0), ("datetime", 0), ("julianday", 0), ("unixepoch", 0), ("strftime", 1), ("timediff", 0)];
/// Keywords that SQLite treats as functions, and what they mean.
const CURRENT: [(&str, &str); 3] =
    [("current_date", "date"), ("current_time", "time"), ("current_timestamp", "datetime")];

/// The clock of one database.
#[derive(Debug)]
pub(super) struct VirtualTime(Mutex<Clock>);

#[derive(Debug)]
struct Clock {
    unix_ms: u64,
    /// The time as SQLite reads it.
    text: String,
    /// Evaluates time functions.
    plain: Connection,
}

impl VirtualTime {
    pub(super) fn new(unix_ns: u64) -> Result<Self> {
        let time =
            Self(Mutex::new(Clock { unix_ms: u64::MAX, text: String::new(), plain: Connection::open_in_memory()? }));
        time.set(unix_ns)?;
        Ok(time)
    }

    /// Moves the clock.
    pub(super) fn set(&self, unix_ns: u64) -> Result<()> {
        let mut clock = self.lock();
        let unix_ms = unix_ns / 1_000_000;
        if clock.unix_ms != unix_ms {
            let text = clock.plain.query_row(
                "SELECT strftime('%Y-%m-%d %H:%M:%S', ?1, 'unixepoch') || format('.%03d', ?2)",
                [i64::try_from(unix_ms / 1_000).unwrap_or(i64::MAX), i64::try_from(unix_ms % 1_000).unwrap_or(0)],
                |row| row.get(0),
            )?;
            clock.text = text;
            clock.unix_ms = unix_ms;
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Clock> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn evaluate(&self, function: &str, mut arguments: Vec<Value>, first: usize) -> Result<Value> {
        let clock = self.lock();
        if arguments.len() <= first {
            arguments.resize(first, Value::Null);
            arguments.push(Value::Text(clock.text.clone()));
        }
        // `timediff` takes two times and no modifiers.
        let times = if function == "timediff" { 2 } else { 1 };
        for argument in arguments.iter_mut().skip(first).take(times) {
            if is(argument, &["now"]) {
                *argument = Value::Text(clock.text.clone());
            }
        }
        if arguments.get(first).is_some_and(|argument| is(argument, &["subsec", "subsecond"])) {
            arguments.insert(first, Value::Text(clock.text.clone()));
        }
        if arguments.iter().skip(first).any(|argument| is(argument, &["localtime", "utc"])) {
            let problem = "`localtime` and `utc` depend on the machine and are denied; times are UTC";
            return Err(Error::UserFunctionError(problem.into()));
        }
        let places = vec!["?"; arguments.len()].join(",");
        let mut statement = clock.plain.prepare(&format!("SELECT {function}({places})"))?;
        statement.query_row(params_from_iter(arguments), |row| row.get(0))
    }
}

fn is(value: &Value, words: &[&str]) -> bool {
    matches!(value, Value::Text(text) if words.iter().any(|word| text.trim().eq_ignore_ascii_case(word)))
}

/// Puts the replacements into a connection.
pub(super) fn replace(
    connection: &Connection,
    time: &Arc<VirtualTime>,
    seed: Seed,
    value_bytes_max: u64,
) -> Result<()> {
    // Innocuous: schemas may use them in defaults and checks, as they may use the built-in ones.
    let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_INNOCUOUS;
    let generator = Arc::new(Mutex::new(Generator::new(seed.child("sqlite-random"))));
    let numbers = Arc::clone(&generator);
    connection.create_scalar_function("random", 0, flags, move |_| Ok(next(&numbers).cast_signed()))?;
    connection.create_scalar_function("randomblob", 1, flags, move |context| {
        let length = usize::try_from(context.get::<Option<i64>>(0)?.unwrap_or(0).max(1)).unwrap_or(usize::MAX);
        if length as u64 > value_bytes_max {
            return Err(Error::UserFunctionError("randomblob: string or blob too big".into()));
        }
        let mut bytes = Vec::with_capacity(length.next_multiple_of(8));
        while bytes.len() < length {
            bytes.extend(next(&generator).to_le_bytes());
        }
        bytes.truncate(length);
        Ok(bytes)
    })?;
    for (name, first) in TIME_FUNCTIONS {
        let time = Arc::clone(time);
        connection
            .create_scalar_function(name, -1, flags, move |context| time.evaluate(name, arguments(context)?, first))?;
    }
    for (name, function) in CURRENT {
        let time = Arc::clone(time);
        connection.create_scalar_function(name, 0, flags, move |_| time.evaluate(function, vec![], 0))?;
    }
    Ok(())
}

fn next(generator: &Mutex<Generator>) -> u64 {
    generator.lock().unwrap_or_else(PoisonError::into_inner).next_u64()
}

fn arguments(context: &Context<'_>) -> Result<Vec<Value>> {
    (0..context.len()).map(|index| context.get(index)).collect()
}
