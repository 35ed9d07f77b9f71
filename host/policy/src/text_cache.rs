//! Token ids of texts that were encoded before: agents ask with the same texts again and again.

use std::collections::HashMap;
use std::sync::Arc;

/// Memory of texts and their ids, in bytes; the cache starts anew when it is full.
const BYTES_MAX: usize = 32 << 20;
/// Longer texts are not remembered, in bytes. Prompts of groups must be: an engine starts when all members have asked, so
/// what tokenising takes is waited for once per member. 256 KiB: with its ids such a text takes a 25th of the cache at most.
const TEXT_BYTES_MAX: usize = 256 << 10;
/// What an entry takes beside its text and its ids, in bytes, about.
const ENTRY_BYTES: usize = 128;

/// Ids by text.
#[derive(Debug, Default)]
pub(crate) struct TextCache {
    ids: HashMap<String, Arc<[u32]>>,
    bytes: usize,
}

impl TextCache {
    pub(crate) fn get(&self, text: &str) -> Option<Arc<[u32]>> {
        self.ids.get(text).cloned()
    }

    pub(crate) fn remember(&mut self, text: &str, ids: &Arc<[u32]>) {
        if text.len() > TEXT_BYTES_MAX {
            return;
        }
        let bytes = ENTRY_BYTES + text.len() + size_of_val::<[u32]>(ids);
        if self.bytes + bytes > BYTES_MAX {
            *self = Self::default();
        }
        if self.ids.insert(text.to_owned(), ids.clone()).is_none() {
            self.bytes += bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_prompts_are_remembered_and_memory_is_bounded() {
        let mut cache = TextCache::default();
        let ids: Arc<[u32]> = (0_u32..).take(TEXT_BYTES_MAX).collect();
        let text = |number: usize| format!("{number:0>6}{}", "x".repeat(TEXT_BYTES_MAX - 6));
        for number in 0..200 {
            cache.remember(&text(number), &ids);
            cache.remember(&text(number), &ids);
            assert_eq!(cache.get(&text(number)).as_deref(), Some(&*ids), "{number}");
            let held: usize = cache.ids.iter().map(|(text, ids)| ENTRY_BYTES + text.len() + 4 * ids.len()).sum();
            assert!(held == cache.bytes && held <= BYTES_MAX, "{number}: {held}");
        }
        cache.remember(&"x".repeat(TEXT_BYTES_MAX + 1), &ids);
        assert_eq!(cache.get(&"x".repeat(TEXT_BYTES_MAX + 1)), None);
    }
}
