//! HTTP for plugins: one request to a granted origin, over one connection.
//!
//! The name is looked up once, every address that comes back is checked, and the connection goes to a checked address: a
//! name that means something else a moment later gains nothing. Redirects are answers: following one would be a request to
//! an origin that nobody checked. Compressed answers are not asked for, because a secret in one could not be found.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fulgurite_core::grant::{AddressRange, Capability, HttpGrant, Origin, Scheme, why_private};
use fulgurite_core::limits::Limits;
use futures::future::BoxFuture;
use http::header::{self, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::secret::{Secret, SecretError};
use crate::tls;

/// Most addresses of a name that are tried.
const ADDRESSES_TRIED_MAX: usize = 4;
/// Most headers of a response.
const HEADERS_MAX: usize = 256;
/// Smallest buffer that hyper takes.
const BUFFER_BYTES_MIN: usize = 8 << 10;

/// Headers that speak of the connection, which is the host's, or would make the answer unreadable for it.
const HOST_HEADERS: [HeaderName; 12] = [
    header::ACCEPT_ENCODING,
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::EXPECT,
    header::HOST,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];

/// Why a client could not be made.
#[derive(Debug, thiserror::Error)]
pub enum HttpSetupError {
    /// A header that cannot be added.
    #[error("`{name}` is not a header that can be added")]
    Header {
        /// Its name.
        name: String,
    },
    /// A secret that cannot be used.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// An origin that is there twice.
    #[error("the origin `{origin}` is granted twice")]
    Twice {
        /// The origin.
        origin: Origin,
    },
    /// A certificate authority that cannot be used.
    #[error("cannot use the certificate authority `{path}`: {problem}")]
    CertificateAuthority {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}

/// A request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct HttpRequest {
    /// `GET`, `POST`, ...
    pub method: String,
    /// The whole URL.
    pub url: String,
    /// Names and values.
    pub headers: Vec<(String, String)>,
    /// The body.
    #[serde(with = "crate::base64_bytes")]
    pub body: Vec<u8>,
    /// How long it may take, in milliseconds, when that is less than the limit.
    pub timeout_ms: Option<u64>,
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpResponse {
    /// The status; 3xx too.
    pub status: u16,
    /// Names in lower case, and values.
    pub headers: Vec<(String, String)>,
    /// The body.
    #[serde(with = "crate::base64_bytes")]
    pub body: Vec<u8>,
}

/// Why there is no response. One case per thing the caller can do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
    /// It took longer than it may.
    #[error("no answer within {timeout_ms} ms")]
    Timeout {
        /// How long it might have taken.
        timeout_ms: u64,
    },
    /// It goes past a limit.
    #[error("limit {name} of {value} is reached")]
    LimitReached {
        /// Name of the limit.
        name: String,
        /// Its value.
        value: u64,
    },
    /// The connection failed, or what came back is not HTTP.
    #[error("{0}")]
    Failed(String),
}

fn limit(name: &str, value: u64) -> HttpError {
    HttpError::LimitReached { name: name.to_owned(), value }
}

/// Looks up names.
pub trait Resolve: Send + Sync {
    /// All addresses of a name.
    fn resolve(&self, host: String) -> BoxFuture<'_, std::io::Result<Vec<IpAddr>>>;
}

/// The machine's resolver.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve(&self, host: String) -> BoxFuture<'_, std::io::Result<Vec<IpAddr>>> {
        Box::pin(async move { Ok(tokio::net::lookup_host((host, 0)).await?.map(|address| address.ip()).collect()) })
    }
}

/// Sends requests of one plugin to the origins that it is granted.
pub struct HttpClient {
    /// Place in the config of whoever sends, for messages.
    plugin: String,
    /// It is an endpoint: `plugin` is the section that has `allow_private` itself.
    is_endpoint: bool,
    servers: Vec<Server>,
    resolver: Arc<dyn Resolve>,
}

