//! What every guest has, whatever its world: WASI with everything denied, a virtual clock, seeded random, limits.

use std::sync::Arc;

use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use wasmtime::component::{HasSelf, Linker, ResourceTable};
use wasmtime::{Store, UpdateDeadline};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use crate::clock::VirtualClock;
use crate::engine::World;
use crate::fault::{Bounds, During, outcome_of, truncate};
use crate::limits::Limiter;
use crate::meter::{Meter, Tick};
use crate::output::{GuestOutput, GuestStream};
use crate::random::GuestRandom;
use crate::seeds::SeedSource;

/// Bounds of the guests of an attempt.
pub(crate) fn attempt_bounds(limits: &Limits) -> Bounds {
    Bounds {
        payload_bytes_max: limits.payload_bytes_max,
        handles_max: limits.handles_max,
        instances_max: limits.instances_max,
        stack_bytes_max: limits.stack_bytes_max,
        fuel_max: limits.fuel_max,
    }
}

/// Most bytes of standard error in the detail of an outcome.
const SAID_BYTES_MAX: usize = 1_000;

/// The data of a store. `host` is what the guest's world needs.
pub(crate) struct GuestState<H> {
    wasi: WasiCtx,
    pub(crate) table: ResourceTable,
    pub(crate) clock: Arc<VirtualClock>,
    pub(crate) random: GuestRandom,
    limiter: Limiter,
    pub(crate) meter: Arc<Meter>,
    pub(crate) host: H,
}

impl<H: Send + 'static> WasiView for GuestState<H> {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

/// What a guest is started with.
pub(crate) struct GuestSetup<'a> {
    pub(crate) limits: &'a Limits,
    pub(crate) seeds: SeedSource,
    pub(crate) clock: Arc<VirtualClock>,
    pub(crate) meter: Arc<Meter>,
    pub(crate) output: Arc<GuestOutput>,
    pub(crate) bounds: Bounds,
}

/// A fresh store.
///
/// # Errors
/// A host fault when the limits ask for what this engine was not made for.
pub(crate) fn store<H: Send + 'static>(
    world: &World,
    setup: GuestSetup<'_>,
    host: H,
) -> Result<Store<GuestState<H>>, AttemptOutcome> {
    check_engine(world, setup.limits)?;
    let fuel = if setup.limits.fuel_max == 0 { u64::MAX } else { setup.limits.fuel_max };
    let handles_max = usize::try_from(setup.bounds.handles_max).unwrap_or(usize::MAX);
    let wasi = WasiCtx::builder()
        .stdout(GuestStream { output: Arc::clone(&setup.output), name: "stdout" })
        .stderr(GuestStream { output: setup.output, name: "stderr" })
        .allow_tcp(false)
        .allow_udp(false)
        .allow_ip_name_lookup(false)
        .build();
    let mut table = ResourceTable::new();
    table.set_max_capacity(handles_max);
    let state = GuestState {
        wasi,
        table,
        clock: setup.clock,
        random: GuestRandom::new(setup.seeds, setup.bounds.payload_bytes_max),
        limiter: Limiter::new(setup.limits, world.memory_bytes_max()),
        meter: setup.meter,
        host,
    };
    let mut store = Store::new(&world.engine, state);
    if world.fuel
        && let Err(error) = store.set_fuel(fuel)
    {
        return Err(AttemptOutcome::failed(OutcomeKind::HostFault, format!("cannot count instructions: {error}")));
    }
    store.limiter(|state| &mut state.limiter);
    store.set_hostcall_fuel(usize::try_from(setup.bounds.payload_bytes_max).unwrap_or(usize::MAX));
    store.set_max_component_handles(handles_max);
    store.set_epoch_deadline(1);
    store.epoch_deadline_callback(|context| {
        let meter = &context.data().meter;
        match meter.tick() {
            Tick::Continue => Ok(UpdateDeadline::Continue(1)),
            Tick::Yield => Ok(UpdateDeadline::Yield(1)),
            Tick::Exhausted => Err(meter.exhausted().error()),
        }
    });
    Ok(store)
}

fn check_engine(world: &World, limits: &Limits) -> Result<(), AttemptOutcome> {
    let fail = |problem: String| Err(AttemptOutcome::failed(OutcomeKind::HostFault, problem));
    if limits.fuel_max > 0 && !world.fuel {
        return fail("fuel_max is set, and the engine was started without counting instructions".to_owned());
    }
    if limits.stack_bytes_max != world.stack_bytes_max {
        let (asked, made) = (limits.stack_bytes_max, world.stack_bytes_max);
        return fail(format!("stack_bytes_max is {asked}, and the engine was started with {made}"));
    }
    Ok(())
}

/// Links WASI p2. Everything is there, so that any standard library links; nothing in it reaches the machine.
pub(crate) fn link_wasi<H: Send + 'static>(linker: &mut Linker<GuestState<H>>) -> wasmtime::Result<()> {
    use wasmtime_wasi::p2::bindings::{clocks, random};
    wasmtime_wasi::p2::add_to_linker_async(linker)?;
    linker.allow_shadowing(true);
    clocks::monotonic_clock::add_to_linker::<_, HasSelf<GuestState<H>>>(linker, |state| state)?;
    clocks::wall_clock::add_to_linker::<_, HasSelf<GuestState<H>>>(linker, |state| state)?;
    random::random::add_to_linker::<_, HasSelf<GuestState<H>>>(linker, |state| state)?;
    random::insecure::add_to_linker::<_, HasSelf<GuestState<H>>>(linker, |state| state)?;
    random::insecure_seed::add_to_linker::<_, HasSelf<GuestState<H>>>(linker, |state| state)?;
    linker.allow_shadowing(false);
    Ok(())
}

/// The outcome of an error, with what the guest last said on standard error.
pub(crate) fn fault(error: &wasmtime::Error, during: During, bounds: Bounds, output: &GuestOutput) -> AttemptOutcome {
    let mut outcome = outcome_of(error, during, bounds);
    let _ = output.flush();
    let mut said = output.last_said();
    truncate(&mut said, SAID_BYTES_MAX);
    if outcome.kind == OutcomeKind::Trap && !said.is_empty() {
        outcome.detail = format!("{}\nlast lines of standard error:\n{said}", outcome.detail);
    }
    outcome
}
