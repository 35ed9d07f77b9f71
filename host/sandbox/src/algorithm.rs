//! Running algorithm plugins: one instance for a whole stage.
//!
//! Between two steps the host calls `save`, so what a plugin returns there is all that a resumed run has. Random numbers and
//! clocks must not smuggle more than that across a step, or a resumed run would go another way than an uninterrupted one:
//! both are reset at every step to values that depend on the plugin's config and the number of the step alone. The number
//! travels in front of the plugin's own bytes.

use std::path::Path;
use std::sync::Arc;

use fulgurite_core::algorithm::{AlgorithmDescription, AlgorithmHost, StepResult};
use fulgurite_core::id::ContentHash;
use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::{LimitReached, OutcomeKind};
use fulgurite_core::seed::Seed;
use wasmtime::Store;

use crate::algorithm_host::AlgorithmImports;
use crate::bindings::algorithm::{Algorithm, AlgorithmError, AlgorithmPre, Progress};
use crate::clock::VirtualClock;
use crate::engine::{Sandbox, World};
use crate::fault::{Bounds, During, Stop};
use crate::guest::{self, GuestSetup, GuestState};
use crate::meter::Meter;
use crate::output::{GuestOutput, LineSink};
use crate::plugin::{PluginError, PluginWorld, incompatible};
use crate::random::GuestRandom;

/// Most bytes of a plugin's saved state.
pub const STATE_BYTES_MAX: usize = 16 << 20;
/// Bounds of an algorithm: a batch of an optimiser step with weights per token; items and transitions of a large batch.
const BOUNDS: Bounds = Bounds {
    payload_bytes_max: 256 << 20,
    handles_max: 1 << 20,
    instances_max: 64,
    // What a run's limits say by default; all algorithms have it.
    stack_bytes_max: 512 << 10,
    fuel_max: 0,
};
/// Linear memory that an algorithm may have at least, in bytes: it keeps a stage's state and batch, where an attempt's
/// guests keep one item's. A saved state of [`STATE_BYTES_MAX`] passes through it several times.
const MEMORY_BYTES_MIN: u64 = 512 << 20;
/// First bytes of a saved state, with the version of what follows.
const STATE_MAGIC: [u8; 4] = *b"fas1";

/// Why an algorithm stopped. Each names the plugin and its version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AlgorithmFault {
    /// Guest code trapped.
    #[error("algorithm {plugin} trapped: {detail}")]
    Trap {
        /// Name and version.
        plugin: String,
        /// What happened.
        detail: String,
    },
    /// A limit was reached: of CPU time in one step, of memory, of output.
    #[error("algorithm {plugin} reached limit {} of {}", .limit.name, .limit.value)]
    Limit {
        /// Name and version.
        plugin: String,
        /// Which limit.
        limit: LimitReached,
    },
    /// The config is wrong; the text names the field.
    #[error("the config of algorithm {plugin} is wrong: {detail}")]
    InvalidConfig {
        /// Name and version.
        plugin: String,
        /// Which field and why.
        detail: String,
    },
    /// The saved state is not of this plugin.
    #[error("algorithm {plugin} cannot use the saved state: {detail}")]
    InvalidState {
        /// Name and version.
        plugin: String,
        /// Why.
        detail: String,
    },
    /// The host refused a verb and the plugin gave up.
    #[error("algorithm {plugin} gave up because the host refused: {detail}")]
    Host {
        /// Name and version.
        plugin: String,
        /// Which verb and why.
        detail: String,
    },
    /// The plugin returned an error of its own.
    #[error("algorithm {plugin} failed: {detail}")]
    Other {
        /// Name and version.
        plugin: String,
        /// Its text.
        detail: String,
    },
    /// The machine could not run the plugin.
    #[error("cannot run algorithm {plugin}: {detail}")]
    Machine {
        /// Name and version.
        plugin: String,
        /// Why.
        detail: String,
    },
}

/// An algorithm's component, compiled.
pub struct AlgorithmPlugin {
    world: Arc<World>,
    pre: AlgorithmPre<GuestState<AlgorithmImports>>,
    hash: ContentHash,
    file: String,
}

impl std::fmt::Debug for AlgorithmPlugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AlgorithmPlugin").field("file", &self.file).field("hash", &self.hash).finish_non_exhaustive()
    }
}

impl Sandbox {
    /// Loads an algorithm.
    ///
    /// # Errors
    /// As [`Sandbox::load_agent`].
    pub fn load_algorithm(&self, path: &Path) -> Result<Arc<AlgorithmPlugin>, PluginError> {
        let artifact = self.load(path, PluginWorld::Algorithm)?;
        let pre = artifact.world.algorithms.instantiate_pre(&artifact.component).and_then(AlgorithmPre::new);
        let pre = pre.map_err(|error| incompatible(path, PluginWorld::Algorithm, &error))?;
        let file = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Ok(Arc::new(AlgorithmPlugin { world: artifact.world, pre, hash: artifact.hash, file }))
    }
}

impl AlgorithmPlugin {
    /// Content hash of the component.
    #[must_use]
    pub fn hash(&self) -> ContentHash {
        self.hash
    }

