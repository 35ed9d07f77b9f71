//! Lists against a naive reference, forks, blobs and workers, over every store.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "support/samples.rs"]
#[allow(dead_code, reason = "shared with tests that use more of it")]
mod samples;

use fulgurite_core::id::{AttemptKey, AttemptNumber, ContentHash};
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::record::{AttemptRecord, RolloutMode, WorkerRecord};
use fulgurite_core::reward::Reward;
use fulgurite_core::span::Span;
use fulgurite_core::state::{AttemptState, RolloutState};
use fulgurite_store::{
    AttemptFinish, AttemptQuery, BodyKind, Cursor, MemoryStore, Page, ResourceQuery, RolloutQuery, RolloutRow,
    RolloutSort, RolloutStore, SledStore, SpanQuery, StoreError, WorkerQuery,
};
use proptest::prelude::*;
use samples::{fork, key, reward, rollout_id, spans, spec};

/// Runs a test over every store; those on disk are closed and opened again where the test says so.
fn over_all_stores(test: impl Fn(&mut dyn FnMut(&dyn Fn(&dyn RolloutStore)))) {
    let memory = MemoryStore::new();
    test(&mut |part| part(&memory));
    let dir = tempfile::tempdir().unwrap();
    test(&mut |part| part(&SledStore::open(dir.path()).unwrap()));
}

fn end(key: &AttemptKey, kind: OutcomeKind, rewards: Vec<Reward>, from: u64, count: u64, end: u64) -> AttemptFinish {
    let graded = kind.is_graded();
    AttemptFinish {
        key: key.clone(),
        state: if graded { AttemptState::Succeeded } else { AttemptState::Failed },
        outcome: AttemptOutcome::failed(kind, "detail"),
        rewards,
        end_unix_ns: end,
        guest_cpu_us: 1,
        not_forkable: (kind == OutcomeKind::Trap).then(|| "it called out".to_owned()),
        spans: spans(key, from, count).into(),
        rollout_state: if graded { RolloutState::Succeeded } else { RolloutState::Failed },
    }
}

/// 40 rollouts of many sorts: some queued, some live, some forks, some tried twice.
fn fill(store: &dyn RolloutStore) {
    store.enqueue((0..36).map(spec).collect()).unwrap();
    for index in 0..30_u64 {
        let worker = ["", "alpha", "beta"][usize::try_from(index % 3).unwrap()];
        let mut attempt = store.begin_attempt(&rollout_id(index), 100, worker).unwrap().key;
        if index % 7 == 3 {
            attempt = store.begin_attempt(&rollout_id(index), 200, "gamma").unwrap().key;
        }
        if index % 5 == 4 {
            continue;
        }
        store.mark_running(&attempt).unwrap();
        let kind = if index % 4 == 1 { OutcomeKind::Trap } else { OutcomeKind::Completed };
        let rewards = match index % 6 {
            0 => vec![],
            1 => vec![Reward { dimension: "style".to_owned(), ..reward(9.0) }, reward(1.0), reward(0.5)],
            step => vec![reward(0.25 * (step as f64) - 1.0)],
        };
        let finish = end(&attempt, kind, rewards, 0, index % 9, 1_000 + index % 8);
        store.finish_attempts(vec![finish]).remove(0).unwrap();
    }
    let ancestor = key(&rollout_id(8), 1);
    store.enqueue((36..40).map(|index| fork(index, &ancestor, index % 8)).collect()).unwrap();
    store.cancel(&rollout_id(35), 5).unwrap();
}

/// All pages of a list, with a page size that does not divide anything.
fn all<T>(mut page: impl FnMut(Option<Cursor>) -> Page<T>) -> Vec<T> {
    let (mut items, mut after) = (vec![], None);
    loop {
        let mut next = page(after);
        items.append(&mut next.items);
        // Through its text, as programs do.
        after = match next.next {
            Some(cursor) => Some(cursor.to_string().parse().unwrap()),
            None => return items,
        };
    }
}

