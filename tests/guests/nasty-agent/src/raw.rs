//! Calls that the SDK would not make: the imports themselves, with what no compiler would let through.
#![cfg_attr(target_arch = "wasm32", expect(unsafe_code, reason = "the imports of a component are foreign functions"))]

#[cfg(target_arch = "wasm32")]
mod imports {
    #[link(wasm_import_module = "fulgurite:agent/emit@0.1.0")]
    unsafe extern "C" {
        #[link_name = "annotation"]
        pub(super) fn annotation(list: *const u8, elements: usize);
        #[link_name = "log"]
        pub(super) fn log(level: i32, text: *const u8, bytes: usize);
        #[link_name = "[method]span.annotate"]
        pub(super) fn annotate(span: i32, list: *const u8, elements: usize);
        #[link_name = "[constructor]span"]
        pub(super) fn open(name: *const u8, bytes: usize, list: *const u8, elements: usize) -> i32;
        #[link_name = "[resource-drop]span"]
        pub(super) fn close(span: i32);
    }

    #[link(wasm_import_module = "fulgurite:agent/llm@0.1.0")]
    unsafe extern "C" {
        #[link_name = "[constructor]request"]
        pub(super) fn request() -> i32;
    }
}

/// Some bytes to point at.
#[cfg(target_arch = "wasm32")]
static BYTES: [u64; 8] = [0; 8];

/// An annotation with so many attributes, most of them beyond the end of memory.
#[cfg(target_arch = "wasm32")]
pub(crate) fn annotation(elements: usize) {
    // SAFETY: not safe. The host must refuse it.
    unsafe { imports::annotation(BYTES.as_ptr().cast(), elements) };
}

/// A line of so many bytes, most of them beyond the end of memory.
#[cfg(target_arch = "wasm32")]
pub(crate) fn log(bytes: usize) {
    // SAFETY: not safe. The host must refuse it.
    unsafe { imports::log(0, BYTES.as_ptr().cast(), bytes) };
}

/// A span that nobody has opened.
#[cfg(target_arch = "wasm32")]
pub(crate) fn annotate_span(span: i32) {
    // SAFETY: not safe. The host must refuse it.
    unsafe { imports::annotate(span, BYTES.as_ptr().cast(), 0) };
}

/// One span, closed twice.
#[cfg(target_arch = "wasm32")]
pub(crate) fn drop_span_twice() {
    // SAFETY: not safe. The host must refuse the second one.
    unsafe {
        let span = imports::open(BYTES.as_ptr().cast(), 0, BYTES.as_ptr().cast(), 0);
        imports::close(span);
        imports::close(span);
    }
}

/// Requests that are never dropped.
#[cfg(target_arch = "wasm32")]
pub(crate) fn requests() {
    loop {
        // SAFETY: it takes nothing and returns a handle.
        std::hint::black_box(unsafe { imports::request() });
    }
}

/// Natively there is no host to call.
#[cfg(not(target_arch = "wasm32"))]
mod native {
    pub(crate) fn annotation(_elements: usize) {}
    pub(crate) fn log(_bytes: usize) {}
    pub(crate) fn annotate_span(_span: i32) {}
    pub(crate) fn drop_span_twice() {}
    pub(crate) fn requests() {}
}

#[cfg(not(target_arch = "wasm32"))]
pub(crate) use native::{annotate_span, annotation, drop_span_twice, log, requests};
