//! Loading and inspecting plugins. The input is always a component: compiled code is never taken from a caller.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fulgurite_core::grant::{Ask, Capability, GrantError, InvalidManifest, Manifest};
use fulgurite_core::id::ContentHash;
use wasmtime::Engine;
use wasmtime::component::Component;
use wasmtime::component::types::ComponentItem;

use crate::engine::{Sandbox, SandboxError, World};
use crate::manifest;
use crate::profile::{EngineProfile, SMALL_COMPONENT_BYTES_MAX};

/// Version of every package in `wit/`.
const WIT_VERSION: &str = "0.1.0";
/// First bytes of every WebAssembly file.
const MAGIC: &[u8] = b"\0asm";
/// What follows in a component, and in a core module.
const COMPONENT_LAYER: &[u8] = &[0x0d, 0, 1, 0];
const MODULE_LAYER: &[u8] = &[1, 0, 0, 0];

/// The worlds that a plugin can implement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PluginWorld {
    /// `fulgurite:agent/agent`.
    Agent,
    /// `fulgurite:grader/grader`.
    Grader,
    /// `fulgurite:tool/tool-plugin`.
    Tool,
    /// `fulgurite:algorithm/algorithm`.
    Algorithm,
}

impl PluginWorld {
    /// Every world.
    pub const ALL: [Self; 4] = [Self::Agent, Self::Grader, Self::Tool, Self::Algorithm];

    /// The world's name for people: `agent`, `grader`, `tool` or `algorithm`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Grader => "grader",
            Self::Tool => "tool",
            Self::Algorithm => "algorithm",
        }
    }

    /// What a component must export to implement the world. Interfaces are named without their version.
    const fn exports(self) -> &'static [&'static str] {
        match self {
            Self::Agent => &["run"],
            Self::Grader => &["grade"],
            Self::Tool => &["fulgurite:tool/tool"],
            Self::Algorithm => &["describe", "init", "step", "save"],
        }
    }

    /// Interfaces of ours that the world may import.
    const fn interfaces(self) -> &'static [&'static str] {
        match self {
            Self::Agent => &[
                "fulgurite:types/types",
                "fulgurite:agent/llm",
                "fulgurite:agent/emit",
                "fulgurite:agent/tools",
                "fulgurite:agent/resources",
                "fulgurite:agent/task",
            ],
            Self::Grader => &["fulgurite:types/types", "fulgurite:grader/types", JUDGE],
            Self::Tool => &["fulgurite:types/types", "fulgurite:tool/http", "fulgurite:tool/sqlite"],
            Self::Algorithm => &[
                "fulgurite:types/types",
                "fulgurite:algorithm/common",
                "fulgurite:algorithm/rollouts",
                "fulgurite:algorithm/trajectories",
                "fulgurite:algorithm/policy",
                "fulgurite:algorithm/resources",
                "fulgurite:algorithm/llm",
                "fulgurite:algorithm/metrics",
            ],
        }
    }

    /// What a plugin of the world may ask for.
    #[must_use]
    pub const fn capabilities(self) -> &'static [Capability] {
        match self {
            Self::Agent | Self::Grader => &[Capability::Endpoint],
            // Writable data and servers are for tools, never for agents.
            Self::Tool => &[Capability::Folder, Capability::Http, Capability::Sqlite],
            Self::Algorithm => &[],
        }
    }

    /// Names of the limits ([`fulgurite_core::limits::Limits`]) that apply to a guest of this world.
    #[must_use]
    pub const fn limits(self) -> &'static [&'static str] {
        match self {
            Self::Agent => &[
                "memory_bytes_max",
                "table_elements_max",
                "stack_bytes_max",
                "instances_max",
                "handles_max",
                "guest_cpu_ms_max",
                "fuel_max",
                "attempt_wall_ms_max",
                "heartbeat_ms_max",
                "llm_calls_max",
                "completion_tokens_max",
                "tool_calls_max",
                "spans_max",
                "span_bytes_max",
                "output_bytes_max",
                "payload_bytes_max",
            ],
            Self::Grader => &[
                "memory_bytes_max",
                "table_elements_max",
                "stack_bytes_max",
                "instances_max",
                "handles_max",
                "guest_cpu_ms_max",
                "fuel_max",
                "output_bytes_max",
                "payload_bytes_max",
                "rewards_max",
                "llm_calls_max",
                "completion_tokens_max",
            ],
            Self::Tool => &[
                "memory_bytes_max",
                "table_elements_max",
                "stack_bytes_max",
                "instances_max",
                "handles_max",
                "guest_cpu_ms_max",
                "fuel_max",
                "output_bytes_max",
                "payload_bytes_max",
                "http_calls_max",
                "http_timeout_ms_max",
                "http_request_bytes_max",
                "http_response_bytes_max",
                "sqlite_steps_max",
                "sqlite_rows_max",
                "sqlite_value_bytes_max",
                "sqlite_database_bytes_max",
                "folder_files_max",
                "folder_file_bytes_max",
                "folder_bytes_max",
            ],
            Self::Algorithm => &["memory_bytes_max", "table_elements_max", "algorithm_step_cpu_ms_max"],
        }
    }
}

