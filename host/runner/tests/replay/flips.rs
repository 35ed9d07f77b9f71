//! Recordings that are not what was recorded: whatever is altered, the replay names it.

use std::sync::Arc;

use fulgurite_core::attribute;
use fulgurite_core::recording::{fingerprint, fingerprints_attribute};
use fulgurite_core::span::Span;
use fulgurite_runner::replay::{Recorded, Replayer};
use nasty_agent::program::Step;
use nasty_agent::{Behaviour, Input};
use serde_json::json;

use crate::support::{Bench, Model, assert_identical, behave, job, limits, plugins, program};

/// Recordings with every kind of event in them, and a number that the agent emits; above 1e300 it is NaN.
async fn recordings(number: f64) -> (Bench, Vec<Recorded>) {
    let bench = Bench::new();
    let runner = bench.runner(plugins(), limits());
    let tool = |name: &str| name.to_owned();
    let everything = vec![
        Step::List,
        Step::Chat,
        Step::ChatWith(0.5),
        Step::ChatWith(-1.0),
        Step::Open,
        Step::Start,
        Step::Start,
        Step::Start,
        Step::WaitAny(2),
        Step::Next(1),
        Step::Next(1),
        Step::Drop(1),
        Step::Drop(0),
        Step::Finish(0),
        Step::Annotate,
        Step::StartTool(tool("count")),
        Step::StartTool(tool("count")),
        Step::Ready(1),
        Step::WaitAnyTool(2),
        Step::FinishTool(0),
        Step::DropTool(0),
        Step::Tool(tool("fail")),
        Step::Close(0),
        Step::Number(number),
        Step::Number(-0.0),
        Step::Reward(0.5),
        Step::Message,
        Step::Random,
        Step::Clock,
        Step::Sleep(1_000),
        Step::Print(true),
        Step::Print(false),
        Step::Render,
        Step::Chat,
    ];
    let jobs = vec![
        job(&runner, "everything", 5, &program(everything), &json!({"room": 1})),
        job(&runner, "emit", 6, &behave(Behaviour::Emit), &json!("show")),
        job(&runner, "malformed", 6, &behave(Behaviour::Malformed), &json!({})),
        job(&runner, "grader-fault", 6, &behave(Behaviour::Healthy), &json!("trap")),
        job(&runner, "trap", 6, &behave(Behaviour::AbandonedSpan), &json!({})),
        job(&runner, "cpu", 6, &json!(Input::new(Behaviour::Loop)), &json!({})),
    ];
    let ids: Vec<_> = jobs.iter().map(|job| job.spec.id.clone()).collect();
    bench.record(&runner, jobs, Model::Answers).await;
    let recordings = ids.iter().map(|id| bench.load(id)).collect();
    (bench, recordings)
}

fn with_spans(recorded: &Recorded, spans: Vec<Span>) -> Recorded {
    let mut altered = recorded.clone();
    altered.lineage.spans = Arc::new(spans);
    altered
}

fn without_owner(span: &Span, owner: &Span) -> Vec<u8> {
    postcard::to_stdvec(&Span { attempt: owner.attempt.clone(), ..span.clone() }).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_flipped_bit_of_a_recording_is_found_and_the_event_is_named() {
    let (bench, recordings) = recordings(1e301).await;
    let (mut flips, mut failures) = (0_u64, vec![]);
    for recorded in &recordings {
        let replayer = bench.replayer(recorded, plugins());
        assert_identical(&replayer.replay(recorded, None).await);
        let root = recorded.lineage.spans.len() - 1;
        for (place, span) in recorded.lineage.spans.iter().enumerate() {
            let bytes = postcard::to_stdvec(span).unwrap();
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                // What cannot be read is found by the store.
                let Ok((altered, [])) = postcard::take_from_bytes::<Span>(&damaged) else { continue };
                // Whose an event is, is what it was found under in the store.
                if without_owner(&altered, span) == bytes {
                    continue;
                }
                flips += 1;
                let mut spans = recorded.lineage.spans.to_vec();
                spans[place] = altered;
                let report = replayer.replay(&with_spans(recorded, spans), None).await;
                let named = report.divergence.as_ref().map(|found| found.sequence);
                // Fingerprints stand in the root event: one of them that is flipped casts doubt on its own event.
                if named != Some(place as u64) && (named.is_none() || place != root) {
                    failures.push(format!("{} event {place} bit {bit}: {named:?}", recorded.spec.id));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} of {flips}: {:?}", failures.len(), &failures[..failures.len().min(20)]);
    assert!(flips > 20_000, "{flips}");
}

/// Fingerprints as somebody would make them who has altered a recording on purpose.
fn sealed(mut spans: Vec<Span>) -> Vec<Span> {
    let fingerprints: Vec<u64> = spans.iter().map(fingerprint).collect();
    let root = spans.last_mut().unwrap();
    root.guest_attributes.retain(|(name, _)| name != attribute::RECORDING_FINGERPRINTS);
    root.guest_attributes.push(fingerprints_attribute(&fingerprints));
    spans
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_are_missing_or_doubled_or_exchanged_are_found() {
    let (bench, recordings) = recordings(1e301).await;
    for recorded in &recordings {
        let replayer = bench.replayer(recorded, plugins());
        let spans = recorded.lineage.spans.to_vec();
        for place in 0..spans.len() {
            let (mut missing, mut doubled, mut exchanged) = (spans.clone(), spans.clone(), spans.clone());
            missing.remove(place);
            doubled.insert(place, spans[place].clone());
            exchanged.swap(place, (place + 1) % spans.len());
            for altered in [missing, doubled, exchanged] {
                if altered == spans || altered.is_empty() {
                    continue;
                }
                let report = replayer.replay(&with_spans(recorded, altered.clone()), None).await;
                assert!(report.divergence.is_some(), "{} {place}", recorded.spec.id);
                // Also when somebody has made it look right.
                let sealed = sealed(altered);
                let report = replayer.replay(&with_spans(recorded, sealed), None).await;
                assert!(report.divergence.is_some(), "{} {place}, sealed", recorded.spec.id);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_says_something_else_than_its_events_is_found() {
    let (bench, recordings) = recordings(1e301).await;
    for recorded in &recordings {
        let replayer: Replayer = bench.replayer(recorded, plugins());
        let mut altered = recorded.clone();
        altered.attempt.outcome.as_mut().unwrap().detail.push('.');
        let report = replayer.replay(&altered, None).await;
        assert_eq!(report.divergence.map(|found| found.what), Some("outcome"));
        for place in 0..recorded.attempt.rewards.len() {
            let mut altered = recorded.clone();
            let value = &mut altered.attempt.rewards[place].value;
            *value = f64::from_bits(value.to_bits() ^ 1);
            let report = replayer.replay(&altered, None).await;
            assert_eq!(report.divergence.map(|found| found.what), Some("rewards"));
        }
    }
}
