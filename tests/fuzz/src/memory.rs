//! How much memory a call takes: a length that an input claims must not be believed before it has been read.

#![expect(unsafe_code, reason = "an allocator is unsafe by its interface; this one only counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator with a count per thread: other tests run beside this one.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: usize, sign: isize) {
    let bytes = isize::try_from(bytes).unwrap_or(isize::MAX).saturating_mul(sign);
    // A thread that ends frees its last bytes without being counted.
    let _ = LIVE.try_with(|live| {
        live.set(live.get().saturating_add(bytes));
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: every call is handed on unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Makes a call and says how many bytes this thread held at most beyond what it held before.
pub fn peak_bytes_of<T>(call: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.with(Cell::get);
    PEAK.with(|peak| peak.set(before));
    let result = call();
    let peak = PEAK.with(Cell::get).saturating_sub(before);
    (result, usize::try_from(peak).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_found_after_it_has_passed() {
        let (length, peak) = peak_bytes_of(|| {
            let large = std::hint::black_box(vec![1_u8; 1 << 20]);
            large.len()
        });
        assert_eq!(length, 1 << 20);
        assert!((1 << 20..(1 << 20) + 4_096).contains(&peak), "{peak}");
        assert!(peak_bytes_of(|| ()).1 < 4_096);
    }
}
