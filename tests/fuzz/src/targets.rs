//! The targets.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use fulgurite_core::id::{ContentHash, ResponseId};
use fulgurite_core::llm::{Completion, Sampling};
use fulgurite_grants::{Asked, parse_completion};
use fulgurite_sandbox::{PluginError, Sandbox, SandboxSettings};
use fulgurite_store::StoreError;
use fulgurite_store::format::{decode_rollout, decode_spans, encode_rollout, encode_spans, pack, unpack};
use fulgurite_trainer::config::{ConfigError, RunConfig};

use crate::Verdict;
use crate::memory::peak_bytes_of;

/// Memory that decoding a record may take beyond a multiple of its input: what serde reserves at most for a list whose length
/// it only knows by hearsay (1 MiB), once for each list inside a list.
const DECODING_BYTES_MAX: usize = 4 << 20;
/// That multiple. The smallest span in postcard has about 20 bytes and takes 400 in memory; what an error says is added.
const DECODING_FACTOR_MAX: usize = 64;
/// What LZ4 can make of one byte, twice: as it is written and as it is returned.
const UNPACKING_FACTOR_MAX: usize = 2 * 256;
/// Memory that reading an endpoint's answer may take beyond a multiple of its text.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// That multiple: the shortest choice has 14 bytes and takes 500 in memory, and a list that grows is there twice.
const ANSWER_FACTOR_MAX: usize = 128;
/// Memory that parsing a config may take beyond a multiple of its text.
const PARSING_BYTES_MAX: usize = 1 << 20;
/// That multiple: a key of one letter becomes a table entry with its place in the text.
const PARSING_FACTOR_MAX: usize = 512;

/// A run's config: parses or is refused with a place in the text, and what parses and is written parses again as the same.
///
/// # Panics
/// When that does not hold.
#[must_use]
pub fn config(bytes: &[u8]) -> Verdict {
    let Ok(text) = std::str::from_utf8(bytes) else { return "not UTF-8".to_owned() };
    let path = Path::new("run.toml");
    let (parsed, peak) = peak_bytes_of(|| RunConfig::parse(path, text));
    assert!(peak <= PARSING_BYTES_MAX + PARSING_FACTOR_MAX * text.len(), "{peak} bytes for {} of text", text.len());
    let first = match parsed {
        Ok(config) => config,
        Err(error) => {
            if let ConfigError::Parse { span: Some(span), .. } = &error {
                assert!(span.start <= span.end && span.end <= text.len(), "{span:?} of {}", text.len());
                assert!(text.is_char_boundary(span.start) && text.is_char_boundary(span.end), "{span:?}");
            }
            return match &error {
                ConfigError::Parse { message, .. } => class(message),
                other => class(&other.to_string()),
            };
        }
    };
    let written = toml::to_string(&first).expect("what was parsed can be written");
    let second = RunConfig::parse(path, &written).unwrap_or_else(|error| panic!("{error}:\n{written}"));
    // Written once more instead of compared: a number that is none is not equal to itself.
    assert_eq!(toml::to_string(&second).expect("written before"), written);
    "ok".to_owned()
}

/// A block of spans: decodes or is refused, in bounded memory, and what decodes is written as what decodes to the same.
///
/// # Panics
/// When that does not hold.
#[must_use]
pub fn span_decoding(bytes: &[u8]) -> Verdict {
    let encode = |spans: &Vec<_>| encode_spans(spans);
    decoding(bytes, decode_spans, encode)
}

/// A rollout with its attempts: as [`span_decoding`].
///
/// # Panics
/// When that does not hold.
#[must_use]
pub fn record_decoding(bytes: &[u8]) -> Verdict {
    decoding(bytes, decode_rollout, |(rollout, attempts)| encode_rollout(rollout, attempts))
}

fn decoding<T>(
    bytes: &[u8],
    decode: impl Fn(&[u8]) -> Result<T, StoreError>,
    encode: impl Fn(&T) -> Result<Vec<u8>, StoreError>,
) -> Verdict {
    let (decoded, peak) = peak_bytes_of(|| decode(bytes));
    let allowed = DECODING_BYTES_MAX + DECODING_FACTOR_MAX * bytes.len();
    assert!(peak <= allowed, "{peak} bytes for a record of {}", bytes.len());
    let record = match decoded {
        Ok(record) => record,
        Err(StoreError::Corrupt { detail, .. }) => return class(&detail),
        Err(other) => panic!("damage is told as damage: {other:?}"),
    };
    // A number may be written in more ways than one, so the first encoding may differ from the input; it is the last one.
    let written = encode(&record).expect("what was decoded can be encoded");
    let again = decode(&written).expect("what was encoded can be decoded");
    assert_eq!(encode(&again).expect("encoded before"), written);
    "ok".to_owned()
}

