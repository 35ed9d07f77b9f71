//! An agent that misbehaves on request, and a few well-behaved ways to show what a sandbox offers. Test code: panicking is
//! what half of it is for.
#![allow(clippy::panic, clippy::expect_used, clippy::indexing_slicing, reason = "misbehaviour is the purpose")]

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::hint::black_box;
use std::io::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fulgurite_sdk::agent::{
    Agent, AgentError, Conversation, Llm, LlmError, Message, emit, task, templates, tools, wait_any,
};
use fulgurite_sdk::{Attribute, Role, ToolSpec, Value, json};
use serde::Deserialize;

/// What to do.
#[derive(Deserialize)]
#[serde(tag = "behaviour", rename_all = "kebab-case")]
pub enum Input {
    /// Asks the model once and returns its answer.
    Healthy,
    /// Never returns.
    Loop,
    /// Takes memory for ever.
    MemoryBomb,
    /// Recurses for ever.
    Recursion,
    /// Hands over one text of so many bytes.
    HugeString {
        /// Its length.
        bytes: usize,
    },
    /// Builds one request out of many small texts.
    HugeRequest,
    /// Hands over bytes that are not UTF-8 as a string.
    InvalidUtf8,
    /// Emits spans for ever.
    SpanFlood,
    /// Prints for ever.
    OutputFlood,
    /// Panics.
    Trap,
    /// Leaves with an exit code.
    Exit,
    /// Gives itself a reward that is no number.
    NanReward,
    /// Makes handles for ever.
    HandleFlood,
    /// Panics inside an open span.
    AbandonedSpan,
    /// Says that the policy's answer was malformed.
    Malformed,
    /// Looks for files, network, environment and arguments.
    Reach,
    /// Reads clocks and sleeps.
    Clocks,
    /// Draws random numbers.
    Random,
    /// Prints lines on both streams.
    Print,
    /// Sets attributes that are the host's.
    Forge,
    /// A conversation of two calls with a tool call between them, inside spans.
    Converse,
    /// Calls in parallel, one of them dropped.
    Parallel,
    /// Asks until the model refuses, and gives up with its error.
    AskForever,
    /// Calls a tool until the host refuses, and gives up with its error.
    CallForever,
    /// Sends a request with a wrong value.
    InvalidRequest,
    /// Calls the tool with this name and these arguments, one after the other.
    Call {
        /// Names and arguments.
        calls: Vec<(String, Value)>,
    },
    /// Starts two tool calls, drops the first, and waits for the second.
    ParallelTools,
    /// Renders a template.
    Render,
    /// Emits one of everything.
    Emit,
    /// Three calls of the model and four spans: what throughput is measured with.
    Work,
}

struct Nasty;

fulgurite_sdk::agent!(Nasty);

impl Agent for Nasty {
    type Input = Input;
    type Outcome = Value;

