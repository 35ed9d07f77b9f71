//! `fulgurite rollouts list` and `show`.

use anyhow::anyhow;
use fulgurite_core::id::{AttemptNumber, RolloutId};
use fulgurite_core::llm::{Message, Role};
use fulgurite_core::outcome::Blame;
use fulgurite_core::record::{AttemptRecord, RolloutRecord};
use fulgurite_core::reward::Reward;
use fulgurite_core::span::{LlmCall, Span, SpanBody};
use fulgurite_runner::fork::lineage;
use fulgurite_store::{Cursor, RolloutQuery, RolloutRow, RolloutStore, SledStore};

use crate::arguments::{Output, RolloutsListArguments, RolloutsShowArguments};
use crate::failure::{Failure, printable};
use crate::store::{self, more, open};
use crate::terminal::{Style, paint};
use crate::{terminal, train};

/// Longest text of a message that the tree prints, in characters.
const TEXT_CHARACTERS_MAX: usize = 2_000;

/// Every page of the list up to `limit`, and where to go on.
fn rows(store: &SledStore, arguments: &RolloutsListArguments) -> Result<(Vec<RolloutRow>, Option<Cursor>), Failure> {
    let mut query = RolloutQuery {
        stage: arguments.stage.clone(),
        step: arguments.step,
        state: arguments.state,
        mode: arguments.mode,
        item: arguments.item.clone(),
        outcome: arguments.outcome,
        reward_min: arguments.reward_min,
        reward_max: arguments.reward_max,
        fork_of: arguments.fork_of.as_deref().map(RolloutId::new).transpose().map_err(Failure::usage)?,
        sort: arguments.sort.into(),
        descending: arguments.descending,
        after: arguments.after.clone(),
        ..RolloutQuery::default()
    };
    let (mut rows, mut skip) = (vec![], arguments.offset);
    while rows.len() < arguments.limit {
        query.limit = Some(skip.saturating_add(arguments.limit - rows.len()));
        let page = store.rollout_page(&query).map_err(store::failure)?;
        let skipped = skip.min(page.items.len());
        skip -= skipped;
        rows.extend(page.items.into_iter().skip(skipped));
        query.after = page.next;
        if query.after.is_none() {
            break;
        }
    }
    Ok((rows, query.after))
}

pub(crate) fn list(arguments: &RolloutsListArguments) -> Result<(), Failure> {
    let store = open(arguments.run.as_deref())?;
    let (rows, next) = rows(&store, arguments)?;
    if arguments.output == Output::Json {
        for row in &rows {
            train::print_json(&serde_json::json!({"rollout": row.rollout, "attempt": row.attempt}))?;
        }
    } else {
        let colours = terminal::colours();
        let head = format!("{:<32} {:<10} {:<16} {:>7} {:>6}  item", "rollout", "state", "outcome", "reward", "spans");
        terminal::print(&paint(&head, Style::Bold, colours));
        for row in &rows {
            terminal::print(&list_line(row, colours));
        }
    }
    more(next.as_ref());
    Ok(())
}

fn list_line(row: &RolloutRow, colours: bool) -> String {
    let (record, attempt) = (&row.rollout, row.attempt.as_ref());
    let outcome = attempt.and_then(|attempt| attempt.outcome.as_ref());
    let kind = outcome.map_or("-", |outcome| outcome.kind.as_str());
    let style = match outcome.and_then(|outcome| outcome.kind.blame()) {
        None => Style::Green,
        Some(Blame::Policy) => Style::Yellow,
        Some(Blame::AgentCode | Blame::Infrastructure) => Style::Red,
    };
    format!(
        "{:<32} {:<10} {} {:>7} {:>6}  {}",
        record.spec.id.as_str(),
        record.state.as_str(),
        paint(&format!("{kind:<16}"), style, colours),
        row.reward().map_or("-".to_owned(), |reward| format!("{reward:.3}")),
        attempt.map_or(0, |attempt| attempt.spans),
        printable(&record.spec.item_id),
    )
}

