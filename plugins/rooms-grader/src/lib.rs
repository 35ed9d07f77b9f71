//! Judges a booked room: 1 for the best one, 0.3 for one that merely fits, 0 for a wrong one and for a malformed answer.

use fulgurite_sdk::grader::{Case, Ending, Grader, GraderError, Reward};
use serde::Deserialize;
use serde::de::IgnoredAny;

/// Reward of the best room.
const BEST: f64 = 1.0;
/// Reward of a room that fits but is not the best.
const FITS: f64 = 0.3;
/// Reward of everything else.
const WRONG: f64 = 0.0;

/// The right answers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reference {
    /// The smallest free room that fits.
    best: String,
    /// Every free room that fits, the best one included.
    fits: Vec<String>,
}

/// What the agent returns.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Booking {
    room: String,
}

struct RoomsGrader;

impl Grader for RoomsGrader {
    type Input = IgnoredAny;
    type World = IgnoredAny;
    type Reference = Reference;
    type Outcome = Booking;

    fn grade(case: Case<IgnoredAny, IgnoredAny, Reference, Booking>) -> Result<Vec<Reward>, GraderError> {
        let Reference { best, fits } = case.reference;
        if !fits.contains(&best) {
            return Err(GraderError::InvalidItem(format!("reference.fits: the best room {best} is not in it")));
        }
        Ok(vec![match case.ending {
            Ending::Completed(Booking { room }) => judge(&room, &best, &fits),
            Ending::Failed { kind, detail } => Reward::new(WRONG).feedback(format!("{kind}: {detail}")),
        }])
    }
}

fn judge(room: &str, best: &str, fits: &[String]) -> Reward {
    if room == best {
        Reward::new(BEST).feedback(format!("{room} is the best room"))
    } else if fits.iter().any(|fitting| fitting == room) {
        Reward::new(FITS).feedback(format!("{room} fits, but the smaller {best} is free too"))
    } else {
        Reward::new(WRONG).feedback(format!("{room} is not free, too small, or lacks something; {best} was best"))
    }
}

fulgurite_sdk::grader!(RoomsGrader);

#[cfg(test)]
mod tests {
    use super::*;

    fn grade(ending: Ending<Booking>) -> Result<Vec<Reward>, GraderError> {
        let reference = Reference { best: "R07".into(), fits: vec!["R07".into(), "R02".into()] };
        let case =
            Case { input: IgnoredAny, world: IgnoredAny, reference, ending, trajectory: vec![], attributes: vec![] };
        RoomsGrader::grade(case)
    }

    #[test]
    fn best_fitting_wrong_and_malformed() {
        let of = |room: &str| grade(Ending::Completed(Booking { room: room.into() })).unwrap()[0].value;
        assert_eq!([of("R07"), of("R02"), of("R01"), of("")].map(f64::to_bits), [1.0, 0.3, 0.0, 0.0].map(f64::to_bits));
        let failed = Ending::Failed { kind: "malformed-answer".into(), detail: "answered no room id".into() };
        let reward = grade(failed).unwrap().remove(0);
        assert_eq!(reward.value.to_bits(), 0.0_f64.to_bits());
        assert!(reward.feedback.unwrap().contains("malformed-answer"));
    }

    #[test]
    fn a_reference_that_contradicts_itself_is_no_grade() {
        let reference = Reference { best: "R07".into(), fits: vec![] };
        let ending = Ending::Completed(Booking { room: "R07".into() });
        let case =
            Case { input: IgnoredAny, world: IgnoredAny, reference, ending, trajectory: vec![], attributes: vec![] };
        assert!(matches!(RoomsGrader::grade(case), Err(GraderError::InvalidItem(_))));
    }
}
