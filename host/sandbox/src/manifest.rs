//! Finds the manifest of a component: what it asks for.
//!
//! A custom section goes where the content hash goes, so it is the rule; a file beside the component is for languages whose
//! tools cannot write one, and is read only when there is no section.

use std::path::Path;

use fulgurite_core::grant::{MANIFEST_BYTES_MAX, Manifest};
use wasmparser::{Parser, Payload};

use crate::plugin::PluginError;

/// Name of the section, in the component or in a module of it.
const SECTION: &str = "fulgurite:manifest";

/// Reads the manifest of a component; without one it asks for nothing.
pub(crate) fn read(path: &Path, component: &[u8]) -> Result<Manifest, PluginError> {
    let mut found: Option<Vec<u8>> = None;
    for payload in Parser::new(0).parse_all(component) {
        match payload {
            Ok(Payload::CustomSection(section)) if section.name() == SECTION => {
                found.get_or_insert_default().extend_from_slice(section.data());
            }
            Ok(_) => {}
            // wasmtime says better what is wrong with it.
            Err(_) => break,
        }
    }
    let beside = path.with_extension("manifest.json");
    let (path, text) = match found {
        Some(text) => (path, text),
        None => match std::fs::metadata(&beside) {
            Ok(about) if about.len() <= MANIFEST_BYTES_MAX as u64 + 1 => {
                let text = std::fs::read(&beside);
                (beside.as_path(), text.map_err(|source| PluginError::Read { path: beside.clone(), source })?)
            }
            Ok(_) => (beside.as_path(), vec![b' '; MANIFEST_BYTES_MAX + 1]),
            Err(_) => return Ok(Manifest::default()),
        },
    };
    Manifest::parse(&text).map_err(|source| PluginError::Manifest { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A component of nothing but custom sections.
    fn component(sections: &[(&str, &str)]) -> Vec<u8> {
        let mut bytes = b"\0asm\x0d\0\x01\0".to_vec();
        for (name, data) in sections {
            let length = 1 + name.len() + data.len();
            bytes.extend([0, u8::try_from(length).unwrap(), u8::try_from(name.len()).unwrap()]);
            bytes.extend(name.bytes());
            bytes.extend(data.bytes());
        }
        bytes
    }

    #[test]
    fn a_section_comes_before_a_file_and_nothing_asks_for_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tool.wasm");
        let bare = component(&[("name", "x")]);
        assert_eq!(read(&path, &bare).unwrap(), Manifest::default());
        std::fs::write(folder.path().join("tool.manifest.json"), r#"{"sqlite":["shop"]}"#).unwrap();
        assert_eq!(read(&path, &bare).unwrap().sqlite[0].name, "shop");
        let own = component(&[("name", "x"), (SECTION, r#"{"folders":["docs"]}"#)]);
        let manifest = read(&path, &own).unwrap();
        assert_eq!((manifest.folders.len(), manifest.sqlite.len()), (1, 0));
        match read(&path, &component(&[(SECTION, "{}"), (SECTION, "{}")])) {
            Err(PluginError::Manifest { .. }) => {}
            other => panic!("two manifests: {other:?}"),
        }
    }
}
