//! Joins the stores to the rules: [`RolloutStore`](crate::RolloutStore) for any type with a field `ledger`.

/// Implements the trait by calling the ledger.
macro_rules! delegate_to_ledger {
    ($store:ty) => {
        impl $crate::RolloutStore for $store {
            fn enqueue(
                &self,
                specs: Vec<std::sync::Arc<fulgurite_core::record::RolloutSpec>>,
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
                worker: &str,
            ) -> $crate::Result<fulgurite_core::record::AttemptRecord> {
                self.ledger.begin_attempt(id, start_unix_ns, worker)
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

            fn recording(&self, key: &fulgurite_core::id::AttemptKey) -> $crate::Result<$crate::RecordedAttempt> {
                self.ledger.recording(key)
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

            fn trajectory(
                &self,
                key: &fulgurite_core::id::AttemptKey,
            ) -> $crate::Result<Vec<fulgurite_core::span::Span>> {
                self.ledger.trajectory(key)
            }

            fn rollout_page(&self, query: &$crate::RolloutQuery) -> $crate::Result<$crate::Page<$crate::RolloutRow>> {
                self.ledger.rollout_page(query)
            }

            fn attempt_page(
                &self,
                query: &$crate::AttemptQuery,
            ) -> $crate::Result<$crate::Page<fulgurite_core::record::AttemptRecord>> {
                self.ledger.attempt_page(query)
            }

            fn span_page(&self, query: &$crate::SpanQuery) -> $crate::Result<$crate::Page<fulgurite_core::span::Span>> {
                self.ledger.span_page(query)
            }

            fn resource_page(&self, query: &$crate::ResourceQuery) -> $crate::Result<$crate::Page<$crate::Template>> {
                self.ledger.resource_page(query)
            }

            fn worker_page(
                &self,
                query: &$crate::WorkerQuery,
            ) -> $crate::Result<$crate::Page<fulgurite_core::record::WorkerRecord>> {
                self.ledger.worker_page(query)
            }

            fn put_blobs(&self, blobs: Vec<Vec<u8>>) -> $crate::Result<Vec<fulgurite_core::id::ContentHash>> {
                self.ledger.put_blobs(&blobs)
            }

            fn blob(&self, hash: &fulgurite_core::id::ContentHash) -> $crate::Result<Option<Vec<u8>>> {
                self.ledger.blob(hash)
            }

            fn put_worker(&self, worker: fulgurite_core::record::WorkerRecord) -> $crate::Result<()> {
                self.ledger.put_worker(&worker)
            }

            fn workers(&self) -> $crate::Result<Vec<fulgurite_core::record::WorkerRecord>> {
                self.ledger.workers()
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

            fn prune(&self, rule: &$crate::PruneRule) -> $crate::Result<$crate::PruneReport> {
                self.ledger.prune(rule)
            }

            fn check(&self, progress: $crate::Progress<'_>) -> $crate::Result<$crate::CheckReport> {
                self.ledger.check(progress)
            }

            fn export(
                &self,
                to: &mut dyn std::io::Write,
                progress: $crate::Progress<'_>,
            ) -> $crate::Result<$crate::TransferReport> {
                self.ledger.export(to, progress)
            }

            fn statistics(&self) -> $crate::Result<$crate::StoreStatistics> {
                self.ledger.statistics()
            }
        }
    };
}
pub(crate) use delegate_to_ledger;