/// The query, by filtering and sorting everything.
fn reference(store: &dyn RolloutStore, query: &RolloutQuery) -> Vec<RolloutRow> {
    let everything = store.rollouts(&RolloutQuery::default()).unwrap().into_iter().map(|rollout| {
        let attempt = store.attempts(&rollout.spec.id).unwrap().pop();
        RolloutRow { rollout, attempt }
    });
    let mut rows: Vec<RolloutRow> = everything.filter(|row| query.fits(row)).collect();
    let number = |row: &RolloutRow| match query.sort {
        RolloutSort::Ordinal | RolloutSort::Id => None,
        RolloutSort::Reward => row.reward(),
        RolloutSort::Spans => row.attempt.as_ref().map(|attempt| attempt.spans as f64),
        RolloutSort::Duration => row.duration_ns().map(|ns| ns as f64),
    };
    rows.sort_by(|a, b| {
        let order = match query.sort {
            RolloutSort::Id => a.rollout.spec.id.cmp(&b.rollout.spec.id),
            _ => number(a).partial_cmp(&number(b)).unwrap().then(a.rollout.ordinal.cmp(&b.rollout.ordinal)),
        };
        if query.descending { order.reverse() } else { order }
    });
    rows
}

fn query() -> impl Strategy<Value = RolloutQuery> {
    fn maybe<T: Clone + std::fmt::Debug + 'static>(values: Vec<T>) -> impl Strategy<Value = Option<T>> {
        prop_oneof![4 => Just(None), 1 => prop::sample::select(values).prop_map(Some)]
    }
    let of_spec = (
        maybe(vec!["grpo".to_owned(), "sft".to_owned()]),
        maybe(vec![0, 2]),
        maybe(RolloutState::ALL.to_vec()),
        maybe(vec![RolloutMode::Train, RolloutMode::Test]),
        maybe(vec!["item-8".to_owned()]),
        maybe(vec![rollout_id(8), rollout_id(1)]),
    );
    let of_attempt =
        (maybe(vec![OutcomeKind::Trap, OutcomeKind::Completed]), maybe(vec![-0.5, 0.25]), maybe(vec![0.25, 1.0]));
    let sorts =
        vec![RolloutSort::Ordinal, RolloutSort::Id, RolloutSort::Reward, RolloutSort::Spans, RolloutSort::Duration];
    (of_spec, of_attempt, prop::sample::select(sorts), any::<bool>(), 1..12_usize).prop_map(
        |((stage, step, state, mode, item, fork_of), (outcome, reward_min, reward_max), sort, descending, limit)| {
            RolloutQuery {
                stage,
                step,
                state,
                mode,
                item,
                outcome,
                reward_min,
                reward_max,
                fork_of,
                sort,
                descending,
                after: None,
                offset: 0,
                limit: Some(limit),
            }
        },
    )
}

#[test]
fn pages_of_rollouts_are_what_filtering_and_sorting_everything_gives() {
    let memory = MemoryStore::new();
    let dir = tempfile::tempdir().unwrap();
    let disk = SledStore::open(dir.path()).unwrap();
    let stores: [&dyn RolloutStore; 2] = [&memory, &disk];
    stores.into_iter().for_each(fill);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let checked = runner.run(&query(), |query| {
        for store in stores {
            let expected = reference(store, &query);
            let got = all(|after| store.rollout_page(&RolloutQuery { after, ..query.clone() }).unwrap());
            prop_assert_eq!(&got, &expected);
            let offset = 3;
            let got = store.rollouts(&RolloutQuery { offset, ..query.clone() }).unwrap();
            let expected = expected.into_iter().map(|row| row.rollout).skip(offset).take(query.limit.unwrap());
            prop_assert_eq!(got, expected.collect::<Vec<_>>());
        }
        Ok(())
    });
    checked.unwrap();
}

#[test]
fn a_page_that_is_read_while_rollouts_are_added_repeats_none_and_hides_none() {
    let store = MemoryStore::new();
    store.enqueue((0..10).map(spec).collect()).unwrap();
    let mut added = 10;
    let listed = all(|after| {
        let page = store.rollout_page(&RolloutQuery { after, limit: Some(3), ..Default::default() }).unwrap();
        if added < 16 {
            store.enqueue(vec![spec(added)]).unwrap();
            added += 1;
        }
        page
    });
    let ordinals: Vec<u64> = listed.iter().map(|row| row.rollout.ordinal).collect();
    // The last page was not full, so the list ended before the last two were added.
    assert_eq!(ordinals, (0..14).collect::<Vec<_>>());
}

#[test]
fn a_list_that_is_read_in_several_stretches_is_whole() {
    let store = MemoryStore::new();
    store.enqueue((0..1_300).map(spec).collect()).unwrap();
    for (sort, descending) in [(RolloutSort::Ordinal, false), (RolloutSort::Id, true), (RolloutSort::Reward, false)] {
        let query = RolloutQuery { step: Some(150), sort, descending, limit: Some(5), ..Default::default() };
        let got = all(|after| store.rollout_page(&RolloutQuery { after, ..query.clone() }).unwrap());
        assert_eq!(got, reference(&store, &query));
        assert_eq!(got.len(), 8);
        let query = RolloutQuery { step: None, limit: Some(600), ..query };
        let got = all(|after| store.rollout_page(&RolloutQuery { after, ..query.clone() }).unwrap());
        assert_eq!(got.len(), 1_300);
    }
}

