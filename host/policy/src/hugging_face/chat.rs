//! Chat templates of Hugging Face folders, rendered as transformers renders them.
//!
//! The environment is that of `apply_chat_template`: `trim_blocks`, `lstrip_blocks`, lenient undefined values, Python's
//! methods of texts, lists and objects, loop controls, `raise_exception`, `strftime_now`, its own `tojson`, and the block
//! `generation`, which here only renders what it holds. Templates come from strangers: they see what is given to them and
//! nothing else, and run on limited fuel.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use fulgurite_core::llm::{Message, ToolSpec};
use jiff::Zoned;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value as Jinja};
use regex::Regex;
use serde_json::{Map, Value, json};

use super::python;
use crate::error::PolicyError;

/// Instructions that one rendering may take: thousands of messages, or a second of a loop without end.
const FUEL: u64 = 20_000_000;

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
    /// `bos_token` and its like.
    special: BTreeMap<&'static str, String>,
}

fn failed(error: &minijinja::Error) -> PolicyError {
    // The innermost cause says what went wrong: a template's own refusal, or the line.
    PolicyError::Template(format!("{error:#}"))
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

fn environment(now: Zoned) -> Environment<'static> {
    let mut environment = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", python::tojson);
    environment.add_function("raise_exception", |reason: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason))
    });
    environment.add_function("strftime_now", move |format: String| {
        let written = jiff::fmt::strtime::format(&format, &now);
        written.map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
    });
    environment
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
        if dir.join(TEMPLATE_FILE).is_file() {
            path = dir.join(TEMPLATE_FILE);
            sources.insert("default".to_owned(), std::fs::read_to_string(&path).map_err(PolicyError::io(&path))?);
            let tools = dir.join(TEMPLATE_FOLDER).join("tool_use.jinja");
            if tools.is_file() {
                let source = std::fs::read_to_string(&tools).map_err(PolicyError::io(&tools))?;
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
            Some((name, text(field(&config, name)).or_else(|| text(field(&legacy, name)))?))
        };
        let special = SPECIAL_TOKENS.into_iter().filter_map(token).collect();
        let template = Self {
            default: without_generation(&default),
            with_tools: with_tools.as_deref().map(without_generation),
            special,
        };
        let environment = environment(Zoned::default());
        for source in std::iter::once(&template.default).chain(&template.with_tools) {
            let checked = environment.template_from_str(source);
            checked.map_err(|error| PolicyError::model_file(&path, format!("chat template: {error:#}")))?;
        }
        Ok(Some(template))
    }

    /// What it says of tools: the template that is used when there are some.
    pub(crate) fn source(&self) -> &str {
        self.with_tools.as_deref().unwrap_or(&self.default)
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
        environment(now.clone()).render_str(source, Jinja::from_pairs(variables)).map_err(|error| failed(&error))
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
