//! Origins: what an HTTP grant is given for.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

/// How a server is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheme {
    /// In the clear.
    Http,
    /// Over TLS, with the server's certificate checked.
    Https,
}

impl Scheme {
    /// The scheme's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    const fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// Scheme, host and port. All three are compared; there are no wildcards.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Origin {
    /// How.
    pub scheme: Scheme,
    /// Lower case, without a dot at the end; an IPv6 address without its brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

/// A text that is no origin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an origin: {problem}; write one as `https://api.example.com` or `http://10.0.0.5:8080`")]
pub struct InvalidOrigin {
    /// The text.
    pub text: String,
    /// What is wrong.
    pub problem: &'static str,
}

/// Longest host name of the domain name system.
const HOST_BYTES_MAX: usize = 253;

impl Origin {
    /// Takes an URL apart: its origin, and what follows from the path on.
    ///
    /// # Errors
    /// When the scheme is not http or https, the host is no name and no address, or there is a user name in it.
    pub fn split(url: &str) -> Result<(Self, &str), InvalidOrigin> {
        let invalid = |problem| InvalidOrigin { text: url.to_owned(), problem };
        let (scheme, rest) = url.split_once("://").ok_or_else(|| invalid("it has no scheme"))?;
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => return Err(invalid("its scheme is neither http nor https")),
        };
        let end = rest.find(['/', '?', '#', '\\']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        if authority.contains('@') {
            return Err(invalid("it has a user name; a secret belongs into a header that the host adds"));
        }
        let (host, port) = if let Some(bracketed) = authority.strip_prefix('[') {
            let (address, port) = bracketed.split_once(']').ok_or_else(|| invalid("its bracket is not closed"))?;
            let address: Ipv6Addr = address.parse().map_err(|_| invalid("its address is not IPv6"))?;
            (address.to_string(), port)
        } else {
            let at = authority.find(':').unwrap_or(authority.len());
            let (host, port) = authority.split_at(at);
            (host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase(), port)
        };
        let named = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-._".contains(&byte);
        if host.is_empty() || host.len() > HOST_BYTES_MAX || (!host.contains(':') && !host.bytes().all(named)) {
            return Err(invalid("its host is no name in ASCII and no address"));
        }
        let port = match port.strip_prefix(':') {
            None if port.is_empty() => scheme.default_port(),
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse().ok().filter(|port| *port != 0).ok_or_else(|| invalid("its port is not 1 to 65535"))?
            }
            _ => return Err(invalid("its port is not 1 to 65535")),
        };
        Ok((Self { scheme, host, port }, path))
    }

    /// The value of the request's `host` header.
    #[must_use]
    pub fn host_header(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.port == self.scheme.default_port() { host } else { format!("{host}:{}", self.port) }
    }
}

impl std::str::FromStr for Origin {
    type Err = InvalidOrigin;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match Self::split(text)? {
            (origin, "" | "/") => Ok(origin),
            _ => Err(InvalidOrigin { text: text.to_owned(), problem: "it goes on after the port" }),
        }
    }
}

impl TryFrom<String> for Origin {
    type Error = InvalidOrigin;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.host_header())
    }
}

impl From<Origin> for String {
    fn from(origin: Origin) -> Self {
        origin.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_origin_is_written_in_many_ways() {
        let one: Origin = "https://api.example.com".parse().unwrap();
        for text in ["https://api.example.com:443", "HTTPS://API.example.COM./", "https://api.example.com/"] {
            assert_eq!(text.parse::<Origin>().unwrap(), one, "{text}");
        }
        for other in ["http://api.example.com", "https://api.example.com:8443", "https://example.com"] {
            assert_ne!(other.parse::<Origin>().unwrap(), one, "{other}");
        }
        assert_eq!(one.to_string(), "https://api.example.com");
        assert_eq!("http://[0:0::1]:8080".parse::<Origin>().unwrap().to_string(), "http://[::1]:8080");
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_no_origin() {
        let bad = [
            "",
            "api.example.com",
            "ftp://a",
            "https://",
            "https://a:0",
            "https://a:65536",
            "https://a:+1",
            "https://user@a",
            "https://good.example@evil.example",
            "https://good.example\\@evil.example",
            "https://a b",
            "https://*.example.com",
            "https://bücher.example",
            "https://[::1",
            "https://[1.2.3.4]",
            "https://a/path",
        ];
        for text in bad {
            assert!(text.parse::<Origin>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_url_is_an_origin_and_the_rest() {
        let (origin, rest) = Origin::split("http://a:81/b?c=http://d#e").unwrap();
        assert_eq!((origin.to_string().as_str(), rest), ("http://a:81", "/b?c=http://d#e"));
        assert_eq!(Origin::split("http://a?q").unwrap().1, "?q");
    }
}
