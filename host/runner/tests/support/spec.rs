//! What the tests of the runner ask for.

use fulgurite_core::dataset::{DatasetItem, Split};
use fulgurite_core::id::{ContentHash, PolicyVersion, RolloutId};
use fulgurite_core::llm::Sampling;
use fulgurite_core::record::{RolloutMode, RolloutSpec};
use fulgurite_core::seed::Seed;

/// A rollout of an item, on nothing in particular.
pub fn spec(id: &str, item: &DatasetItem) -> RolloutSpec {
    RolloutSpec {
        id: RolloutId::new(id).unwrap(),
        stage: "test".to_owned(),
        step: 0,
        group: 0,
        dataset: "items".to_owned(),
        split: Split::Train,
        item_id: item.id.clone(),
        mode: RolloutMode::Train,
        seed: Seed::new(1),
        sampling: Sampling::default(),
        policy_version: PolicyVersion(0),
        resources_version: 0,
        components: vec![],
        item: item.texts().hash,
        execution: ContentHash::of(b"test"),
        fork_of: None,
    }
}
