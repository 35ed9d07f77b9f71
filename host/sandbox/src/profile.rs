//! The three kinds of guest that an engine is tuned for. What is tuned is where memory comes from; what a guest can notice
//! (NaN bits, SIMD, stack) is the same in all of them.

use std::fmt;

use fulgurite_core::limits::Limits;
use wasmtime::{Cache, Config, Enabled, InstanceAllocationStrategy, PoolingAllocationConfig};

use crate::engine::SandboxSettings;

/// Version of the engine, as `Cargo.toml` asks for it.
const WASMTIME_VERSION: &str = "48";
/// Stack that host functions have beside the guest's, in bytes.
const HOST_STACK_BYTES: u64 = 512 << 10;

/// Largest linear memory of an interpreter, in bytes, whatever the limits say.
const INTERPRETER_MEMORY_BYTES_MAX: u64 = 1 << 30;
/// Largest linear memory of a small guest, in bytes, whatever the limits say: with it for each of 15,000 slots the pool
/// takes an eighth of the address space.
const SMALL_MEMORY_BYTES_MAX: u64 = 1 << 30;
/// Largest table in elements, whatever the limits say.
pub(crate) const TABLE_ELEMENTS_MAX: usize = 100_000;

/// Memory mappings that the kernel grants by default, and that the rest of the process uses at most.
const MAPS_MAX_DEFAULT: u32 = 65_530;
const MAPS_OF_PROCESS: u32 = 5_000;
/// Mappings of one live small guest: its stack and its memory, each with what lies between it and the next.
const MAPS_PER_SLOT: u32 = 4;
/// Most slots of small guests. Beyond this the bookkeeping of the pool itself costs more than the guests.
const SMALL_SLOTS_MAX: u32 = 65_536;
/// Slots for gradings. Many more than threads: a grading never waits for anything.
const GRADER_SLOTS: u32 = 256;
/// Memory that a live interpreter takes, in bytes: 2 (JavaScript) to 4 MB (Python), and what it works on.
const INTERPRETER_BYTES: u64 = 16 << 20;
/// Most slots of interpreters.
const INTERPRETER_SLOTS_MAX: u32 = 2_048;
/// Long-lived guests: one for each stage and its control, with room.
const LONG_LIVED_SLOTS: u32 = 64;

/// What an engine is tuned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum EngineProfile {
    /// Components of compiled languages: many thousand at once. Bounds are checked in code rather than by unmapped pages,
    /// and memories are filled by copying, which together save a third of the kernel's mappings.
    Small,
    /// Components that hold an interpreter with its heap: memories are mapped copy-on-write from the component's image.
    Interpreter,
    /// Algorithms: few, alive for hours, memory taken on demand.
    LongLived,
}

/// A component of more bytes than this holds an interpreter. 4 MiB: compiled guests have 50 to 500 KiB, JavaScript has 12
/// MB and Python 18 MB.
pub(crate) const SMALL_COMPONENT_BYTES_MAX: usize = 4 << 20;

impl fmt::Display for EngineProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Small => "small",
            Self::Interpreter => "interpreter",
            Self::LongLived => "long-lived",
        })
    }
}

/// The engine, with every setting that a guest could notice: what a recording names.
pub(crate) fn name(profile: EngineProfile, stack_bytes_max: u64, fuel: bool) -> String {
    let fuel = if fuel { "counted" } else { "not counted" };
    format!(
        "wasmtime {WASMTIME_VERSION}, profile {profile}, stack {stack_bytes_max} bytes, NaN canonical, \
         relaxed SIMD deterministic, fuel {fuel}"
    )
}

pub(crate) fn config(profile: EngineProfile, settings: &SandboxSettings, cache: Option<Cache>) -> Config {
    let mut config = Config::new();
    let (stack_bytes_max, fuel) = (stack_bytes_max(profile, settings), counts_fuel(profile, settings));
    let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    config
        .epoch_interruption(true)
        .consume_fuel(fuel)
        .max_wasm_stack(bytes(stack_bytes_max))
        .async_stack_size(bytes(stack_bytes_max.saturating_add(HOST_STACK_BYTES)))
        .cranelift_nan_canonicalization(true)
        .relaxed_simd_deterministic(true)
        .cache(cache);
    match profile {
        EngineProfile::Small => {
            config
                .memory_init_cow(false)
                .memory_guard_size(0)
                .memory_reservation(small_memory_bytes(settings))
                .memory_may_move(false);
        }
        EngineProfile::Interpreter => {
            config.memory_reservation(INTERPRETER_MEMORY_BYTES_MAX);
        }
        EngineProfile::LongLived => {}
    }
    config
}

/// Stack of a guest in bytes. Algorithms have the default, so that a run may give its attempts less.
pub(crate) fn stack_bytes_max(profile: EngineProfile, settings: &SandboxSettings) -> u64 {
    match profile {
        EngineProfile::Small | EngineProfile::Interpreter => settings.stack_bytes_max,
        EngineProfile::LongLived => Limits::default().stack_bytes_max,
    }
}

/// Whether instructions are counted. Never those of algorithms: only attempts are replayed.
pub(crate) fn counts_fuel(profile: EngineProfile, settings: &SandboxSettings) -> bool {
    settings.fuel && profile != EngineProfile::LongLived
}

