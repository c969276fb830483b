// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The doorbells of one function.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vbus_shm::abi::{bar0, capability};
use vmm_sys_util::eventfd::EventFd;

use crate::{Error, sys};

/// The highest connection number that HvCallSignalEvent can name.
const CONNECTION_MAX: u64 = 0xff_ffff;
const PORT_MAX: u64 = 0xffff;

/// The way in which a guest rings a doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DoorbellKind {
    /// A write of any length to a memory address.
    Mmio,
    /// A write of any length to an I/O port.
    Pio,
    /// The Hyper-V hypercall HvCallSignalEvent, with the number of an event connection.
    Hypercall,
}

impl DoorbellKind {
    /// All kinds.
    pub const ALL: [DoorbellKind; 3] =
        [DoorbellKind::Mmio, DoorbellKind::Pio, DoorbellKind::Hypercall];

    /// The number of the kind in a doorbell record (`spec/pci.md`, "Doorbell kinds").
    pub const fn number(self) -> u8 {
        match self {
            DoorbellKind::Mmio => capability::KIND_MMIO,
            DoorbellKind::Pio => capability::KIND_PIO,
            DoorbellKind::Hypercall => capability::KIND_HYPERCALL,
        }
    }
}

/// The addresses, ports or connection numbers of all doorbells of one kind: doorbell n is at
/// `base + n * stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoorbellRange {
    /// The address, port or connection number of doorbell 0.
    pub base: u64,
    /// The distance from one doorbell to the next. It is not 0.
    pub stride: u16,
}

impl DoorbellRange {
    fn of(self, number: u32) -> Option<u64> {
        self.base.checked_add(u64::from(self.stride) * u64::from(number))
    }

    /// Encodes the range as a doorbell record of the vendor-specific capability, for doorbells of
    /// `kind`. For MMIO, `base` must be the offset in BAR0. Returns `None` if `base` has more than
    /// 32 bits.
    pub fn record(self, kind: DoorbellKind) -> Option<[u8; capability::RECORD_BYTES as usize]> {
        let mut record = [0; capability::RECORD_BYTES as usize];
        record[0] = kind.number();
        record[2..4].copy_from_slice(&self.stride.to_le_bytes());
        record[4..].copy_from_slice(&u32::try_from(self.base).ok()?.to_le_bytes());
        Some(record)
    }
}

/// All doorbells of one function. Each doorbell is an eventfd.
///
/// A guest rings a doorbell by any kind that has a range. KVM then signals the eventfd without an
/// exit to user space. Dropping this value disconnects all doorbells.
#[derive(Debug)]
pub struct Doorbells {
    vm: Arc<VmFd>,
    bells: Vec<(u32, EventFd)>,
    /// Indexed by [`DoorbellKind`].
    ranges: [Option<DoorbellRange>; 3],
}

