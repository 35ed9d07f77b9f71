//! Model endpoints that speak OpenAI's chat completions: vLLM, llama.cpp, hosted models.
//!
//! They answer with text, so nothing of what they say is trained on. The host calls them; a plugin knows their names only.

use std::sync::Arc;
use std::time::Duration;

use fulgurite_core::grant::HttpGrant;
use fulgurite_core::id::ResponseId;
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::{
    ChatRequest, Completion, Constraint, FinishReason, LlmBackend, LlmError, LlmSession, Message, NotTrainable, Role,
    SessionInfo, ToolCall, Usage,
};
use futures::future::BoxFuture;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::http_client::{HttpClient, HttpError, HttpRequest, HttpSetupError, Resolve};

/// Calls of one request, the first included.
const TRIES_MAX: u64 = 3;
/// Time before the second try; before the third it is twice that.
const PAUSE: Duration = Duration::from_millis(250);
/// Longest part of an error's body that is told on, in characters.
const ERROR_CHARACTERS_MAX: usize = 300;

/// An endpoint.
#[derive(Debug)]
pub struct OpenAiEndpoint {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    model: String,
    url: String,
    client: HttpClient,
    limits: Limits,
}

impl OpenAiEndpoint {
    /// The endpoint `[endpoint.NAME]`. `path` is what follows the origin, for example `/v1`; `limits` bound its requests.
    ///
    /// # Errors
    /// When a header, a secret or a certificate authority cannot be used.
    pub fn new(
        name: &str,
        model: &str,
        grant: &HttpGrant,
        path: &str,
        limits: &Limits,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, HttpSetupError> {
        let client = HttpClient::of_endpoint(name, grant, environment)?;
        let url = format!("{}{}/chat/completions", grant.origin, path.trim_end_matches('/'));
        let shared = Shared { name: name.to_owned(), model: model.to_owned(), url, client, limits: limits.clone() };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Looks up names in another way.
    #[must_use]
    pub fn with_resolver(self, resolver: Arc<dyn Resolve>) -> Self {
        match Arc::try_unwrap(self.shared) {
            Ok(shared) => {
                let client = shared.client.with_resolver(resolver);
                Self { shared: Arc::new(Shared { client, ..shared }) }
            }
            Err(shared) => Self { shared },
        }
    }
}

impl LlmBackend for OpenAiEndpoint {
    fn open(&self, info: SessionInfo) -> Box<dyn LlmSession> {
        Box::new(Session { shared: Arc::clone(&self.shared), info })
    }

    fn name(&self) -> &str {
        &self.shared.name
    }
}

struct Session {
    shared: Arc<Shared>,
    info: SessionInfo,
}

impl LlmSession for Session {
    fn chat(
        &self,
        call_index: u64,
        request: Arc<ChatRequest>,
    ) -> BoxFuture<'static, Result<Arc<Completion>, LlmError>> {
        let shared = Arc::clone(&self.shared);
        let seed = request.sampling.seed.unwrap_or_else(|| self.info.seed.child_index(call_index).value());
        let response_id = ResponseId::of_call(&self.info.attempt, call_index);
        Box::pin(async move {
            let body = shared.body(&request, seed);
            let answer = shared.ask(&body).await?;
            shared.completion(&answer, response_id).map(Arc::new)
        })
    }
}

impl Shared {
    fn unavailable(&self, problem: impl std::fmt::Display) -> LlmError {
        LlmError::Unavailable(format!("endpoint `{}`: {problem}", self.name))
    }

