//! What is loaded, what is refused, and what the refusal says.
#![allow(clippy::panic, clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::path::{Path, PathBuf};

use fulgurite_core::id::ContentHash;
use fulgurite_sandbox::{PluginError, PluginWorld, Sandbox, SandboxSettings};
use support::{guest, sandbox};

fn write(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A component with one of its names changed to another of the same length.
fn patched(dir: &Path, from: &str, to: &str) -> PathBuf {
    assert_eq!(from.len(), to.len());
    let mut bytes = std::fs::read(guest("nasty_agent")).unwrap();
    let mut found = 0;
    for start in 0..bytes.len() - from.len() {
        if &bytes[start..start + from.len()] == from.as_bytes() {
            bytes[start..start + from.len()].copy_from_slice(to.as_bytes());
            found += 1;
        }
    }
    assert!(found > 0, "{from} is not in the component");
    write(dir, "patched.wasm", &bytes)
}

fn refused(path: &Path) -> (PluginError, String) {
    let error = sandbox().load_agent(path).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()), "names the file: {text}");
    (error, text)
}

#[test]
fn only_components_are_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let (error, text) = refused(&dir.path().join("missing.wasm"));
    assert!(matches!(error, PluginError::Read { .. }) && text.contains("fulgurite build"), "{text}");
    let (error, _) = refused(&write(dir.path(), "empty.wasm", b""));
    assert!(matches!(error, PluginError::NotWebAssembly { found: "empty", .. }));
    let (error, _) = refused(&write(dir.path(), "text.wasm", b"fn main() {}"));
    assert!(matches!(error, PluginError::NotWebAssembly { found: "a text", .. }));
    let (error, text) = refused(&write(dir.path(), "compiled.cwasm", b"\x7fELF\x02\x01\x01"));
    assert!(matches!(error, PluginError::NotWebAssembly { .. }) && text.contains("never loaded"), "{text}");
    let (error, text) = refused(&write(dir.path(), "core.wasm", b"\0asm\x01\0\0\0"));
    assert!(matches!(error, PluginError::CoreModule { .. }) && text.contains("wasm32-wasip2"), "{text}");
    let (error, _) = refused(&write(dir.path(), "broken.wasm", b"\0asm\x0d\0\x01\0garbage"));
    assert!(matches!(error, PluginError::Invalid { .. }));
}

#[test]
fn a_plugin_of_another_world_is_refused() {
    let (error, text) = refused(&guest("nasty_grader"));
    assert!(matches!(error, PluginError::WrongWorld { .. }));
    assert!(text.contains("is not an agent: it implements grader"), "{text}");
    assert!(sandbox().load_grader(&guest("nasty_agent")).is_err());
}

#[test]
fn an_unknown_version_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = patched(dir.path(), "fulgurite:agent/llm@0.1.0", "fulgurite:agent/llm@0.9.0");
    match refused(&path) {
        (PluginError::UnknownVersion { package, found, offered, .. }, _) => {
            assert_eq!((package.as_str(), found.as_str(), offered), ("fulgurite:agent", "0.9.0", "0.1.0"));
        }
        (other, _) => panic!("{other:?}"),
    }
}

#[test]
fn an_import_that_is_not_offered_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = patched(dir.path(), "fulgurite:agent/emit@0.1.0", "fulgurite:agent/root@0.1.0");
    match refused(&path) {
        (PluginError::ImportNotOffered { import, world, .. }, text) => {
            assert_eq!((import.as_str(), world), ("fulgurite:agent/root@0.1.0", "agent"));
            assert!(text.contains("which an agent is not given"), "{text}");
        }
        (other, _) => panic!("{other:?}"),
    }
    let info = sandbox().inspect(&path).unwrap();
    assert_eq!(info.refused().collect::<Vec<_>>(), ["fulgurite:agent/root@0.1.0"]);
}

#[test]
fn types_that_do_not_fit_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = patched(dir.path(), "request.set-top-p", "request.set-top-q");
    let (error, _) = refused(&path);
    match &error {
        PluginError::Incompatible { source, .. } => assert!(source.to_string().contains("set-top-q"), "{source}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn inspecting_says_what_a_plugin_is() {
    let path = guest("nasty_agent");
    let info = sandbox().inspect(&path).unwrap();
    assert_eq!(info.worlds, [PluginWorld::Agent]);
    assert_eq!(info.hash, ContentHash::of(&std::fs::read(&path).unwrap()));
    assert_eq!(info.hash, sandbox().load_agent(&path).unwrap().hash());
    assert!(info.packages.contains(&("fulgurite:agent".to_owned(), "0.1.0".to_owned())));
    assert!(info.imports.iter().any(|import| import.name == "fulgurite:agent/llm@0.1.0" && import.offered));
    assert_eq!(info.refused().count(), 0);
    assert!(info.limits.contains(&"llm_calls_max"));
    for (name, world) in [
        ("nasty_grader", PluginWorld::Grader),
        ("nasty_tool", PluginWorld::Tool),
        ("nasty_algorithm", PluginWorld::Algorithm),
    ] {
        let info = sandbox().inspect(&guest(name)).unwrap();
        assert_eq!((info.worlds.as_slice(), info.refused().count()), ([world].as_slice(), 0), "{:?}", info.imports);
    }
}

/// Every limit that is said to apply is a field of the config.
#[test]
fn limits_are_named_as_in_the_config() {
    let known = serde_json::to_value(fulgurite_core::limits::Limits::default()).unwrap();
    for world in PluginWorld::ALL {
        for name in world.limits() {
            assert!(known.get(name).is_some(), "{name}");
        }
    }
}

#[test]
fn compiled_code_is_kept_in_a_private_folder_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let settings = SandboxSettings { cache_dir: Some(cache.clone()), ..SandboxSettings::default() };
    Sandbox::new(settings.clone()).unwrap().load_tool(&guest("nasty_tool")).unwrap();
    let files = || walk(&cache);
    let before = files();
    assert!(before > 0, "nothing was cached");
    Sandbox::new(settings).unwrap().load_tool(&guest("nasty_tool")).unwrap();
    assert!(files() >= before);
}

fn walk(dir: &Path) -> usize {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { walk(&path) } else { 1 }).sum()
}
