// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether standard output was open when the program started. Rust's runtime opens `/dev/null` in
//! the place of a closed one before `main`, and what is written there is lost without an error.
#![allow(unsafe_code, reason = "code that runs before `main` must be linked in a section")]

use std::sync::atomic::{AtomicBool, Ordering};

/// Written once, before `main`, by the only thread. Read later.
static WAS_CLOSED: AtomicBool = AtomicBool::new(false);

extern "C" fn look() {
    // SAFETY: the call only asks for the flags of a descriptor. It may be made at any time.
    let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
    WAS_CLOSED.store(flags == -1, Ordering::Relaxed);
}

// SAFETY: the C library calls each function of this section once, before `main`. `look` needs
// nothing of Rust's runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Whether standard output was closed when the program started.
pub fn output_was_closed() -> bool {
    // The linker keeps `LOOK` because it is used here.
    std::hint::black_box(&LOOK);
    WAS_CLOSED.load(Ordering::Relaxed)
}
