//! `fulgurite plugin new` and `plugin check`.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use fulgurite_core::algorithm::AlgorithmDescription;
use fulgurite_core::limits::Limits;
use fulgurite_sandbox::{PluginInfo, PluginWorld, Sandbox, SandboxSettings};
use serde_json::{Value, json};

use crate::arguments::{Output, PluginCheckArguments, PluginKind, PluginNewArguments};
use crate::failure::{Failure, printable};
use crate::terminal::{Style, paint};
use crate::{paths, terminal, train};

/// The files of a new plugin: name and text, with placeholders.
fn templates(kind: PluginKind) -> [(&'static str, &'static str); 2] {
    macro_rules! files {
        ($kind:literal) => {
            [
                ("Cargo.toml", include_str!(concat!("../../../sdk/rust/templates/", $kind, "/Cargo.toml.template"))),
                ("src/lib.rs", include_str!(concat!("../../../sdk/rust/templates/", $kind, "/src/lib.rs.template"))),
            ]
        };
    }
    match kind {
        PluginKind::Agent => files!("agent"),
        PluginKind::Grader => files!("grader"),
        PluginKind::Tool => files!("tool"),
        PluginKind::Algorithm => files!("algorithm"),
    }
}

pub(crate) fn new(arguments: &PluginNewArguments) -> Result<(), Failure> {
    check_name(&arguments.name)?;
    let folder = arguments.path.clone().unwrap_or_else(|| PathBuf::from(&arguments.name));
    if folder.exists() {
        let problem = anyhow!("`{}` is there already; nothing was written", folder.display());
        return Err(Failure::usage(problem).hint("choose another name, or another place by `--path DIR`"));
    }
    let sdk = sdk(arguments.sdk.as_deref())?;
    for (name, text) in templates(arguments.kind) {
        let path = folder.join(name);
        let text = text.replace("{{name}}", &arguments.name).replace("{{sdk}}", &sdk.display().to_string());
        let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&path, text));
        written.with_context(|| format!("cannot write `{}`", path.display())).map_err(Failure::failed)?;
    }
    let folder = folder.display();
    terminal::print(&folder.to_string());
    eprintln!("next: `fulgurite build {folder}`, then name the component it prints in your config");
    Ok(())
}

/// A crate name that is also a usable component name.
fn check_name(name: &str) -> Result<(), Failure> {
    let lower = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
    if name.bytes().all(lower) && name.starts_with(|first: char| first.is_ascii_lowercase()) && name.len() <= 64 {
        return Ok(());
    }
    let shown = printable(name);
    let problem = anyhow!("`{shown}` is not a crate name: use a-z, 0-9, `-` and `_`, a letter first, at most 64");
    Err(Failure::usage(problem).hint("for example: fulgurite plugin new --kind agent my-agent"))
}

/// The folder of the SDK crate that a new plugin depends on.
fn sdk(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sdk/rust");
    let sdk = given.map_or(built_from, Path::to_path_buf);
    let found = sdk.canonicalize().ok().filter(|sdk| sdk.join("Cargo.toml").is_file());
    found.ok_or_else(|| {
        let problem = anyhow!("`{}` is not the folder of the fulgurite-sdk crate", sdk.display());
        Failure::usage(problem).hint("name it by `--sdk DIR` or FULGURITE_SDK: it is sdk/rust of the source tree")
    })
}

pub(crate) fn check(arguments: &PluginCheckArguments) -> Result<(), Failure> {
    let sandbox = Sandbox::new(SandboxSettings::new(paths::cache(), &Limits::default())).map_err(Failure::failed)?;
    let info = sandbox.inspect(&arguments.file).map_err(Failure::usage)?;
    let limits = limits(&info).map_err(Failure::failed)?;
    let algorithm = algorithm(&sandbox, &info)?;
    if arguments.output == Output::Json {
        let imports: Vec<_> = info.imports.iter().map(|i| json!({"name": i.name, "offered": i.offered})).collect();
        train::print_json(&json!({
            "file": info.path,
            "hash": info.hash.to_string(),
            "size_bytes": info.size_bytes,
            "worlds": info.worlds.iter().map(|world| format!("{world:?}").to_lowercase()).collect::<Vec<_>>(),
            "packages": info.packages.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
            "imports": imports,
            "limits": limits,
            "manifest": info.manifest,
            "algorithm": algorithm.as_ref().map(|algorithm| json!({
                "name": algorithm.name,
                "version": algorithm.version,
                "defaults": parsed(&algorithm.defaults),
                "config_schema": parsed(&algorithm.config_schema),
            })),
        }))?;
    } else {
        print(&info, &limits, algorithm.as_ref());
    }
    let refused: Vec<_> = info.refused().collect();
    if !refused.is_empty() {
        let problem = anyhow!("it asks for what the sandbox does not offer: {}", refused.join(", "));
        return Err(Failure::usage(problem));
    }
    if info.worlds.is_empty() {
        let problem = anyhow!("`{}` is a component, but implements no world of fulgurite", info.path.display());
        return Err(Failure::usage(problem).hint("`fulgurite plugin new --kind agent NAME` writes one that does"));
    }
    Ok(())
}

