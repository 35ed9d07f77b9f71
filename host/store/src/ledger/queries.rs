//! Lists: filtered, ordered, in pages.
//!
//! A list is read in stretches, and the lock is let go between two of them, so that whoever writes waits a moment and not
//! for the whole list. Each record is seen in one state; two records of one list may be seen at two moments.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use fulgurite_core::record::{AttemptRecord, RolloutRecord, WorkerRecord};
use fulgurite_core::span::Span;
use serde::de::DeserializeOwned;

use super::{Ledger, State, StoredRollout, check_stored};
use crate::codec;
use crate::error::{Result, StoreError};
use crate::key_value::{KeyRange, KeyValue};
use crate::keys::{self, Kind};
use crate::query::{
    AttemptQuery, Cursor, PAGE_ITEMS_DEFAULT, PAGE_ITEMS_MAX, Page, ResourceQuery, RolloutQuery, RolloutRow,
    RolloutSort, SpanQuery, WorkerQuery,
};
use crate::records::Template;

/// Records that are read under one lock: about a millisecond.
const RECORDS_PER_LOCK: usize = 256;
/// Records that are read for one page, where pages go on at a key: about a tenth of a second.
const RECORDS_PER_PAGE: usize = 32_768;

fn page_limit(limit: Option<usize>) -> usize {
    limit.unwrap_or(PAGE_ITEMS_DEFAULT).min(PAGE_ITEMS_MAX)
}

/// Keys of a kind, from behind a cursor on.
fn range(kind: Kind, descending: bool, after: Option<&Cursor>) -> KeyRange {
    let range = KeyRange::prefix(&[kind as u8]).descending(descending);
    match after {
        Some(Cursor(place)) => range.after(&[&[kind as u8], place.as_slice()].concat()),
        None => range,
    }
}

fn cursor_of(key: &[u8]) -> Cursor {
    Cursor(key.get(1..).unwrap_or_default().to_vec())
}