/// Largest linear memory of a guest.
pub(crate) fn memory_bytes_max(profile: EngineProfile, settings: &SandboxSettings) -> u64 {
    match profile {
        EngineProfile::Small => small_memory_bytes(settings),
        EngineProfile::Interpreter => INTERPRETER_MEMORY_BYTES_MAX,
        EngineProfile::LongLived => u64::MAX,
    }
}

fn small_memory_bytes(settings: &SandboxSettings) -> u64 {
    settings.memory_bytes_max.clamp(1 << 20, SMALL_MEMORY_BYTES_MAX).next_multiple_of(1 << 16)
}

/// How many guests may be alive at once: what a pool is made for, and what admission lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slots {
    profile: EngineProfile,
    /// Agents and tools.
    pub(crate) attempts: u32,
    /// Gradings.
    pub(crate) graders: u32,
}

impl Slots {
    /// As many as this machine bears.
    pub(crate) fn of_machine(profile: EngineProfile) -> Self {
        let (total, graders) = match profile {
            EngineProfile::Small => (small_slots(maps_max()), GRADER_SLOTS),
            EngineProfile::Interpreter => (interpreter_slots(memory_bytes()), 16),
            EngineProfile::LongLived => (LONG_LIVED_SLOTS, 1),
        };
        Self { profile, attempts: total.saturating_sub(graders).max(1), graders }
    }

    /// No more than are wanted.
    pub(crate) fn at_most(self, guests_max: Option<usize>) -> Self {
        let wanted = guests_max.map_or(u32::MAX, |guests| u32::try_from(guests).unwrap_or(u32::MAX));
        Self { attempts: self.attempts.min(wanted.max(1)), ..self }
    }

    /// The pool, or none where instances are made on demand.
    pub(crate) fn pool(self, settings: &SandboxSettings) -> InstanceAllocationStrategy {
        let total = self.attempts + self.graders;
        let mut pool = PoolingAllocationConfig::new();
        match self.profile {
            // What is kept resident between two attempts is what a small guest touches: not a page of it has to be
            // asked of the kernel again.
            EngineProfile::Small => pool
                .total_component_instances(total)
                .total_core_instances(total.saturating_mul(4))
                .total_memories(total)
                .total_tables(total.saturating_mul(2))
                .total_stacks(total)
                .max_memories_per_component(1)
                .max_memory_size(usize::try_from(small_memory_bytes(settings)).unwrap_or(usize::MAX))
                .linear_memory_keep_resident(1_280 << 10)
                .table_keep_resident(64 << 10)
                .async_stack_keep_resident(64 << 10),
            EngineProfile::Interpreter => pool
                .total_component_instances(total)
                .total_core_instances(total.saturating_mul(64))
                .total_memories(total.saturating_mul(2))
                .total_tables(total.saturating_mul(16))
                .total_stacks(total)
                .max_component_instance_size(4 << 20)
                .max_core_instance_size(8 << 20)
                .max_memory_size(usize::try_from(INTERPRETER_MEMORY_BYTES_MAX).unwrap_or(usize::MAX))
                .linear_memory_keep_resident(48 << 20)
                .table_keep_resident(512 << 10)
                .async_stack_keep_resident(64 << 10),
            EngineProfile::LongLived => return InstanceAllocationStrategy::OnDemand,
        };
        pool.table_elements(TABLE_ELEMENTS_MAX).pagemap_scan(Enabled::Auto);
        InstanceAllocationStrategy::Pooling(pool)
    }
}

fn small_slots(maps_max: u32) -> u32 {
    (maps_max.saturating_sub(MAPS_OF_PROCESS) / MAPS_PER_SLOT).clamp(2 * GRADER_SLOTS, SMALL_SLOTS_MAX)
}

fn interpreter_slots(memory_bytes: u64) -> u32 {
    u32::try_from(memory_bytes / INTERPRETER_BYTES).unwrap_or(u32::MAX).clamp(32, INTERPRETER_SLOTS_MAX)
}

/// Memory mappings that the kernel grants to one process.
fn maps_max() -> u32 {
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    text.trim().parse().unwrap_or(MAPS_MAX_DEFAULT)
}

/// The machine's memory in bytes; a cautious guess where it does not say.
fn memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse::<u64>().ok());
    kib.map_or(4 << 30, |kib| kib.saturating_mul(1_024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_thousand_small_guests_fit_the_kernels_default() {
        let slots = small_slots(MAPS_MAX_DEFAULT);
        assert!(slots >= 10_000 + 4_000 + GRADER_SLOTS, "{slots}");
        assert!(slots * MAPS_PER_SLOT + MAPS_OF_PROCESS <= MAPS_MAX_DEFAULT);
        assert_eq!(small_slots(0), 2 * GRADER_SLOTS);
    }

    #[test]
    fn a_recording_names_what_a_guest_could_notice() {
        let name = name(EngineProfile::Small, 524_288, true);
        assert_eq!(
            name,
            "wasmtime 48, profile small, stack 524288 bytes, NaN canonical, relaxed SIMD deterministic, fuel counted"
        );
    }
}
