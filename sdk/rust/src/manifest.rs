//! What a plugin asks for.

/// Asks for capabilities, once per crate: what a run's config then grants is there, and nothing else is.
///
/// The text is JSON and goes into the component, where `fulgurite plugin check` shows it. Each ask is a name, or an object
/// with `name`, `why` (shown to whoever grants it) and `optional` (the plugin works without it).
///
/// | field | asked for | who |
/// |---|---|---|
/// | `folders` | a read-only folder, found under `/NAME` | tools |
/// | `http` | requests to an origin: scheme, host, port | tools |
/// | `sqlite` | a private copy of a database | tools |
/// | `endpoints` | a named model endpoint | agents, graders |
///
/// ```
/// fulgurite_sdk::manifest!({
///     "folders": ["docs"],
///     "http": [{ "name": "https://api.example.com", "why": "looks up prices", "optional": true }],
///     "sqlite": ["shop"]
/// });
/// ```
#[macro_export]
macro_rules! manifest {
    ({ $($json:tt)* }) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            const TEXT: &[u8] = ::core::concat!("{", ::core::stringify!($($json)*), "}").as_bytes();
            const fn bytes<const N: usize>(text: &[u8]) -> [u8; N] {
                let mut bytes = [0; N];
                bytes.copy_from_slice(text);
                bytes
            }
            #[allow(unsafe_code, reason = "names a section and runs nothing")]
            #[unsafe(link_section = "fulgurite:manifest")]
            #[used]
            static MANIFEST: [u8; TEXT.len()] = bytes(TEXT);
        };
    };
}
