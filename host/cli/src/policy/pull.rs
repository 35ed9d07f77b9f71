//! `fulgurite policy pull`: a model from the hub into the cache, and from there to where it is wanted.
//!
//! The cache has a folder per model: `COMMIT/` with the files, and `refs/REVISION`, the commit that a revision was when the hub
//! was last asked. So a model that has come once is there without a network.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use fulgurite_policy::{ModelDescription, ModelFolder};
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::arguments::PullArguments;
use super::failure;
use super::hub::{Hub, HubError, HubFile, Listing};
use crate::arguments::Output;
use crate::failure::Failure;
use crate::{paths, terminal, train};

/// What a policy needs besides weights.
const FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];
const TOOL_TEMPLATE: &str = "additional_chat_templates/tool_use.jinja";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Stands in a commit's folder when everything has come.
const COMPLETE: &str = ".complete";

pub(crate) fn pull(arguments: &PullArguments) -> Result<(), Failure> {
    check_name("the model", &arguments.repo, 2)?;
    check_name("`--revision`", &arguments.revision, 8)?;
    let cache = paths::models().ok_or_else(|| {
        Failure::usage(anyhow!("there is no folder to keep models in")).hint("set HOME or FULGURITE_CACHE_DIR")
    })?;
    let kept = Kept { folder: cache.join(arguments.repo.replace('/', "--")) };
    let hub = Hub::of_environment().map_err(Failure::usage)?;
    let folder = match hub.listing(&arguments.repo, &arguments.revision) {
        Ok(listing) => fetch(&hub, &kept, arguments, &listing)?,
        Err(HubError::Refused(error)) => return Err(Failure::usage(error)),
        Err(HubError::Offline(error)) => match kept.commit(&arguments.revision) {
            Some(folder) => {
                eprintln!("{error}: taking what has come before, {}", folder.display());
                folder
            }
            None => {
                return Err(Failure::failed(error).hint(format!(
                    "is there a network, is HF_ENDPOINT ({}) right? A folder that was copied here is taken by `fulgurite policy import`",
                    hub.endpoint()
                )));
            }
        },
    };
    let model = ModelFolder::open(&folder).map_err(failure)?;
    let directory = match &arguments.to {
        Some(to) => {
            copy(&folder, to)?;
            to.clone()
        }
        None => folder.clone(),
    };
    let commit = folder.file_name().unwrap_or_default().to_string_lossy();
    let parameters = model.description().shape.parameter_count();
    if arguments.output == Output::Json {
        return train::print_json(&json!({
            "directory": directory, "repo": arguments.repo, "commit": commit, "parameters": parameters,
        }));
    }
    let name = model.description().architecture.model_type();
    terminal::print(&format!("{}: {name}, {parameters} parameters, commit {commit}", directory.display()));
    Ok(())
}

/// Names become parts of paths and addresses.
fn check_name(what: &str, name: &str, parts_max: usize) -> Result<(), Failure> {
    let fits = |part: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && part.chars().all(known) && !part.starts_with('.')
    };
    if name.split('/').all(fits) && name.split('/').count() <= parts_max {
        return Ok(());
    }
    Err(Failure::usage(anyhow!("{what} is `{name}`: a name has letters, digits and `-_.`, as `Qwen/Qwen3-0.6B` has")))
}

/// What has come of a model.
struct Kept {
    folder: PathBuf,
}

impl Kept {
    fn reference(&self, revision: &str) -> PathBuf {
        self.folder.join("refs").join(revision.replace('/', "--"))
    }

    /// The folder of a revision, when all of it has come.
    fn commit(&self, revision: &str) -> Option<PathBuf> {
        let commit = std::fs::read_to_string(self.reference(revision)).unwrap_or_else(|_| revision.to_owned());
        check_name("the commit", commit.trim(), 1).ok()?;
        let folder = self.folder.join(commit.trim());
        folder.join(COMPLETE).is_file().then_some(folder)
    }
}

