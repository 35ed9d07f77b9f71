//! A scripted policy: answers from templates instead of a model. For tests, baselines, and runs without training.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::id::{PolicyVersion, ResponseId};
use fulgurite_core::llm::{
    ChatRequest, Completion, FinishReason, KeptTokens, LlmBackend, LlmError, LlmSession, NotTrainable, SessionInfo,
    TokenData, ToolCall, Usage,
};
use fulgurite_core::seed::Generator;
use futures::future::BoxFuture;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior, Value, context};
use serde::{Deserialize, Serialize};

/// What a scripted policy answers: the n-th reply to the n-th call of an attempt, the last one to all that follow.
///
/// Every text is a minijinja template. It sees `messages` (`role`, `content`), `call_index`, `item` (`id`, `input`,
/// `reference`; a script stands for an oracle, not for an agent), and the functions `choose(list)` (seeded by attempt and
/// call), `match(text, pattern)` (first match of a regular expression, or its first group) and `match_all(text, pattern)`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// The replies.
    pub replies: Vec<Reply>,
    /// How long each call takes, in milliseconds. 0; a real model over a network takes 200 and more.
    #[serde(default)]
    pub latency_ms: u64,
    /// Completion tokens whose ids and log-probs are made up for each call, and a prompt token for every four bytes of the
    /// request. 0 makes up none. For load tests: what is recorded then weighs as much as a model's, and is never trained on.
    #[serde(default)]
    pub made_up_tokens: u32,
}

/// One reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Reply {
    /// Asks for a tool.
    Tool {
        /// Template of its name.
        tool: String,
        /// Template of its arguments (JSON text).
        arguments: String,
    },
    /// Says something.
    Text {
        /// Template of the text.
        text: String,
    },
}

/// Why a script was refused.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// No reply at all.
    #[error("a script needs at least one reply")]
    Empty,
    /// A template does not parse.
    #[error("reply {index} of the script is not a template")]
    Template {
        /// Which reply, from 0.
        index: usize,
        /// Why.
        #[source]
        source: minijinja::Error,
    },
}

/// Tokens of the vocabulary that made-up ids are from: as many as a common one has.
const MADE_UP_VOCABULARY: u32 = 50_000;

/// The backend.
#[derive(Debug)]
pub struct ScriptedPolicy {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    environment: Environment<'static>,
    /// Of each reply its text, when it is the same every time.
    constants: Vec<Option<String>>,
    replies: usize,
    latency: Duration,
    made_up_tokens: u32,
    items: BTreeMap<String, Arc<DatasetItem>>,
}

impl ScriptedPolicy {
    /// Compiles a script. `items` are those that it may be asked about.
    ///
    /// # Errors
    /// When the script is empty or a template does not parse.
    pub fn new(script: &Script, items: impl IntoIterator<Item = Arc<DatasetItem>>) -> Result<Self, ScriptError> {
        if script.replies.is_empty() {
            return Err(ScriptError::Empty);
        }
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.add_function("match", first_match);
        environment.add_function("match_all", all_matches);
        for (index, reply) in script.replies.iter().enumerate() {
            let templates = match reply {
                Reply::Text { text } => vec![("text", text)],
                Reply::Tool { tool, arguments } => vec![("tool", tool), ("arguments", arguments)],
            };
            for (part, text) in templates {
                environment
                    .add_template_owned(format!("{index}/{part}"), text.clone())
                    .map_err(|source| ScriptError::Template { index, source })?;
            }
        }
        let items = items.into_iter().map(|item| (item.id.clone(), item)).collect();
        let constant = |reply: &Reply| match reply {
            Reply::Text { text } if !["{{", "{%", "{#"].iter().any(|mark| text.contains(mark)) => Some(text.clone()),
            Reply::Text { .. } | Reply::Tool { .. } => None,
        };
        let shared = Shared {
            environment,
            constants: script.replies.iter().map(constant).collect(),
            replies: script.replies.len(),
            latency: Duration::from_millis(script.latency_ms),
            made_up_tokens: script.made_up_tokens,
            items,
        };
        Ok(Self { shared: Arc::new(shared) })
    }
}

impl LlmBackend for ScriptedPolicy {
    fn open(&self, info: SessionInfo) -> Box<dyn LlmSession> {
        Box::new(Session { shared: Arc::clone(&self.shared), info: Arc::new(info) })
    }

    fn name(&self) -> &'static str {
        "scripted"
    }
}

