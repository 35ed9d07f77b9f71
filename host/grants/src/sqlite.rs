//! SQLite databases: a private copy in memory for every rollout, made from a snapshot that is read once.
//!
//! A statement is bounded by counted steps, not by time, and what it returns follows from the snapshot, the statements, the
//! attempt's seed and its virtual clock: `random()` and the current time are replaced (see `functions`). Nothing in SQL
//! reaches a file: `ATTACH`, `VACUUM`, extensions and all but a few pragmas are denied when a statement is compiled.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use fulgurite_core::id::ContentHash;
use fulgurite_core::limits::Limits;
use fulgurite_core::seed::Seed;
use rusqlite::config::DbConfig;
use rusqlite::fallible_iterator::FallibleIterator;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::limits::Limit;
use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Batch, Connection, ErrorCode, OpenFlags, Statement, ToSql};
use serde::Serialize;

use functions::VirtualTime;

mod functions;

/// Steps of SQLite's virtual machine between two looks at the count.
const STEPS_PER_LOOK: i32 = 1_000;
/// Bytes of memory that all databases of the process may use together. The databases themselves are limited one by one; this
/// is against statements that pile up intermediate results.
const HEAP_BYTES_MAX: i64 = 8 << 30;
/// First bytes of every database file.
const MAGIC: &[u8] = b"SQLite format 3\0";
/// Where the file says how it is journalled, for reading and for writing; 2 is a write-ahead log.
const JOURNAL_AT: [usize; 2] = [18, 19];
const JOURNAL_WAL: u8 = 2;
const JOURNAL_ROLLBACK: u8 = 1;

/// Pragmas that only tell something. All others are denied.
const PRAGMAS: [&str; 13] = [
    "application_id",
    "collation_list",
    "compile_options",
    "foreign_key_check",
    "foreign_key_list",
    "function_list",
    "index_info",
    "index_list",
    "index_xinfo",
    "table_info",
    "table_list",
    "table_xinfo",
    "user_version",
];
/// Kinds of virtual tables that a tool may make.
const VIRTUAL_TABLES: [&str; 6] = ["fts3", "fts4", "fts5", "fts5vocab", "rtree", "rtree_i32"];

/// Why a snapshot cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It cannot be read.
    #[error("cannot read the database `{path}`")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not a database.
    #[error("`{path}` is not a SQLite database")]
    NotADatabase {
        /// The file.
        path: PathBuf,
    },
    /// What it holds is partly in another file.
    #[error(
        "`{path}` has a write-ahead log beside it that is not part of it yet; join them: sqlite3 {path} 'PRAGMA journal_mode=DELETE'"
    )]
    WriteAheadLog {
        /// The file.
        path: PathBuf,
    },
    /// Too large.
    #[error("`{path}` is larger than limits.sqlite_database_bytes_max of {value} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit.
        value: u64,
    },
    /// SQLite does not open it.
    #[error("`{path}` cannot be opened as a database: {problem}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What SQLite says.
        problem: String,
    },
}

/// What a database file held when the run started.
#[derive(Debug)]
pub struct Snapshot {
    bytes: Vec<u8>,
    hash: ContentHash,
}

impl Snapshot {
    /// Reads a file. An empty one is an empty database. Blocks.
    ///
    /// # Errors
    /// When it cannot be read, is no database, or is too large.
    pub fn load(path: &Path, limits: &Limits) -> Result<Self, SnapshotError> {
        let read = |source| SnapshotError::Read { path: path.to_owned(), source };
        let value = limits.sqlite_database_bytes_max;
        let mut bytes = vec![];
        let file = std::fs::File::open(path).map_err(read)?;
        file.take(value.saturating_add(1)).read_to_end(&mut bytes).map_err(read)?;
        if bytes.len() as u64 > value {
            return Err(SnapshotError::TooLarge { path: path.to_owned(), value });
        }
        if !bytes.is_empty() && !bytes.starts_with(MAGIC) {
            return Err(SnapshotError::NotADatabase { path: path.to_owned() });
        }
        let hash = ContentHash::of(&bytes);
        let mut log = path.as_os_str().to_owned();
        log.push("-wal");
        let logged = std::fs::metadata(PathBuf::from(log)).is_ok_and(|log| log.len() > 0);
        for at in JOURNAL_AT {
            if let Some(journal) = bytes.get_mut(at).filter(|journal| **journal == JOURNAL_WAL) {
                if logged {
                    return Err(SnapshotError::WriteAheadLog { path: path.to_owned() });
                }
                // A copy in memory has no log; with nothing in the log, this byte is all the difference.
                *journal = JOURNAL_ROLLBACK;
            }
        }
        let snapshot = Self { bytes, hash };
        let damaged = |error: SqliteError| SnapshotError::Damaged { path: path.to_owned(), problem: error.to_string() };
        let mut database = Database::open(&snapshot, limits, Seed::new(0), 0).map_err(damaged)?;
        database.query("SELECT count(*) FROM sqlite_master", &[], 0).map_err(damaged)?;
        Ok(snapshot)
    }

