// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Measures how late a sleeping task wakes. Also starts real-time tasks, and busy tasks that
//! compete with them.
#![allow(unsafe_code)] // This program has the standard library alone, which has nothing for a task's class.

use std::ffi::c_int;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::stream::number;

/// Sleeps `count` times for `period` microseconds. Prints how late it woke, in microseconds, as
/// JSON.
///
/// The wake-up times are multiples of the period, so a late wake-up does not shift the next ones.
pub fn latency(period: &str, count: &str) -> io::Result<()> {
    let (period, count) = (Duration::from_micros(number(period)?.max(1)), number(count)?);
    let mut late = Vec::new();
    let mut due = Instant::now();
    for _ in 0..count {
        due += period;
        sleep(due.saturating_duration_since(Instant::now()));
        late.push(due.elapsed());
        // Wake-up times that have passed meanwhile do not count: the task did not sleep for them.
        while due + period < Instant::now() {
            due += period;
        }
    }
    late.sort();
    let last = late.len().saturating_sub(1);
    let at = |percent: usize| {
        late.get((late.len() * percent / 100).min(last)).map_or(0, Duration::as_micros)
    };
    let mean = late.iter().sum::<Duration>().as_micros() / late.len().max(1) as u128;
    let (median, p90, p99, max) = (at(50), at(90), at(99), at(100));
    println!(
        "{{\"count\": {}, \"mean\": {mean}, \"median\": {median}, \"p90\": {p90}, \"p99\": {p99}, \
            \"max\": {max}}}",
        late.len()
    );
    Ok(())
}

/// Uses processor time for ever.
pub fn spin() -> ! {
    loop {
        std::hint::spin_loop();
    }
}

unsafe extern "C" {
    /// A function of the C library, which the standard library links. It sets the class of a task;
    /// task 0 is the caller.
    fn sched_setscheduler(pid: c_int, policy: c_int, parameter: *const c_int) -> c_int;
}

/// Gives the calling thread the real-time class FIFO with `priority`.
pub fn become_fifo(priority: u64) -> io::Result<()> {
    const FIFO: c_int = 1;
    let priority = c_int::try_from(priority).unwrap_or(0);
    // SAFETY: the parameter is a structure of one int, and the function only reads it.
    match unsafe { sched_setscheduler(0, FIFO, &raw const priority) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Becomes `command`, in the real-time class FIFO with `priority`.
pub fn fifo(priority: &str, command: &[&str]) -> io::Result<()> {
    become_fifo(number(priority)?)?;
    let (program, args) = command.split_first().ok_or_else(|| io::Error::other("no command"))?;
    Err(Command::new(program).args(args).exec())
}
