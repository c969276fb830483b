// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes to I/O ports by a process. The kernel permits each port to each thread separately.
#![allow(unsafe_code)] // Asks the kernel for ports, and writes to those that it has given.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};

/// A port that every machine has and that does no harm: firmware reports its progress there.
const HARMLESS: u16 = 0x80;

/// Whether this process can use ports. It needs CAP_SYS_RAWIO, and a kernel that is not locked
/// down.
pub fn can_have() -> bool {
    static CAN: OnceLock<bool> = OnceLock::new();
    *CAN.get_or_init(|| {
        let can = permit(HARMLESS, true);
        permit(HARMLESS, false);
        can
    })
}

/// Writes a byte to `port`, after all earlier writes to memory. Returns false, and writes nothing,
/// if the kernel does not permit the port to this thread.
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
    // SAFETY: this changes which ports the thread may use, and no memory.
    unsafe { libc::ioperm(port.into(), 1, allow.into()) == 0 }
}

#[cfg(target_arch = "x86_64")]
fn out(port: u16) {
    // SAFETY: the kernel permits the port to this thread. Behind it is a doorbell, which does not
    // access the memory of this process by itself.
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
    fn a_port_is_written_exactly_when_the_kernel_permits_it() {
        // With the permission, the write must not fault. Without it, nothing may happen.
        assert_eq!(write(HARMLESS), can_have());
        let other = std::thread::spawn(|| write(HARMLESS));
        assert_eq!(other.join().unwrap(), can_have());
        if !can_have() {
            println!("this process cannot use ports");
        }
    }
}
