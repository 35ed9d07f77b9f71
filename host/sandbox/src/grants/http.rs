//! `fulgurite:tool/http`.
#![expect(unreachable_pub, reason = "the generated bindings re-export the resources' types, which pub(crate) forbids")]

use std::sync::Arc;

use fulgurite_core::host_call::HostCall;
use fulgurite_grants::{HttpError, HttpRequest, HttpResponse};
use wasmtime::component::Resource;

use super::{Draft, ToolData, arguments, record, remembered};
use crate::bindings::tool::fulgurite::tool::http as wit;
use crate::fault::Stop;

const INTERFACE: &str = "fulgurite:tool/http@0.1.0";

/// A request in the making; URL, headers and body are counted.
pub type RequestDraft = Draft<HttpRequest>;

/// A response.
pub struct FinishedRequest(HttpResponse);

impl From<HttpError> for wit::HttpError {
    fn from(error: HttpError) -> Self {
        match error {
            HttpError::InvalidRequest(text) => Self::InvalidRequest(text),
            HttpError::Denied(text) => Self::Denied(text),
            HttpError::Unreachable(text) => Self::Unreachable(text),
            HttpError::Timeout { timeout_ms } => Self::Timeout(timeout_ms),
            HttpError::LimitReached { name, value } => Self::LimitReached(wit::LimitReached { name, value }),
            HttpError::Failed(text) => Self::Failed(text),
        }
    }
}

impl ToolData {
    /// Makes room for `bytes` more of a request; `None` when it has too many already.
    fn grow(&mut self, request: &Resource<RequestDraft>, bytes: usize) -> wasmtime::Result<Option<&mut HttpRequest>> {
        let most = self.host.limits.http_request_bytes_max;
        Ok(self.table.get_mut(request)?.grow(bytes as u64, most, &mut self.host.request_bytes))
    }

    async fn send_recorded(
        &mut self,
        request: HttpRequest,
        too_long: bool,
    ) -> Result<Result<HttpResponse, HttpError>, Stop> {
        let limits = &self.host.limits;
        let limit = |name: &str, value| Ok(Err(HttpError::LimitReached { name: name.to_owned(), value }));
        if self.host.http_calls >= limits.http_calls_max {
            return limit("http_calls_max", limits.http_calls_max);
        }
        self.host.http_calls += 1;
        if too_long {
            return limit("http_request_bytes_max", limits.http_request_bytes_max);
        }
        let log = Arc::clone(&self.host.log);
        let call = HostCall { interface: INTERFACE, function: "send", arguments: arguments(&request) };
        self.meter.host(log.turn(&call)).await;
        if let Some(result) = remembered(&*log, &call)? {
            return Ok(result);
        }
        let capabilities = Arc::clone(&self.host.capabilities);
        if let Some(origin) = capabilities.http().granted_origin(&request.url) {
            // Before it is sent: whoever gives up in the middle of it cannot know what became of it.
            let _ = self.host.not_forkable.set(format!(
                "{} sent a request to {origin}, and what that did there cannot be undone",
                capabilities.plugin()
            ));
        }
        let result = self.meter.host(Box::pin(capabilities.http().send(request, limits))).await;
        record(&*log, call, &result)?;
        Ok(result)
    }
}

impl wit::Host for ToolData {
    async fn send(
        &mut self,
        request: Resource<RequestDraft>,
    ) -> wasmtime::Result<Result<Resource<FinishedRequest>, wit::HttpError>> {
        let draft = self.table.get(&request)?;
        let (request, too_long) = (draft.request.clone(), draft.too_long);
        match self.send_recorded(request, too_long).await.map_err(Stop::error)? {
            Ok(response) => Ok(Ok(self.table.push(FinishedRequest(response))?)),
            Err(error) => Ok(Err(error.into())),
        }
    }
}

impl wit::HostRequest for ToolData {
    fn new(&mut self, method: String, url: String) -> wasmtime::Result<Resource<RequestDraft>> {
        let request = self.table.push(Draft::new(HttpRequest::default()))?;
        if let Some(draft) = self.grow(&request, method.len() + url.len())? {
            draft.method = method;
            draft.url = url;
        }
        Ok(request)
    }

    fn add_header(&mut self, request: Resource<RequestDraft>, name: String, value: String) -> wasmtime::Result<()> {
        let bytes = name.len() + value.len() + size_of::<(String, String)>();
        if let Some(draft) = self.grow(&request, bytes)? {
            draft.headers.push((name, value));
        }
        Ok(())
    }

    fn set_body(&mut self, request: Resource<RequestDraft>, body: Vec<u8>) -> wasmtime::Result<()> {
        if let Some(draft) = self.grow(&request, body.len())? {
            draft.body = body;
        }
        Ok(())
    }

    fn set_timeout_ms(&mut self, request: Resource<RequestDraft>, timeout_ms: u64) -> wasmtime::Result<()> {
        self.table.get_mut(&request)?.request.timeout_ms = Some(timeout_ms);
        Ok(())
    }

    fn drop(&mut self, request: Resource<RequestDraft>) -> wasmtime::Result<()> {
        let draft = self.table.delete(request)?;
        self.host.request_bytes = self.host.request_bytes.saturating_sub(draft.bytes);
        Ok(())
    }
}

impl wit::HostResponse for ToolData {
    fn status(&mut self, response: Resource<FinishedRequest>) -> wasmtime::Result<u16> {
        Ok(self.table.get(&response)?.0.status)
    }

    fn headers(&mut self, response: Resource<FinishedRequest>) -> wasmtime::Result<Vec<(String, String)>> {
        Ok(self.table.get(&response)?.0.headers.clone())
    }

    fn body(&mut self, response: Resource<FinishedRequest>) -> wasmtime::Result<Vec<u8>> {
        Ok(self.table.get(&response)?.0.body.clone())
    }

    fn drop(&mut self, response: Resource<FinishedRequest>) -> wasmtime::Result<()> {
        self.table.delete(response)?;
        Ok(())
    }
}
