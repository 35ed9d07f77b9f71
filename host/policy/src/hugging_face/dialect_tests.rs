//! On the folders of `tests/parity/fixtures`, whose templates do what those of the families do.

use std::path::PathBuf;

use fulgurite_core::llm::ToolCall;

use super::*;
use crate::PolicyTokenizer;

const FIXTURES: [&str; 4] = ["llama3", "mistral", "qwen2", "qwen3"];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/fixtures").join(name)
}

fn open(name: &str) -> PolicyTokenizer {
    PolicyTokenizer::of_folder(&path(name)).unwrap()
}

fn prompt(tokenizer: &PolicyTokenizer, messages: &[Message], drawn: &[&[u32]]) -> Vec<u32> {
    tokenizer.encode_prompt(messages, &[], |message| drawn_of(messages, drawn, message)).unwrap()
}

/// The drawn ids of the n-th answer.
fn drawn_of<'a>(messages: &[Message], drawn: &[&'a [u32]], message: &Message) -> Option<&'a [u32]> {
    let answers = messages.iter().filter(|message| message.role == Role::Assistant);
    let number = answers.into_iter().position(|answer| std::ptr::eq(answer, message))?;
    drawn.get(number).copied()
}

fn user(text: &str) -> Message {
    Message::text(Role::User, text)
}

fn assistant(text: &str) -> Message {
    Message::text(Role::Assistant, text)
}

/// Ids that no tokenizer would choose for a text: a letter at a time.
fn letters(tokenizer: &PolicyTokenizer, text: &str) -> Vec<u32> {
    text.chars().flat_map(|c| tokenizer.encode(&c.to_string()).unwrap().to_vec()).collect()
}

fn ended(tokenizer: &PolicyTokenizer, mut ids: Vec<u32>, end: &str) -> Vec<u32> {
    let id = tokenizer.ends().iter().find(|id| tokenizer.bytes(**id) == end.as_bytes());
    ids.push(*id.unwrap());
    ids
}

fn end_of(name: &str) -> &'static str {
    match name {
        "llama3" => "<|eot_id|>",
        "mistral" => "</s>",
        _ => "<|im_end|>",
    }
}

#[test]
fn without_forgeries_and_recordings_ids_are_those_of_transformers() {
    for name in FIXTURES {
        let (tokenizer, folder) = (open(name), crate::ModelFolder::open(&path(name)).unwrap());
        let messages =
            [Message::text(Role::System, "Be brief."), user("A room for 4 in Zoë's 東京 <b>?"), assistant("R07")];
        for messages in [&messages[..1], &messages[..2], &messages[1..2]] {
            let conversation = Conversation::of_core(messages, &[]).unwrap();
            let want = folder.encode(&folder.render(&conversation, true).unwrap()).unwrap();
            assert_eq!(prompt(&tokenizer, messages, &[]), want, "{name}");
        }
        let ids = prompt(&tokenizer, &messages[..2], &[]);
        assert!(tokenizer.decode(&ids).contains("Zoë's 東京 <b>?"), "{name}: {}", tokenizer.decode(&ids));
    }
}

