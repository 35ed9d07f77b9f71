//! Joins the stores to the rules: [`RolloutStore`](crate::RolloutStore) for any type with a field `ledger`.

/// Implements the trait by calling the ledger.
macro_rules! delegate_to_ledger {
    ($store:ty) => {
        impl $crate::RolloutStore for $store {
            fn enqueue(
                &self,
                specs: Vec<fulgurite_core::record::RolloutSpec>,
            ) -> $crate::Result<Vec<$crate::Enqueued>> {
                self.ledger.enqueue(specs)
            }

            fn rollout(
                &self,
                id: &fulgurite_core::id::RolloutId,
            ) -> $crate::Result<Option<fulgurite_core::record::RolloutRecord>> {
                self.ledger.rollout(id)
            }

            fn rollouts(
                &self,
                query: &$crate::RolloutQuery,
            ) -> $crate::Result<Vec<fulgurite_core::record::RolloutRecord>> {
                self.ledger.rollouts(query)
            }

            fn begin_attempt(
                &self,
                id: &fulgurite_core::id::RolloutId,
                start_unix_ns: u64,
            ) -> $crate::Result<fulgurite_core::record::AttemptRecord> {
                self.ledger.begin_attempt(id, start_unix_ns)
            }

            fn mark_running(&self, key: &fulgurite_core::id::AttemptKey) -> $crate::Result<()> {
                self.ledger.mark_running(key)
            }

            fn append_spans(
                &self,
                key: &fulgurite_core::id::AttemptKey,
                spans: &[fulgurite_core::span::Span],
            ) -> $crate::Result<()> {
                self.ledger.append_spans(key, spans)
            }

            fn append_many(
                &self,
                appends: &[(fulgurite_core::id::AttemptKey, Vec<fulgurite_core::span::Span>)],
            ) -> Vec<$crate::Result<()>> {
                self.ledger.append_many(appends)
            }

            fn finish_attempts(&self, finishes: Vec<$crate::AttemptFinish>) -> Vec<$crate::Result<()>> {
                self.ledger.finish_attempts(finishes)
            }

            fn cancel(
                &self,
                id: &fulgurite_core::id::RolloutId,
                end_unix_ns: u64,
            ) -> $crate::Result<fulgurite_core::record::RolloutRecord> {
                self.ledger.cancel(id, end_unix_ns)
            }

            fn attempts(
                &self,
                id: &fulgurite_core::id::RolloutId,
            ) -> $crate::Result<Vec<fulgurite_core::record::AttemptRecord>> {
                self.ledger.attempts(id)
            }

            fn spans(&self, key: &fulgurite_core::id::AttemptKey) -> $crate::Result<Vec<fulgurite_core::span::Span>> {
                self.ledger.spans(key)
            }

            fn publish_template(&self, after: u64, name: &str, text: &str) -> $crate::Result<u64> {
                self.ledger.publish_template(after, name, text)
            }

            fn template(&self, name: &str, version: Option<u64>) -> $crate::Result<Option<$crate::Template>> {
                self.ledger.template(name, version)
            }

            fn templates(&self, version: u64) -> $crate::Result<Vec<$crate::Template>> {
                self.ledger.templates(version)
            }

            fn resources_version(&self) -> $crate::Result<u64> {
                Ok(self.ledger.resources_version())
            }

            fn statistics(&self) -> $crate::Result<$crate::StoreStatistics> {
                self.ledger.statistics()
            }
        }
    };
}
pub(crate) use delegate_to_ledger;
