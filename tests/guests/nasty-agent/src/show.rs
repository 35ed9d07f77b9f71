//! Well-behaved ways to show what a sandbox offers.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fulgurite_sdk::agent::{AgentError, Conversation, Llm, Message, emit, task, templates, tools, wait_any};
use fulgurite_sdk::{Attribute, Role, ToolSpec, Value, json};

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after the epoch");
    u64::try_from(since.as_nanos()).expect("before 2554")
}

pub(crate) fn clocks() -> Value {
    let (instant, before) = (Instant::now(), unix_ns());
    std::thread::sleep(Duration::from_hours(1));
    let (slept, after) = (instant.elapsed(), unix_ns());
    json!({"start": before, "end": after, "slept_ns": u64::try_from(slept.as_nanos()).expect("fits")})
}

pub(crate) fn random() -> Value {
    // The standard library seeds its hash maps from wasi:random.
    let draws: Vec<u64> = (0..4).map(|_| RandomState::new().build_hasher().finish()).collect();
    json!({"draws": draws, "seed": task::seed()})
}

pub(crate) fn print() {
    println!("first line");
    eprintln!("a warning");
    print!("second ");
    println!("line");
    print!("no end of line");
    std::io::stdout().flush().expect("standard output");
}

pub(crate) fn converse() -> Result<Value, AgentError> {
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

pub(crate) fn parallel() -> Result<Value, AgentError> {
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

pub(crate) fn stream() -> Result<Value, AgentError> {
    let (llm, mut conversation) = (Llm::new(), Conversation::new());
    conversation.user("first");
    let left = llm.start(&conversation)?;
    let read: String = [left.next_text()?, left.next_text()?].into_iter().flatten().collect();
    drop(left);
    conversation.push(Message::Assistant { text: read.clone(), tool_calls: vec![], response_id: None }).user("second");
    let whole = llm.start(&conversation)?;
    let mut pieces = vec![];
    while let Some(piece) = whole.next_text()? {
        pieces.push(piece);
    }
    let whole = whole.finish()?;
    assert_eq!(pieces.concat(), whole.text(), "pieces make up the whole");
    Ok(json!({"read": read, "pieces": pieces}))
}

pub(crate) fn call(calls: &[(String, Value)]) -> Value {
    let answers = calls.iter().map(|(name, arguments)| match tools::call::<Value>(name, arguments) {
        Ok(value) => json!({ "ok": value }),
        Err(error) => json!({ "error": error.to_string() }),
    });
    answers.collect()
}

pub(crate) fn parallel_tools() -> Result<Value, AgentError> {
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

pub(crate) fn emit_everything() {
    let outer = emit::span("outer", [Attribute::new("a", true)]);
    emit::reward("style", 0.5);
    emit::reward_call("style", 0.25, 0);
    emit::annotation([Attribute::new("note", "text")]);
    emit::message(Role::User, "a message");
    emit::object("thing", &json!({"x": 1})).expect("JSON");
    emit::log(emit::Level::Warn, "careful");
    drop(outer);
}

pub(crate) fn render() -> Result<Value, AgentError> {
    let text = templates::render("greeting", &json!({"name": "Ada"}))?;
    let missing = templates::text("nothing").expect_err("there is no such template");
    Ok(json!([text, missing.to_string(), templates::version()]))
}

pub(crate) fn work() -> Result<Value, AgentError> {
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
