//! Against what transformers says of the folders in `tests/parity/fixtures`.

use std::path::Path;

use fulgurite_core::llm::{Message, Role, ToolCall};
use serde::Deserialize;

use super::*;
use crate::config::CriticConfig;
use crate::lora::{LoraConfig, LoraTarget};
use crate::shape::RopeScaling;

#[derive(Deserialize)]
pub(crate) struct Expected {
    parameters: u64,
    end_tokens: Vec<u32>,
    chats: Vec<Chat>,
}

#[derive(Deserialize)]
struct Chat {
    conversation: String,
    tools: bool,
    add_generation_prompt: bool,
    text: String,
    ids: Vec<u32>,
}

const FIXTURES: [&str; 7] =
    ["llama3", "llama3-old-keys-bf16", "llama-sharded-f16", "mistral", "qwen2", "qwen3", "qwen3-sharded-bf16"];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/fixtures")
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> T {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn open(name: &str) -> (ModelFolder, Expected) {
    let path = fixtures().join(name);
    (ModelFolder::open(&path).unwrap(), read(&path.join("expected.json")))
}

fn conversation(name: &str, with_tools: bool) -> Conversation {
    let all: Value = read(&fixtures().join("conversations.json"));
    let mut conversation = Conversation::from_json(&all[name]).unwrap();
    conversation.tools = conversation.tools.filter(|_| with_tools);
    conversation
}

#[test]
fn every_fixture_is_here() {
    let mut found: Vec<_> = std::fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap()).collect();
    found.retain(|entry| entry.path().is_dir());
    let mut names: Vec<_> = found.iter().map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    let mut known = FIXTURES.map(str::to_owned);
    known.sort_unstable();
    assert_eq!(names, known);
}

#[test]
fn descriptions_are_those_of_transformers() {
    for name in FIXTURES {
        let (folder, expected) = open(name);
        let description = folder.description();
        assert_eq!(description.shape.parameter_count() as u64, expected.parameters, "{name}");
        assert_eq!(description.end_tokens, expected.end_tokens, "{name}");
        assert_eq!(folder.files(), if name.contains("sharded") { 3 } else { 1 }, "{name}");
        let kind = match name.rsplit('-').next() {
            Some("bf16") => "bfloat16",
            Some("f16") => "float16",
            _ => "float32",
        };
        assert_eq!(folder.types().keys().copied().collect::<Vec<_>>(), [kind], "{name}");
    }
    let of = |name: &str| open(name).0.description().shape.clone();
    let llama = of("llama3");
    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 32 };
    assert_eq!((llama.rope_scaling, llama.rope_theta, llama.tie_embeddings), (scaling, 5000.0, true));
    let old = of("llama3-old-keys-bf16");
    assert_eq!((old.rope_scaling, old.rope_theta, old.tie_embeddings), (scaling, 5000.0, false));
    assert_eq!(of("mistral").sliding_window, Some(12));
    let qwen2 = of("qwen2");
    assert!(qwen2.attention_bias && !qwen2.attention_out_bias && !qwen2.qk_norm);
    assert_eq!(qwen2.sliding_window, None);
    let qwen3 = of("qwen3");
    assert!(qwen3.qk_norm && !qwen3.attention_bias);
    assert_eq!((qwen3.head_dim * qwen3.heads, qwen3.d_model), (64, 32));
}

#[test]
fn rendered_conversations_are_identical_and_so_are_their_ids() {
    for name in FIXTURES {
        let (folder, expected) = open(name);
        assert!(expected.chats.len() >= 18, "{name}");
        for chat in expected.chats {
            let conversation = conversation(&chat.conversation, chat.tools);
            let text = folder.render(&conversation, chat.add_generation_prompt).unwrap();
            assert_eq!(text, chat.text, "{name}, {}, tools {}", chat.conversation, chat.tools);
            assert_eq!(folder.encode(&text).unwrap(), chat.ids, "{name}, {}", chat.conversation);
        }
    }
}

#[test]
fn a_prompt_begins_with_one_bos_token() {
    let (folder, _) = open("llama3");
    let text = folder.render(&conversation("system", false), true).unwrap();
    let ids = folder.encode(&text).unwrap();
    let [bos, ..] = folder.encode("<|begin_of_text|>").unwrap()[..] else { panic!("no token") };
    assert_eq!(ids.iter().filter(|id| **id == bos).count(), 1);
    assert_eq!(ids[0], bos);
}

