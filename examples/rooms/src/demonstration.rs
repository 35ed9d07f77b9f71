//! Noisy demonstrations: the right format, mostly not the right room.

use example_data::{Demonstration, DemonstrationReference, Message, Split};
use fulgurite_core::seed::{Generator, Seed};

use crate::item::{Input, Request};

/// In so many of a hundred demonstrations the booked room is the best one; in the others it is another listed one.
pub const BEST_SHARE_PERCENT: usize = 40;

pub(crate) fn demonstrations(count: usize, seed: Seed) -> Vec<Demonstration<Input>> {
    let mut generator = Generator::new(seed);
    (0..count).map(|number| draw(format!("demonstration-{number:05}"), &mut generator)).collect()
}

fn draw(id: String, generator: &mut Generator) -> Demonstration<Input> {
    let Request { combination, time, text } = Request::draw(Split::Train, generator);
    let mut listed = combination.free_ids();
    generator.shuffle(&mut listed);
    let best = combination.fitting().first().map_or("", |room| room.id);
    let booked = if generator.below(100) < BEST_SHARE_PERCENT {
        best
    } else {
        let others: Vec<_> = listed.iter().copied().filter(|room| *room != best).collect();
        others.get(generator.below(others.len())).copied().unwrap_or(best)
    };
    let messages = vec![
        Message::say("user", text.clone()),
        Message::call("free_rooms", serde_json::json!({"time": time})),
        Message::say("tool", listed.join(" ")),
        Message::say("assistant", booked),
    ];
    Demonstration { id, input: Input { request: text }, reference: DemonstrationReference { messages } }
}