#[test]
fn contents_never_become_control_tokens() {
    for name in FIXTURES {
        let tokenizer = open(name);
        let folder = FolderTokenizer::read(&path(name)).unwrap().tokenizer;
        let added: Vec<(u32, String)> =
            folder.get_added_tokens_decoder().into_iter().map(|(id, token)| (id, token.content)).collect();
        let all: String = added.iter().map(|(_, text)| text.as_str()).collect();
        let with = |forged: &str| {
            let mut call = assistant("");
            call.tool_calls = vec![ToolCall {
                id: "call00001".into(),
                name: format!("f{forged}"),
                arguments: json!({"a": forged, (format!("k{forged}")): [forged]}).to_string(),
            }];
            let mut result = Message::text(Role::Tool, format!("r{forged}"));
            result.tool_call_id = Some("call00001".into());
            result.name = Some(format!("f{forged}"));
            let tool = ToolSpec {
                name: format!("f{forged}"),
                description: format!("d{forged}"),
                parameters: json!({"type": "object", "description": forged}).to_string(),
            };
            let first = Message::text(Role::System, format!("s{forged}"));
            let messages = [first, user(&format!("u{forged}")), call, result];
            tokenizer.encode_prompt(&messages, &[tool], |_| None).unwrap()
        };
        let (plain, forged) = (with(""), with(&all));
        for (id, text) in &added {
            let count = |ids: &[u32]| ids.iter().filter(|found| *found == id).count();
            assert_eq!(count(&forged), count(&plain), "{name}: {text}");
        }
        // The model still reads every character of it.
        let text = tokenizer.decode(&forged);
        assert!(text.contains(&format!("u{all}")), "{name}: {text}");
        assert!(!text.contains(MARK));
        let ids = tokenizer.encode(&all).unwrap();
        assert!(added.iter().all(|(id, _)| !ids.contains(id)), "{name}");
        assert_eq!(tokenizer.decode(&ids), all, "{name}");
        // Of an assistant, `<think>` is the token and the end of a turn is not.
        let end = end_of(name);
        let answer = prompt(&tokenizer, &[user("u"), assistant(&format!("a{end}b")), user("v")], &[]);
        let honest = prompt(&tokenizer, &[user("u"), assistant("ab"), user("v")], &[]);
        let ends = |ids: &[u32]| ids.iter().filter(|id| tokenizer.is_end(**id)).count();
        assert_eq!(ends(&answer), ends(&honest), "{name}");
    }
}

#[test]
fn answers_come_back_as_the_ids_that_were_drawn() {
    for name in FIXTURES {
        let tokenizer = open(name);
        let first = [user("u"), assistant("the room"), user("v"), assistant("and the room"), user("w")];
        let drawn = [letters(&tokenizer, "the room"), letters(&tokenizer, "and the room")];
        assert!(!prompt(&tokenizer, &first, &[]).windows(drawn[0].len()).any(|window| window == drawn[0]), "{name}");
        // Both with and without their end token: with a limit of tokens it may not have been drawn.
        for end in [Some(end_of(name)), None] {
            let with_end = |ids: &Vec<u32>| end.map_or(ids.clone(), |end| ended(&tokenizer, ids.clone(), end));
            let drawn = [with_end(&drawn[0]), with_end(&drawn[1])];
            let recorded = [drawn[0].as_slice(), drawn[1].as_slice()];
            let calls = [1, 3, 5].map(|count| prompt(&tokenizer, &first[..count], &recorded));
            for (call, drawn) in calls.windows(2).zip(&drawn) {
                assert!(call[1].starts_with(&[call[0].as_slice(), drawn].concat()), "{name}");
            }
            let text = tokenizer.decode(&calls[2]);
            let anew = tokenizer.decode(&prompt(&tokenizer, &first, &[]));
            // This Qwen3 template begins an answer with a line break that the model was not asked for.
            assert_eq!(text, anew.replace("assistant\n\n", "assistant\n"), "{name}");
        }
    }
}

#[test]
fn calls_of_tools_come_back_as_drawn_though_the_template_writes_them_otherwise() {
    let tokenizer = open("qwen2");
    let written = "<tool_call>{\"name\":\"f\",   \"arguments\":{}}</tool_call>";
    let open_tag = prompt(&tokenizer, &[user("u"), assistant("<tool_call>")], &[]);
    assert!(open_tag.len() < prompt(&tokenizer, &[user("u"), assistant("|tool_call|")], &[]).len(), "one token");
    let drawn = ended(&tokenizer, letters(&tokenizer, written), "<|im_end|>");
    let (text, tool_calls) = tokenizer.parse_completion(&drawn, 0);
    assert_eq!((text.as_str(), tool_calls.len()), ("", 1));
    let mut answer = assistant(&text);
    answer.tool_calls = tool_calls;
    let messages = [user("u"), answer, Message::text(Role::Tool, "21")];
    let begun = [prompt(&tokenizer, &messages[..1], &[]), drawn.clone()].concat();
    assert!(prompt(&tokenizer, &messages, &[&drawn]).starts_with(&begun));
}

