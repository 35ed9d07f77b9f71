//! The engines: one for each profile, made when it is first needed, shared by all plugins of a process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use fulgurite_core::limits::Limits;
use tokio::sync::Semaphore;
use wasmtime::component::{HasSelf, Linker};
use wasmtime::{Cache, CacheConfig, Engine, EngineWeak};

use crate::agent::AgentHost;
use crate::algorithm_host::AlgorithmImports;
use crate::bindings;
use crate::grants::{GraderGuest, ToolData, link_files};
use crate::guest::{GuestState, link_wasi};
use crate::meter::TICK;
use crate::profile::{self, EngineProfile, Slots};

/// Settings of a [`Sandbox`]: what has to be known before anything is compiled.
#[derive(Debug, Clone)]
pub struct SandboxSettings {
    /// Where compiled code is kept between processes. wasmtime trusts what it finds there, so the folder must belong to
    /// this user alone; it is made with mode 0700, and refused when others may enter it. `None` keeps nothing.
    pub cache_dir: Option<PathBuf>,
    /// Stack of one guest in bytes.
    pub stack_bytes_max: u64,
    /// Largest linear memory in bytes that a small guest may be given by its limits.
    pub memory_bytes_max: u64,
    /// Whether guests count instructions. Compiled into their code: [`Limits::fuel_max`] needs it.
    pub fuel: bool,
    /// Agents and tools that will be alive at once; `None` is as many as the machine bears. A pool that is larger than
    /// what is used spreads its guests over more pages, which all stay in memory.
    pub guests_max: Option<usize>,
}

impl SandboxSettings {
    /// What these limits need.
    #[must_use]
    pub fn new(cache_dir: Option<PathBuf>, limits: &Limits) -> Self {
        Self {
            cache_dir,
            stack_bytes_max: limits.stack_bytes_max,
            memory_bytes_max: limits.memory_bytes_max,
            fuel: limits.fuel_max > 0,
            guests_max: None,
        }
    }

    /// The same for a run some of whose plugins have limits of their own, narrower ones. Counting instructions is compiled
    /// in, so all are counted when one is.
    #[must_use]
    pub fn of_run(cache_dir: Option<PathBuf>, limits: &Limits, plugin_limits: &BTreeMap<String, Limits>) -> Self {
        let settings = Self::new(cache_dir, limits);
        Self { fuel: settings.fuel || plugin_limits.values().any(|limits| limits.fuel_max > 0), ..settings }
    }
}

impl Default for SandboxSettings {
    fn default() -> Self {
        Self::new(None, &Limits::default())
    }
}

