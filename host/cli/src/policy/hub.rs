//! Files of a model from the Hugging Face hub, or a server that speaks as it does.
//!
//! hf-hub 1.0 was looked at and not taken: with rustls it brings aws-lc (which needs cmake) and the xet transfer, some 300
//! crates. Of the hub's interface a download needs two requests, so they are made here, with the TLS that grants have.
//!
//! A file is fetched in ranges into `NAME.part`, so that what has come stays when a connection breaks or the program ends;
//! it gets its name when size and hash are those that the hub has told.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use ureq::http::Response;
use ureq::{Agent, Body};

/// Where the hub is, unless `HF_ENDPOINT` says otherwise.
const ENDPOINT: &str = "https://huggingface.co";
/// Bytes asked for at once: a request of this size ends within its time on any line that is worth using.
const RANGE_BYTES: u64 = 64 << 20;
/// Seconds that connecting may take, and waiting for an answer to begin.
const ANSWER_S_MAX: u64 = 30;
/// Seconds that one range may take. What has come by then is kept.
const RANGE_S_MAX: u64 = 600;
/// Requests in a row that may bring nothing before a download fails.
const FRUITLESS_MAX: u32 = 4;
/// Longest answer of the hub about a model, in bytes.
const LISTING_BYTES_MAX: u64 = 32 << 20;
/// Bytes read at once.
const BUFFER_BYTES: usize = 256 << 10;

/// A connection to a hub.
pub(super) struct Hub {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// A model at one commit.
#[derive(Debug, Deserialize)]
pub(super) struct Listing {
    /// The commit.
    pub(super) sha: String,
    /// Its files.
    pub(super) siblings: Vec<HubFile>,
}

/// A file of a model.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct HubFile {
    /// Its path in the model.
    #[serde(rename = "rfilename")]
    pub(super) name: String,
    /// Its length in bytes.
    pub(super) size: Option<u64>,
    /// Where it is a large file: what is known of it.
    #[serde(default)]
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl HubFile {
    /// Its length in bytes, where the hub tells.
    pub(super) fn bytes(&self) -> Option<u64> {
        self.lfs.as_ref().and_then(|lfs| lfs.size).or(self.size)
    }
}

/// Why the hub did not give something.
#[derive(Debug)]
pub(super) enum HubError {
    /// It could not be reached.
    Offline(anyhow::Error),
    /// It answered, and not with what was asked for.
    Refused(anyhow::Error),
}

impl Hub {
    /// The hub of `HF_ENDPOINT`, asked with the token of `HF_TOKEN`.
    pub(super) fn of_environment() -> anyhow::Result<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        if !(endpoint.starts_with("https://") || endpoint.starts_with("http://")) {
            bail!("HF_ENDPOINT is `{endpoint}`: it must begin with https:// or http://");
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(8)
            .timeout_connect(Some(Duration::from_secs(ANSWER_S_MAX)))
            .timeout_recv_response(Some(Duration::from_secs(ANSWER_S_MAX)))
            .timeout_recv_body(Some(Duration::from_secs(RANGE_S_MAX)))
            .build();
        Ok(Self { agent: config.into(), endpoint, token: variable("HF_TOKEN") })
    }

    /// Its address.
    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    fn get(&self, url: &str, range: Option<(u64, u64)>) -> Result<Response<Body>, HubError> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            // ureq does not carry it to where a redirect leads.
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if let Some((from, to)) = range {
            request = request.header("Range", format!("bytes={from}-{to}"));
        }
        let offline = || format!("cannot reach {}", self.endpoint);
        request.call().map_err(|error| HubError::Offline(anyhow::Error::new(error).context(offline())))
    }

    /// What a model has at a revision.
    pub(super) fn listing(&self, repo: &str, revision: &str) -> Result<Listing, HubError> {
        let url = format!("{}/api/models/{repo}/revision/{revision}?blobs=true", self.endpoint);
        let mut response = self.get(&url, None)?;
        let status = response.status().as_u16();
        let refused = |problem: String| Err(HubError::Refused(anyhow!(problem)));
        match status {
            200 => {}
            401 | 403 if self.token.is_none() => {
                return refused(format!(
                    "{} has no public model `{repo}`: check its name, or set HF_TOKEN if it is private or asks for consent",
                    self.endpoint
                ));
            }
            401 | 403 => {
                return refused(format!("{} does not give `{repo}` to the owner of HF_TOKEN", self.endpoint));
            }
            404 => {
                return refused(format!("{} has no model `{repo}` with a revision `{revision}`", self.endpoint));
            }
            other => return refused(format!("{url} answered with status {other}")),
        }
        let body = response.body_mut().with_config().limit(LISTING_BYTES_MAX).read_to_vec();
        let body = body.map_err(|error| HubError::Offline(anyhow::Error::new(error)))?;
        serde_json::from_slice(&body)
            .map_err(|error| HubError::Refused(anyhow!("{url} does not say what the model has: {error}")))
    }

