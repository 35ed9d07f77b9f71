//! The building: the same for every item, so that a policy can learn it by heart.

use serde::{Deserialize, Serialize};

/// Something a room may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    /// A whiteboard.
    Whiteboard,
    /// A projector.
    Projector,
    /// A phone.
    Phone,
}

impl Feature {
    /// Every feature.
    pub const ALL: [Self; 3] = [Self::Whiteboard, Self::Projector, Self::Phone];

    /// The feature's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Whiteboard => "whiteboard",
            Self::Projector => "projector",
            Self::Phone => "phone",
        }
    }
}

/// A room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Room {
    /// Its id.
    pub id: &'static str,
    /// How many people it seats.
    pub seats: u32,
    /// What it has.
    pub features: &'static [Feature],
}

impl Room {
    /// Whether `people` people find a seat and all of `needs`.
    #[must_use]
    pub fn fits(&self, people: u32, needs: &[Feature]) -> bool {
        self.seats >= people && needs.iter().all(|need| self.features.contains(need))
    }
}

use Feature::{Phone, Projector, Whiteboard};

/// The building. No two rooms seat equally many, so the smallest that fits is always one room; ids say nothing about size.
pub const BUILDING: [Room; 12] = [
    Room { id: "R01", seats: 8, features: &[Whiteboard, Phone] },
    Room { id: "R02", seats: 3, features: &[Phone] },
    Room { id: "R03", seats: 14, features: &[Projector, Phone] },
    Room { id: "R04", seats: 5, features: &[Whiteboard, Projector] },
    Room { id: "R05", seats: 10, features: &[Whiteboard] },
    Room { id: "R06", seats: 2, features: &[Whiteboard, Phone] },
    Room { id: "R07", seats: 6, features: &[Projector] },
    Room { id: "R08", seats: 16, features: &[Whiteboard] },
    Room { id: "R09", seats: 4, features: &[Phone] },
    Room { id: "R10", seats: 9, features: &[Projector, Phone] },
    Room { id: "R11", seats: 7, features: &[Phone] },
    Room { id: "R12", seats: 12, features: &[Projector, Whiteboard] },
];
