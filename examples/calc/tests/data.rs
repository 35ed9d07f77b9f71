//! What the example promises about its data.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests")]

use std::collections::BTreeSet;

use calc_data::{Data, Item, Operation, Problem, RIGHT_SHARE_PERCENT, generate};
use fulgurite_core::seed::Seed;

fn data() -> Data {
    generate(Seed::new(0))
}

/// Reads a problem back from its words, independently of how they were made.
fn parse(text: &str) -> Problem {
    let said = [
        (Operation::Add, &["finds", "buys", "given"][..]),
        (Operation::Subtract, &["loses", "eats", "gives"]),
        (Operation::Multiply, &["gets", "trades each", "fills"]),
        (Operation::Divide, &["shares", "keeps", "trades every"]),
    ];
    let parts: Vec<&str> = text.strip_suffix(". How many?").unwrap().split(", ").collect();
    let number = |part: &str| part.split(' ').find_map(|word| word.parse().ok()).unwrap();
    let step = |part: &str| {
        let means = |words: &&(Operation, &[&str])| words.1.iter().any(|word| part.contains(word));
        (said.iter().find(means).unwrap().0, number(part))
    };
    assert_eq!(parts.len(), 3, "{text}");
    Problem { start: number(parts[0]), steps: [step(parts[1]), step(parts[2].strip_prefix("then ").unwrap())] }
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
fn words_numbers_and_answers_belong_together() {
    let data = data();
    for item in data.train.iter().chain(&data.val).chain(&data.test) {
        assert_eq!(parse(&item.input.problem), item.problem);
        assert_eq!(item.problem.answer(), Some(item.reference.answer));
    }
}

#[test]
fn held_out_problems_never_occur_in_training() {
    let data = data();
    let set = |items: &[Item]| items.iter().map(|item| item.problem).collect::<BTreeSet<Problem>>();
    let (train, val, test) = (set(&data.train), set(&data.val), set(&data.test));
    assert!(train.is_disjoint(&val) && train.is_disjoint(&test) && val.is_disjoint(&test));
    assert_eq!((val.len(), test.len()), (data.val.len(), data.test.len()), "a held-out problem is asked twice");
    for demonstration in &data.demonstrations {
        let problem = parse(&demonstration.input.problem);
        assert!(!val.contains(&problem) && !test.contains(&problem), "{problem:?}");
    }
}

#[test]
fn demonstrations_mistake_one_operation_for_another() {
    let data = data();
    let sign = |demonstration: usize, step: usize| {
        let call = &data.demonstrations[demonstration].reference.messages[1 + 2 * step].tool_calls[0];
        let expression = call.arguments["expression"].as_str().unwrap();
        expression.chars().find(|c| !c.is_ascii_digit()).unwrap()
    };
    for right in Operation::ALL {
        let (mut asked, mut found, mut mistaken) = (0_usize, 0_usize, 0_usize);
        for (place, demonstration) in data.demonstrations.iter().enumerate() {
            let problem = parse(&demonstration.input.problem);
            let (operation, operand) = problem.steps[0];
            // Where the other one has no whole result there is nothing to mistake.
            if operation == right && right.mistaken().apply(problem.start, operand).is_some() {
                asked += 1;
                found += usize::from(sign(place, 0) == right.sign());
                mistaken += usize::from(sign(place, 0) == right.mistaken().sign());
            }
        }
        let share = 100 * found / asked;
        assert_eq!(found + mistaken, asked);
        assert!(share.abs_diff(RIGHT_SHARE_PERCENT) <= 6, "{right:?}: {share} % of {asked}");
    }
}

#[test]
fn every_operation_is_asked_for_and_no_answer_is_common() {
    let data = data();
    for operation in Operation::ALL {
        let asked = data.test.iter().flat_map(|item| item.problem.steps).filter(|step| step.0 == operation).count();
        assert!(asked * 10 > data.test.len(), "{operation:?}: {asked}");
    }
    let mut answers = std::collections::BTreeMap::new();
    for item in &data.test {
        *answers.entry(item.reference.answer).or_insert(0_usize) += 1;
    }
    assert!(answers.values().all(|count| count * 20 < data.test.len()), "{answers:?}");
}
