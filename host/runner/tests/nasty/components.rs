//! What components written by hand do.

use fulgurite_core::outcome::OutcomeKind;
use fulgurite_sandbox::PluginError;

use crate::bench::limits;
use crate::case::{Case, Expected};
use crate::text::{
    AgentText, LOWER_RANDOM, LOWER_STDOUT, LOWER_TEMPLATE, RANDOM, STDOUT, TEMPLATES, grader, instances,
};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = starting();
    cases.extend(calling());
    cases.extend(calling_wasi());
    cases.extend(returning());
    cases.extend(grading());
    cases.extend(refused());
    cases
}

fn cpu() -> Expected {
    Expected::limit(OutcomeKind::CpuLimit, "guest_cpu_ms_max", limits().guest_cpu_ms_max)
}

fn memory() -> Expected {
    Expected::limit(OutcomeKind::MemoryLimit, "memory_bytes_max", limits().memory_bytes_max)
}

fn table() -> Expected {
    Expected::limit(OutcomeKind::MemoryLimit, "table_elements_max", limits().table_elements_max)
}

fn payload() -> Expected {
    Expected::limit(OutcomeKind::OutputLimit, "payload_bytes_max", limits().payload_bytes_max)
}

fn trap(says: &'static str) -> Expected {
    Expected::ends(OutcomeKind::Trap, says)
}

/// Before `run` is called, and in it.
fn starting() -> Vec<Case> {
    let with = |name, fields, run, expected| {
        Case::component(name, AgentText { fields, run, ..AgentText::default() }.text(), expected)
    };
    let start = |name, fields, expected| with(name, fields, "i32.const 512", expected);
    vec![
        Case::component("control", AgentText::default().text(), Expected::completes()),
        Case::component(
            "ten-instances",
            AgentText { lowered: instances(10), ..AgentText::default() }.text(),
            Expected::completes(),
        ),
        start("start-never-returns", "(func $start (loop $l br $l)) (start $start)", cpu()),
        start("start-traps", "(func $start unreachable) (start $start)", trap("unreachable")),
        start(
            "start-memory-bomb",
            "(func $start (loop $l (drop (memory.grow (i32.const 1))) br $l)) (start $start)",
            memory(),
        ),
        with(
            "table-bomb",
            "(table $t 1 funcref)",
            "(loop $l (drop (table.grow $t (ref.null func) (i32.const 100))) br $l) i32.const 512",
            table(),
        ),
        start("table-bomb-at-birth", "(table 20000 funcref)", table()),
        Case::component("memory-bomb-at-birth", AgentText { memory: "200", ..AgentText::default() }.text(), memory()),
        with(
            "table-beyond-the-end",
            "(table 1 funcref)",
            "(table.get 0 (i32.const 1)) drop i32.const 512",
            trap("table"),
        ),
    ]
}