    /// Asks the plugin who it is, in a throw-away instance without a host.
    ///
    /// # Errors
    /// When the plugin traps or reaches a limit.
    pub async fn describe(&self) -> Result<AlgorithmDescription, AlgorithmFault> {
        let imports = AlgorithmImports { host: None };
        let mut instance = self.instantiate(imports, &Limits::default(), Seed::new(0)).await?;
        instance.describe().await
    }

    /// Shows the plugin a stage's config, in a throw-away instance without a host: a mistake is found before a run has worked for
    /// hours. A plugin that asks the host for something while it is configured is not judged: only the stage's start can.
    ///
    /// # Errors
    /// When the plugin says that the config is wrong, traps, or reaches a limit.
    pub async fn check(&self, config: &str, limits: &Limits) -> Result<(), AlgorithmFault> {
        let mut instance = self.instantiate(AlgorithmImports { host: None }, limits, Seed::new(0)).await?;
        let description = instance.describe().await?;
        instance.plugin = format!("{} {}", description.name, description.version);
        match instance.init(config, None).await {
            Err(AlgorithmFault::Host { .. }) => Ok(()),
            checked => checked,
        }
    }

    /// Starts the algorithm of a stage: `config` is JSON text, already merged over the plugin's defaults; `saved` is what
    /// [`AlgorithmInstance::save`] returned at the last committed step.
    ///
    /// # Errors
    /// When the plugin traps, reaches a limit, or refuses config or state.
    pub async fn start(
        &self,
        config: String,
        saved: Option<Vec<u8>>,
        host: Arc<dyn AlgorithmHost>,
        limits: &Limits,
    ) -> Result<AlgorithmInstance, AlgorithmFault> {
        let hash = ContentHash::of(config.as_bytes());
        let mut first = [0; 8];
        first.iter_mut().zip(hash.as_bytes()).for_each(|(to, from)| *to = *from);
        let seed = Seed::new(u64::from_le_bytes(first));
        let mut instance = self.instantiate(AlgorithmImports { host: Some(host) }, limits, seed).await?;
        let description = instance.describe().await?;
        instance.plugin = format!("{} {}", description.name, description.version);
        let saved = match saved {
            None => None,
            Some(bytes) => {
                let (steps, state) = unframe(&bytes).ok_or_else(|| AlgorithmFault::InvalidState {
                    plugin: instance.plugin.clone(),
                    detail: format!("{} bytes that the host did not write", bytes.len()),
                })?;
                instance.steps = steps;
                Some(state.to_vec())
            }
        };
        instance.init(&config, saved.as_deref()).await?;
        Ok(instance)
    }

    async fn instantiate(
        &self,
        imports: AlgorithmImports,
        limits: &Limits,
        seed: Seed,
    ) -> Result<AlgorithmInstance, AlgorithmFault> {
        let meter = Arc::new(Meter::new("algorithm_step_cpu_ms_max", limits.algorithm_step_cpu_ms_max));
        let sink: Arc<dyn LineSink> = Arc::new(Tracing { plugin: self.file.clone() });
        let output = GuestOutput::new(u64::MAX, Some(sink));
        let limits = Limits {
            memory_bytes_max: limits.memory_bytes_max.max(MEMORY_BYTES_MIN),
            instances_max: BOUNDS.instances_max,
            stack_bytes_max: BOUNDS.stack_bytes_max,
            fuel_max: BOUNDS.fuel_max,
            ..limits.clone()
        };
        let setup = GuestSetup {
            limits: &limits,
            seeds: seed.into(),
            clock: Arc::new(VirtualClock::new(0)),
            meter: Arc::clone(&meter),
            output: Arc::clone(&output),
            bounds: BOUNDS,
        };
        let mut store =
            guest::store(&self.world, setup, imports).map_err(|outcome| fault_of(self.file.clone(), outcome))?;
        let made = meter.guest(self.pre.instantiate_async(&mut store)).await;
        let algorithm = made.map_err(|error| {
            let outcome = guest::fault(&error, During::Instantiation, BOUNDS, &output);
            fault_of(self.file.clone(), outcome)
        })?;
        Ok(AlgorithmInstance { plugin: self.file.clone(), seed, steps: 0, store, algorithm, meter, output })
    }
}

/// A live algorithm. An error from any of its calls, and dropping one of their futures, ends it: start another one from the
/// last saved state.
pub struct AlgorithmInstance {
    plugin: String,
    seed: Seed,
    steps: u64,
    store: Store<GuestState<AlgorithmImports>>,
    algorithm: Algorithm,
    meter: Arc<Meter>,
    output: Arc<GuestOutput>,
}

impl std::fmt::Debug for AlgorithmInstance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AlgorithmInstance")
            .field("plugin", &self.plugin)
            .field("steps", &self.steps)
            .finish_non_exhaustive()
    }
}

impl AlgorithmInstance {
    /// The plugin's name and version.
    #[must_use]
    pub fn plugin(&self) -> &str {
        &self.plugin
    }

    /// Guest CPU time since the start, in microseconds.
    #[must_use]
    pub fn guest_cpu_us(&self) -> u64 {
        self.meter.used_us()
    }

