//! Fuzz targets: plain functions over bytes, and a driver that needs no nightly compiler.
//!
//! A target panics when what it checks does not hold; whatever the bytes are, it must return. What it returns is a word for
//! what became of them ([`Verdict`]): the driver keeps inputs that came to something new, which is what stands in for
//! coverage here. The driver mutates the files of `corpus/<target>` and what it has kept, knows the target's vocabulary and
//! its numbers, and follows from a seed.
//!
//! `cargo test --release -p fulgurite-fuzz` runs every target for 10 seconds. The environment says otherwise:
//! `FULGURITE_FUZZ_SECONDS` how long, `FULGURITE_FUZZ_SEED` from which seed, `FULGURITE_FUZZ_INPUT` on exactly one file. What
//! failed is kept in `target/fuzz`, and so is the input under way, for failures that take the process with them.
#![allow(
    clippy::panic,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a target fails by panicking"
)]

mod driver;
pub mod memory;
mod mutation;
mod targets;

pub use driver::{Failure, Settings, Statistics, corpus, drive, rerun};
pub use targets::{config, endpoint_answer, plugin_inspection, record_decoding, span_decoding, value_unpacking};

/// What became of an input: `ok`, or why it was refused, without what differs from input to input.
pub type Verdict = String;

/// How a target's inputs write numbers, for the mutations that put border values there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// As decimal text.
    Text,
    /// As variable-length integers, seven bits a byte.
    Varint,
}

/// A function over bytes and what is known of its inputs.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: that of the function and of its folder in `corpus`.
    pub name: &'static str,
    /// The function.
    pub run: fn(&[u8]) -> Verdict,
    /// Words that mean something in its inputs.
    pub dictionary: &'static [&'static [u8]],
    /// How its inputs write numbers.
    pub numbers: Numbers,
    /// Longest input that the driver makes, in bytes.
    pub input_bytes_max: usize,
}

/// Every target. A parser of plugin manifests gets its function in `targets.rs`, its entry here and its folder in `corpus`.
pub const TARGETS: [Target; 6] = [
    Target {
        name: "config",
        run: config,
        dictionary: targets::CONFIG_WORDS,
        numbers: Numbers::Text,
        input_bytes_max: 16 << 10,
    },
    Target {
        name: "span_decoding",
        run: span_decoding,
        dictionary: targets::RECORD_WORDS,
        numbers: Numbers::Varint,
        input_bytes_max: 8 << 10,
    },
    Target {
        name: "record_decoding",
        run: record_decoding,
        dictionary: targets::RECORD_WORDS,
        numbers: Numbers::Varint,
        input_bytes_max: 8 << 10,
    },
    Target {
        name: "value_unpacking",
        run: value_unpacking,
        dictionary: &[],
        numbers: Numbers::Varint,
        input_bytes_max: 8 << 10,
    },
    Target {
        name: "endpoint_answer",
        run: endpoint_answer,
        dictionary: targets::ANSWER_WORDS,
        numbers: Numbers::Text,
        input_bytes_max: 8 << 10,
    },
    Target {
        name: "plugin_inspection",
        run: plugin_inspection,
        dictionary: targets::COMPONENT_WORDS,
        numbers: Numbers::Varint,
        input_bytes_max: 8 << 10,
    },
];
