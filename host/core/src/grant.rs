//! Capability grants: what a plugin's manifest asks for, what a run's config grants, and the line that would allow what is
//! missing. Default nothing: a capability is there when it is asked for *and* granted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

mod address;
mod origin;

pub use address::{AddressRange, InvalidAddressRange, why_private};
pub use origin::{InvalidOrigin, Origin, Scheme};

/// Longest manifest, in bytes.
pub const MANIFEST_BYTES_MAX: usize = 64 << 10;
/// Longest name of a grant, in bytes.
const NAME_BYTES_MAX: usize = 64;
/// Longest reason that a manifest gives, in bytes.
const WHY_BYTES_MAX: usize = 500;

/// What can be granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Capability {
    /// A read-only folder.
    Folder,
    /// HTTP requests to one origin.
    Http,
    /// A private copy of a SQLite database.
    Sqlite,
    /// A named model endpoint.
    Endpoint,
}

impl Capability {
    /// For people: `folder`, `origin`, `database` or `endpoint`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Folder => "folder",
            Self::Http => "origin",
            Self::Sqlite => "database",
            Self::Endpoint => "endpoint",
        }
    }

    /// The line under `[PLUGIN.grants]` of a config that grants it.
    #[must_use]
    pub fn line(self, name: &str) -> String {
        match self {
            Self::Folder => format!("folders.{} = \"PATH OF THE FOLDER\"", toml_key(name)),
            Self::Http => format!("http = [{{ origin = {} }}]", toml_text(name)),
            Self::Sqlite => format!("sqlite.{} = \"PATH OF THE DATABASE\"", toml_key(name)),
            Self::Endpoint => format!("endpoints = [{}]", toml_text(name)),
        }
    }

    /// The same with the header of its table. `plugin` is the plugin's place in the config: `agent`, `grader`, `tools.NAME`.
    #[must_use]
    pub fn lines(self, plugin: &str, name: &str) -> String {
        format!("[{plugin}.grants]\n{}", self.line(name))
    }
}

fn toml_text(text: &str) -> String {
    // JSON's escapes are a subset of TOML's.
    serde_json::Value::from(text).to_string()
}

fn toml_key(text: &str) -> String {
    if is_name(text) { text.to_owned() } else { toml_text(text) }
}

fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    !text.is_empty() && text.len() <= NAME_BYTES_MAX && text.bytes().all(allowed)
}

/// Something that a manifest asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "AskText")]
pub struct Ask {
    /// Its name; of HTTP, the origin.
    pub name: String,
    /// What for, shown to whoever grants it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// The plugin works without it: a run starts, and a call that needs it is denied.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
}

/// An ask as it is written: a name alone, or with more.
#[derive(Deserialize)]
#[serde(untagged)]
enum AskText {
    Name(String),
    Full(FullAsk),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FullAsk {
    name: String,
    #[serde(default)]
    why: String,
    #[serde(default)]
    optional: bool,
}

impl From<AskText> for Ask {
    fn from(text: AskText) -> Self {
        match text {
            AskText::Name(name) => Self { name, why: String::new(), optional: false },
            AskText::Full(FullAsk { name, why, optional }) => Self { name, why, optional },
        }
    }
}

/// What a plugin asks for, as JSON in its component: `{"folders":["docs"],"http":[{"name":"https://api.example.com",
/// "why":"looks up prices","optional":true}],"sqlite":["shop"],"endpoints":["judge"]}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Manifest {
    /// Read-only folders, by the name under which the plugin finds them: `docs` is `/docs`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub folders: Vec<Ask>,
    /// Origins that it sends HTTP requests to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub http: Vec<Ask>,
    /// Databases by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sqlite: Vec<Ask>,
    /// Model endpoints by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<Ask>,
}

/// Why a manifest was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidManifest {
    /// Too long.
    #[error("the manifest has {bytes} bytes, at most {MANIFEST_BYTES_MAX} may be")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Not the JSON that is expected.
    #[error("the manifest is not what is expected: {0}")]
    Json(String),
    /// A value that makes no sense.
    #[error("the manifest's `{field}`: {problem}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong.
        problem: String,
    },
}

