//! Seeded data for the example of booking a meeting room.
//!
//! One fixed building; an item asks for a room for some people at some time with one or two features, and about a third of
//! the building is free then. Whether an item is training, validation or test data is decided by a hash of its
//! *combination* (people, needs, free rooms), so no combination that is tested has ever been trained on, whatever its time
//! or wording.

mod building;
mod demonstration;
mod item;

pub use building::{BUILDING, Feature, Room};
pub use demonstration::BEST_SHARE_PERCENT;
pub use item::{Combination, FREE_ROOMS, Input, Item, Reference, World, items};

use example_data::Split;
use fulgurite_core::seed::Seed;

/// Items of the training split.
pub const TRAIN_ITEMS: usize = 20_000;
/// Items of the validation split.
pub const VAL_ITEMS: usize = 500;
/// Items of the test split.
pub const TEST_ITEMS: usize = 1_000;
/// Demonstrations.
pub const DEMONSTRATIONS: usize = 4_000;

/// All of the example's data.
pub type Data = example_data::Data<Item, Input>;

/// Makes all data. The same seed makes the same bytes.
#[must_use]
pub fn generate(seed: Seed) -> Data {
    Data {
        train: items(Split::Train, "train", TRAIN_ITEMS, seed.child("train")),
        val: items(Split::Val, "val", VAL_ITEMS, seed.child("val")),
        test: items(Split::Test, "test", TEST_ITEMS, seed.child("test")),
        demonstrations: demonstration::demonstrations(DEMONSTRATIONS, seed.child("demonstrations")),
    }
}
