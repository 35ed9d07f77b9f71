//! What the example promises about its data.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests")]

use std::collections::BTreeSet;

use fulgurite_core::seed::Seed;
use rooms_data::{BUILDING, Combination, Data, FREE_ROOMS, Item, generate};

/// What the grader gives to a room that merely fits.
const FITS_REWARD: f64 = 0.3;

fn data() -> Data {
    generate(Seed::new(0))
}

/// Every combination that has an item, weighted as items are drawn.
fn uniform_reward(items: &[Item]) -> f64 {
    let of = |item: &Item| (1.0 + FITS_REWARD * (item.reference.fits.len() as f64 - 1.0)) / FREE_ROOMS as f64;
    items.iter().map(of).sum::<f64>() / items.len() as f64
}

#[test]
fn the_same_seed_makes_the_same_bytes_and_another_one_does_not() {
    let bytes = |seed| {
        let data = generate(Seed::new(seed));
        serde_json::to_string(&(data.train, data.val, data.test, data.demonstrations)).unwrap()
    };
    assert_eq!(bytes(0), bytes(0));
    assert_ne!(bytes(0), bytes(1));
}

#[test]
fn held_out_combinations_never_occur_in_training() {
    let data = data();
    let set = |items: &[Item]| items.iter().map(|item| item.combination.clone()).collect::<BTreeSet<Combination>>();
    let (train, val, test) = (set(&data.train), set(&data.val), set(&data.test));
    assert!(train.is_disjoint(&val) && train.is_disjoint(&test) && val.is_disjoint(&test));
    assert_eq!((val.len(), test.len()), (data.val.len(), data.test.len()), "a held-out combination is asked twice");
    // Demonstrations too: what they list and ask for is a combination of the training part.
    for demonstration in &data.demonstrations {
        let combination = parse(&demonstration.input.request, &demonstration.reference.messages[2].content);
        assert!(!val.contains(&combination) && !test.contains(&combination), "{combination:?}");
    }
}

/// Reads a combination back from texts, independently of how they were made.
fn parse(request: &str, listed: &str) -> Combination {
    let words: Vec<&str> = request.split(' ').collect();
    let people = words.iter().position(|word| *word == "people" || *word == "person").unwrap();
    let needs = rooms_data::Feature::ALL.into_iter().filter(|feature| words.contains(&feature.name())).collect();
    let place = |id: &str| BUILDING.iter().position(|room| room.id == id).unwrap();
    let mut free: Vec<_> = listed.split(' ').map(place).collect();
    free.sort_unstable();
    Combination { people: words[people - 1].parse().unwrap(), needs, free }
}

#[test]
fn no_blind_choice_is_worth_more_than_a_third() {
    let data = data();
    for items in [&data.train, &data.val, &data.test] {
        // The tool shuffles, so taking the first is a uniform choice.
        let uniform = uniform_reward(items);
        assert!(uniform <= 0.35, "uniform choice gets {uniform}");
    }
    // Neither does an order of the building: the rooms stand in the world in the order of their ids.
    let first = |item: &&Item| item.world.free.values().any(|free| free[0] == item.reference.best);
    assert!(data.test.iter().filter(first).count() < data.test.len());
}

#[test]
fn every_item_has_one_best_room_that_is_free_and_fits() {
    let data = data();
    let seats: BTreeSet<_> = BUILDING.iter().map(|room| room.seats).collect();
    assert_eq!(seats.len(), BUILDING.len(), "two rooms seat equally many");
    for item in data.train.iter().chain(&data.val).chain(&data.test) {
        let fits = item.combination.fitting();
        assert_eq!(item.reference.best, fits[0].id);
        assert_eq!(item.reference.fits, fits.iter().map(|room| room.id).collect::<Vec<_>>());
        assert!(item.world.free.values().any(|free| *free == item.combination.free_ids()));
        let time = item.input.request.split(' ').find(|word| word.contains(':')).unwrap();
        let free = item.world.free[time].join(" ");
        assert_eq!(parse(&item.input.request, &free), item.combination, "{}", item.input.request);
    }
}

#[test]
fn demonstrations_have_the_right_format_and_forty_percent_of_them_the_best_room() {
    let data = data();
    let mut best = 0;
    for demonstration in &data.demonstrations {
        let [user, call, tool, answer] = &demonstration.reference.messages[..] else { panic!("four messages") };
        assert_eq!([user.role, call.role, tool.role, answer.role], ["user", "assistant", "tool", "assistant"]);
        assert_eq!(user.content, demonstration.input.request);
        assert_eq!(call.tool_calls.len(), 1);
        assert!(user.content.contains(call.tool_calls[0].arguments["time"].as_str().unwrap()));
        assert!(tool.content.split(' ').any(|room| room == answer.content));
        let combination = parse(&user.content, &tool.content);
        best += u32::from(combination.fitting()[0].id == answer.content);
    }
    let share = f64::from(best) / data.demonstrations.len() as f64;
    assert!((0.375..0.425).contains(&share), "{share}");
}
