//! A grader that misbehaves when the item's world says so: a text that names a behaviour. Any other world is judged well.
#![allow(clippy::panic, reason = "misbehaviour is the purpose")]

#[macro_use]
#[path = "../../../behaviours.rs"]
mod behaviours;

use std::hint::black_box;

use fulgurite_sdk::grader::{Case, Ending, Event, Grader, GraderError, Reward};
use fulgurite_sdk::{Value, json};

behaviours! {
    /// What the grader can do.
    Behaviour {
        /// One good reward, and one that is no number.
        Nan,
        /// All there is.
        Infinite,
        /// Less than nothing.
        MinusInfinite,
        /// Never returns.
        Loop,
        /// Takes memory for ever.
        Memory,
        /// Recurses for ever.
        Recursion,
        /// Panics.
        Trap,
        /// Returns, and something that it drops panics.
        TrapInDrop,
        /// Leaves with an exit code.
        Exit,
        /// Prints for ever.
        OutputFlood,
        /// Returns a thousand rewards.
        Many,
        /// Returns thirty thousand rewards.
        Flood,
        /// Says why in a million letters.
        HugeFeedback,
        /// A reward without a name.
        Nameless,
        /// A reward whose name is too long.
        LongName,
        /// A reward for a call that nobody made.
        ForgedCall,
        /// Says that there is no grade.
        Refuse,
        /// Looks for files, network and programs.
        Reach,
        /// Gives back everything that it was given, as feedback.
        Show,
    }
}

struct Nasty;

fulgurite_sdk::grader!(Nasty);

impl Grader for Nasty {
    type Input = Value;
    type World = Value;
    type Reference = Value;
    type Outcome = Value;

    fn grade(case: Case<Value, Value, Value, Value>) -> Result<Vec<Reward>, GraderError> {
        let Ok(behaviour) = serde_json::from_value::<Behaviour>(case.world.clone()) else {
            return Ok(vec![Reward::new(1.0)]);
        };
        match behaviour {
            Behaviour::Nan => Ok(vec![Reward::new(1.0), Reward::new(f64::NAN).dimension("style")]),
            Behaviour::Infinite => Ok(vec![Reward::new(f64::INFINITY)]),
            Behaviour::MinusInfinite => Ok(vec![Reward::new(f64::NEG_INFINITY)]),
            Behaviour::Loop => loop {
                black_box(());
            },
            Behaviour::Memory => {
                let mut held: Vec<Vec<u8>> = vec![];
                loop {
                    held.push(black_box(vec![1; 1 << 20]));
                }
            }
            #[expect(clippy::cast_precision_loss, reason = "it never returns")]
            Behaviour::Recursion => Ok(vec![Reward::new(recurse(0) as f64)]),
            Behaviour::Trap => panic!("on purpose"),
            Behaviour::TrapInDrop => {
                let _bomb = PanicsWhenDropped;
                Ok(vec![Reward::new(1.0)])
            }
            Behaviour::Exit => std::process::exit(0),
            Behaviour::OutputFlood => loop {
                println!("again and again and again");
            },
            Behaviour::Many => Ok(vec![Reward::new(0.0); 1_000]),
            Behaviour::Flood => Ok(vec![Reward::new(0.0).dimension(""); 30_000]),
            Behaviour::HugeFeedback => Ok(vec![Reward::new(0.0).feedback("x".repeat(1 << 20))]),
            Behaviour::Nameless => Ok(vec![Reward::new(0.0).dimension("")]),
            Behaviour::LongName => Ok(vec![Reward::new(0.0).dimension("x".repeat(65))]),
            Behaviour::ForgedCall => Ok(vec![Reward::new(0.5).on_call(u64::MAX)]),
            Behaviour::Refuse => Err(GraderError::InvalidItem("no field `answer`".to_owned())),
            Behaviour::Reach => Ok(vec![Reward::new(1.0).feedback(reach().to_string())]),
            Behaviour::Show => Ok(vec![Reward::new(0.5).feedback(show(&case).to_string()).on_call(0)]),
        }
    }
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

fn reach() -> Value {
    json!({
        "read": std::fs::read("/etc/passwd").is_ok(),
        "list": std::fs::read_dir("/").is_ok(),
        "connect": std::net::TcpStream::connect("127.0.0.1:80").is_ok(),
        "spawn": std::process::Command::new("/bin/true").spawn().is_ok(),
        "environment": std::env::vars().count(),
    })
}

fn show(case: &Case<Value, Value, Value, Value>) -> Value {
    let events: Vec<Value> = case
        .trajectory
        .iter()
        .map(|event| match event {
            Event::Llm(call) => json!({"llm": call.text, "prompt": call.prompt.len(), "index": call.index}),
            Event::Tool { name, arguments, answer } => {
                json!({"tool": name, "arguments": arguments, "answer": format!("{answer:?}")})
            }
            Event::Object { name, json } => json!({"object": name, "value": json}),
        })
        .collect();
    let ending = match &case.ending {
        Ending::Completed(value) => json!({ "completed": value }),
        Ending::Failed { kind, detail } => json!({"kind": kind, "detail": detail}),
    };
    json!({"input": case.input, "reference": case.reference, "ending": ending, "events": events})
}