    /// Hash of the file.
    #[must_use]
    pub fn hash(&self) -> ContentHash {
        self.hash
    }
}

/// A value in a database.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    /// Nothing.
    Null,
    /// A whole number.
    Integer(i64),
    /// A number; never NaN, which SQLite keeps as null.
    Real(f64),
    /// Text.
    Text(String),
    /// Bytes.
    #[serde(serialize_with = "crate::base64_bytes::serialize")]
    Blob(Vec<u8>),
}

impl Value {
    fn bytes(&self) -> u64 {
        let held = match self {
            Self::Text(text) => text.len(),
            Self::Blob(bytes) => bytes.len(),
            Self::Null | Self::Integer(_) | Self::Real(_) => 0,
        };
        (held + size_of::<u64>()) as u64
    }
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Null => ValueRef::Null,
            Self::Integer(number) => ValueRef::Integer(*number),
            Self::Real(number) => ValueRef::Real(*number),
            Self::Text(text) => ValueRef::Text(text.as_bytes()),
            Self::Blob(bytes) => ValueRef::Blob(bytes),
        }))
    }
}

impl From<ValueRef<'_>> for Value {
    fn from(value: ValueRef<'_>) -> Self {
        match value {
            ValueRef::Null => Self::Null,
            ValueRef::Integer(number) => Self::Integer(number),
            ValueRef::Real(number) => Self::Real(number),
            ValueRef::Text(text) => Self::Text(String::from_utf8_lossy(text).into_owned()),
            ValueRef::Blob(bytes) => Self::Blob(bytes.to_vec()),
        }
    }
}

/// What a query found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rows {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// The rows, each as long as `columns`.
    pub rows: Vec<Vec<Value>>,
}

/// Why a statement failed. One case per thing the caller can do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SqliteError {
    /// The statement is wrong, or breaks a constraint; the text is SQLite's.
    #[error("{0}")]
    Sql(String),
    /// The statement does what no granted database allows; the text says what.
    #[error("denied: {0}")]
    Denied(String),
    /// It goes past a limit.
    #[error("limit {name} of {value} is reached")]
    LimitReached {
        /// Name of the limit.
        name: &'static str,
        /// Its value.
        value: u64,
    },
    /// The attempt has ended meanwhile.
    #[error("the attempt has ended")]
    Cancelled,
}

/// What the hooks of a connection look at.
#[derive(Debug, Default)]
struct Watch {
    looks: AtomicU64,
    exhausted: AtomicBool,
    cancelled: Arc<AtomicBool>,
    denied: std::sync::Mutex<Option<String>>,
}

impl Watch {
    fn take_denied(&self) -> Option<String> {
        self.denied.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
    }

    fn deny(&self, what: String) -> Authorization {
        *self.denied.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(what);
        Authorization::Deny
    }

    fn authorize(&self, context: &AuthContext<'_>) -> Authorization {
        match context.action {
            AuthAction::Attach { .. } | AuthAction::Detach { .. } => {
                self.deny("ATTACH, DETACH and VACUUM, which open other files".to_owned())
            }
            AuthAction::Pragma { pragma_name, pragma_value } => {
                let name = pragma_name.to_ascii_lowercase();
                let asks = pragma_value.is_none() || !["application_id", "user_version"].contains(&name.as_str());
                if PRAGMAS.contains(&name.as_str()) && asks {
                    Authorization::Allow
                } else {
                    self.deny(format!("PRAGMA {name}"))
                }
            }
            AuthAction::Function { function_name } => {
                let name = function_name.to_ascii_lowercase();
                if ["load_extension", "fts3_tokenizer", "sqlite_log"].contains(&name.as_str()) {
                    self.deny(format!("the function {name}"))
                } else {
                    Authorization::Allow
                }
            }
            AuthAction::CreateVtable { module_name, .. }
                if !VIRTUAL_TABLES.contains(&module_name.to_ascii_lowercase().as_str()) =>
            {
                self.deny(format!("virtual tables of the kind {module_name}"))
            }
            AuthAction::Unknown { code, .. } => self.deny(format!("the action {code}")),
            _ => Authorization::Allow,
        }
    }
}

