//! A tool that misbehaves on request: in a call, by the name that is called, and when it is opened, by the field `open` of
//! the item's world.
#![allow(clippy::panic, reason = "misbehaviour is the purpose")]

#[macro_use]
#[path = "../../../behaviours.rs"]
mod behaviours;

use std::hint::black_box;
use std::time::Duration;

use fulgurite_sdk::tool::{Arguments, InvalidWorld, Tool, ToolError};
use fulgurite_sdk::{ToolSpec, Value, json};

behaviours! {
    /// What the tool can do in a call.
    Behaviour {
        /// Answers its arguments.
        Echo,
        /// Answers the number of the call.
        Count,
        /// Answers what it was opened with.
        World,
        /// Never returns.
        Loop,
        /// Sleeps for a year, again and again.
        Sleep,
        /// Panics.
        Trap,
        /// Leaves with an exit code.
        Exit,
        /// Takes memory for ever.
        Memory,
        /// Recurses for ever.
        Recursion,
        /// Answers a million letters.
        Huge,
        /// Prints for ever.
        OutputFlood,
        /// Looks for files, network and programs.
        Reach,
        /// Fails in its own way.
        Fail,
        /// Refuses its arguments.
        Refuse,
    }
}

behaviours! {
    /// What the tool can do when it is opened.
    Opening {
        /// Panics.
        Trap,
        /// Never returns.
        Loop,
        /// Takes memory for ever.
        Memory,
        /// Says that the world is not what it expects.
        Refuse,
        /// Offers twenty thousand tools.
        Flood,
        /// Opens, and panics when it is dropped.
        TrapInDrop,
    }
}

struct Nasty {
    world: Value,
    seed: u64,
    calls: u64,
    opening: Option<Opening>,
}

fulgurite_sdk::tool!(Nasty);

impl Tool for Nasty {
    type World = Value;

    fn open(world: Value, seed: u64) -> Result<Self, InvalidWorld> {
        let opening = world.get("open").cloned().and_then(|name| serde_json::from_value(name).ok());
        match opening {
            Some(Opening::Refuse) => return Err(InvalidWorld("no field `rooms`".to_owned())),
            Some(Opening::Trap) => panic!("on purpose"),
            Some(Opening::Loop) => loop {
                black_box(());
            },
            Some(Opening::Memory) => memory(),
            Some(Opening::Flood | Opening::TrapInDrop) | None => {}
        }
        Ok(Self { world, seed, calls: 0, opening })
    }

    fn list(&self) -> Vec<ToolSpec> {
        let spec = |name: &str| ToolSpec::new(name, "Does what its name says.", &json!({"type": "object"}));
        if self.opening == Some(Opening::Flood) {
            return vec![spec("again"); 20_000];
        }
        let name = |behaviour: &Behaviour| json!(behaviour).as_str().unwrap_or_default().to_owned();
        Behaviour::ALL.iter().map(|behaviour| spec(&name(behaviour))).collect()
    }

    fn call(&mut self, name: &str, arguments: &Arguments) -> Result<Value, ToolError> {
        self.calls += 1;
        let Ok(behaviour) = serde_json::from_value(json!(name)) else {
            return Err(ToolError::UnknownTool(name.to_owned()));
        };
        match behaviour {
            Behaviour::Echo => Ok(arguments.parse::<Value>()?),
            Behaviour::Count => Ok(json!(self.calls)),
            Behaviour::World => Ok(json!({"world": self.world, "seed": self.seed})),
            Behaviour::Loop => loop {
                black_box(());
            },
            Behaviour::Sleep => loop {
                std::thread::sleep(Duration::from_hours(365 * 24));
            },
            Behaviour::Trap => panic!("on purpose"),
            Behaviour::Exit => std::process::exit(3),
            Behaviour::Memory => memory(),
            Behaviour::Recursion => Ok(json!(recurse(0))),
            Behaviour::Huge => Ok(json!("x".repeat(1 << 20))),
            Behaviour::OutputFlood => loop {
                println!("again and again and again");
            },
            Behaviour::Reach => Ok(reach()),
            Behaviour::Fail => Err(ToolError::Failed("out of order".to_owned())),
            Behaviour::Refuse => Err(ToolError::InvalidArguments("`text` is missing".to_owned())),
        }
    }
}

impl Drop for Nasty {
    fn drop(&mut self) {
        assert!(self.opening != Some(Opening::TrapInDrop), "dropped on purpose");
    }
}

fn memory() -> ! {
    let mut held: Vec<Vec<u8>> = vec![];
    loop {
        held.push(black_box(vec![1; 1 << 20]));
    }
}

#[expect(unconditional_recursion, reason = "the point of it")]
fn recurse(depth: u64) -> u64 {
    black_box(recurse(black_box(depth + 1))) + 1
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
