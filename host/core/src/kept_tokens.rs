//! Which tokens could be drawn at each place of a completion, where not all could.
//!
//! Truncation (top-k, top-p, min-p) and constraints drop tokens before each draw; what is left is drawn in proportion to the
//! probabilities of the model. With the sets that were left a trainer can compute the very distribution that a token was drawn
//! from under any weights: the softmax over the set.

use serde::{Deserialize, Serialize};

/// A set of token ids for each of some places, or all ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptTokens {
    /// Where the ids of each place end in `ids`. A place without ids keeps all.
    ends: Vec<u32>,
    ids: Vec<u32>,
}

impl KeptTokens {
    /// Whether there are no places.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Number of places.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.ends.len()
    }

    /// Adds a place that keeps `ids`, ascending; none stand for all.
    pub fn push(&mut self, ids: &[u32]) {
        self.ids.extend_from_slice(ids);
        self.ends.push(u32::try_from(self.ids.len()).unwrap_or(u32::MAX));
    }

    /// Adds places that keep all, up to a number of places.
    pub fn keep_all_up_to(&mut self, places: usize) {
        let end = self.ends.last().copied().unwrap_or_default();
        self.ends.resize(places.max(self.ends.len()), end);
    }

    /// The ids that a place keeps, ascending; `None` when it keeps all.
    #[must_use]
    pub fn at(&self, place: usize) -> Option<&[u32]> {
        let end = *self.ends.get(place)? as usize;
        let start = place.checked_sub(1).and_then(|before| self.ends.get(before)).map_or(0, |start| *start as usize);
        self.ids.get(start..end).filter(|ids| !ids.is_empty())
    }

    /// Whether the sets are ascending and lie one behind the other: a record may say anything.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.ends.is_sorted()
            && self.ends.last().map_or(0, |end| *end as usize) == self.ids.len()
            && (0..self.len()).all(|place| self.at(place).is_none_or(|ids| ids.is_sorted_by(|a, b| a < b)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_has_its_ids() {
        let mut kept = KeptTokens::default();
        assert!(kept.is_empty() && kept.is_sound() && kept.at(0).is_none());
        kept.keep_all_up_to(2);
        kept.push(&[3, 5]);
        kept.push(&[]);
        kept.push(&[0]);
        let found: Vec<Option<&[u32]>> = (0..6).map(|place| kept.at(place)).collect();
        assert_eq!(found, [None, None, Some(&[3, 5][..]), None, Some(&[0][..]), None]);
        assert!(kept.is_sound() && kept.len() == 5);
        let json = serde_json::to_string(&kept).unwrap();
        assert_eq!(serde_json::from_str::<KeptTokens>(&json).unwrap(), kept);
    }

    #[test]
    fn what_is_not_sound_is_told() {
        for json in [
            r#"{"ends":[2,1],"ids":[1,2]}"#,
            r#"{"ends":[1],"ids":[1,2]}"#,
            r#"{"ends":[3],"ids":[1,2]}"#,
            r#"{"ends":[2],"ids":[2,1]}"#,
            r#"{"ends":[2],"ids":[1,1]}"#,
            r#"{"ends":[],"ids":[1]}"#,
        ] {
            let kept: KeptTokens = serde_json::from_str(json).unwrap();
            assert!(!kept.is_sound(), "{json}");
        }
    }
}
