//! How far sampler and trainer disagree in a step: written as metrics by the host, whether or not the plugin looks.

use std::collections::BTreeMap;

use fulgurite_core::training::ForwardBackwardReport;

/// What the updates of a step have found. Names and meaning of the metrics: [`crate::metrics`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Mismatch {
    tokens: f64,
    /// Sums over updates, weighted by their tokens.
    difference_sum: f64,
    ratio_sum: f64,
    difference_max: f64,
    ratio_max: f64,
    effective_sample_size_min: f64,
}

impl Mismatch {
    /// What one update has found.
    pub(crate) fn of(report: &ForwardBackwardReport) -> Self {
        let tokens = report.trained_tokens as f64;
        Self {
            tokens,
            difference_sum: report.mismatch_mean * tokens,
            ratio_sum: report.ratio_mean * tokens,
            difference_max: report.mismatch_max,
            ratio_max: report.ratio_max,
            effective_sample_size_min: report.effective_sample_size,
        }
    }

    /// This and a further update.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            difference_sum: self.difference_sum + other.difference_sum,
            ratio_sum: self.ratio_sum + other.ratio_sum,
            difference_max: self.difference_max.max(other.difference_max),
            ratio_max: self.ratio_max.max(other.ratio_max),
            effective_sample_size_min: self.effective_sample_size_min.min(other.effective_sample_size_min),
        }
    }

    /// Adds the metrics, under names with this prefix. A number that is not finite (a token that the sampler thought impossible) is left out: it would be
    /// no JSON.
    pub(crate) fn write(self, prefix: &str, scalars: &mut BTreeMap<String, f64>) {
        let tokens = self.tokens.max(1.0);
        let numbers = [
            ("mismatch_mean", self.difference_sum / tokens),
            ("mismatch_max", self.difference_max),
            ("ratio_mean", self.ratio_sum / tokens),
            ("ratio_max", self.ratio_max),
            ("effective_sample_size", self.effective_sample_size_min),
        ];
        let finite = numbers.into_iter().filter(|(_, value)| value.is_finite());
        scalars.extend(finite.map(|(name, value)| (format!("{prefix}{name}"), value)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_tells_the_mean_and_the_worst_of_its_updates() {
        let report = |tokens, mismatch_mean, mismatch_max, effective_sample_size| ForwardBackwardReport {
            trained_tokens: tokens,
            mismatch_mean,
            mismatch_max,
            ratio_mean: 1.0,
            ratio_max: 1.5,
            effective_sample_size,
            ..ForwardBackwardReport::default()
        };
        let (first, second) = (report(300, 0.1, 0.5, 0.9), report(100, 0.3, f64::INFINITY, 0.95));
        let mut scalars = BTreeMap::new();
        Mismatch::of(&first).and(Mismatch::of(&second)).write("host/", &mut scalars);
        let told = |name: &str| scalars.get(&format!("host/{name}")).copied();
        assert!(told("mismatch_mean").is_some_and(|mean| (mean - 0.15).abs() < 1e-12), "{scalars:?}");
        assert_eq!((told("ratio_mean"), told("ratio_max")), (Some(1.0), Some(1.5)));
        assert_eq!(told("effective_sample_size"), Some(0.9));
        assert_eq!(told("mismatch_max"), None, "infinity is no JSON");
    }
}