    fn body(&self, request: &ChatRequest, seed: u64) -> Value {
        let sampling = &request.sampling;
        let mut body = json!({
            "model": self.model,
            "messages": request.messages.iter().map(message).collect::<Vec<_>>(),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            // Servers take a signed number.
            "seed": seed >> 1,
        });
        let mut set = |name: &str, value: Value| {
            if let Some(fields) = body.as_object_mut() {
                fields.insert(name.to_owned(), value);
            }
        };
        if sampling.max_tokens > 0 {
            set("max_tokens", json!(sampling.max_tokens));
        }
        if !sampling.stop.is_empty() {
            set("stop", json!(sampling.stop));
        }
        if let Some(Constraint::JsonSchema(schema)) = &sampling.constraint {
            let schema: Value = serde_json::from_str(schema).unwrap_or_default();
            set("response_format", json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}));
        }
        if !request.tools.is_empty() {
            let tools = request.tools.iter().map(|tool| {
                let parameters: Value = serde_json::from_str(&tool.parameters).unwrap_or_default();
                json!({"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": parameters}})
            });
            set("tools", tools.collect());
        }
        body
    }

    /// Sends the request, again where that can help.
    async fn ask(&self, body: &Value) -> Result<Answer, LlmError> {
        let mut pause = PAUSE;
        let mut tried = 1;
        loop {
            let request = HttpRequest {
                method: "POST".to_owned(),
                url: self.url.clone(),
                headers: vec![("content-type".to_owned(), "application/json".to_owned())],
                body: body.to_string().into_bytes(),
                timeout_ms: None,
            };
            let problem = match self.client.send(request, &self.limits).await {
                Ok(response) if response.status == 200 => {
                    return serde_json::from_slice(&response.body)
                        .map_err(|error| self.unavailable(format!("its answer is no chat completion: {error}")));
                }
                Ok(response) => {
                    let text: String =
                        String::from_utf8_lossy(&response.body).chars().take(ERROR_CHARACTERS_MAX).collect();
                    let problem = format!("status {}: {text}", response.status);
                    match response.status {
                        400 | 404 | 422 => {
                            return Err(LlmError::InvalidRequest(format!("endpoint `{}`: {problem}", self.name)));
                        }
                        408 | 429 | 500.. => problem,
                        _ => return Err(self.unavailable(problem)),
                    }
                }
                Err(error @ (HttpError::Unreachable(_) | HttpError::Timeout { .. } | HttpError::Failed(_))) => {
                    error.to_string()
                }
                Err(error) => return Err(self.unavailable(error)),
            };
            if tried >= TRIES_MAX {
                return Err(self.unavailable(problem));
            }
            tracing::warn!(endpoint = self.name, problem, "the endpoint failed, trying again");
            tokio::time::sleep(pause).await;
            pause *= 2;
            tried += 1;
        }
    }

    fn completion(&self, answer: &Answer, response_id: ResponseId) -> Result<Completion, LlmError> {
        let choice = answer.choices.first().ok_or_else(|| self.unavailable("its answer has no choice"))?;
        let tool_calls: Vec<ToolCall> = choice.message.tool_calls.iter().flatten().map(ToolCall::from).collect();
        Ok(Completion {
            text: choice.message.content.clone().unwrap_or_default(),
            finish_reason: match choice.finish_reason.as_deref() {
                Some("length") => FinishReason::Length,
                Some("tool_calls") => FinishReason::ToolCalls,
                _ if !tool_calls.is_empty() => FinishReason::ToolCalls,
                _ => FinishReason::Stop,
            },
            tool_calls,
            usage: Usage {
                prompt_tokens: answer.usage.prompt_tokens,
                completion_tokens: answer.usage.completion_tokens,
            },
            response_id,
            tokens: None,
            not_trainable: Some(NotTrainable::OtherEndpoint),
        })
    }
}

fn message(message: &Message) -> Value {
    let mut value = json!({"role": message.role.as_str(), "content": message.content});
    if let Some(fields) = value.as_object_mut() {
        if !message.tool_calls.is_empty() {
            let calls = message.tool_calls.iter().map(|call| {
                json!({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}})
            });
            fields.insert("tool_calls".to_owned(), calls.collect());
        }
        if let (Role::Tool, Some(id)) = (message.role, &message.tool_call_id) {
            fields.insert("tool_call_id".to_owned(), json!(id));
        }
    }
    value
}

#[derive(Debug, Deserialize)]
struct Answer {
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Tokens,
}

