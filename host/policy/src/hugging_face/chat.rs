//! Chat templates of Hugging Face folders, rendered as transformers renders them.
//!
//! The environment (`jinja.rs`) is that of `apply_chat_template`: `trim_blocks`, `lstrip_blocks`, lenient undefined values,
//! Python's methods of texts, lists and objects, loop controls, `raise_exception`, `strftime_now`, its own `tojson`, and the
//! block `generation`, which here only renders what it holds. Templates come from strangers: they see what is given to them
//! and nothing else, and run on limited fuel.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use fulgurite_core::llm::{Message, ToolSpec};
use jiff::Zoned;
use minijinja::value::Serde;
use minijinja::{ErrorKind, Value as Jinja};
use regex::Regex;
use serde_json::{Map, Value, json};

use super::jinja::{RENDERED_BYTES_MAX, environment};
use crate::error::PolicyError;

/// Where a folder's template may be, besides `tokenizer_config.json`.
const TEMPLATE_FILE: &str = "chat_template.jinja";
/// Older, and that of models for images.
const TEMPLATE_JSON: &str = "chat_template.json";
/// Templates besides the default one.
const TEMPLATE_FOLDER: &str = "additional_chat_templates";

/// The named tokens that a template sees as variables.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The template of a folder.
#[derive(Debug)]
pub(crate) struct FolderTemplate {
    default: String,
    /// Used instead when tools are given, where there is one.
    with_tools: Option<String>,
    /// Where the default template stands, and the one with tools.
    files: [PathBuf; 2],
    /// `bos_token` and its like.
    special: BTreeMap<&'static str, String>,
}

fn failed(error: &minijinja::Error) -> PolicyError {
    // What a template itself says stands alone, and first.
    let words = match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(words)) => words.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    let cause = std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"));
    let line = error.line().map_or_else(String::new, |line| format!(" (line {line} of the template)"));
    PolicyError::Template(format!("{words}{cause}{line}"))
}

/// Jinja turns every line end of a template into `\n` before it reads it.
fn normalised_lines(source: &str) -> String {
    source.replace("\r\n", "\n").replace('\r', "\n")
}

/// `{% generation %}` marks what the model writes, for masks; it has a scope of its own, as `with` has.
fn without_generation(source: &str) -> String {
    static BLOCK: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})").ok());
    let with = |found: &regex::Captures<'_>| {
        let part = |group| found.get(group).map_or("", |part| part.as_str());
        format!("{}{}with{}", part(1), part(2), part(3))
    };
    BLOCK.as_ref().map_or_else(|| source.to_owned(), |block| block.replace_all(source, with).into_owned())
}

/// A message in the form that templates expect. Arguments of tool calls are objects there, not text.
pub(crate) fn message_value(message: &Message) -> Result<Value, PolicyError> {
    let mut fields = Map::new();
    fields.insert("role".to_owned(), message.role.as_str().into());
    fields.insert("content".to_owned(), message.content.clone().into());
    if let Some(name) = &message.name {
        fields.insert("name".to_owned(), name.clone().into());
    }
    if let Some(id) = &message.tool_call_id {
        fields.insert("tool_call_id".to_owned(), id.clone().into());
    }
    // Templates ask whether the field is there.
    if !message.tool_calls.is_empty() {
        let calls = message.tool_calls.iter().map(|call| {
            let arguments = parsed(&call.arguments, "arguments of tool call", &call.name)?;
            let function = json!({"name": call.name, "arguments": arguments});
            Ok(json!({"id": call.id, "type": "function", "function": function}))
        });
        fields.insert("tool_calls".to_owned(), Value::Array(calls.collect::<Result<_, PolicyError>>()?));
    }
    Ok(Value::Object(fields))
}

/// A tool in the form that templates expect.
pub(crate) fn tool_value(tool: &ToolSpec) -> Result<Value, PolicyError> {
    let parameters = parsed(&tool.parameters, "parameters of tool", &tool.name)?;
    let function = json!({"name": tool.name, "description": tool.description, "parameters": parameters});
    Ok(json!({"type": "function", "function": function}))
}

fn parsed(text: &str, what: &str, name: &str) -> Result<Value, PolicyError> {
    serde_json::from_str(text).map_err(|error| PolicyError::Template(format!("{what} `{name}`: {error}")))
}

/// A named token that a class of tokenizers has where no file says so.
fn default_token(class: &Value, name: &str) -> Option<&'static str> {
    let is_gpt2 = matches!(class.as_str(), Some("GPT2Tokenizer" | "GPT2TokenizerFast"));
    (is_gpt2 && matches!(name, "bos_token" | "eos_token" | "unk_token")).then_some("<|endoftext|>")
}