#[test]
fn attempts_are_listed_by_state_outcome_and_worker() {
    over_all_stores(|with| {
        with(&|store| fill(store));
        with(&|store| {
            let everything: Vec<AttemptRecord> =
                (0..40).flat_map(|index| store.attempts(&rollout_id(index)).unwrap()).collect();
            let list = |query: &AttemptQuery| {
                all(|after| store.attempt_page(&AttemptQuery { after, limit: Some(4), ..query.clone() }).unwrap())
            };
            assert_eq!(list(&AttemptQuery::default()), everything);
            let mut reversed = everything.clone();
            reversed.reverse();
            assert_eq!(list(&AttemptQuery { descending: true, ..Default::default() }), reversed);
            let only = |keep: &dyn Fn(&AttemptRecord) -> bool| -> Vec<AttemptRecord> {
                everything.iter().filter(|attempt| keep(attempt)).cloned().collect()
            };
            let gamma = list(&AttemptQuery { worker: Some("gamma".to_owned()), ..Default::default() });
            assert!(!gamma.is_empty());
            assert_eq!(gamma, only(&|attempt| attempt.worker == "gamma"));
            let state = Some(AttemptState::Unresponsive);
            let left = list(&AttemptQuery { state, ..Default::default() });
            assert!(!left.is_empty() && left.iter().all(|attempt| attempt.key.attempt == AttemptNumber::FIRST));
            let outcome = Some(OutcomeKind::Trap);
            let trapped = list(&AttemptQuery { outcome, ..Default::default() });
            assert_eq!(
                trapped,
                only(&|attempt| attempt.outcome.as_ref().is_some_and(|end| end.kind == OutcomeKind::Trap))
            );
            assert!(trapped.iter().all(|attempt| attempt.not_forkable.as_deref() == Some("it called out")));
            let of_one = AttemptQuery { rollout: Some(rollout_id(3)), ..Default::default() };
            assert_eq!(list(&of_one), store.attempts(&rollout_id(3)).unwrap());
            let nobody = AttemptQuery { rollout: Some(rollout_id(99)), ..Default::default() };
            assert!(matches!(store.attempt_page(&nobody), Err(StoreError::UnknownRollout(_))));
        });
    });
}

#[test]
fn spans_are_listed_by_kind_name_and_text() {
    over_all_stores(|with| {
        with(&|store| {
            store.enqueue(vec![spec(0)]).unwrap();
            let key = store.begin_attempt(&rollout_id(0), 1, "").unwrap().key;
            let mut list = spans(&key, 0, 120);
            list[70].name = "needle in a name".to_owned();
            list[90].body = samples::body(12, 5_000);
            if let fulgurite_core::span::SpanBody::Log { text, .. } = &mut list[90].body {
                text.push_str("a needle in text");
            }
            store.append_spans(&key, &list).unwrap();
        });
        with(&|store| {
            let everything = store.spans(&key(&rollout_id(0), 1)).unwrap();
            let list = |query: &SpanQuery| {
                all(|after| store.span_page(&SpanQuery { after, limit: Some(7), ..query.clone() }).unwrap())
            };
            let any = SpanQuery::of(rollout_id(0));
            assert_eq!(list(&any), everything);
            for kind in BodyKind::ALL {
                let got = list(&SpanQuery { kind: Some(kind), ..any.clone() });
                let wanted = |span: &&Span| BodyKind::of(&span.body) == kind;
                assert_eq!(got, everything.iter().filter(wanted).cloned().collect::<Vec<_>>());
                assert!(!got.is_empty(), "{kind:?} is not tested");
                let json = serde_json::to_value(&got[0].body).unwrap();
                let name = json
                    .as_str()
                    .map_or_else(|| json.as_object().unwrap().keys().next().unwrap().clone(), str::to_owned);
                assert_eq!(name, kind.as_str());
            }
            let sequences = |query: SpanQuery| -> Vec<u64> { list(&query).iter().map(|span| span.sequence).collect() };
            assert_eq!(sequences(SpanQuery { contains: Some("needle".to_owned()), ..any.clone() }), [70, 90]);
            assert_eq!(sequences(SpanQuery { name: Some("needle in a name".to_owned()), ..any.clone() }), [70]);
            assert_eq!(sequences(SpanQuery { contains: Some("Needle".to_owned()), ..any.clone() }), [0; 0]);
            let missing = SpanQuery { attempt: Some(AttemptNumber(2)), ..any };
            assert!(matches!(store.span_page(&missing), Err(StoreError::UnknownAttempt(_))));
            let nobody = SpanQuery::of(rollout_id(9));
            assert!(matches!(store.span_page(&nobody), Err(StoreError::UnknownRollout(_))));
        });
    });
}

