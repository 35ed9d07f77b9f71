//! What the prebuilt grader and the prebuilt tool do.

use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_runner::RolloutResult;
use serde_json::json;

use crate::bench::{expect, limits};
use crate::case::{Case, Expected};

pub(crate) fn cases() -> Vec<Case> {
    let graders = nasty_grader::Behaviour::ALL.iter().flat_map(|behaviour| grader(*behaviour));
    let tools = nasty_tool::Behaviour::ALL.iter().flat_map(|behaviour| tool(*behaviour));
    let openings = nasty_tool::Opening::ALL.iter().map(|opening| opened(*opening));
    graders.chain(tools).chain(openings).chain(born()).collect()
}

/// Tools that never come to life. They come first: before the agent there is, and before the grader sees the world.
fn born() -> Vec<Case> {
    let ends = Ends(OutcomeKind::ToolFault);
    let healthy = nasty_agent::Input::new(nasty_agent::Behaviour::Healthy);
    let case = |name, expected| Case::agent(name, &healthy, expected);
    vec![
        case("huge-world", ends.memory()).with_world(json!("x".repeat(5 << 20))),
        case("no-memory-for-the-tool", ends.limit("memory_bytes_max", 1 << 16))
            .with_limits(|limits| limits.memory_bytes_max = 1 << 16),
        case("no-table-for-the-tool", ends.limit("table_elements_max", 1))
            .with_limits(|limits| limits.table_elements_max = 1),
    ]
}

/// What a plugin can do to itself, whichever kind it is.
struct Ends(OutcomeKind);

impl Ends {
    fn fault(&self, says: &'static str) -> Expected {
        Expected::ends(self.0, says)
    }

    fn limit(&self, name: &'static str, value: u64) -> Expected {
        Expected::limit(self.0, name, value)
    }

    fn cpu(&self) -> Expected {
        self.limit("guest_cpu_ms_max", limits().guest_cpu_ms_max)
    }

    fn memory(&self) -> Expected {
        self.limit("memory_bytes_max", limits().memory_bytes_max)
    }

    fn stack(&self) -> Expected {
        self.limit("stack_bytes_max", Limits::default().stack_bytes_max)
    }

    fn output(&self) -> Expected {
        self.limit("output_bytes_max", limits().output_bytes_max)
    }

    fn payload(&self) -> Expected {
        self.limit("payload_bytes_max", limits().payload_bytes_max)
    }
}

fn grader(behaviour: nasty_grader::Behaviour) -> Vec<Case> {
    use nasty_grader::Behaviour;
    let ends = Ends(OutcomeKind::GraderFault);
    let expected = match behaviour {
        Behaviour::Nan => ends.fault("`style` is NaN"),
        Behaviour::Infinite => ends.fault("`reward` is inf"),
        Behaviour::MinusInfinite => ends.fault("`reward` is -inf"),
        Behaviour::Loop => ends.cpu(),
        Behaviour::Memory => ends.memory(),
        Behaviour::Recursion => ends.stack(),
        Behaviour::Trap => ends.fault("on purpose"),
        Behaviour::TrapInDrop => ends.fault("dropped on purpose"),
        Behaviour::Exit => ends.fault("exit"),
        Behaviour::OutputFlood => ends.output(),
        Behaviour::Many => ends.limit("rewards_max", limits().rewards_max),
        Behaviour::Flood | Behaviour::HugeFeedback => ends.payload(),
        Behaviour::Nameless => ends.fault("0 bytes"),
        Behaviour::LongName => ends.fault("65 bytes"),
        Behaviour::ForgedCall => Expected::completes(),
        Behaviour::Refuse => ends.fault("no field `answer`"),
        Behaviour::Reach => Expected::completes().and(|result| {
            let feedback = result.attempt.rewards.first().and_then(|reward| reward.feedback.clone());
            reached_nothing(&feedback.unwrap_or_default())
        }),
        // Well-behaved: the sandbox's own suite looks at what it gives back.
        Behaviour::Show => return vec![],
    };
    vec![Case::grader(json!(behaviour).as_str().unwrap(), behaviour, expected)]
}

fn tool(behaviour: nasty_tool::Behaviour) -> Vec<Case> {
    use nasty_tool::Behaviour;
    let ends = Ends(OutcomeKind::ToolFault);
    let expected = match behaviour {
        Behaviour::Loop | Behaviour::Sleep => ends.cpu(),
        Behaviour::Trap => ends.fault("on purpose"),
        Behaviour::Exit => ends.fault("exit"),
        Behaviour::Memory => ends.memory(),
        Behaviour::Recursion => ends.stack(),
        Behaviour::Huge => ends.payload(),
        Behaviour::OutputFlood => ends.output(),
        Behaviour::Reach => Expected::completes().and(|result: &RolloutResult| {
            let answers: serde_json::Value =
                serde_json::from_str(&result.outcome.output).map_err(|error| error.to_string())?;
            reached_nothing(&answers[1]["ok"].to_string())
        }),
        // The agent sees the error and goes on.
        Behaviour::Fail => Expected::completes(),
        // Well-behaved: the sandbox's own suite looks at them.
        Behaviour::Echo | Behaviour::Count | Behaviour::World | Behaviour::Refuse => return vec![],
    };
    vec![Case::tool(json!(behaviour).as_str().unwrap(), behaviour, expected)]
}

fn opened(opening: nasty_tool::Opening) -> Case {
    use nasty_tool::Opening;
    let ends = Ends(OutcomeKind::ToolFault);
    let expected = match opening {
        Opening::Trap => ends.fault("on purpose"),
        Opening::Loop => ends.cpu(),
        Opening::Memory => ends.memory(),
        Opening::Refuse => ends.fault("no field `rooms`"),
        Opening::Flood => ends.payload(),
        // A store is dropped without asking the guest.
        Opening::TrapInDrop => Expected::completes(),
    };
    Case::opening(json!(opening).as_str().unwrap(), opening, expected)
}

fn reached_nothing(found: &str) -> Result<(), String> {
    let nothing = json!({"read": false, "list": false, "connect": false, "spawn": false, "environment": 0});
    let found: serde_json::Value = serde_json::from_str(found).map_err(|error| format!("{found:?}: {error}"))?;
    expect(found == nothing, || format!("it found {found}"))
}
