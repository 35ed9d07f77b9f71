use super::*;
use crate::engine::PolicyEngine;
use crate::hugging_face::Conversation;
use crate::inference::Inference;
use crate::tokenizer::TokenizerConfig;
use fulgurite_core::llm::{Message, Role};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/fixtures").join(name)
}

fn own_tokenizer() -> PolicyTokenizer {
    let corpus = ["book a room for 4 people", "R07 holds 12 people"].map(String::from);
    PolicyTokenizer::train(corpus.into_iter(), &TokenizerConfig::default()).unwrap()
}

/// The logits of a checkpoint's own weights, and those of a folder.
fn both_logits(checkpoint: &Path, folder: &Path, ids: &[u32]) -> [Vec<f32>; 2] {
    let config = PolicyConfig { threads: 1, ..PolicyConfig::default() };
    let parameters = checkpoint::load(checkpoint, None).unwrap().policy.parameters;
    let models =
        [Inference::new(&config, parameters).unwrap(), ModelFolder::open(folder).unwrap().inference(&config).unwrap()];
    models.map(|model| model.logits(ids, 0).unwrap())
}

#[tokio::test]
async fn an_exported_policy_is_the_policy() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let config = PolicyConfig { threads: 1, ..PolicyConfig::default() };
    let own = PolicyEngine::create(&config, own_tokenizer(), Seed::new(3)).unwrap();
    own.save(&at("own")).await.unwrap();
    let folders = ["llama3", "llama3-old-keys-bf16", "llama-sharded-f16", "mistral", "qwen2", "qwen3"];
    for name in folders {
        let engine = ModelFolder::open(&fixture(name)).unwrap().engine(&config, Seed::new(0)).unwrap();
        engine.save(&at(name)).await.unwrap();
    }
    for name in folders.into_iter().chain(["own"]) {
        let to = at(&format!("{name}-exported"));
        let mut steps = vec![];
        let options = ExportOptions { shard_bytes_max: 40_000, ..ExportOptions::default() };
        let found = export_checkpoint(&at(name), &to, &options, &mut |done, total| steps.push((done, total))).unwrap();
        assert!(found.files > 1 && found.bytes == 4 * found.parameters as u64, "{name}: {found:?}");
        assert_eq!(steps.last(), Some(&(found.bytes, found.bytes)));
        let ids: Vec<u32> = (0..60).map(|n| n * 7 % 260).collect();
        let [policy, folder] = both_logits(&at(name), &to, &ids);
        assert_eq!(policy, folder, "{name}");
        // The dialect is the same, and a policy can begin from it.
        let messages = [Message::text(Role::User, "a room <|end|>?"), Message::text(Role::Assistant, "R07")];
        let (before, after) = (PolicyTokenizer::load(&at(name)).unwrap(), PolicyTokenizer::of_folder(&to).unwrap());
        for count in [1, 2] {
            let ids = |tokenizer: &PolicyTokenizer| tokenizer.encode_prompt(&messages[..count], &[], |_| None).unwrap();
            assert_eq!(before.decode(&ids(&before)), after.decode(&ids(&after)), "{name}");
        }
        assert_eq!(before.ends(), after.ends(), "{name}");
    }
}

#[test]
fn an_imported_folder_has_what_is_needed_in_the_type_that_is_asked_for() {
    let scratch = tempfile::tempdir().unwrap();
    let to = scratch.path().join("imported");
    let options = ExportOptions { file_type: Some(FileType::Bf16), ..ExportOptions::default() };
    let found = import_folder(&fixture("llama-sharded-f16"), &to, &options, &mut |_, _| {}).unwrap();
    assert_eq!((found.files, found.file_type), (1, FileType::Bf16));
    let [before, after] = [fixture("llama-sharded-f16"), to.clone()].map(|path| ModelFolder::open(&path).unwrap());
    assert_eq!(before.description(), after.description());
    assert_eq!(after.types().keys().copied().collect::<Vec<_>>(), ["bfloat16"]);
    assert!(!to.join("expected.json").exists());
    let conversation = Conversation::of_core(&[Message::text(Role::User, "a room")], &[]).unwrap();
    assert_eq!(before.render(&conversation, true).unwrap(), after.render(&conversation, true).unwrap());
    for spec in parameters::specs(&before.description().shape) {
        let [a, b] = [&before, &after].map(|folder| folder.weights.read(&spec.name).unwrap());
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() <= a.abs() / 256.0, "{}: {a} and {b}", spec.name);
        }
    }
    // By default the type stays.
    let same = import_folder(&to, &scratch.path().join("again"), &ExportOptions::default(), &mut |_, _| {}).unwrap();
    assert_eq!(same.file_type, FileType::Bf16);
}

#[test]
fn nothing_is_overwritten_and_nothing_half_is_left() {
    let scratch = tempfile::tempdir().unwrap();
    let to = scratch.path().join("model");
    std::fs::create_dir(&to).unwrap();
    let config = PolicyConfig { d_model: Some(32), heads: Some(4), d_ff: Some(64), ..PolicyConfig::default() };
    let options = ExportOptions::default();
    let write = || new_folder(&config, &own_tokenizer(), Seed::new(1), &to, &options, &mut |_, _| {});
    // An empty folder is no loss.
    let first = write().unwrap();
    assert_eq!(ModelFolder::open(&to).unwrap().description().shape.parameter_count(), first.parameters);
    let error = write().unwrap_err().to_string();
    assert!(error.contains("model") && error.contains("something already"), "{error}");
    // A context that the model does not have.
    let long = PolicyConfig { context_tokens_max: Some(129), ..PolicyConfig::default() };
    let error = ModelFolder::open(&to).unwrap().engine(&long, Seed::new(0)).unwrap_err().to_string();
    assert!(error.contains("context_tokens_max") && error.contains("128"), "{error}");
    let short = PolicyConfig { context_tokens_max: Some(64), threads: 1, ..PolicyConfig::default() };
    assert_eq!(ModelFolder::open(&to).unwrap().engine(&short, Seed::new(0)).unwrap().context_tokens_max(), 64);
    // A weight that half precision cannot hold.
    let halves = ExportOptions { file_type: Some(FileType::F16), ..options };
    let mut large = Parameters::initial(&config.shape(300).unwrap(), 0.02, Seed::new(1));
    large.values[0][0] = 1e6;
    let error = publish(&scratch.path().join("halves"), &large.shape.clone(), |dir| {
        write_model(dir, &large.shape, &Source::Memory(&large), &halves, &mut |_, _| {})
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("embed_tokens") && error.contains("bf16"), "{error}");
    let left: Vec<_> = std::fs::read_dir(scratch.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["model"], "temporary folders are gone");
}