/// Why a sandbox could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The cache folder cannot be made or looked at.
    #[error("cannot use the cache folder {path}")]
    CacheDir {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Others may read or write the cache folder.
    #[error(
        "the cache folder {path} has mode {mode:04o}; compiled code in it is trusted, so make it private: chmod 700 {path}"
    )]
    CacheDirNotPrivate {
        /// The folder.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// wasmtime refused the configuration of this machine.
    #[error("cannot start the WebAssembly engine")]
    Engine(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Compiles and runs plugins. Cheap to clone.
#[derive(Clone)]
pub struct Sandbox {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    settings: SandboxSettings,
    cache: Option<Cache>,
    worlds: Mutex<BTreeMap<EngineProfile, Arc<World>>>,
    ticking: Arc<Mutex<Vec<EngineWeak>>>,
}

/// One engine with everything that its guests may import.
pub(crate) struct World {
    pub(crate) engine: Engine,
    pub(crate) profile: EngineProfile,
    pub(crate) agents: Linker<GuestState<AgentHost>>,
    pub(crate) graders: Linker<GuestState<GraderGuest>>,
    /// For graders that are granted an endpoint.
    pub(crate) judged_graders: Linker<GuestState<GraderGuest>>,
    pub(crate) tools: Linker<ToolData>,
    pub(crate) algorithms: Linker<GuestState<AlgorithmImports>>,
    pub(crate) stack_bytes_max: u64,
    memory_bytes_max: u64,
    pub(crate) fuel: bool,
    /// Guests of attempts: agents and tools.
    pub(crate) attempt_slots: Arc<Semaphore>,
    pub(crate) attempt_slots_max: u32,
    /// Gradings. They have slots of their own: an attempt that keeps its slots while it is graded must find one.
    pub(crate) grader_slots: Arc<Semaphore>,
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox").finish_non_exhaustive()
    }
}

impl Sandbox {
    /// Starts the engine of small guests and the epoch ticker, which ends with the last plugin.
    ///
    /// # Errors
    /// When the cache folder is not private, or the machine cannot run WebAssembly.
    pub fn new(settings: SandboxSettings) -> Result<Self, SandboxError> {
        let cache = match &settings.cache_dir {
            None => None,
            Some(dir) => {
                make_private(dir)?;
                let mut cache = CacheConfig::new();
                cache.with_directory(dir);
                Some(Cache::new(cache).map_err(engine_error)?)
            }
        };
        let ticking = Arc::new(Mutex::new(vec![]));
        let inner = Inner { settings, cache, worlds: Mutex::default(), ticking: Arc::clone(&ticking) };
        let sandbox = Self { inner: Arc::new(inner) };
        sandbox.world(EngineProfile::Small)?;
        thread::Builder::new()
            .name("fulgurite-epoch".to_owned())
            .spawn(move || tick(&ticking))
            .map_err(|error| SandboxError::Engine(Box::new(error)))?;
        Ok(sandbox)
    }

    /// The engine of a profile, made when it is first asked for.
    pub(crate) fn world(&self, profile: EngineProfile) -> Result<Arc<World>, SandboxError> {
        let mut worlds = self.inner.worlds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(world) = worlds.get(&profile) {
            return Ok(Arc::clone(world));
        }
        let settings = &self.inner.settings;
        let slots = Slots::of_machine(profile).at_most(settings.guests_max);
        let cache = || self.inner.cache.clone();
        // Where address space is rationed the pool cannot be reserved; instances made on demand only cost more time.
        let engine = Engine::new(profile::config(profile, settings, cache()).allocation_strategy(slots.pool(settings)))
            .or_else(|_| Engine::new(&profile::config(profile, settings, cache())))
            .map_err(engine_error)?;
        let world = Arc::new(link(engine, profile, settings, slots).map_err(engine_error)?);
        self.inner.ticking.lock().unwrap_or_else(PoisonError::into_inner).push(world.engine.weak());
        worlds.insert(profile, Arc::clone(&world));
        Ok(world)
    }
}

impl World {
    /// Largest linear memory that this engine can make.
    pub(crate) fn memory_bytes_max(&self) -> u64 {
        self.memory_bytes_max
    }

    /// Name and version of the engine, with every setting that a guest could notice.
    pub(crate) fn name(&self) -> String {
        profile::name(self.profile, self.stack_bytes_max, self.fuel)
    }
}

pub(crate) fn engine_error(error: wasmtime::Error) -> SandboxError {
    SandboxError::Engine(error.into_boxed_dyn_error())
}

/// Ends when no engine is left.
fn tick(engines: &Mutex<Vec<EngineWeak>>) {
    loop {
        let mut alive = false;
        for engine in engines.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(EngineWeak::upgrade) {
            engine.increment_epoch();
            alive = true;
        }
        if !alive {
            return;
        }
        thread::sleep(TICK);
    }
}

fn link(engine: Engine, profile: EngineProfile, settings: &SandboxSettings, slots: Slots) -> wasmtime::Result<World> {
    let mut agents = Linker::new(&engine);
    link_wasi(&mut agents)?;
    bindings::agent::Agent::add_to_linker::<_, HasSelf<GuestState<AgentHost>>>(&mut agents, |state| state)?;
    let mut graders = Linker::new(&engine);
    link_wasi(&mut graders)?;
    // `judge` is not there at all unless it is granted.
    bindings::grader::fulgurite::grader::types::add_to_linker::<_, HasSelf<GuestState<GraderGuest>>>(
        &mut graders,
        |state| state,
    )?;
    let mut judged_graders = Linker::new(&engine);
    link_wasi(&mut judged_graders)?;
    bindings::grader::Grader::add_to_linker::<_, HasSelf<GuestState<GraderGuest>>>(&mut judged_graders, |state| state)?;
    let mut tools = Linker::new(&engine);
    link_wasi(&mut tools)?;
    link_files(&mut tools)?;
    bindings::tool::ToolPlugin::add_to_linker::<_, HasSelf<ToolData>>(&mut tools, |state| state)?;
    let mut algorithms = Linker::new(&engine);
    link_wasi(&mut algorithms)?;
    bindings::algorithm::Algorithm::add_to_linker::<_, HasSelf<GuestState<AlgorithmImports>>>(
        &mut algorithms,
        |state| state,
    )?;
    Ok(World {
        engine,
        profile,
        agents,
        graders,
        judged_graders,
        tools,
        algorithms,
        stack_bytes_max: profile::stack_bytes_max(profile, settings),
        memory_bytes_max: profile::memory_bytes_max(profile, settings),
        fuel: profile::counts_fuel(profile, settings),
        attempt_slots: Arc::new(Semaphore::new(slots.attempts as usize)),
        attempt_slots_max: slots.attempts,
        grader_slots: Arc::new(Semaphore::new(slots.graders as usize)),
    })
}

/// Makes the folder with mode 0700, or checks that an existing one is closed to others.
fn make_private(dir: &Path) -> Result<(), SandboxError> {
    let failed = |source| SandboxError::CacheDir { path: dir.to_owned(), source };
    #[cfg(unix)]
    {
        use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        let mode = std::fs::metadata(dir).map_err(failed)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(SandboxError::CacheDirNotPrivate { path: dir.to_owned(), mode });
        }
    }
    #[cfg(not(unix))]
    std::fs::create_dir_all(dir).map_err(failed)?;
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_cache_folder_that_others_can_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("shared");
        std::fs::create_dir(&shared).unwrap();
        std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(make_private(&shared), Err(SandboxError::CacheDirNotPrivate { mode: 0o755, .. })));
        let own = dir.path().join("a/b");
        make_private(&own).unwrap();
        assert_eq!(std::fs::metadata(own).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