    fn run(input: Input) -> Result<Value, AgentError> {
        match input {
            Input::Healthy => Ok(json!(ask("hello")?)),
            Input::Loop => loop {
                black_box(());
            },
            Input::MemoryBomb => {
                let mut held: Vec<Vec<u8>> = vec![];
                loop {
                    held.push(black_box(vec![1; 1 << 20]));
                }
            }
            Input::Recursion => Ok(json!(recurse(0))),
            Input::HugeString { bytes } => {
                emit::log(emit::Level::Info, &"x".repeat(bytes));
                Ok(Value::Null)
            }
            Input::HugeRequest => {
                let mut conversation = Conversation::new();
                for _ in 0..64 {
                    conversation.user("x".repeat(100_000));
                }
                Ok(json!(Llm::new().chat(&conversation)?.text()))
            }
            Input::InvalidUtf8 => {
                emit::log(emit::Level::Info, not_utf8());
                Ok(Value::Null)
            }
            Input::SpanFlood => loop {
                emit::message(Role::User, "again");
            },
            Input::OutputFlood => loop {
                println!("again and again and again");
            },
            Input::Trap => panic!("on purpose"),
            Input::Exit => std::process::exit(3),
            Input::NanReward => {
                emit::reward("reward", f64::NAN);
                Ok(Value::Null)
            }
            Input::HandleFlood => {
                let mut held = vec![];
                loop {
                    held.push(Llm::new().start(Conversation::new().user("x"))?);
                }
            }
            Input::AbandonedSpan => {
                let _span = emit::span("abandoned", [Attribute::new("step", 1_i64)]);
                panic!("inside a span");
            }
            Input::Malformed => Err(AgentError::MalformedAnswer("no room in it".to_owned())),
            Input::Reach => Ok(reach()),
            Input::Clocks => Ok(clocks()),
            Input::Random => Ok(random()),
            Input::Print => {
                print();
                Ok(Value::Null)
            }
            Input::Forge => {
                forge();
                Ok(Value::Null)
            }
            Input::Converse => converse(),
            Input::Parallel => parallel(),
            Input::AskForever => loop {
                ask("again")?;
            },
            Input::CallForever => loop {
                tools::call::<Value>("echo", &json!({}))?;
            },
            Input::InvalidRequest => match Llm::new().temperature(-1.0).chat(Conversation::new().user("hello")) {
                Err(LlmError::InvalidRequest(text)) => Ok(json!(text)),
                other => panic!("{other:?}"),
            },
            Input::Call { calls } => Ok(call(&calls)),
            Input::ParallelTools => parallel_tools(),
            Input::Render => {
                let text = templates::render("greeting", &json!({"name": "Ada"}))?;
                let missing = templates::text("nothing").expect_err("there is no such template");
                Ok(json!([text, missing.to_string(), templates::version()]))
            }
            Input::Work => {
                let (llm, mut conversation) = (Llm::new(), Conversation::new());
                conversation.user("work");
                for _ in 0..3 {
                    let answer = llm.chat(&conversation)?;
                    conversation.answer(&answer);
                    emit::annotation([Attribute::new("text", answer.text())]);
                }
                emit::reward("reward", 1.0);
                Ok(Value::Null)
            }
            Input::Emit => {
                emit_everything();
                Ok(Value::Null)
            }
        }
    }
}

fn ask(text: &str) -> Result<String, AgentError> {
    Ok(Llm::new().chat(Conversation::new().user(text))?.text().to_owned())
}

#[expect(unconditional_recursion, reason = "the point of it")]
fn recurse(depth: u64) -> u64 {
    black_box(recurse(black_box(depth + 1))) + 1
}

#[expect(unsafe_code, reason = "the only way to make such a string")]
fn not_utf8() -> &'static str {
    // SAFETY: not safe. The host must refuse it, and nothing here looks at it.
    unsafe { std::str::from_utf8_unchecked(black_box(&[b'o', b'k', 0xff, 0xfe])) }
}

fn reach() -> Value {
    let write = std::fs::write("/tmp/fulgurite-escaped", "x");
    json!({
        "read": std::fs::read("/etc/passwd").map(|bytes| bytes.len()).map_err(|error| error.to_string()),
        "list": std::fs::read_dir("/").map(std::iter::Iterator::count).map_err(|error| error.to_string()),
        "write": write.map_err(|error| error.to_string()),
        "connect": std::net::TcpStream::connect("127.0.0.1:80").map(|_| ()).map_err(|error| error.to_string()),
        "listen": std::net::TcpListener::bind("127.0.0.1:0").map(|_| ()).map_err(|error| error.to_string()),
        "resolve": std::net::ToSocketAddrs::to_socket_addrs("localhost:80").map(|_| ()).map_err(|error| error.to_string()),
        "environment": std::env::vars().collect::<Vec<_>>(),
        "arguments": std::env::args().collect::<Vec<_>>(),
    })
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after the epoch");
    u64::try_from(since.as_nanos()).expect("before 2554")
}

