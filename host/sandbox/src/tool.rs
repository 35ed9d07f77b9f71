//! Running tools: one store per tool and attempt, kept from `open` to the attempt's end.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use fulgurite_core::host_call::{HostCallLog, NoLog};
use fulgurite_core::id::ContentHash;
use fulgurite_core::limits::Limits;
use fulgurite_core::llm::ToolSpec;
use fulgurite_core::outcome::{AttemptOutcome, LimitReached, OutcomeKind};
use fulgurite_core::tool::{ToolError, ToolHost};
use fulgurite_grants::ToolCapabilities;
use futures::future::BoxFuture;
use tokio::sync::{Mutex, OnceCell};
use wasmtime::Store;
use wasmtime::component::ResourceAny;

use crate::bindings::tool::ToolPluginPre;
use crate::bindings::tool::exports::fulgurite::tool::tool as wit;
use crate::clock::VirtualClock;
use crate::convert;
use crate::engine::{Sandbox, World};
use crate::fault::{Bounds, During, blamed_on};
use crate::grants::{ToolData, ToolGuest};
use crate::guest::{self, GuestSetup};
use crate::meter::Meter;
use crate::output::GuestOutput;
use crate::plugin::{PluginError, PluginWorld, incompatible};
use crate::seeds::SeedSource;

/// A tool's component, compiled.
pub struct ToolPlugin {
    world: Arc<World>,
    pre: ToolPluginPre<ToolData>,
    hash: ContentHash,
    capabilities: Arc<ToolCapabilities>,
}

impl std::fmt::Debug for ToolPlugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ToolPlugin").field("hash", &self.hash).finish_non_exhaustive()
    }
}

impl Sandbox {
    /// Loads a tool.
    ///
    /// # Errors
    /// As [`Sandbox::load_agent`].
    pub fn load_tool(&self, path: &Path) -> Result<Arc<ToolPlugin>, PluginError> {
        self.load_granted_tool(path, ToolCapabilities::none("tools.NAME"))
    }

    /// Loads a tool with what the config grants to it.
    ///
    /// # Errors
    /// As [`Sandbox::load_agent`], and when manifest and grants do not fit.
    pub fn load_granted_tool(
        &self,
        path: &Path,
        capabilities: ToolCapabilities,
    ) -> Result<Arc<ToolPlugin>, PluginError> {
        let artifact = self.load_granted(path, PluginWorld::Tool, capabilities.plugin(), capabilities.granted())?;
        let pre = artifact.world.tools.instantiate_pre(&artifact.component).and_then(ToolPluginPre::new);
        let pre = pre.map_err(|error| incompatible(path, PluginWorld::Tool, &error))?;
        let capabilities = Arc::new(capabilities);
        Ok(Arc::new(ToolPlugin { world: artifact.world, pre, hash: artifact.hash, capabilities }))
    }
}

impl ToolPlugin {
    pub(crate) fn world(&self) -> &Arc<World> {
        &self.world
    }

    /// Content hash of the component.
    #[must_use]
    pub fn hash(&self) -> ContentHash {
        self.hash
    }

    /// What it is granted.
    #[must_use]
    pub fn capabilities(&self) -> &ToolCapabilities {
        &self.capabilities
    }

    /// As [`ToolPlugin::open_recorded`], with nobody who records what the tool does with its grants.
    ///
    /// # Errors
    /// As there.
    pub async fn open(
        &self,
        world: String,
        seeds: impl Into<SeedSource>,
        limits: &Limits,
        start_unix_ns: u64,
    ) -> Result<Arc<dyn ToolHost>, AttemptOutcome> {
        self.open_recorded(world, seeds, limits, start_unix_ns, Arc::new(NoLog)).await
    }

