//! `fulgurite:tool/sqlite`. Statements run on threads for blocking work; the guest waits meanwhile and pays no CPU time.
#![expect(unreachable_pub, reason = "the generated bindings re-export the resources' types, which pub(crate) forbids")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use fulgurite_core::grant::Capability;
use fulgurite_core::host_call::HostCall;
use fulgurite_core::id::ContentHash;
use fulgurite_grants::{Database, Rows, SqliteError, Value};
use serde::Serialize;
use wasmtime::component::Resource;

use super::{ToolData, arguments, record};
use crate::bindings::tool::fulgurite::tool::sqlite as wit;
use crate::fault::Stop;

const INTERFACE: &str = "fulgurite:tool/sqlite@0.1.0";

/// A handle on a database of the attempt.
pub struct OpenDatabase {
    name: String,
    database: Arc<Mutex<Database>>,
}

/// What a query found.
pub struct FoundRows(Rows);

/// What is recorded of a result: it is found again by doing the same, and only compared.
#[derive(Serialize)]
struct Compared {
    hash: ContentHash,
}

#[derive(Serialize)]
struct Arguments<'a> {
    database: &'a str,
    sql: &'a str,
    parameters: &'a [Value],
}

impl From<wit::Value> for Value {
    fn from(value: wit::Value) -> Self {
        match value {
            wit::Value::Null => Self::Null,
            wit::Value::Integer(number) => Self::Integer(number),
            wit::Value::Real(number) => Self::Real(number),
            wit::Value::Text(text) => Self::Text(text),
            wit::Value::Blob(bytes) => Self::Blob(bytes),
        }
    }
}

impl From<&Value> for wit::Value {
    fn from(value: &Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Integer(number) => Self::Integer(*number),
            Value::Real(number) => Self::Real(*number),
            Value::Text(text) => Self::Text(text.clone()),
            Value::Blob(bytes) => Self::Blob(bytes.clone()),
        }
    }
}

impl From<SqliteError> for wit::SqliteError {
    fn from(error: SqliteError) -> Self {
        match error {
            SqliteError::Sql(text) => Self::Sql(text),
            SqliteError::Denied(text) => Self::Denied(text),
            SqliteError::LimitReached { name, value } => {
                Self::LimitReached(wit::LimitReached { name: name.to_owned(), value })
            }
            SqliteError::Cancelled => Self::Other(error.to_string()),
        }
    }
}

/// Ends a statement that nobody waits for any more.
struct CancelOnDrop(Option<Arc<AtomicBool>>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(cancelled) = &self.0 {
            cancelled.store(true, Ordering::Relaxed);
        }
    }
}

impl ToolData {
    /// Runs a statement and records it.
    async fn statement<T: Serialize + Send + 'static>(
        &mut self,
        database: &Resource<OpenDatabase>,
        function: &'static str,
        sql: String,
        parameters: Vec<wit::Value>,
        run: fn(&mut Database, &str, &[Value], u64) -> Result<T, SqliteError>,
    ) -> wasmtime::Result<Result<T, SqliteError>> {
        let open = self.table.get(database)?;
        let parameters: Vec<Value> = parameters.into_iter().map(Value::from).collect();
        let text = arguments(&Arguments { database: &open.name, sql: &sql, parameters: &parameters });
        let call = HostCall { interface: INTERFACE, function, arguments: text };
        let database = Arc::clone(&open.database);
        let now_ns = self.clock.unix_ns();
        let cancelled = database.lock().unwrap_or_else(PoisonError::into_inner).cancelled();
        let work = tokio::task::spawn_blocking(move || {
            let mut database = database.lock().unwrap_or_else(PoisonError::into_inner);
            run(&mut database, &sql, &parameters, now_ns)
        });
        let mut guard = CancelOnDrop(Some(cancelled));
        let result = self.meter.host(work).await;
        // Ended by itself: there is nothing to cancel.
        guard.0 = None;
        let result = result?;
        let hash = ContentHash::of(&serde_json::to_vec(&result).unwrap_or_default());
        let log = Arc::clone(&self.host.log);
        self.meter.host(log.turn(&call)).await;
        record(&*log, call, &Compared { hash }).map_err(Stop::error)?;
        Ok(result)
    }
}

impl wit::Host for ToolData {
    async fn open(&mut self, name: String) -> wasmtime::Result<Result<Resource<OpenDatabase>, wit::SqliteError>> {
        let database = if let Some(database) = self.host.databases.get(&name) {
            Arc::clone(database)
        } else {
            let capabilities = Arc::clone(&self.host.capabilities);
            let Some(snapshot) = capabilities.snapshot(&name).map(Arc::clone) else {
                let lines = Capability::Sqlite.lines(capabilities.plugin(), &name);
                let text = format!("the database `{name}` is not granted; this would allow it:\n{lines}");
                return Ok(Err(wit::SqliteError::Denied(text)));
            };
            let (limits, now_ns) = (self.host.limits.clone(), self.clock.unix_ns());
            let seed = self.host.seed.child("sqlite").child(&name);
            let open = move || Database::open(&snapshot, &limits, seed, now_ns);
            match self.meter.host(tokio::task::spawn_blocking(open)).await? {
                Ok(database) => {
                    let database = Arc::new(Mutex::new(database));
                    self.host.databases.insert(name.clone(), Arc::clone(&database));
                    database
                }
                Err(error) => return Ok(Err(error.into())),
            }
        };
        Ok(Ok(self.table.push(OpenDatabase { name, database })?))
    }
}

impl wit::HostDatabase for ToolData {
    async fn query(
        &mut self,
        database: Resource<OpenDatabase>,
        sql: String,
        parameters: Vec<wit::Value>,
    ) -> wasmtime::Result<Result<Resource<FoundRows>, wit::SqliteError>> {
        match self.statement(&database, "query", sql, parameters, Database::query).await? {
            Ok(rows) => Ok(Ok(self.table.push(FoundRows(rows))?)),
            Err(error) => Ok(Err(error.into())),
        }
    }

    async fn execute(
        &mut self,
        database: Resource<OpenDatabase>,
        sql: String,
        parameters: Vec<wit::Value>,
    ) -> wasmtime::Result<Result<u64, wit::SqliteError>> {
        Ok(self.statement(&database, "execute", sql, parameters, Database::execute).await?.map_err(Into::into))
    }

    fn drop(&mut self, database: Resource<OpenDatabase>) -> wasmtime::Result<()> {
        self.table.delete(database)?;
        Ok(())
    }
}

impl wit::HostRows for ToolData {
    fn columns(&mut self, rows: Resource<FoundRows>) -> wasmtime::Result<Vec<String>> {
        Ok(self.table.get(&rows)?.0.columns.clone())
    }

    fn values(&mut self, rows: Resource<FoundRows>) -> wasmtime::Result<Vec<Vec<wit::Value>>> {
        let rows = &self.table.get(&rows)?.0.rows;
        Ok(rows.iter().map(|row| row.iter().map(wit::Value::from).collect()).collect())
    }

    fn drop(&mut self, rows: Resource<FoundRows>) -> wasmtime::Result<()> {
        self.table.delete(rows)?;
        Ok(())
    }
}
