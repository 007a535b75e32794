use std::ffi::{CStr, c_char};

use crate::ffi;

/// A libtorch call that failed; nothing was written to its outputs, in-place ones excepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{op}: {message}")]
pub struct TorchError {
    /// The function of this crate that was called.
    pub op: &'static str,
    /// What libtorch, or a check of this crate, says; one line.
    pub message: String,
}

impl TorchError {
    pub(crate) fn new(op: &'static str, message: impl Into<String>) -> Self {
        Self { op, message: message.into() }
    }

    /// The first line of what tch says: its messages carry the C++ stack.
    pub(crate) fn from_tch(op: &'static str, error: &tch::TchError) -> Self {
        Self::new(op, error.to_string().lines().next().unwrap_or_default())
    }
}

/// The result of a shim call that returned `message`, which it frees.
pub(crate) fn check(op: &'static str, message: *mut c_char) -> Result<(), TorchError> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: a non-null message of the shim is a C string on the C heap, owned by us until freed here, once.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        ffi::fte_free_error(message);
        text
    };
    Err(TorchError::new(op, text))
}
