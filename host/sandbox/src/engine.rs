//! The engine: one per process, shared by all plugins.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use fulgurite_core::limits::STACK_BYTES_MAX;
use wasmtime::component::{HasSelf, Linker};
use wasmtime::{Cache, CacheConfig, Config, Enabled, Engine, EngineWeak, PoolingAllocationConfig};

use crate::agent::AgentHost;
use crate::algorithm_host::AlgorithmImports;
use crate::bindings;
use crate::guest::{GuestState, link_wasi};
use crate::meter::TICK;

/// Stack that host functions have beside the guest's, in bytes.
const HOST_STACK_BYTES: usize = 512 << 10;

/// Components alive at once in one process: agents, tools and graders together. One more is a host fault. The kernel's
/// default of 65,530 memory mappings is the reason for not having more.
const INSTANCES_MAX: u32 = 4_096;
/// Largest linear memory, in bytes, whatever the limits say: 2 x 4,096 of them fit into the address space 16 times.
pub(crate) const MEMORY_BYTES_MAX: u64 = 1 << 30;
/// Largest table, whatever the limits say.
pub(crate) const TABLE_ELEMENTS_MAX: usize = 100_000;

/// Settings of a [`Sandbox`].
#[derive(Debug, Clone, Default)]
pub struct SandboxSettings {
    /// Where compiled code is kept between processes. wasmtime trusts what it finds there, so the folder must belong to
    /// this user alone; it is made with mode 0700, and refused when others may enter it. `None` keeps nothing.
    pub cache_dir: Option<PathBuf>,
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
    pub(crate) engine: Engine,
    pub(crate) agents: Linker<GuestState<AgentHost>>,
    pub(crate) graders: Linker<GuestState<()>>,
    pub(crate) tools: Linker<GuestState<()>>,
    pub(crate) algorithms: Linker<GuestState<AlgorithmImports>>,
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox").finish_non_exhaustive()
    }
}

impl Sandbox {
    /// Starts an engine and its epoch ticker, which ends with the last plugin.
    ///
    /// # Errors
    /// When the cache folder is not private, or the machine cannot run WebAssembly.
    pub fn new(settings: SandboxSettings) -> Result<Self, SandboxError> {
        let cache = match settings.cache_dir {
            None => None,
            Some(dir) => {
                make_private(&dir)?;
                let mut cache = CacheConfig::new();
                cache.with_directory(dir);
                Some(Cache::new(cache).map_err(engine_error)?)
            }
        };
        // Where address space is rationed the pool cannot be reserved; instances made on demand only cost more time.
        let engine = Engine::new(config(cache.clone()).allocation_strategy(pool()))
            .or_else(|_| Engine::new(&config(cache)))
            .map_err(engine_error)?;
        let inner = link(engine.clone()).map_err(engine_error)?;
        let weak = engine.weak();
        thread::Builder::new()
            .name("fulgurite-epoch".to_owned())
            .spawn(move || tick(&weak))
            .map_err(|error| SandboxError::Engine(Box::new(error)))?;
        Ok(Self { inner: Arc::new(inner) })
    }
}

fn config(cache: Option<Cache>) -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .max_wasm_stack(STACK_BYTES_MAX)
        .async_stack_size(STACK_BYTES_MAX + HOST_STACK_BYTES)
        .cranelift_nan_canonicalization(true)
        .relaxed_simd_deterministic(true)
        .memory_reservation(MEMORY_BYTES_MAX)
        .cache(cache);
    config
}

/// Instances come from a pool: 2.5 times as many attempts a second as with memory mapped for each. The pool is address
/// space, not memory; what is kept resident between two attempts is what a small Rust guest touches.
fn pool() -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(INSTANCES_MAX)
        .total_core_instances(INSTANCES_MAX * 16)
        .total_memories(INSTANCES_MAX * 2)
        .total_tables(INSTANCES_MAX * 4)
        .total_stacks(INSTANCES_MAX)
        .max_memories_per_module(2)
        .max_tables_per_module(4)
        .max_memory_size(usize::try_from(MEMORY_BYTES_MAX).unwrap_or(usize::MAX))
        .table_elements(TABLE_ELEMENTS_MAX)
        .pagemap_scan(Enabled::Auto)
        .linear_memory_keep_resident(1_280 << 10)
        .table_keep_resident(64 << 10)
        .async_stack_keep_resident(64 << 10);
    pool
}

fn engine_error(error: wasmtime::Error) -> SandboxError {
    SandboxError::Engine(error.into_boxed_dyn_error())
}

fn tick(engine: &EngineWeak) {
    while let Some(engine) = engine.upgrade() {
        engine.increment_epoch();
        drop(engine);
        thread::sleep(TICK);
    }
}

fn link(engine: Engine) -> wasmtime::Result<Inner> {
    let mut agents = Linker::new(&engine);
    link_wasi(&mut agents)?;
    bindings::agent::Agent::add_to_linker::<_, HasSelf<GuestState<AgentHost>>>(&mut agents, |state| state)?;
    let mut graders = Linker::new(&engine);
    link_wasi(&mut graders)?;
    bindings::grader::Grader::add_to_linker::<_, HasSelf<GuestState<()>>>(&mut graders, |state| state)?;
    let mut tools = Linker::new(&engine);
    link_wasi(&mut tools)?;
    bindings::tool::ToolPlugin::add_to_linker::<_, HasSelf<GuestState<()>>>(&mut tools, |state| state)?;
    let mut algorithms = Linker::new(&engine);
    link_wasi(&mut algorithms)?;
    bindings::algorithm::Algorithm::add_to_linker::<_, HasSelf<GuestState<AlgorithmImports>>>(
        &mut algorithms,
        |state| state,
    )?;
    Ok(Inner { engine, agents, graders, tools, algorithms })
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
