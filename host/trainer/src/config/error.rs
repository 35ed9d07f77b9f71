//! Why a config is refused.

use std::path::PathBuf;

/// Why a config was refused. Names the file and, where there is one, the place in it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read config `{path}`")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The text is not what is expected.
    #[error("config `{path}`: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the keys that are known.
        message: String,
        /// The whole text, to point into.
        text: String,
        /// Byte range of the place.
        span: Option<std::ops::Range<usize>>,
    },
    /// A value that parses and makes no sense.
    #[error("config `{path}`: `{field}`: {problem}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The field, as a dotted path.
        field: String,
        /// What is wrong and what would be right.
        problem: String,
    },
}
