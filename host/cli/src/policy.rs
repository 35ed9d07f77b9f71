//! `fulgurite policy`: what a folder with a model holds, takes and answers, and how such folders are made.

pub(crate) mod arguments;
mod hub;
mod pull;
mod write;

use std::path::Path;

use anyhow::{Context, anyhow};
use fulgurite_policy::{
    Conversation, MemoryPlan, ModelDescription, ModelFolder, PlanOptions, PolicyConfig, PolicyError, RopeScaling,
};
use fulgurite_trainer::config::RunConfig;
use indicatif::HumanBytes;
use serde_json::{Value, json};

use self::arguments::{InfoArguments, LogitsArguments, PolicyCommand};
use crate::arguments::Output;
use crate::failure::{Failure, printable};
use crate::terminal::{self, Style, paint};
use crate::train;

/// Live rollouts that are planned for where nothing is said.
const ROLLOUTS: u64 = 32;
/// Prompt and completion together that are looked at: the longest context that a model may have.
const TOKENS_MAX: usize = 1 << 20;
/// Likeliest next tokens that are shown to people.
const CANDIDATES_SHOWN: usize = 5;

pub(crate) fn execute(command: &PolicyCommand) -> Result<(), Failure> {
    match command {
        PolicyCommand::Info(arguments) => info(arguments),
        PolicyCommand::Logits(arguments) => logits(arguments),
        PolicyCommand::Pull(arguments) => pull::pull(arguments),
        PolicyCommand::Import(arguments) => write::import(arguments),
        PolicyCommand::Init(arguments) => write::init(arguments),
        PolicyCommand::Export(arguments) => write::export(arguments),
        PolicyCommand::Merge(arguments) => write::merge(arguments),
    }
}

/// What the user named is wrong, unless the engine itself failed.
fn failure(error: PolicyError) -> Failure {
    match error {
        PolicyError::Internal(_) | PolicyError::Stopped => Failure::failed(error),
        _ => Failure::usage(error),
    }
}

/// Opens a folder and says on stderr what of it is not followed.
fn open(directory: &Path) -> Result<ModelFolder, Failure> {
    let folder = ModelFolder::open(directory).map_err(failure)?;
    for warning in &folder.description().warnings {
        warn(warning);
    }
    Ok(folder)
}

fn warn(text: &str) {
    eprintln!("warning: {}", printable(text));
}

fn info(arguments: &InfoArguments) -> Result<(), Failure> {
    let folder = open(&arguments.directory)?;
    let shape = &folder.description().shape;
    if let Some(tokens) = arguments.context_tokens.filter(|tokens| *tokens > shape.context_tokens_max as u64) {
        let max = shape.context_tokens_max;
        let problem = anyhow!("`--context-tokens` is {tokens}: the model's context holds {max}");
        return Err(Failure::usage(problem));
    }
    let options = plan_options(arguments)?;
    let plan = MemoryPlan::new(shape, &options);
    let available = available_bytes();
    if arguments.output == Output::Json {
        return train::print_json(&json!({
            "directory": folder.path(),
            "model": folder.description(),
            "parameters": shape.parameter_count(),
            "files": folder.files(),
            "file_types_bytes": folder.types(),
            "token_ids": folder.token_ids(),
            "chat_template": folder.has_template(),
            "memory": plan,
            "memory_available_bytes": available,
        }));
    }
    let colours = terminal::colours();
    for (title, text) in lines(&folder, &plan, available) {
        terminal::print(&format!("{} {text}", paint(&format!("{title:<14}"), Style::Bold, colours)));
    }
    Ok(())
}

/// What is planned for: the config's, changed by the command line.
fn plan_options(arguments: &InfoArguments) -> Result<PlanOptions, Failure> {
    let config = arguments.config.as_deref().map(RunConfig::load).transpose()?;
    let mut policy = PolicyConfig::default();
    let mut rollouts = None;
    if let (Some(config), Some(path)) = (config, &arguments.config) {
        rollouts = Some(config.rollout.live_max as u64);
        let lacks = || Failure::usage(anyhow!("`{}` has no [policy.local]: nothing of it runs here", path.display()));
        policy = config.policy.local.ok_or_else(lacks)?.engine();
    }
    if let Some(tokens) = arguments.micro_batch_tokens {
        policy.micro_batch_tokens_max = tokens as usize;
    }
    if let Some(threads) = arguments.threads {
        policy.threads = usize::from(threads);
    }
    policy.gradient_checkpointing |= arguments.gradient_checkpointing;
    if arguments.lora_rank.is_some() || !arguments.lora_targets.is_empty() {
        let lora = policy.lora.get_or_insert_default();
        lora.rank = arguments.lora_rank.map_or(lora.rank, usize::from);
        if !arguments.lora_targets.is_empty() {
            lora.targets.clone_from(&arguments.lora_targets);
        }
    }
    let context_tokens = arguments.context_tokens.or(policy.context_tokens_max.map(|tokens| tokens as u64));
    Ok(PlanOptions { rollouts: arguments.rollouts.or(rollouts).unwrap_or(ROLLOUTS), context_tokens, policy })
}

