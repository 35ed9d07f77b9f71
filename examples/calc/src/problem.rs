//! Word problems with two steps, and the splits they belong to.

use std::collections::BTreeSet;

use example_data::Split;
use fulgurite_core::seed::{Generator, Seed};
use serde::{Deserialize, Serialize};

/// Steps of a problem.
pub const STEPS: usize = 2;
/// Numbers that a problem may begin with.
const START: std::ops::RangeInclusive<usize> = 2..=60;
/// Numbers that a step may name: the same for every operation, so that they do not tell which one it is.
const OPERAND: std::ops::RangeInclusive<usize> = 2..=9;
/// Largest number that may come out of a step. 99: every number is one token of a small vocabulary.
const RESULT_MAX: u32 = 99;

const NAMES: [&str; 6] = ["Ann", "Ben", "Eva", "Kim", "Leo", "Mia"];
const THINGS: [&str; 5] = ["apples", "cards", "coins", "shells", "stamps"];

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// `+`.
    Add,
    /// `-`.
    Subtract,
    /// `*`.
    Multiply,
    /// `/`, without rest.
    Divide,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 4] = [Self::Add, Self::Subtract, Self::Multiply, Self::Divide];

    /// How an expression writes it.
    #[must_use]
    pub const fn sign(self) -> char {
        match self {
            Self::Add => '+',
            Self::Subtract => '-',
            Self::Multiply => '*',
            Self::Divide => '/',
        }
    }

    /// What it is taken for by those who demonstrate: what makes more for what makes more, what makes less for what makes less.
    #[must_use]
    pub const fn mistaken(self) -> Self {
        match self {
            Self::Add => Self::Multiply,
            Self::Subtract => Self::Divide,
            Self::Multiply => Self::Add,
            Self::Divide => Self::Subtract,
        }
    }

    /// The result, where it is a whole number from 1 to 99.
    #[must_use]
    pub fn apply(self, left: u32, right: u32) -> Option<u32> {
        let result = match self {
            Self::Add => left.checked_add(right),
            Self::Subtract => left.checked_sub(right),
            Self::Multiply => left.checked_mul(right),
            Self::Divide => left.checked_div(right).filter(|result| result * right == left),
        };
        result.filter(|result| (1..=RESULT_MAX).contains(result))
    }

    /// How people say it; `#` stands for the number.
    const fn phrases(self) -> [&'static str; 3] {
        match self {
            Self::Add => ["finds # more", "buys # more", "is given #"],
            Self::Subtract => ["loses #", "eats #", "gives # away"],
            Self::Multiply => ["gets # times as many", "trades each for #", "fills # boxes like that"],
            Self::Divide => ["shares them among #", "keeps one in #", "trades every # for one"],
        }
    }
}

/// What makes two problems the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    /// The number that it begins with.
    pub start: u32,
    /// What is done to it, in order.
    pub steps: [(Operation, u32); STEPS],
}

impl Problem {
    /// The part of the data that the problem belongs to: a hash of it and of nothing else, not even the seed.
    #[must_use]
    pub fn split(&self) -> Split {
        let seed = Seed::new(u64::from(self.start)).child("problem");
        let step = |seed: Seed, (operation, operand): &(Operation, u32)| {
            seed.child_index(operation.sign() as u64).child_index(u64::from(*operand))
        };
        Split::of(self.steps.iter().fold(seed, step))
    }

    /// The answer, when every step has a result.
    #[must_use]
    pub fn answer(&self) -> Option<u32> {
        self.steps.iter().try_fold(self.start, |value, (operation, operand)| operation.apply(value, *operand))
    }

    /// Draws a problem of a split that has an answer.
    pub(crate) fn draw(split: Split, generator: &mut Generator) -> Self {
        loop {
            let start = number(&START, generator);
            let steps = [(); STEPS].map(|()| (pick(&Operation::ALL, generator), number(&OPERAND, generator)));
            let problem = Self { start, steps };
            if problem.split() == split && problem.answer().is_some() {
                return problem;
            }
        }
    }

    /// The problem in words.
    pub(crate) fn text(&self, generator: &mut Generator) -> String {
        let (name, things) = (pick(&NAMES, generator), pick(&THINGS, generator));
        let mut say = |(operation, operand): (Operation, u32)| {
            pick(&operation.phrases(), generator).replace('#', &operand.to_string())
        };
        let [first, second] = self.steps.map(&mut say);
        format!("{name} has {} {things}, {first}, then {second}. How many?", self.start)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "ranges of small numbers")]
fn number(range: &std::ops::RangeInclusive<usize>, generator: &mut Generator) -> u32 {
    (range.start() + generator.below(range.end() - range.start() + 1)) as u32
}

/// One of a list that is not empty.
#[expect(clippy::indexing_slicing, reason = "below its length")]
pub(crate) fn pick<T: Copy>(list: &[T], generator: &mut Generator) -> T {
    list[generator.below(list.len())]
}

/// What the agent sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// The problem, as a person would tell it.
    pub problem: String,
}

/// What tool and grader see: nothing. A calculator needs to know nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct World {}

/// What the grader alone sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Reference {
    /// The right answer.
    pub answer: u32,
}

/// An item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Item {
    /// Its id.
    pub id: String,
    /// What the agent sees.
    pub input: Input,
    /// What tool and grader see.
    pub world: World,
    /// What the grader alone sees.
    pub reference: Reference,
    /// Where it comes from; not written.
    #[serde(skip)]
    pub problem: Problem,
}

/// Draws the items of a split. Their ids are `{prefix}-{number}`. What is held out has every problem once at most.
#[must_use]
pub fn items(split: Split, prefix: &str, count: usize, seed: Seed) -> Vec<Item> {
    let mut generator = Generator::new(seed);
    let mut drawn = BTreeSet::new();
    let mut items = Vec::with_capacity(count);
    while items.len() < count {
        let problem = Problem::draw(split, &mut generator);
        if let Some(answer) = problem.answer()
            && (split == Split::Train || drawn.insert(problem))
        {
            let input = Input { problem: problem.text(&mut generator) };
            let (id, reference) = (format!("{prefix}-{:05}", items.len()), Reference { answer });
            items.push(Item { id, input, world: World {}, reference, problem });
        }
    }
    items
}
