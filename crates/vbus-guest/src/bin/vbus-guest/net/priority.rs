//! How a queue's thread stands among the guest's other threads.
#![allow(unsafe_code)] // Calls the kernel's scheduler.

use rustix::process::{Pid, getpriority_process, setpriority_process};
use rustix::thread::gettid;

/// Makes the calling thread one that is woken without haste and left alone at its work:
/// SCHED_BATCH, with the nice value `nice`.
///
/// A driver in the kernel does its work between two instructions of whoever runs. A thread, on a
/// processor that it shares with the program at the other end of its frames, is switched to and
/// from instead, and for what: each received segment wakes the program, which pushes the thread
/// aside; each sent one wakes the thread, which pushes the program aside. The nice value stops the
/// first, SCHED_BATCH the second. Under a translator, where a switch costs some 30 us, TCP came in
/// at 0.75 to 1.4 times the rate of virtio-net instead of 0.46 to 0.57; with the nice value alone
/// sending fell to half.
///
/// Without the permission (CAP_SYS_NICE) the thread stays as it is.
pub fn take(nice: i32) {
    let me = Pid::from_raw(gettid().as_raw_nonzero().get());
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads one sched_param; 0 is the calling thread.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const param) } != 0 {
        tracing::debug!("SCHED_BATCH: {}", std::io::Error::last_os_error());
    }
    if let Err(error) = setpriority_process(me, nice) {
        let stays = getpriority_process(me).unwrap_or(0);
        tracing::info!(
            "no permission for nice value {nice} ({error}): it stays {stays}, and receives more slowly beside busy programs"
        );
    }
}