#[test]
fn resources_are_listed_by_version() {
    over_all_stores(|with| {
        with(&|store| {
            for version in 0..7_u64 {
                let name = ["a", "b"][usize::try_from(version % 2).unwrap()];
                store.publish_template(version, name, &format!("text {version}")).unwrap();
            }
        });
        with(&|store| {
            let list = |query: &ResourceQuery| -> Vec<u64> {
                let page =
                    |after| store.resource_page(&ResourceQuery { after, limit: Some(2), ..query.clone() }).unwrap();
                all(page).iter().map(|template| template.version).collect()
            };
            assert_eq!(list(&ResourceQuery::default()), [1, 2, 3, 4, 5, 6, 7]);
            assert_eq!(
                list(&ResourceQuery { name: Some("b".to_owned()), descending: true, ..Default::default() }),
                [6, 4, 2]
            );
            let newest = ResourceQuery { descending: true, limit: Some(1), ..Default::default() };
            assert_eq!(store.resource_page(&newest).unwrap().items[0], store.template("a", None).unwrap().unwrap());
        });
    });
}

#[test]
fn workers_are_kept_by_id_and_replaced() {
    let worker = |id: &str, heartbeat: u64| WorkerRecord {
        id: id.to_owned(),
        process_id: 1,
        start_unix_ns: 1,
        heartbeat_unix_ns: heartbeat,
        attempts: heartbeat,
    };
    over_all_stores(|with| {
        with(&|store| {
            for (id, heartbeat) in [("b", 1), ("a", 5), ("c", 9), ("b", 7)] {
                store.put_worker(worker(id, heartbeat)).unwrap();
            }
            for id in ["", "new\nline", &"x".repeat(129)] {
                let error = store.put_worker(worker(id, 1)).unwrap_err();
                assert!(matches!(error, StoreError::InvalidWorkerId { .. }), "{error}");
                assert!(!error.to_string().contains('\n'));
            }
            // Durable with the next durable commit.
            store.enqueue(vec![spec(0)]).unwrap();
            let error = store.begin_attempt(&rollout_id(0), 1, "new\nline").unwrap_err();
            assert!(matches!(error, StoreError::InvalidWorkerId { .. }), "{error}");
        });
        with(&|store| {
            assert_eq!(store.workers().unwrap(), [worker("a", 5), worker("b", 7), worker("c", 9)]);
            let alive =
                WorkerQuery { alive_since_unix_ns: Some(7), descending: true, limit: Some(1), ..Default::default() };
            let listed = all(|after| store.worker_page(&WorkerQuery { after, ..alive.clone() }).unwrap());
            assert_eq!(listed, [worker("c", 9), worker("b", 7)]);
            assert_eq!(store.statistics().unwrap().workers, 3);
        });
    });
}

#[test]
fn blobs_are_kept_once_whatever_their_size() {
    over_all_stores(|with| {
        let contents: Vec<Vec<u8>> = [0, 1, 4_095, 4_096, 300_000].iter().map(|bytes| vec![7; *bytes]).collect();
        with(&|store| {
            let twice: Vec<Vec<u8>> = contents.iter().chain(&contents).cloned().collect();
            let hashes = store.put_blobs(twice).unwrap();
            assert_eq!(hashes[..5], hashes[5..]);
            assert_eq!(store.blob(&hashes[4]).unwrap().unwrap(), contents[4]);
            assert_eq!(store.put_blobs(contents.clone()).unwrap(), hashes[..5]);
            store.enqueue(vec![spec(0)]).unwrap();
        });
        with(&|store| {
            for content in &contents {
                assert_eq!(store.blob(&ContentHash::of(content)).unwrap().as_ref(), Some(content));
            }
            assert_eq!(store.blob(&ContentHash::of(b"nothing")).unwrap(), None);
            let statistics = store.statistics().unwrap();
            assert_eq!((statistics.blobs, statistics.blob_bytes), (5, 308_192));
        });
    });
}

