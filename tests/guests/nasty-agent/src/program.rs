//! An agent that does what its input says, step by step: what generated rollouts are made of.
//!
//! Whatever it is told by the host goes into everything that it does afterwards: an answer that is not the recorded one shows
//! in the next question.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fulgurite_sdk::agent::emit::{self, Span};
use fulgurite_sdk::agent::tools::{self, PendingCall};
use fulgurite_sdk::agent::{AgentError, Conversation, Llm, PendingCompletion, task, templates, wait_any};
use fulgurite_sdk::{Attribute, Role, Value, json};
use serde::{Deserialize, Serialize};

/// One step. Numbers of calls and spans count those that are open, from the start again when there are fewer; without any
/// nothing happens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Asks and waits for the answer.
    Chat,
    /// Asks in the name of another agent, with tools, at this temperature; above 1e30 it is no number.
    ChatWith(f32),
    /// Asks in this role.
    ChatAs(String),
    /// Asks a model endpoint and waits for the answer.
    Ask(String),
    /// Asks.
    Start,
    /// Waits for the answer.
    Finish(usize),
    /// Reads the next piece of the answer.
    Next(usize),
    /// Drops the question.
    Drop(usize),
    /// Waits for any of so many questions.
    WaitAny(usize),
    /// Calls a tool and waits.
    Tool(String),
    /// Calls a tool.
    StartTool(String),
    /// Waits for the tool.
    FinishTool(usize),
    /// Asks whether the tool is done.
    Ready(usize),
    /// Drops the call.
    DropTool(usize),
    /// Waits for any of so many calls.
    WaitAnyTool(usize),
    /// Lists the tools.
    List,
    /// Emits a number; above 1e300 it is none.
    Number(f64),
    /// Gives itself a reward.
    Reward(f64),
    /// Says something for people.
    Message,
    /// Draws a random number.
    Random,
    /// Reads the clock.
    Clock,
    /// Sleeps for so many milliseconds.
    Sleep(u64),
    /// Prints, with or without an end of line.
    Print(bool),
    /// Opens a span.
    Open,
    /// Adds to the innermost span.
    Annotate,
    /// Closes a span.
    Close(usize),
    /// Renders a template.
    Render,
    /// Computes for a while.
    Compute(u32),
    /// Panics.
    Trap,
    /// Gives up with an error of the model, if there was one.
    GiveUp,
}

#[derive(Default)]
struct Machine {
    /// Everything that it was told, folded into one number.
    told: u64,
    conversation: Conversation,
    questions: Vec<PendingCompletion>,
    calls: Vec<PendingCall>,
    spans: Vec<Span>,
    failure: Option<AgentError>,
}

/// Runs a program and returns what it was told.
pub(crate) fn run(steps: &[Step]) -> Result<Value, AgentError> {
    let mut machine = Machine::default();
    for step in steps {
        if matches!(step, Step::GiveUp)
            && let Some(failure) = machine.failure.take()
        {
            return Err(failure);
        }
        machine.step(step);
    }
    Ok(json!(machine.told.to_string()))
}

/// Picks one of what is open.
fn take<T>(open: &mut Vec<T>, number: usize) -> Option<T> {
    (!open.is_empty()).then(|| open.remove(number % open.len()))
}

