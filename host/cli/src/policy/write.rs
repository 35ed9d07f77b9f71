//! Commands that make a folder with a model.

use std::io::IsTerminal;

use anyhow::{Context, anyhow};
use fulgurite_core::seed::Seed;
use fulgurite_policy::{
    ExportOptions, Exported, PolicyConfig, PolicyError, PolicyTokenizer, Preset, TokenizerConfig, Written,
    adapter_folder, export_adapter, export_checkpoint, holds_adapter, import_folder, merge_adapter, named_model,
    new_folder,
};
use fulgurite_trainer::{trained_base, trained_weights};
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::arguments::{ExportArguments, ImportArguments, InitArguments, MergeArguments, PresetName, WriteArguments};
use super::failure;
use crate::arguments::Output;
use crate::failure::Failure;
use crate::{terminal, train};

pub(crate) fn import(arguments: &ImportArguments) -> Result<(), Failure> {
    made(&arguments.write, |options, written| {
        import_folder(&arguments.directory, &arguments.write.to, options, written)
    })
}

pub(crate) fn export(arguments: &ExportArguments) -> Result<(), Failure> {
    let checkpoint = trained_weights(&arguments.directory)?;
    if !checkpoint.join("state.json").is_file() {
        let shown = checkpoint.display();
        let problem =
            anyhow!("`{shown}` is neither a run nor a checkpoint of one: it has no config.toml and no state.json");
        return Err(Failure::usage(problem));
    }
    let (name, to) = (arguments.adapter.as_deref(), &arguments.write.to);
    let whole = name.and_then(|name| named_model(&checkpoint, name));
    let is_whole = whole.is_some();
    let checkpoint = whole.unwrap_or(checkpoint);
    eprintln!("exporting {}", checkpoint.display());
    if (name.is_none() || is_whole) && !holds_adapter(&checkpoint) {
        return made(&arguments.write, |options, written| export_checkpoint(&checkpoint, to, options, written));
    }
    let base = trained_base(&checkpoint).map(|path| path.display().to_string());
    made(&arguments.write, |options, _| export_adapter(&checkpoint, name, base.as_deref(), to, options))
}

pub(crate) fn merge(arguments: &MergeArguments) -> Result<(), Failure> {
    let checkpoint = trained_weights(&arguments.adapter)?;
    let adapter = match &arguments.name {
        Some(name) => adapter_folder(&checkpoint, Some(name)).map_err(failure)?,
        None => checkpoint,
    };
    made(&arguments.write, |options, written| {
        merge_adapter(&arguments.base, &adapter, &arguments.write.to, options, written)
    })
}

pub(crate) fn init(arguments: &InitArguments) -> Result<(), Failure> {
    let mut settings = TokenizerConfig::default();
    settings.atoms_pattern.clone_from(&arguments.atoms_pattern);
    settings.vocab_size = arguments.vocab_size.unwrap_or(settings.vocab_size);
    let corpus = match &arguments.tokenizer_corpus {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()));
            text.map_err(Failure::usage)?.lines().map(str::to_owned).collect()
        }
        None => vec![],
    };
    let tokenizer = PolicyTokenizer::train(corpus.into_iter(), &settings).map_err(failure)?;
    let preset = match arguments.preset {
        PresetName::Tiny => Preset::Tiny,
        PresetName::Small => Preset::Small,
        PresetName::Base => Preset::Base,
    };
    let config =
        PolicyConfig { preset: Some(preset), context_tokens_max: arguments.context_tokens, ..PolicyConfig::default() };
    let seed = Seed::new(arguments.seed).child("policy");
    made(&arguments.write, |options, written| {
        new_folder(&config, &tokenizer, seed, &arguments.write.to, options, written)
    })
}

/// Makes a folder, with progress, and says what was made.
fn made(
    arguments: &WriteArguments,
    make: impl FnOnce(&ExportOptions, Written<'_>) -> Result<Exported, PolicyError>,
) -> Result<(), Failure> {
    let bar = if std::io::stderr().is_terminal() {
        let style = ProgressStyle::with_template("[{bar:24}] {bytes}/{total_bytes} {bytes_per_sec} eta {eta}");
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    } else {
        ProgressBar::hidden()
    };
    let mut written = |done: u64, total: u64| {
        bar.set_length(total);
        bar.set_position(done);
        if bar.is_hidden() && done > 0 {
            eprintln!("written {} of {}", HumanBytes(done), HumanBytes(total));
        }
    };
    let found = make(&arguments.options(), &mut written);
    bar.finish_and_clear();
    let found = found.map_err(failure)?;
    if arguments.output == Output::Json {
        return train::print_json(&found);
    }
    let Exported { directory, parameters, file_type, files, bytes } = found;
    let kind = file_type.name();
    let text = format!(
        "{}: {parameters} parameters, {kind} {} in {files} safetensors",
        directory.display(),
        HumanBytes(bytes)
    );
    terminal::print(&text);
    Ok(())
}
