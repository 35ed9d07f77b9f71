//! Limits that no misbehaviour of the other files reaches: core instances, counted instructions, silence.

use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::span::SpanBody;
use fulgurite_runner::RolloutResult;
use nasty_agent::{Behaviour, Input};

use crate::bench::{expect, limits};
use crate::case::{Case, Expected, Model};
use crate::text::{AgentText, grader, instances};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = too_many_instances();
    cases.extend(out_of_fuel());
    cases.extend(silent());
    cases
}

fn too_many_instances() -> Vec<Case> {
    let many = || AgentText { lowered: instances(70), ..AgentText::default() }.text();
    let as_many = |limits: &mut Limits| limits.instances_max = 100;
    let limit = |kind| Expected::limit(kind, "instances_max", limits().instances_max);
    let healthy = Input::new(Behaviour::Healthy);
    vec![
        Case::component("too-many-instances", many(), limit(OutcomeKind::MemoryLimit)),
        // The same component lives where it may: it is the limit that ends it, not its make.
        Case::component("as-many-instances-as-it-may", many(), Expected::completes()).with_limits(as_many),
        Case::grader_component(
            "too-many-instances",
            grader(&instances(70), "i32.const 32"),
            limit(OutcomeKind::GraderFault),
        ),
        Case::agent("one-instance-for-the-tool", &healthy, Expected::limit(OutcomeKind::ToolFault, "instances_max", 1))
            .with_limits(|limits| limits.instances_max = 1),
    ]
}

/// Instructions that every case of these may use. The prebuilt guests need less than a tenth of it to start.
const FUEL_MAX: u64 = 20_000_000;

/// With so much time that it is never what ends a guest, however slow the machine is.
fn counted(case: Case) -> Case {
    case.with_limits(|limits| (limits.fuel_max, limits.guest_cpu_ms_max) = (FUEL_MAX, 600_000))
}

fn out_of_fuel() -> Vec<Case> {
    let limit = |kind| Expected::limit(kind, "fuel_max", FUEL_MAX);
    let agent = |name, behaviour, expected| counted(Case::agent(name, &Input::new(behaviour), expected));
    // Five instructions a round: a million rounds fit everywhere, ten million nowhere.
    let rounds = |name, fields, expected| {
        let run = "(local $n i32) (local.set $n (global.get $rounds))
            (loop $l (local.set $n (i32.sub (local.get $n) (i32.const 1))) (br_if $l (local.get $n))) i32.const 512";
        counted(Case::component(name, AgentText { fields, run, ..AgentText::default() }.text(), expected))
    };
    let start = "(func $start (loop $l br $l)) (start $start)";
    vec![
        agent("enough-fuel", Behaviour::Healthy, Expected::completes()),
        agent("out-of-fuel", Behaviour::Loop, limit(OutcomeKind::CpuLimit)),
        agent("out-of-fuel-among-host-calls", Behaviour::LoopWithHostCalls, limit(OutcomeKind::CpuLimit)),
        counted(Case::component(
            "out-of-fuel-at-birth",
            AgentText { fields: start, ..AgentText::default() }.text(),
            limit(OutcomeKind::CpuLimit),
        )),
        rounds("fuel-that-suffices", "(global $rounds i32 (i32.const 1000000))", Expected::completes()),
        rounds("out-of-fuel", "(global $rounds i32 (i32.const 10000000))", limit(OutcomeKind::CpuLimit)),
        counted(Case::tool("out-of-fuel", nasty_tool::Behaviour::Loop, limit(OutcomeKind::ToolFault))),
        counted(Case::opening("out-of-fuel", nasty_tool::Opening::Loop, limit(OutcomeKind::ToolFault))),
        counted(Case::grader("out-of-fuel", nasty_grader::Behaviour::Loop, limit(OutcomeKind::GraderFault))),
    ]
}

/// Milliseconds of silence.
const HEARTBEAT_MS_MAX: u64 = 150;

fn silent() -> Vec<Case> {
    let case = |name, behaviour, holds| {
        let expected = Expected::limit(OutcomeKind::Unresponsive, "heartbeat_ms_max", HEARTBEAT_MS_MAX).and(holds);
        Case::agent(name, &Input::new(behaviour), expected)
            .with_model(Model::Silent)
            .with_limits(|limits| limits.heartbeat_ms_max = HEARTBEAT_MS_MAX)
    };
    vec![
        case("silent-model", Behaviour::Healthy, nothing_was_answered),
        // What it did before it fell silent is kept.
        case("silent-model-in-a-span", Behaviour::Converse, |result| {
            nothing_was_answered(result)?;
            let outer = result.spans.iter().any(|span| span.name == "outer" && matches!(span.body, SpanBody::Guest));
            expect(outer, || format!("{:?}", result.spans))
        }),
    ]
}

fn nothing_was_answered(result: &RolloutResult) -> Result<(), String> {
    let answered = result.spans.iter().any(|span| matches!(&span.body, SpanBody::Llm(call) if call.result.is_ok()));
    expect(!answered, || format!("{:?}", result.spans))
}