    /// Opens the tool for one attempt. `world` is the item's, JSON text. The instance lives as long as what is returned:
    /// drop that with the attempt. The tool's clock starts at `start_unix_ns` and moves only when the tool sleeps.
    ///
    /// The CPU limit is the tool's own and holds for the whole attempt. `log` is told of what the tool does with its grants,
    /// and asked before what cannot be done again.
    ///
    /// # Errors
    /// The attempt's outcome: `tool-fault`, or `host-fault` when the machine could not run the tool.
    pub async fn open_recorded(
        &self,
        world: String,
        seeds: impl Into<SeedSource>,
        limits: &Limits,
        start_unix_ns: u64,
        log: Arc<dyn HostCallLog>,
    ) -> Result<Arc<dyn ToolHost>, AttemptOutcome> {
        let seeds = seeds.into();
        let seed = seeds.seed();
        let meter = Arc::new(Meter::new("guest_cpu_ms_max", limits.guest_cpu_ms_max));
        let output = GuestOutput::new(limits.output_bytes_max, None);
        let setup = GuestSetup {
            limits,
            seeds,
            clock: Arc::new(VirtualClock::new(start_unix_ns)),
            meter: Arc::clone(&meter),
            output: Arc::clone(&output),
            bounds: guest::attempt_bounds(limits),
        };
        let not_forkable = Arc::new(OnceLock::new());
        let host = ToolGuest::new(Arc::clone(&self.capabilities), log, limits, seed, Arc::clone(&not_forkable));
        let mut store = guest::store(&self.world, setup, host)?;
        let opened = meter
            .guest(async {
                let tool =
                    self.pre.instantiate_async(&mut store).await.map_err(|error| (During::Instantiation, error))?;
                let calls = tool.fulgurite_tool_tool().clone();
                let session =
                    calls.call_open(&mut store, &world, seed.value()).await.map_err(|error| (During::Call, error))?;
                let session = match session {
                    Ok(session) => session,
                    Err(refusal) => return Ok(Err(refusal)),
                };
                let specs = calls.session().call_list_tools(&mut store, session).await;
                Ok(Ok((calls, session, specs.map_err(|error| (During::Call, error))?)))
            })
            .await;
        let (calls, session, specs) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(refusal)) => {
                let detail = match refusal {
                    wit::ToolError::InvalidWorld(text) => format!("the tool cannot use the item's world: {text}"),
                    wit::ToolError::UnknownTool(text)
                    | wit::ToolError::InvalidArguments(text)
                    | wit::ToolError::Failed(text) => format!("the tool does not open: {text}"),
                };
                return Err(AttemptOutcome::failed(OutcomeKind::ToolFault, detail));
            }
            Err((during, error)) => {
                drop(store);
                let outcome = guest::fault(&error, during, guest::attempt_bounds(limits), &output);
                return Err(blamed_on(OutcomeKind::ToolFault, "the tool", outcome));
            }
        };
        let instance = Instance { store, calls, session, bounds: guest::attempt_bounds(limits), output };
        Ok(Arc::new(OpenTool {
            specs: specs.into_iter().map(convert::tool_spec_from_wit).collect(),
            meter,
            not_forkable,
            state: Mutex::new(ToolState::Idle(Box::new(instance))),
        }))
    }
}

/// A live instance of a tool.
struct Instance {
    store: Store<ToolData>,
    calls: wit::Guest,
    session: ResourceAny,
    bounds: Bounds,
    output: Arc<GuestOutput>,
}

impl Instance {
    /// Makes one call. Without an instance to give back, the tool has ended.
    async fn call(
        mut self: Box<Self>,
        meter: Arc<Meter>,
        name: String,
        arguments: String,
    ) -> (Option<Box<Self>>, Result<String, ToolError>) {
        let _working = Working::new(&self.store.data().host.log);
        let session = self.session;
        let calls = self.calls.clone();
        let called = meter.guest(calls.session().call_call(&mut self.store, session, &name, &arguments)).await;
        match called {
            Ok(Ok(text)) => (Some(self), Ok(text)),
            Ok(Err(error)) => {
                let error = match error {
                    wit::ToolError::UnknownTool(text) => ToolError::UnknownTool(text),
                    wit::ToolError::InvalidArguments(text) => ToolError::InvalidArguments(text),
                    wit::ToolError::Failed(text) | wit::ToolError::InvalidWorld(text) => ToolError::Failed(text),
                };
                (Some(self), Err(error))
            }
            Err(error) => {
                let Self { store, bounds, output, .. } = *self;
                drop(store);
                let outcome = guest::fault(&error, During::Call, bounds, &output);
                let outcome = blamed_on(OutcomeKind::ToolFault, &format!("tool `{name}`"), outcome);
                (None, Err(ToolError::Fault { detail: outcome.detail, limit: outcome.limit }))
            }
        }
    }
}

/// Tells the log that a tool works on a call, for as long as it does.
struct Working(Arc<dyn HostCallLog>);

impl Working {
    fn new(log: &Arc<dyn HostCallLog>) -> Self {
        log.works(true);
        Self(Arc::clone(log))
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.0.works(false);
    }
}

type Call = BoxFuture<'static, (Option<Box<Instance>>, Result<String, ToolError>)>;

enum ToolState {
    Idle(Box<Instance>),
    /// A call under way. It stays here when its caller goes away: an instance cannot be used again in the middle of a call,
    /// so the next caller lets it end first and throws its answer away.
    Busy(Call),
    /// The tool had a fault.
    Ended {
        detail: String,
        limit: Option<LimitReached>,
    },
}

