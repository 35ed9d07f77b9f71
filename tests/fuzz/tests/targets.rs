//! Runs every target: on its corpus, and for a while on what comes of it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use fulgurite_fuzz::{Numbers, Settings, TARGETS, Target, corpus, drive, rerun};

/// Largest corpus of one target in bytes: what a reader of the tree can bear.
const CORPUS_BYTES_MAX: usize = 32 << 10;

#[track_caller]
fn fuzz(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    if let Some(input) = std::env::var_os("FULGURITE_FUZZ_INPUT") {
        println!("{name}: {:?}", rerun(target, Path::new(&input)).unwrap_or_else(|said| panic!("{said}")));
        return;
    }
    let settings = Settings::from_environment();
    match drive(target, &settings) {
        Ok(statistics) => println!("{name}: {statistics:?} in {:?} from seed {}", settings.duration, settings.seed),
        Err(failure) => panic!("{failure}"),
    }
}

/// A function for each target, so that they run beside each other.
macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test] fn $name() { fuzz(stringify!($name)); })*

        #[test]
        fn every_target_is_run() {
            assert_eq!(TARGETS.map(|target| target.name), [$(stringify!($name)),*]);
        }
    };
}

targets! { config span_decoding record_decoding value_unpacking endpoint_answer plugin_inspection }

/// A corpus that is refused from the first byte on would test the first byte. Files called `refused-…` are meant to be.
#[test]
fn the_corpus_is_small_and_is_accepted() {
    for target in &TARGETS {
        let files = corpus(target);
        let bytes: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(bytes <= CORPUS_BYTES_MAX, "{}: {bytes} bytes", target.name);
        for (name, input) in files {
            let verdict = (target.run)(&input);
            let accepted = verdict.ends_with("ok");
            let hint =
                "when a record was changed on purpose: FULGURITE_FUZZ_WRITE_CORPUS=1 cargo test -p fulgurite-fuzz";
            assert_eq!(accepted, !name.starts_with("refused-"), "{}/{name}: {verdict}\n{hint}", target.name);
        }
    }
}

/// A target that fails is found, the input is kept, and it fails again when it is run alone.
#[test]
fn a_failure_is_found_kept_and_repeated() {
    fn fails(bytes: &[u8]) -> String {
        assert!(!bytes.windows(6).any(|word| word == b"[tools"), "as it should");
        String::new()
    }
    let folder = tempfile::tempdir().unwrap();
    let target =
        Target { name: "config", run: fails, dictionary: &[b"[tools"], numbers: Numbers::Text, input_bytes_max: 1_000 };
    let settings = Settings { duration: Duration::from_mins(10), seed: 7, failures: folder.path().to_owned() };
    let failure = drive(&target, &settings).unwrap_err();
    assert!(failure.said.contains("as it should"), "{failure}");
    assert!(failure.to_string().contains(&format!("FULGURITE_FUZZ_INPUT={}", failure.input.display())), "{failure}");
    assert!(rerun(&target, &failure.input).unwrap_err().contains("as it should"));
    let other = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    assert_eq!(rerun(&target, &other), Ok(String::new()));
}
