//! Schema 1, which did not know items, execution settings, workers and forks of attempts.
//!
//! | schema 1 | schema 2 |
//! |---|---|
//! | rollouts under their ids | under their ordinals, with an index |
//! | no `item`, no `execution` | [`unknown_content`]: such a rollout cannot be run again, and says so |
//! | `fork_of (rollout, event)`, with all spans from 0 | none: a rollout that recorded everything itself. Nothing ever wrote one |
//! | attempts without `worker` and `not_forkable` | nobody, and no reason |
//! | spans, resources | the same bytes |

use std::ops::ControlFlow;
use std::sync::Arc;

use fulgurite_core::dataset::Split;
use fulgurite_core::id::{AttemptKey, AttemptNumber, ContentHash, PolicyVersion, RolloutId};
use fulgurite_core::llm::Sampling;
use fulgurite_core::outcome::AttemptOutcome;
use fulgurite_core::record::{AttemptRecord, RolloutMode, RolloutRecord, RolloutSpec};
use fulgurite_core::reward::Reward;
use fulgurite_core::seed::Seed;
use fulgurite_core::state::{AttemptState, RolloutState};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use crate::codec;
use crate::error::Result;
use crate::key_value::{KeyRange, KeyValue};
use crate::keys::{self, Kind};
use crate::ledger::Counters;
use crate::records::unknown_content;
use crate::sled_store::{SCHEMA_VERSION, Writer};

#[derive(Debug, Serialize, Deserialize)]
struct ForkPointV1 {
    rollout: RolloutId,
    event: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct RolloutSpecV1 {
    id: RolloutId,
    stage: String,
    step: u64,
    group: u64,
    dataset: String,
    split: Split,
    item_id: String,
    mode: RolloutMode,
    seed: Seed,
    sampling: Sampling,
    policy_version: PolicyVersion,
    resources_version: u64,
    components: Vec<ContentHash>,
    fork_of: Option<ForkPointV1>,
}

#[derive(Debug, Serialize, Deserialize)]
struct RolloutRecordV1 {
    spec: RolloutSpecV1,
    state: RolloutState,
    attempt: Option<AttemptNumber>,
    ordinal: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct AttemptRecordV1 {
    key: AttemptKey,
    state: AttemptState,
    start_unix_ns: u64,
    end_unix_ns: u64,
    outcome: Option<AttemptOutcome>,
    rewards: Vec<Reward>,
    spans: u64,
    guest_cpu_us: u64,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct CountersV1 {
    rollouts: BTreeMap<RolloutState, u64>,
    attempts: u64,
    spans: u64,
    span_bytes: u64,
    rollouts_total: u64,
    resources_version: u64,
    commits: u64,
}

impl From<RolloutRecordV1> for RolloutRecord {
    fn from(old: RolloutRecordV1) -> Self {
        let spec = old.spec;
        Self {
            spec: Arc::new(RolloutSpec {
                id: spec.id,
                stage: spec.stage,
                step: spec.step,
                group: spec.group,
                dataset: spec.dataset,
                split: spec.split,
                item_id: spec.item_id,
                mode: spec.mode,
                seed: spec.seed,
                sampling: spec.sampling,
                policy_version: spec.policy_version,
                resources_version: spec.resources_version,
                components: spec.components,
                item: unknown_content(),
                execution: unknown_content(),
                fork_of: None,
            }),
            state: old.state,
            attempt: old.attempt,
            ordinal: old.ordinal,
        }
    }
}

impl From<AttemptRecordV1> for AttemptRecord {
    fn from(old: AttemptRecordV1) -> Self {
        Self {
            key: old.key,
            state: old.state,
            start_unix_ns: old.start_unix_ns,
            end_unix_ns: old.end_unix_ns,
            outcome: old.outcome,
            rewards: old.rewards,
            spans: old.spans,
            guest_cpu_us: old.guest_cpu_us,
            worker: String::new(),
            not_forkable: None,
        }
    }
}

fn counters(old: &impl KeyValue) -> Result<CountersV1> {
    Ok(codec::get(old, &keys::counters_key())?.unwrap_or_default())
}

/// Commits that a database of schema 1 holds.
pub(crate) fn commits(old: &impl KeyValue) -> Result<u64> {
    Ok(counters(old)?.commits)
}

/// Key of the first fragment of a rollout in schema 1, or of any of its records: `r` and the id, and after a zero byte the
/// number of a fragment.
fn scan_rollouts(
    old: &impl KeyValue,
    mut visit: impl FnMut(RolloutRecordV1, Vec<AttemptRecordV1>) -> Result<()>,
) -> Result<()> {
    old.scan(&KeyRange::prefix(b"r"), &mut |key, _| {
        // Ids have no zero byte, and no record has 2^24 fragments.
        if !matches!(key, [_, .., 0, _, _, _])
            && let Some(payload) = codec::get_payload(old, key)?
        {
            let (rollout, attempts): (RolloutRecordV1, Vec<AttemptRecordV1>) = codec::decode(key, &payload)?;
            if key.get(1..) != Some(rollout.spec.id.as_str().as_bytes()) {
                return Err(codec::corrupt(key, format!("it is that of rollout `{}`", rollout.spec.id)));
            }
            visit(rollout, attempts)?;
        }
        Ok(ControlFlow::Continue(()))
    })
}

/// Writes everything that a database of schema 1 holds as schema 2.
pub(crate) fn convert(old: &impl KeyValue, writer: &mut Writer<'_>) -> Result<()> {
    let counted = counters(old)?;
    let mut new = Counters {
        attempts: counted.attempts,
        spans: counted.spans,
        span_bytes: counted.span_bytes,
        next_ordinal: counted.rollouts_total,
        resources_version: counted.resources_version,
        commits: counted.commits + 1,
        ..Counters::default()
    };
    writer.put(keys::schema_key(), SCHEMA_VERSION.to_be_bytes().to_vec())?;
    scan_rollouts(old, |rollout, attempts| {
        let rollout = RolloutRecord::from(rollout);
        let attempts: Vec<AttemptRecord> = attempts.into_iter().map(AttemptRecord::from).collect();
        new.add_state(rollout.state);
        new.add_outcomes(&attempts);
        let mut batch = vec![];
        codec::put(&mut batch, keys::index_key(&rollout.spec.id), &codec::encode(&rollout.ordinal)?)?;
        let packed = codec::pack(codec::encode(&(&rollout, &attempts))?.into());
        codec::put_packed(&mut batch, keys::rollout_key(rollout.ordinal), &packed)?;
        writer.put_all(batch)
    })?;
    for kind in [Kind::Spans, Kind::Resources] {
        old.scan(&KeyRange::prefix(&[kind as u8]), &mut |key, value| {
            writer.put(key.to_vec(), value.to_vec())?;
            Ok(ControlFlow::Continue(()))
        })?;
    }
    let mut batch = vec![];
    codec::put(&mut batch, keys::counters_key(), &codec::encode(&new)?)?;
    writer.put_all(batch)
}
