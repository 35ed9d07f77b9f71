//! Generated rollouts: programs that nobody wrote, with a model that answers when it likes.

use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::seed::Seed;
use nasty_agent::program::Step;
use proptest::prelude::*;
use serde_json::json;

use crate::support::{Bench, Model, drawn_program, job, limits, plugins, program, shown};

const ROLLOUTS: u64 = 10_000;

#[test]
fn ten_thousand_generated_rollouts_are_replayed_identically() {
    let runtime =
        |threads| tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().unwrap();
    let bench = Bench::new();
    let recording = runtime(2);
    let results = recording.block_on(async {
        let runner = bench.runner(plugins(), limits());
        let jobs = (0..ROLLOUTS).map(|number| {
            let steps = drawn_program(Seed::new(number).child("program"));
            job(&runner, &format!("generated-{number}"), number, &program(steps), &json!({"room": number}))
        });
        bench.record(&runner, jobs.collect(), Model::Moody).await
    });
    drop(recording);
    // What is generated has to be worth it.
    let of_kind = |kind| results.iter().filter(|result| result.outcome.kind == kind).count();
    let (completed, trapped) = (of_kind(OutcomeKind::Completed), of_kind(OutcomeKind::Trap));
    assert!(completed > 7_000 && trapped > 50, "{completed} completed, {trapped} trapped");
    assert!(of_kind(OutcomeKind::ToolFault) > 20 && of_kind(OutcomeKind::LlmUnavailable) > 20);
    assert_eq!(of_kind(OutcomeKind::HostFault), 0);
    assert!(results.iter().map(|result| result.spans.len()).sum::<usize>() > 80_000);

    // Other threads, in another order.
    let ids: Vec<_> = results.into_iter().map(|result| result.spec.id.clone()).collect();
    let different = runtime(3).block_on(bench.different(&ids, plugins(), 32));
    let first = different.first().map(shown);
    assert!(different.is_empty(), "{} are different, such as {}", different.len(), first.unwrap_or_default());
}

fn step() -> impl Strategy<Value = Step> {
    let tool = prop_oneof![Just("count"), Just("echo"), Just("fail"), Just("trap"), Just("loop")];
    let tool = tool.prop_map(str::to_owned);
    let number = 0..4_usize;
    prop_oneof![
        4 => Just(Step::Chat),
        1 => prop_oneof![Just(0.0), Just(-1.0), Just(1e31)].prop_map(Step::ChatWith),
        4 => Just(Step::Start),
        2 => number.clone().prop_map(Step::Finish),
        2 => number.clone().prop_map(Step::Next),
        2 => number.clone().prop_map(Step::Drop),
        2 => number.clone().prop_map(Step::WaitAny),
        2 => tool.clone().prop_map(Step::Tool),
        3 => tool.prop_map(Step::StartTool),
        2 => number.clone().prop_map(Step::FinishTool),
        2 => number.clone().prop_map(Step::Ready),
        1 => number.clone().prop_map(Step::DropTool),
        1 => number.clone().prop_map(Step::WaitAnyTool),
        1 => Just(Step::List),
        1 => any::<f64>().prop_filter("JSON has no such number", |number| number.is_finite()).prop_map(Step::Number),
        1 => Just(Step::Reward(-0.0)),
        1 => Just(Step::Random),
        1 => Just(Step::Clock),
        1 => any::<u64>().prop_map(Step::Sleep),
        1 => any::<bool>().prop_map(Step::Print),
        2 => Just(Step::Open),
        1 => Just(Step::Annotate),
        1 => number.prop_map(Step::Close),
        1 => Just(Step::Render),
        1 => Just(Step::Trap),
        1 => Just(Step::GiveUp),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_program_is_replayed_identically(steps in prop::collection::vec(step(), 0..40), seed: u64) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let bench = Bench::new();
        let report = runtime.block_on(async {
            let limits = fulgurite_core::limits::Limits { guest_cpu_ms_max: 20, ..limits() };
            let runner = bench.runner(plugins(), limits);
            let job = job(&runner, "any", seed, &program(steps), &json!({}));
            let id = job.spec.id.clone();
            bench.record(&runner, vec![job], Model::Moody).await;
            bench.replay(&id, plugins()).await
        });
        prop_assert!(report.divergence.is_none(), "{}", shown(&report));
    }
}