/// What transformers does to a message before the template sees it: fields that are null are dropped, and reasoning is
/// found under each of its names.
fn normalised(message: &Value) -> Value {
    const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
    let Some(given) = message.as_object() else { return message.clone() };
    let given = || given.iter().filter(|(_, value)| !value.is_null());
    let mut fields = Map::new();
    let reasoning = REASONING.iter().find_map(|name| given().find(|(key, _)| key == name));
    if let Some((_, reasoning)) = reasoning {
        fields.insert("thinking".to_owned(), reasoning.clone());
    }
    fields.extend(given().map(|(key, value)| (key.clone(), value.clone())));
    if let Some((_, reasoning)) = reasoning {
        fields.insert("reasoning_content".to_owned(), reasoning.clone());
    }
    Value::Object(fields)
}

impl FolderTemplate {
    /// Reads the template and the named tokens of a folder; `None` when it has no template.
    ///
    /// # Errors
    /// When a file cannot be read, or a template does not parse.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>, PolicyError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = if config_path.is_file() { read_json(&config_path)? } else { Value::Null };
        let mut sources = BTreeMap::new();
        let mut path = config_path;
        let tools_path = dir.join(TEMPLATE_FOLDER).join("tool_use.jinja");
        if dir.join(TEMPLATE_FILE).is_file() {
            path = dir.join(TEMPLATE_FILE);
            sources.insert("default".to_owned(), std::fs::read_to_string(&path).map_err(PolicyError::io(&path))?);
            if tools_path.is_file() {
                let source = std::fs::read_to_string(&tools_path).map_err(PolicyError::io(&tools_path))?;
                sources.insert("tool_use".to_owned(), source);
            }
        } else if dir.join(TEMPLATE_JSON).is_file() {
            path = dir.join(TEMPLATE_JSON);
            sources = named_sources(field(&read_json(&path)?, "chat_template"));
        } else {
            sources = named_sources(field(&config, "chat_template"));
        }
        let Some(default) = sources.remove("default") else { return Ok(None) };
        let with_tools = sources.remove("tool_use");
        let mut legacy = Value::Null;
        let legacy_path = dir.join("special_tokens_map.json");
        if legacy_path.is_file() {
            legacy = read_json(&legacy_path)?;
        }
        let token = |name: &'static str| {
            let text = |value: &Value| value.as_str().or_else(|| field(value, "content").as_str()).map(str::to_owned);
            let given = text(field(&config, name)).or_else(|| text(field(&legacy, name)));
            let is_said = [&config, &legacy].iter().any(|file| file.get(name).is_some());
            let own = if is_said { None } else { default_token(field(&config, "tokenizer_class"), name) };
            Some((name, given.or_else(|| own.map(str::to_owned))?))
        };
        let special = SPECIAL_TOKENS.into_iter().filter_map(token).collect();
        let template = Self {
            default: without_generation(&normalised_lines(&default)),
            with_tools: with_tools.map(|source| without_generation(&normalised_lines(&source))),
            files: [path.clone(), if path.ends_with(TEMPLATE_FILE) { tools_path } else { path }],
            special,
        };
        let environment = environment(Zoned::default());
        let sources = std::iter::once(&template.default).chain(&template.with_tools);
        for (source, path) in sources.zip(&template.files) {
            let checked = environment.template_from_str(source);
            checked.map_err(|error| PolicyError::model_file(path, failed(&error).to_string()))?;
        }
        Ok(Some(template))
    }

    /// What it says of tools: the template that is used when there are some.
    pub(crate) fn source(&self) -> &str {
        self.with_tools.as_deref().unwrap_or(&self.default)
    }

    /// The file of the template that is used with tools, or without.
    pub(crate) fn file(&self, tools: bool) -> &Path {
        let [default, with_tools] = &self.files;
        if tools && self.with_tools.is_some() { with_tools } else { default }
    }

    /// The text of a conversation.
    ///
    /// `messages` and `tools` are in Hugging Face's form and reach the template as they are. `now` is what `strftime_now`
    /// formats: a template that asks for the date makes another prompt tomorrow, so the caller decides what the date is.
    ///
    /// # Errors
    /// When the template fails or refuses the conversation; the error has its words.
    pub(crate) fn render(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
        now: &Zoned,
    ) -> Result<String, PolicyError> {
        let source = match (&self.with_tools, tools) {
            (Some(source), Some(_)) => source,
            _ => &self.default,
        };
        let messages: Vec<Value> = messages.iter().map(normalised).collect();
        let mut variables = BTreeMap::from([
            ("messages", Jinja::from(Serde(messages))),
            ("tools", tools.map_or(Jinja::from(()), |tools| Jinja::from(Serde(tools)))),
            ("documents", Jinja::from(())),
            ("add_generation_prompt", add_generation_prompt.into()),
        ]);
        variables.extend(self.special.iter().map(|(name, token)| (*name, Jinja::from(token.as_str()))));
        let environment = environment(now.clone());
        let template = environment.template_from_str(source).map_err(|error| failed(&error))?;
        let mut text = Bounded(Vec::new());
        template.render_captured_to(Jinja::from_pairs(variables), &mut text).map_err(|error| failed(&error))?;
        String::from_utf8(text.0).map_err(|error| PolicyError::Internal(error.to_string()))
    }
}

