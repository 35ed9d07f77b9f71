//! What a token's softmax runs over: all of the vocabulary, or the tokens that were kept when it was drawn.

use fulgurite_core::training::TrainingRow;

/// The tokens of one softmax.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Support<'a> {
    All,
    Kept(&'a [u32]),
}

impl<'a> Support<'a> {
    /// That of a row's token.
    pub(crate) fn of(row: &'a TrainingRow, at: usize) -> Self {
        row.kept.at(at).map_or(Self::All, Self::Kept)
    }

    /// The logits of the tokens, and the place of `id` among them; behind their end when it is not among them.
    pub(crate) fn gather<'b>(
        self,
        logits: &'b mut [f32],
        id: u32,
        gathered: &'b mut Vec<f32>,
    ) -> (&'b mut [f32], usize) {
        match self {
            Self::All => (logits, id as usize),
            Self::Kept(kept) => {
                gathered.clear();
                gathered.extend(kept.iter().filter_map(|id| logits.get(*id as usize)));
                (gathered, kept.binary_search(&id).unwrap_or(kept.len()))
            }
        }
    }

    /// Puts what was computed of gathered values back; all others are 0.
    pub(crate) fn scatter(self, gathered: &[f32], logits: &mut [f32]) {
        let Self::Kept(kept) = self else { return };
        logits.fill(0.0);
        for (id, value) in kept.iter().zip(gathered) {
            if let Some(slot) = logits.get_mut(*id as usize) {
                *slot = *value;
            }
        }
    }
}