    /// Runs one step. Waiting for the host costs the plugin no time.
    ///
    /// # Errors
    /// When the plugin traps, reaches `algorithm_step_cpu_ms_max` or another limit, or returns an error.
    pub async fn step(&mut self) -> Result<StepResult, AlgorithmFault> {
        self.begin(&format!("step-{}", self.steps));
        let result = self.meter.guest(self.algorithm.call_step(&mut self.store)).await;
        let progress = self.settle(result)?.map_err(|error| self.refused(error))?;
        self.steps += 1;
        Ok(match progress {
            Progress::Continue => StepResult::Continue,
            Progress::Done => StepResult::Done,
        })
    }

    /// Everything that the next step needs, for [`AlgorithmPlugin::start`].
    ///
    /// # Errors
    /// When the plugin traps, reaches a limit, or returns more than [`STATE_BYTES_MAX`].
    pub async fn save(&mut self) -> Result<Vec<u8>, AlgorithmFault> {
        self.begin(&format!("save-{}", self.steps));
        let result = self.meter.guest(self.algorithm.call_save(&mut self.store)).await;
        let state = self.settle(result)?;
        if state.len() > STATE_BYTES_MAX {
            let limit = LimitReached { name: "state_bytes_max".to_owned(), value: STATE_BYTES_MAX as u64 };
            return Err(AlgorithmFault::Limit { plugin: self.plugin.clone(), limit });
        }
        Ok(frame(self.steps, &state))
    }

    async fn describe(&mut self) -> Result<AlgorithmDescription, AlgorithmFault> {
        self.begin("describe");
        let result = self.meter.guest(self.algorithm.call_describe(&mut self.store)).await;
        let description = self.settle(result)?;
        Ok(AlgorithmDescription {
            name: description.name,
            version: description.version,
            config_schema: description.config_schema,
            defaults: description.defaults,
        })
    }

    async fn init(&mut self, config: &str, saved: Option<&[u8]>) -> Result<(), AlgorithmFault> {
        self.begin("init");
        let result = self.meter.guest(self.algorithm.call_init(&mut self.store, config, saved)).await;
        self.settle(result)?.map_err(|error| self.refused(error))
    }

    /// A fresh allowance of CPU time; random numbers and clock as they always are at this point.
    fn begin(&mut self, name: &str) {
        self.meter.refill();
        let state = self.store.data_mut();
        state.random = GuestRandom::new(self.seed.child(name).into(), BOUNDS.payload_bytes_max);
        state.clock = Arc::new(VirtualClock::new(0));
    }

    fn settle<T>(&self, result: wasmtime::Result<T>) -> Result<T, AlgorithmFault> {
        result.map_err(|error| {
            let outcome = guest::fault(&error, During::Call, BOUNDS, &self.output);
            fault_of(self.plugin.clone(), outcome)
        })
    }

    fn refused(&self, error: AlgorithmError) -> AlgorithmFault {
        let plugin = self.plugin.clone();
        match error {
            AlgorithmError::InvalidConfig(detail) => AlgorithmFault::InvalidConfig { plugin, detail },
            AlgorithmError::InvalidState(detail) => AlgorithmFault::InvalidState { plugin, detail },
            AlgorithmError::Host(detail) => AlgorithmFault::Host { plugin, detail },
            AlgorithmError::Other(detail) => AlgorithmFault::Other { plugin, detail },
        }
    }
}

fn fault_of(plugin: String, outcome: fulgurite_core::outcome::AttemptOutcome) -> AlgorithmFault {
    match (outcome.limit, outcome.kind) {
        (Some(limit), _) => AlgorithmFault::Limit { plugin, limit },
        (None, OutcomeKind::HostFault) => AlgorithmFault::Machine { plugin, detail: outcome.detail },
        (None, _) => AlgorithmFault::Trap { plugin, detail: outcome.detail },
    }
}

fn frame(steps: u64, state: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(STATE_MAGIC.len() + size_of::<u64>() + state.len());
    bytes.extend_from_slice(&STATE_MAGIC);
    bytes.extend_from_slice(&steps.to_le_bytes());
    bytes.extend_from_slice(state);
    bytes
}

fn unframe(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (steps, state) = bytes.strip_prefix(&STATE_MAGIC)?.split_first_chunk()?;
    Some((u64::from_le_bytes(*steps), state))
}

/// An algorithm's standard output goes to the host's log.
struct Tracing {
    plugin: String,
}

impl LineSink for Tracing {
    fn act(&self) -> Result<(), Stop> {
        Ok(())
    }

    fn line(&self, stream: &'static str, text: String) -> Result<(), Stop> {
        tracing::info!(plugin = %self.plugin, stream, "{text}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_states_carry_the_number_of_steps() {
        assert_eq!(unframe(&frame(7, b"abc")), Some((7, b"abc".as_slice())));
        assert_eq!(unframe(&frame(0, b"")), Some((0, b"".as_slice())));
        assert_eq!(unframe(b"fas1short"), None);
        assert_eq!(unframe(b"something else entirely"), None);
    }
}