pub(crate) fn show(arguments: &RolloutsShowArguments) -> Result<(), Failure> {
    let store = open(arguments.run.as_deref())?;
    let id = RolloutId::new(&arguments.rollout).map_err(Failure::usage)?;
    let record = store.rollout(&id).map_err(store::failure)?.ok_or_else(|| {
        Failure::usage(anyhow!("there is no rollout `{id}` in this run")).hint("`fulgurite rollouts list` lists them")
    })?;
    let attempts = store.attempts(&id).map_err(store::failure)?;
    let wanted = arguments.attempt.map(AttemptNumber);
    let attempt = match wanted {
        Some(number) => attempts.iter().find(|attempt| attempt.key.attempt == number),
        None => attempts.last(),
    };
    let attempt = attempt.ok_or_else(|| {
        let given = wanted.map_or("any attempt yet".to_owned(), |number| format!("an attempt {number}"));
        Failure::usage(anyhow!("rollout `{id}` does not have {given}; it has {}", attempts.len()))
    })?;
    // A fork is shown whole: its beginning is its ancestor's.
    let spans = match &record.spec.fork_of {
        Some(_) => lineage(&store, &attempt.key).map_err(|problem| Failure::failed(anyhow!(problem)))?.spans.to_vec(),
        None => store.spans(&attempt.key).map_err(store::failure)?,
    };
    if arguments.output == Output::Json {
        return train::print_json(&serde_json::json!({"rollout": record, "attempt": attempt, "spans": spans}));
    }
    let colours = terminal::colours();
    for line in header(&record, attempt, attempts.len(), colours) {
        terminal::print(&line);
    }
    let mut messages: Vec<Message> = vec![];
    for span in &spans {
        let depth = depth(span, &spans);
        for line in tree_lines(span, &mut messages, colours) {
            terminal::print(&format!("{}{line}", "  ".repeat(depth)));
        }
    }
    Ok(())
}

fn header(record: &RolloutRecord, attempt: &AttemptRecord, attempts: usize, colours: bool) -> Vec<String> {
    let spec = &record.spec;
    let outcome = attempt.outcome.as_ref();
    let mut lines = vec![
        paint(&format!("rollout {}", spec.id), Style::Bold, colours),
        format!(
            "  {} step {} group {}, {}, item {}",
            spec.stage,
            spec.step,
            spec.group,
            spec.mode.as_str(),
            printable(&spec.item_id)
        ),
        format!(
            "  policy {}, temperature {}, seed {}",
            spec.policy_version,
            spec.sampling.temperature,
            spec.seed.value()
        ),
        format!(
            "  attempt {} of {attempts}: {}, {} spans, {} us of guest CPU",
            attempt.key.attempt,
            outcome.map_or(attempt.state.as_str(), |outcome| outcome.kind.as_str()),
            attempt.spans,
            attempt.guest_cpu_us,
        ),
    ];
    if let Some(fork) = &spec.fork_of {
        lines.push(format!(
            "  fork of {} at event {}, whose prefix is from policy {}",
            fork.rollout, fork.event, fork.policy_version
        ));
    }
    if let Some(reason) = &attempt.not_forkable {
        lines.push(format!("  cannot be forked: {}", printable(reason)));
    }
    if let Some(outcome) = outcome.filter(|outcome| !outcome.detail.is_empty()) {
        lines.push(paint(&format!("  {}", printable(&outcome.detail)), Style::Red, colours));
    }
    lines
}

fn depth(span: &Span, spans: &[Span]) -> usize {
    let mut parent = span.parent;
    let mut depth = 1;
    while let Some(id) = parent {
        parent = spans.iter().find(|span| span.span_id == id).and_then(|span| span.parent);
        // A recorded chain is short; the bound is against a damaged record.
        if depth > spans.len() {
            break;
        }
        depth += usize::from(parent.is_some());
    }
    depth
}

/// What one event is about.
pub(crate) fn event_lines(span: &Span, colours: bool) -> Vec<String> {
    tree_lines(span, &mut vec![], colours)
}

