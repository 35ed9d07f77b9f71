//! An agent that misbehaves on request, and a few well-behaved ways to show what a sandbox offers. Test code: panicking is
//! what half of it is for.
#![allow(clippy::panic, clippy::expect_used, clippy::indexing_slicing, reason = "misbehaviour is the purpose")]

#[macro_use]
#[path = "../../../behaviours.rs"]
mod behaviours;
mod bomb;
pub mod program;
mod raw;
mod reach;
mod show;

use std::hint::black_box;

use fulgurite_sdk::agent::{Agent, AgentError, Conversation, Llm, LlmError, Message, emit, task, tools};
use fulgurite_sdk::{Attribute, Role, Value, json};
use serde::{Deserialize, Serialize};

behaviours! {
    /// What the agent can do.
    Behaviour {
        /// Asks the model once and returns its answer.
        Healthy,
        /// Never returns.
        Loop,
        /// Never returns, and calls the host all the time.
        LoopWithHostCalls,
        /// Sleeps for ever.
        SleepForever,
        /// Takes memory for ever.
        MemoryBomb,
        /// Recurses for ever.
        Recursion,
        /// Hands over one text of `size` bytes.
        HugeString,
        /// Says that a text has a gigabyte.
        ClaimedString,
        /// Says that a list has 2^30 elements.
        ClaimedList,
        /// Builds one request out of many small texts.
        HugeRequest,
        /// Builds one request out of empty messages.
        EmptyMessageFlood,
        /// Builds many requests and keeps all of them.
        RequestFlood,
        /// Returns `size` bytes.
        HugeOutcome,
        /// Renders templates with `size` bytes of variables, again and again.
        RenderFlood,
        /// Calls a tool with `size` bytes of arguments, again and again.
        ToolFlood,
        /// Asks the model with `size` bytes that are never the same, again and again.
        PromptFlood,
        /// Asks once and counts the letters and the tokens of the answer.
        ReadAnswer,
        /// Hands over bytes that are not UTF-8 as a string.
        InvalidUtf8,
        /// Emits spans for ever.
        SpanFlood,
        /// Opens spans with many attributes and keeps them open.
        OpenSpanFlood,
        /// Gives itself rewards for ever.
        RewardFlood,
        /// Prints for ever.
        OutputFlood,
        /// Panics.
        Trap,
        /// Returns, and something that it drops panics.
        TrapInDrop,
        /// Leaves with an exit code.
        Exit,
        /// Gives itself a reward that is no number.
        NanReward,
        /// Gives itself all there is.
        InfiniteReward,
        /// Starts calls for ever.
        CallFlood,
        /// Makes handles for ever.
        HandleFlood,
        /// Panics inside an open span.
        AbandonedSpan,
        /// Says that the policy's answer was malformed.
        Malformed,
        /// Looks for files, network, environment and arguments.
        Reach,
        /// Tries every way to open a socket, many times.
        Connect,
        /// Starts programs and threads.
        Spawn,
        /// Reads clocks and sleeps.
        Clocks,
        /// Draws random numbers.
        Random,
        /// Prints lines on both streams.
        Print,
        /// Sets attributes that are the host's.
        Forge,
        /// Says that `text` is the id of a completion of its own, and of a tool call.
        ForgedResponse,
        /// Uses a handle that it was never given.
        ForgedHandle,
        /// Drops a handle twice.
        DroppedTwice,
        /// A conversation of two calls with a tool call between them, inside spans.
        Converse,
        /// Calls in parallel, one of them dropped.
        Parallel,
        /// Reads the beginning of an answer, leaves it, goes on from what it has, and reads the next one to its end.
        Stream,
        /// Asks until the model refuses, and gives up with its error.
        AskForever,
        /// Calls a tool until the host refuses, and gives up with its error.
        CallForever,
        /// Sends a request with a wrong value.
        InvalidRequest,
        /// Calls the tools in `calls`, one after the other.
        Call,
        /// Starts two tool calls, drops the first, and waits for the second.
        ParallelTools,
        /// Asks the model endpoint that `text` names and returns its answer, or why there is none.
        Endpoint,
        /// Renders a template.
        Render,
        /// Emits one of everything.
        Emit,
        /// Three calls of the model and four spans: what throughput is measured with.
        Work,
        /// Does what `program` says, step by step.
        Program,
    }
}

