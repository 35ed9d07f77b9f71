//! `fulgurite store`: check, count, export, import, compact and prune what a run has recorded.

pub(crate) mod arguments;
mod lists;
mod otlp;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use fulgurite_store::{CheckReport, PruneReport, PruneRule, RolloutStore, SCHEMA_VERSION, SledStore, StoreError};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::json;

use self::arguments::{ExportArguments, Format, ImportArguments, PruneArguments, RunArguments, StoreCommand};
use crate::arguments::Output;
use crate::failure::{Failure, printable};
use crate::terminal::{self, Style, paint};
use crate::{paths, train};

pub(crate) use self::lists::more;

/// How often a line says how far long work is, where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

pub(crate) fn execute(command: &StoreCommand) -> Result<(), Failure> {
    match command {
        StoreCommand::Check(arguments) => check(arguments),
        StoreCommand::Stats(arguments) => stats(arguments),
        StoreCommand::List { what } => lists::list(what),
        StoreCommand::Export(arguments) => export(arguments),
        StoreCommand::Import(arguments) => import(arguments),
        StoreCommand::Compact(arguments) => compact(arguments),
        StoreCommand::Prune(arguments) => prune(arguments),
    }
}

/// A store's error, with what to do about it.
pub(crate) fn failure(error: StoreError) -> Failure {
    let hint = match &error {
        StoreError::InUse { .. } => "the run is still going: wait for it, or stop it with Ctrl-C",
        StoreError::Schema { .. } => "a newer Fulgurite wrote it: use that one, or its `store export`",
        StoreError::Damaged { .. } | StoreError::Corrupt { .. } => {
            "copy the folder before anything else; `fulgurite store check` says what is damaged"
        }
        StoreError::NotEmpty { .. } => "name a folder that is not there yet by `--run DIR`",
        StoreError::Import { .. } => "nothing was imported; the line is described in `fulgurite store export --help`",
        StoreError::UnknownRollout(_) | StoreError::UnknownAttempt(_) => "`fulgurite rollouts list` lists them",
        _ => return Failure::failed(error),
    };
    match &error {
        StoreError::Import { .. }
        | StoreError::NotEmpty { .. }
        | StoreError::UnknownRollout(_)
        | StoreError::UnknownAttempt(_) => Failure::usage(error).hint(hint),
        _ => Failure::failed(error).hint(hint),
    }
}

fn store_of(run: Option<&Path>) -> Result<PathBuf, Failure> {
    Ok(paths::existing_run(run)?.join("store"))
}

/// Opens the store of a run.
pub(crate) fn open(run: Option<&Path>) -> Result<SledStore, Failure> {
    SledStore::open(&store_of(run)?).map_err(failure)
}

/// Says on standard error how far long work is.
struct Ticker {
    what: &'static str,
    bar: ProgressBar,
    terminal: bool,
    said: Instant,
}

impl Ticker {
    fn new(verb: &'static str, what: &'static str) -> Self {
        let template = "{prefix:.bold} {spinner} {human_pos} {msg} {elapsed_precise}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner());
        // Hidden by itself where standard error is no terminal.
        let bar = ProgressBar::new_spinner().with_style(style).with_prefix(verb).with_message(what);
        Self { what, bar, terminal: io::stderr().is_terminal(), said: Instant::now() }
    }