impl std::fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let origins: Vec<_> = self.servers.iter().map(|server| &server.origin).collect();
        f.debug_struct("HttpClient").field("plugin", &self.plugin).field("origins", &origins).finish_non_exhaustive()
    }
}

struct Server {
    origin: Origin,
    headers: Vec<(HeaderName, HeaderValue)>,
    secrets: Vec<Secret>,
    allow_private: Vec<AddressRange>,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

impl HttpClient {
    /// A client for the plugin at this place of the config. `environment` looks up variables.
    ///
    /// # Errors
    /// When a header, a secret or a certificate authority cannot be used.
    pub fn new(
        plugin: &str,
        grants: &[HttpGrant],
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, HttpSetupError> {
        let mut servers: Vec<Server> = vec![];
        for grant in grants {
            if servers.iter().any(|server| server.origin == grant.origin) {
                return Err(HttpSetupError::Twice { origin: grant.origin.clone() });
            }
            servers.push(Server::new(grant, environment)?);
        }
        Ok(Self { plugin: plugin.to_owned(), is_endpoint: false, servers, resolver: Arc::new(SystemResolver) })
    }

    /// A client that is granted nothing.
    #[must_use]
    pub fn none(plugin: &str) -> Self {
        Self { plugin: plugin.to_owned(), is_endpoint: false, servers: vec![], resolver: Arc::new(SystemResolver) }
    }

    /// The client of a model endpoint. `section` is its place in the config: `endpoint.NAME` or `policy.endpoint`.
    pub(crate) fn of_endpoint(
        section: &str,
        grant: &HttpGrant,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, HttpSetupError> {
        let client = Self::new(section, std::slice::from_ref(grant), environment)?;
        Ok(Self { is_endpoint: true, ..client })
    }

    /// The granted origin that a request to this URL would go to.
    #[must_use]
    pub fn granted_origin(&self, url: &str) -> Option<&Origin> {
        let (origin, _) = Origin::split(url).ok()?;
        self.servers.iter().map(|server| &server.origin).find(|granted| **granted == origin)
    }

    /// Looks up names in another way.
    #[must_use]
    pub fn with_resolver(mut self, resolver: Arc<dyn Resolve>) -> Self {
        self.resolver = resolver;
        self
    }

    /// Sends a request and waits for the whole answer. Dropping the future closes the connection.
    ///
    /// # Errors
    /// See [`HttpError`].
    pub async fn send(&self, request: HttpRequest, limits: &Limits) -> Result<HttpResponse, HttpError> {
        let (origin, rest) =
            Origin::split(&request.url).map_err(|error| HttpError::InvalidRequest(format!("url: {error}")))?;
        let server = self.servers.iter().find(|server| server.origin == origin).ok_or_else(|| {
            let lines = Capability::Http.lines(&self.plugin, &origin.to_string());
            HttpError::Denied(format!("the origin `{origin}` is not granted; this would allow it:\n{lines}"))
        })?;
        let timeout_ms =
            request.timeout_ms.map_or(limits.http_timeout_ms_max, |asked| asked.min(limits.http_timeout_ms_max));
        let wire = server.request(&request, rest, limits)?;
        let answer = tokio::time::timeout(Duration::from_millis(timeout_ms), async {
            let address = self.addresses(server).await?;
            server.exchange(&address, wire, limits.http_response_bytes_max).await
        });
        answer.await.unwrap_or(Err(HttpError::Timeout { timeout_ms }))
    }

    /// The checked addresses of a server.
    async fn addresses(&self, server: &Server) -> Result<Vec<SocketAddr>, HttpError> {
        let host = &server.origin.host;
        let found = match host.parse::<IpAddr>() {
            Ok(address) => vec![address],
            Err(_) => self
                .resolver
                .resolve(host.clone())
                .await
                .map_err(|error| HttpError::Unreachable(format!("`{host}` has no address: {error}")))?,
        };
        if found.is_empty() {
            return Err(HttpError::Unreachable(format!("`{host}` has no address")));
        }
        // One that is not allowed denies all: a name with both kinds of addresses has no good reason to.
        for address in &found {
            if let Some(why) = why_private(*address)
                && !server.allow_private.iter().any(|range| range.contains(*address))
            {
                let plain = address.to_canonical();
                let lines = if self.is_endpoint {
                    format!("[{}]\nallow_private = [\"{plain}\"]", self.plugin)
                } else {
                    let grant = format!("{{ origin = \"{}\", allow_private = [\"{plain}\"] }}", server.origin);
                    format!("[{}.grants]\nhttp = [{grant}]", self.plugin)
                };
                let problem = format!("`{host}` is at {address}, which is {why}; this would allow it:\n{lines}");
                return Err(HttpError::Denied(problem));
            }
        }
        Ok(found
            .into_iter()
            .take(ADDRESSES_TRIED_MAX)
            .map(|address| SocketAddr::new(address, server.origin.port))
            .collect())
    }
}

impl Server {
    fn new(grant: &HttpGrant, environment: &dyn Fn(&str) -> Option<String>) -> Result<Self, HttpSetupError> {
        let mut headers = vec![];
        let mut secrets = vec![];
        for (name, source) in &grant.headers {
            let invalid = || HttpSetupError::Header { name: name.clone() };
            let header = HeaderName::try_from(name.as_str()).map_err(|_| invalid())?;
            if HOST_HEADERS.contains(&header) {
                return Err(invalid());
            }
            let (secret, value) = Secret::read(source, environment)?;
            headers.push((header, value));
            secrets.push(secret);
        }
        let tls = match grant.origin.scheme {
            Scheme::Http => None,
            Scheme::Https => {
                let authority = grant.certificate_authority.as_deref();
                let config = tls::config(authority).map_err(|problem| HttpSetupError::CertificateAuthority {
                    path: authority.map(std::path::Path::to_path_buf).unwrap_or_default(),
                    problem,
                })?;
                let name = ServerName::try_from(grant.origin.host.clone());
                let name = name.map_err(|_| HttpSetupError::Header { name: "host".to_owned() })?;
                Some((TlsConnector::from(config), name))
            }
        };
        Ok(Self { origin: grant.origin.clone(), headers, secrets, allow_private: grant.allow_private.clone(), tls })
    }

    /// The request as it goes out.
    fn request(&self, request: &HttpRequest, rest: &str, limits: &Limits) -> Result<Request<Full<Bytes>>, HttpError> {
        let invalid = |part: &str, problem: &str| HttpError::InvalidRequest(format!("{part}: {problem}"));
        let method = Method::from_bytes(request.method.as_bytes()).map_err(|_| invalid("method", "is no method"))?;
        if [Method::CONNECT, Method::TRACE].contains(&method) {
            return Err(invalid("method", "CONNECT and TRACE are not offered"));
        }
        let rest = rest.split_once('#').map_or(rest, |(before, _)| before);
        let target = if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") };
        let target = PathAndQuery::try_from(target).map_err(|error| invalid("url", &error.to_string()))?;
        let mut wire = Request::builder()
            .method(method)
            .uri(target.as_str())
            .header(header::HOST, self.origin.host_header())
            .header(header::ACCEPT_ENCODING, "identity")
            .header(header::CONNECTION, "close");
        let mut bytes = request.body.len();
        for (name, value) in &request.headers {
            bytes += name.len() + value.len();
            let header = HeaderName::try_from(name.as_str()).map_err(|_| invalid("headers", "a name is none"))?;
            if HOST_HEADERS.contains(&header) || self.headers.iter().any(|(own, _)| *own == header) {
                return Err(invalid("headers", &format!("`{header}` is the host's to set")));
            }
            let value = HeaderValue::try_from(value.as_str()).map_err(|_| {
                invalid("headers", &format!("the value of `{header}` has characters that it cannot have"))
            })?;
            wire = wire.header(header, value);
        }
        if bytes as u64 > limits.http_request_bytes_max {
            return Err(limit("http_request_bytes_max", limits.http_request_bytes_max));
        }
        for (name, value) in &self.headers {
            wire = wire.header(name, value);
        }
        wire.body(Full::new(Bytes::from(request.body.clone())))
            .map_err(|error| HttpError::InvalidRequest(error.to_string()))
    }

    async fn exchange(
        &self,
        addresses: &[SocketAddr],
        request: Request<Full<Bytes>>,
        bytes_max: u64,
    ) -> Result<HttpResponse, HttpError> {
        let mut failure = HttpError::Unreachable(format!("`{}` has no address", self.origin.host));
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    let _ = stream.set_nodelay(true);
                    return match &self.tls {
                        None => self.talk(stream, request, bytes_max).await,
                        Some((connector, name)) => {
                            let stream = connector.connect(name.clone(), stream).await;
                            let failed = |error| HttpError::Failed(format!("no TLS with `{}`: {error}", self.origin));
                            self.talk(stream.map_err(failed)?, request, bytes_max).await
                        }
                    };
                }
                Err(error) => failure = HttpError::Unreachable(format!("`{}`: {error}", self.origin)),
            }
        }
        Err(failure)
    }