#[derive(Debug)]
struct Session {
    shared: Arc<Shared>,
    info: Arc<SessionInfo>,
}

impl LlmSession for Session {
    fn chat(
        &self,
        call_index: u64,
        request: Arc<ChatRequest>,
    ) -> BoxFuture<'static, Result<Arc<Completion>, LlmError>> {
        if self.shared.latency.is_zero() {
            let answer = self.shared.answer(&self.info, call_index, &request).map(Arc::new);
            return Box::pin(std::future::ready(answer));
        }
        let (shared, info) = (Arc::clone(&self.shared), Arc::clone(&self.info));
        Box::pin(async move {
            tokio::time::sleep(shared.latency).await;
            // Only now: thousands of calls that wait should not hold thousands of answers.
            shared.answer(&info, call_index, &request).map(Arc::new)
        })
    }
}

impl Shared {
    fn answer(&self, info: &SessionInfo, call_index: u64, request: &ChatRequest) -> Result<Completion, LlmError> {
        let index = usize::try_from(call_index).unwrap_or(usize::MAX).min(self.replies.saturating_sub(1));
        if let Some(text) = self.constants.get(index).and_then(Option::as_ref) {
            return Ok(self.completion(info, call_index, request, text.clone(), vec![]));
        }
        let item = self.items.get(&info.item_id);
        let generator = Arc::new(Mutex::new(Generator::new(info.seed.child("script").child_index(call_index))));
        let choose = move |list: Value| -> Result<Value, minijinja::Error> {
            let list: Vec<Value> = list.try_iter()?.collect();
            let mut generator = generator.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let place = generator.below(list.len());
            list.into_iter().nth(place).ok_or_else(|| {
                minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, "choose() got an empty list")
            })
        };
        let variables = context! {
            messages => Serde(&request.messages),
            call_index => call_index,
            item => item.map(|item| context! {
                id => item.id.as_str(),
                input => Serde(&item.input),
                reference => Serde(&item.reference),
            }),
            choose => Value::from_function(choose),
        };
        let render = |part: &str| -> Result<Option<String>, LlmError> {
            match self.environment.get_template(&format!("{index}/{part}")) {
                Err(_) => Ok(None),
                Ok(template) => template
                    .render(&variables)
                    .map(Some)
                    .map_err(|error| LlmError::InvalidRequest(format!("reply {index} of the script: {error:#}"))),
            }
        };
        let (text, tool_calls) = match (render("text")?, render("tool")?, render("arguments")?) {
            (_, Some(name), Some(arguments)) => {
                (String::new(), vec![ToolCall { id: format!("call-{call_index}-0"), name, arguments }])
            }
            (text, _, _) => (text.unwrap_or_default(), vec![]),
        };
        Ok(self.completion(info, call_index, request, text, tool_calls))
    }

    fn completion(
        &self,
        info: &SessionInfo,
        call_index: u64,
        request: &ChatRequest,
        text: String,
        tool_calls: Vec<ToolCall>,
    ) -> Completion {
        let count = |ids: &[u32]| u32::try_from(ids.len()).unwrap_or(u32::MAX);
        let words = |text: &str| u32::try_from(text.split_whitespace().count()).unwrap_or(u32::MAX);
        let tokens = (self.made_up_tokens > 0).then(|| self.make_up(request, &text));
        let usage = match &tokens {
            Some(tokens) => {
                Usage { prompt_tokens: count(&tokens.prompt_ids), completion_tokens: count(&tokens.completion_ids) }
            }
            None => Usage {
                prompt_tokens: request.messages.iter().map(|message| words(&message.content)).sum(),
                completion_tokens: words(&text),
            },
        };
        let not_trainable = if tokens.is_some() { NotTrainable::OtherEndpoint } else { NotTrainable::NoTokenIds };
        Completion {
            usage,
            finish_reason: if tool_calls.is_empty() { FinishReason::Stop } else { FinishReason::ToolCalls },
            text,
            tool_calls,
            response_id: ResponseId::of_call(&info.attempt, call_index),
            tokens,
            not_trainable: Some(not_trainable),
        }
    }

    /// Token data as heavy as a model's.
    fn make_up(&self, request: &ChatRequest, text: &str) -> TokenData {
        let ids = |text: &str| -> Vec<u32> {
            let (fours, _) = text.as_bytes().as_chunks::<4>();
            fours.iter().map(|four| u32::from_le_bytes(*four) % MADE_UP_VOCABULARY).collect()
        };
        let wanted = self.made_up_tokens as usize;
        let completion_ids: Vec<u32> = ids(text).into_iter().cycle().take(wanted).collect();
        TokenData {
            prompt_ids: request.messages.iter().map(|message| ids(&message.content)).collect::<Vec<_>>().concat(),
            log_probs: completion_ids.iter().map(|id| -0.01 * (id % 100) as f32).collect(),
            processed_log_probs: vec![],
            completion_ids,
            // Nobody's weights.
            policy_version: PolicyVersion(0),
            token_versions: vec![],
            kept: KeptTokens::default(),
            model: None,
        }
    }
}

