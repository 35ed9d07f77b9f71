//! `fulgurite store list`.

use fulgurite_core::id::{AttemptNumber, RolloutId};
use fulgurite_core::record::{AttemptRecord, WorkerRecord};
use fulgurite_core::span::Span;
use fulgurite_store::{
    AttemptQuery, BodyKind, Page, ResourceQuery, RolloutStore, SpanQuery, Template, WorkerQuery, reward_of,
};
use serde::Serialize;
use serde_json::json;

use super::arguments::{
    AttemptsArguments, ListCommand, PageArguments, ResourcesArguments, SpansArguments, WorkersArguments,
};
use super::{failure, open};
use crate::arguments::Output;
use crate::failure::{Failure, printable};
use crate::terminal::{self, Style, paint};
use crate::train;

/// Longest text in a table, in characters.
const TEXT_CHARACTERS_MAX: usize = 60;

pub(super) fn list(what: &ListCommand) -> Result<(), Failure> {
    match what {
        ListCommand::Attempts(arguments) => attempts(arguments),
        ListCommand::Spans(arguments) => spans(arguments),
        ListCommand::Workers(arguments) => workers(arguments),
        ListCommand::Resources(arguments) => resources(arguments),
    }
}

/// Reads pages until there are as many as asked for, and prints them.
fn show<T, J: Serialize>(
    arguments: &PageArguments,
    head: &str,
    mut page: impl FnMut(&PageArguments, Option<fulgurite_store::Cursor>, usize) -> fulgurite_store::Result<Page<T>>,
    line: impl Fn(&T) -> String,
    json: impl Fn(&T) -> J,
) -> Result<(), Failure> {
    let (mut after, mut shown, mut head) = (arguments.after.clone(), 0, Some(head));
    let text = arguments.output == Output::Text;
    while shown < arguments.limit {
        let next = page(arguments, after.take(), arguments.limit - shown).map_err(failure)?;
        if let Some(head) = head.take().filter(|_| text) {
            terminal::print(&paint(head, Style::Bold, terminal::colours()));
        }
        for item in &next.items {
            if text {
                terminal::print(&line(item));
            } else {
                train::print_json(&json(item))?;
            }
        }
        shown += next.items.len();
        after = next.next;
        if after.is_none() {
            return Ok(());
        }
    }
    more(after.as_ref());
    Ok(())
}

/// Says how to go on.
pub(crate) fn more(after: Option<&fulgurite_store::Cursor>) {
    if let Some(after) = after {
        eprintln!("more: --after {after}");
    }
}

fn rollout(text: &str) -> Result<RolloutId, Failure> {
    RolloutId::new(text).map_err(Failure::usage)
}

fn attempts(arguments: &AttemptsArguments) -> Result<(), Failure> {
    let query = AttemptQuery {
        rollout: arguments.rollout.as_deref().map(rollout).transpose()?,
        state: arguments.state,
        outcome: arguments.outcome,
        worker: arguments.worker.clone(),
        descending: arguments.descending,
        after: None,
        limit: None,
    };
    let store = open(arguments.page.run.as_deref())?;
    let head = format!(
        "{:<32} {:>3} {:<12} {:<16} {:>8} {:>6} {:>10}  worker",
        "rollout", "try", "state", "outcome", "reward", "spans", "ms"
    );
    let line = |attempt: &AttemptRecord| {
        let ms = attempt.end_unix_ns.saturating_sub(attempt.start_unix_ns) / 1_000_000;
        format!(
            "{:<32} {:>3} {:<12} {:<16} {:>8} {:>6} {:>10}  {}",
            attempt.key.rollout.as_str(),
            attempt.key.attempt,
            attempt.state.as_str(),
            attempt.outcome.as_ref().map_or("-", |end| end.kind.as_str()),
            reward_of(attempt).map_or("-".to_owned(), |reward| format!("{reward:.3}")),
            attempt.spans,
            if attempt.end_unix_ns > 0 { ms.to_string() } else { "-".to_owned() },
            if attempt.worker.is_empty() { "-".to_owned() } else { printable(&attempt.worker) },
        )
    };
    let page = |_: &PageArguments, after, limit| {
        store.attempt_page(&AttemptQuery { after, limit: Some(limit), ..query.clone() })
    };
    show(&arguments.page, &head, page, line, Clone::clone)
}

fn spans(arguments: &SpansArguments) -> Result<(), Failure> {
    let query = SpanQuery {
        attempt: arguments.attempt.map(AttemptNumber),
        kind: arguments.kind,
        name: arguments.name.clone(),
        contains: arguments.contains.clone(),
        ..SpanQuery::of(rollout(&arguments.rollout)?)
    };
    let store = open(arguments.page.run.as_deref())?;
    let head = format!("{:>6} {:<16} {:<16} {:>10}  name", "span", "id", "about", "us");
    let line = |span: &Span| {
        format!(
            "{:>6} {} {:<16} {:>10}  {}",
            span.sequence,
            span.span_id,
            BodyKind::of(&span.body).as_str(),
            span.end_ns.saturating_sub(span.start_ns) / 1_000,
            shortened(&span.name),
        )
    };
    let page =
        |_: &PageArguments, after, limit| store.span_page(&SpanQuery { after, limit: Some(limit), ..query.clone() });
    show(&arguments.page, &head, page, line, Clone::clone)
}

fn workers(arguments: &WorkersArguments) -> Result<(), Failure> {
    let store = open(arguments.page.run.as_deref())?;
    let head = format!("{:<40} {:>10} {:>10} {:>14}", "worker", "process", "attempts", "heard of, s");
    let line = |worker: &WorkerRecord| {
        let seconds = worker.heartbeat_unix_ns.saturating_sub(worker.start_unix_ns) / 1_000_000_000;
        format!("{:<40} {:>10} {:>10} {seconds:>14}", printable(&worker.id), worker.process_id, worker.attempts)
    };
    let page = |_: &PageArguments, after, limit| {
        store.worker_page(&WorkerQuery { after, limit: Some(limit), ..WorkerQuery::default() })
    };
    show(&arguments.page, &head, page, line, Clone::clone)
}

fn resources(arguments: &ResourcesArguments) -> Result<(), Failure> {
    let store = open(arguments.page.run.as_deref())?;
    let query =
        ResourceQuery { name: arguments.name.clone(), descending: arguments.descending, ..ResourceQuery::default() };
    let head = format!("{:>7} {:<24} {:>8}  text", "version", "template", "bytes");
    let line = |template: &Template| {
        let (name, text) = (shortened(&template.name), shortened(&template.text));
        format!("{:>7} {name:<24} {:>8}  {text}", template.version, template.text.len())
    };
    let as_json = |template: &Template| json!({"version": template.version, "name": template.name, "hash": template.hash, "text": template.text});
    let page = |_: &PageArguments, after, limit| {
        store.resource_page(&ResourceQuery { after, limit: Some(limit), ..query.clone() })
    };
    show(&arguments.page, &head, page, line, as_json)
}

fn shortened(text: &str) -> String {
    let mut short: String = printable(text).replace('\n', "\\n").chars().take(TEXT_CHARACTERS_MAX).collect();
    if text.chars().count() > TEXT_CHARACTERS_MAX {
        short.push_str(" ...");
    }
    short
}