/// While the host hands something over: the item's input before `run`, or the answer of a call in the middle of it.
fn calling() -> Vec<Case> {
    // `template("huge")` or `template("greeting")`, whose names stand at 0; the answer goes to 600.
    const HANDED: &str = r#"(export "template" (func $template))"#;
    const FIELDS: &str = r#"(import "host" "template" (func $template (param i32 i32 i32)))
        (data (i32.const 0) "greeting") (data (i32.const 16) "huge")"#;
    const ASK: &str = "(call $template (i32.const 0) (i32.const 8) (i32.const 600)) i32.const 512";
    let asks = |name, realloc, run, expected| {
        let text = AgentText {
            imports: TEMPLATES,
            lowered: LOWER_TEMPLATE.to_owned(),
            handed: HANDED,
            fields: FIELDS,
            realloc,
            run,
            ..AgentText::default()
        };
        Case::component(name, text.text(), expected)
    };
    // The first call of `realloc` is for the input, whose length is not that of the answer: 16 bytes.
    vec![
        asks("asks", "i32.const 4096", ASK, Expected::completes()),
        asks(
            "traps-in-a-callback",
            "(if (i32.eq (local.get $size) (i32.const 16)) (then unreachable)) i32.const 4096",
            ASK,
            trap("unreachable"),
        ),
        asks(
            "loops-in-a-callback",
            "(if (i32.eq (local.get $size) (i32.const 16)) (then (loop $l br $l))) i32.const 4096",
            ASK,
            cpu(),
        ),
        asks(
            "takes-memory-in-a-callback",
            "(if (i32.eq (local.get $size) (i32.const 16)) (then (loop $l (drop (memory.grow (i32.const 1))) br $l)))
             i32.const 4096",
            ASK,
            memory(),
        ),
        asks(
            "points-beyond-the-end",
            "(select (i32.const -16) (i32.const 4096) (i32.eq (local.get $size) (i32.const 16)))",
            ASK,
            trap("beyond end of memory"),
        ),
        asks("traps-while-it-is-called", "unreachable", ASK, trap("unreachable")),
        asks("loops-while-it-is-called", "(loop $l br $l) unreachable", ASK, cpu()),
        asks(
            "huge-template",
            "i32.const 4096",
            "(call $template (i32.const 16) (i32.const 4) (i32.const 600)) i32.const 512",
            payload(),
        ),
        asks(
            "name-beyond-the-end",
            "i32.const 4096",
            "(call $template (i32.const 0) (i32.const 0x40000000) (i32.const 600)) i32.const 512",
            trap("out of bounds"),
        ),
        asks(
            "answer-beyond-the-end",
            "i32.const 4096",
            "(call $template (i32.const 0) (i32.const 8) (i32.const -4)) i32.const 512",
            trap("out of bounds"),
        ),
    ]
}

/// Numbers that the host would have to pay for.
fn calling_wasi() -> Vec<Case> {
    let random = AgentText {
        imports: RANDOM,
        lowered: LOWER_RANDOM.to_owned(),
        handed: r#"(export "bytes" (func $bytes))"#,
        fields: r#"(import "host" "bytes" (func $bytes (param i64 i32)))"#,
        run: "(call $bytes (i64.const 0x10000000000) (i32.const 600)) i32.const 512",
        ..AgentText::default()
    };
    let zeroes = AgentText {
        imports: STDOUT,
        lowered: LOWER_STDOUT.to_owned(),
        handed: r#"(export "stdout" (func $stdout)) (export "zeroes" (func $zeroes))"#,
        fields: r#"(import "host" "stdout" (func $stdout (result i32)))
            (import "host" "zeroes" (func $zeroes (param i32 i64 i32)))"#,
        run: "(call $zeroes (call $stdout) (i64.const 0x10000000000) (i32.const 600)) i32.const 512",
        ..AgentText::default()
    };
    vec![
        Case::component("terabyte-of-random", random.text(), payload()),
        Case::component("terabyte-of-zeroes", zeroes.text(), trap("more zeroes")),
    ]
}

/// Names the function that the host calls when it has read the result.
const POST: &str = r#"(post-return (func $main "post"))"#;

/// With what it returns.
fn returning() -> Vec<Case> {
    let returns = |name, fields, run, options, expected| {
        Case::component(name, AgentText { fields, run, options, ..AgentText::default() }.text(), expected)
    };
    let result = |name, run, expected| returns(name, "", run, "", expected);
    vec![
        result("result-beyond-the-end", "i32.const -4", trap("out of bounds")),
        result(
            "text-of-a-gigabyte",
            "(i32.store (i32.const 520) (i32.const 0x40000000)) i32.const 512",
            trap("out of bounds"),
        ),
        result("text-that-is-not-utf-8", "(i32.store8 (i32.const 1025) (i32.const 255)) i32.const 512", trap("utf-8")),
        result(
            "neither-result-nor-error",
            "(i32.store8 (i32.const 512) (i32.const 7)) i32.const 512",
            trap("discriminant"),
        ),
        result(
            "an-error-that-is-none",
            "(i32.store8 (i32.const 512) (i32.const 1)) (i32.store8 (i32.const 516) (i32.const 9)) i32.const 512",
            trap("discriminant"),
        ),
        result(
            "text-that-is-not-json",
            "(i32.store8 (i32.const 1024) (i32.const 0x7b)) i32.const 512",
            Expected::ends(OutcomeKind::AgentError, "not JSON"),
        ),
        // Brackets, too many for whoever parses by recursion.
        result(
            "json-that-is-too-deep",
            "(memory.fill (i32.const 8192) (i32.const 0x5b) (i32.const 40000))
             (memory.fill (i32.const 48192) (i32.const 0x5d) (i32.const 40000))
             (i32.store (i32.const 516) (i32.const 8192)) (i32.store (i32.const 520) (i32.const 80000)) i32.const 512",
            Expected::ends(OutcomeKind::AgentError, "not JSON"),
        ),
        returns(
            "traps-after-it-has-returned",
            r#"(func (export "post") (param i32) unreachable)"#,
            "i32.const 512",
            POST,
            trap("unreachable"),
        ),
        returns(
            "loops-after-it-has-returned",
            r#"(func (export "post") (param i32) (loop $l br $l))"#,
            "i32.const 512",
            POST,
            cpu(),
        ),
    ]
}

