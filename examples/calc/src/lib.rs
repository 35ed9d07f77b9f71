//! Seeded data for the example of word problems.
//!
//! A problem begins with a number and does two things to it; which operation a phrase means is what a policy learns. Whether
//! a problem is training, validation or test data is decided by a hash of its numbers and operations, so none that is tested
//! has ever been trained on, whatever its words.

mod demonstration;
mod problem;

pub use demonstration::RIGHT_SHARE_PERCENT;
pub use problem::{Input, Item, Operation, Problem, Reference, STEPS, World, items};

use example_data::Split;
use fulgurite_core::seed::Seed;

/// Items of the training split.
pub const TRAIN_ITEMS: usize = 20_000;
/// Items of the validation split.
pub const VAL_ITEMS: usize = 500;
/// Items of the test split.
pub const TEST_ITEMS: usize = 1_000;
/// Demonstrations.
pub const DEMONSTRATIONS: usize = 6_000;

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
