//! What a tool or a grader was granted, as its component sees it.
//!
//! The parts themselves are `fulgurite-grants`; here they are joined to WIT, counted, and recorded. A tool whose manifest and
//! config agree on nothing gets the same imports, and every call of them is denied with the line that would allow it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock};

use fulgurite_core::host_call::{HostCall, HostCallLog, Remembered};
use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::{AttemptOutcome, OutcomeKind};
use fulgurite_core::seed::Seed;
use fulgurite_grants::{Database, ToolCapabilities};

use crate::fault::Stop;
use crate::guest::GuestState;
use crate::recorder::refused;

mod files;
pub(crate) mod http;
pub(crate) mod judge;
pub(crate) mod sqlite;

pub(crate) use files::link_files;
pub(crate) use judge::GraderGuest;

pub use judge::Judge;

/// The data of a tool's store.
pub(crate) type ToolData = GuestState<ToolGuest>;

/// What the host functions of a tool work on.
pub(crate) struct ToolGuest {
    pub(crate) capabilities: Arc<ToolCapabilities>,
    pub(crate) log: Arc<dyn HostCallLog>,
    pub(crate) limits: Limits,
    pub(crate) seed: Seed,
    http_calls: u64,
    /// Bytes of all requests in the making.
    request_bytes: u64,
    databases: BTreeMap<String, Arc<Mutex<Database>>>,
    not_forkable: Arc<OnceLock<String>>,
}

impl ToolGuest {
    pub(crate) fn new(
        capabilities: Arc<ToolCapabilities>,
        log: Arc<dyn HostCallLog>,
        limits: &Limits,
        seed: Seed,
        not_forkable: Arc<OnceLock<String>>,
    ) -> Self {
        Self {
            capabilities,
            log,
            limits: limits.clone(),
            seed,
            http_calls: 0,
            request_bytes: 0,
            databases: BTreeMap::new(),
            not_forkable,
        }
    }
}

/// A request that a guest puts together piece by piece.
#[expect(unreachable_pub, reason = "the generated bindings re-export the resources' types, which pub(crate) forbids")]
pub struct Draft<R> {
    request: R,
    /// Of the pieces so far.
    bytes: u64,
    /// Pieces were left out, because there were too many of them already.
    too_long: bool,
}

impl<R> Draft<R> {
    const fn new(request: R) -> Self {
        Self { request, bytes: 0, too_long: false }
    }

    /// Makes room for `bytes` more; `None` when there are too many already. `held` counts those of all drafts of a guest,
    /// which may come to four times as many as one may have.
    fn grow(&mut self, bytes: u64, most: u64, held: &mut u64) -> Option<&mut R> {
        let total = self.bytes.saturating_add(bytes);
        if total > most || held.saturating_add(bytes) > most.saturating_mul(4) {
            self.too_long = true;
            return None;
        }
        self.bytes = total;
        *held += bytes;
        Some(&mut self.request)
    }
}

/// What came back when the call was recorded; `None` when it is to be made.
fn remembered<T: serde::de::DeserializeOwned>(log: &dyn HostCallLog, call: &HostCall) -> Result<Option<T>, Stop> {
    let differs = |text: String| Stop(AttemptOutcome::failed(OutcomeKind::HostFault, text));
    match log.remembered(call) {
        Remembered::Nothing => Ok(None),
        Remembered::Result(result) => serde_json::from_str(&result).map(Some).map_err(|error| {
            differs(format!("the record of {}.{} cannot be read: {error}", call.interface, call.function))
        }),
        Remembered::Differs(text) => Err(differs(format!("the replay differs from the record: {text}"))),
    }
}

/// Writes down a call that was made.
fn record(log: &dyn HostCallLog, call: HostCall, result: &impl serde::Serialize) -> Result<(), Stop> {
    let result = serde_json::to_string(result).unwrap_or_default();
    log.record(call, result).map_err(|refusal| refused(&refusal))
}

/// JSON text of a call's arguments.
fn arguments(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