#[test]
fn calls_of_core_render_like_those_of_the_fixtures() {
    let from_file = conversation("tool call and result", true);
    let mut call = Message::text(Role::Assistant, "");
    call.tool_calls = vec![ToolCall {
        id: "call00001".into(),
        name: "get_weather".into(),
        arguments: r#"{"city": "東京", "days": 3, "unit": null}"#.into(),
    }];
    let mut result = Message::text(Role::Tool, r#"{"degrees": 21.5, "text": "<sunny> & dry"}"#);
    result.tool_call_id = Some("call00001".into());
    result.name = Some("get_weather".into());
    let weather = &from_file.tools.as_ref().unwrap()[0]["function"];
    let tool = ToolSpec {
        name: weather["name"].as_str().unwrap().into(),
        description: weather["description"].as_str().unwrap().into(),
        parameters: weather["parameters"].to_string(),
    };
    let messages = [Message::text(Role::User, "Weather in 東京?"), call, result];
    let from_core = Conversation::of_core(&messages, &[tool]).unwrap();
    for name in FIXTURES {
        let folder = open(name).0;
        let [a, b] = [&from_core, &from_file].map(|conversation| folder.render(conversation, true).unwrap());
        assert_eq!(a, b, "{name}");
    }
}

#[test]
fn plans_follow_from_the_sizes() {
    let shape = open("qwen3").0.description().shape.clone();
    let policy = PolicyConfig { micro_batch_tokens_max: 10, threads: 2, gradient_shards: 4, ..PolicyConfig::default() };
    let options = PlanOptions { rollouts: 3, context_tokens: Some(100), policy: policy.clone() };
    let plan_with = |policy: PolicyConfig| MemoryPlan::new(&shape, &PlanOptions { policy, ..options.clone() });
    let plan = plan_with(policy.clone());
    assert_eq!(plan.weights_bytes, 4 * 45_280);
    // Keys and values, 2 layers, 2 heads of 16, 4 bytes.
    assert_eq!(plan.kv_cache_token_bytes, 2 * 2 * 2 * 16 * 4);
    assert_eq!(plan.kv_cache_bytes, 512 * 100 * 3);
    assert_eq!((plan.moments_bytes, plan.gradient_bytes), (2 * plan.weights_bytes, 4 * plan.weights_bytes));
    assert_eq!((plan.trained_parameters, plan.trained_bytes, plan.threads), (45_280, 0, 2));
    let parts = plan.training_packed_bytes + plan.gradient_bytes + plan.moments_bytes + plan.activations_bytes;
    assert_eq!(plan.training_bytes, plan.generation_bytes + parts);
    let whole = PlanOptions { context_tokens: None, ..options.clone() };
    assert_eq!(MemoryPlan::new(&shape, &whole).context_tokens, 2_048);
    let bounded = plan_with(PolicyConfig { kv_cache_bytes_max: 1_000, ..policy.clone() });
    assert_eq!(bounded.kv_cache_bytes, 1_000);

    let lora = LoraConfig { rank: 4, targets: vec![LoraTarget::Q, LoraTarget::Down], ..LoraConfig::default() };
    let adapted = plan_with(PolicyConfig { lora: Some(lora.clone()), ..policy.clone() });
    let (d, ff, query) = (shape.d_model as u64, shape.d_ff as u64, shape.query_width() as u64);
    let trained = 2 * 4 * ((d + query) + (ff + d));
    assert_eq!((adapted.trained_parameters, adapted.moments_bytes), (trained, 2 * 4 * trained));
    assert!(adapted.training_bytes + 3 * adapted.weights_bytes < plan.training_bytes);
    let two = LoraConfig { adapters: vec!["other".to_owned()], ..lora };
    let two = plan_with(PolicyConfig { lora: Some(two), ..policy.clone() });
    assert_eq!(two.gradient_bytes, 2 * adapted.gradient_bytes);
    let critic = plan_with(PolicyConfig { critic: Some(CriticConfig {}), ..policy.clone() });
    assert!(critic.trained_parameters > 3 * plan.trained_parameters / 2);

    let long = PolicyConfig { micro_batch_tokens_max: 4_096, ..policy };
    let [kept, computed_again] = [false, true].map(|gradient_checkpointing| {
        plan_with(PolicyConfig { gradient_checkpointing, ..long.clone() }).activations_bytes
    });
    assert!(computed_again < kept, "{computed_again} {kept}");
    let few_logits = plan_with(PolicyConfig { logits_bytes_max: 4_096, ..long.clone() });
    assert!(few_logits.activations_bytes + 2 * 4 * 4_000 * 300 < kept);
}

#[test]
fn files_of_messages_are_lists_or_objects() {
    let read = |value: Value| Conversation::from_json(&value);
    let message = serde_json::json!({"role": "user", "content": "x"});
    assert_eq!(read(serde_json::json!([message])).unwrap().messages, std::slice::from_ref(&message));
    let object = read(serde_json::json!({"messages": [message], "tools": [{"type": "function"}]})).unwrap();
    assert_eq!(object.tools.unwrap().len(), 1);
    for (wrong, text) in [
        (serde_json::json!("x"), "list of messages"),
        (serde_json::json!({}), "no `messages`"),
        (serde_json::json!([]), "empty"),
        (serde_json::json!(["x"]), "list of objects"),
        (serde_json::json!([{"content": "x"}]), "`messages[0]` has no `role`"),
        (serde_json::json!([{"role": 5}]), "`messages[0].role` is 5"),
        (serde_json::json!({"messages": [message], "tool": [{}]}), "`tool`: name it `tools`"),
        (serde_json::json!({"messages": [message], "tools": {}}), "`tools`"),
    ] {
        let error = read(wrong).unwrap_err();
        assert!(error.contains(text), "no {text:?} in {error}");
    }
}
