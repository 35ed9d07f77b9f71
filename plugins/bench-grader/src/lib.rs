//! The grader that `fulgurite bench` measures with: 1 for the answer that the item's reference names, 0 for another one. Where
//! the reference names a modulus instead, the reward is the rest of the answer's bytes: rewards that differ within a group of
//! random answers, so that there is something to train on.

use std::num::NonZeroU8;

use fulgurite_sdk::grader::{Case, Ending, Grader, GraderError, Reward};
use serde::Deserialize;
use serde::de::IgnoredAny;

/// What the item's reference holds.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Reference {
    Answer { answer: String },
    Modulus { length_modulus: NonZeroU8 },
}

/// What the agent returns.
#[derive(Debug, Deserialize)]
struct Outcome {
    answer: String,
}

fn rest(bytes: usize, modulus: NonZeroU8) -> f64 {
    (bytes % usize::from(modulus.get())) as f64
}

struct BenchGrader;

fulgurite_sdk::grader!(BenchGrader);

impl Grader for BenchGrader {
    type Input = IgnoredAny;
    type World = IgnoredAny;
    type Reference = Reference;
    type Outcome = Outcome;

    fn grade(case: Case<IgnoredAny, IgnoredAny, Reference, Outcome>) -> Result<Vec<Reward>, GraderError> {
        let Ending::Completed(outcome) = &case.ending else { return Ok(vec![Reward::new(0.0)]) };
        let value = match case.reference {
            Reference::Answer { answer } => f64::from(u8::from(outcome.answer == answer)),
            Reference::Modulus { length_modulus } => rest(outcome.answer.len(), length_modulus),
        };
        Ok(vec![Reward::new(value)])
    }
}