/// A tool opened for one attempt.
struct OpenTool {
    specs: Vec<ToolSpec>,
    meter: Arc<Meter>,
    not_forkable: Arc<OnceLock<String>>,
    state: Mutex<ToolState>,
}

impl OpenTool {
    /// Drives the call under way to its end.
    async fn settle(state: &mut ToolState) -> Option<Result<String, ToolError>> {
        let ToolState::Busy(call) = state else { return None };
        let (instance, result) = call.await;
        *state = match (instance, &result) {
            (Some(instance), _) => ToolState::Idle(instance),
            (None, Err(ToolError::Fault { detail, limit })) => {
                ToolState::Ended { detail: detail.clone(), limit: limit.clone() }
            }
            (None, _) => ToolState::Ended { detail: "the tool has ended".to_owned(), limit: None },
        };
        Some(result)
    }
}

impl ToolHost for OpenTool {
    fn list(&self) -> BoxFuture<'_, Result<Vec<ToolSpec>, ToolError>> {
        Box::pin(async move { Ok(self.specs.clone()) })
    }

    fn call(&self, name: String, arguments: String) -> BoxFuture<'_, Result<String, ToolError>> {
        Box::pin(async move {
            let mut state = self.state.lock().await;
            Self::settle(&mut state).await;
            let ended = ToolState::Ended { detail: "the tool has ended".to_owned(), limit: None };
            match std::mem::replace(&mut *state, ended) {
                ToolState::Idle(instance) => {
                    *state = ToolState::Busy(Box::pin(instance.call(Arc::clone(&self.meter), name, arguments)));
                    let gone = || ToolError::Fault { detail: "the tool has ended".to_owned(), limit: None };
                    Self::settle(&mut state).await.unwrap_or_else(|| Err(gone()))
                }
                ToolState::Busy(call) => {
                    *state = ToolState::Busy(call);
                    Err(ToolError::Fault { detail: "the tool is still busy".to_owned(), limit: None })
                }
                ToolState::Ended { detail, limit } => {
                    *state = ToolState::Ended { detail: detail.clone(), limit: limit.clone() };
                    Err(ToolError::Fault { detail, limit })
                }
            }
        })
    }

    fn guest_cpu_us(&self) -> u64 {
        self.meter.used_us()
    }

    fn not_forkable(&self) -> Option<String> {
        self.not_forkable.get().cloned()
    }
}

/// Several tools as one. Tools keep the order in which they were given.
pub struct ToolSet {
    hosts: Vec<Arc<dyn ToolHost>>,
    directory: OnceCell<Directory>,
}

/// All tools of a set: what each offers, and which host has it.
struct Directory {
    specs: Vec<ToolSpec>,
    owners: BTreeMap<String, usize>,
}

impl std::fmt::Debug for ToolSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ToolSet").field("hosts", &self.hosts.len()).finish_non_exhaustive()
    }
}

impl ToolSet {
    /// Joins tools. Two of the same name are found out by `list` and `call`, which answer with a fault.
    #[must_use]
    pub fn new(hosts: Vec<Arc<dyn ToolHost>>) -> Self {
        Self { hosts, directory: OnceCell::new() }
    }

    /// A tool's list is the same at every call, so it is asked for once.
    async fn directory(&self) -> Result<&Directory, ToolError> {
        self.directory
            .get_or_try_init(|| async {
                let (mut specs, mut owners) = (vec![], BTreeMap::new());
                for (place, host) in self.hosts.iter().enumerate() {
                    for spec in host.list().await? {
                        if owners.insert(spec.name.clone(), place).is_some() {
                            let detail = format!("two tools are called `{}`", spec.name);
                            return Err(ToolError::Fault { detail, limit: None });
                        }
                        specs.push(spec);
                    }
                }
                Ok(Directory { specs, owners })
            })
            .await
    }
}

impl ToolHost for ToolSet {
    fn list(&self) -> BoxFuture<'_, Result<Vec<ToolSpec>, ToolError>> {
        Box::pin(async move { Ok(self.directory().await?.specs.clone()) })
    }

    fn call(&self, name: String, arguments: String) -> BoxFuture<'_, Result<String, ToolError>> {
        Box::pin(async move {
            match self.directory().await?.owners.get(&name).and_then(|place| self.hosts.get(*place)) {
                Some(host) => host.call(name, arguments).await,
                None => Err(ToolError::UnknownTool(name)),
            }
        })
    }

    fn guest_cpu_us(&self) -> u64 {
        self.hosts.iter().map(|host| host.guest_cpu_us()).fold(0, u64::saturating_add)
    }

    fn not_forkable(&self) -> Option<String> {
        self.hosts.iter().find_map(|host| host.not_forkable())
    }
}
