//! Drawing one token.
//!
//! Gumbel-max: the drawn token is the one with the largest `logit + g`, where `g` is Gumbel noise that is a function of
//! (request seed, position in the completion, token id). No generator has a state that another request could advance.
//!
//! [`Sampling`] says in which order logits are processed.

use fulgurite_core::llm::Sampling;
use fulgurite_core::seed::Seed;

use crate::kernel;

/// A drawn token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Drawn {
    pub(crate) token: u32,
    /// Under the softmax at the request's temperature, at 1 when greedy (nats).
    pub(crate) log_prob: f32,
    /// Under the distribution that it was drawn from (nats).
    pub(crate) processed_log_prob: f32,
    /// Whether that was another distribution than the softmax at the temperature.
    pub(crate) altered: bool,
    /// The tokens that it was drawn from, ascending, where that is the softmax over them and all that happened to it. Empty
    /// otherwise, and when they are more than are to be recorded.
    pub(crate) kept: Box<[u32]>,
}

impl Drawn {
    /// Whether what was done to the distribution is not told.
    pub(crate) fn is_unexplained(&self) -> bool {
        self.altered && self.kept.is_empty()
    }
}

/// Whether a token may be drawn, by its id; ids behind the end may not.
pub(crate) type Allowed<'a> = &'a dyn Fn(u32) -> bool;

/// What a draw goes by, apart from the logits.
pub(crate) struct Draw<'a> {
    pub(crate) sampling: &'a Sampling,
    pub(crate) seed: Seed,
    /// In the completion.
    pub(crate) position: u64,
    /// Tokens of prompt and completion so far, ascending, each once; read when there is a repetition penalty.
    pub(crate) seen: &'a [u32],
    /// What a constraint allows next.
    pub(crate) allowed: Option<Allowed<'a>>,
    /// Most tokens of a set that is told.
    pub(crate) kept_tokens_max: usize,
}

/// Draws from logits, which are overwritten. `None` when no logit is finite, one is not a number, or nothing is allowed.
pub(crate) fn draw(logits: &mut [f32], draw: &Draw<'_>) -> Option<Drawn> {
    let Draw { sampling, .. } = draw;
    let greedy = sampling.temperature <= 0.0;
    let temperature = if greedy { 1.0 } else { sampling.temperature };
    let moved = moved(logits, draw);
    let (max, normaliser) = kernel::log_normaliser(logits, temperature);
    if !normaliser.is_finite() {
        return None;
    }
    let shaped = !moved.is_empty() || draw.allowed.is_some();
    if greedy && !shaped {
        let (token, logit) = logits.iter().enumerate().find(|(_, logit)| **logit >= max)?;
        let token = u32::try_from(token).ok()?;
        let log_prob = logit - normaliser;
        return Some(Drawn { token, log_prob, processed_log_prob: 0.0, altered: true, kept: Box::default() });
    }
    let noise = Noise::new(draw.seed, draw.position);
    if shaped || cuts(sampling, logits.len()) {
        return draw_processed(logits, draw, temperature, &moved, normaliser, &noise);
    }
    let mut best = Best::default();
    for (token, logit) in (0_u32..).zip(logits.iter()) {
        best.offer(token, *logit, &noise);
    }
    let log_prob = logits.get(best.token as usize)? - normaliser;
    let token = best.token;
    Some(Drawn { token, log_prob, processed_log_prob: log_prob, altered: false, kept: Box::default() })
}

/// Whether the settings can drop tokens of a vocabulary of this size.
fn cuts(sampling: &Sampling, vocabulary: usize) -> bool {
    let top_k = sampling.top_k > 0 && (sampling.top_k as usize) < vocabulary;
    top_k || sampling.top_p < 1.0 || sampling.min_p > 0.0
}