/// A rendered text that may not grow without end.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > RENDERED_BYTES_MAX {
            let reason = format!("the conversation becomes more than {RENDERED_BYTES_MAX} bytes of text");
            return Err(std::io::Error::other(reason));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// One template, or a list of them with names.
fn named_sources(value: &Value) -> BTreeMap<String, String> {
    if let Some(source) = value.as_str() {
        return BTreeMap::from([("default".to_owned(), source.to_owned())]);
    }
    let named = |entry: &Value| {
        Some((field(entry, "name").as_str()?.to_owned(), field(entry, "template").as_str()?.to_owned()))
    };
    value.as_array().into_iter().flatten().filter_map(named).collect()
}

/// A field of an object; null where there is none.
pub(crate) fn field<'a>(value: &'a Value, name: &str) -> &'a Value {
    value.get(name).unwrap_or(&Value::Null)
}

/// The JSON of a file.
pub(crate) fn read_json(path: &Path) -> Result<Value, PolicyError> {
    let text = std::fs::read(path).map_err(PolicyError::io(path))?;
    serde_json::from_slice(&text).map_err(|error| PolicyError::model_file(path, format!("it is not JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use fulgurite_core::llm::{Role, ToolCall};

    use super::*;

    fn read(config: &Value, files: &[(&str, &str)]) -> Result<Option<FolderTemplate>, PolicyError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        FolderTemplate::read(dir.path())
    }

    fn try_render(source: &str, messages: &Value) -> Result<String, PolicyError> {
        let template = read(&json!({"bos_token": {"content": "<s>"}}), &[(TEMPLATE_FILE, source)])?.unwrap();
        let now: Zoned = "2024-07-26T23:30:00+00:00[UTC]".parse().unwrap();
        template.render(messages.as_array().unwrap(), None, true, &now)
    }

    fn render(source: &str) -> String {
        try_render(source, &json!([{"role": "user", "content": " x ", "name": null}])).unwrap()
    }

    #[test]
    fn the_environment_is_that_of_transformers() {
        assert_eq!(render("  {% if true %}\n a\n  {% endif %}\nb\n"), " a\nb");
        assert_eq!(render("{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents }}"), "<s>TrueNone");
        assert_eq!(render("{{ strftime_now('%d %b %Y') }}"), "26 Jul 2024");
        assert_eq!(render("{{ messages[0].content.strip() }}|{{ 'name' in messages[0] }}"), "x|False");
        assert_eq!(render("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}"), "1");
        assert_eq!(render("a\n  {%- generation %}\nb{% endgeneration -%}\n c"), "abc");
        assert_eq!(render("{{ 'a<b' | tojson }}{{ 1.0 }}{{ [true, none, 'x'] }}"), "\"a<b\"1.0[True, None, 'x']");
    }

    #[test]
    fn tests_and_filters_say_what_python_says() {
        for (template, written) in [
            (
                "{{ none is iterable }} {{ 'a' is iterable }} {{ nothing is iterable }} {{ 1 is iterable }}",
                "False True True False",
            ),
            ("{{ tools is iterable and tools | length > 0 }}", "False"),
            (
                "{{ 'a' is sequence }} {{ {} is sequence }} {{ [] is sequence }} {{ none is sequence }}",
                "True True True False",
            ),
            ("{{ nothing | length }} {{ nothing | count }} {{ [1] | length }}", "0 0 1"),
            ("{{ raise_exception is callable }} {{ 1 is callable }}", "True False"),
            (
                "{{ 1e20 }} {{ 1e-7 }} {{ [1e16, {'a': 1e-5}] }} {{ (1e16,) }} {{ 1e-7 | string }} {{ 0.5 }}",
                "1e+20 1e-07 [1e+16, {'a': 1e-05}] (1e+16,) 1e-07 0.5",
            ),
            ("{{ 'x' | int }} {{ '3.7' | int }} {{ 'x' | int(5) }} {{ 'ff' | int(base=16) }}", "0 3 5 255"),
            ("{{ {'b': 1, 'a': 2} | dictsort(false, 'value') }}", "[('b', 1), ('a', 2)]"),
            ("{{ {'a': 1} | tojson(false, 2) }}|{{ 'é' | tojson(true) }}", "{\n  \"a\": 1\n}|\"\\u00e9\""),
            ("{{ 'aaa' | replace('a', 'b', 2) }} {{ 'aaa'.replace('a', 'b', 1) }}", "bba baa"),
            (
                "{{ 'a b_c, d' | wordcount }} {{ 'abc def ghi jkl' | truncate(9) }} {{ 'abc' | center(9) }}|",
                "3 abc...    abc   |",
            ),
            ("{{ 'a\nb' | indent(2, true) }} {{ '%5s|%-3d' | format('a', 3) }}", "  a\n  b     a|3  "),
            (
                "{{ [1, 2, 3] | batch(2, 0) | list }} {{ [1, 2, 3] | slice(2) | list }}",
                "[[1, 2], [3, 0]] [[1, 2], [3]]",
            ),
        ] {
            assert_eq!(render(template), written, "{template}");
        }
    }

    #[test]
    fn methods_are_those_of_python() {
        for (template, written) in [
            (
                "{{ 'a-b-c'.rsplit('-', 1) }} {{ 'a-b-c'.rsplit('-', maxsplit=1) }} {{ ' a b  c '.rsplit(none, 1) }}",
                "['a-b', 'c'] ['a-b', 'c'] [' a b', 'c']",
            ),
            (
                "{{ 'a.b.c'.split('.', maxsplit=1) }} {{ 'a b'.split() }} {{ 'a,b'.rsplit(',') }}",
                "['a', 'b.c'] ['a', 'b'] ['a', 'b']",
            ),
            ("{{ 'a,b,c'.partition(',') }} {{ 'a,b,c'.rpartition(',') }}", "('a', ',', 'b,c') ('a,b', ',', 'c')"),
            ("{{ 'a'.partition(',') }} {{ 'a'.rpartition(',') }}", "('a', '', '') ('', '', 'a')"),
            ("{{ 'abc'.removeprefix('a') }} {{ 'abc'.removesuffix('c') }} {{ 'éc'.index('c') }}", "bc ab 1"),
            ("{{ \"it's a b2c\".title() }} {{ \"it's a b2c\" | title }}", "It'S A B2C It's A B2c"),
            ("{{ 'aBc'.swapcase() }} {{ '-5'.zfill(4) }} {{ 'abc'.zfill(5) }}", "AbC -005 00abc"),
            (
                "{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3, '*') }}|{{ 'abc'.center(6) }}|{{ 'ab'.center(5, '.') }}",
                "a  |**a| abc  |..ab.",
            ),
            ("{{ {'a': 1}.copy() }} {{ [1, 2].copy() }} {{ [3, 1].index(1) }}", "{'a': 1} [1, 2] 1"),
        ] {
            assert_eq!(render(template), written, "{template}");
        }
        for wrong in ["{{ 'a'.index('b') }}", "{{ [1].index(2) }}", "{{ 'a'.center(3, 'xy') }}", "{{ 'a'.split('') }}"]
        {
            assert!(try_render(wrong, &json!([])).is_err(), "{wrong}");
        }
    }

    #[test]
    fn lines_end_as_in_jinja() {
        assert_eq!(render("a\r\n{% if true %}\r\nb\r\n{% endif %}\r\nc\r\n"), "a\nb\nc");
        assert_eq!(render("a\rb{% if true %}\r{% endif %}"), "a\nb");
        let config = json!({"chat_template": "a\r\n{% if true %}\r\nb{% endif %}"});
        let template = read(&config, &[]).unwrap().unwrap();
        assert_eq!(template.render(&[], None, false, &Zoned::default()).unwrap(), "a\nb");
    }

    #[test]
    fn numbers_do_not_take_the_memory() {
        for huge in [
            "{{ '%099999999999d' | format(5) }}",
            "{{ '%*d' | format(99999999999, 5) }}",
            "{{ '{:>99999999999}'.format('x') }}",
            "{{ '{:>{}}'.format('x', 99999999999) }}",
            "{{ '{:>{w}}'.format('x', w=99999999999) }}",
            "{{ 'a\nb' | indent(99999999999) }}",
            "{{ 'a\nb' | indent(width=99999999999) }}",
            "{{ [1] | batch(99999999999, 0) }}",
            "{{ [1] | slice(99999999999) }}",
            "{{ 'a'.center(99999999999) }}",
            "{{ 'a' | center(99999999999) }}",
            "{{ 'a'.zfill(99999999999) }}",
            "{% set a = 'x' * 90000 %}{{ a | replace('x', a) }}",
            "{% set a = 'x' * 90000 %}{{ a.replace('x', a) }}",
        ] {
            let error = try_render(huge, &json!([])).unwrap_err().to_string();
            assert!(error.contains("at most"), "{huge}: {error}");
        }
        let long = "{% set a = 'x' * 90000 %}{% for i in range(9999) %}{{ a }}{% endfor %}";
        let error = try_render(long, &json!([])).unwrap_err().to_string();
        assert!(error.contains("16777216"), "{error}");
    }

    #[test]
    fn refusals_and_endless_loops_end_with_an_error() {
        let error = try_render("{{ raise_exception('no tools, please') }}", &json!([])).unwrap_err().to_string();
        assert!(error.contains("no tools, please"), "{error}");
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
        assert!(try_render(endless, &json!([])).is_err());
        let error = try_render("{% for %}", &json!([])).unwrap_err().to_string();
        assert!(error.contains(TEMPLATE_FILE), "{error}");
        assert!(try_render("{{ strftime_now('%') }}", &json!([])).is_err());
    }

    #[test]
    fn templates_are_found_where_folders_have_them() {
        assert!(read(&json!({}), &[]).unwrap().is_none());
        let default = |config: Value, files: &[(&str, &str)]| read(&config, files).unwrap().unwrap();
        assert_eq!(default(json!({"chat_template": "a"}), &[]).default, "a");
        assert_eq!(default(json!({"chat_template": "a"}), &[(TEMPLATE_FILE, "b")]).default, "b");
        assert_eq!(default(json!({}), &[(TEMPLATE_JSON, r#"{"chat_template": "c"}"#)]).default, "c");
        let named =
            json!({"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]});
        let in_files = [(TEMPLATE_FILE, "d"), ("additional_chat_templates/tool_use.jinja", "t")];
        for template in [default(named, &[]), default(json!({}), &in_files)] {
            let render = |tools| template.render(&[], tools, false, &Zoned::default()).unwrap();
            assert_eq!((render(None).as_str(), render(Some(&[])).as_str()), ("d", "t"));
        }
    }

    #[test]
    fn gpt2_has_tokens_of_its_own() {
        let tokens = |mut config: Value| {
            config["chat_template"] = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}".into();
            let template = read(&config, &[]).unwrap().unwrap();
            template.render(&[], None, false, &Zoned::default()).unwrap()
        };
        let class = "GPT2Tokenizer";
        assert_eq!(tokens(json!({"tokenizer_class": class})), "<|endoftext|>|<|endoftext|>|");
        assert_eq!(tokens(json!({"tokenizer_class": class, "bos_token": "<s>", "eos_token": null})), "<s>||");
        assert_eq!(tokens(json!({"tokenizer_class": "Other"})), "||");
    }

    #[test]
    fn messages_of_core_look_like_those_of_transformers() {
        let mut message = Message::text(Role::Assistant, "hm");
        message.tool_calls =
            vec![ToolCall { id: "c1".into(), name: "f".into(), arguments: r#"{"b":1,"a":2.0}"#.into() }];
        let want = json!({"role": "assistant", "content": "hm", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": 2.0}}}]});
        assert_eq!(message_value(&message).unwrap(), want);
        assert_eq!(message_value(&Message::text(Role::User, "x")).unwrap(), json!({"role": "user", "content": "x"}));
        message.tool_calls[0].arguments = "{".into();
        assert!(message_value(&message).unwrap_err().to_string().contains("`f`"));
        let tool = ToolSpec { name: "f".into(), description: "d".into(), parameters: r#"{"type":"object"}"#.into() };
        let function = json!({"name": "f", "description": "d", "parameters": {"type": "object"}});
        assert_eq!(tool_value(&tool).unwrap(), json!({"type": "function", "function": function}));
    }

    #[test]
    fn reasoning_has_all_its_names() {
        let written = try_render(
            "{{ messages | tojson }}",
            &json!([{"role": "assistant", "reasoning": "r", "thinking": null}, {"role": "user"}]),
        );
        let want =
            r#"[{"thinking": "r", "role": "assistant", "reasoning": "r", "reasoning_content": "r"}, {"role": "user"}]"#;
        assert_eq!(written.unwrap(), want);
    }
}