/// A value of the database: unpacks or is refused, in memory that its length justifies, and what unpacks is packed as what
/// unpacks to the same.
///
/// # Panics
/// When that does not hold.
#[must_use]
pub fn value_unpacking(bytes: &[u8]) -> Verdict {
    let (unpacked, peak) = peak_bytes_of(|| unpack(bytes));
    let allowed = DECODING_BYTES_MAX + UNPACKING_FACTOR_MAX * bytes.len();
    assert!(peak <= allowed, "{peak} bytes for a value of {}", bytes.len());
    match unpacked {
        Ok(record) => {
            assert_eq!(unpack(&pack(&record)).expect("packed a moment ago"), record);
            "ok".to_owned()
        }
        Err(StoreError::Corrupt { detail, .. }) => class(&detail),
        Err(other) => panic!("damage is told as damage: {other:?}"),
    }
}

/// A model endpoint's answer: becomes a completion or is refused, in bounded memory; token data are whole or not there, tool
/// calls have ids of the host and arguments that parse, and a completion is recorded and read again as the same.
///
/// # Panics
/// When that does not hold.
#[must_use]
pub fn endpoint_answer(bytes: &[u8]) -> Verdict {
    let asked = Asked {
        response_id: ResponseId("r/1/0".to_owned()),
        call_index: 3,
        sampling: Sampling::default(),
        is_policy: true,
        context_tokens_max: Some(4_096),
    };
    let (parsed, peak) = peak_bytes_of(|| parse_completion(bytes, &asked));
    assert!(peak <= ANSWER_BYTES_MAX + ANSWER_FACTOR_MAX * bytes.len(), "{peak} bytes for {} of text", bytes.len());
    let completion = match parsed {
        Ok(completion) => completion,
        // What follows a quote is the input's.
        Err(error) => return class(error.to_string().split(['`', '"', '\'']).next().unwrap_or_default()),
    };
    assert_eq!(completion.tokens.is_some(), completion.not_trainable.is_none(), "{completion:?}");
    if let Some(tokens) = &completion.tokens {
        assert!(!tokens.prompt_ids.is_empty() && !tokens.completion_ids.is_empty());
        assert_eq!(tokens.completion_ids.len(), tokens.log_probs.len());
        assert!(tokens.log_probs.iter().all(|log_prob| log_prob.is_finite() && *log_prob <= 0.0));
        assert_eq!(tokens.completion_ids.len(), completion.usage.completion_tokens as usize);
    }
    for (number, call) in completion.tool_calls.iter().enumerate() {
        assert_eq!(call.id, format!("call-3-{number}"));
        let arguments: serde_json::Value = serde_json::from_str(&call.arguments).expect("arguments are JSON");
        assert!(arguments.is_object() && !call.name.is_empty(), "{call:?}");
    }
    let written = serde_json::to_vec(&completion).expect("a completion can be recorded");
    let read: Completion = serde_json::from_slice(&written).expect("a record can be read");
    assert_eq!(read, completion);
    let kind = if completion.tokens.is_some() { "tokens" } else { "text" };
    format!("{kind}, {} calls, {:?}: ok", completion.tool_calls.len().min(3), completion.finish_reason)
}

/// A plugin's file: is described or refused, and loaded as no more than it was described as.
///
/// # Panics
/// When that does not hold.
#[must_use]
pub fn plugin_inspection(bytes: &[u8]) -> Verdict {
    static SANDBOX: LazyLock<Sandbox> =
        LazyLock::new(|| Sandbox::new(SandboxSettings::default()).expect("the machine can run WebAssembly"));
    thread_local! {
        static FOLDER: tempfile::TempDir = tempfile::tempdir().expect("a folder for the plugin");
    }
    let path: PathBuf = FOLDER.with(|folder| folder.path().join("plugin.wasm"));
    std::fs::write(&path, bytes).expect("the plugin's file");
    match SANDBOX.inspect(&path) {
        Ok(info) => {
            assert_eq!((info.hash, info.size_bytes), (ContentHash::of(bytes), bytes.len() as u64));
            let verdict = match SANDBOX.load_agent(&path) {
                Ok(agent) => {
                    assert!(info.refused().next().is_none(), "loaded with {:?}", info.imports);
                    assert_eq!(agent.hash(), info.hash);
                    "ok".to_owned()
                }
                Err(error) => refusal(&error),
            };
            format!("inspected, {verdict}")
        }
        Err(error) => refusal(&error),
    }
}

fn refusal(error: &PluginError) -> Verdict {
    assert!(error.to_string().contains("plugin.wasm"), "names the file: {error}");
    let causes = error.source().map(ToString::to_string).unwrap_or_default();
    let kind = format!("{error:?}");
    class(&format!("{}: {causes}", kind.split([' ', '{']).next().unwrap_or_default()))
}

