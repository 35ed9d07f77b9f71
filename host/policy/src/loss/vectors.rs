//! The vectors of `tests/vectors/losses.json` without a component around them: read into rows and settings, for tests that try
//! other code than the host's on them.

use std::path::Path;

use fulgurite_core::id::PolicyVersion;
use fulgurite_core::llm::KeptTokens;
use fulgurite_core::training::{
    Aggregation, Correction, CorrectionRule, KlEstimator, KlTerm, LossSpec, PolicyLoss, RatioLevel, SequenceScope,
    Stream, TrainingRow,
};
use serde_json::Value;

/// One vector: a row per call.
#[derive(Debug, Clone)]
pub(super) struct Vector {
    pub(super) name: String,
    pub(super) spec: LossSpec,
    pub(super) rows: Vec<TrainingRow>,
    /// Log-probs under the trained weights, one list per row with an entry per id.
    pub(super) log_probs: Vec<Vec<f32>>,
    pub(super) references: Option<Vec<Vec<f32>>>,
    pub(super) entropies: Vec<Vec<f32>>,
    pub(super) loss: f64,
    /// One per token that is trained.
    pub(super) d_log_probs: Vec<f64>,
}

/// All of them.
pub(super) fn all() -> Vec<Vector> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/losses.json");
    let values: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    values.iter().map(vector).collect()
}

/// Numbers are written with nine digits, and computed from f32.
pub(super) fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 2e-6 * b.abs().max(1.0)
}

#[expect(clippy::cast_possible_truncation, reason = "log-probs and settings are f32")]
fn narrow(value: &Value) -> f32 {
    value.as_f64().unwrap() as f32
}

fn list(value: &Value) -> Option<Vec<f32>> {
    Some(value.as_array()?.iter().map(narrow).collect())
}

fn optional(value: &Value) -> Option<f32> {
    if value.is_null() { None } else { Some(narrow(value)) }
}

fn length(value: &Value) -> u32 {
    u32::try_from(value.as_u64().unwrap()).unwrap()
}

fn vector(value: &Value) -> Vector {
    let advantages = list(&value["advantages"]).unwrap();
    let count = advantages.len();
    let calls: Vec<(u32, usize)> = match value["sequences"].as_array() {
        None => vec![(0, count)],
        Some(rollouts) => (0..)
            .zip(rollouts)
            .flat_map(|(number, calls)| {
                calls
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(move |call| (number, usize::try_from(call.as_u64().unwrap()).unwrap()))
            })
            .collect(),
    };
    // Each row begins with a token that nothing predicts.
    let cut = |values: &[f32]| -> Vec<Vec<f32>> {
        let mut rest = values;
        let row = |(_, tokens): &(u32, usize)| {
            let (row, others) = rest.split_at(*tokens);
            rest = others;
            [&[0.0], row].concat()
        };
        calls.iter().map(row).collect()
    };
    let (weights, behaviour) = (cut(&advantages), cut(&list(&value["mu"]).unwrap()));
    let old = list(&value["old"]).map(|old| cut(&old));
    let mut first = 0;
    let rows = calls.iter().enumerate().map(|(at, (sequence, tokens))| {
        let is_demonstrated = value["demonstrated"][first].as_bool().unwrap_or(false);
        first += tokens;
        TrainingRow {
            sequence: *sequence,
            ids: vec![0; tokens + 1],
            mask: vec![true; tokens + 1],
            weights: weights[at].clone(),
            behaviour_log_probs: behaviour[at].clone(),
            old_log_probs: old.as_ref().map_or_else(Vec::new, |old| old[at].clone()),
            calls: vec![u32::try_from(at).unwrap(); tokens + 1],
            group: value["groups"][*sequence as usize].as_u64(),
            stream: if is_demonstrated { Stream::Ce } else { Stream::Rl },
            temperature: 1.0,
            policy_version: PolicyVersion(0),
            kept: KeptTokens::default(),
        }
    });
    Vector {
        name: value["name"].as_str().unwrap().to_owned(),
        spec: spec(&value["loss"]),
        rows: rows.collect(),
        log_probs: cut(&list(&value["new"]).unwrap()),
        references: list(&value["reference"]).map(|reference| cut(&reference)),
        entropies: cut(&list(&value["entropies"]).unwrap_or_else(|| vec![0.0; count])),
        loss: value["expected"]["loss"].as_f64().unwrap(),
        d_log_probs: value["expected"]["d_log_probs"].as_array().unwrap().iter().map(|d| d.as_f64().unwrap()).collect(),
    }
}

