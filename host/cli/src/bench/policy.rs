//! `fulgurite bench policy`: tokens a second that the policy trains and draws, beside PyTorch on the same shapes.
//!
//! Both sides stay loaded and take turns, a second each, so that what else the machine does hits them alike.

mod baseline;
mod model;

use anyhow::anyhow;
use serde_json::{Value, json};

use crate::arguments::{BenchPolicyArguments, BenchPolicyPart, Output};
use crate::bench::setup;
use crate::failure::Failure;
use crate::{terminal, train};

use baseline::{Baseline, Operation};
use model::{BenchModel, Shape};

/// Rows and tokens of a training batch.
const BATCHES: [(usize, usize); 2] = [(32, 64), (8, 256)];
/// Calls at once.
const CALLS: [usize; 3] = [1, 32, 128];
/// New tokens of a call; what the baseline draws too.
const NEW_TOKENS: u32 = 46;
/// Members of the group that shares a prompt.
const GROUP: usize = 16;
/// Measurements of a group and of one call alone for each round of the others: they take milliseconds.
const GROUP_TURNS_PER_ROUND: u64 = 8;
/// Tokens of the shared prompt.
const GROUP_PROMPT_TOKENS: usize = 512;

/// Runs the measurements and prints them.
pub(crate) async fn bench(arguments: &BenchPolicyArguments) -> Result<(), Failure> {
    if !(arguments.seconds.is_finite() && arguments.seconds > 0.0 && arguments.rounds > 0) {
        return Err(Failure::usage(anyhow!("`--seconds` and `--rounds` must be above 0")));
    }
    let shapes = arguments.shapes.iter().map(|name| Shape::named(name)).collect::<Result<Vec<_>, _>>()?;
    let baseline = arguments.baseline.as_ref();
    let mut bench = Bench {
        arguments,
        baseline: baseline.map(|python| Baseline::start(python, &arguments.script)).transpose()?,
        results: Vec::new(),
    };
    for shape in shapes {
        bench.shape(shape).await?;
    }
    if arguments.output == Output::Json {
        let mut setup = setup(arguments.threads);
        if let Value::Object(fields) = &mut setup {
            fields.insert("dtype".to_owned(), json!("f32"));
            fields.insert("seconds".to_owned(), json!(arguments.seconds));
            fields.insert("rounds".to_owned(), json!(arguments.rounds));
            fields.insert("baseline".to_owned(), bench.baseline.as_ref().map_or(Value::Null, Baseline::about));
        }
        train::print_json(&json!({ "setup": setup, "results": bench.results }))?;
    }
    Ok(())
}

/// One run of the benchmark.
struct Bench<'a> {
    arguments: &'a BenchPolicyArguments,
    baseline: Option<Baseline>,
    results: Vec<Value>,
}