fn clocks() -> Value {
    let (instant, before) = (Instant::now(), unix_ns());
    std::thread::sleep(Duration::from_hours(1));
    let (slept, after) = (instant.elapsed(), unix_ns());
    json!({"start": before, "end": after, "slept_ns": u64::try_from(slept.as_nanos()).expect("fits")})
}

fn random() -> Value {
    // The standard library seeds its hash maps from wasi:random.
    let draws: Vec<u64> = (0..4).map(|_| RandomState::new().build_hasher().finish()).collect();
    json!({"draws": draws, "seed": task::seed()})
}

fn print() {
    println!("first line");
    eprintln!("a warning");
    print!("second ");
    println!("line");
    print!("no end of line");
    std::io::stdout().flush().expect("standard output");
}

fn forge() {
    let span = emit::span(
        "mine",
        [
            Attribute::new("fulgurite.rollout.id", "another"),
            Attribute::new("gen_ai.response.id", "another/1/0"),
            Attribute::new("my.key", "kept"),
        ],
    );
    emit::annotation([Attribute::new("fulgurite.reward.value", 1.0)]);
    span.annotate([Attribute::new("gen_ai.usage.output_tokens", 0_i64)]);
}

fn converse() -> Result<Value, AgentError> {
    let _outer = emit::span("outer", []);
    let specs: Vec<ToolSpec> = tools::list()?;
    let mut conversation = Conversation::new();
    conversation.system("You are a test.").user("first");
    let llm = Llm::new().tools(specs).temperature(0.5).agent_role("planner");
    let first = llm.chat(&conversation)?;
    conversation.answer(&first);
    let answer: Value = {
        let _inner = emit::span("inner", []);
        tools::call("echo", &json!({"text": "hi"}))?
    };
    conversation.user(answer.to_string());
    let second = llm.chat(&conversation)?;
    emit::object("answers", &json!([first.text(), second.text()])).expect("JSON");
    Ok(json!(second.text()))
}

fn parallel() -> Result<Value, AgentError> {
    let llm = Llm::new();
    let start = |text: &str| llm.start(Conversation::new().push(Message::User(text.to_owned())));
    let (slow, fast, dropped) = (start("slow")?, start("fast")?, start("dropped")?);
    drop(dropped);
    let first = wait_any(&[&slow, &fast])?;
    let chunk = fast.next_text()?;
    let end = fast.next_text()?;
    let fast = fast.finish()?;
    let slow = slow.finish()?;
    Ok(json!({"first": first, "chunk": chunk, "end": end, "fast": fast.text(), "slow": slow.text()}))
}

fn call(calls: &[(String, Value)]) -> Value {
    let answers = calls.iter().map(|(name, arguments)| match tools::call::<Value>(name, arguments) {
        Ok(value) => json!({ "ok": value }),
        Err(error) => json!({ "error": error.to_string() }),
    });
    answers.collect()
}

fn parallel_tools() -> Result<Value, AgentError> {
    let dropped = tools::start("count", &json!({}))?;
    let waiting = tools::start("count", &json!({}))?;
    let last = tools::start("count", &json!({}))?;
    // The last first: the others have to get on meanwhile.
    let third: Value = last.finish()?;
    drop(dropped);
    let place = tools::wait_any(&[&waiting])?;
    let second: Value = waiting.finish()?;
    Ok(json!([place, second, third]))
}

fn emit_everything() {
    let outer = emit::span("outer", [Attribute::new("a", true)]);
    emit::reward("style", 0.5);
    emit::reward_call("style", 0.25, 0);
    emit::annotation([Attribute::new("note", "text")]);
    emit::message(Role::User, "a message");
    emit::object("thing", &json!({"x": 1})).expect("JSON");
    emit::log(emit::Level::Warn, "careful");
    drop(outer);
}