fn spec(settings: &Value) -> LossSpec {
    let mut spec = LossSpec::default();
    let objective = &settings["objective"];
    let of = |name: &str| objective.get(name);
    if let Some(ppo) = of("ppo") {
        let (clip_low, clip_high) = (narrow(&ppo["clip_low"]), narrow(&ppo["clip_high"]));
        spec.policy_loss = PolicyLoss::Ppo { clip_low, clip_high, dual_clip: optional(&ppo["dual_clip"]) };
    } else if let Some(cispo) = of("cispo") {
        let (clip_low, clip_high) = (optional(&cispo["clip_low"]), narrow(&cispo["clip_high"]));
        spec.policy_loss = PolicyLoss::Cispo { clip_low, clip_high };
    } else if let Some(sapo) = of("sapo") {
        spec.policy_loss = PolicyLoss::Sapo {
            temperature_positive: narrow(&sapo["temperature_positive"]),
            temperature_negative: narrow(&sapo["temperature_negative"]),
        };
    } else if objective == "reinforce" {
        spec.policy_loss = PolicyLoss::Reinforce;
    } else if objective == "importance-sampling" {
        spec.policy_loss = PolicyLoss::ImportanceSampling;
    } else {
        assert!(objective.is_null(), "{objective}");
    }
    spec.ratio_max = optional(&settings["ratio_max"]);
    spec.ratio_level = level(&settings["ratio_level"]);
    if settings["sequence_scope"] == "call" {
        spec.sequence_scope = SequenceScope::Call;
    }
    spec.aggregation = match &settings["aggregation"] {
        Value::Null => Aggregation::TokenMean,
        Value::String(name) => match name.as_str() {
            "token-mean" => Aggregation::TokenMean,
            "sequence-mean-token-mean" => Aggregation::SequenceMeanTokenMean,
            "sequence-mean-token-sum" => Aggregation::SequenceMeanTokenSum,
            "prompt-mean" => Aggregation::PromptMean,
            other => panic!("{other}"),
        },
        constant if constant.get("constant").is_some() => {
            Aggregation::Constant { length: length(&constant["constant"]) }
        }
        constant => Aggregation::SumConstant { length: length(&constant["sum-constant"]) },
    };
    if let Some(kl) = settings["kl"].as_array() {
        let estimator = match kl[0].as_str().unwrap() {
            "k1" => KlEstimator::K1,
            "k2" => KlEstimator::K2,
            "k3" => KlEstimator::K3,
            "unbiased-k3" => KlEstimator::UnbiasedK3,
            other => panic!("{other}"),
        };
        spec.kl = Some(KlTerm { estimator, coefficient: narrow(&kl[1]) });
    }
    spec.entropy_coefficient = optional(&settings["entropy_coefficient"]).unwrap_or(0.0);
    if let Some(correction) = settings.get("correction") {
        let rule = match &correction["rule"]["mask"] {
            Value::Null => CorrectionRule::Truncate { max: narrow(&correction["rule"]["truncate"]) },
            bounds => CorrectionRule::Mask { min: narrow(&bounds[0]), max: narrow(&bounds[1]) },
        };
        let batch_normalise = correction["batch_normalise"].as_bool().unwrap_or(false);
        spec.correction = Some(Correction { level: level(&correction["level"]), rule, batch_normalise });
    }
    spec.off_policy_mask = optional(&settings["off_policy_mask"]);
    spec
}

fn level(name: &Value) -> RatioLevel {
    match name.as_str() {
        None | Some("token") => RatioLevel::Token,
        Some("sequence-mean") => RatioLevel::SequenceMean,
        Some("sequence-sum") => RatioLevel::SequenceSum,
        Some(other) => panic!("{other}"),
    }
}
