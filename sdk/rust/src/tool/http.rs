//! HTTP requests to granted origins. The manifest must ask ([`manifest!`](crate::manifest!)), the run's config must grant.

use crate::types::LimitReached;
use crate::wit::tool::fulgurite::tool::http as wit;

/// Why there is no response. One case per thing the caller can do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// The request is wrong; the text names the part.
    #[error("invalid request: {0}")]
    InvalidRequest(String),
    /// Not granted; the text ends in the lines of config that would allow it.
    #[error("denied: {0}")]
    Denied(String),
    /// There is nobody at the address, or the name has none.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// No answer within so many milliseconds.
    #[error("no answer within {0} ms")]
    Timeout(u64),
    /// A limit is reached.
    #[error("{0}")]
    LimitReached(LimitReached),
    /// The connection failed, or what came back is not HTTP.
    #[error("{0}")]
    Failed(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl From<wit::HttpError> for HttpError {
    fn from(error: wit::HttpError) -> Self {
        match error {
            wit::HttpError::InvalidRequest(text) => Self::InvalidRequest(text),
            wit::HttpError::Denied(text) => Self::Denied(text),
            wit::HttpError::Unreachable(text) => Self::Unreachable(text),
            wit::HttpError::Timeout(timeout_ms) => Self::Timeout(timeout_ms),
            wit::HttpError::LimitReached(limit) => Self::LimitReached(limit.into()),
            wit::HttpError::Failed(text) => Self::Failed(text),
            wit::HttpError::Other(text) => Self::Other(text),
        }
    }
}

/// A request. Headers that carry secrets are the host's to add: the config says which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    method: String,
    url: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    timeout_ms: Option<u64>,
}

impl Request {
    /// A request with any method.
    #[must_use]
    pub fn new(method: impl Into<String>, url: impl Into<String>) -> Self {
        Self { method: method.into(), url: url.into(), headers: vec![], body: vec![], timeout_ms: None }
    }

    /// A `GET`.
    #[must_use]
    pub fn get(url: impl Into<String>) -> Self {
        Self::new("GET", url)
    }

    /// A `POST` of JSON.
    #[must_use]
    pub fn post_json(url: impl Into<String>, json: &serde_json::Value) -> Self {
        Self::new("POST", url).header("content-type", "application/json").body(json.to_string())
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Sets the body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// Most milliseconds that it may take; the config's limit holds too.
    #[must_use]
    pub const fn timeout_ms(mut self, timeout_ms: u64) -> Self {
        self.timeout_ms = Some(timeout_ms);
        self
    }

    /// Sends it and waits for the whole response.
    ///
    /// # Errors
    /// See [`HttpError`]. A status of 3xx, 4xx or 5xx is a response.
    pub fn send(self) -> Result<Response, HttpError> {
        let request = wit::Request::new(&self.method, &self.url);
        for (name, value) in &self.headers {
            request.add_header(name, value);
        }
        if !self.body.is_empty() {
            request.set_body(&self.body);
        }
        if let Some(timeout_ms) = self.timeout_ms {
            request.set_timeout_ms(timeout_ms);
        }
        let response = wit::send(&request)?;
        Ok(Response { status: response.status(), headers: response.headers(), body: response.body() })
    }
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status; redirects are not followed.
    pub status: u16,
    /// Names in lower case, and values.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// The first header of this name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(header, _)| header.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// The body as text; what is not UTF-8 is replaced.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}
