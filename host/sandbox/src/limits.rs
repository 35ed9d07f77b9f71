//! Limits on memory and tables.

use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::OutcomeKind;
use wasmtime::ResourceLimiter;

use crate::fault::Stop;
use crate::profile::TABLE_ELEMENTS_MAX;

/// Counts the linear memory and the table elements of one store, all its instances together.
///
/// Growing past a limit ends the guest rather than answering -1: most guests abort on a failed allocation anyway, and an
/// outcome that names the limit is worth more than a trap in an allocator.
#[derive(Debug)]
pub(crate) struct Limiter {
    memory_bytes: u64,
    memory_bytes_max: u64,
    table_elements: u64,
    table_elements_max: u64,
    instances_max: usize,
    /// What the last permitted growth added, to give back when it fails after all.
    last_growth: u64,
}

impl Limiter {
    /// What the engine can hold at most bounds the limits: `memory_bytes_max` is the size of its largest memory.
    pub(crate) fn new(limits: &Limits, memory_bytes_max: u64) -> Self {
        Self {
            memory_bytes: 0,
            memory_bytes_max: limits.memory_bytes_max.min(memory_bytes_max),
            table_elements: 0,
            table_elements_max: limits.table_elements_max.min(TABLE_ELEMENTS_MAX as u64),
            instances_max: usize::try_from(limits.instances_max).unwrap_or(usize::MAX),
            last_growth: 0,
        }
    }
}

impl ResourceLimiter for Limiter {
    fn instances(&self) -> usize {
        self.instances_max
    }

    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        let growth = desired.saturating_sub(current) as u64;
        let total = self.memory_bytes.saturating_add(growth);
        if total > self.memory_bytes_max {
            return Err(Stop::limit(OutcomeKind::MemoryLimit, "memory_bytes_max", self.memory_bytes_max).error());
        }
        // The module's own maximum: the guest gets -1, as the specification says.
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false);
        }
        self.memory_bytes = total;
        self.last_growth = growth;
        Ok(true)
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.memory_bytes = self.memory_bytes.saturating_sub(std::mem::take(&mut self.last_growth));
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        let growth = desired.saturating_sub(current) as u64;
        let total = self.table_elements.saturating_add(growth);
        if total > self.table_elements_max {
            return Err(Stop::limit(OutcomeKind::MemoryLimit, "table_elements_max", self.table_elements_max).error());
        }
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false);
        }
        self.table_elements = total;
        self.last_growth = growth;
        Ok(true)
    }

    fn table_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.table_elements = self.table_elements.saturating_sub(std::mem::take(&mut self.last_growth));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memories_are_added_up() {
        let mut limiter = Limiter::new(&Limits { memory_bytes_max: 3 << 16, ..Limits::default() }, u64::MAX);
        assert!(limiter.memory_growing(0, 2 << 16, None).unwrap());
        assert!(limiter.memory_growing(0, 1 << 16, None).unwrap());
        assert!(limiter.memory_growing(2 << 16, 3 << 16, None).is_err());
    }

    #[test]
    fn a_growth_that_fails_is_given_back() {
        let mut limiter = Limiter::new(&Limits { memory_bytes_max: 1 << 16, ..Limits::default() }, u64::MAX);
        assert!(limiter.memory_growing(0, 1 << 16, None).unwrap());
        limiter.memory_grow_failed(wasmtime::Error::msg("no memory")).unwrap();
        assert!(limiter.memory_growing(0, 1 << 16, None).unwrap());
    }
}
