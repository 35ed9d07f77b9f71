//! A grader that misbehaves when the item's world says so.
#![allow(clippy::panic, reason = "misbehaviour is the purpose")]

use std::hint::black_box;

use fulgurite_sdk::grader::{Case, Ending, Event, Grader, GraderError, Reward};
use fulgurite_sdk::{Value, json};

struct Nasty;

fulgurite_sdk::grader!(Nasty);

impl Grader for Nasty {
    type Input = Value;
    type World = String;
    type Reference = Value;
    type Outcome = Value;

    fn grade(case: Case<Value, String, Value, Value>) -> Result<Vec<Reward>, GraderError> {
        match case.world.as_str() {
            "nan" => Ok(vec![Reward::new(1.0), Reward::new(f64::NAN).dimension("style")]),
            "infinite" => Ok(vec![Reward::new(f64::INFINITY)]),
            "loop" => loop {
                black_box(());
            },
            "memory" => {
                let mut held: Vec<Vec<u8>> = vec![];
                loop {
                    held.push(black_box(vec![1; 1 << 20]));
                }
            }
            "trap" => panic!("on purpose"),
            "many" => Ok(vec![Reward::new(0.0); 1_000]),
            "nameless" => Ok(vec![Reward::new(0.0).dimension("")]),
            "refuse" => Err(GraderError::InvalidItem("no field `answer`".to_owned())),
            // Everything that it was given, as feedback.
            "show" => Ok(vec![Reward::new(0.5).feedback(show(&case).to_string()).on_call(0)]),
            _ => Ok(vec![Reward::new(1.0)]),
        }
    }
}

fn show(case: &Case<Value, String, Value, Value>) -> Value {
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
