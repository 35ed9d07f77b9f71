//! How a batch is cut into micro-batches.

use fulgurite_core::training::TrainingRow;

/// Rows of one forward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MicroBatch {
    /// Places in the batch.
    pub(crate) rows: Vec<usize>,
    /// Length of the longest.
    pub(crate) length: usize,
    /// Tokens that are computed.
    tokens: usize,
}

/// Deals micro-batches to shards: a function of the rows' lengths and order alone. The kernels pack rows one after the other,
/// so a micro-batch is as large as its rows together; burn pads them to the longest.
pub(crate) fn plan(rows: &[TrainingRow], shards: usize, tokens_max: usize, pads: bool) -> Vec<Vec<MicroBatch>> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    let length = |row: usize| rows.get(row).map_or(0, |row| row.ids.len());
    order.sort_by_key(|row| std::cmp::Reverse(length(*row)));
    let total: usize = rows.iter().map(|row| row.ids.len()).sum();
    // Every shard gets work even when the whole batch would fit fewer micro-batches.
    let budget = tokens_max.min(total.div_ceil(shards.max(1))).max(1);
    let mut all = vec![Vec::new(); shards];
    let mut batches: Vec<MicroBatch> = Vec::new();
    for row in order {
        let length = length(row);
        // Sorted downwards: the first row is the longest.
        let with = |batch: &MicroBatch| batch.tokens + if pads { batch.length } else { length };
        match batches.last_mut() {
            Some(batch) if with(batch) <= budget => {
                batch.tokens = with(batch);
                batch.rows.push(row);
            }
            _ => batches.push(MicroBatch { rows: vec![row], length, tokens: length }),
        }
    }
    for (index, batch) in batches.into_iter().enumerate() {
        if let Some(shard) = all.get_mut(index % shards.max(1)) {
            shard.push(batch);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use fulgurite_core::id::PolicyVersion;
    use fulgurite_core::llm::KeptTokens;
    use fulgurite_core::training::Stream;
    use proptest::prelude::*;

    use super::*;

    fn rows(lengths: &[usize]) -> Vec<TrainingRow> {
        let row = |len: &usize| TrainingRow {
            sequence: 0,
            ids: vec![0; *len],
            mask: vec![],
            weights: vec![],
            behaviour_log_probs: vec![],
            old_log_probs: vec![],
            calls: vec![],
            group: None,
            stream: Stream::Rl,
            temperature: 1.0,
            policy_version: PolicyVersion(0),
            kept: KeptTokens::default(),
        };
        lengths.iter().map(row).collect()
    }

    proptest! {
        #[test]
        fn every_row_is_dealt_once_and_budgets_hold(
            lengths in prop::collection::vec(1_usize..200, 0..60),
            shards in 1_usize..12,
            tokens_max in 1_usize..600,
            pads: bool,
        ) {
            let plan = plan(&rows(&lengths), shards, tokens_max, pads);
            prop_assert_eq!(plan.len(), shards);
            let batches: Vec<&MicroBatch> = plan.iter().flatten().collect();
            let mut dealt: Vec<usize> = batches.iter().flat_map(|batch| batch.rows.iter().copied()).collect();
            dealt.sort_unstable();
            prop_assert!(dealt.into_iter().eq(0..lengths.len()));
            for batch in batches {
                let longest = batch.rows.iter().map(|row| lengths[*row]).max();
                prop_assert_eq!(longest, Some(batch.length));
                let tokens = if pads {
                    batch.length * batch.rows.len()
                } else {
                    batch.rows.iter().map(|row| lengths[*row]).sum()
                };
                prop_assert!(tokens <= tokens_max || batch.rows.len() == 1);
            }
        }
    }

    #[test]
    fn packing_fills_what_padding_would_waste() {
        let rows = rows(&[100, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10]);
        let batches = |pads| plan(&rows, 1, 200, pads).concat().len();
        assert_eq!((batches(false), batches(true)), (1, 2));
    }
}
