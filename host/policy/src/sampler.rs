//! Drawing one token.
//!
//! Gumbel-max: the drawn token is the one with the largest `logit + g`, where `g` is Gumbel noise that is a function of
//! (request seed, position in the completion, token id). No generator has a state that another request could advance.

use fulgurite_core::llm::Sampling;
use fulgurite_core::seed::Seed;

use crate::kernel;

/// A drawn token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Drawn {
    pub(crate) token: u32,
    /// Under the softmax at the request's temperature, at 1 when greedy (nats).
    pub(crate) log_prob: f32,
    /// Under the distribution that it was drawn from (nats).
    pub(crate) processed_log_prob: f32,
}

/// Whether the draw is from something else than the softmax at the temperature.
pub(crate) fn is_truncated(sampling: &Sampling) -> bool {
    sampling.temperature <= 0.0 || sampling.top_k > 0 || sampling.top_p < 1.0 || sampling.min_p > 0.0
}

/// Draws from logits, which are overwritten. `None` when no logit is finite, or one is not a number.
pub(crate) fn draw(logits: &mut [f32], sampling: &Sampling, seed: Seed, position: u64) -> Option<Drawn> {
    let greedy = sampling.temperature <= 0.0;
    let temperature = if greedy { 1.0 } else { sampling.temperature };
    let (max, normaliser) = kernel::log_normaliser(logits, temperature);
    if !normaliser.is_finite() {
        return None;
    }
    let noise = Noise::new(seed, position);
    if greedy {
        let (token, logit) = logits.iter().enumerate().find(|(_, logit)| **logit >= max)?;
        let token = u32::try_from(token).ok()?;
        return Some(Drawn { token, log_prob: logit - normaliser, processed_log_prob: 0.0 });
    }
    if is_truncated(sampling) {
        return draw_truncated(logits, sampling, normaliser, &noise);
    }
    let mut best = Best::default();
    for (token, logit) in (0_u32..).zip(logits.iter()) {
        best.offer(token, *logit, &noise);
    }
    let log_prob = logits.get(best.token as usize)? - normaliser;
    Some(Drawn { token: best.token, log_prob, processed_log_prob: log_prob })
}

fn draw_truncated(scaled: &[f32], sampling: &Sampling, normaliser: f32, noise: &Noise) -> Option<Drawn> {
    let mut kept: Vec<(u32, f32)> = (0_u32..).zip(scaled.iter().copied()).collect();
    // Most probable first; equal ones by id, so that the kept set is a function of the logits alone.
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if sampling.top_k > 0 {
        kept.truncate(sampling.top_k as usize);
    }
    let top = kept.first()?.1;
    let weight = |logit: f32| f64::from(logit - top).exp();
    if sampling.top_p < 1.0 {
        let target = kept.iter().map(|(_, logit)| weight(*logit)).sum::<f64>() * f64::from(sampling.top_p);
        let mut sum = 0.0;
        let needed = kept.iter().take_while(|(_, logit)| {
            let mass_before = sum;
            sum += weight(*logit);
            mass_before < target
        });
        let needed = needed.count().max(1);
        kept.truncate(needed);
    }
    if sampling.min_p > 0.0 {
        kept.retain(|(_, logit)| weight(*logit) >= f64::from(sampling.min_p));
    }
    let mut best = Best::default();
    for (token, logit) in &kept {
        best.offer(*token, *logit, noise);
    }
    let logit = scaled.get(best.token as usize)?;
    let kept_mass = kept.iter().map(|(_, logit)| weight(*logit)).sum::<f64>().ln();
    #[expect(clippy::cast_possible_truncation, reason = "log-probs are f32")]
    let processed_log_prob = (f64::from(logit - top) - kept_mass) as f32;
    Some(Drawn { token: best.token, log_prob: logit - normaliser, processed_log_prob })
}

/// The largest perturbed logit so far.
struct Best {
    token: u32,
    score: f64,
}

impl Default for Best {
    fn default() -> Self {
        Self { token: 0, score: f64::NEG_INFINITY }
    }
}

impl Best {
    #[inline]
    fn offer(&mut self, token: u32, logit: f32, noise: &Noise) {
        let bits = noise.bits(token);
        let logit = f64::from(logit);
        // `-ln(-ln u) <= -ln(1 - u)`, and the leading zeros of `1 - u` bound that: nearly all tokens are ruled out without
        // a logarithm.
        let bound = logit + f64::from(bits.leading_zeros() + 1) * std::f64::consts::LN_2;
        if bound <= self.score {
            return;
        }
        let score = logit + gumbel(bits);
        if score > self.score {
            *self = Self { token, score };
        }
    }
}