fn tree_lines(span: &Span, messages: &mut Vec<Message>, colours: bool) -> Vec<String> {
    let title = |text: String| paint(&printable(&text), Style::Bold, colours);
    let dim = |text: String| paint(&text, Style::Dim, colours);
    match &span.body {
        SpanBody::Llm(call) => llm_lines(call, messages, colours),
        SpanBody::Tool { name, arguments, result } => {
            let mut lines = vec![title(format!("tool {name}")), format!("  -> {}", shown(arguments))];
            lines.push(match result {
                Ok(result) => format!("  <- {}", shown(result)),
                Err(error) => paint(&format!("  <- {}", shown(&error.to_string())), Style::Red, colours),
            });
            lines
        }
        SpanBody::ToolList(Ok(tools)) => {
            let names: Vec<_> = tools.iter().map(|tool| tool.name.as_str()).collect();
            vec![dim(printable(&format!("tools: {}", names.join(", "))))]
        }
        SpanBody::ToolList(Err(error)) => vec![paint(&shown(&error.to_string()), Style::Red, colours)],
        SpanBody::Reward(reward) => vec![reward_line(reward, colours)],
        SpanBody::Grade { fault: Some(fault), .. } => {
            vec![paint(&format!("grader failed: {}", shown(fault)), Style::Red, colours)]
        }
        SpanBody::Grade { fault: None, grader } => vec![dim(format!("graded by {grader}"))],
        SpanBody::Message(message) => vec![format!("{}: {}", message.role.as_str(), shown(&message.content))],
        SpanBody::Object { name, value } => vec![printable(&format!("{name} = {}", shown(value)))],
        SpanBody::Log { level, text } => vec![dim(format!("{level}: {}", shown(text)))],
        SpanBody::Template { name, .. } => vec![dim(printable(&format!("template {name}")))],
        SpanBody::Attempt(outcome) => {
            vec![title(format!("outcome {}: {}", outcome.kind.as_str(), shown(&outcome.output)))]
        }
        SpanBody::Annotation | SpanBody::Guest => {
            let attributes: Vec<_> =
                span.guest_attributes.iter().map(|(name, value)| format!("{name}={value:?}")).collect();
            vec![title(format!("{} {}", span.name, attributes.join(" ")))]
        }
        SpanBody::HostCall { interface, function, .. } => vec![dim(format!("{interface}.{function}"))],
    }
}

fn llm_lines(call: &LlmCall, messages: &mut Vec<Message>, colours: bool) -> Vec<String> {
    let tokens = call.result.as_ref().ok().and_then(|completion| completion.tokens.as_ref());
    let model =
        tokens.and_then(|tokens| tokens.model.as_ref()).map_or_else(String::new, |model| format!(" by {model}"));
    let mut lines = vec![paint(
        &printable(&format!(
            "llm call {} ({}{model}, temperature {})",
            call.call_index, call.agent_role, call.sampling.temperature
        )),
        Style::Bold,
        colours,
    )];
    for message in &call.new_messages {
        if message.role == Role::Assistant && !message.tool_calls.is_empty() {
            for tool in &message.tool_calls {
                lines.push(printable(&format!("  assistant asks {}({})", tool.name, tool.arguments)));
            }
        } else {
            lines.push(format!("  {}: {}", message.role.as_str(), shown(&message.content)));
        }
    }
    messages.extend(call.new_messages.iter().cloned());
    match &call.result {
        Ok(completion) => {
            for tool in &completion.tool_calls {
                lines.push(paint(
                    &printable(&format!("  => {}({})", tool.name, tool.arguments)),
                    Style::Green,
                    colours,
                ));
            }
            if !completion.text.is_empty() || completion.tool_calls.is_empty() {
                lines.push(paint(&format!("  => {}", shown(&completion.text)), Style::Green, colours));
            }
            let trained = completion.tokens.as_ref().map_or(String::new(), |data| {
                let sum: f32 = data.log_probs.iter().sum();
                format!(", log-prob {sum:.3}, {}", data.policy_version)
            });
            let excluded = completion.not_trainable.as_ref();
            let excluded = excluded.map_or(String::new(), |reason| format!(", not trainable: {reason:?}"));
            let (prompt, drawn) = (completion.usage.prompt_tokens, completion.usage.completion_tokens);
            let note = format!("  {prompt} + {drawn} tokens, {:?}{trained}{excluded}", completion.finish_reason);
            lines.push(paint(&note, Style::Dim, colours));
        }
        Err(error) => lines.push(paint(&format!("  => {}", shown(&error.to_string())), Style::Red, colours)),
    }
    lines
}

fn reward_line(reward: &Reward, colours: bool) -> String {
    let call = reward.call_index.map_or(String::new(), |index| format!(", call {index}"));
    let feedback = reward.feedback.as_ref().map_or(String::new(), |text| format!("  {}", shown(text)));
    let text =
        format!("reward {} {:.3} from {:?}{call}{feedback}", printable(&reward.dimension), reward.value, reward.source);
    paint(&text, Style::Yellow, colours)
}

/// Text on one line, and not too much of it.
pub(crate) fn shown(text: &str) -> String {
    let mut shown: String = printable(text).replace('\n', "\\n").chars().take(TEXT_CHARACTERS_MAX).collect();
    if text.chars().count() > TEXT_CHARACTERS_MAX {
        shown.push_str(" ...");
    }
    shown
}
