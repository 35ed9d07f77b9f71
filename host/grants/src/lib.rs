//! What a plugin can be granted, without the sandbox around it: pinned folders, HTTP, private SQLite copies, model endpoints.
//!
//! A crate of its own for the two heavy dependencies, SQLite and TLS, and because all of it can be tested without a plugin.
//! What is asked for and granted is `fulgurite_core::grant`; how a component reaches it is the sandbox.

mod capabilities;
mod folder;
mod http_client;
mod openai;
mod overlap;
mod record;
mod secret;
mod sqlite;
mod tls;

pub use capabilities::{CapabilityError, ToolCapabilities, needs_places};
pub use folder::{FolderError, LookupError, NodeId, PinnedFolder};
pub use http_client::{HttpClient, HttpError, HttpRequest, HttpResponse, HttpSetupError, Resolve, SystemResolver};
pub use openai::{
    AdapterPush, Asked, EndpointCheckError, EndpointFacts, EndpointSettings, MalformedAnswer, OpenAiEndpoint,
    ServerKind, parse_completion,
};
pub use overlap::{Guarded, Overlap, check_overlap};
pub use secret::SecretError;
pub use sqlite::{Database, Rows, Snapshot, SnapshotError, SqliteError, Value};

/// Bytes as base64 text in JSON.
mod base64_bytes {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}