/// Gumbel noise of 64 random bits that stand for `1 - u`.
fn gumbel(bits: u64) -> f64 {
    // In (0, 1), never 0 and never 1.
    let complement = ((bits >> 12) as f64 + 0.5) * (1.0 / (1_u64 << 52) as f64);
    -(-(-complement).ln_1p()).ln()
}

struct Noise(u64);

impl Noise {
    fn new(seed: Seed, position: u64) -> Self {
        Self(seed.child("gumbel").child_index(position).value())
    }

    /// `SplitMix64` of seed and token.
    #[inline]
    fn bits(&self, token: u32) -> u64 {
        let value = self.0.wrapping_add(u64::from(token).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "bits are what is tested")]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [0.0, 1.5, -2.0, 0.7, 3.0, -9.0];

    fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
        let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / temperature).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|w| w / sum).collect()
    }

    fn frequencies(sampling: &Sampling, draws: u32) -> (Vec<f64>, Vec<Drawn>) {
        let mut counts = vec![0.0; LOGITS.len()];
        let mut all = vec![];
        for seed in 0..draws {
            let one = draw(&mut LOGITS.clone(), sampling, Seed::new(u64::from(seed)), 7).unwrap();
            counts[one.token as usize] += 1.0 / f64::from(draws);
            all.push(one);
        }
        (counts, all)
    }

    #[test]
    fn frequencies_match_the_softmax_and_log_probs_are_exact() {
        for temperature in [0.5_f32, 1.0, 2.0] {
            let sampling = Sampling { temperature, ..Sampling::default() };
            let (counts, draws) = frequencies(&sampling, 100_000);
            let want = softmax(&LOGITS, f64::from(temperature));
            for (count, want) in counts.iter().zip(&want) {
                // Five standard deviations of a binomial.
                assert!(
                    (count - want).abs() < 5.0 * (want * (1.0 - want) / 100_000.0).sqrt() + 1e-9,
                    "{counts:?} {want:?}"
                );
            }
            for drawn in &draws[..100] {
                assert!((f64::from(drawn.log_prob) - want[drawn.token as usize].ln()).abs() < 1e-6);
                assert_eq!(drawn.log_prob, drawn.processed_log_prob);
            }
        }
    }

    #[test]
    fn truncation_draws_from_what_is_kept() {
        let kept = |sampling: &Sampling| {
            let (counts, draws) = frequencies(sampling, 20_000);
            let kept: Vec<usize> = (0..LOGITS.len()).filter(|i| counts[*i] > 0.0).collect();
            let all = softmax(&LOGITS, 1.0);
            let mass: f64 = kept.iter().map(|i| all[*i]).sum();
            for drawn in &draws[..200] {
                let p = all[drawn.token as usize];
                assert!((f64::from(drawn.log_prob) - p.ln()).abs() < 1e-6, "raw");
                assert!((f64::from(drawn.processed_log_prob) - (p / mass).ln()).abs() < 1e-6, "processed");
            }
            for i in &kept {
                let want = all[*i] / mass;
                assert!((counts[*i] - want).abs() < 5.0 * (want / 20_000.0).sqrt());
            }
            kept
        };
        let base = Sampling::default;
        assert_eq!(kept(&Sampling { top_k: 2, ..base() }), [1, 4]);
        assert_eq!(kept(&Sampling { top_p: 0.9, ..base() }), [1, 3, 4], "the smallest set with at least 0.9");
        assert_eq!(kept(&Sampling { min_p: 0.2, ..base() }), [1, 4]);
        assert_eq!(kept(&Sampling { top_p: 0.000_1, ..base() }), [4]);
    }

    #[test]
    fn greedy_takes_the_largest_and_records_its_log_prob_at_temperature_1() {
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let drawn = draw(&mut LOGITS.clone(), &sampling, Seed::new(1), 0).unwrap();
        assert_eq!(drawn.token, 4);
        assert!((f64::from(drawn.log_prob) - softmax(&LOGITS, 1.0)[4].ln()).abs() < 1e-6);
        assert!(is_truncated(&sampling));
    }

    #[test]
    fn the_shortcut_never_rules_out_a_winner() {
        for bits in [0, 1, u64::MAX, u64::MAX / 3, 1 << 63, 1 << 12, 0x1234_5678_9abc_def0] {
            let bound = f64::from(bits.leading_zeros() + 1) * std::f64::consts::LN_2;
            assert!(gumbel(bits).is_finite() && gumbel(bits) <= bound, "{bits:x}");
        }
    }

    #[test]
    fn logits_that_are_not_numbers_draw_nothing() {
        let sampling = Sampling::default();
        assert_eq!(draw(&mut [f32::NAN, 1.0], &sampling, Seed::new(0), 0), None);
        assert_eq!(draw(&mut [f32::NEG_INFINITY; 3], &sampling, Seed::new(0), 0), None);
    }
}