/// What a grader imports to ask a model. Offered only when it is granted an endpoint.
const JUDGE: &str = "fulgurite:grader/judge";

/// Interfaces of WASI p2 that every guest finds, all of them cut off from the machine.
const WASI_INTERFACES: [&str; 27] = [
    "wasi:cli/environment",
    "wasi:cli/exit",
    "wasi:cli/stderr",
    "wasi:cli/stdin",
    "wasi:cli/stdout",
    "wasi:cli/terminal-input",
    "wasi:cli/terminal-output",
    "wasi:cli/terminal-stderr",
    "wasi:cli/terminal-stdin",
    "wasi:cli/terminal-stdout",
    "wasi:clocks/monotonic-clock",
    "wasi:clocks/wall-clock",
    "wasi:filesystem/preopens",
    "wasi:filesystem/types",
    "wasi:io/error",
    "wasi:io/poll",
    "wasi:io/streams",
    "wasi:random/insecure",
    "wasi:random/insecure-seed",
    "wasi:random/random",
    "wasi:sockets/instance-network",
    "wasi:sockets/ip-name-lookup",
    "wasi:sockets/network",
    "wasi:sockets/tcp",
    "wasi:sockets/tcp-create-socket",
    "wasi:sockets/udp",
    "wasi:sockets/udp-create-socket",
];

/// Something that a component asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportInfo {
    /// Its name with version, for example `fulgurite:agent/llm@0.1.0`.
    pub name: String,
    /// Whether the sandbox offers it.
    pub offered: bool,
}

/// What a component says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginInfo {
    /// The file.
    pub path: PathBuf,
    /// Its content hash.
    pub hash: ContentHash,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The worlds that it implements; empty when it is no plugin.
    pub worlds: Vec<PluginWorld>,
    /// Packages that it was built against, with their versions, in order: ours and WASI's.
    pub packages: Vec<(String, String)>,
    /// What it asks for, in order.
    pub imports: Vec<ImportInfo>,
    /// Names of the limits that apply to it.
    pub limits: Vec<&'static str>,
    /// The capabilities that it asks for.
    pub manifest: Manifest,
}

impl PluginInfo {
    /// What it asks for and does not get.
    pub fn refused(&self) -> impl Iterator<Item = &str> {
        self.imports.iter().filter(|import| !import.offered).map(|import| import.name.as_str())
    }
}

