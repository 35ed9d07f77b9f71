//! Noisy demonstrations: the right format, often not the right operation.

use example_data::{Demonstration, DemonstrationReference, Message, Split};
use fulgurite_core::seed::{Generator, Seed};
use serde_json::json;

use crate::problem::{Input, Operation, Problem, pick};

/// In so many of a hundred steps of demonstrations the operation is the right one; in the others it is the one that it is taken
/// for ([`Operation::mistaken`]), where that has a whole result too. Whoever imitates them gets such steps wrong, and the answer with them.
pub const RIGHT_SHARE_PERCENT: usize = 23;

pub(crate) fn demonstrations(count: usize, seed: Seed) -> Vec<Demonstration<Input>> {
    let mut generator = Generator::new(seed);
    (0..count).map(|number| draw(format!("demonstration-{number:05}"), &mut generator)).collect()
}

fn draw(id: String, generator: &mut Generator) -> Demonstration<Input> {
    let problem = Problem::draw(Split::Train, generator);
    let text = problem.text(generator);
    let mut messages = vec![Message::say("user", text.clone())];
    let mut value = problem.start;
    for (right, operand) in problem.steps {
        let (operation, result) = choose(right, value, operand, generator);
        let expression = format!("{value}{}{operand}", operation.sign());
        messages.push(Message::call("calculate", json!({"expression": expression})));
        messages.push(Message::say("tool", result.to_string()));
        value = result;
    }
    messages.push(Message::say("assistant", value.to_string()));
    Demonstration { id, input: Input { problem: text }, reference: DemonstrationReference { messages } }
}

/// An operation and its result. Where one of the two has no whole result it is the other one; where neither has one, any that
/// has: what is too large to be added to can be subtracted from.
fn choose(right: Operation, value: u32, operand: u32, generator: &mut Generator) -> (Operation, u32) {
    let result = |operation: Operation| Some((operation, operation.apply(value, operand)?));
    let is_right = generator.below(100) < RIGHT_SHARE_PERCENT;
    let [first, second] = if is_right { [right, right.mistaken()] } else { [right.mistaken(), right] };
    result(first).or_else(|| result(second)).unwrap_or_else(|| {
        let others: Vec<_> = Operation::ALL.into_iter().filter_map(result).collect();
        pick(&others, generator)
    })
}
