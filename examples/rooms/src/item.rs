//! Items and the splits they belong to.

use std::collections::{BTreeMap, BTreeSet};

use example_data::Split;
use fulgurite_core::seed::{Generator, Seed};
use serde::{Deserialize, Serialize};

use crate::building::{BUILDING, Feature, Room};

/// Rooms that are free at a time.
pub const FREE_ROOMS: usize = 4;
/// Numbers of people that a request may name.
const PEOPLE: [u32; 6] = [2, 4, 6, 8, 10, 12];
/// One request in so many asks for two features instead of one.
const TWO_NEEDS_ONE_IN: usize = 4;
/// First and last hour that a request may name.
const HOURS: std::ops::RangeInclusive<usize> = 8..=17;
/// Times of the same day that an item knows beside the one that is asked for: asking for a wrong time has an answer too.
const OTHER_TIMES: usize = 2;
/// What makes two requests the same for a policy that knows the building.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Combination {
    /// How many people.
    pub people: u32,
    /// What they need, in the order of [`Feature::ALL`].
    pub needs: Vec<Feature>,
    /// Places in [`BUILDING`] of the rooms that are free, ascending.
    pub free: Vec<usize>,
}

impl Combination {
    /// The part of the data that the combination belongs to, for ever: a hash of it and of nothing else, not even the seed.
    #[must_use]
    pub fn split(&self) -> Split {
        let mut seed = Seed::new(u64::from(self.people)).child("combination");
        for need in &self.needs {
            seed = seed.child(need.name());
        }
        for room in &self.free {
            seed = seed.child_index(*room as u64);
        }
        Split::of(seed)
    }

    /// The free rooms that fit, smallest first.
    #[must_use]
    pub fn fitting(&self) -> Vec<&'static Room> {
        let free = self.free.iter().filter_map(|place| BUILDING.get(*place));
        let mut fitting: Vec<_> = free.filter(|room| room.fits(self.people, &self.needs)).collect();
        fitting.sort_by_key(|room| room.seats);
        fitting
    }

    /// Ids of the free rooms, in the order of the building.
    #[must_use]
    pub fn free_ids(&self) -> Vec<&'static str> {
        self.free.iter().filter_map(|place| BUILDING.get(*place)).map(|room| room.id).collect()
    }

    /// Draws a combination of a split in which at least one room fits.
    pub(crate) fn draw(split: Split, generator: &mut Generator) -> Self {
        loop {
            let people = PEOPLE.get(generator.below(PEOPLE.len())).copied().unwrap_or(2);
            let mut features = Feature::ALL;
            generator.shuffle(&mut features);
            let count = if generator.below(TWO_NEEDS_ONE_IN) == 0 { 2 } else { 1 };
            let mut needs: Vec<_> = features.into_iter().take(count).collect();
            needs.sort_unstable();
            let combination = Self { people, needs, free: draw_free(generator) };
            if combination.split() == split && !combination.fitting().is_empty() {
                return combination;
            }
        }
    }
}

fn draw_free(generator: &mut Generator) -> Vec<usize> {
    let mut places: Vec<usize> = (0..BUILDING.len()).collect();
    generator.shuffle(&mut places);
    places.truncate(FREE_ROOMS);
    places.sort_unstable();
    places
}

/// What the agent sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// The request, as a person would type it.
    pub request: String,
}

/// What tool and grader see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct World {
    /// The building.
    pub rooms: &'static [Room],
    /// Ids of the free rooms by time, in the order of the building.
    pub free: BTreeMap<String, Vec<&'static str>>,
}

/// What the grader alone sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reference {
    /// The smallest free room that fits.
    pub best: &'static str,
    /// Every free room that fits, smallest first.
    pub fits: Vec<&'static str>,
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
    pub combination: Combination,
}

/// A request for a combination, before it becomes an item or a demonstration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) combination: Combination,
    pub(crate) time: String,
    pub(crate) text: String,
}

impl Request {
    pub(crate) fn draw(split: Split, generator: &mut Generator) -> Self {
        let combination = Combination::draw(split, generator);
        let time = draw_time(generator);
        let needs: Vec<_> = combination.needs.iter().map(|need| format!("a {}", need.name())).collect();
        let needs = needs.join(" and ");
        let people = combination.people;
        let text = match generator.below(2) {
            0 => format!("Find a room for {people} people at {time} with {needs}"),
            _ => format!("Which room with {needs} is best for {people} people at {time}"),
        };
        Self { combination, time, text }
    }
}

fn draw_time(generator: &mut Generator) -> String {
    let hours = HOURS.end() - HOURS.start() + 1;
    format!("{:02}:00", HOURS.start() + generator.below(hours))
}

/// Draws the items of a split. Their ids are `{prefix}-{number}`. What is held out has every combination once at most: a
/// test that asks the same thing twice knows less than it seems to. There are more than twice as many as are needed.
#[must_use]
pub fn items(split: Split, prefix: &str, count: usize, seed: Seed) -> Vec<Item> {
    let mut generator = Generator::new(seed);
    let mut drawn = BTreeSet::new();
    let mut items = Vec::with_capacity(count);
    while items.len() < count {
        let request = Request::draw(split, &mut generator);
        if split == Split::Train || drawn.insert(request.combination.clone()) {
            items.push(item(format!("{prefix}-{:05}", items.len()), request, &mut generator));
        }
    }
    items
}

fn item(id: String, request: Request, generator: &mut Generator) -> Item {
    let Request { combination, time, text } = request;
    let mut free = BTreeMap::from([(time, combination.free_ids())]);
    while free.len() <= OTHER_TIMES {
        let other = Combination { free: draw_free(generator), ..combination.clone() };
        free.entry(draw_time(generator)).or_insert_with(|| other.free_ids());
    }
    let fits: Vec<_> = combination.fitting().iter().map(|room| room.id).collect();
    let best = fits.first().copied().unwrap_or_default();
    Item {
        id,
        input: Input { request: text },
        world: World { rooms: &BUILDING, free },
        reference: Reference { best, fits },
        combination,
    }
}