/// Fetches what is missing of a model.
fn fetch(hub: &Hub, kept: &Kept, arguments: &PullArguments, listing: &Listing) -> Result<PathBuf, Failure> {
    let repo = &arguments.repo;
    check_name("the commit", &listing.sha, 1)?;
    let folder = kept.folder.join(&listing.sha);
    let reference = kept.reference(&arguments.revision);
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(&folder)?;
        std::fs::create_dir_all(reference.parent().unwrap_or(&folder))?;
        std::fs::write(&reference, &listing.sha)
    };
    write().with_context(|| format!("cannot write into `{}`", kept.folder.display())).map_err(Failure::failed)?;
    if folder.join(COMPLETE).is_file() {
        return Ok(folder);
    }
    let find = |name: &str| listing.siblings.iter().find(|file| file.name == name);
    let small: Vec<&HubFile> = FILES.iter().chain([&TOOL_TEMPLATE, &INDEX]).filter_map(|name| find(name)).collect();
    if find("config.json").is_none() {
        let problem = anyhow!("`{repo}` has no config.json: it is not a model that can be trained here");
        return Err(Failure::usage(problem));
    }
    all(hub, arguments, listing, &folder, &small)?;
    // Before gigabytes come: is it a model that can be used?
    ModelDescription::read(&folder).map_err(failure)?;
    let large: Vec<&HubFile> = if let Some(single) = find(SINGLE) {
        vec![single]
    } else if find(INDEX).is_some() {
        let names = shards(&folder.join(INDEX)).map_err(Failure::usage)?;
        let missing = |name: &String| Failure::usage(anyhow!("`{repo}` lacks the shard `{name}` that its index names"));
        names.iter().map(|name| find(name).ok_or_else(|| missing(name))).collect::<Result<_, _>>()?
    } else {
        let problem = anyhow!("`{repo}` has neither {SINGLE} nor {INDEX}: weights in other formats are not read");
        return Err(Failure::usage(problem));
    };
    all(hub, arguments, listing, &folder, &large)?;
    // A folder with an index beside the single file would be read as the single file anyway.
    ModelFolder::open(&folder).map_err(failure)?;
    std::fs::write(folder.join(COMPLETE), "").context("cannot finish the download").map_err(Failure::failed)?;
    Ok(folder)
}

/// The files that an index names.
fn shards(index: &Path) -> anyhow::Result<BTreeSet<String>> {
    let shown = index.display();
    let text = std::fs::read(index).with_context(|| format!("cannot read `{shown}`"))?;
    let value: Value = serde_json::from_slice(&text).with_context(|| format!("{shown}: it is not JSON"))?;
    let map = value.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| anyhow!("{shown}: it has no `weight_map`"))?;
    let names: BTreeSet<String> = map.values().filter_map(Value::as_str).map(str::to_owned).collect();
    match names.iter().find(|name| Path::new(name).file_name().is_none_or(|file| file != name.as_str())) {
        Some(name) => Err(anyhow!("{shown}: `weight_map` names `{name}`, which is not a file of the model's folder")),
        None => Ok(names),
    }
}

/// Fetches files, with progress.
fn all(
    hub: &Hub,
    arguments: &PullArguments,
    listing: &Listing,
    folder: &Path,
    files: &[&HubFile],
) -> Result<(), Failure> {
    for file in files {
        let bar = if std::io::stderr().is_terminal() {
            let template = "{prefix} [{bar:24}] {bytes}/{total_bytes} {bytes_per_sec} eta {eta}";
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::with_draw_target(file.bytes(), ProgressDrawTarget::stderr())
                .with_style(style)
                .with_prefix(file.name.clone())
        } else {
            ProgressBar::hidden()
        };
        let mut first = None;
        let mut last = 0;
        let fetched = hub.fetch(&arguments.repo, &listing.sha, file, folder, &mut |bytes| {
            first.get_or_insert(bytes);
            last = bytes;
            bar.set_position(bytes);
        });
        bar.finish_and_clear();
        fetched.map_err(|error| {
            Failure::failed(error).hint("what has come is kept: the same command goes on from there")
        })?;
        let kept = first.filter(|bytes| *bytes > 0).map(|bytes| format!(", {} of it from before", HumanBytes(bytes)));
        eprintln!("{}: {}{}", file.name, HumanBytes(last), kept.unwrap_or_default());
    }
    Ok(())
}

/// Puts the files of a folder into another, which appears whole or not at all. The disk holds weights once where it can; the
/// other files are copied, because people edit them.
fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    let name = to.file_name().ok_or_else(|| Failure::usage(anyhow!("`--to {}` names no folder", to.display())))?;
    if to.exists() {
        let problem = anyhow!("`{}` is there already: remove it or choose another by `--to`", to.display());
        return Err(Failure::usage(problem));
    }
    let temporary = to.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let write = || -> std::io::Result<()> {
        for name in files_of(from)? {
            let target = temporary.join(&name);
            std::fs::create_dir_all(target.parent().unwrap_or(&temporary))?;
            let is_large = name.extension().is_some_and(|extension| extension == "safetensors");
            if !is_large || std::fs::hard_link(from.join(&name), &target).is_err() {
                std::fs::copy(from.join(&name), &target)?;
                std::fs::File::open(&target)?.sync_all()?;
            }
        }
        std::fs::rename(&temporary, to)
    };
    let written = write();
    if written.is_err() {
        // The error says more than that nothing could be tidied up.
        drop(std::fs::remove_dir_all(&temporary));
    }
    written.with_context(|| format!("cannot write `{}`", to.display())).map_err(Failure::failed)
}

/// The files of a model's folder in the cache.
fn files_of(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut names = vec![];
    for entry in std::fs::read_dir(folder)? {
        let name = PathBuf::from(entry?.file_name());
        let is_ours = name.as_os_str() != COMPLETE && name.extension().is_none_or(|extension| extension != "part");
        if is_ours && folder.join(&name).is_file() {
            names.push(name);
        }
    }
    if folder.join(TOOL_TEMPLATE).is_file() {
        names.push(PathBuf::from(TOOL_TEMPLATE));
    }
    Ok(names)
}
