//! The driver: mutates, runs, keeps what is new, and writes down what fails.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{Seek, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fulgurite_core::id::ContentHash;
use fulgurite_core::seed::{Generator, Seed};

use crate::mutation::mutate;
use crate::{Target, Verdict};

/// Most inputs that a run keeps because they came to something new.
const NEW_MAX: usize = 256;
/// Most accepted inputs that a run keeps: a later one then takes the place of one of them.
const ACCEPTED_MAX: usize = 64;
/// Longest that one input may take. Most take microseconds; a compiler of a few KiB of WebAssembly takes milliseconds.
const INPUT_TIME_MAX: Duration = Duration::from_secs(10);

/// How to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// How long.
    pub duration: Duration,
    /// From which seed.
    pub seed: u64,
    /// Where failing inputs go.
    pub failures: PathBuf,
}

impl Settings {
    /// What the environment says: `FULGURITE_FUZZ_SECONDS` (10) and `FULGURITE_FUZZ_SEED` (0, so that a test repeats).
    #[must_use]
    pub fn from_environment() -> Self {
        let number = |name: &str, otherwise| {
            std::env::var(name).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name}: `{text}`")))
        };
        Self {
            duration: Duration::from_secs(number("FULGURITE_FUZZ_SECONDS", 10)),
            seed: number("FULGURITE_FUZZ_SEED", 0),
            failures: Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/fuzz"),
        }
    }
}

/// What a run did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statistics {
    /// Inputs run.
    pub inputs: u64,
    /// Of these, accepted.
    pub accepted: u64,
    /// Different refusals.
    pub refusals: usize,
}

/// An input on which a target failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The target.
    pub target: &'static str,
    /// Where the input is kept.
    pub input: PathBuf,
    /// What the target said.
    pub said: String,
    /// Seed of the run.
    pub seed: u64,
    /// How many inputs it took.
    pub inputs: u64,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, input, said, seed, inputs } = self;
        writeln!(f, "{target} failed on input {inputs} of seed {seed}: {said}")?;
        writeln!(f, "the input is kept; run exactly this one again:")?;
        write!(f, "FULGURITE_FUZZ_INPUT={} cargo test --release -p fulgurite-fuzz {target}", input.display())
    }
}

/// The files in a target's folder of `corpus`, in the order of their names. Components may be written as text (`.wat`).
///
/// # Panics
/// When the folder is empty or a file of it cannot be read.
#[must_use]
pub fn corpus(target: &Target) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a file of the corpus").path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", folder.display());
    let read = |path: &PathBuf| {
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let text = path.extension().is_some_and(|extension| extension == "wat");
        let bytes = if text { wat::parse_bytes(&bytes).expect("a component as text").into_owned() } else { bytes };
        (path.file_name().unwrap_or_default().to_string_lossy().into_owned(), bytes)
    };
    paths.iter().map(read).collect()
}

/// Runs a target on the corpus and on what comes of it.
///
/// # Errors
/// The first input on which it fails.
///
/// # Panics
/// When the corpus cannot be read or the folder of failures cannot be written.
pub fn drive(target: &Target, settings: &Settings) -> Result<Statistics, Box<Failure>> {
    std::fs::create_dir_all(&settings.failures).expect("a folder for failures");
    let mut under_way = UnderWay::new(&settings.failures, target);
    let seeds: Vec<Vec<u8>> = corpus(target).into_iter().map(|(_, bytes)| bytes).collect();
    let (mut accepted, mut new) = (vec![], vec![]);
    let mut refusals = BTreeSet::new();
    let mut statistics = Statistics { inputs: 0, accepted: 0, refusals: 0 };
    let mut generator = Generator::new(Seed::new(settings.seed).child(target.name));
    let mut rest = seeds.iter();
    let start = Instant::now();
    loop {
        let input = match rest.next() {
            Some(seed) => seed.clone(),
            None if start.elapsed() >= settings.duration => break,
            // What is accepted is worth more changes than what has failed early; the corpus is never forgotten.
            None => mutate(target, [&accepted, &accepted, &seeds, &new], &mut generator),
        };
        under_way.write(&input);
        statistics.inputs += 1;
        let verdict = run(target, &input).map_err(|said| {
            let (seed, inputs) = (settings.seed, statistics.inputs);
            Box::new(Failure { target: target.name, input: keep(settings, target, &input), said, seed, inputs })
        })?;
        let ok = verdict.ends_with("ok");
        statistics.accepted += u64::from(ok);
        if ok && accepted.len() >= ACCEPTED_MAX {
            let place = generator.below(ACCEPTED_MAX);
            accepted[place] = input;
        } else if ok {
            accepted.push(input);
        } else if refusals.insert(verdict) && new.len() < NEW_MAX {
            new.push(input);
        }
    }
    statistics.refusals = refusals.len();
    Ok(statistics)
}

/// Runs a target on one file.
///
/// # Errors
/// What the target said when it failed.
///
/// # Panics
/// When the file cannot be read.
pub fn rerun(target: &Target, input: &Path) -> Result<Verdict, String> {
    run(target, &std::fs::read(input).unwrap_or_else(|error| panic!("{}: {error}", input.display())))
}

fn run(target: &Target, input: &[u8]) -> Result<Verdict, String> {
    let start = Instant::now();
    let caught = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let verdict = caught.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a text").to_owned()
    })?;
    let took = start.elapsed();
    if took > INPUT_TIME_MAX { Err(format!("it took {} s", took.as_secs())) } else { Ok(verdict) }
}

fn keep(settings: &Settings, target: &Target, input: &[u8]) -> PathBuf {
    let hash = ContentHash::of(input).to_string();
    let path = settings.failures.join(format!("{}-{}", target.name, hash.get(..12).unwrap_or(&hash)));
    std::fs::write(&path, input).expect("the failing input");
    path.canonicalize().unwrap_or(path)
}

/// The input under way, on disk: when it takes the process with it (no stack, no memory, no end), this is what is left.
struct UnderWay {
    file: File,
}

impl UnderWay {
    fn new(folder: &Path, target: &Target) -> Self {
        let file = File::create(folder.join(format!("{}-under-way", target.name))).expect("a file for the input");
        Self { file }
    }

    fn write(&mut self, input: &[u8]) {
        self.file.rewind().expect("the input under way");
        self.file.write_all(input).expect("the input under way");
        self.file.set_len(input.len() as u64).expect("the input under way");
    }
}