fn lines(folder: &ModelFolder, plan: &MemoryPlan, available: Option<u64>) -> Vec<(&'static str, String)> {
    let ModelDescription { architecture, shape, end_tokens, .. } = folder.description();
    let types: Vec<_> = folder.types().iter().map(|(kind, bytes)| format!("{kind} {}", HumanBytes(*bytes))).collect();
    let tied = if shape.tie_embeddings { ", output tied to the embedding" } else { "" };
    let mut parts = Vec::new();
    if shape.attention_bias {
        parts.push("biases of the attention".to_owned());
    }
    if shape.qk_norm {
        parts.push("norms of queries and keys".to_owned());
    }
    if let Some(window) = shape.sliding_window {
        parts.push(format!("a window of {window} tokens"));
    }
    match shape.rope_scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => parts.push(format!("rope stretched by {factor} (linear)")),
        RopeScaling::Llama3 { factor, .. } => parts.push(format!("rope stretched by {factor} (llama3)")),
    }
    let ends: Vec<_> = end_tokens.iter().map(u32::to_string).collect();
    let bytes = |bytes: u64| HumanBytes(bytes).to_string();
    let fits = |needed: u64| match available {
        Some(available) if needed > available => format!("more than the {} that are free here", bytes(available)),
        Some(available) => format!("of {} that are free here", bytes(available)),
        None => "free memory is not known here".to_owned(),
    };
    let mut all = vec![
        ("model", format!("{}, {} parameters", architecture.model_type(), shape.parameter_count())),
        (
            "sizes",
            format!(
                "{} layers, width {}, {} heads of {} ({} for keys and values), feed-forward {}{tied}",
                shape.layers, shape.d_model, shape.heads, shape.head_dim, shape.kv_heads, shape.d_ff
            ),
        ),
        ("with", if parts.is_empty() { "nothing besides".to_owned() } else { parts.join(", ") }),
        ("context", format!("{} tokens", shape.context_tokens_max)),
        (
            "tokens",
            format!(
                "{} ids, {} rows; the end is {}",
                folder.token_ids(),
                shape.vocabulary,
                if ends.is_empty() { "not said".to_owned() } else { ends.join(" or ") }
            ),
        ),
        (
            "chat template",
            if folder.has_template() { "yes" } else { "none: conversations cannot be rendered" }.to_owned(),
        ),
        ("files", format!("{} in {} safetensors", types.join(", "), folder.files())),
    ];
    all.extend(memory_lines(plan));
    all.extend([
        ("  generation", format!("{}, {}", bytes(plan.generation_bytes), fits(plan.generation_bytes))),
        ("  training", format!("{}, {}", bytes(plan.training_bytes), fits(plan.training_bytes))),
    ]);
    all
}

fn memory_lines(plan: &MemoryPlan) -> Vec<(&'static str, String)> {
    let bytes = |bytes: u64| HumanBytes(bytes).to_string();
    let bound = if plan.kv_cache_bytes == plan.kv_cache_bytes_max { ", the config's bound" } else { "" };
    let cache = format!(
        "{}{bound}: {} a token, {} a rollout of {} tokens, {} rollouts",
        bytes(plan.kv_cache_bytes),
        bytes(plan.kv_cache_token_bytes),
        bytes(plan.kv_cache_rollout_bytes),
        plan.context_tokens,
        plan.rollouts
    );
    let activations = format!(
        "{}, estimated: {} micro-batches of {} tokens",
        bytes(plan.activations_bytes),
        plan.threads,
        plan.micro_batch_tokens
    );
    vec![
        ("memory", "in float32".to_owned()),
        ("  weights", format!("{}, and {} packed for sampling", bytes(plan.weights_bytes), bytes(plan.packed_bytes))),
        ("  kv cache", cache),
        (
            "  trained",
            format!("{} parameters, {} beside the model", plan.trained_parameters, bytes(plan.trained_bytes)),
        ),
        ("  packed", format!("{} for a batch", bytes(plan.training_packed_bytes))),
        ("  gradient", format!("{}, {} shards", bytes(plan.gradient_bytes), plan.gradient_shards)),
        ("  AdamW", bytes(plan.moments_bytes)),
        ("  activations", activations),
    ]
}