impl Manifest {
    /// Reads a manifest. Origins are brought into one form.
    ///
    /// # Errors
    /// When it is no JSON, has unknown fields, or a name is not usable.
    pub fn parse(json: &[u8]) -> Result<Self, InvalidManifest> {
        if json.len() > MANIFEST_BYTES_MAX {
            return Err(InvalidManifest::TooLong { bytes: json.len() });
        }
        let mut manifest: Self =
            serde_json::from_slice(json).map_err(|error| InvalidManifest::Json(error.to_string()))?;
        for ask in &mut manifest.http {
            let origin: Origin = ask
                .name
                .parse()
                .map_err(|error: InvalidOrigin| InvalidManifest::Field { field: "http", problem: error.to_string() })?;
            ask.name = origin.to_string();
        }
        for (field, asks, named) in [
            ("folders", &manifest.folders, true),
            ("http", &manifest.http, false),
            ("sqlite", &manifest.sqlite, true),
            ("endpoints", &manifest.endpoints, true),
        ] {
            let mut seen = BTreeSet::new();
            for ask in asks {
                let problem = if named && !is_name(&ask.name) {
                    format!("`{}` is no name: use 1 to {NAME_BYTES_MAX} of a-z, A-Z, 0-9, `-` and `_`", ask.name)
                } else if !seen.insert(&ask.name) {
                    format!("`{}` is there twice", ask.name)
                } else if ask.why.len() > WHY_BYTES_MAX || ask.why.chars().any(char::is_control) {
                    format!("the reason for `{}` is not one line of at most {WHY_BYTES_MAX} bytes", ask.name)
                } else {
                    continue;
                };
                return Err(InvalidManifest::Field { field, problem });
            }
        }
        Ok(manifest)
    }

    /// All that is asked for.
    pub fn asks(&self) -> impl Iterator<Item = (Capability, &Ask)> {
        let folders = self.folders.iter().map(|ask| (Capability::Folder, ask));
        let http = self.http.iter().map(|ask| (Capability::Http, ask));
        let sqlite = self.sqlite.iter().map(|ask| (Capability::Sqlite, ask));
        let endpoints = self.endpoints.iter().map(|ask| (Capability::Endpoint, ask));
        folders.chain(http).chain(sqlite).chain(endpoints)
    }

    /// Whether this is asked for.
    #[must_use]
    pub fn asks_for(&self, capability: Capability, name: &str) -> bool {
        self.asks().any(|(asked, ask)| asked == capability && ask.name == name)
    }

    /// Compares with what is granted to the plugin at this place of the config (`agent`, `grader`, `tools.NAME`).
    ///
    /// # Errors
    /// When something is granted that is not asked for, or asked for, not optional, and not granted.
    pub fn compare(&self, plugin: &str, granted: &BTreeSet<(Capability, String)>) -> Result<(), GrantError> {
        for (capability, name) in granted {
            if !self.asks_for(*capability, name) {
                let asked = self.asks().filter(|(asked, _)| asked == capability).map(|(_, ask)| ask.name.clone());
                return Err(GrantError::NotAsked {
                    plugin: plugin.to_owned(),
                    capability: *capability,
                    name: name.clone(),
                    asked: asked.collect(),
                });
            }
        }
        for (capability, ask) in self.asks() {
            if !ask.optional && !granted.contains(&(capability, ask.name.clone())) {
                return Err(GrantError::NotGranted { plugin: plugin.to_owned(), capability, ask: ask.clone() });
            }
        }
        Ok(())
    }
}

/// Manifest and config do not fit. The text says what to change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// Asked for and not granted.
    #[error(
        "`{plugin}` asks for the {what} `{name}`{why}, which the config does not grant; this would allow it:\n{lines}",
        what = .capability.as_str(),
        name = .ask.name,
        why = reason(.ask),
        lines = .capability.lines(.plugin, &.ask.name)
    )]
    NotGranted {
        /// The plugin's place in the config.
        plugin: String,
        /// What.
        capability: Capability,
        /// The ask.
        ask: Ask,
    },
    /// Granted and not asked for.
    #[error(
        "`{plugin}.grants` grants the {what} `{name}`, which the plugin does not ask for{list}; remove it",
        what = .capability.as_str(),
        list = listed(.asked)
    )]
    NotAsked {
        /// The plugin's place in the config.
        plugin: String,
        /// What.
        capability: Capability,
        /// Its name.
        name: String,
        /// What of this kind it does ask for.
        asked: Vec<String>,
    },
}

fn reason(ask: &Ask) -> String {
    if ask.why.is_empty() { String::new() } else { format!(" ({})", ask.why) }
}

fn listed(asked: &[String]) -> String {
    if asked.is_empty() { String::new() } else { format!(" (it asks for {})", asked.join(", ")) }
}

/// What a config grants to a tool.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ToolGrants {
    /// Folders by the name that the manifest asks for, relative to the config file. They are read-only and pinned by their
    /// content when the run starts.
    pub folders: BTreeMap<String, PathBuf>,
    /// Servers.
    pub http: Vec<HttpGrant>,
    /// SQLite files by the name that the manifest asks for, relative to the config file. Every rollout has a private copy
    /// of what the file holds when the run starts.
    pub sqlite: BTreeMap<String, PathBuf>,
}

impl ToolGrants {
    /// What is granted, as [`Manifest::compare`] takes it.
    #[must_use]
    pub fn granted(&self) -> BTreeSet<(Capability, String)> {
        let folders = self.folders.keys().map(|name| (Capability::Folder, name.clone()));
        let http = self.http.iter().map(|grant| (Capability::Http, grant.origin.to_string()));
        let sqlite = self.sqlite.keys().map(|name| (Capability::Sqlite, name.clone()));
        folders.chain(http).chain(sqlite).collect()
    }

