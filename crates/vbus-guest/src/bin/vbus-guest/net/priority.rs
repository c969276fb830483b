// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The scheduling class and nice value of a queue's thread.
#![allow(unsafe_code)] // Calls the kernel's scheduler.

use rustix::process::{Pid, getpriority_process, setpriority_process};
use rustix::thread::gettid;

/// Gives the calling thread the class SCHED_BATCH and the nice value `nice`. Other threads then
/// preempt it less, and it preempts other threads less.
///
/// A driver in the kernel works between two instructions of the running program, without a switch
/// of threads. This thread may share its processor with the program that sends and receives the
/// frames. Then each received segment wakes the program, which preempts the thread, and each sent
/// segment wakes the thread, which preempts the program. The nice value prevents the first,
/// SCHED_BATCH the second. Under a translator, where a switch costs some 30 us, the rate of
/// received TCP was 0.75 to 1.4 times that of virtio-net with both, and 0.46 to 0.57 times without.
/// With the nice value alone, the rate of sent TCP fell to half.
///
/// Without the permission (CAP_SYS_NICE) the thread keeps its class and nice value.
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
            "no permission for nice value {nice} ({error}): it stays {stays}, and frames are \
             received more slowly while programs are busy"
        );
    }
}
