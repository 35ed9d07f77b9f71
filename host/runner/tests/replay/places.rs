//! Where and when a recording is replayed does not matter: in another engine, from a store that was closed, with other
//! threads, under load, after a retry.

use std::collections::BTreeMap;
use std::sync::Arc;

use fulgurite_core::id::{AttemptKey, AttemptNumber};
use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::seed::Seed;
use fulgurite_runner::replay::{Items, Recorded, ReplayError, Replayer};
use fulgurite_runner::{Recording, RetryPolicy, RewardTerms, Runner, RunnerGrants, RunnerSettings};
use fulgurite_sandbox::{Sandbox, SandboxSettings, Templates};
use fulgurite_store::{RolloutStore, SledStore};
use nasty_agent::Behaviour;
use serde_json::json;

use crate::support::{
    Backend, Bench, Forbidden, Model, assert_identical, behave, drawn_program, job, limits, plugins, plugins_of,
    program,
};

#[test]
fn a_store_that_was_closed_another_engine_and_other_threads() {
    let folder = tempfile::tempdir().unwrap();
    let runtime =
        |threads| tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().unwrap();
    let ids = runtime(2).block_on(async {
        let bench = Bench { store: Arc::new(SledStore::open(folder.path()).unwrap()) };
        let runner = bench.runner(plugins(), limits());
        let programs = (0..60).map(|number| {
            let steps = drawn_program(Seed::new(number).child("places"));
            job(&runner, &format!("places-{number}"), number, &program(steps), &json!({}))
        });
        let results = bench.record(&runner, programs.collect(), Model::Moody).await;
        results.into_iter().map(|result| result.spec.id.clone()).collect::<Vec<_>>()
    });
    let store: Arc<dyn RolloutStore> = Arc::new(SledStore::open(folder.path()).unwrap());
    let bench = Bench { store: Arc::clone(&store) };
    for threads in [1, 4] {
        let different = runtime(threads).block_on(async {
            let other = Sandbox::new(SandboxSettings::default()).unwrap();
            bench.different(&ids, plugins_of(&other), 100).await
        });
        assert!(different.is_empty(), "{}", crate::support::shown(&different[0]));
    }
    let recorded = bench.load(&ids[0]);
    let mut settings = bench.settings(&recorded);
    settings.engine.push('!');
    assert!(matches!(Replayer::new(plugins(), &settings, 1).unwrap_err(), ReplayError::Engine { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_at_once_while_others_are_recorded_and_no_model_is_asked() {
    let bench = Bench::new();
    let runner = bench.runner(plugins(), limits());
    let jobs = (0..100).map(|number| {
        let steps = drawn_program(Seed::new(number).child("load"));
        job(&runner, &format!("load-{number}"), number, &program(steps), &json!({}))
    });
    let jobs: Vec<_> = jobs.collect();
    let backend = Backend::new(Model::Moody);
    let results = runner.submit(jobs.clone(), Arc::new(backend.clone())).await.unwrap().all().await.unwrap();
    let asked = backend.asked();
    let others =
        (0..300).map(|number| job(&runner, &format!("other-{number}"), number, &behave(Behaviour::Work), &json!({})));
    let busy = Backend::new(Model::Answers);
    let others = runner.submit(others.collect(), Arc::new(busy.clone())).await.unwrap();
    let ids: Vec<_> = results.iter().map(|result| result.spec.id.clone()).collect();
    let different = bench.different(&ids, plugins(), 100).await;
    assert!(different.is_empty(), "{}", crate::support::shown(&different[0]));
    others.all().await.unwrap();
    assert_eq!((backend.asked(), busy.asked()), (asked, 900));
    // Finished rollouts are answered from the store: no session is even opened.
    let again = runner.submit(jobs, Arc::new(Forbidden)).await.unwrap().all().await.unwrap();
    assert_eq!(again.len(), 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_attempt_of_a_rollout_that_was_tried_again_can_be_replayed() {
    let bench = Bench::new();
    let settings = RunnerSettings {
        grants: RunnerGrants::default(),
        control: None,
        live_max: 4,
        retry: RetryPolicy { attempts_max: 3, by_kind: BTreeMap::new() },
        limits: Limits { attempt_wall_ms_max: 50, ..limits() },
        outcome_reward: BTreeMap::new(),
        outcome_dimensions: std::collections::BTreeSet::new(),
        reward_terms: RewardTerms::default(),
        templates: Arc::new(Templates::none()),
        recording: Recording::Durable,
        worker: "test".to_owned(),
    };
    let runner = Runner::new(Arc::clone(&bench.store), plugins(), settings).unwrap();
    for (name, model, kind) in [
        ("down", Model::DownFrom(1), OutcomeKind::LlmUnavailable),
        ("silent", Model::SilentFrom(1), OutcomeKind::WallTimeout),
    ] {
        let job = job(&runner, name, 1, &behave(Behaviour::Converse), &json!({}));
        let id = job.spec.id.clone();
        let result = bench.record(&runner, vec![job], model).await.remove(0);
        assert_eq!((result.outcome.kind, result.attempt.key.attempt), (kind, AttemptNumber(3)));
        for attempt in 1..=3 {
            let key = AttemptKey { rollout: id.clone(), attempt: AttemptNumber(attempt) };
            let recorded = Recorded::load(&*bench.store, &key, &Items::default()).unwrap();
            assert_identical(&bench.replayer(&recorded, plugins()).replay(&recorded, None).await);
        }
        let unknown = AttemptKey { rollout: id, attempt: AttemptNumber(4) };
        assert!(matches!(Recorded::load(&*bench.store, &unknown, &Items::default()), Err(ReplayError::Missing { .. })));
    }
}