/// Why a plugin was not loaded. Every text names the file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// The file cannot be read.
    #[error("cannot read {path}; build the plugin first: fulgurite build DIR")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not WebAssembly at all.
    #[error("{path} is not WebAssembly but {found}; a plugin is a component: fulgurite build DIR makes one")]
    NotWebAssembly {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        found: &'static str,
    },
    /// The engine that it needs cannot be started.
    #[error("cannot run {path} on this machine")]
    Engine {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: SandboxError,
    },
    /// A core module.
    #[error("{path} is a core module, not a component; build it for the target wasm32-wasip2: fulgurite build DIR")]
    CoreModule {
        /// The file.
        path: PathBuf,
    },
    /// A component that does not validate or compile.
    #[error("{path} is not a valid component; build it again: fulgurite build DIR")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What wasmtime says.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Another world than the one asked for.
    #[error("{path} is not {article} {expected}: it implements {found}", article = article(.expected))]
    WrongWorld {
        /// The file.
        path: PathBuf,
        /// The world asked for.
        expected: &'static str,
        /// The worlds found, for people.
        found: String,
    },
    /// Built against a version of our interfaces that this host does not have.
    #[error(
        "{path} was built against {package}@{found}, and this host offers {offered}; build it again with the matching SDK"
    )]
    UnknownVersion {
        /// The file.
        path: PathBuf,
        /// The package.
        package: String,
        /// The version that the plugin asks for.
        found: String,
        /// The version that there is.
        offered: &'static str,
    },
    /// It asks for something that no plugin of its world gets.
    #[error("{path} asks for {import}, which {article} {world} is not given; remove what uses it", article = article(.world))]
    ImportNotOffered {
        /// The file.
        path: PathBuf,
        /// The import's name.
        import: String,
        /// The world.
        world: &'static str,
    },
    /// Its manifest cannot be used.
    #[error("{path} has a manifest that cannot be used; see `manifest!` of the SDK, or wit/tool/tool.wit")]
    Manifest {
        /// The component, or the file beside it.
        path: PathBuf,
        /// Why.
        #[source]
        source: InvalidManifest,
    },
    /// Its manifest asks for what no plugin of its world gets.
    #[error("{path} asks for the {what} `{name}`, which no {world} is given{hint}", what = .capability.as_str(), hint = hint(*.capability))]
    NeverGranted {
        /// The component.
        path: PathBuf,
        /// The world.
        world: &'static str,
        /// What.
        capability: Capability,
        /// Its name.
        name: String,
    },
    /// Manifest and config do not fit.
    #[error("{path}")]
    Grant {
        /// The component.
        path: PathBuf,
        /// What to change.
        #[source]
        source: GrantError,
    },
    /// The names fit and the types do not.
    #[error("{path} does not fit the world {world}; build it again with the matching SDK")]
    Incompatible {
        /// The file.
        path: PathBuf,
        /// The world.
        world: &'static str,
        /// Where they differ.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn hint(capability: Capability) -> &'static str {
    match capability {
        Capability::Folder | Capability::Http | Capability::Sqlite => "; make a tool of what needs it",
        Capability::Endpoint => "",
    }
}

fn article(world: &str) -> &'static str {
    if world.starts_with('a') { "an" } else { "a" }
}

pub(crate) fn incompatible(path: &Path, world: PluginWorld, error: &wasmtime::Error) -> PluginError {
    let text = format!("{error:#}");
    PluginError::Incompatible { path: path.to_owned(), world: world.as_str(), source: text.into() }
}

/// A compiled component.
pub(crate) struct Artifact {
    pub(crate) component: Component,
    /// The engine that it is compiled for.
    pub(crate) world: Arc<World>,
    pub(crate) hash: ContentHash,
    pub(crate) manifest: Manifest,
    imports_judge: bool,
}

impl Sandbox {
    /// Says what a component is, without running any of it.
    ///
    /// # Errors
    /// When the file is missing or is not a component. A component that would be refused is no error: see
    /// [`PluginInfo::refused`] and [`PluginInfo::packages`].
    pub fn inspect(&self, path: &Path) -> Result<PluginInfo, PluginError> {
        let bytes = read(path)?;
        let (component, engine) = self.compile(path, &bytes, None)?;
        describe(&engine.engine, path, &bytes, &component)
    }

    /// What the manifest of a component asks for, without compiling it.
    ///
    /// # Errors
    /// When the file is missing, is not a component, or has a manifest that cannot be used.
    pub fn manifest(&self, path: &Path) -> Result<Manifest, PluginError> {
        manifest::read(path, &read(path)?)
    }