#[test]
fn where_a_template_forgets_thoughts_the_conversation_is_encoded_anew() {
    let tokenizer = open("qwen3");
    let thought = "<think>\nhm\n</think>\n\nR07";
    let drawn = ended(&tokenizer, letters(&tokenizer, thought), "<|im_end|>");
    let answer = || assistant(&tokenizer.parse_completion(&drawn, 0).0);
    let begun = [prompt(&tokenizer, &[user("u")], &[]), drawn.clone()].concat();
    // A tool's answer follows: the thought stays.
    let messages = [user("u"), answer(), Message::text(Role::Tool, "21")];
    assert!(prompt(&tokenizer, &messages, &[&drawn]).starts_with(&begun));
    // The user speaks again: it goes, and with it the prefix.
    let messages = [user("u"), answer(), user("v")];
    let ids = prompt(&tokenizer, &messages, &[&drawn]);
    assert_eq!(ids, prompt(&tokenizer, &messages, &[]));
    assert!(!tokenizer.decode(&ids).contains("hm"));
    // An answer without a thought is rendered as it was drawn.
    let drawn = ended(&tokenizer, letters(&tokenizer, "R07"), "<|im_end|>");
    let begun = [prompt(&tokenizer, &[user("u")], &[]), drawn.clone()].concat();
    assert!(prompt(&tokenizer, &[user("u"), assistant("R07"), user("v")], &[&drawn]).starts_with(&begun));
    // And what comes after a forgotten thought is spliced again, as its own call had it.
    let later = [user("u"), answer(), user("v"), assistant("R07"), Message::text(Role::Tool, "t")];
    let thoughtful = ended(&tokenizer, letters(&tokenizer, thought), "<|im_end|>");
    let recorded = [thoughtful.as_slice(), drawn.as_slice()];
    let call = prompt(&tokenizer, &later[..3], &recorded);
    assert!(prompt(&tokenizer, &later, &recorded).starts_with(&[call, drawn.clone()].concat()));
}

/// As the real Qwen3 does: only an answer that stands last gets an empty thought, so that one that was drawn without any is
/// never rendered as it is when it stands last.
#[test]
fn an_empty_thought_of_the_last_answer_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(path("qwen2").join(name), dir.path().join(name)).unwrap();
    }
    let template = "{%- for m in messages -%}{{ '<|im_start|>' ~ m.role ~ '\n' }}\
        {%- if m.role == 'assistant' and loop.last -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{{ m.content }}\
        {%- for c in m.tool_calls or [] -%}{{ '<tool_call>\n' ~ (c.function | tojson) ~ '\n</tool_call>' }}{%- endfor -%}\
        {{ '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}";
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let tokenizer = PolicyTokenizer::of_folder(dir.path()).unwrap();
    for (drawn, follows) in [
        ("<tool_call>{\"name\":\"f\",\"arguments\":{\"b\":1,   \"a\":2}}</tool_call>", Role::Tool),
        ("R07 ", Role::User),
    ] {
        let drawn = ended(&tokenizer, letters(&tokenizer, drawn), "<|im_end|>");
        let (text, tool_calls) = tokenizer.parse_completion(&drawn, 0);
        let mut answer = assistant(&text);
        answer.tool_calls = tool_calls;
        let messages = [user("u"), answer, Message::text(follows, "21")];
        let begun = [prompt(&tokenizer, &messages[..1], &[]), drawn.clone()].concat();
        assert!(prompt(&tokenizer, &messages, &[&drawn]).starts_with(&begun));
        // Another answer than the recorded one is not taken for it.
        let other = [user("u"), assistant("else"), Message::text(follows, "21")];
        assert_eq!(prompt(&tokenizer, &other, &[&drawn]), prompt(&tokenizer, &other, &[]));
    }
}

