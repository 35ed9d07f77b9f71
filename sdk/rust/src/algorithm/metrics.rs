//! Numbers and lines for people. They are committed with the step.

use super::HostError;
use crate::wit::algorithm::fulgurite::algorithm::metrics as wit;

/// Records a scalar of the current step. Names are 1 to 64 of `a`-`z`, `0`-`9`, `_`, `/`, `-`.
///
/// # Errors
/// When the name is wrong or the value is not finite.
pub fn scalar(name: &str, value: f64) -> Result<(), HostError> {
    Ok(wit::scalar(name, value)?)
}

/// Records a line of text of the current step.
///
/// # Errors
/// When the host cannot record it.
pub fn note(text: &str) -> Result<(), HostError> {
    Ok(wit::note(text)?)
}