#[derive(Debug, Deserialize)]
struct Choice {
    message: Said,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Said {
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<Call>>,
}

#[derive(Debug, Deserialize)]
struct Call {
    id: String,
    function: Function,
}

#[derive(Debug, Deserialize)]
struct Function {
    name: String,
    arguments: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Tokens {
    prompt_tokens: u32,
    completion_tokens: u32,
}

impl From<&Call> for ToolCall {
    fn from(call: &Call) -> Self {
        Self { id: call.id.clone(), name: call.function.name.clone(), arguments: call.function.arguments.clone() }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;
    use std::sync::Mutex;

    use fulgurite_core::id::{AttemptKey, AttemptNumber, RolloutId};
    use fulgurite_core::llm::Sampling;
    use fulgurite_core::seed::Seed;

    use super::*;

    type Heard = Arc<Mutex<Vec<(String, Value)>>>;

    /// Answers the n-th request with the n-th answer and keeps heads and bodies.
    fn server(answers: &[(u16, &str)]) -> (u16, Heard) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let answers: Vec<_> = answers.iter().map(|(status, body)| (*status, (*body).to_owned())).collect();
        let heard = Arc::new(Mutex::new(vec![]));
        let keep = Arc::clone(&heard);
        std::thread::spawn(move || {
            for ((status, body), stream) in answers.into_iter().zip(listener.incoming()) {
                let mut stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut head = String::new();
                while reader.read_line(&mut head).unwrap() > 2 {}
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
                let mut asked = vec![0; length.parse().unwrap()];
                reader.read_exact(&mut asked).unwrap();
                keep.lock().unwrap().push((head, serde_json::from_slice(&asked).unwrap()));
                write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
            }
        });
        (port, heard)
    }

    async fn ask(port: u16) -> Result<Completion, LlmError> {
        let grant: HttpGrant = serde_json::from_value(json!({
            "origin": format!("http://127.0.0.1:{port}"),
            "headers": {"authorization": {"env": "KEY", "prefix": "Bearer "}},
            "allow_private": ["127.0.0.1"],
        }))
        .unwrap();
        let key = |_: &str| Some("s3cr3t-key-value".to_owned());
        let endpoint = OpenAiEndpoint::new("judge", "m", &grant, "/v1/", &Limits::default(), &key).unwrap();
        let session = endpoint.open(SessionInfo {
            attempt: AttemptKey { rollout: RolloutId::new("r").unwrap(), attempt: AttemptNumber::FIRST },
            item_id: "item".to_owned(),
            seed: Seed::new(1),
            sampling: Sampling::default(),
            history: vec![],
        });
        let schema = Constraint::JsonSchema(r#"{"type":"object"}"#.to_owned());
        let request = ChatRequest {
            messages: vec![Message::text(Role::System, "judge"), Message::text(Role::User, "this")],
            tools: vec![],
            sampling: Sampling { max_tokens: 7, constraint: Some(schema), ..Sampling::default() },
            agent_role: "judge".to_owned(),
            endpoint: Some("judge".to_owned()),
        };
        session.chat(3, Arc::new(request)).await.map(Arc::unwrap_or_clone)
    }

    const SAID: &str = r#"{"choices":[{"message":{"role":"assistant","content":"0.5"},"finish_reason":"length"}],"usage":{"prompt_tokens":4,"completion_tokens":2}}"#;

    #[tokio::test]
    async fn a_request_is_a_chat_completion_and_what_fails_is_tried_again() {
        let (port, heard) = server(&[(503, "busy"), (200, SAID)]);
        let completion = ask(port).await.unwrap();
        assert_eq!((completion.text.as_str(), completion.finish_reason), ("0.5", FinishReason::Length));
        assert_eq!((completion.usage.prompt_tokens, completion.usage.completion_tokens), (4, 2));
        assert_eq!(completion.not_trainable, Some(NotTrainable::OtherEndpoint));
        assert_eq!(completion.response_id.0, "r/1/3");
        let heard = heard.lock().unwrap();
        assert_eq!(heard.len(), 2);
        let (head, body) = &heard[1];
        assert!(head.starts_with("POST /v1/chat/completions HTTP/1.1"), "{head}");
        assert!(head.contains("authorization: Bearer s3cr3t-key-value"), "{head}");
        assert_eq!((&body["model"], &body["max_tokens"]), (&json!("m"), &json!(7)));
        assert_eq!(body["messages"][1], json!({"role": "user", "content": "this"}));
        assert_eq!(body["response_format"]["json_schema"]["schema"], json!({"type": "object"}));
        assert_eq!(heard[0].1, heard[1].1, "the same seed");
    }

    #[tokio::test]
    async fn what_cannot_help_is_not_tried_again() {
        for (answer, expected) in [
            ((400, "no such model"), "invalid request"),
            ((401, "who are you"), "status 401"),
            ((200, "hello"), "no chat completion"),
            ((200, r#"{"choices":[]}"#), "no choice"),
        ] {
            let (port, heard) = server(&[answer, (200, SAID)]);
            let error = ask(port).await.unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("`judge`"), "{error}");
            assert_eq!(heard.lock().unwrap().len(), 1);
        }
    }
}
