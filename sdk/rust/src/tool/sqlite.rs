//! SQLite databases: a private copy per attempt. The manifest must ask ([`manifest!`](crate::manifest!)), the run's config
//! must grant.

use crate::types::LimitReached;
use crate::wit::tool::fulgurite::tool::sqlite as wit;

pub use wit::Value;

/// Why a statement failed. One case per thing the caller can do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SqliteError {
    /// The statement is wrong or breaks a constraint; the text is SQLite's.
    #[error("{0}")]
    Sql(String),
    /// Not granted, or something that no granted database has.
    #[error("denied: {0}")]
    Denied(String),
    /// A limit is reached; what the statement changed is undone.
    #[error("{0}")]
    LimitReached(LimitReached),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl From<wit::SqliteError> for SqliteError {
    fn from(error: wit::SqliteError) -> Self {
        match error {
            wit::SqliteError::Sql(text) => Self::Sql(text),
            wit::SqliteError::Denied(text) => Self::Denied(text),
            wit::SqliteError::LimitReached(limit) => Self::LimitReached(limit.into()),
            wit::SqliteError::Other(text) => Self::Other(text),
        }
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Self::Integer(number)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Real(number)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// As JSON: bytes are an array of numbers.
impl From<Value> for serde_json::Value {
    fn from(value: Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Integer(number) => number.into(),
            Value::Real(number) => number.into(),
            Value::Text(text) => text.into(),
            Value::Blob(bytes) => bytes.into(),
        }
    }
}

/// What a query found.
#[derive(Debug, Clone)]
pub struct Rows {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// The rows, each as long as `columns`.
    pub values: Vec<Vec<Value>>,
}

/// An open database.
#[derive(Debug)]
pub struct Database(wit::Database);

impl Database {
    /// Opens a granted database. Opening it again gives the same copy.
    ///
    /// # Errors
    /// When it is not granted.
    pub fn open(name: &str) -> Result<Self, SqliteError> {
        Ok(Self(wit::open(name)?))
    }

    /// Runs one statement and returns its rows. Parameters are `?` in the statement.
    ///
    /// # Errors
    /// See [`SqliteError`].
    pub fn query(&self, sql: &str, parameters: &[Value]) -> Result<Rows, SqliteError> {
        let rows = self.0.query(sql, parameters)?;
        Ok(Rows { columns: rows.columns(), values: rows.values() })
    }

    /// Runs one statement and returns how many rows it changed.
    ///
    /// # Errors
    /// See [`SqliteError`].
    pub fn execute(&self, sql: &str, parameters: &[Value]) -> Result<u64, SqliteError> {
        Ok(self.0.execute(sql, parameters)?)
    }
}
