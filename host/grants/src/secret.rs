//! Values that the host adds and nobody else sees.

use fulgurite_core::grant::SecretSource;

/// Shortest secret, in bytes: what is shorter occurs by chance in what a server answers, and is guessed.
const SECRET_BYTES_MIN: usize = 8;
/// What stands in its place.
const REDACTED: &[u8] = b"[redacted]";

/// Why a secret cannot be used. The value is never part of the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// The variable is not set.
    #[error("the environment variable `{env}` is not set; set it before the run: export {env}=...")]
    Missing {
        /// The variable.
        env: String,
    },
    /// Too short.
    #[error("the value of the environment variable `{env}` is shorter than {SECRET_BYTES_MIN} bytes")]
    TooShort {
        /// The variable.
        env: String,
    },
    /// Not a value of a header.
    #[error("the value of the environment variable `{env}` has characters that a header cannot have")]
    NotAHeader {
        /// The variable.
        env: String,
    },
}

/// A secret. It has no `Debug` that shows it and is not serialised.
#[derive(Clone)]
pub(crate) struct Secret(Vec<u8>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// Reads a secret and makes the header's value of it.
    pub(crate) fn read(
        source: &SecretSource,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<(Self, http::HeaderValue), SecretError> {
        let env = || source.env.clone();
        let value = environment(&source.env).ok_or_else(|| SecretError::Missing { env: env() })?;
        let value = value.trim();
        if value.len() < SECRET_BYTES_MIN {
            return Err(SecretError::TooShort { env: env() });
        }
        let mut header = http::HeaderValue::try_from(format!("{}{value}", source.prefix))
            .map_err(|_| SecretError::NotAHeader { env: env() })?;
        header.set_sensitive(true);
        Ok((Self(value.as_bytes().to_vec()), header))
    }

    /// Replaces the secret where it occurs: a server that sends back what it was sent must not tell it.
    pub(crate) fn redact(&self, bytes: Vec<u8>) -> Vec<u8> {
        let found = |bytes: &[u8]| bytes.windows(self.0.len()).position(|window| window == self.0);
        let Some(mut at) = found(&bytes) else { return bytes };
        let mut clean = Vec::with_capacity(bytes.len());
        let mut rest = bytes.as_slice();
        loop {
            let (before, after) = rest.split_at(at);
            clean.extend_from_slice(before);
            clean.extend_from_slice(REDACTED);
            rest = after.get(self.0.len()..).unwrap_or_default();
            match found(rest) {
                Some(next) => at = next,
                None => break,
            }
        }
        clean.extend_from_slice(rest);
        clean
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Option<&str>) -> Result<(Secret, http::HeaderValue), SecretError> {
        let source = SecretSource { env: "API_KEY".to_owned(), prefix: "Bearer ".to_owned() };
        let value = value.map(str::to_owned);
        Secret::read(&source, &|_| value.clone())
    }

    #[test]
    fn a_secret_is_a_header_that_nobody_prints() {
        let (secret, header) = read(Some(" s3cr3t-value\n")).unwrap();
        assert_eq!(header.as_bytes(), b"Bearer s3cr3t-value");
        assert!(!format!("{secret:?}{header:?}").contains("s3cr3t"));
        for (value, expected) in [(None, "not set"), (Some("tiny"), "shorter"), (Some("with\nnewline"), "header")] {
            let text = read(value).unwrap_err().to_string();
            assert!(text.contains(expected) && text.contains("API_KEY"), "{text}");
            assert!(value.is_none_or(|value| !text.contains(value)));
        }
    }

    #[test]
    fn echoes_are_replaced() {
        let (secret, _) = read(Some("s3cr3t-value")).unwrap();
        let redact = |text: &str| String::from_utf8(secret.redact(text.into())).unwrap();
        assert_eq!(redact("nothing here"), "nothing here");
        assert_eq!(redact("s3cr3t-values3cr3t-value"), "[redacted][redacted]");
        assert_eq!(redact("a s3cr3t-value b s3cr3t-value"), "a [redacted] b [redacted]");
        assert_eq!(redact(""), "");
    }
}