/// Graders. A result at 32 is a list of rewards: its place and its length.
fn grading() -> Vec<Case> {
    let rewards = |length: u32| {
        let body = format!(
            "(i32.store (i32.const 36) (i32.const 1024)) (i32.store (i32.const 40) (i32.const {length})) i32.const 32"
        );
        grader("", &body)
    };
    let fault = |says| Expected::ends(OutcomeKind::GraderFault, says);
    let payload = Expected::limit(OutcomeKind::GraderFault, "payload_bytes_max", limits().payload_bytes_max);
    vec![
        Case::grader_component("no-rewards", rewards(0), Expected::completes()),
        Case::grader_component("nameless-reward", rewards(1), fault("0 bytes")),
        Case::grader_component("claims-2-30-rewards", rewards(1 << 30), fault("out of bounds")),
        // As many as its memory holds, all of them zero.
        Case::grader_component("reward-flood", rewards(50_000), payload),
    ]
}

/// Not even loaded.
fn refused() -> Vec<Case> {
    let imports = |name, imports, says, fits| {
        Case::component(name, AgentText { imports, ..AgentText::default() }.text(), Expected::Refused { says, fits })
    };
    let not_offered = |error: &PluginError| matches!(error, PluginError::ImportNotOffered { .. });
    let version = |error: &PluginError| matches!(error, PluginError::UnknownVersion { .. });
    let invalid = |error: &PluginError| matches!(error, PluginError::Invalid { .. });
    let grader_that_asks = grader(
        r#"(import "fulgurite:agent/resources@0.1.0" (instance (export "version" (func (result u64)))))"#,
        "i32.const 32",
    );
    vec![
        imports(
            "reaches-for-its-grader",
            r#"(import "grade" (func (param "input" string) (result string)))"#,
            "asks for grade, which an agent is not given",
            not_offered,
        ),
        imports(
            "reaches-for-another-rollout",
            r#"(import "fulgurite:algorithm/trajectories@0.1.0" (instance (export "read" (func (result string)))))"#,
            "fulgurite:algorithm/trajectories@0.1.0, which an agent is not given",
            not_offered,
        ),
        imports(
            "asks-for-http",
            r#"(import "wasi:http/outgoing-handler@0.2.6" (instance (export "handle" (func))))"#,
            "wasi:http/outgoing-handler@0.2.6, which an agent is not given",
            not_offered,
        ),
        imports(
            "asks-for-what-there-is-not",
            r#"(import "fulgurite:agent/task@0.1.0" (instance (export "reference" (func (result string)))))"#,
            "reference",
            |error| matches!(error, PluginError::Incompatible { .. }),
        ),
        imports(
            "unknown-version",
            r#"(import "fulgurite:agent/task@0.9.0" (instance (export "seed" (func (result u64)))))"#,
            "built against fulgurite:agent@0.9.0, and this host offers 0.1.0",
            version,
        ),
        Case::grader_component(
            "asks-for-templates",
            grader_that_asks,
            Expected::Refused { says: "which a grader is not given", fits: not_offered },
        ),
        Case::component(
            "memory-that-no-pool-has",
            AgentText { memory: "65536", ..AgentText::default() }.text(),
            Expected::Refused { says: "memory", fits: invalid },
        ),
        Case::component(
            "table-that-no-pool-has",
            AgentText { fields: "(table 10000000 funcref)", ..AgentText::default() }.text(),
            Expected::Refused { says: "table", fits: invalid },
        ),
    ]
}
