//! MPI of this process: its start, its end, and the texts of its errors.

use std::ffi::{CStr, c_char, c_int};

use mpi::ffi::*;

/// More than any MPI library's longest error text.
const MAX_TEXT_BYTES: usize = 8192;

/// A function of MPI that failed, with MPI's own text.
#[derive(Debug)]
pub(super) struct Failed(pub String);

/// Turns what a function of MPI returned into a result.
pub(super) fn check(name: &str, code: c_int) -> Result<(), Failed> {
    if code == MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text: [c_char; MAX_TEXT_BYTES] = [0; MAX_TEXT_BYTES];
    let mut len = 0;
    // SAFETY: the text has room for the longest one, and ends in a zero.
    let text = unsafe {
        MPI_Error_string(code, text.as_mut_ptr(), &mut len);
        CStr::from_ptr(text.as_ptr()).to_string_lossy()
    };
    Err(Failed(format!("{name}: {}", if text.is_empty() { "unknown error" } else { &text })))
}

/// Starts MPI, unless a group before has. All its functions are to be called from this thread from now on.
pub(super) fn start() -> Result<(), Failed> {
    if has_ended()? {
        return Err(Failed("MPI has ended in this process, and cannot be started again".into()));
    }
    if has_started()? {
        return Ok(());
    }
    let mut level = 0;
    // SAFETY: no arguments are passed on, which the standard allows; MPI has not been started yet.
    unsafe {
        let funneled = RSMPI_THREAD_FUNNELED;
        let code = MPI_Init_thread(std::ptr::null_mut(), std::ptr::null_mut(), funneled, &mut level);
        check("MPI_Init_thread", code)?;
        if level < funneled {
            return Err(Failed("this MPI library is for processes of one thread".into()));
        }
    }
    Ok(())
}

/// Ends MPI in good order. Waits for all processes of the job.
pub(super) fn finish() -> Result<(), Failed> {
    // SAFETY: MPI runs: a group calls this.
    check("MPI_Finalize", unsafe { MPI_Finalize() })
}

/// Ends all processes of the MPI job, this one included, with exit status `status`; does nothing where none has been
/// started. It is what a rank that failed does last: under `srun` the other ranks would otherwise stay until they time out.
pub fn abort_job(status: u8) {
    if has_started().unwrap_or(false) && !has_ended().unwrap_or(true) {
        // SAFETY: MPI runs.
        unsafe { MPI_Abort(RSMPI_COMM_WORLD, c_int::from(status)) };
    }
}

fn has_started() -> Result<bool, Failed> {
    let mut flag = 0;
    // SAFETY: may be called at any time.
    check("MPI_Initialized", unsafe { MPI_Initialized(&mut flag) })?;
    Ok(flag != 0)
}

fn has_ended() -> Result<bool, Failed> {
    let mut flag = 0;
    // SAFETY: may be called at any time.
    check("MPI_Finalized", unsafe { MPI_Finalized(&mut flag) })?;
    Ok(flag != 0)
}