/// A message without what differs from input to input: numbers and quoted text.
fn class(message: &str) -> Verdict {
    let mut quoted = false;
    let text = message.chars().filter(|letter| {
        let quote = matches!(letter, '`' | '"' | '\'');
        quoted ^= quote;
        !quote && !quoted && !letter.is_ascii_digit()
    });
    text.take(120).collect()
}

/// Words of configs.
pub(crate) const CONFIG_WORDS: &[&[u8]] = &[
    b"[limits]\n",
    b"[rollout]\n",
    b"[rollout.sampling]\n",
    b"[rollout.outcome_reward]\n",
    b"[[stage]]\n",
    b"[[reward.term]]\n",
    b"[reward.attach]\n",
    b"[[alarm]]\n",
    b"kind = ",
    b"metric = ",
    b"[[control]]\n",
    b"[[baseline]]\n",
    b"[stage.config]\n",
    b"[tools.rooms]\n",
    b"[templates]\n",
    b"[policy.local]\n",
    b"[policy.scripted]\n",
    b"[policy.endpoint]\n",
    b"url = ",
    b"server = ",
    b"timeout_ms = ",
    b"retries_max = ",
    b"[experiment]\n",
    b"[checkpoint]\n",
    b"[grader]\n",
    b"name = ",
    b"seed = ",
    b"component = ",
    b"memory_bytes_max = ",
    b"guest_cpu_ms_max = ",
    b"fuel_max = ",
    b"live_max = ",
    b"attempts_max = ",
    b"reward_accept = [\"agent\"]\n",
    b"malformed-answer = ",
    b"temperature = ",
    b"max_tokens = ",
    b"stop = [\"\"]\n",
    b"constraint = { regex = \"a\" }\n",
    b"grants = [\"read-reference\"]\n",
    b"start_from = \"initial\"\n",
    b"tokens_of = ",
    b"sampled_tokens_max = ",
    b"every_steps = ",
    b"keep = ",
    b"shuffle_rewards = true\n",
    b"nan",
    b"inf",
    b"-inf",
    b"-0.0",
    b"true",
    b"[]",
    b"{}",
    b"\"\"",
    b"'''",
    b"\"\"\"",
    b"\\u0000",
    b"1979-05-27T07:32:00Z",
    b"0x",
    b"0b1",
    b"1e400",
    b"_",
    b".",
    b"=",
    b"#",
    b"\n",
    b"\xef\xbb\xbf",
    b"[[[[[[[[",
    b"{a={a={a=",
];

/// Words of answers of model endpoints.
pub(crate) const ANSWER_WORDS: &[&[u8]] = &[
    b"\"choices\":[",
    b"\"message\":{",
    b"\"content\":",
    b"\"tool_calls\":[",
    b"\"function\":{",
    b"\"name\":",
    b"\"arguments\":",
    b"\"finish_reason\":",
    b"\"length\"",
    b"\"tool_calls\"",
    b"\"abort\"",
    b"\"logprobs\":",
    b"\"logprob\":",
    b"\"id\":",
    b"\"token_ids\":[",
    b"\"prompt_token_ids\":[",
    b"\"meta_info\":{",
    b"\"output_token_logprobs\":[[",
    b"\"usage\":{",
    b"\"prompt_tokens\":",
    b"\"completion_tokens\":",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b"\"\"",
    b"\\u0000",
    b"\\ud800",
    b"-9999.0",
    b"1e400",
    b"1e-400",
    b"-0.0",
    b"4294967296",
    b"\"{\\\"a\\\":1}\"",
    b"[[[[[[[[",
    b"{\"a\":{\"a\":{\"a\":",
];

/// Words of records: enum tags and border lengths.
pub(crate) const RECORD_WORDS: &[&[u8]] = &[
    b"\x00",
    b"\x01",
    b"\x02",
    b"\x0f",
    b"\x10",
    b"\x7f",
    b"\x80\x01",
    b"\xff\xff\xff\xff\x0f",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80",
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x00\x00\x00\x00\xf8\x7f",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"grpo/0/0",
    b"reward",
    b"{}",
];

/// Words of components: headers, sections, types.
pub(crate) const COMPONENT_WORDS: &[&[u8]] = &[
    b"\0asm\x0d\0\x01\0",
    b"\0asm\x01\0\0\0",
    b"\x7fELF",
    b"#!/bin/sh\n",
    b"run",
    b"grade",
    b"fulgurite:agent/llm@0.1.0",
    b"fulgurite:agent/task@0.1.0",
    b"fulgurite:agent/task@0.9.0",
    b"fulgurite:tool/tool@0.1.0",
    b"wasi:cli/exit@0.2.6",
    b"@",
    b"/",
    b"\x40",
    b"\x41",
    b"\x42",
    b"\x70",
    b"\x71",
    b"\x72",
    b"\x73",
    b"\x7f",
    b"\x01\x00",
    b"\x0b",
    b"\xff\xff\xff\xff\x0f",
];
