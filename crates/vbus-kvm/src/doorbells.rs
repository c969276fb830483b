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

/// What the guest does to ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A write of any length to an address.
    Mmio,
    /// A write of any length to a port.
    Pio,
    /// The hypercall HvCallSignalEvent for a connection.
    Hypercall,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::Mmio, Kind::Pio, Kind::Hypercall];

    /// Its number in a doorbell record.
    pub const fn number(self) -> u8 {
        match self {
            Kind::Mmio => capability::KIND_MMIO,
            Kind::Pio => capability::KIND_PIO,
            Kind::Hypercall => capability::KIND_HYPERCALL,
        }
    }
}

/// Where the doorbells of one kind are: doorbell n at `base + n * stride`, an address, a port, or a
/// connection's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Doorbell 0's.
    pub base: u64,
    /// From one to the next; not 0.
    pub stride: u16,
}

impl Place {
    fn of(self, number: u32) -> Option<u64> {
        self.base.checked_add(u64::from(self.stride) * u64::from(number))
    }

    /// The doorbell record for the capability of the function, if these doorbells are of `kind`.
    /// `None` if it cannot name this base. For MMIO, `base` must be the offset in BAR0.
    pub fn record(self, kind: Kind) -> Option<[u8; capability::RECORD_BYTES as usize]> {
        let mut record = [0; capability::RECORD_BYTES as usize];
        record[0] = kind.number();
        record[2..4].copy_from_slice(&self.stride.to_le_bytes());
        record[4..].copy_from_slice(&u32::try_from(self.base).ok()?.to_le_bytes());
        Some(record)
    }
}

/// All doorbells of one function. Each is an eventfd, which a guest rings without leaving the
/// kernel by any of the kinds that have got a place. Dropped: they ring no more.
#[derive(Debug)]
pub struct Doorbells {
    vm: Arc<VmFd>,
    bells: Vec<(u32, EventFd)>,
    /// By [`Kind`].
    places: [Option<Place>; 3],
}

impl Doorbells {
    /// Doorbells by number, with their eventfds; nowhere yet.
    ///
    /// # Errors
    /// [`Error::NoPlace`] if a number is there twice, or is more than a function can have.
    pub fn new(vm: Arc<VmFd>, eventfds: Vec<(u32, OwnedFd)>) -> Result<Doorbells, Error> {
        let mut bells: Vec<_> =
            eventfds.into_iter().map(|(number, fd)| (number, sys::as_event(fd))).collect();
        bells.sort_by_key(|(number, _)| *number);
        if let Some(pair) = bells.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(Error::NoPlace(format!("doorbell {} twice", pair[0].0)));
        }
        if let Some((number, _)) =
            bells.last().filter(|(number, _)| *number >= bar0::DOORBELL_COUNT)
        {
            return Err(Error::NoPlace(format!("doorbell {number}")));
        }
        Ok(Doorbells { vm, bells, places: [None; 3] })
    }

    /// How many numbers they take: one more than the highest.
    pub fn numbers(&self) -> u32 {
        self.bells.last().map_or(0, |(number, _)| number + 1)
    }

    /// Where those of `kind` are.
    pub fn at(&self, kind: Kind) -> Option<Place> {
        self.places[kind as usize]
    }

    /// Puts those of `kind` elsewhere, or nowhere. They ring in neither place for a moment; what is
    /// rung then goes on to the VMM, as a write to an address or port that nobody has, and should
    /// ring there. It is nothing for a fast path: for each doorbell KVM is called, and waits for
    /// its virtual CPUs.
    ///
    /// # Errors
    /// [`Error::NoPlace`] for a place that this kind does not have, and what KVM says, for example
    /// that something is there already: they are then nowhere.
    pub fn place(&mut self, kind: Kind, place: Option<Place>) -> Result<(), Error> {
        if self.places[kind as usize] == place {
            return Ok(());
        }
        if let Some(before) = self.places[kind as usize].take() {
            for (number, event) in &self.bells {
                // It was registered just so.
                let _ = before.of(*number).map(|at| disconnect(&self.vm, kind, at, event));
            }
        }
        let Some(place) = place else { return Ok(()) };
        check(kind, place, self.numbers())?;
        for (done, (number, event)) in self.bells.iter().enumerate() {
            let at = place.of(*number).unwrap_or(u64::MAX);
            if let Err(error) = connect(&self.vm, kind, at, event) {
                for (number, event) in &self.bells[..done] {
                    let _ = place.of(*number).map(|at| disconnect(&self.vm, kind, at, event));
                }
                return Err(error);
            }
        }
        self.places[kind as usize] = Some(place);
        Ok(())
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        for kind in Kind::ALL {
            let _ = self.place(kind, None);
        }
    }
}

fn check(kind: Kind, place: Place, numbers: u32) -> Result<(), Error> {
    let max = match kind {
        Kind::Mmio => u64::MAX,
        Kind::Pio => PORT_MAX,
        Kind::Hypercall => CONNECTION_MAX,
    };
    let last = place.of(numbers.saturating_sub(1));
    if place.stride == 0 || last.is_none_or(|last| last > max) {
        return Err(Error::NoPlace(format!(
            "{kind:?} from {:#x} in steps of {}",
            place.base, place.stride
        )));
    }
    Ok(())
}

fn connect(vm: &VmFd, kind: Kind, at: u64, event: &EventFd) -> Result<(), Error> {
    match kind {
        // Of length 0: any length, and on some processors without even looking at the instruction.
        Kind::Mmio => vm
            .register_ioevent(event, &IoEventAddress::Mmio(at), NoDatamatch)
            .map_err(Error::kvm("KVM_IOEVENTFD for memory")),
        Kind::Pio => vm
            .register_ioevent(event, &IoEventAddress::Pio(at), NoDatamatch)
            .map_err(Error::kvm("KVM_IOEVENTFD for a port")),
        Kind::Hypercall => sys::hyperv_eventfd(vm, connection(at), Some(event))
            .map_err(Error::system("KVM_HYPERV_EVENTFD")),
    }
}

fn disconnect(vm: &VmFd, kind: Kind, at: u64, event: &EventFd) -> Result<(), Error> {
    match kind {
        Kind::Mmio => vm
            .unregister_ioevent(event, &IoEventAddress::Mmio(at), NoDatamatch)
            .map_err(Error::kvm("KVM_IOEVENTFD")),
        Kind::Pio => vm
            .unregister_ioevent(event, &IoEventAddress::Pio(at), NoDatamatch)
            .map_err(Error::kvm("KVM_IOEVENTFD")),
        Kind::Hypercall => sys::hyperv_eventfd(vm, connection(at), None)
            .map_err(Error::system("KVM_HYPERV_EVENTFD")),
    }
}

/// [`check`] has seen to it that it fits.
fn connection(at: u64) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}
