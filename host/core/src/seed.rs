//! Seeds. One number names a whole run; every generator inside it is a child derived by name, so adding a consumer never
//! shifts the stream of another.

use serde::{Deserialize, Serialize};

/// A 64-bit seed from which named children are derived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seed(u64);

impl Seed {
    /// The seed of a whole run.
    #[must_use]
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// The number itself.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.0
    }

    /// The child named `name`.
    #[must_use]
    pub fn child(self, name: &str) -> Self {
        name.bytes().fold(Self(mix(self.0 ^ 0x9e37_79b9_7f4a_7c15)), |seed, byte| Self(mix(seed.0 ^ u64::from(byte))))
    }

    /// The `index`-th child.
    #[must_use]
    pub fn child_index(self, index: u64) -> Self {
        Self(mix(mix(self.0 ^ 0xd1b5_4a32_d192_ed03) ^ index))
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014), with the increment added first so that 0 does not map to 0.
const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// SplitMix64: a small generator for shuffles and draws of the host itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Generator {
    state: u64,
}

impl Generator {
    /// A generator that starts at `seed`.
    #[must_use]
    pub const fn new(seed: Seed) -> Self {
        Self { state: seed.0 }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let value = mix(self.state);
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        value
    }

    /// A number in `0..bound` without modulo bias worth naming (Lemire's multiplication); 0 when `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        let wide = u128::from(self.next_u64()) * (bound as u128);
        usize::try_from(wide >> 64).unwrap_or(0)
    }

    /// Shuffles in place (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last + 1);
            items.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_differ_by_name_index_and_parent() {
        let seeds = [
            Seed::new(0).child("a"),
            Seed::new(0).child("b"),
            Seed::new(0).child("ab"),
            Seed::new(1).child("a"),
            Seed::new(0).child_index(0),
            Seed::new(0).child_index(1),
        ];
        for (i, a) in seeds.iter().enumerate() {
            assert!(seeds.iter().skip(i + 1).all(|b| a != b));
        }
    }

    #[test]
    fn draws_cover_the_range_evenly() {
        let mut generator = Generator::new(Seed::new(7));
        let mut counts = [0_u32; 5];
        for _ in 0..50_000 {
            counts[generator.below(5)] += 1;
        }
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
    }
}
