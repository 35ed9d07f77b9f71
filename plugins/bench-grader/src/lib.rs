//! The grader that `fulgurite bench` measures with: 1 for the answer that the item's reference names, 0 for another one.

use fulgurite_sdk::grader::{Case, Ending, Grader, GraderError, Reward};
use serde::Deserialize;
use serde::de::IgnoredAny;

/// What the item's reference holds.
#[derive(Debug, Deserialize)]
struct Reference {
    answer: String,
}

/// What the agent returns.
#[derive(Debug, Deserialize)]
struct Outcome {
    answer: String,
}

struct BenchGrader;

fulgurite_sdk::grader!(BenchGrader);

impl Grader for BenchGrader {
    type Input = IgnoredAny;
    type World = IgnoredAny;
    type Reference = Reference;
    type Outcome = Outcome;

    fn grade(case: Case<IgnoredAny, IgnoredAny, Reference, Outcome>) -> Result<Vec<Reward>, GraderError> {
        let right = matches!(&case.ending, Ending::Completed(outcome) if outcome.answer == case.reference.answer);
        Ok(vec![Reward::new(if right { 1.0 } else { 0.0 })])
    }
}
