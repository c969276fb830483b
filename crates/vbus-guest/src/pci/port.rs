//! Writes to I/O ports by a process: the kernel allows them port by port, and thread by thread.
#![allow(unsafe_code)] // Asks the kernel for ports, and writes to those that it has given.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};

/// A port that any machine has and that nobody misses: the one for codes of the firmware's
/// progress.
const HARMLESS: u16 = 0x80;

/// Whether this process can have ports: it needs CAP_SYS_RAWIO, and a kernel that is not locked
/// down.
pub fn can_have() -> bool {
    static CAN: OnceLock<bool> = OnceLock::new();
    *CAN.get_or_init(|| {
        let can = permit(HARMLESS, true);
        permit(HARMLESS, false);
        can
    })
}

/// Writes a byte to `port`, after everything written to memory before. False: this thread may not,
/// and nothing was written.
pub fn write(port: u16) -> bool {
    thread_local! {
        static HAVE: RefCell<BTreeSet<u16>> = const { RefCell::new(BTreeSet::new()) };
    }
    let may = HAVE
        .with_borrow_mut(|have| have.contains(&port) || permit(port, true) && have.insert(port));
    if may {
        fence(Ordering::SeqCst);
        out(port);
    }
    may
}

#[cfg(target_arch = "x86_64")]
fn permit(port: u16, allow: bool) -> bool {
    // SAFETY: changes which ports this thread may use, no memory.
    unsafe { libc::ioperm(port.into(), 1, allow.into()) == 0 }
}

#[cfg(target_arch = "x86_64")]
fn out(port: u16) {
    // SAFETY: the kernel has given the port to this thread; what is behind it is a doorbell, which
    // touches no memory of this process's own accord.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") 1u8, options(nostack, preserves_flags))
    };
}

#[cfg(not(target_arch = "x86_64"))]
fn permit(_port: u16, _allow: bool) -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn out(_port: u16) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_just_when_the_kernel_allows_it() {
        // With the right it must not fault; without, nothing may happen.
        assert_eq!(write(HARMLESS), can_have());
        let other = std::thread::spawn(|| write(HARMLESS));
        assert_eq!(other.join().unwrap(), can_have());
        if !can_have() {
            println!("this process can have no ports");
        }
    }
}