impl Bench<'_> {
    fn wants(&self, part: BenchPolicyPart) -> bool {
        self.arguments.only.is_empty() || self.arguments.only.contains(&part)
    }

    async fn shape(&mut self, shape: &'static Shape) -> Result<(), Failure> {
        let model = BenchModel::new(shape, self.arguments.threads)?;
        if self.wants(BenchPolicyPart::Train) {
            for (rows, tokens) in BATCHES {
                self.train(&model, rows, tokens).await?;
            }
        }
        if self.wants(BenchPolicyPart::Decode) {
            for calls in CALLS {
                self.decode(&model, calls).await?;
            }
        }
        if self.wants(BenchPolicyPart::Group) {
            self.group(&model).await?;
        }
        if self.wants(BenchPolicyPart::Mismatch) {
            self.mismatch(&model).await?;
        }
        Ok(())
    }

    async fn train(&mut self, model: &BenchModel, rows: usize, tokens: usize) -> Result<(), Failure> {
        let seconds = self.arguments.seconds;
        let batch = model.rows(rows, tokens);
        model.train(&batch, 0.0).await?;
        let mut figures = Figures::default();
        let operation = Operation::Train { rows, tokens };
        for _ in 0..self.arguments.rounds {
            figures.own.push(model.train(&batch, seconds).await?);
            figures.ask(self.baseline.as_mut(), &operation, model, seconds)?;
        }
        self.report(&format!("train {} {rows}x{tokens}", model.shape.name), &figures, model);
        Ok(())
    }

    async fn decode(&mut self, model: &BenchModel, calls: usize) -> Result<(), Failure> {
        let seconds = self.arguments.seconds;
        let prompts = model.prompt_lengths(calls).await?;
        let (mut decode, mut generate) = (Figures::default(), Figures::default());
        for _ in 0..self.arguments.rounds {
            let own = model.decode(calls, NEW_TOKENS, seconds).await?;
            decode.own.push(own);
            generate.own.push(own);
            let operation = Operation::Decode { prompts: &prompts };
            decode.ask(self.baseline.as_mut(), &operation, model, seconds)?;
            let operation = Operation::Generate { prompts: &prompts };
            generate.ask(self.baseline.as_mut(), &operation, model, seconds)?;
        }
        self.report(&format!("decode {} batch {calls}", model.shape.name), &decode, model);
        if self.baseline.is_some() {
            self.report(&format!("generate {} batch {calls}", model.shape.name), &generate, model);
        }
        Ok(())
    }

    async fn group(&mut self, model: &BenchModel) -> Result<(), Failure> {
        let (mut alone, mut together) = (vec![], vec![]);
        let (mut computed_alone, mut computed_together) = (0, 0);
        for turn in 0..u64::from(self.arguments.rounds) * GROUP_TURNS_PER_ROUND {
            let (seconds, computed) = model.group(GROUP_PROMPT_TOKENS, 1, 2 * turn).await?;
            alone.push(seconds);
            computed_alone += computed;
            let (seconds, computed) = model.group(GROUP_PROMPT_TOKENS, GROUP, 2 * turn + 1).await?;
            together.push(seconds);
            computed_together += computed;
        }
        let (alone, together) = (median(&alone), median(&together));
        let ratio = together / alone;
        // The same work or not, whatever the machine does: 1 and a little for the last token of each.
        let computed_ratio = computed_together as f64 / computed_alone.max(1) as f64;
        self.print(&format!(
            "group of {GROUP} {}: {:.2} ms, one {:.2} ms, ratio {ratio:.2}; prompt tokens computed, ratio {computed_ratio:.2}",
            model.shape.name,
            together * 1e3,
            alone * 1e3
        ));
        self.results.push(json!({
            "name": format!("group {}", model.shape.name),
            "members": GROUP,
            "prompt_tokens": GROUP_PROMPT_TOKENS,
            "group_seconds": together,
            "alone_seconds": alone,
            "group_prefill_ratio": ratio,
            "group_computed_ratio": computed_ratio,
        }));
        Ok(())
    }

    async fn mismatch(&mut self, model: &BenchModel) -> Result<(), Failure> {
        let mismatch = model.mismatch().await?;
        self.print(&format!(
            "mismatch {}: mean {:.1e}, max {:.1e} over {} tokens; alone against among 100 others {:.1e}",
            model.shape.name, mismatch.mean, mismatch.max, mismatch.tokens, mismatch.alone_max
        ));
        self.results.push(json!({
            "name": format!("mismatch {}", model.shape.name),
            "mismatch_mean": mismatch.mean,
            "mismatch_max": mismatch.max,
            "tokens": mismatch.tokens,
            "alone_among_100_max": mismatch.alone_max,
        }));
        Ok(())
    }

    fn report(&mut self, name: &str, figures: &Figures, model: &BenchModel) {
        let own = median(&figures.own);
        let modes: Vec<(&str, f64)> = figures.baseline.iter().map(|(mode, rates)| (*mode, median(rates))).collect();
        let best = modes.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
        let ratio = (best > 0.0).then(|| own / best);
        let beside: Vec<String> = modes.iter().map(|(mode, rate)| format!(", PyTorch {mode} {rate:.0}")).collect();
        let beside = beside.concat();
        let ratio_text = ratio.map_or(String::new(), |ratio| format!(", ratio {ratio:.2}"));
        self.print(&format!("{name:<24} {own:>8.0} tokens/s{beside}{ratio_text}"));
        let modes: serde_json::Map<String, Value> =
            modes.into_iter().map(|(mode, rate)| (mode.to_owned(), json!(rate))).collect();
        self.results.push(json!({
            "name": name,
            "parameters": model.parameters(),
            "tokens_per_second": own,
            "baseline_tokens_per_second": modes,
            "ratio": ratio,
        }));
    }

    /// Text goes to standard output when it is the result, and to standard error when JSON is.
    fn print(&self, line: &str) {
        match self.arguments.output {
            Output::Text => terminal::print(line),
            Output::Json => eprintln!("{line}"),
        }
    }
}

/// Tokens a second of each turn.
#[derive(Debug, Default)]
struct Figures {
    own: Vec<f64>,
    /// By how the baseline ran.
    baseline: Vec<(&'static str, Vec<f64>)>,
}

impl Figures {
    fn ask(
        &mut self,
        baseline: Option<&mut Baseline>,
        operation: &Operation<'_>,
        model: &BenchModel,
        seconds: f64,
    ) -> Result<(), Failure> {
        let Some(baseline) = baseline else { return Ok(()) };
        for (mode, rate) in baseline.measure(operation, model, seconds)? {
            match self.baseline.iter_mut().find(|(known, _)| *known == mode) {
                Some((_, rates)) => rates.push(rate),
                None => self.baseline.push((mode, vec![rate])),
            }
        }
        Ok(())
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = |at: usize| sorted.get(at).copied().unwrap_or(0.0);
    f64::midpoint(middle(sorted.len() / 2), middle(sorted.len().saturating_sub(1) / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        for (values, want) in [(&[3.0, 1.0, 2.0][..], 2.0), (&[4.0, 1.0], 2.5), (&[7.0], 7.0)] {
            assert!((median(values) - want).abs() < 1e-12);
        }
    }
}