fn pattern(pattern: &str) -> Result<regex::Regex, minijinja::Error> {
    regex::Regex::new(pattern)
        .map_err(|error| minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, error.to_string()))
}

fn first_match(text: &str, expression: &str) -> Result<String, minijinja::Error> {
    let expression = pattern(expression)?;
    let found = expression.captures(text).and_then(|captures| captures.get(1).or_else(|| captures.get(0)));
    found.map(|found| found.as_str().to_owned()).ok_or_else(|| {
        let problem = format!("`{expression}` does not match `{text}`");
        minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, problem)
    })
}

fn all_matches(text: &str, expression: &str) -> Result<Vec<String>, minijinja::Error> {
    Ok(pattern(expression)?.find_iter(text).map(|found| found.as_str().to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
    use fulgurite_core::llm::{Message, Role, Sampling};
    use fulgurite_core::seed::Seed;
    use futures::FutureExt;

    use super::*;

    fn ask(script: &Script, seed: u64, call_index: u64, content: &str) -> Result<Arc<Completion>, LlmError> {
        let (input, reference) = (serde_json::json!({}), serde_json::json!({"best": "R7"}));
        let item = DatasetItem::new("item", input, serde_json::Value::Null, reference);
        let policy = ScriptedPolicy::new(script, [Arc::new(item)]).unwrap();
        let session = policy.open(SessionInfo {
            attempt: AttemptKey { rollout: RolloutId::new("r").unwrap(), attempt: AttemptNumber::FIRST },
            item_id: "item".to_owned(),
            seed: Seed::new(seed),
            sampling: Sampling::default(),
            history: vec![],
        });
        let request = ChatRequest {
            messages: vec![Message::text(Role::User, content)],
            tools: vec![],
            sampling: Sampling::default(),
            agent_role: "agent".to_owned(),
            endpoint: None,
        };
        session.chat(call_index, Arc::new(request)).now_or_never().expect("a script answers at once")
    }

    #[test]
    fn replies_follow_the_calls_and_see_messages_and_item() {
        let script: Script = toml::from_str(
            r#"replies = [
                { tool = "free", arguments = '{"time":"{{ match(messages[0].content, "\\d\\d:\\d\\d") }}"}' },
                { text = "{{ item.reference.best }}" },
            ]"#,
        )
        .unwrap();
        let first = ask(&script, 0, 0, "at 10:30 please").unwrap();
        assert_eq!(first.tool_calls[0].arguments, r#"{"time":"10:30"}"#);
        assert_eq!(first.finish_reason, FinishReason::ToolCalls);
        for later in [1, 2, 9] {
            assert_eq!(ask(&script, 0, later, "").unwrap().text, "R7");
        }
        assert!(matches!(ask(&script, 0, 0, "no time"), Err(LlmError::InvalidRequest(_))));
    }

    #[test]
    fn choices_follow_from_the_seed_and_are_spread() {
        let script = Script {
            replies: vec![Reply::Text { text: "{{ choose(match_all(messages[0].content, 'R\\d')) }}".to_owned() }],
            latency_ms: 0,
            made_up_tokens: 0,
        };
        let draw = |seed| ask(&script, seed, 0, "R1 R2 R3").unwrap().text.clone();
        let draws: std::collections::BTreeSet<_> = (0..40).map(draw).collect();
        assert_eq!(draws.len(), 3);
        assert_eq!(draw(5), draw(5));
    }

    #[test]
    fn misspelt_keys_and_broken_templates_are_refused() {
        assert!(toml::from_str::<Script>("replies = [{ txt = 'x' }]").is_err());
        let broken =
            Script { replies: vec![Reply::Text { text: "{{ item".to_owned() }], latency_ms: 0, made_up_tokens: 0 };
        assert!(matches!(ScriptedPolicy::new(&broken, []), Err(ScriptError::Template { index: 0, .. })));
    }
}