/// Memory that a new program could take, as Linux says it.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1_024)
}

fn conversation(path: &Path) -> Result<Conversation, Failure> {
    let shown = path.display();
    let text = std::fs::read(path).with_context(|| format!("cannot read `{shown}`")).map_err(Failure::usage)?;
    let value: Value =
        serde_json::from_slice(&text).map_err(|error| Failure::usage(anyhow!("{shown}: it is not JSON: {error}")))?;
    Conversation::from_json(&value).map_err(|reason| Failure::usage(anyhow!("{shown}: {reason}")))
}

fn logits(arguments: &LogitsArguments) -> Result<(), Failure> {
    let conversation = conversation(&arguments.messages)?;
    let folder = open(&arguments.directory)?;
    let prompt = folder.encode(&folder.render(&conversation, true).map_err(failure)?).map_err(failure)?;
    let context = folder.description().shape.context_tokens_max;
    let (tokens, greedy) = (prompt.len(), arguments.greedy);
    if tokens == 0 {
        return Err(Failure::usage(anyhow!("{}: the prompt has no tokens", arguments.messages.display())));
    }
    let all = tokens.saturating_add(greedy);
    if all > TOKENS_MAX {
        let problem =
            anyhow!("the prompt has {tokens} tokens and `--greedy` is {greedy}: at most {TOKENS_MAX} together");
        return Err(Failure::usage(problem));
    }
    // The last token is not read by the model and needs no position.
    if all - greedy.min(1) > context {
        let much = format!("the prompt has {tokens} tokens and `--greedy` is {greedy}");
        warn(&format!("{much}: the model was made for {context}; what it says beyond them is worth little"));
    }
    let config = PolicyConfig { threads: arguments.threads, ..PolicyConfig::default() };
    let mut model = folder.inference_of(&config, all).map_err(failure)?;
    if let Some(adapter) = &arguments.adapter {
        model = model.with_adapter(&fulgurite_trainer::trained_weights(adapter)?).map_err(failure)?;
    }
    let last = model.logits(&prompt, tokens - 1).map_err(failure)?;
    if !last.iter().all(|logit| logit.is_finite()) {
        let unknown = || anyhow!("the logits are not numbers, though every weight is one: its values are too large");
        let found = folder.first_not_finite().map_err(failure)?;
        return Err(found.map_or_else(|| Failure::usage(unknown()), failure));
    }
    let mut answer = json!({"prompt_ids": prompt, "last_logits": last});
    if greedy > 0 {
        let continuation = model.greedy(&prompt, greedy, &[]).map_err(failure)?;
        let ids = [prompt.as_slice(), &continuation.tokens].concat();
        let trained = model.cross_entropy(&ids, tokens).map_err(failure)?;
        for (name, value) in [
            ("tokens", json!(continuation.tokens)),
            ("logprobs", json!(trained.log_probs)),
            ("cross_entropy", json!(trained.mean)),
            ("grad_norm", json!(trained.gradient_norm)),
        ] {
            answer.as_object_mut().and_then(|answer| answer.insert(name.to_owned(), value));
        }
    }
    if arguments.output == Output::Json {
        return train::print_json(&answer);
    }
    print(&folder, &last, &answer);
    Ok(())
}

fn print(folder: &ModelFolder, last: &[f32], answer: &Value) {
    let colours = terminal::colours();
    let line = |title: &str, text: &str| {
        terminal::print(&format!("{} {}", paint(&format!("{title:<14}"), Style::Bold, colours), printable(text)));
    };
    let spelled = |id: u64| u32::try_from(id).map(|id| folder.decode(&[id])).unwrap_or_default();
    let count = |name: &str| answer.get(name).and_then(Value::as_array).map_or(0, Vec::len);
    line("prompt", &format!("{} tokens", count("prompt_ids")));
    let mut order: Vec<(u64, f32)> = (0..).zip(last.iter().copied()).collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (id, logit) in order.into_iter().take(CANDIDATES_SHOWN) {
        line("next", &format!("{logit:>9.4}  id {id:<7} {:?}", spelled(id)));
    }
    let Some(tokens) = answer.get("tokens").and_then(Value::as_array) else { return };
    let text: String = tokens.iter().filter_map(Value::as_u64).map(spelled).collect();
    line("continuation", &format!("{text:?}"));
    for name in ["cross_entropy", "grad_norm"] {
        line(name, &answer.get(name).map(Value::to_string).unwrap_or_default());
    }
}