/// The logits that bias and penalty change, by ascending token: (token, new logit before the temperature).
fn moved(logits: &[f32], draw: &Draw<'_>) -> Vec<(u32, f32)> {
    let sampling = draw.sampling;
    let logit_of = |token: u32| logits.get(token as usize).copied();
    let mut moved: Vec<(u32, f32)> = sampling
        .logit_bias
        .iter()
        .filter_map(|entry| Some((entry.token, logit_of(entry.token)? + entry.bias)))
        .collect();
    moved.sort_unstable_by_key(|(token, _)| *token);
    let penalty = sampling.repetition_penalty;
    if penalty.to_bits() != 1.0_f32.to_bits() {
        for token in draw.seen {
            match moved.binary_search_by_key(token, |(token, _)| *token) {
                Ok(at) => {
                    if let Some((_, logit)) = moved.get_mut(at) {
                        *logit = penalised(*logit, penalty);
                    }
                }
                Err(at) => {
                    if let Some(logit) = logit_of(*token) {
                        moved.insert(at, (*token, penalised(logit, penalty)));
                    }
                }
            }
        }
    }
    moved.retain(|(token, logit)| logit_of(*token).is_some_and(|old| old.to_bits() != logit.to_bits()));
    moved
}

fn penalised(logit: f32, penalty: f32) -> f32 {
    if logit > 0.0 { logit / penalty } else { logit * penalty }
}

/// Draws from what is kept of `scaled`, the logits divided by the temperature.
fn draw_processed(
    scaled: &mut [f32],
    draw: &Draw<'_>,
    temperature: f32,
    moved: &[(u32, f32)],
    normaliser: f32,
    noise: &Noise,
) -> Option<Drawn> {
    let sampling = draw.sampling;
    let mut raw = Vec::with_capacity(moved.len());
    for (token, logit) in moved {
        let slot = scaled.get_mut(*token as usize)?;
        raw.push((*token, std::mem::replace(slot, logit / temperature)));
    }
    let possible = scaled.iter().filter(|logit| **logit > f32::NEG_INFINITY).count();
    let mut kept: Vec<(u32, f32)> = (0_u32..).zip(scaled.iter().copied()).collect();
    kept.retain(|(token, logit)| *logit > f32::NEG_INFINITY && draw.allowed.is_none_or(|allowed| allowed(*token)));
    let chosen = if sampling.temperature <= 0.0 {
        // The first of equal ones.
        let best = kept.iter().copied().reduce(|best, other| if other.1 > best.1 { other } else { best })?;
        Drawn { token: best.0, log_prob: 0.0, processed_log_prob: 0.0, altered: true, kept: Box::default() }
    } else {
        cut(&mut kept, sampling);
        if kept.is_empty() {
            return None;
        }
        let mut best = Best::default();
        for (token, logit) in &kept {
            best.offer(*token, *logit, noise);
        }
        // By ascending token, as the trainer adds them.
        kept.sort_unstable_by_key(|(token, _)| *token);
        let mut logits: Vec<f32> = kept.iter().map(|(_, logit)| *logit).collect();
        let (_, kept_normaliser) = kernel::log_normaliser(&mut logits, 1.0);
        let altered = kept.len() < possible || !moved.is_empty();
        let is_told = altered && moved.is_empty() && kept.len() <= draw.kept_tokens_max;
        Drawn {
            token: best.token,
            log_prob: 0.0,
            processed_log_prob: scaled.get(best.token as usize)? - kept_normaliser,
            altered,
            kept: if is_told { kept.iter().map(|(token, _)| *token).collect() } else { Box::default() },
        }
    };
    let raw_logit = match raw.binary_search_by_key(&chosen.token, |(token, _)| *token) {
        Ok(at) => raw.get(at)?.1,
        Err(_) => *scaled.get(chosen.token as usize)?,
    };
    let log_prob = raw_logit - normaliser;
    // Where nothing was dropped the two are one number, to the last bit.
    let processed_log_prob = if chosen.altered { chosen.processed_log_prob } else { log_prob };
    Some(Drawn { log_prob, processed_log_prob, ..chosen })
}

