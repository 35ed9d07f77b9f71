//! Standard output and standard error of a guest: lines of log, bounded.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use fulgurite_core::outcome::OutcomeKind;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamError, StreamResult};

use crate::fault::Stop;

/// Longest line; longer ones are cut into several.
const LINE_BYTES_MAX: usize = 4_096;
/// How many lines of standard error go into the detail of a trap: a Rust panic takes three.
const SAID_LINES_MAX: usize = 4;
/// What a stream says it can take at once.
const CHUNK_BYTES: usize = 65_536;

/// Takes finished lines.
pub(crate) trait LineSink: Send + Sync {
    /// Is told before a guest writes, whether that makes a line or not.
    fn act(&self) -> Result<(), Stop>;

    /// Takes one line of `stdout` or `stderr`.
    fn line(&self, stream: &'static str, text: String) -> Result<(), Stop>;
}

/// Both streams of one guest.
pub(crate) struct GuestOutput {
    state: Mutex<State>,
    bytes_max: u64,
    sink: Option<Arc<dyn LineSink>>,
}

#[derive(Default)]
struct State {
    bytes: u64,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// The last lines of standard error.
    said: VecDeque<String>,
}

impl State {
    fn remember(&mut self, stream: &str, lines: &[String]) {
        if stream == "stderr" {
            self.said.extend(lines.iter().cloned());
            let surplus = self.said.len().saturating_sub(SAID_LINES_MAX);
            self.said.drain(..surplus);
        }
    }
}

impl GuestOutput {
    pub(crate) fn new(bytes_max: u64, sink: Option<Arc<dyn LineSink>>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), bytes_max, sink })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last lines of standard error: where a panicking guest says why.
    pub(crate) fn last_said(&self) -> String {
        let lines: Vec<String> = self.lock().said.iter().cloned().collect();
        lines.join("\n")
    }

    fn write(&self, stream: &'static str, bytes: &[u8]) -> Result<(), Stop> {
        if let Some(sink) = &self.sink {
            sink.act()?;
        }
        let mut state = self.lock();
        state.bytes = state.bytes.saturating_add(bytes.len() as u64);
        if state.bytes > self.bytes_max {
            return Err(Stop::limit(OutcomeKind::OutputLimit, "output_bytes_max", self.bytes_max));
        }
        let mut lines = vec![];
        {
            let buffer = if stream == "stdout" { &mut state.stdout } else { &mut state.stderr };
            for byte in bytes {
                if *byte == b'\n' || buffer.len() >= LINE_BYTES_MAX {
                    lines.push(text(buffer));
                }
                if *byte != b'\n' {
                    buffer.push(*byte);
                }
            }
        }
        state.remember(stream, &lines);
        drop(state);
        self.hand_over(stream, lines)
    }

    fn hand_over(&self, stream: &'static str, lines: Vec<String>) -> Result<(), Stop> {
        let Some(sink) = &self.sink else { return Ok(()) };
        lines.into_iter().try_for_each(|line| sink.line(stream, line))
    }

    /// Hands over what has no end of line yet. Called when the guest has ended.
    pub(crate) fn flush(&self) -> Result<(), Stop> {
        for stream in ["stdout", "stderr"] {
            let mut state = self.lock();
            let buffer = if stream == "stdout" { &mut state.stdout } else { &mut state.stderr };
            if !buffer.is_empty() {
                let lines = vec![text(buffer)];
                state.remember(stream, &lines);
                drop(state);
                self.hand_over(stream, lines)?;
            }
        }
        Ok(())
    }
}

fn text(buffer: &mut Vec<u8>) -> String {
    String::from_utf8_lossy(&std::mem::take(buffer)).into_owned()
}

impl Drop for GuestOutput {
    fn drop(&mut self) {
        // The guest is gone: a limit that is reached by its last half line has nobody left to stop.
        let _ = self.flush();
    }
}

/// One of the two streams.
#[derive(Clone)]
pub(crate) struct GuestStream {
    pub(crate) output: Arc<GuestOutput>,
    pub(crate) name: &'static str,
}

impl IsTerminal for GuestStream {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for GuestStream {
    fn async_stream(&self) -> Box<dyn tokio::io::AsyncWrite + Send + Sync> {
        // Only WASI p3 asks for this; p2 uses `p2_stream`.
        Box::new(tokio::io::sink())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

#[async_trait::async_trait]
impl Pollable for GuestStream {
    async fn ready(&mut self) {}
}

impl OutputStream for GuestStream {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.output.write(self.name, &bytes).map_err(|stop| StreamError::Trap(stop.error()))
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(CHUNK_BYTES)
    }
}