    /// Reads, compiles and checks a plugin of the given world, whose place in the config is `plugin`.
    pub(crate) fn load_granted(
        &self,
        path: &Path,
        world: PluginWorld,
        plugin: &str,
        granted: &BTreeSet<(Capability, String)>,
    ) -> Result<Artifact, PluginError> {
        let artifact = self.load(path, world)?;
        let checked = artifact.manifest.compare(plugin, granted);
        checked.map_err(|source| PluginError::Grant { path: path.to_owned(), source })?;
        if granted.is_empty() && artifact.imports_judge {
            let import = format!("{JUDGE}@{WIT_VERSION}");
            return Err(PluginError::ImportNotOffered { path: path.to_owned(), import, world: world.as_str() });
        }
        Ok(artifact)
    }

    /// Reads, compiles and checks a plugin of the given world.
    pub(crate) fn load(&self, path: &Path, world: PluginWorld) -> Result<Artifact, PluginError> {
        let bytes = read(path)?;
        let (component, engine) = self.compile(path, &bytes, Some(world))?;
        let info = describe(&engine.engine, path, &bytes, &component)?;
        // First of all the version: what was built against another one seems to implement nothing.
        for (package, version) in &info.packages {
            if package.starts_with("fulgurite:") && version != WIT_VERSION {
                return Err(PluginError::UnknownVersion {
                    path: path.to_owned(),
                    package: package.clone(),
                    found: version.clone(),
                    offered: WIT_VERSION,
                });
            }
        }
        if !info.worlds.contains(&world) {
            let found: Vec<&str> = info.worlds.iter().map(|world| world.as_str()).collect();
            let found = if found.is_empty() { "none of the plugin worlds".to_owned() } else { found.join(", ") };
            return Err(PluginError::WrongWorld { path: path.to_owned(), expected: world.as_str(), found });
        }
        if let Some(import) = info.imports.iter().find(|import| !offered(&[world], &import.name)) {
            return Err(PluginError::ImportNotOffered {
                path: path.to_owned(),
                import: import.name.clone(),
                world: world.as_str(),
            });
        }
        if let Some((capability, ask)) = never_granted(world, &info.manifest) {
            return Err(PluginError::NeverGranted {
                path: path.to_owned(),
                world: world.as_str(),
                capability,
                name: ask.name.clone(),
            });
        }
        let imports_judge = info.imports.iter().any(|import| split(&import.name).0 == JUDGE);
        Ok(Artifact { component, world: engine, hash: info.hash, manifest: info.manifest, imports_judge })
    }

    /// Compiles for the engine that fits.
    fn compile(
        &self,
        path: &Path,
        bytes: &[u8],
        world: Option<PluginWorld>,
    ) -> Result<(Component, Arc<World>), PluginError> {
        match (bytes.get(..4), bytes.get(4..8)) {
            (Some(magic), Some(layer)) if magic == MAGIC && layer == MODULE_LAYER => {
                return Err(PluginError::CoreModule { path: path.to_owned() });
            }
            (Some(magic), Some(layer)) if magic == MAGIC && layer == COMPONENT_LAYER => {}
            _ => return Err(PluginError::NotWebAssembly { path: path.to_owned(), found: guess(bytes) }),
        }
        let profile = match world {
            Some(PluginWorld::Algorithm) => EngineProfile::LongLived,
            _ if bytes.len() > SMALL_COMPONENT_BYTES_MAX => EngineProfile::Interpreter,
            _ => EngineProfile::Small,
        };
        let (component, world) = self.compile_for(path, bytes, profile)?;
        // A component with more than one memory, or a large one, does not fit the small slots.
        let fits = component.resources_required().is_none_or(|needs| {
            let bytes = needs.max_initial_memory_size.unwrap_or(0);
            needs.num_memories <= 1 && needs.num_tables <= 2 && bytes <= world.memory_bytes_max()
        });
        if profile == EngineProfile::Small && !fits {
            return self.compile_for(path, bytes, EngineProfile::Interpreter);
        }
        Ok((component, world))
    }

    fn compile_for(
        &self,
        path: &Path,
        bytes: &[u8],
        profile: EngineProfile,
    ) -> Result<(Component, Arc<World>), PluginError> {
        let world = self.world(profile).map_err(|source| PluginError::Engine { path: path.to_owned(), source })?;
        match Component::from_binary(&world.engine, bytes) {
            Ok(component) => Ok((component, world)),
            Err(error) => Err(PluginError::Invalid { path: path.to_owned(), source: format!("{error:#}").into() }),
        }
    }
}

