//! Shows a run while it works: bars on a terminal, lines elsewhere. All of it on standard error.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use fulgurite_trainer::progress::{ProgressEvent, ProgressSink};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Steps between two lines where there is no terminal.
const STEPS_PER_LINE: u64 = 10;

/// The sink.
pub(crate) struct TerminalProgress {
    bar: Mutex<Option<ProgressBar>>,
    terminal: bool,
}

impl TerminalProgress {
    pub(crate) fn new() -> Self {
        Self { bar: Mutex::new(None), terminal: std::io::stderr().is_terminal() }
    }

    fn start(&self, title: &str, length: Option<u64>, position: u64) {
        let template = if length.is_some() {
            "{prefix:.bold} [{bar:24}] {pos}/{len} {elapsed_precise} eta {eta} {msg}"
        } else {
            "{prefix:.bold} {spinner} {pos} {elapsed_precise} {msg}"
        };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(length, ProgressDrawTarget::stderr()).with_style(style);
        bar.set_prefix(title.to_owned());
        bar.set_position(position);
        bar.reset_eta();
        bar.enable_steady_tick(Duration::from_millis(250));
        if let Some(old) = self.bar.lock().unwrap_or_else(PoisonError::into_inner).replace(bar) {
            old.finish_and_clear();
        }
    }

    fn with_bar(&self, act: impl FnOnce(&ProgressBar)) {
        if let Some(bar) = &*self.bar.lock().unwrap_or_else(PoisonError::into_inner) {
            act(bar);
        }
    }

    fn line(&self, text: &str) {
        let bar = self.bar.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        eprintln!("{text}");
    }
}

impl ProgressSink for TerminalProgress {
    fn event(&self, event: ProgressEvent) {
        match event {
            ProgressEvent::StageStarted { kind, name, step, steps } => {
                if self.terminal {
                    self.start(&format!("{kind} {name}"), steps, step);
                } else {
                    eprintln!("{kind} {name}: starts at step {step}");
                }
            }
            ProgressEvent::StepEnded { stage, step, scalars, seconds } => {
                let shown = ["reward_mean", "malformed_share", "entropy", "loss", "zero_variance_share"]
                    .iter()
                    .filter_map(|name| scalars.get(*name).map(|value| format!("{name} {value:.3}")))
                    .collect::<Vec<_>>()
                    .join("  ");
                if self.terminal {
                    self.with_bar(|bar| {
                        bar.set_position(step + 1);
                        bar.set_message(shown);
                    });
                } else if step % STEPS_PER_LINE == 0 {
                    eprintln!("{stage} step {step}: {shown}  ({seconds:.2} s)");
                }
            }
            ProgressEvent::StageEnded { name, steps, seconds, plugin_share } => {
                let share = 100.0 * plugin_share;
                self.line(&format!(
                    "{name}: {steps} steps in {seconds:.1} s, {share:.2} % of it in the plugin's own code"
                ));
            }
            ProgressEvent::EvaluationStarted { label, kind, rollouts } => {
                if self.terminal {
                    self.start(&format!("evaluate {label}, {kind}"), Some(rollouts), 0);
                }
            }
            ProgressEvent::RolloutEnded => self.with_bar(|bar| bar.inc(1)),
            ProgressEvent::EvaluationEnded { label, kind, mean } => {
                self.line(&format!("held out, {kind}, {label}: {mean:.3}"));
            }
            ProgressEvent::Resumed { units_done, step } => {
                self.line(&format!("resumed: {units_done} parts done, step {step} of the next"));
            }
            ProgressEvent::Note(text) => self.line(&text),
        }
    }
}