#[test]
fn of_a_demonstration_the_assistant_writes_its_content_and_the_end() {
    for name in FIXTURES {
        let tokenizer = open(name);
        let messages = [user("u"), assistant("R07"), user("v"), assistant("hm")];
        let (ids, mask) = tokenizer.encode_demonstration(&messages, &[Role::Assistant]).unwrap();
        let trained: Vec<u32> = ids.iter().zip(&mask).filter(|(_, trained)| **trained).map(|(id, _)| *id).collect();
        let end = end_of(name);
        let line = if name == "qwen3" { "\n" } else { "" };
        assert_eq!(tokenizer.decode(&trained), format!("{line}R07{end}{line}hm{end}"), "{name}");
        // What comes before an answer is what the answer's own call would have had as its prompt.
        let first = mask.iter().position(|trained| *trained).unwrap();
        assert_eq!(ids[..first], prompt(&tokenizer, &messages[..1], &[]), "{name}");
        let none = tokenizer.encode_demonstration(&messages, &[]).unwrap();
        assert!(!none.1.contains(&true), "{name}");
        let refused = tokenizer.encode_demonstration(&messages, &[Role::User]).unwrap_err().to_string();
        assert!(refused.contains("`user`"), "{refused}");
    }
    // A template that moves its preamble renders the first question otherwise once there is a second.
    let tokenizer = open("mistral");
    let messages = [Message::text(Role::System, "s"), user("u"), assistant("a"), user("v"), assistant("b")];
    let refused = tokenizer.encode_demonstration(&messages, &[Role::Assistant]).unwrap_err().to_string();
    assert!(refused.contains("messages[2]") && refused.contains("another way"), "{refused}");
    assert!(tokenizer.encode_demonstration(&messages[..3], &[Role::Assistant]).is_ok());
    // A thought that is forgotten is not trained on, and one that stays is.
    let tokenizer = open("qwen3");
    let thought = |text: &str| assistant(&format!("<think>\nhm\n</think>\n\n{text}"));
    let messages = [user("u"), thought("a"), user("v"), thought("b")];
    let (ids, mask) = tokenizer.encode_demonstration(&messages, &[Role::Assistant]).unwrap();
    let trained: Vec<u32> = ids.iter().zip(&mask).filter(|(_, trained)| **trained).map(|(id, _)| *id).collect();
    assert_eq!(tokenizer.decode(&trained), "\na<|im_end|>\n<think>\nhm\n</think>\n\nb<|im_end|>");
}

#[test]
fn a_template_without_an_end_or_a_folder_without_a_template_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(path("qwen2").join(name), dir.path().join(name)).unwrap();
    }
    let refused = || PolicyTokenizer::of_folder(dir.path()).unwrap_err().to_string();
    assert!(refused().contains("chat template"), "{}", refused());
    let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}";
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let tokenizer = PolicyTokenizer::of_folder(dir.path()).unwrap();
    let messages = [user("u"), assistant("a")];
    let error = tokenizer.encode_demonstration(&messages, &[Role::Assistant]).unwrap_err().to_string();
    assert!(error.contains("no token that ends it"), "{error}");
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": 5000}"#).unwrap();
    assert!(refused().contains("5000"), "{}", refused());
    for name in ["config.json", "generation_config.json", "tokenizer_config.json"] {
        std::fs::write(dir.path().join(name), "{}").unwrap();
    }
    assert!(refused().contains("eos_token_id"), "{}", refused());
}

#[test]
fn a_saved_dialect_is_the_same() {
    for name in FIXTURES {
        let (dir, again) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tokenizer = open(name);
        tokenizer.save(dir.path()).unwrap();
        let loaded = PolicyTokenizer::load(dir.path()).unwrap();
        loaded.save(again.path()).unwrap();
        assert!(loaded.is_of_folder());
        assert_eq!((loaded.hash(), loaded.ends()), (tokenizer.hash(), tokenizer.ends()), "{name}");
        assert_eq!(PolicyTokenizer::load(again.path()).unwrap().hash(), tokenizer.hash(), "{name}");
        let description = crate::ModelFolder::open(&path(name)).unwrap().description().clone();
        assert!(description.end_tokens.iter().all(|id| tokenizer.is_end(*id)), "{name}");
        assert!(tokenizer.with_template("x").is_err());
    }
}

#[test]
fn bytes_of_ids_make_the_text() {
    for name in FIXTURES {
        let tokenizer = open(name);
        for text in ["the quick  brown\n\tfox", "héllo 漢字 🙂", "", " a "] {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()), text, "{name}");
        }
    }
}
