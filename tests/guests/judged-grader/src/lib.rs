//! A grader that asks a model. What it says is the reward.

use fulgurite_sdk::grader::judge::Judge;
use fulgurite_sdk::grader::{Case, Ending, Grader, GraderError, Reward};
use serde::de::IgnoredAny;

fulgurite_sdk::manifest!({ "endpoints": [{ "name": "judge", "why": "judges answers" }] });

struct Judged;

fulgurite_sdk::grader!(Judged);

impl Grader for Judged {
    type Input = IgnoredAny;
    type World = IgnoredAny;
    /// Which endpoint to ask, so that a test can ask for one that is not granted.
    type Reference = Option<String>;
    type Outcome = serde_json::Value;

    fn grade(
        case: Case<IgnoredAny, IgnoredAny, Option<String>, serde_json::Value>,
    ) -> Result<Vec<Reward>, GraderError> {
        let Ending::Completed(outcome) = case.ending else { return Ok(vec![]) };
        let endpoint = case.reference.unwrap_or_else(|| "judge".to_owned());
        let judge = Judge::new(&endpoint).system("Answer with a number.").user(&outcome.to_string()).max_tokens(8);
        let said = judge.ask().map_err(|error| GraderError::Other(error.to_string()))?;
        let value = said.trim().parse().map_err(|_| GraderError::Other(format!("the judge said {said:?}")))?;
        Ok(vec![Reward::new(value).feedback(said)])
    }
}
