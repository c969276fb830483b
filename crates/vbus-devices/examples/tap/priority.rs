// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Real-time priority.
#![allow(unsafe_code)] // Calls the kernel's scheduler.

/// Gives this thread, and the threads that it will start, real-time priority. Other work of the
/// machine then delays neither the driver nor the device.
///
/// # Errors
/// The process may not do that.
pub fn realtime() -> Result<(), String> {
    let param = libc::sched_param { sched_priority: 5 };
    // SAFETY: the kernel reads one sched_param; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param) } {
        0 => Ok(()),
        _ => Err(format!(
            "--realtime needs root or CAP_SYS_NICE: {}",
            std::io::Error::last_os_error()
        )),
    }
}