    /// Whether nothing is granted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.folders.is_empty() && self.http.is_empty() && self.sqlite.is_empty()
    }
}

/// What a config grants to an agent or a grader.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EndpointGrants {
    /// Names of `[endpoint.NAME]` sections.
    pub endpoints: Vec<String>,
}

impl EndpointGrants {
    /// What is granted, as [`Manifest::compare`] takes it.
    #[must_use]
    pub fn granted(&self) -> BTreeSet<(Capability, String)> {
        self.endpoints.iter().map(|name| (Capability::Endpoint, name.clone())).collect()
    }

    /// Whether nothing is granted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.endpoints.is_empty()
    }
}

/// One server that HTTP requests may go to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpGrant {
    /// Scheme, host and port: `https://api.example.com`, `http://10.0.0.5:8080`.
    pub origin: Origin,
    /// Headers that the host adds. The plugin never sees their values, and records do not hold them.
    #[serde(default)]
    pub headers: BTreeMap<String, SecretSource>,
    /// Addresses that are not public and may be connected to all the same.
    #[serde(default)]
    pub allow_private: Vec<AddressRange>,
    /// A PEM file with the certificate authority that the server's certificate is checked against, instead of the public
    /// ones; relative to the config file.
    #[serde(default)]
    pub certificate_authority: Option<PathBuf>,
}

/// Where the value of a header comes from. Never the config itself: configs are copied into run folders.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretSource {
    /// Environment variable of the host's process.
    pub env: String,
    /// What comes before the value: `Bearer `.
    #[serde(default)]
    pub prefix: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(json: &str) -> Manifest {
        Manifest::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn asks_are_names_or_more_and_origins_have_one_form() {
        let manifest = manifest(
            r#"{"folders":["docs"],"http":[{"name":"HTTPS://A.example:443/","why":"prices","optional":true}]}"#,
        );
        assert!(manifest.asks_for(Capability::Folder, "docs"));
        assert!(manifest.asks_for(Capability::Http, "https://a.example"));
        assert!(!manifest.asks_for(Capability::Sqlite, "docs"));
        let ask = &manifest.http[0];
        assert_eq!((ask.why.as_str(), ask.optional), ("prices", true));
    }

    #[test]
    fn mistakes_of_a_manifest_name_the_field() {
        for (json, text) in [
            ("{", "not what is expected"),
            (r#"{"files":["a"]}"#, "files"),
            (r#"{"folders":["../a"]}"#, "`folders`"),
            (r#"{"folders":["a","a"]}"#, "twice"),
            (r#"{"http":["example.com"]}"#, "no scheme"),
            (r#"{"http":["https://a","https://a:443"]}"#, "twice"),
            (r#"{"sqlite":[{"name":"a","why":"two\nlines"}]}"#, "one line"),
        ] {
            let error = Manifest::parse(json.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(text), "{json}: {error}");
        }
        let long = format!("{{\"folders\":[\"{}\"]}}", "a".repeat(MANIFEST_BYTES_MAX));
        assert!(matches!(Manifest::parse(long.as_bytes()), Err(InvalidManifest::TooLong { .. })));
    }

    #[test]
    fn a_capability_needs_an_ask_and_a_grant() {
        let asks = manifest(r#"{"folders":[{"name":"docs","why":"answers from them"}],"sqlite":["db"]}"#);
        let mut granted = BTreeSet::from([(Capability::Sqlite, "db".to_owned())]);
        let error = asks.compare("tools.rooms", &granted).unwrap_err().to_string();
        for text in ["`tools.rooms`", "`docs`", "answers from them", "[tools.rooms.grants]\nfolders.docs = "] {
            assert!(error.contains(text), "no {text:?} in {error}");
        }
        granted.insert((Capability::Folder, "docs".to_owned()));
        assert_eq!(asks.compare("tools.rooms", &granted), Ok(()));
        granted.insert((Capability::Folder, "home".to_owned()));
        let error = asks.compare("tools.rooms", &granted).unwrap_err().to_string();
        assert!(error.contains("`home`") && error.contains("it asks for docs"), "{error}");
        let optional = manifest(r#"{"endpoints":[{"name":"judge","optional":true}]}"#);
        assert_eq!(optional.compare("grader", &BTreeSet::new()), Ok(()));
    }
    #[test]
    fn the_line_that_would_allow_it_does() {
        for (capability, name) in
            [(Capability::Folder, "docs"), (Capability::Http, "https://a.example:8443"), (Capability::Sqlite, "a-b")]
        {
            let grants: ToolGrants = toml::from_str(&capability.line(name)).unwrap();
            assert_eq!(grants.granted(), BTreeSet::from([(capability, name.to_owned())]));
        }
        let grants: EndpointGrants = toml::from_str(&Capability::Endpoint.line("judge")).unwrap();
        assert_eq!(grants.granted(), BTreeSet::from([(Capability::Endpoint, "judge".to_owned())]));
    }
}
