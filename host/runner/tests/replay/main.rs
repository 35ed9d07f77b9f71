//! Recorded rollouts run again, with real components: what was recorded comes out again byte for byte, and whatever is not
//! what it was is found and named.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_precision_loss,
    reason = "a test that cannot go on has failed"
)]

#[path = "../support/mod.rs"]
mod support;

mod behaviours;
mod changed;
mod flips;
mod generated;
mod granted;
mod places;
