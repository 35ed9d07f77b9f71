//! A tool that misbehaves on request.
#![allow(clippy::panic, reason = "misbehaviour is the purpose")]

use std::hint::black_box;

use fulgurite_sdk::tool::{Arguments, InvalidWorld, Tool, ToolError};
use fulgurite_sdk::{ToolSpec, Value, json};

struct Nasty {
    world: Value,
    seed: u64,
    calls: u64,
}

fulgurite_sdk::tool!(Nasty);

impl Tool for Nasty {
    type World = Value;

    fn open(world: Value, seed: u64) -> Result<Self, InvalidWorld> {
        match world.get("open").and_then(Value::as_str) {
            Some("refuse") => Err(InvalidWorld("no field `rooms`".to_owned())),
            Some("trap") => panic!("on purpose"),
            _ => Ok(Self { world, seed, calls: 0 }),
        }
    }

    fn list(&self) -> Vec<ToolSpec> {
        let names = ["echo", "count", "world", "loop", "trap", "memory", "huge", "fail", "refuse"];
        names.map(|name| ToolSpec::new(name, "Does what its name says.", &json!({"type": "object"}))).to_vec()
    }

    fn call(&mut self, name: &str, arguments: &Arguments) -> Result<Value, ToolError> {
        self.calls += 1;
        match name {
            "echo" => Ok(arguments.parse::<Value>()?),
            "count" => Ok(json!(self.calls)),
            "world" => Ok(json!({"world": self.world, "seed": self.seed})),
            "loop" => loop {
                black_box(());
            },
            "trap" => panic!("on purpose"),
            "memory" => {
                let mut held: Vec<Vec<u8>> = vec![];
                loop {
                    held.push(black_box(vec![1; 1 << 20]));
                }
            }
            "huge" => Ok(json!("x".repeat(8 << 20))),
            "fail" => Err(ToolError::Failed("out of order".to_owned())),
            "refuse" => Err(ToolError::InvalidArguments("`text` is missing".to_owned())),
            other => Err(ToolError::UnknownTool(other.to_owned())),
        }
    }
}