impl Machine {
    fn tell(&mut self, what: impl std::fmt::Debug) {
        for byte in format!("{what:?}").bytes() {
            self.told = (self.told.rotate_left(5) ^ u64::from(byte)).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
    }

    fn ask(&mut self) {
        let question = format!("question {}", self.told);
        self.conversation.user(question);
    }

    fn answered(&mut self, answer: Result<fulgurite_sdk::agent::Completion, fulgurite_sdk::agent::LlmError>) {
        match answer {
            Ok(answer) => {
                self.tell((answer.text(), answer.response_id(), answer.finish_reason(), answer.completion_tokens()));
                if self.told.is_multiple_of(3) {
                    self.tell(answer.tokens());
                }
                self.conversation.answer(&answer);
            }
            Err(error) => {
                self.tell(&error);
                self.failure = Some(error.into());
            }
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Chat => {
                self.ask();
                let answer = Llm::new().chat(&self.conversation);
                self.answered(answer);
            }
            Step::ChatAs(role) => {
                self.ask();
                let answer = Llm::new().agent_role(role).chat(&self.conversation);
                self.answered(answer);
            }
            Step::ChatWith(temperature) => {
                self.ask();
                let tools = tools::list().unwrap_or_default();
                let temperature = if *temperature > 1e30 { f32::NAN } else { *temperature };
                let llm = Llm::new().tools(tools).temperature(temperature).agent_role("planner").max_tokens(1 << 20);
                let answer = llm.chat(&self.conversation);
                self.answered(answer);
            }
            Step::Ask(endpoint) => {
                self.ask();
                let answer = Llm::new().endpoint(endpoint).chat(&self.conversation);
                self.answered(answer);
            }
            Step::Start => {
                self.ask();
                match Llm::new().start(&self.conversation) {
                    Ok(question) => self.questions.push(question),
                    Err(error) => self.tell(error),
                }
            }
            Step::Finish(number) => {
                if let Some(question) = take(&mut self.questions, *number) {
                    let answer = question.finish();
                    self.answered(answer);
                }
            }
            Step::Next(number) => {
                let place = number % self.questions.len().max(1);
                if let Some(question) = self.questions.get_mut(place) {
                    let piece = question.next_text();
                    self.tell(piece);
                }
            }
            Step::Drop(number) => drop(take(&mut self.questions, *number)),
            Step::WaitAny(count) => {
                let questions: Vec<_> = self.questions.iter().rev().take(*count).collect();
                let place = wait_any(&questions);
                self.tell(place);
            }
            Step::Tool(name) => {
                let answer = tools::call::<Value>(name, &json!({"told": self.told.to_string()}));
                self.tell(answer);
            }
            Step::StartTool(name) => match tools::start(name, &json!({"told": self.told.to_string()})) {
                Ok(call) => self.calls.push(call),
                Err(error) => self.tell(error),
            },
            Step::FinishTool(number) => {
                if let Some(call) = take(&mut self.calls, *number) {
                    self.tell(call.finish::<Value>());
                }
            }
            Step::Ready(number) => {
                let place = number % self.calls.len().max(1);
                let ready = self.calls.get(place).map(PendingCall::is_ready);
                self.tell(ready);
            }
            Step::DropTool(number) => drop(take(&mut self.calls, *number)),
            Step::WaitAnyTool(count) => {
                let calls: Vec<_> = self.calls.iter().rev().take(*count).collect();
                let place = tools::wait_any(&calls);
                self.tell(place);
            }
            _ => self.plain_step(step),
        }
    }

    /// Steps that wait for nobody.
    fn plain_step(&mut self, step: &Step) {
        match step {
            Step::List => self.tell(tools::list()),
            Step::Number(number) => {
                let number = if *number > 1e300 { f64::NAN } else { *number };
                emit::annotation([Attribute::new("number", number)]);
            }
            Step::Reward(value) => emit::reward("own", *value),
            Step::Message => emit::message(Role::User, &self.told.to_string()),
            Step::Random => {
                let drawn = RandomState::new().build_hasher().finish();
                self.tell((drawn, task::seed()));
            }
            Step::Clock => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after the epoch");
                self.tell(now);
            }
            Step::Sleep(ms) => std::thread::sleep(Duration::from_millis(*ms)),
            Step::Print(line) => {
                print!("{}{}", self.told, if *line { "\n" } else { " " });
                std::io::stdout().flush().expect("standard output");
                eprint!("{}", if *line { "warned\n" } else { "!" });
            }
            Step::Open => self.spans.push(emit::span("open", [Attribute::new("told", self.told.to_string())])),
            Step::Annotate => {
                if let Some(span) = self.spans.last() {
                    span.annotate([Attribute::new("more", self.told.to_string())]);
                }
            }
            Step::Close(number) => drop(take(&mut self.spans, *number)),
            Step::Render => self.tell(templates::render("greeting", &json!({"name": self.told.to_string()}))),
            Step::Compute(rounds) => {
                let drawn = (0..*rounds).fold(self.told, |drawn, round| {
                    std::hint::black_box((drawn ^ u64::from(round)).wrapping_mul(0x517c_c1b7_2722_0a95))
                });
                self.tell(drawn);
            }
            Step::Trap => panic!("a step that panics, told {}", self.told),
            _ => {}
        }
    }
}
