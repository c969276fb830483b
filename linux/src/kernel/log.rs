// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's log, by `dev_err!`, `dev_warn!` and `dev_info!`.
//!
//! A message says what happened and what to do. What a device can cause again and again goes
//! through the macros that end in `_limited`.
#![allow(unsafe_code, reason = "calls the shim")]

use core::fmt::{self, Write};

use super::ffi;
use super::pci::Pci;

/// Bytes of a message at most. The rest is cut off.
const MESSAGE_BYTES: usize = 240;

/// A text on the stack, of at most `N` bytes. What does not fit is cut off.
pub struct Text<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Text<N> {
    /// The text of `arguments`.
    pub fn new(arguments: fmt::Arguments<'_>) -> Self {
        let mut text = Self { bytes: [0; N], length: 0 };
        // The only error is a full text.
        let _ = text.write_fmt(arguments);
        text
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

impl<const N: usize> Write for Text<N> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let room = self.bytes.get_mut(self.length..).unwrap_or_default();
        let length = s.len().min(room.len());
        for (to, from) in room.iter_mut().zip(s.bytes()) {
            *to = from;
        }
        self.length += length;
        if length < s.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

/// How much a message matters.
#[derive(Clone, Copy, Debug)]
pub enum Level {
    /// Something does not work.
    Error,
    /// Something is not as it should be.
    Warning,
    /// Something that an administrator wants to know.
    Info,
}

/// Logs a message for a function.
pub fn log(pci: &Pci, level: Level, arguments: fmt::Arguments<'_>) {
    let level = match level {
        Level::Error => ffi::ERROR,
        Level::Warning => ffi::WARNING,
        Level::Info => ffi::INFO,
    };
    let text = Text::<MESSAGE_BYTES>::new(arguments);
    let bytes = text.as_bytes();
    // SAFETY: the handle and the text are valid during the call.
    unsafe { ffi::shim_log(pci.handle(), level, bytes.as_ptr(), bytes.len() as u64) };
}

/// Whether one more of the messages that a device can cause may be logged now.
pub fn may_log() -> bool {
    // SAFETY: it has no conditions.
    unsafe { ffi::shim_may_log() }
}

/// Ends this thread with the text of a bug.
pub fn bug<const N: usize>(text: &Text<N>) -> ! {
    let bytes = text.as_bytes();
    // SAFETY: the text is valid during the call.
    unsafe { ffi::shim_panic(bytes.as_ptr(), bytes.len() as u64) };
    trap()
}

/// What is never reached. objtool wants an end to each function that does not return.
#[cfg(target_arch = "x86_64")]
fn trap() -> ! {
    // SAFETY: the instruction is invalid: it ends the thread.
    unsafe { core::arch::asm!("ud2", options(noreturn, nomem, nostack)) }
}

/// What is never reached.
#[cfg(not(target_arch = "x86_64"))]
fn trap() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// Logs an error of a function (`&Pci`): `dev_err!(pci, "text {}", value)`.
#[macro_export]
macro_rules! dev_err {
    ($pci:expr, $($arg:tt)*) => {
        $crate::kernel::log::log($pci, $crate::kernel::log::Level::Error, format_args!($($arg)*))
    };
}

/// Logs a warning for a function (`&Pci`).
#[macro_export]
macro_rules! dev_warn {
    ($pci:expr, $($arg:tt)*) => {
        $crate::kernel::log::log($pci, $crate::kernel::log::Level::Warning, format_args!($($arg)*))
    };
}

/// Logs news of a function (`&Pci`).
#[macro_export]
macro_rules! dev_info {
    ($pci:expr, $($arg:tt)*) => {
        $crate::kernel::log::log($pci, $crate::kernel::log::Level::Info, format_args!($($arg)*))
    };
}

/// As [`dev_err!`], for what a device can cause again and again.
#[macro_export]
macro_rules! dev_err_limited {
    ($pci:expr, $($arg:tt)*) => {
        if $crate::kernel::log::may_log() {
            $crate::dev_err!($pci, $($arg)*)
        }
    };
}

/// As [`dev_warn!`], for what a device can cause again and again.
#[macro_export]
macro_rules! dev_warn_limited {
    ($pci:expr, $($arg:tt)*) => {
        if $crate::kernel::log::may_log() {
            $crate::dev_warn!($pci, $($arg)*)
        }
    };
}
