//! The PyTorch side: processes of `torch_policy.py` that answer a line of JSON each.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, anyhow};
use serde::Deserialize;
use serde_json::{Value, json};

use super::model::BenchModel;
use crate::failure::Failure;

/// What the baseline is asked to do.
pub(super) enum Operation<'a> {
    /// Steps on a batch of rows of so many tokens.
    Train {
        /// Rows of the batch.
        rows: usize,
        /// Tokens of each.
        tokens: usize,
    },
    /// New tokens with a hand-written loop, from prompts of these lengths.
    Decode {
        /// Tokens of each prompt.
        prompts: &'a [usize],
    },
    /// New tokens with transformers' `generate`.
    Generate {
        /// Tokens of each prompt.
        prompts: &'a [usize],
    },
}

impl Operation<'_> {
    /// The `index`-th of `count` parts of the work, for a process of its own; `None` when it cannot be divided.
    fn part(&self, index: usize, count: usize) -> Option<Value> {
        let of = |prompts: &[usize]| {
            let part: Vec<usize> = prompts.iter().copied().skip(index).step_by(count).collect();
            (prompts.len() >= count).then_some(part)
        };
        match self {
            Self::Train { rows, tokens } => {
                let request = || json!({ "operation": "train", "rows": rows / count, "tokens": tokens });
                rows.is_multiple_of(count).then(request)
            }
            Self::Decode { prompts } => Some(json!({ "operation": "decode", "prompts": of(prompts)? })),
            Self::Generate { prompts } => Some(json!({ "operation": "generate", "prompts": of(prompts)? })),
        }
    }
}

/// What a measurement of a process came to.
#[derive(Debug, Deserialize)]
struct Answer {
    tokens: f64,
    seconds: f64,
}

/// Processes that wait for work.
pub(super) struct Baseline {
    /// One with two threads.
    one: Process,
    /// Two with one thread each.
    two: [Process; 2],
    about: Value,
}

impl Baseline {
    /// Starts the processes and lets them load PyTorch.
    pub(super) fn start(python: &Path, script: &Path) -> Result<Self, Failure> {
        let start = |threads| Process::start(python, script, threads);
        let (mut one, two) = (start(2)?, [start(1)?, start(1)?]);
        one.send(&json!({ "operation": "hello" }))?;
        let about = one.answer()?;
        Ok(Self { one, two, about })
    }

    /// Versions.
    pub(super) fn about(&self) -> Value {
        self.about.clone()
    }

    /// Tokens a second as one process of two threads and as two of one thread. What cannot be divided runs on one thread
    /// instead, where operations are small enough to be faster there.
    pub(super) fn measure(
        &mut self,
        operation: &Operation<'_>,
        model: &BenchModel,
        seconds: f64,
    ) -> Result<Vec<(&'static str, f64)>, Failure> {
        let mut figures = vec![];
        let mut run = |mode, processes: &mut [Process]| -> Result<bool, Failure> {
            let count = processes.len();
            let parts: Option<Vec<Value>> = (0..count).map(|index| operation.part(index, count)).collect();
            let Some(parts) = parts else { return Ok(false) };
            for (process, mut part) in processes.iter_mut().zip(parts) {
                if let Value::Object(fields) = &mut part {
                    fields.insert("seconds".to_owned(), json!(seconds));
                    fields.insert("sizes".to_owned(), model.sizes());
                }
                process.send(&part)?;
            }
            let mut rate = 0.0;
            for process in processes {
                let answer: Answer = serde_json::from_value(process.answer()?).map_err(Failure::failed)?;
                rate += answer.tokens / answer.seconds.max(1e-9);
            }
            figures.push((mode, rate));
            Ok(true)
        };
        run("1x2", std::slice::from_mut(&mut self.one))?;
        if !run("2x1", &mut self.two)? {
            let [first, _] = &mut self.two;
            run("1x1", std::slice::from_mut(first))?;
        }
        Ok(figures)
    }
}

/// One process; it ends when this is dropped.
struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn start(python: &Path, script: &Path, threads: usize) -> Result<Self, Failure> {
        if !script.is_file() {
            let error = anyhow!("there is no baseline at `{}`", script.display());
            return Err(
                Failure::usage(error).hint("`--script FILE` names tests/baselines/torch_policy.py of the sources")
            );
        }
        let mut command = Command::new(python);
        command.arg(script).args(["--serve", "--threads", &threads.to_string()]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let text = || format!("cannot start the baseline with `{}`", python.display());
        let mut child = child.with_context(text).map_err(Failure::usage)?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (input, output) = pipes.ok_or_else(|| Failure::failed(anyhow!("the baseline has no pipes")))?;
        Ok(Self { child, input, output: BufReader::new(output) })
    }

    fn send(&mut self, request: &Value) -> Result<(), Failure> {
        let sent = writeln!(self.input, "{request}").and_then(|()| self.input.flush());
        sent.context("the baseline has ended").map_err(|error| ended(Failure::failed(error)))
    }

    fn answer(&mut self) -> Result<Value, Failure> {
        let mut line = String::new();
        let read = self.output.read_line(&mut line).context("the baseline cannot be read").map_err(Failure::failed)?;
        if read == 0 {
            return Err(ended(Failure::failed(anyhow!("the baseline ended without an answer"))));
        }
        serde_json::from_str(&line).with_context(|| format!("the baseline printed `{line}`")).map_err(Failure::failed)
    }
}

fn ended(failure: Failure) -> Failure {
    failure.hint("the Python of `--baseline` needs the packages of tests/baselines/requirements.txt")
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