/// Applies top-k, top-p and min-p to what is left. A set that is cut is in descending order, equal ones by id, so that it is
/// a function of the logits alone.
fn cut(kept: &mut Vec<(u32, f32)>, sampling: &Sampling) {
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let top_k = sampling.top_k as usize;
    if top_k > 0 && top_k < kept.len() {
        kept.select_nth_unstable_by(top_k - 1, order);
        kept.truncate(top_k);
        kept.sort_unstable_by(order);
    }
    let Some(top) = kept.iter().map(|(_, logit)| *logit).reduce(f32::max) else { return };
    let weight = |logit: f32| f64::from(logit - top).exp();
    if sampling.top_p < 1.0 {
        kept.sort_unstable_by(order);
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
    use fulgurite_core::llm::TokenBias;

    use super::*;

    const LOGITS: [f32; 6] = [0.0, 1.5, -2.0, 0.7, 3.0, -9.0];

    fn draw_one(sampling: &Sampling, seen: &[u32], allowed: Option<Allowed<'_>>, seed: u64) -> Option<Drawn> {
        let settings = Draw { sampling, seed: Seed::new(seed), position: 7, seen, allowed, kept_tokens_max: 4 };
        draw(&mut LOGITS.clone(), &settings)
    }

    fn softmax(logits: &[impl Into<f64> + Copy], temperature: f64) -> Vec<f64> {
        let weights: Vec<f64> = logits.iter().map(|l| ((*l).into() / temperature).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|w| w / sum).collect()
    }

    fn frequencies(sampling: &Sampling, draws: u32) -> (Vec<f64>, Vec<Drawn>) {
        let mut counts = vec![0.0; LOGITS.len()];
        let mut all = vec![];
        for seed in 0..draws {
            let one = draw_one(sampling, &[], None, u64::from(seed)).unwrap();
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
                assert!(drawn.kept.iter().map(|token| *token as usize).eq(kept.iter().copied()), "{drawn:?}");
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

    /// Processed probabilities by the definition: bias, penalty, mask, temperature.
    fn shaped(sampling: &Sampling, seen: &[u32], allowed: &dyn Fn(u32) -> bool) -> Vec<f64> {
        let logits: Vec<f64> = (0_u32..)
            .zip(LOGITS)
            .map(|(token, logit)| {
                let bias =
                    sampling.logit_bias.iter().find(|entry| entry.token == token).map_or(0.0, |entry| entry.bias);
                let biased = f64::from(logit) + f64::from(bias);
                let penalty = f64::from(sampling.repetition_penalty);
                let penalised = if biased > 0.0 { biased / penalty } else { biased * penalty };
                let logit = if seen.contains(&token) { penalised } else { biased };
                if allowed(token) { logit } else { f64::NEG_INFINITY }
            })
            .collect();
        softmax(&logits, f64::from(sampling.temperature))
    }

    #[test]
    fn bias_penalty_and_constraint_shape_the_distribution_and_raw_log_probs_stay() {
        let bias = vec![TokenBias { token: 0, bias: 2.5 }, TokenBias { token: 4, bias: -1.0 }];
        let odd = |token: u32| token % 2 == 1;
        let all = |_: u32| true;
        let base = Sampling { temperature: 0.8, ..Sampling::default() };
        let cases: [(Sampling, &[u32], Option<Allowed<'_>>); 5] = [
            (Sampling { logit_bias: bias.clone(), ..base.clone() }, &[], None),
            (Sampling { repetition_penalty: 1.8, ..base.clone() }, &[2, 4], None),
            (Sampling { repetition_penalty: 0.5, logit_bias: bias.clone(), ..base.clone() }, &[0, 1, 2], None),
            (base.clone(), &[], Some(&odd)),
            (Sampling { repetition_penalty: 1.3, logit_bias: bias, ..base.clone() }, &[1, 4], Some(&odd)),
        ];
        let raw = softmax(&LOGITS, 0.8);
        for (sampling, seen, allowed) in cases {
            let want = shaped(&sampling, seen, allowed.unwrap_or(&all));
            let draws = 20_000_u32;
            let mut counts = vec![0.0; LOGITS.len()];
            for seed in 0..draws {
                let drawn = draw_one(&sampling, seen, allowed, u64::from(seed)).unwrap();
                counts[drawn.token as usize] += 1.0 / f64::from(draws);
                assert!(drawn.altered);
                assert!((f64::from(drawn.log_prob) - raw[drawn.token as usize].ln()).abs() < 1e-5, "raw");
                assert!(
                    (f64::from(drawn.processed_log_prob) - want[drawn.token as usize].ln()).abs() < 1e-5,
                    "{drawn:?}"
                );
            }
            for (count, want) in counts.iter().zip(&want) {
                let spread = (want * (1.0 - want) / f64::from(draws)).sqrt();
                assert!((count - want).abs() < 5.0 * spread + 1e-9, "{counts:?} {want:?}");
            }
            let greedy = Sampling { temperature: 0.0, ..sampling };
            let likeliest = (0_u32..6).max_by(|a, b| want[*a as usize].total_cmp(&want[*b as usize])).unwrap();
            assert_eq!(draw_one(&greedy, seen, allowed, 3).unwrap().token, likeliest);
        }
    }

    #[test]
    fn a_draw_is_altered_only_where_something_was_dropped_or_moved() {
        let base = Sampling::default;
        let plain = draw_one(&base(), &[], None, 11).unwrap();
        let same = [
            Sampling { top_k: 6, ..base() },
            Sampling { top_k: 600, ..base() },
            Sampling { top_p: 0.999_999_9, ..base() },
            Sampling { min_p: 1e-9, ..base() },
            Sampling { logit_bias: vec![TokenBias { token: 1, bias: 0.0 }], ..base() },
            Sampling { logit_bias: vec![TokenBias { token: 6, bias: 9.0 }], ..base() },
            Sampling { repetition_penalty: 2.0, ..base() },
        ];
        for sampling in same {
            assert_eq!(draw_one(&sampling, &[], Some(&|_| true), 11).unwrap(), plain, "{sampling:?}");
            assert_eq!(draw_one(&sampling, &[0], None, 11).unwrap(), plain, "a logit of 0 is not moved: {sampling:?}");
        }
        assert!(!plain.altered);
        for sampling in [Sampling { top_k: 5, ..base() }, Sampling { min_p: 0.001, ..base() }] {
            assert!(draw_one(&sampling, &[], None, 11).unwrap().altered, "{sampling:?}");
        }
    }

    #[test]
    fn what_was_drawn_from_is_told_where_it_is_all_that_was_done_and_few() {
        let base = Sampling::default;
        let bias = vec![TokenBias { token: 0, bias: 2.5 }];
        let odd: Allowed<'_> = &|token| token % 2 == 1;
        let cases: [(Sampling, Option<Allowed<'_>>, &[u32]); 7] = [
            (Sampling { top_k: 4, ..base() }, None, &[0, 1, 3, 4]),
            (Sampling { top_k: 5, ..base() }, None, &[]),
            (base(), Some(odd), &[1, 3, 5]),
            (Sampling { top_k: 2, ..base() }, Some(odd), &[1, 3]),
            (Sampling { top_k: 2, logit_bias: bias, ..base() }, None, &[]),
            (Sampling { temperature: 0.0, ..base() }, Some(odd), &[]),
            (base(), None, &[]),
        ];
        for (sampling, allowed, kept) in cases {
            let drawn = draw_one(&sampling, &[], allowed, 11).unwrap();
            assert_eq!(*drawn.kept, *kept, "{sampling:?}");
            assert_eq!(drawn.is_unexplained(), drawn.altered && kept.is_empty());
        }
    }

    #[test]
    fn greedy_takes_the_largest_and_records_its_log_prob_at_temperature_1() {
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let drawn = draw_one(&sampling, &[], None, 1).unwrap();
        assert_eq!((drawn.token, drawn.altered), (4, true));
        assert!((f64::from(drawn.log_prob) - softmax(&LOGITS, 1.0)[4].ln()).abs() < 1e-6);
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
        let settings =
            Draw { sampling: &sampling, seed: Seed::new(0), position: 0, seen: &[], allowed: None, kept_tokens_max: 0 };
        assert_eq!(draw(&mut [f32::NAN, 1.0], &settings), None);
        assert_eq!(draw(&mut [f32::NEG_INFINITY; 3], &settings), None);
        assert_eq!(draw_one(&sampling, &[], Some(&|_| false), 0), None, "nothing is allowed");
    }
}