    /// Fetches a file into a folder, unless it is there. `came` is told how many bytes have come, those of an earlier
    /// attempt included.
    pub(super) fn fetch(
        &self,
        repo: &str,
        commit: &str,
        file: &HubFile,
        folder: &Path,
        came: &mut dyn FnMut(u64),
    ) -> anyhow::Result<()> {
        let path = folder.join(&file.name);
        if path.is_file() {
            came(path.metadata().map_or(0, |found| found.len()));
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("cannot make `{}`", parent.display()))?;
        }
        let part = folder.join(format!("{}.part", file.name));
        let shown = || format!("cannot write `{}`", part.display());
        let mut open = OpenOptions::new();
        let mut out = open.create(true).truncate(false).read(true).write(true).open(&part).with_context(shown)?;
        let url = format!("{}/{repo}/resolve/{commit}/{}", self.endpoint, file.name);
        let mut fruitless = 0;
        loop {
            let from = out.seek(SeekFrom::End(0)).with_context(shown)?;
            came(from);
            if file.bytes().is_some_and(|bytes| from >= bytes) {
                break;
            }
            match self.range(&url, from, &mut out, came) {
                Ok(true) => break,
                Ok(false) => {}
                Err(Interrupted::Final(error)) => return Err(error),
                Err(Interrupted::Retry(error)) => {
                    tracing::debug!("{url}: {error:#}");
                    let now = out.metadata().map_or(from, |found| found.len());
                    fruitless = if now > from { 0 } else { fruitless + 1 };
                    if fruitless >= FRUITLESS_MAX {
                        return Err(error.context(format!("`{}` did not come, {now} bytes of it are kept", file.name)));
                    }
                }
            }
        }
        out.sync_all().with_context(shown)?;
        drop(out);
        if let Err(problem) = check(file, &part) {
            // Going on with it would never end well.
            drop(std::fs::remove_file(&part));
            bail!("{url}: {problem}; it is fetched anew the next time");
        }
        std::fs::rename(&part, &path).with_context(|| format!("cannot write `{}`", path.display()))
    }

    /// Appends a range of a file. Says whether that was the end of it.
    fn range(&self, url: &str, from: u64, out: &mut File, came: &mut dyn FnMut(u64)) -> Result<bool, Interrupted> {
        let response = self.get(url, Some((from, from.saturating_add(RANGE_BYTES - 1))));
        let response = response.map_err(|error| match error {
            HubError::Offline(error) | HubError::Refused(error) => Interrupted::Retry(error),
        })?;
        let status = response.status().as_u16();
        let answered = || anyhow!("{url} answered with status {status}");
        let (mut at, whole) = match status {
            206 => {
                let range = response.headers().get("content-range").and_then(|value| value.to_str().ok());
                let (start, whole) = range.and_then(content_range).unzip();
                if start != Some(from) {
                    return Err(Interrupted::Final(anyhow!("{url} sent another part than it was asked for")));
                }
                (from, whole.flatten())
            }
            // All of it, whatever was asked for.
            200 => {
                out.set_len(0).and_then(|()| out.rewind()).map_err(|error| Interrupted::Final(error.into()))?;
                (0, None)
            }
            // There is nothing behind what has come.
            416 if from > 0 => return Ok(true),
            408 | 429 | 500..=599 => return Err(Interrupted::Retry(answered())),
            _ => return Err(Interrupted::Final(answered())),
        };
        let mut reader = response.into_body().into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let count = reader.read(&mut buffer).map_err(|error| Interrupted::Retry(error.into()))?;
            if count == 0 {
                break;
            }
            let bytes = buffer.get(..count).unwrap_or_default();
            out.write_all(bytes).map_err(|error| Interrupted::Final(error.into()))?;
            at += count as u64;
            came(at);
        }
        Ok(status == 200 || whole.is_some_and(|whole| at >= whole))
    }
}

/// Why a range did not come whole.
enum Interrupted {
    /// Asking again may help.
    Retry(anyhow::Error),
    /// It cannot.
    Final(anyhow::Error),
}

/// Start and length of the whole in `bytes START-END/WHOLE`.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, whole) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.trim().parse().ok()?, whole.trim().parse().ok()))
}

/// Compares a file with what the hub has told of it.
fn check(file: &HubFile, path: &Path) -> anyhow::Result<()> {
    let found = path.metadata()?.len();
    if let Some(bytes) = file.bytes().filter(|bytes| *bytes != found) {
        bail!("it has {found} bytes and the hub tells of {bytes}");
    }
    let Some(told) = file.lfs.as_ref().and_then(|lfs| lfs.sha256.as_ref()) else { return Ok(()) };
    let mut hash = Sha256::new();
    let mut content = File::open(path)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = content.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hash.update(buffer.get(..count).unwrap_or_default());
    }
    let mut found = String::new();
    for byte in hash.finalize() {
        // Writing to a string cannot fail.
        let _ = write!(found, "{byte:02x}");
    }
    if !told.eq_ignore_ascii_case(&found) {
        bail!("its SHA-256 is {found} and the hub tells of {told}");
    }
    Ok(())
}
