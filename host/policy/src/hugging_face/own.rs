//! This crate's own dialect, written down as a Hugging Face folder has it.

use std::path::Path;

use fulgurite_core::llm::{Message, Role, ToolCall};
use serde_json::json;

use crate::checkpoint::{write_file, write_json};
use crate::error::PolicyError;
use crate::tokenizer::PolicyTokenizer;

/// Puts in front of an own template what the host does before it renders: contents with their tool calls, tools as JSON.
const PRELUDE: &str = "\
{%- set own = namespace(messages=[], tools=[]) -%}
{%- for message in messages -%}
{%- set content -%}{{- message.content or '' -}}{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
<tool_call>{{- {'name': function.name, 'arguments': function.arguments} | tojson(separators=(',', ':')) -}}</tool_call>
{%- endfor -%}{%- endset -%}
{%- set own.messages = own.messages + [{'role': message.role, 'content': content}] -%}
{%- endfor -%}
{%- for tool in tools or [] -%}
{%- set function = tool.function or tool -%}
{%- set described = {'name': function.name, 'description': function.description, 'parameters': function.parameters} -%}
{%- set own.tools = own.tools + [described | tojson(separators=(',', ':'))] -%}
{%- endfor -%}
{%- set messages = own.messages -%}
{%- set tools = own.tools -%}
";

/// Writes the tokenizer's files so that transformers, and this crate, read them as a folder.
///
/// # Errors
/// When a file cannot be written, or the template does not mean the same there.
pub(crate) fn write(tokenizer: &PolicyTokenizer, dir: &Path, context_tokens_max: usize) -> Result<(), PolicyError> {
    tokenizer.save(dir)?;
    let path = dir.join("chat_template.jinja");
    let source = std::fs::read_to_string(&path).map_err(PolicyError::io(&path))?;
    write_file(&path, format!("{PRELUDE}{source}").as_bytes())?;
    let ends: Vec<String> = tokenizer.ends().iter().map(|id| tokenizer.decode(&[*id])).collect();
    let settings = json!({
        "clean_up_tokenization_spaces": false,
        "eos_token": ends.first(),
        "model_max_length": context_tokens_max,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    write_json(&dir.join("tokenizer_config.json"), &settings)?;
    write_json(&dir.join("generation_config.json"), &json!({"eos_token_id": tokenizer.ends()}))?;
    check(tokenizer, dir)
}

/// Both must make the same ids of a conversation with all that a conversation can have.
fn check(tokenizer: &PolicyTokenizer, dir: &Path) -> Result<(), PolicyError> {
    let folder = PolicyTokenizer::of_folder(dir)?;
    let mut call = Message::text(Role::Assistant, "let me see");
    let arguments = r#"{"at":"10:00","é":[1.5,null,"<b>"]}"#.to_owned();
    call.tool_calls = vec![ToolCall { id: "call-0-0".to_owned(), name: "free_rooms".to_owned(), arguments }];
    let messages = [
        Message::text(Role::System, "You book rooms.\n"),
        Message::text(Role::User, " a room for 4 "),
        call,
        Message::text(Role::Tool, "R07\nR11"),
        Message::text(Role::Assistant, "R07"),
        Message::text(Role::User, "thanks"),
    ];
    for count in 1..=messages.len() {
        let part = messages.get(..count).unwrap_or_default();
        if folder.encode_prompt(part, &[], |_| None)? != tokenizer.encode_prompt(part, &[], |_| None)? {
            let reason =
                "it does not mean the same outside of this program: begin and end its blocks with `{%-` and `-%}`";
            return Err(PolicyError::model_file(dir.join("chat_template.jinja"), reason));
        }
    }
    Ok(())
}
