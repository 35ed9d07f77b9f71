//! Judges the answer to a word problem: 1 for the right number, 0 for another one and for a malformed answer.

use fulgurite_sdk::grader::{Case, Ending, Grader, GraderError, Reward};
use serde::Deserialize;
use serde::de::IgnoredAny;

/// What the agent returns, and the right answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    answer: i64,
}

struct CalcGrader;

impl Grader for CalcGrader {
    type Input = IgnoredAny;
    type World = IgnoredAny;
    type Reference = Answer;
    type Outcome = Answer;

    fn grade(case: Case<IgnoredAny, IgnoredAny, Answer, Answer>) -> Result<Vec<Reward>, GraderError> {
        let right = case.reference.answer;
        Ok(vec![match case.ending {
            Ending::Completed(Answer { answer }) if answer == right => {
                Reward::new(1.0).feedback(format!("{answer} is right"))
            }
            Ending::Completed(Answer { answer }) => {
                Reward::new(0.0).feedback(format!("{answer} is wrong, it is {right}"))
            }
            Ending::Failed { kind, detail } => Reward::new(0.0).feedback(format!("{kind}: {detail}")),
        }])
    }
}

fulgurite_sdk::grader!(CalcGrader);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn right_wrong_and_malformed() {
        let grade = |ending| {
            let (input, world) = (IgnoredAny, IgnoredAny);
            let reference = Answer { answer: 14 };
            let case = Case { input, world, reference, ending, trajectory: vec![], attributes: vec![] };
            CalcGrader::grade(case).unwrap().remove(0)
        };
        assert_eq!(grade(Ending::Completed(Answer { answer: 14 })).value.to_bits(), 1.0_f64.to_bits());
        assert_eq!(grade(Ending::Completed(Answer { answer: -14 })).value.to_bits(), 0.0_f64.to_bits());
        let failed = Ending::Failed { kind: "malformed-answer".into(), detail: "answered no whole number".into() };
        let reward = grade(failed);
        assert_eq!(reward.value.to_bits(), 0.0_f64.to_bits());
        assert!(reward.feedback.unwrap().contains("malformed-answer"));
    }
}