    fn tick(&mut self, done: u64) {
        self.bar.set_position(done);
        if !self.terminal && self.said.elapsed() >= LINE_EVERY {
            self.said = Instant::now();
            eprintln!("{done} {}", self.what);
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn check(arguments: &RunArguments) -> Result<(), Failure> {
    let store = open(arguments.run.as_deref())?;
    let mut ticker = Ticker::new("checking", "keys");
    let report = store.check(&mut |done| ticker.tick(done)).map_err(failure)?;
    drop(ticker);
    match arguments.output {
        Output::Json => train::print_json(&check_json(&report))?,
        Output::Text => print_check(&report),
    }
    if report.is_sound() {
        return Ok(());
    }
    let problem = anyhow!("{} things are wrong in {}", report.findings_total, store.dir().display());
    Err(Failure::failed(problem).hint(
        "copy the folder before anything else; `fulgurite rollouts show` still reads the rollouts that are not named",
    ))
}

fn check_json(report: &CheckReport) -> serde_json::Value {
    let finding = |finding: &fulgurite_store::Finding| json!({"record": finding.record, "problem": finding.problem});
    json!({
        "sound": report.is_sound(),
        "keys": report.keys,
        "rollouts": report.rollouts,
        "attempts": report.attempts,
        "spans": report.spans,
        "blobs": report.blobs,
        "resources": report.resources,
        "workers": report.workers,
        "findings": report.findings.iter().map(finding).collect::<Vec<_>>(),
        "findings_total": report.findings_total,
        "unreferenced_blobs": report.unreferenced_blobs,
        "leftover_fragments": report.leftover_fragments,
        "missing_contents": report.missing_contents,
        "unknown_contents": report.unknown_contents,
    })
}

fn print_check(report: &CheckReport) {
    let colours = terminal::colours();
    let read = [
        (report.rollouts, "rollout"),
        (report.attempts, "attempt"),
        (report.spans, "span"),
        (report.blobs, "blob"),
        (report.resources, "version of the templates"),
        (report.workers, "worker"),
    ];
    let read: Vec<String> = read.into_iter().map(|(count, what)| counted(count, what)).collect();
    terminal::print(&format!("read {}: {}", counted(report.keys, "key"), read.join(", ")));
    let (drops, lacks) = ("`fulgurite store compact` drops them", "their rollouts cannot be replayed");
    for (count, what, meaning) in [
        (report.unreferenced_blobs, "unreferenced blobs", drops),
        (report.leftover_fragments, "leftover fragments", drops),
        (report.missing_contents, "items and settings that were not kept", lacks),
        (report.unknown_contents, "items and settings from before schema 2", lacks),
    ] {
        if count > 0 {
            terminal::print(&paint(&format!("note: {what}: {count}; {meaning}"), Style::Dim, colours));
        }
    }
    for finding in &report.findings {
        let line = format!("{}: {}", printable(&finding.record), printable(&finding.problem));
        terminal::print(&paint(&line, Style::Red, colours));
    }
    let more = report.findings_total - report.findings.len() as u64;
    if more > 0 {
        terminal::print(&format!("and {more} more"));
    }
    if report.is_sound() {
        terminal::print(&paint("sound", Style::Green, colours));
    }
}

fn counted(count: u64, what: &str) -> String {
    let (first, rest) = what.split_once(' ').map_or((what, String::new()), |(first, rest)| (first, format!(" {rest}")));
    format!("{count} {first}{}{rest}", if count == 1 { "" } else { "s" })
}

fn stats(arguments: &RunArguments) -> Result<(), Failure> {
    let store = open(arguments.run.as_deref())?;
    let counts = store.statistics().map_err(failure)?;
    if arguments.output == Output::Json {
        let states: serde_json::Map<_, _> =
            counts.rollouts.iter().map(|(state, count)| (state.as_str().to_owned(), (*count).into())).collect();
        let outcomes: serde_json::Map<_, _> =
            counts.outcomes.iter().map(|(kind, count)| (kind.as_str().to_owned(), (*count).into())).collect();
        return train::print_json(&json!({
            "schema": SCHEMA_VERSION,
            "rollouts": states,
            "outcomes": outcomes,
            "attempts": counts.attempts,
            "spans": counts.spans,
            "span_bytes": counts.span_bytes,
            "blobs": counts.blobs,
            "blob_bytes": counts.blob_bytes,
            "workers": counts.workers,
            "resources_version": counts.resources_version,
            "disk_bytes": counts.disk_bytes,
        }));
    }
    let mut lines = vec![format!("{:<18} {:>12}", "rollouts", counts.rollouts_total())];
    lines.extend(counts.rollouts.iter().map(|(state, count)| format!("  {:<16} {count:>12}", state.as_str())));
    lines.push(format!("{:<18} {:>12}", "attempts", counts.attempts));
    lines.extend(counts.outcomes.iter().map(|(kind, count)| format!("  {:<16} {count:>12}", kind.as_str())));
    lines.push(format!("{:<18} {:>12}  {}", "spans", counts.spans, HumanBytes(counts.span_bytes)));
    lines.push(format!("{:<18} {:>12}  {}", "blobs", counts.blobs, HumanBytes(counts.blob_bytes)));
    lines.push(format!("{:<18} {:>12}", "workers", counts.workers));
    lines.push(format!("{:<18} {:>12}", "resource versions", counts.resources_version));
    lines.push(format!("{:<18} {:>12}", "on disk", HumanBytes(counts.disk_bytes.unwrap_or(0)).to_string()));
    terminal::print(&lines.join("\n"));
    Ok(())
}

fn export(arguments: &ExportArguments) -> Result<(), Failure> {
    let run = paths::existing_run(arguments.run.as_deref())?;
    let store = SledStore::open(&run.join("store")).map_err(failure)?;
    let mut ticker = Ticker::new("exporting", "lines");
    let mut write = |to: &mut dyn Write| match arguments.format {
        Format::Jsonl => store.export(to, &mut |done| ticker.tick(done)).map_err(failure).map(|report| report.lines),
        Format::Otlp => otlp::export(&store, &run, to, &mut |done| ticker.tick(done)),
    };
    let Some(file) = &arguments.to else {
        return write(&mut BufWriter::new(Pipe(io::stdout().lock()))).map(|_| ());
    };
    if file.exists() {
        let problem = anyhow!("`{}` is there already", file.display());
        return Err(Failure::usage(problem).hint("remove it, or name another file by `--to FILE`"));
    }
    // Whole or not at all: a file of this name is an export that came to its end.
    let part = file.with_file_name(format!("{}.part", file.file_name().unwrap_or_default().to_string_lossy()));
    let cannot = |error: io::Error| {
        Failure::usage(anyhow::Error::new(error).context(format!("cannot write `{}`", file.display())))
    };
    let mut to = BufWriter::new(File::create(&part).map_err(cannot)?);
    let lines = write(&mut to).inspect_err(|_| {
        let _stays = std::fs::remove_file(&part);
    })?;
    to.into_inner().map_err(io::IntoInnerError::into_error).and_then(|file| file.sync_all()).map_err(cannot)?;
    std::fs::rename(&part, file).map_err(cannot)?;
    eprintln!("wrote {lines} lines to {}", file.display());
    Ok(())
}

fn import(arguments: &ImportArguments) -> Result<(), Failure> {
    let shown = arguments.file.display().to_string();
    let read = |error: io::Error| Failure::usage(anyhow::Error::new(error).context(format!("cannot read `{shown}`")));
    let mut from = BufReader::with_capacity(1 << 20, File::open(&arguments.file).map_err(read)?);
    let run = arguments.run.clone().unwrap_or_else(|| {
        let name = arguments.file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Path::new("runs").join(name.split('.').next().unwrap_or_default())
    });
    let store = run.join("store");
    let (new_run, new_store) = (!run.exists(), !store.exists());
    let mut ticker = Ticker::new("importing", "records");
    let imported = match arguments.format {
        Format::Jsonl => SledStore::import(&store, &mut from, &shown, &mut |done| ticker.tick(done))
            .map(|report| otlp::Imported { rollouts: report.rollouts, spans: report.spans, existing: 0 })
            .map_err(failure),
        Format::Otlp => otlp::import(&store, &mut from, &shown, &mut |done| ticker.tick(done)),
    };
    drop(ticker);
    let imported = match imported {
        Ok(imported) => imported,
        Err(failure) => {
            // Nothing was imported, so what was made for it goes again.
            let made = if new_run { Some(&run) } else { new_store.then_some(&store) };
            let _stays = made.map(std::fs::remove_dir_all);
            return Err(failure);
        }
    };
    let otlp::Imported { rollouts, spans, existing } = imported;
    match arguments.output {
        Output::Json => {
            train::print_json(&json!({"run": run, "rollouts": rollouts, "spans": spans, "existing": existing}))
        }
        Output::Text => {
            let left_out = if existing > 0 { format!("; {existing} were there already") } else { String::new() };
            terminal::print(&format!("imported {rollouts} rollouts with {spans} spans{left_out}"));
            terminal::print(&format!("look further: fulgurite rollouts list --run {}", run.display()));
            Ok(())
        }
    }
}

fn compact(arguments: &RunArguments) -> Result<(), Failure> {
    let store = store_of(arguments.run.as_deref())?;
    let report = compacted(&store)?;
    match arguments.output {
        Output::Json => train::print_json(&report_json(&report)),
        Output::Text => {
            terminal::print(&compact_line(&report));
            Ok(())
        }
    }
}

fn compacted(store: &Path) -> Result<fulgurite_store::CompactReport, Failure> {
    let mut ticker = Ticker::new("compacting", "records");
    SledStore::compact(store, &mut |done| ticker.tick(done)).map_err(failure)
}

fn report_json(report: &fulgurite_store::CompactReport) -> serde_json::Value {
    json!({
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "records": report.records,
        "blobs_dropped": report.blobs,
        "leftovers_dropped": report.leftovers,
    })
}

fn compact_line(report: &fulgurite_store::CompactReport) -> String {
    let (before, after) = (HumanBytes(report.bytes_before), HumanBytes(report.bytes_after));
    format!("{before} before, {after} after; {} records", report.records)
}

fn prune(arguments: &PruneArguments) -> Result<(), Failure> {
    let rule = PruneRule {
        stage: arguments.stage.clone(),
        before_step: arguments.before_step,
        keep_steps: arguments.keep_steps,
        states: arguments.state.clone(),
        dry_run: arguments.dry_run,
    };
    if rule == (PruneRule { dry_run: arguments.dry_run, ..PruneRule::default() }) {
        let problem = anyhow!("nothing says what to drop");
        return Err(Failure::usage(problem)
            .hint("give --stage, --before-step, --keep-steps or --state; `--dry-run` says what would be dropped"));
    }
    if let Some(unended) = arguments.state.iter().find(|state| !state.is_terminal()) {
        let problem =
            anyhow!("rollouts that are {} have not ended, and only what has ended is dropped", unended.as_str());
        return Err(Failure::usage(problem).hint("the states to drop are succeeded, failed and cancelled"));
    }
    let dir = store_of(arguments.run.as_deref())?;
    let store = SledStore::open(&dir).map_err(failure)?;
    let report = store.prune(&rule).map_err(failure)?;
    drop(store);
    let compacted = if arguments.compact { Some(compacted(&dir)?) } else { None };
    if arguments.output == Output::Json {
        return train::print_json(&json!({
            "dry_run": arguments.dry_run,
            "rollouts": report.rollouts,
            "attempts": report.attempts,
            "spans": report.spans,
            "span_bytes": report.span_bytes,
            "kept_for_forks": report.kept_for_forks,
            "disk_bytes_before": report.disk_bytes_before,
            "disk_bytes_after": report.disk_bytes_after,
            "compact": compacted.as_ref().map(report_json),
        }));
    }
    terminal::print(&prune_line(&report, arguments.dry_run));
    match compacted {
        Some(compacted) => terminal::print(&compact_line(&compacted)),
        None if report.rollouts > 0 && !arguments.dry_run => {
            eprintln!("hint: `fulgurite store compact` gives the space back");
        }
        None => {}
    }
    Ok(())
}

fn prune_line(report: &PruneReport, dry_run: bool) -> String {
    let dropped = if dry_run { "would drop" } else { "dropped" };
    let kept = match report.kept_for_forks {
        0 => String::new(),
        kept => format!("; {kept} stay because forks refer to them"),
    };
    let (rollouts, spans, bytes) = (report.rollouts, report.spans, HumanBytes(report.span_bytes));
    format!("{dropped} {rollouts} rollouts with {spans} spans ({bytes}){kept}")
}

/// Standard output for an export. A reader that has closed the pipe (`| head`) ends the program quietly.
struct Pipe<W>(W);

impl<W: Write> Write for Pipe<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).inspect_err(|error| {
            if error.kind() == io::ErrorKind::BrokenPipe {
                std::process::exit(0);
            }
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn write_line(to: &mut dyn Write, line: &str) -> Result<(), Failure> {
    let written = to.write_all(line.as_bytes()).and_then(|()| to.write_all(b"\n"));
    written.context("the export cannot be written").map_err(Failure::failed)
}