fn describe(engine: &Engine, path: &Path, bytes: &[u8], component: &Component) -> Result<PluginInfo, PluginError> {
    let types = component.component_type();
    let exports: Vec<&str> = types.exports(engine).map(|(name, _)| name).collect();
    let worlds: Vec<PluginWorld> = PluginWorld::ALL
        .into_iter()
        .filter(|world| world.exports().iter().all(|name| exports.iter().any(|export| split(export).0 == *name)))
        .collect();
    let mut packages = BTreeSet::new();
    let mut imports = vec![];
    for (name, item) in types.imports(engine) {
        note_package(&mut packages, name);
        if !is_vocabulary(engine, &item.ty) {
            imports.push(ImportInfo { name: name.to_owned(), offered: offered(&worlds, name) });
        }
    }
    for name in &exports {
        note_package(&mut packages, name);
    }
    let mut limits: Vec<&'static str> = vec![];
    for world in &worlds {
        limits.extend(world.limits().iter().filter(|limit| !limits.contains(limit)).copied().collect::<Vec<_>>());
    }
    Ok(PluginInfo {
        path: path.to_owned(),
        hash: ContentHash::of(bytes),
        size_bytes: bytes.len() as u64,
        worlds,
        packages: packages.into_iter().collect(),
        imports,
        limits,
        manifest: manifest::read(path, bytes)?,
    })
}

fn never_granted(world: PluginWorld, manifest: &Manifest) -> Option<(Capability, &Ask)> {
    manifest.asks().find(|(capability, _)| !world.capabilities().contains(capability))
}

fn read(path: &Path) -> Result<Vec<u8>, PluginError> {
    std::fs::read(path).map_err(|source| PluginError::Read { path: path.to_owned(), source })
}

fn guess(bytes: &[u8]) -> &'static str {
    match bytes {
        [] => "empty",
        [0x7f, b'E', b'L', b'F', ..] => "machine code (compiled code is never loaded)",
        [b'#', b'!', ..] => "a script",
        _ if std::str::from_utf8(bytes).is_ok() => "a text",
        _ => "some other file",
    }
}

/// An import of nothing but types asks for nothing: an SDK that knows all worlds names the types of all.
fn is_vocabulary(engine: &Engine, item: &ComponentItem) -> bool {
    match item {
        ComponentItem::Type(_) => true,
        ComponentItem::ComponentInstance(instance) => {
            instance.exports(engine).all(|(_, export)| matches!(export.ty, ComponentItem::Type(_)))
        }
        _ => false,
    }
}

/// An import's or export's name without and with its version.
fn split(name: &str) -> (&str, Option<&str>) {
    name.split_once('@').map_or((name, None), |(name, version)| (name, Some(version)))
}

fn note_package(packages: &mut BTreeSet<(String, String)>, name: &str) {
    if let (interface, Some(version)) = split(name)
        && let Some((package, _)) = interface.split_once('/')
    {
        packages.insert((package.to_owned(), version.to_owned()));
    }
}

fn offered(worlds: &[PluginWorld], name: &str) -> bool {
    let (interface, version) = split(name);
    if interface.starts_with("wasi:") {
        let known = WASI_INTERFACES.contains(&interface);
        return known && version.is_some_and(|version| version.starts_with("0.2."));
    }
    worlds.iter().any(|world| world.interfaces().contains(&interface)) && version == Some(WIT_VERSION)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_world_has_is_offered() {
        assert!(offered(&[PluginWorld::Agent], "fulgurite:agent/llm@0.1.0"));
        assert!(!offered(&[PluginWorld::Grader], "fulgurite:agent/llm@0.1.0"));
        assert!(!offered(&[PluginWorld::Agent], "fulgurite:agent/llm@0.2.0"));
        assert!(offered(&[PluginWorld::Tool], "wasi:io/poll@0.2.6"));
        assert!(!offered(&[PluginWorld::Tool], "wasi:http/outgoing-handler@0.2.6"));
        assert!(!offered(&[PluginWorld::Tool], "wasi:cli/stdin@0.3.0"));
    }
}