    async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        request: Request<Full<Bytes>>,
        bytes_max: u64,
    ) -> Result<HttpResponse, HttpError> {
        let failed = |error: hyper::Error| {
            let causes = std::iter::successors(std::error::Error::source(&error), |cause| cause.source());
            let text = causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
            HttpError::Failed(format!("`{}`: {text}", self.origin))
        };
        let buffer = usize::try_from(bytes_max).unwrap_or(usize::MAX).max(BUFFER_BYTES_MIN);
        let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
            .max_headers(HEADERS_MAX)
            .max_buf_size(buffer.min(256 << 10))
            .handshake(TokioIo::new(stream))
            .await
            .map_err(failed)?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(failed)?;
            self.receive(response, bytes_max).await
        };
        alongside(exchange, connection).await
    }

    async fn receive(&self, response: Response<Incoming>, bytes_max: u64) -> Result<HttpResponse, HttpError> {
        let (head, mut body) = response.into_parts();
        let too_long = || limit("http_response_bytes_max", bytes_max);
        let mut bytes = 0_u64;
        let mut headers = vec![];
        for (name, value) in &head.headers {
            bytes += (name.as_str().len() + value.len()) as u64;
            let value = self.redact(value.as_bytes().to_vec());
            headers.push((name.as_str().to_owned(), String::from_utf8_lossy(&value).into_owned()));
        }
        let plain = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"identity");
        if !head.headers.get_all(header::CONTENT_ENCODING).iter().all(plain) {
            let problem = format!("`{}` answers compressed, although it was asked not to", self.origin);
            return Err(HttpError::Failed(problem));
        }
        let mut content = vec![];
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| HttpError::Failed(format!("`{}`: {error}", self.origin)))?;
            if let Some(data) = frame.data_ref() {
                bytes = bytes.saturating_add(data.len() as u64);
                if bytes > bytes_max {
                    return Err(too_long());
                }
                content.extend_from_slice(data);
            }
        }
        if bytes > bytes_max {
            return Err(too_long());
        }
        Ok(HttpResponse { status: head.status.as_u16(), headers, body: self.redact(content) })
    }

    fn redact(&self, bytes: Vec<u8>) -> Vec<u8> {
        self.secrets.iter().fold(bytes, |bytes, secret| secret.redact(bytes))
    }
}

/// Waits for `main` while `other` goes on beside it.
async fn alongside<T>(main: impl Future<Output = T>, other: impl Future) -> T {
    let other = async {
        other.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        result = main => result,
        // Never ends first.
        () = other => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