/// The database of one rollout. Every call blocks for as long as its statement takes.
#[derive(Debug)]
pub struct Database {
    connection: Connection,
    watch: Arc<Watch>,
    time: Arc<VirtualTime>,
    limits: Limits,
}

impl Database {
    /// Makes a copy of a snapshot. `seed` is what random numbers follow from; the clock stands at `now_unix_ns`.
    ///
    /// # Errors
    /// When SQLite cannot open it.
    pub fn open(snapshot: &Snapshot, limits: &Limits, seed: Seed, now_unix_ns: u64) -> Result<Self, SqliteError> {
        // SQLITE_OPEN_URI is not set, so that no name is ever read as more than a name.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_MEMORY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(":memory:", flags).map_err(sql)?;
        if !snapshot.bytes.is_empty() {
            let bytes = snapshot.bytes.as_slice();
            connection.deserialize_read_exact("main", bytes, bytes.len(), false).map_err(sql)?;
        }
        let watch = Arc::new(Watch::default());
        let time = Arc::new(VirtualTime::new(now_unix_ns).map_err(sql)?);
        configure(&connection, limits).map_err(sql)?;
        functions::replace(&connection, &time, seed, limits.sqlite_value_bytes_max).map_err(sql)?;
        let hook = Arc::clone(&watch);
        let looks_max = limits.sqlite_steps_max.div_ceil(u64::from(STEPS_PER_LOOK.unsigned_abs()));
        let look = move || {
            let exhausted = hook.looks.fetch_add(1, Ordering::Relaxed) + 1 > looks_max;
            hook.exhausted.fetch_or(exhausted, Ordering::Relaxed);
            exhausted || hook.cancelled.load(Ordering::Relaxed)
        };
        connection.progress_handler(STEPS_PER_LOOK, Some(look)).map_err(sql)?;
        // Last: what is done above would be denied.
        let hook = Arc::clone(&watch);
        connection.authorizer(Some(move |context: AuthContext<'_>| hook.authorize(&context))).map_err(sql)?;
        Ok(Self { connection, watch, time, limits: limits.clone() })
    }

    /// Set to true, it ends a statement under way soon.
    #[must_use]
    pub fn cancelled(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.watch.cancelled)
    }

    /// Runs one statement and returns its rows.
    ///
    /// # Errors
    /// See [`SqliteError`].
    pub fn query(&mut self, sql: &str, parameters: &[Value], now_unix_ns: u64) -> Result<Rows, SqliteError> {
        self.statement(sql, parameters, now_unix_ns, |statement, limits| {
            let columns: Vec<String> = statement.column_names().map(str::to_owned).collect();
            let mut found = Rows { columns, rows: vec![] };
            let (mut bytes, value) = (0_u64, limits.payload_bytes_max);
            let mut cursor = statement.raw_query();
            while let Some(row) = cursor.next()? {
                if found.rows.len() as u64 >= limits.sqlite_rows_max {
                    return Ok(Err(SqliteError::LimitReached {
                        name: "sqlite_rows_max",
                        value: limits.sqlite_rows_max,
                    }));
                }
                let mut values = Vec::with_capacity(found.columns.len());
                for column in 0..found.columns.len() {
                    let held = Value::from(row.get_ref(column)?);
                    bytes = bytes.saturating_add(held.bytes());
                    values.push(held);
                }
                if bytes > value {
                    return Ok(Err(SqliteError::LimitReached { name: "payload_bytes_max", value }));
                }
                found.rows.push(values);
            }
            Ok(Ok(found))
        })
    }

    /// Runs one statement and returns how many rows it changed, those that triggers changed included.
    ///
    /// # Errors
    /// See [`SqliteError`].
    pub fn execute(&mut self, sql: &str, parameters: &[Value], now_unix_ns: u64) -> Result<u64, SqliteError> {
        let before = self.connection.total_changes();
        self.statement(sql, parameters, now_unix_ns, |statement, _| {
            let mut cursor = statement.raw_query();
            while cursor.next()?.is_some() {}
            Ok(Ok(()))
        })?;
        Ok(self.connection.total_changes().saturating_sub(before))
    }

    fn statement<T>(
        &mut self,
        text: &str,
        parameters: &[Value],
        now_unix_ns: u64,
        run: impl FnOnce(&mut Statement<'_>, &Limits) -> rusqlite::Result<Result<T, SqliteError>>,
    ) -> Result<T, SqliteError> {
        self.time.set(now_unix_ns).map_err(sql)?;
        self.watch.looks.store(0, Ordering::Relaxed);
        self.watch.exhausted.store(false, Ordering::Relaxed);
        self.watch.take_denied();
        let mut batch = Batch::new(&self.connection, text);
        let ran = (|| {
            let Some(mut statement) = batch.next()? else {
                return Ok(Err(SqliteError::Sql("there is no statement".to_owned())));
            };
            if batch.next()?.is_some() {
                return Ok(Err(SqliteError::Sql(
                    "there is more than one statement; run one after the other".to_owned(),
                )));
            }
            let expected = statement.parameter_count();
            if expected != parameters.len() {
                let problem = format!("the statement has {expected} parameters and {} values", parameters.len());
                return Ok(Err(SqliteError::Sql(problem)));
            }
            for (index, value) in parameters.iter().enumerate() {
                statement.raw_bind_parameter(index + 1, value)?;
            }
            run(&mut statement, &self.limits)
        })();
        ran.unwrap_or_else(|error| Err(self.failure(&error)))
    }

    fn failure(&self, error: &rusqlite::Error) -> SqliteError {
        if let Some(denied) = self.watch.take_denied() {
            return SqliteError::Denied(format!("a granted database has no {denied}"));
        }
        let limit = |name, value| SqliteError::LimitReached { name, value };
        match error.sqlite_error_code() {
            Some(ErrorCode::OperationInterrupted) if self.watch.cancelled.load(Ordering::Relaxed) => {
                SqliteError::Cancelled
            }
            Some(ErrorCode::OperationInterrupted) if self.watch.exhausted.load(Ordering::Relaxed) => {
                limit("sqlite_steps_max", self.limits.sqlite_steps_max)
            }
            Some(ErrorCode::DiskFull) => limit("sqlite_database_bytes_max", self.limits.sqlite_database_bytes_max),
            Some(ErrorCode::TooBig) => limit("sqlite_value_bytes_max", self.limits.sqlite_value_bytes_max),
            Some(ErrorCode::OutOfMemory) => limit("sqlite_heap_bytes_max", HEAP_BYTES_MAX.unsigned_abs()),
            _ => sql(error),
        }
    }
}

fn sql(error: impl std::borrow::Borrow<rusqlite::Error>) -> SqliteError {
    SqliteError::Sql(match error.borrow() {
        rusqlite::Error::SqliteFailure(_, Some(text)) => text.clone(),
        rusqlite::Error::SqlInputError { msg, .. } => msg.clone(),
        other => other.to_string(),
    })
}

fn configure(connection: &Connection, limits: &Limits) -> rusqlite::Result<()> {
    for (setting, value) in [
        (DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true),
        (DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false),
        (DbConfig::SQLITE_DBCONFIG_ENABLE_FTS3_TOKENIZER, false),
        (DbConfig::SQLITE_DBCONFIG_ENABLE_ATTACH_CREATE, false),
        (DbConfig::SQLITE_DBCONFIG_ENABLE_ATTACH_WRITE, false),
    ] {
        connection.set_db_config(setting, value)?;
    }
    let length = i32::try_from(limits.sqlite_value_bytes_max).unwrap_or(i32::MAX);
    for (limit, value) in [
        (Limit::SQLITE_LIMIT_LENGTH, length),
        (Limit::SQLITE_LIMIT_SQL_LENGTH, length),
        (Limit::SQLITE_LIMIT_ATTACHED, 0),
        (Limit::SQLITE_LIMIT_WORKER_THREADS, 0),
        // One step of the machine compares a whole text with a whole pattern.
        (Limit::SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 256),
        (Limit::SQLITE_LIMIT_EXPR_DEPTH, 200),
        (Limit::SQLITE_LIMIT_COMPOUND_SELECT, 200),
        (Limit::SQLITE_LIMIT_TRIGGER_DEPTH, 100),
    ] {
        connection.set_limit(limit, value)?;
    }
    // Sorting and intermediate tables too: nothing touches a disk.
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    connection.pragma_update(None, "hard_heap_limit", HEAP_BYTES_MAX)?;
    let page_bytes: u64 = connection.pragma_query_value(None, "page_size", |row| row.get::<_, i64>(0))?.unsigned_abs();
    let pages = (limits.sqlite_database_bytes_max / page_bytes.max(1)).max(1);
    for schema in ["main", "temp"] {
        connection.pragma_update(Some(schema), "max_page_count", i64::try_from(pages).unwrap_or(i64::MAX))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