impl Doorbells {
    /// Takes pairs of a doorbell number and its eventfd. No kind has a range yet.
    ///
    /// # Errors
    /// [`Error::BadRange`] if a number occurs twice, or is too large for a function.
    pub fn new(vm: Arc<VmFd>, eventfds: Vec<(u32, OwnedFd)>) -> Result<Doorbells, Error> {
        let mut bells: Vec<_> =
            eventfds.into_iter().map(|(number, fd)| (number, sys::as_event(fd))).collect();
        bells.sort_by_key(|(number, _)| *number);
        if let Some(pair) = bells.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(Error::BadRange(format!("doorbell {} twice", pair[0].0)));
        }
        if let Some((number, _)) =
            bells.last().filter(|(number, _)| *number >= bar0::DOORBELL_COUNT)
        {
            return Err(Error::BadRange(format!("doorbell {number}")));
        }
        Ok(Doorbells { vm, bells, ranges: [None; 3] })
    }

    /// The highest doorbell number plus one.
    pub fn numbers(&self) -> u32 {
        self.bells.last().map_or(0, |(number, _)| number + 1)
    }

    /// The range of `kind`, if it has one.
    pub fn range(&self, kind: DoorbellKind) -> Option<DoorbellRange> {
        self.ranges[kind as usize]
    }

    /// Moves the doorbells of `kind` to `range`, or disconnects them (`None`).
    ///
    /// For a moment the doorbells are in neither range. A ring in that moment reaches the VMM as a
    /// write to an address or port without a device, and the VMM should pass it on. The call is
    /// slow: for each doorbell it calls KVM, which waits for the virtual CPUs.
    ///
    /// # Errors
    /// [`Error::BadRange`] if this kind cannot have the range. [`Error::System`] if KVM refuses,
    /// for example because something is at an address already. After an error, `kind` has no range.
    pub fn set_range(
        &mut self,
        kind: DoorbellKind,
        range: Option<DoorbellRange>,
    ) -> Result<(), Error> {
        if self.ranges[kind as usize] == range {
            return Ok(());
        }
        if let Some(before) = self.ranges[kind as usize].take() {
            for (number, event) in &self.bells {
                // The doorbell was registered with the same values, so this does not fail.
                let _ = before.of(*number).map(|at| disconnect(&self.vm, kind, at, event));
            }
        }
        let Some(range) = range else { return Ok(()) };
        check(kind, range, self.numbers())?;
        for (done, (number, event)) in self.bells.iter().enumerate() {
            let at = range.of(*number).unwrap_or(u64::MAX);
            if let Err(error) = connect(&self.vm, kind, at, event) {
                for (number, event) in &self.bells[..done] {
                    let _ = range.of(*number).map(|at| disconnect(&self.vm, kind, at, event));
                }
                return Err(error);
            }
        }
        self.ranges[kind as usize] = Some(range);
        Ok(())
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        for kind in DoorbellKind::ALL {
            let _ = self.set_range(kind, None);
        }
    }
}

fn check(kind: DoorbellKind, range: DoorbellRange, numbers: u32) -> Result<(), Error> {
    let max = match kind {
        DoorbellKind::Mmio => u64::MAX,
        DoorbellKind::Pio => PORT_MAX,
        DoorbellKind::Hypercall => CONNECTION_MAX,
    };
    let last = range.of(numbers.saturating_sub(1));
    if range.stride == 0 || last.is_none_or(|last| last > max) {
        return Err(Error::BadRange(format!(
            "{kind:?} from {:#x} in steps of {}",
            range.base, range.stride
        )));
    }
    Ok(())
}

fn connect(vm: &VmFd, kind: DoorbellKind, at: u64, event: &EventFd) -> Result<(), Error> {
    match kind {
        // Length 0 means "any length". On some processors KVM then need not decode the instruction.
        DoorbellKind::Mmio => vm
            .register_ioevent(event, &IoEventAddress::Mmio(at), NoDatamatch)
            .map_err(Error::kvm("KVM_IOEVENTFD for memory")),
        DoorbellKind::Pio => vm
            .register_ioevent(event, &IoEventAddress::Pio(at), NoDatamatch)
            .map_err(Error::kvm("KVM_IOEVENTFD for a port")),
        DoorbellKind::Hypercall => sys::hyperv_eventfd(vm, connection(at), Some(event))
            .map_err(Error::system("KVM_HYPERV_EVENTFD")),
    }
}

fn disconnect(vm: &VmFd, kind: DoorbellKind, at: u64, event: &EventFd) -> Result<(), Error> {
    match kind {
        DoorbellKind::Mmio => vm
            .unregister_ioevent(event, &IoEventAddress::Mmio(at), NoDatamatch)
            .map_err(Error::kvm("KVM_IOEVENTFD")),
        DoorbellKind::Pio => vm
            .unregister_ioevent(event, &IoEventAddress::Pio(at), NoDatamatch)
            .map_err(Error::kvm("KVM_IOEVENTFD")),
        DoorbellKind::Hypercall => sys::hyperv_eventfd(vm, connection(at), None)
            .map_err(Error::system("KVM_HYPERV_EVENTFD")),
    }
}

/// Converts a connection number, which [`check`] has found to be in range.
fn connection(at: u64) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}