#[test]
fn a_fork_goes_on_where_it_left_its_ancestor() {
    over_all_stores(|with| {
        let (first, second, third) = (key(&rollout_id(0), 1), key(&rollout_id(1), 1), key(&rollout_id(2), 1));
        with(&|store| {
            store.enqueue(vec![spec(0)]).unwrap();
            store.begin_attempt(&first.rollout, 1, "").unwrap();
            store.mark_running(&first).unwrap();
            // Only what has ended can be forked.
            let error = store.enqueue(vec![fork(1, &first, 4)]).unwrap_err();
            let expected =
                "rollout `grpo-00000-0001` cannot fork grpo-00000-0000/1 at event 4: the attempt has not ended";
            assert_eq!(error.to_string(), expected);
            store.finish_attempts(vec![end(&first, OutcomeKind::Completed, vec![], 0, 10, 9)]).remove(0).unwrap();
            for (ancestor, event) in [(&first, 11), (&key(&rollout_id(0), 2), 0), (&key(&rollout_id(7), 1), 0)] {
                let error = store.enqueue(vec![fork(1, ancestor, event)]).unwrap_err();
                assert!(matches!(error, StoreError::InvalidFork { .. }), "{error}");
            }
            store.enqueue(vec![fork(1, &first, 4)]).unwrap();
            store.begin_attempt(&second.rollout, 1, "").unwrap();
            store.mark_running(&second).unwrap();
            let error = store.append_spans(&second, &spans(&second, 0, 1)).unwrap_err();
            assert!(matches!(error, StoreError::SpanOrder { expected: 4, found: 0, .. }), "{error}");
            store.append_spans(&second, &spans(&second, 4, 3)).unwrap();
        });
        with(&|store| {
            store.finish_attempts(vec![end(&second, OutcomeKind::Completed, vec![], 7, 2, 9)]).remove(0).unwrap();
            assert_eq!(store.attempts(&second.rollout).unwrap()[0].spans, 5);
            assert_eq!(store.spans(&second).unwrap(), spans(&second, 4, 5));
            let own = store.span_page(&SpanQuery::of(second.rollout.clone())).unwrap();
            assert_eq!((own.items, own.next), (spans(&second, 4, 5), None));
            // A fork of a fork, inside what that one had taken over, and behind it.
            for (index, event, expected) in [
                (2, 2, spans(&first, 0, 2)),
                (3, 6, [spans(&first, 0, 4), spans(&second, 4, 2)].concat()),
                (4, 9, [spans(&first, 0, 4), spans(&second, 4, 5)].concat()),
            ] {
                store.enqueue(vec![fork(index, &second, event)]).unwrap();
                let key = store.begin_attempt(&rollout_id(index), 1, "").unwrap().key;
                store.append_spans(&key, &spans(&key, event, 2)).unwrap();
                assert_eq!(store.spans(&key).unwrap(), spans(&key, event, 2));
                assert_eq!(store.trajectory(&key).unwrap(), [expected, spans(&key, event, 2)].concat());
            }
            assert_eq!(store.trajectory(&first).unwrap(), spans(&first, 0, 10));
            let forks = RolloutQuery { fork_of: Some(second.rollout.clone()), ..Default::default() };
            assert_eq!(store.rollouts(&forks).unwrap().len(), 3);
            assert_eq!(store.attempts(&third.rollout).unwrap().len(), 1);
        });
    });
}

#[test]
fn what_became_unresponsive_may_be_tried_again_and_never_is_a_success() {
    over_all_stores(|with| {
        with(&|store| {
            store.enqueue(vec![spec(0)]).unwrap();
            for (rollout_state, legal) in
                [(RolloutState::Succeeded, false), (RolloutState::Requeuing, true), (RolloutState::Failed, true)]
            {
                let key = store.begin_attempt(&rollout_id(0), 1, "").unwrap().key;
                store.mark_running(&key).unwrap();
                let finish = AttemptFinish {
                    state: AttemptState::Unresponsive,
                    rollout_state,
                    ..end(&key, OutcomeKind::Unresponsive, vec![], 0, 1, 9)
                };
                let result = store.finish_attempts(vec![finish]).remove(0);
                assert_eq!(result.is_ok(), legal, "{result:?}");
            }
            let attempts = store.attempts(&rollout_id(0)).unwrap();
            assert!(attempts.iter().all(|attempt| attempt.state == AttemptState::Unresponsive));
            assert_eq!(store.statistics().unwrap().outcomes[&OutcomeKind::Unresponsive], 3);
        });
    });
}