impl<D: KeyValue> Ledger<D> {
    /// Visits records in stretches. Returns the last key seen when it stopped before the end, because the visitor or
    /// the number of records said so.
    pub(crate) fn walk<T: DeserializeOwned>(
        &self,
        mut range: KeyRange,
        records_max: usize,
        mut visit: impl FnMut(&State, &[u8], T) -> Result<ControlFlow<()>>,
    ) -> Result<Option<Vec<u8>>> {
        let mut records = 0;
        loop {
            let state = self.lock();
            let (mut seen, mut stopped, mut last) = (0, false, vec![]);
            codec::scan(&self.database, &range, |key, record: T| {
                seen += 1;
                last = key.to_vec();
                stopped = visit(&state, key, record)?.is_break();
                Ok(if stopped || seen == RECORDS_PER_LOCK { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })?;
            drop(state);
            records += seen;
            if stopped || (seen == RECORDS_PER_LOCK && records >= records_max) {
                return Ok(Some(last));
            }
            if seen < RECORDS_PER_LOCK {
                return Ok(None);
            }
            range = range.after(&last);
        }
    }

    /// A rollout as it is now, from what is on disk.
    pub(super) fn now(state: &State, key: &[u8], stored: StoredRollout) -> Result<(RolloutRecord, Vec<AttemptRecord>)> {
        let (rollout, attempts) = stored;
        check_stored(key, &rollout, &attempts)?;
        Ok(match state.live.get(&rollout.spec.id) {
            Some(held) => (held.entry.rollout.clone(), held.entry.attempts.clone()),
            None => (rollout, attempts),
        })
    }

    fn row(state: &State, key: &[u8], stored: StoredRollout) -> Result<RolloutRow> {
        let (rollout, mut attempts) = Self::now(state, key, stored)?;
        Ok(RolloutRow { rollout, attempt: attempts.pop() })
    }

    pub(crate) fn rollouts(&self, query: &RolloutQuery) -> Result<Vec<RolloutRecord>> {
        let mut found = Vec::new();
        let mut query = query.clone();
        let (mut skip, limit) = (query.offset, query.limit.unwrap_or(usize::MAX));
        while found.len() < limit {
            query.limit = Some(skip.saturating_add(limit - found.len()).min(PAGE_ITEMS_MAX));
            let page = self.rollout_page(&query)?;
            let skipped = skip.min(page.items.len());
            skip -= skipped;
            found.extend(page.items.into_iter().skip(skipped).map(|row| row.rollout));
            match page.next {
                Some(next) => query.after = Some(next),
                None => break,
            }
        }
        Ok(found)
    }

    pub(crate) fn rollout_page(&self, query: &RolloutQuery) -> Result<Page<RolloutRow>> {
        let limit = page_limit(query.limit);
        let mut items = vec![];
        let full = |items: &Vec<RolloutRow>| {
            if items.len() >= limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        if limit == 0 {
            return Ok(Page { items, next: None });
        }
        let stopped = match query.sort {
            RolloutSort::Ordinal => {
                let range = range(Kind::Rollout, query.descending, query.after.as_ref());
                self.walk(range, RECORDS_PER_PAGE, |state, key, stored: StoredRollout| {
                    let row = Self::row(state, key, stored)?;
                    if query.fits(&row) {
                        items.push(row);
                    }
                    Ok(full(&items))
                })?
            }
            RolloutSort::Id => {
                let range = range(Kind::Index, query.descending, query.after.as_ref());
                self.walk(range, RECORDS_PER_PAGE, |state, index, ordinal: u64| {
                    let key = keys::rollout_key(ordinal);
                    let stored = codec::get(&self.database, &key)?;
                    let stored =
                        stored.ok_or_else(|| codec::corrupt(index, format!("there is no rollout #{ordinal}")))?;
                    let row = Self::row(state, &key, stored)?;
                    if query.fits(&row) {
                        items.push(row);
                    }
                    Ok(full(&items))
                })?
            }
            RolloutSort::Reward | RolloutSort::Spans | RolloutSort::Duration => return self.best(query, limit),
        };
        Ok(Page { items, next: stopped.map(|key| cursor_of(&key)) })
    }

    /// The first rollouts in an order that the keys do not have: reads all of them and keeps one page.
    fn best(&self, query: &RolloutQuery, limit: usize) -> Result<Page<RolloutRow>> {
        let mut kept: BTreeMap<Cursor, RolloutRow> = BTreeMap::new();
        let mut more = false;
        self.walk(range(Kind::Rollout, false, None), usize::MAX, |state, key, stored: StoredRollout| {
            let row = Self::row(state, key, stored)?;
            let place = query.place(&row);
            let behind =
                query.after.as_ref().is_none_or(|after| if query.descending { place < *after } else { place > *after });
            if behind && query.fits(&row) {
                kept.insert(place, row);
                if kept.len() > limit {
                    more = true;
                    let _last_in_the_order = if query.descending { kept.pop_first() } else { kept.pop_last() };
                }
            }
            Ok(ControlFlow::Continue(()))
        })?;
        let last = if query.descending { kept.first_key_value() } else { kept.last_key_value() };
        let next = last.filter(|_| more).map(|(place, _)| place.clone());
        let mut items: Vec<RolloutRow> = kept.into_values().collect();
        if query.descending {
            items.reverse();
        }
        Ok(Page { items, next })
    }

    pub(crate) fn attempt_page(&self, query: &AttemptQuery) -> Result<Page<AttemptRecord>> {
        let limit = page_limit(query.limit);
        // Ordinal of the rollout and number of the attempt that the last page ended with.
        let after = query.after.as_ref().map(|Cursor(place)| {
            let number = place.get(8..12).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes);
            (keys::number_at(place, 0).unwrap_or(0), number)
        });
        let only = match &query.rollout {
            Some(id) => Some(self.ordinal(id)?.ok_or_else(|| StoreError::UnknownRollout(id.clone()))?),
            None => None,
        };
        // The rollout of the cursor is read again: it may have more attempts.
        let mut range = range(Kind::Rollout, query.descending, None);
        match (only, after, query.descending) {
            (Some(ordinal), ..) => range = KeyRange::prefix(&keys::rollout_key(ordinal)).descending(query.descending),
            (None, Some((ordinal, _)), false) => range.start = keys::rollout_key(ordinal),
            (None, Some((ordinal, _)), true) => range.end = KeyRange::prefix(&keys::rollout_key(ordinal)).end,
            (None, None, _) => {}
        }
        let (mut items, mut place) = (vec![], None);
        if limit == 0 {
            return Ok(Page { items, next: None });
        }
        let stopped = self.walk(range, RECORDS_PER_PAGE, |state, key, stored: StoredRollout| {
            let (rollout, mut attempts) = Self::now(state, key, stored)?;
            if query.descending {
                attempts.reverse();
            }
            for attempt in attempts {
                let here = (rollout.ordinal, attempt.key.attempt.0);
                let behind = after.is_none_or(|after| if query.descending { here < after } else { here > after });
                if behind && query.fits(&attempt) {
                    items.push(attempt);
                }
                place = Some(here);
                if items.len() >= limit {
                    return Ok(ControlFlow::Break(()));
                }
            }
            // A rollout without attempts is a place too.
            place = place
                .filter(|place| place.0 == rollout.ordinal)
                .or(Some((rollout.ordinal, if query.descending { 0 } else { u32::MAX })));
            Ok(ControlFlow::Continue(()))
        })?;
        let next = stopped
            .and(place)
            .map(|(ordinal, number)| Cursor([ordinal.to_be_bytes().as_slice(), &number.to_be_bytes()].concat()));
        Ok(Page { items, next })
    }

    pub(crate) fn span_page(&self, query: &SpanQuery) -> Result<Page<Span>> {
        let limit = page_limit(query.limit);
        let found = self.find(&query.rollout)?;
        let entry = found.ok_or_else(|| StoreError::UnknownRollout(query.rollout.clone()))?;
        let number = query.attempt.or(entry.rollout.attempt);
        let known = number.filter(|number| entry.attempts.iter().any(|attempt| attempt.key.attempt == *number));
        let Some(number) = known else {
            return match query.attempt {
                Some(attempt) => {
                    let rollout = query.rollout.clone();
                    Err(StoreError::UnknownAttempt(fulgurite_core::id::AttemptKey { rollout, attempt }))
                }
                None => Ok(Page { items: vec![], next: None }),
            };
        };
        let from = query.after.as_ref().and_then(|Cursor(place)| keys::number_at(place, 0));
        let from = from.map_or(0, |last| last.saturating_add(1));
        // The block that holds the first one begins at it or before.
        let prefix = keys::spans_prefix(entry.rollout.ordinal, number);
        let mut range = KeyRange::prefix(&prefix);
        let mut before = KeyRange::prefix(&prefix).descending(true);
        before.end = Some(keys::spans_key(entry.rollout.ordinal, number, from.saturating_add(1)));
        self.database.scan(&before, &mut |key, _| {
            if keys::is_fragment(key) {
                return Ok(ControlFlow::Continue(()));
            }
            range.start = key.to_vec();
            Ok(ControlFlow::Break(()))
        })?;
        let (mut items, mut next) = (vec![], None);
        if limit == 0 {
            return Ok(Page { items, next });
        }
        codec::scan(&self.database, &range, |_, block: Vec<Span>| {
            for span in block.into_iter().filter(|span| span.sequence >= from) {
                if items.len() == limit {
                    return Ok(ControlFlow::Break(()));
                }
                let sequence = span.sequence;
                if query.fits(&span) {
                    items.push(span);
                }
                next = (items.len() == limit).then(|| Cursor(sequence.to_be_bytes().to_vec()));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Page { items, next })
    }

    pub(crate) fn resource_page(&self, query: &ResourceQuery) -> Result<Page<Template>> {
        let limit = page_limit(query.limit);
        let mut items = vec![];
        if limit == 0 {
            return Ok(Page { items, next: None });
        }
        let range = range(Kind::Resources, query.descending, query.after.as_ref());
        let stopped = self.walk(range, RECORDS_PER_PAGE, |_, key, record: super::resources::ResourcesRecord| {
            let version = keys::number_at(key, 1).unwrap_or(0);
            if query.name.as_ref().is_none_or(|name| *name == record.name) {
                items.push(record.into_template(version));
            }
            Ok(if items.len() >= limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        Ok(Page { items, next: stopped.map(|key| cursor_of(&key)) })
    }

    pub(crate) fn worker_page(&self, query: &WorkerQuery) -> Result<Page<WorkerRecord>> {
        let limit = page_limit(query.limit);
        let mut items = vec![];
        if limit == 0 {
            return Ok(Page { items, next: None });
        }
        let range = range(Kind::Worker, query.descending, query.after.as_ref());
        let stopped = self.walk(range, RECORDS_PER_PAGE, |_, _, worker: WorkerRecord| {
            if query.alive_since_unix_ns.is_none_or(|since| worker.heartbeat_unix_ns >= since) {
                items.push(worker);
            }
            Ok(if items.len() >= limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        Ok(Page { items, next: stopped.map(|key| cursor_of(&key)) })
    }
}
