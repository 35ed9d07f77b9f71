//! What this process holds.

#![expect(unsafe_code, reason = "an allocator is unsafe by its interface; this one only counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI64, Ordering};

/// The system's allocator with a count of the bytes that it has handed out.
struct Counting;

/// Of Linux on x86-64 and most of aarch64; a larger one would only make the bounds looser.
const PAGE_BYTES: i64 = 4_096;

static LIVE_BYTES: AtomicI64 = AtomicI64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn size(layout: Layout) -> i64 {
    i64::try_from(layout.size()).unwrap_or(i64::MAX)
}

// SAFETY: every call is handed on unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_BYTES.fetch_add(size(layout), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(size(layout), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
unsafe extern "C" {
    /// Gives free memory of all arenas back to the system.
    fn malloc_trim(pad: usize) -> i32;
}

/// What this process holds at a moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Held {
    /// Open file descriptors.
    pub(crate) descriptors: usize,
    /// Bytes that are allocated.
    pub(crate) heap_bytes: i64,
    /// Resident memory in bytes: the heap, the guests' memories, stacks, code.
    pub(crate) resident_bytes: i64,
}

impl Held {
    pub(crate) fn now() -> Self {
        // What the allocator keeps of a round is not what the round has left behind.
        // SAFETY: it takes a number, and may be called at any time from any thread.
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        unsafe {
            malloc_trim(0);
        }
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: i64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
        Self {
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            heap_bytes: LIVE_BYTES.load(Ordering::Relaxed),
            resident_bytes: pages * PAGE_BYTES,
        }
    }
}

impl Held {
    /// Whether no more is held later than now, but for so much.
    pub(crate) fn leaves(&self, later: &Self, heap_bytes_max: i64, resident_bytes_max: i64) -> Result<(), String> {
        let heap = later.heap_bytes - self.heap_bytes;
        let resident = later.resident_bytes - self.resident_bytes;
        if later.descriptors == self.descriptors && heap <= heap_bytes_max && resident <= resident_bytes_max {
            return Ok(());
        }
        Err(format!("it leaves something behind: {self}, and later {later}"))
    }
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (heap, resident) = (self.heap_bytes >> 10, self.resident_bytes >> 10);
        write!(f, "{} descriptors, {heap} KiB on the heap, {resident} KiB resident", self.descriptors)
    }
}