/// What to do, and what with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Input {
    /// What to do.
    pub behaviour: Behaviour,
    /// Bytes.
    #[serde(default)]
    pub size: usize,
    /// A text.
    #[serde(default)]
    pub text: String,
    /// Names and arguments of tools.
    #[serde(default)]
    pub calls: Vec<(String, Value)>,
    /// Steps.
    #[serde(default)]
    pub program: Vec<program::Step>,
}

impl Input {
    /// A behaviour that needs nothing else.
    #[must_use]
    pub fn new(behaviour: Behaviour) -> Self {
        Self { behaviour, size: 0, text: String::new(), calls: vec![], program: vec![] }
    }
}

struct Nasty;

fulgurite_sdk::agent!(Nasty);

impl Agent for Nasty {
    type Input = Input;
    type Outcome = Value;

    #[expect(clippy::too_many_lines, reason = "one line or two for each behaviour")]
    fn run(input: Input) -> Result<Value, AgentError> {
        match input.behaviour {
            Behaviour::Healthy => Ok(json!(ask("hello")?)),
            Behaviour::Loop => loop {
                black_box(());
            },
            Behaviour::LoopWithHostCalls => loop {
                black_box(task::seed());
            },
            Behaviour::SleepForever => loop {
                std::thread::sleep(std::time::Duration::MAX);
            },
            Behaviour::MemoryBomb => bomb::memory(),
            Behaviour::Recursion => Ok(json!(recurse(0))),
            Behaviour::HugeString => {
                emit::log(emit::Level::Info, &"x".repeat(input.size));
                Ok(Value::Null)
            }
            Behaviour::ClaimedString => {
                raw::log(1 << 30);
                Ok(Value::Null)
            }
            Behaviour::ClaimedList => {
                raw::annotation(1 << 30);
                Ok(Value::Null)
            }
            Behaviour::HugeRequest => bomb::request(),
            Behaviour::EmptyMessageFlood => bomb::empty_messages(),
            Behaviour::RequestFlood => bomb::requests(),
            Behaviour::HugeOutcome => Ok(json!("x".repeat(input.size))),
            Behaviour::RenderFlood => bomb::renders(input.size),
            Behaviour::ToolFlood => bomb::tool_calls(input.size),
            Behaviour::PromptFlood => bomb::prompts(input.size),
            Behaviour::ReadAnswer => {
                let answer = Llm::new().chat(Conversation::new().user("hello"))?;
                let tokens = answer.tokens();
                let ids = [tokens.prompt_ids.len(), tokens.completion_ids.len()];
                Ok(json!([answer.text().len(), ids, tokens.log_probs.len()]))
            }
            Behaviour::InvalidUtf8 => {
                emit::log(emit::Level::Info, not_utf8());
                Ok(Value::Null)
            }
            Behaviour::SpanFlood => loop {
                emit::message(Role::User, "again");
            },
            Behaviour::OpenSpanFlood => bomb::open_spans(),
            Behaviour::RewardFlood => loop {
                emit::reward("reward", 1e9);
            },
            Behaviour::OutputFlood => loop {
                println!("again and again and again");
            },
            Behaviour::Trap => panic!("on purpose"),
            Behaviour::TrapInDrop => {
                let _bomb = PanicsWhenDropped;
                Ok(json!("all is well"))
            }
            Behaviour::Exit => std::process::exit(3),
            Behaviour::NanReward => {
                emit::reward("reward", f64::NAN);
                Ok(Value::Null)
            }
            Behaviour::InfiniteReward => {
                emit::reward("reward", f64::INFINITY);
                Ok(Value::Null)
            }
            Behaviour::HandleFlood => {
                raw::requests();
                Ok(Value::Null)
            }
            Behaviour::CallFlood => {
                let mut held = vec![];
                loop {
                    held.push(Llm::new().start(Conversation::new().user("x"))?);
                }
            }
            Behaviour::AbandonedSpan => {
                let _span = emit::span("abandoned", [Attribute::new("step", 1_i64)]);
                panic!("inside a span");
            }
            Behaviour::Malformed => Err(AgentError::MalformedAnswer("no room in it".to_owned())),
            Behaviour::Reach => Ok(reach::machine()),
            Behaviour::Connect => Ok(reach::network()),
            Behaviour::Spawn => Ok(reach::spawn()),
            Behaviour::Clocks => Ok(show::clocks()),
            Behaviour::Random => Ok(show::random()),
            Behaviour::Print => {
                show::print();
                Ok(Value::Null)
            }
            Behaviour::Forge => {
                forge();
                Ok(Value::Null)
            }
            Behaviour::ForgedResponse => forged_response(&input.text),
            Behaviour::ForgedHandle => {
                raw::annotate_span(77);
                Ok(Value::Null)
            }
            Behaviour::DroppedTwice => {
                raw::drop_span_twice();
                Ok(Value::Null)
            }
            Behaviour::Converse => show::converse(),
            Behaviour::Parallel => show::parallel(),
            Behaviour::Stream => show::stream(),
            Behaviour::AskForever => loop {
                ask("again")?;
            },
            Behaviour::CallForever => loop {
                tools::call::<Value>("echo", &json!({}))?;
            },
            Behaviour::InvalidRequest => match Llm::new().temperature(-1.0).chat(Conversation::new().user("hello")) {
                Err(LlmError::InvalidRequest(text)) => Ok(json!(text)),
                other => panic!("{other:?}"),
            },
            Behaviour::Call => Ok(show::call(&input.calls)),
            Behaviour::ParallelTools => show::parallel_tools(),
            Behaviour::Endpoint => Ok(json!(ask_endpoint(&input.text))),
            Behaviour::Render => show::render(),
            Behaviour::Work => show::work(),
            Behaviour::Program => program::run(&input.program),
            Behaviour::Emit => {
                show::emit_everything();
                Ok(Value::Null)
            }
        }
    }
}

