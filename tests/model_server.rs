//! A server on this machine that plays a model endpoint: it reads real HTTP, answers as it is told, and keeps what it was asked.

#![allow(dead_code, reason = "each test binary uses a part of this")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// What the server was asked.
#[derive(Debug, Clone)]
pub(crate) struct Heard {
    /// Request line and headers.
    pub(crate) head: String,
    /// The body; `null` without one.
    pub(crate) body: Value,
}

impl Heard {
    /// Whether the path ends so.
    pub(crate) fn asks_for(&self, path: &str) -> bool {
        self.head.lines().next().is_some_and(|line| line.contains(&format!("{path} HTTP/1.1")))
    }
}

/// What the server does with a request.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// Answers with a status, further header lines (each with its line end) and a body.
    Answer(u16, &'static str, String),
    /// Says nothing until the other side closes the connection, and tells when it has.
    Hang,
    /// Promises a longer body than it sends, and closes.
    Cut,
    /// Sends a body without end.
    Endless,
}

impl Reply {
    /// Status 200.
    pub(crate) fn ok(body: &Value) -> Self {
        Self::Answer(200, "", body.to_string())
    }
}

/// The server.
pub(crate) struct ModelServer {
    /// Where it listens.
    pub(crate) port: u16,
    heard: Arc<Mutex<Vec<Heard>>>,
    /// One message for each connection that [`Reply::Hang`] has seen closed by the other side.
    pub(crate) closed: Receiver<()>,
}

impl ModelServer {
    /// Starts it. `reply` is told how many requests came before (from 0) and what is asked.
    pub(crate) fn start(reply: impl Fn(usize, &Heard) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let heard = Arc::new(Mutex::new(vec![]));
        let (sender, closed) = channel();
        let (kept, reply) = (Arc::clone(&heard), Arc::new(reply));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (kept, reply, sender) = (Arc::clone(&kept), Arc::clone(&reply), sender.clone());
                std::thread::spawn(move || {
                    // A client that goes away ends its thread only.
                    let _ = serve(stream, &kept, &*reply, &sender);
                });
            }
        });
        Self { port, heard, closed }
    }

    /// The n-th request gets the n-th reply, those that follow the last one.
    pub(crate) fn replies(replies: Vec<Reply>) -> Self {
        Self::start(move |index, _| replies[index.min(replies.len() - 1)].clone())
    }

    /// The endpoint's address.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/v1", self.port)
    }

    /// What it was asked so far.
    pub(crate) fn heard(&self) -> Vec<Heard> {
        self.heard.lock().unwrap().clone()
    }
}

fn serve(
    mut stream: TcpStream,
    kept: &Mutex<Vec<Heard>>,
    reply: &dyn Fn(usize, &Heard) -> Reply,
    closed: &Sender<()>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = String::new();
    while reader.read_line(&mut head)? > 2 {}
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let heard = Heard { head, body: serde_json::from_slice(&body).unwrap_or_default() };
    let index = {
        let mut kept = kept.lock().unwrap();
        kept.push(heard.clone());
        kept.len() - 1
    };
    match reply(index, &heard) {
        Reply::Answer(status, headers, body) => {
            write!(stream, "HTTP/1.1 {status} X\r\n{headers}content-length: {}\r\n\r\n{body}", body.len())
        }
        Reply::Hang => {
            let _ = reader.read(&mut [0]);
            let _ = closed.send(());
            Ok(())
        }
        Reply::Cut => write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{{\"choices\":"),
        Reply::Endless => {
            write!(stream, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
            let chunk = "x".repeat(0x4000);
            loop {
                write!(stream, "4000\r\n{chunk}\r\n")?;
            }
        }
    }
}

/// An answer of OpenAI's: text and counts, no ids.
pub(crate) fn openai_answer(text: &str) -> Value {
    json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text, "refusal": null}, "logprobs": null,
            "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
        "system_fingerprint": "fp",
    })
}

/// An answer of vLLM's to `return_token_ids` and `logprobs`.
pub(crate) fn vllm_answer(text: &str) -> Value {
    let token =
        |text: &str, log_prob: f64| json!({"token": text, "logprob": log_prob, "bytes": [65], "top_logprobs": []});
    json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0,
            "message": {"role": "assistant", "content": text, "refusal": null, "tool_calls": [], "reasoning": null},
            "logprobs": {"content": [token(text, -0.25), token("<|im_end|>", -0.5)]},
            "finish_reason": "stop", "stop_reason": null, "token_ids": [17, 2]}],
        "usage": {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2},
        "prompt_logprobs": null, "prompt_token_ids": [1, 9, 4],
    })
}

/// An answer of SGLang's to `return_meta_info` and `return_prompt_token_ids`.
pub(crate) fn sglang_answer(text: &str) -> Value {
    json!({
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text, "tool_calls": null}, "logprobs": null,
            "finish_reason": "stop", "matched_stop": 2, "prompt_token_ids": [1, 9, 4],
            "meta_info": {"id": "1", "output_token_logprobs": [[-0.25, 17, null], [-0.5, 2, null]]}}],
        "usage": {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2},
    })
}

/// An answer of llama.cpp's server to `logprobs`.
pub(crate) fn llama_cpp_answer(text: &str) -> Value {
    let token = |id: u32, log_prob: f64| {
        json!({"id": id, "token": text, "bytes": [65], "logprob": log_prob, "top_logprobs": [
            {"id": id, "token": text, "bytes": [65], "logprob": log_prob}]})
    };
    json!({
        "choices": [{"finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": text},
            "logprobs": {"content": [token(17, -0.25), token(2, -0.5)]}}],
        "created": 1, "model": "m", "object": "chat.completion",
        "usage": {"completion_tokens": 2, "prompt_tokens": 3, "total_tokens": 5},
        "timings": {"prompt_n": 3, "predicted_n": 2},
    })
}

/// The list of models of a server of this kind.
pub(crate) fn models(owned_by: &str) -> Value {
    json!({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": owned_by, "max_model_len": 4096}]})
}
