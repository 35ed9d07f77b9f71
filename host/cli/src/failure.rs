//! How errors end the binary: what went wrong, why, and what to do next.

use std::process::ExitCode;

use fulgurite_policy::PolicyError;
use fulgurite_sandbox::AlgorithmFault;
use fulgurite_trainer::config::ConfigError;
use fulgurite_trainer::{EndpointCheckError, TrainError};
use miette::{LabeledSpan, MietteDiagnostic, NamedSource, Report};

/// An error with its exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    error: anyhow::Error,
    hint: Option<String>,
    code: u8,
}

const CODE_FAILED: u8 = 1;
const CODE_USAGE: u8 = 2;
/// What shells report for a process that Ctrl-C ended.
const CODE_INTERRUPTED: u8 = 130;

impl Failure {
    /// The work failed.
    pub(crate) fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self { error: error.into(), hint: None, code: CODE_FAILED }
    }

    /// The command line, or a file that it names, is wrong.
    pub(crate) fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self { error: error.into(), hint: None, code: CODE_USAGE }
    }

    /// Says what to do next.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Prints and turns into the exit code.
    pub(crate) fn report(self) -> ExitCode {
        if let Some(report) = self.pointing() {
            eprintln!("{report:?}");
            return ExitCode::from(self.code);
        }
        eprintln!("error: {}", printable(&self.error.to_string()));
        let mut shown = self.error.to_string();
        for cause in self.error.chain().skip(1) {
            // Errors that hand through what they wrap would say the same twice.
            let text = cause.to_string();
            if !shown.contains(&text) {
                eprintln!("  caused by: {}", printable(&text));
            }
            shown = text;
        }
        if let Some(hint) = &self.hint {
            eprintln!("hint: {hint}");
        }
        ExitCode::from(self.code)
    }

    /// A report that points into the config file, where there is a place to point at.
    fn pointing(&self) -> Option<Report> {
        let Some(TrainError::Config(error)) = self.error.downcast_ref::<TrainError>() else { return None };
        let ConfigError::Parse { path, message, text, span: Some(span) } = error else { return None };
        let first_line = message.lines().next().unwrap_or_default();
        let mut diagnostic = MietteDiagnostic::new(format!("{}: {message}", path.display()));
        diagnostic.labels = Some(vec![LabeledSpan::new_with_span(Some(first_line.to_owned()), span.clone())]);
        diagnostic.help =
            Some("every key is described in host/trainer/src/config.rs and in the example's TOML".to_owned());
        Some(Report::new(diagnostic).with_source_code(NamedSource::new(path.display().to_string(), text.clone())))
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        let code = match &error {
            TrainError::Config(_)
            | TrainError::Dataset(_)
            | TrainError::Plugin(_)
            | TrainError::Kept(_)
            | TrainError::JudgeNotGranted { .. }
            | TrainError::Capability(_)
            | TrainError::Endpoint { .. }
            | TrainError::EndpointCheck(EndpointCheckError::UnknownModel { .. })
            | TrainError::Script { .. }
            | TrainError::RunExists { .. }
            | TrainError::NothingToResume { .. }
            | TrainError::ConfigChanged { .. }
            | TrainError::PolicyChanged { .. }
            | TrainError::NoWeights { .. }
            | TrainError::Policy(
                PolicyError::ModelFile { .. } | PolicyError::UnusableDevice { .. } | PolicyError::InvalidConfig { .. },
            )
            | TrainError::Algorithm { source: AlgorithmFault::InvalidConfig { .. }, .. }
            | TrainError::MissingSplit { .. } => CODE_USAGE,
            TrainError::Stopped | TrainError::Drained { .. } => CODE_INTERRUPTED,
            _ => CODE_FAILED,
        };
        let hint = match &error {
            TrainError::Algorithm { source: AlgorithmFault::InvalidConfig { .. }, .. } => {
                Some("`fulgurite plugin check COMPONENT` prints the keys that an algorithm takes, with their defaults")
            }
            TrainError::Algorithm { .. } | TrainError::EvaluationVoid { .. } => {
                Some("what the rollouts did: `fulgurite rollouts list` and `fulgurite rollouts show ROLLOUT`")
            }
            TrainError::Alarm { .. } => Some(
                "it is in a checkpoint: `--resume` goes on regardless; `[[alarm]]` in the config says what stops a run",
            ),
            TrainError::EndpointCheck(_) => Some("`fulgurite doctor --config CONFIG` asks every endpoint of a config"),
            _ => None,
        };
        Self { hint: hint.map(str::to_owned), error: error.into(), code }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        TrainError::from(error).into()
    }
}

/// Text of guests and files without control characters: an error message must not be able to rewrite the terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}