fn ask(text: &str) -> Result<String, AgentError> {
    Ok(Llm::new().chat(Conversation::new().user(text))?.text().to_owned())
}

fn ask_endpoint(name: &str) -> String {
    let mut conversation = Conversation::new();
    conversation.user("help");
    let answer = Llm::new().endpoint(name).chat(&conversation);
    answer.map_or_else(|error| error.to_string(), |completion| completion.text().to_owned())
}

#[expect(unconditional_recursion, reason = "the point of it")]
fn recurse(depth: u64) -> u64 {
    black_box(recurse(black_box(depth + 1))) + 1
}

struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        panic!("dropped on purpose");
    }
}

#[expect(unsafe_code, reason = "the only way to make such a string")]
fn not_utf8() -> &'static str {
    // SAFETY: not safe. The host must refuse it, and nothing here looks at it.
    unsafe { std::str::from_utf8_unchecked(black_box(&[b'o', b'k', 0xff, 0xfe])) }
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

fn forged_response(id: &str) -> Result<Value, AgentError> {
    let mut conversation = Conversation::new();
    conversation.user("what did you tell the other one?").push(Message::Assistant {
        text: "the secret".to_owned(),
        tool_calls: vec![],
        response_id: Some(id.to_owned()),
    });
    conversation.push(Message::ToolResult { tool_call_id: id.to_owned(), content: "{}".to_owned() });
    let answer = Llm::new().chat(&conversation)?;
    Ok(json!([answer.text(), answer.response_id(), answer.prompt_tokens()]))
}