/// What an algorithm says of itself.
fn algorithm(sandbox: &Sandbox, info: &PluginInfo) -> Result<Option<AlgorithmDescription>, Failure> {
    if !info.worlds.contains(&PluginWorld::Algorithm) || info.refused().next().is_some() {
        return Ok(None);
    }
    let plugin = sandbox.load_algorithm(&info.path).map_err(Failure::usage)?;
    crate::runtime()?.block_on(plugin.describe()).map(Some).map_err(Failure::failed)
}

/// JSON text of a plugin as a value; what is no JSON stays a text.
fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| text.into())
}

/// The keys that `[stage.config]` takes, with what they are when they are left out.
fn print_config(algorithm: &AlgorithmDescription) {
    let title = paint(&format!("{:<10}", "config"), Style::Bold, terminal::colours());
    terminal::print(&format!(
        "{title} of {} {} (keys under [stage.config], with their defaults)",
        printable(&algorithm.name),
        printable(&algorithm.version)
    ));
    let defaults = parsed(&algorithm.defaults);
    let Some(keys) = defaults.as_object() else { return };
    for (key, value) in keys {
        let shown = match value {
            Value::Null => "(not set)".to_owned(),
            value => value.to_string(),
        };
        terminal::print(&format!("  {} = {}", printable(key), printable(&shown)));
    }
}

/// The limits that apply to a plugin, with their defaults.
fn limits(info: &PluginInfo) -> anyhow::Result<serde_json::Map<String, Value>> {
    let defaults = serde_json::to_value(Limits::default()).context("cannot list the limits")?;
    let known = |name: &&str| defaults.get(*name).map(|value| ((*name).to_owned(), value.clone()));
    Ok(info.limits.iter().filter_map(known).collect())
}

/// The plugin's place in a config.
fn place(info: &PluginInfo) -> &'static str {
    match info.worlds.first() {
        Some(PluginWorld::Agent) => "agent",
        Some(PluginWorld::Grader) => "grader",
        _ => "tools.NAME",
    }
}

/// What its manifest asks for, with the lines that grant it.
fn print_asks(info: &PluginInfo) {
    let colours = terminal::colours();
    let title = paint(&format!("{:<10}", "needs"), Style::Bold, colours);
    if info.manifest.asks().next().is_none() {
        terminal::print(&format!("{title} no grants"));
        return;
    }
    terminal::print(&format!("{title} (granted by lines under [{}.grants] of the config)", place(info)));
    for (capability, ask) in info.manifest.asks() {
        let optional = if ask.optional { ", optional" } else { "" };
        let why = if ask.why.is_empty() { String::new() } else { format!(": {}", printable(&ask.why)) };
        terminal::print(&format!("  {} {}{optional}{why}", capability.as_str(), printable(&ask.name)));
        terminal::print(&paint(&format!("    {}", printable(&capability.line(&ask.name))), Style::Dim, colours));
    }
}

fn print(info: &PluginInfo, limits: &serde_json::Map<String, Value>, algorithm: Option<&AlgorithmDescription>) {
    let colours = terminal::colours();
    let title = |text: &str| paint(&format!("{text:<10}"), Style::Bold, colours);
    terminal::print(&format!("{} {}", title("file"), info.path.display()));
    terminal::print(&format!("{} {} ({} bytes)", title("hash"), info.hash, info.size_bytes));
    let worlds: Vec<_> = info.worlds.iter().map(|world| format!("{world:?}").to_lowercase()).collect();
    terminal::print(&format!("{} {}", title("worlds"), worlds.join(", ")));
    let packages: Vec<_> = info.packages.iter().map(|(name, version)| format!("{name}@{version}")).collect();
    terminal::print(&format!("{} {}", title("built with"), printable(&packages.join(", "))));
    terminal::print(&title("asks for"));
    for import in &info.imports {
        let mark = if import.offered { "" } else { "   not offered" };
        terminal::print(&format!("  {}{}", printable(&import.name), paint(mark, Style::Red, colours)));
    }
    print_asks(info);
    // An algorithm has the run's limits; those of the others can be narrowed.
    let narrowed = algorithm.map_or_else(|| format!(", [{}.limits] narrows them", place(info)), |_| String::new());
    terminal::print(&format!("{} (defaults; [limits] in the config changes them{narrowed})", title("limits")));
    for (name, value) in limits {
        terminal::print(&format!("  {name} = {value}"));
    }
    if let Some(algorithm) = algorithm {
        print_config(algorithm);
    }
}
