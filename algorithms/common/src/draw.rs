//! Random numbers of a step. They follow from names that are the same when the step is repeated (the run's own random order of
//! items among them), so a run that is resumed draws what an uninterrupted one draws.

/// A generator (`SplitMix64`) whose seed is a hash of names.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    state: u64,
}

impl Draw {
    /// What is drawn for a purpose in a step, from the names of what it is about.
    #[must_use]
    pub fn new<'a>(purpose: &str, step: u64, names: impl IntoIterator<Item = &'a str>) -> Self {
        // FNV-1a; the 0 between names keeps `a`, `bc` and `ab`, `c` apart.
        let mut state = 0xcbf2_9ce4_8422_2325_u64;
        let mut add = |byte: u8| state = (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        purpose.bytes().chain([0]).chain(step.to_le_bytes()).for_each(&mut add);
        for name in names {
            name.bytes().chain([0]).for_each(&mut add);
        }
        Self { state }
    }

    const fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number from 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A number below `bound`; 0 where `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        // Lemire's multiplication: the high half of bits * bound is a number below bound.
        let high = (u128::from(self.bits()) * bound as u128) >> 64;
        usize::try_from(high).unwrap_or(0)
    }

    /// Puts a list into random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            let other = self.below(last + 1);
            list.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shuffled(step: u64, names: &[&str]) -> Vec<usize> {
        let mut list: Vec<usize> = (0..20).collect();
        Draw::new("test", step, names.iter().copied()).shuffle(&mut list);
        list
    }

    #[test]
    fn draws_repeat_and_differ_by_step_purpose_and_names() {
        assert_eq!(shuffled(1, &["a", "b"]), shuffled(1, &["a", "b"]));
        for other in [shuffled(2, &["a", "b"]), shuffled(1, &["ab"]), shuffled(1, &["a", "c"])] {
            assert_ne!(shuffled(1, &["a", "b"]), other);
        }
        let mut sorted = shuffled(1, &[]);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn numbers_are_even() {
        let mut draw = Draw::new("test", 0, []);
        let mean = (0..10_000).map(|_| draw.unit()).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        let mut counts = [0; 5];
        (0..5_000).for_each(|_| counts[draw.below(5)] += 1);
        assert!(counts.iter().all(|count| (900..1_100).contains(count)), "{counts:?}");
        assert_eq!(draw.below(0), 0);
    }
}
