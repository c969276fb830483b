//! The doorbells of a function: which eventfds its server gave for them, and by what else than BAR0
//! the guest can ring them.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use vbus_kvm::{DoorbellKind, DoorbellRange, Doorbells};
use vbus_shm::abi::capability;
use vfio_user_protocol::IoEventFd;

use super::config::Record;
use super::description::{BadFunction, Description};
use super::{PciRoot, Shared};
use crate::bus::BusDevice;
use crate::layout;

/// From one port to the next: a write of one byte is enough.
const PORT_STRIDE: u16 = 1;
/// Event connections of each slot: as many as a function can have doorbells.
const CONNECTIONS: u32 = 1024;

/// The server's eventfds, by doorbell.
pub(super) fn of_function(
    eventfds: Vec<IoEventFd>,
    description: &Description,
) -> Result<Vec<(u32, OwnedFd)>, BadFunction> {
    let number = |io: IoEventFd| {
        let IoEventFd { fd, offset, size, datamatch, .. } = io;
        let at = offset.checked_sub(u64::from(description.doorbells));
        let number = at
            .filter(|at| at % u64::from(description.stride) == 0)
            .map(|at| at / u64::from(description.stride));
        let number = number
            .filter(|n| *n < u64::from(description.doorbell_count))
            .and_then(|n| u32::try_from(n).ok());
        let Some(number) = number.filter(|_| datamatch.is_none()) else {
            return Err(BadFunction::Lie(format!(
                "an eventfd for {offset:#x} of BAR0, where there is no doorbell"
            )));
        };
        // 0 stands for writes of any size.
        if size > u64::from(description.stride) {
            return Err(BadFunction::Lie(format!(
                "an eventfd for {size} bytes, where doorbell {number} is"
            )));
        }
        if !is_eventfd(&fd) {
            return Err(BadFunction::Lie(format!("doorbell {number} is no eventfd")));
        }
        Ok((number, fd))
    };
    eventfds.into_iter().map(number).collect()
}

fn is_eventfd(fd: &OwnedFd) -> bool {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new());
    link.is_ok_and(|target| target.as_bytes() == b"anon_inode:[eventfd]")
}

/// Ports of each slot.
fn ports_per_slot(shared: &Shared) -> u16 {
    layout::DOORBELL_PORT_BYTES / u16::from(shared.ports)
}

/// Puts the doorbells where their place does not depend on the guest: ports and event connections.
/// The records for the capability.
pub(super) fn back(
    bells: &mut Doorbells,
    description: &Description,
    slot: u8,
    shared: &Shared,
) -> Vec<Record> {
    let (mut records, numbers) = (Vec::new(), bells.numbers());
    let mut put = |kind, place: DoorbellRange| match bells.set_range(kind, Some(place)) {
        Ok(()) => records.extend(place.record(kind)),
        Err(e) => tracing::warn!("slot {slot} has no doorbells of kind {kind:?}: {e}"),
    };
    // A kind is offered if it rings every doorbell that the device can have.
    if shared.backing.pio && description.doorbell_count <= u32::from(ports_per_slot(shared)) {
        let base = layout::DOORBELL_PORTS + (u16::from(slot) - 1) * ports_per_slot(shared);
        put(DoorbellKind::Pio, DoorbellRange { base: base.into(), stride: PORT_STRIDE });
    }
    if shared.backing.hypercall && description.doorbell_count == numbers {
        put(
            DoorbellKind::Hypercall,
            DoorbellRange { base: (u32::from(slot) * CONNECTIONS).into(), stride: 1 },
        );
    }
    let sints = shared.backing.sints;
    if let Some((sints, Ok(base))) = sints.map(|sints| (sints, u32::try_from(sints.base))) {
        let mut record = [0; capability::RECORD_BYTES as usize];
        record[0] = capability::KIND_SINT;
        record[2..4].copy_from_slice(&sints.stride.to_le_bytes());
        record[4..].copy_from_slice(&base.to_le_bytes());
        records.push(record);
    }
    records
}

/// The ports, for what is rung while no eventfd is there: it goes to the server as a message.
pub(super) struct Ports(pub(super) Arc<PciRoot>);

impl BusDevice for Ports {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, offset: u64, _data: &[u8]) {
        let each = u64::from(ports_per_slot(&self.0.shared));
        let (slot, number) = (offset / each, offset % each / u64::from(PORT_STRIDE));
        let slot = usize::try_from(slot).ok().and_then(|slot| self.0.slots.get(slot));
        let function =
            slot.filter(|_| self.0.shared.backing.pio).and_then(|slot| slot.reachable_function());
        if let (Some(function), Ok(number)) = (function, u32::try_from(number)) {
            function.ring(number);
        }
    }
}
