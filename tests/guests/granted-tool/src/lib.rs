//! A tool that uses what it was granted, and tries what it was not.

use std::fmt::Display;
use std::fs;
use std::io::Write as _;

use fulgurite_sdk::tool::http::Request;
use fulgurite_sdk::tool::sqlite::Database;
use fulgurite_sdk::tool::{Arguments, InvalidWorld, Tool, ToolError};
use fulgurite_sdk::{ToolSpec, Value, json};
use serde::Deserialize;

fulgurite_sdk::manifest!({
    "folders": [{ "name": "docs", "why": "reads \"notes\" in it", "optional": true }],
    "http": [
        { "name": "http://127.0.0.1:47001", "optional": true },
        { "name": "http://service.test:47002", "optional": true }
    ],
    "sqlite": [{ "name": "shop", "optional": true }]
});

struct Granted;

fulgurite_sdk::tool!(Granted);

#[derive(Deserialize)]
struct Text {
    text: String,
}

#[derive(Deserialize)]
struct Fetch {
    url: String,
    #[serde(default)]
    headers: Vec<(String, String)>,
}

#[derive(Deserialize)]
struct Statement {
    #[serde(default = "shop")]
    database: String,
    sql: String,
    #[serde(default)]
    parameters: Vec<String>,
}

fn shop() -> String {
    "shop".to_owned()
}

fn failed(error: impl Display) -> ToolError {
    ToolError::Failed(error.to_string())
}

impl Tool for Granted {
    type World = Value;

    fn open(_world: Value, _seed: u64) -> Result<Self, InvalidWorld> {
        Ok(Self)
    }

    fn list(&self) -> Vec<ToolSpec> {
        let names = ["read", "list", "about", "write", "fetch", "query", "execute", "visit", "note"];
        names.map(|name| ToolSpec::new(name, "Does what its name says.", &json!({"type": "object"}))).to_vec()
    }

    fn call(&mut self, name: &str, arguments: &Arguments) -> Result<Value, ToolError> {
        match name {
            "read" => fs::read_to_string(arguments.parse::<Text>()?.text).map(Value::from).map_err(failed),
            "list" => list(&arguments.parse::<Text>()?.text).map_err(failed),
            "about" => about(&arguments.parse::<Text>()?.text).map_err(failed),
            "write" => write(&arguments.parse::<Text>()?.text),
            "fetch" => {
                let Fetch { url, headers } = arguments.parse()?;
                let request = Request::get(url).timeout_ms(5_000);
                let request = headers.into_iter().fold(request, |request, (name, value)| request.header(name, value));
                let response = request.send().map_err(failed)?;
                Ok(json!({"status": response.status, "headers": response.headers, "body": response.text()}))
            }
            "query" => {
                let Statement { database, sql, parameters } = arguments.parse()?;
                let database = Database::open(&database).map_err(failed)?;
                let parameters: Vec<_> = parameters.into_iter().map(Into::into).collect();
                let rows = database.query(&sql, &parameters).map_err(failed)?;
                let values = rows.values.into_iter().map(|row| row.into_iter().map(Value::from).collect::<Vec<_>>());
                Ok(json!(values.collect::<Vec<_>>()))
            }
            "execute" => {
                let Statement { database, sql, parameters } = arguments.parse()?;
                let database = Database::open(&database).map_err(failed)?;
                let parameters: Vec<_> = parameters.into_iter().map(Into::into).collect();
                Ok(json!(database.execute(&sql, &parameters).map_err(failed)?))
            }
            // Without arguments, for agents that know of none.
            "visit" => Ok(json!(Request::get("http://127.0.0.1:47001/").send().map_err(failed)?.text())),
            "note" => {
                let database = Database::open("shop").map_err(failed)?;
                database.execute("CREATE TABLE IF NOT EXISTS notes (drawn)", &[]).map_err(failed)?;
                database.execute("INSERT INTO notes VALUES (random())", &[]).map_err(failed)?;
                let rows = database.query("SELECT count(*), max(drawn) FROM notes", &[]).map_err(failed)?;
                Ok(json!(rows.values.into_iter().flatten().map(Value::from).collect::<Vec<_>>()))
            }
            other => Err(ToolError::UnknownTool(other.to_owned())),
        }
    }
}

/// Names in the order in which the host lists them.
fn list(path: &str) -> std::io::Result<Value> {
    let names = fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    Ok(json!(names.collect::<std::io::Result<Vec<_>>>()?))
}

fn about(path: &str) -> std::io::Result<Value> {
    let about = fs::metadata(path)?;
    Ok(json!({"bytes": about.len(), "folder": about.is_dir(), "times": about.modified().is_ok()}))
}

/// Every way to change something; answers with the errors.
fn write(folder: &str) -> Result<Value, ToolError> {
    let at = |name: &str| format!("{folder}/{name}");
    let results = [
        ("create", fs::write(at("new"), "x")),
        ("append", fs::OpenOptions::new().append(true).open(at("a.txt")).and_then(|mut file| file.write_all(b"x"))),
        ("truncate", fs::OpenOptions::new().write(true).truncate(true).open(at("a.txt")).map(|_| ())),
        ("remove", fs::remove_file(at("a.txt"))),
        ("rename", fs::rename(at("a.txt"), at("b.txt"))),
        ("folder", fs::create_dir(at("new"))),
        ("remove-folder", fs::remove_dir(at("sub"))),
        ("link", fs::hard_link(at("a.txt"), at("c.txt"))),
    ];
    match results.iter().find(|(_, result)| result.is_ok()) {
        Some((name, _)) => Err(ToolError::Failed(format!("{name} was possible"))),
        None => Ok(json!(
            results
                .map(|(name, result)| format!("{name}: {}", result.err().map_or_else(String::new, |e| e.to_string())))
        )),
    }
}
