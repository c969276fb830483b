// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The doorbells of a function: the eventfds that its server gave, and the ways other than BAR0 by
//! which the guest can ring them.

use std::os::fd::OwnedFd;

use vbus_kvm::{DoorbellKind, DoorbellRange, Doorbells};
use vbus_shm::abi::capability;
use vfio_user_protocol::IoEventFd;

use super::config::Record;
use super::description::{BadFunction, Description, Front};
use super::resources::Resources;
use crate::layout;

/// The distance from one port to the next. A write of one byte rings a doorbell.
pub(super) const PORT_STRIDE: u16 = 1;
/// Event connections of each slot: the most doorbells that a function can have.
const CONNECTIONS: u32 = 1024;

/// Checks the server's eventfds, and returns them with the numbers of their doorbells.
///
/// # Errors
/// [`BadFunction::Lie`] if one is not for a doorbell.
pub(super) fn of_function(
    eventfds: Vec<IoEventFd>,
    description: &Description,
) -> Result<Vec<(u32, OwnedFd)>, BadFunction> {
    let number = |io: IoEventFd| {
        let IoEventFd { fd, offset, size, datamatch, .. } = io;
        let stride = u64::from(description.stride);
        let at = offset.checked_sub(u64::from(description.doorbells));
        let number = at.filter(|at| at % stride == 0).map(|at| at / stride);
        let number = number
            .filter(|n| *n < u64::from(description.doorbell_count))
            .and_then(|n| u32::try_from(n).ok());
        let Some(number) = number.filter(|_| datamatch.is_none()) else {
            return Err(BadFunction::Lie(format!(
                "an eventfd for {offset:#x} of BAR0, where there is no doorbell"
            )));
        };
        // Size 0 stands for writes of any size.
        if size > stride {
            return Err(BadFunction::Lie(format!(
                "an eventfd for {size} bytes, where doorbell {number} is"
            )));
        }
        Ok((number, fd))
    };
    eventfds.into_iter().map(number).collect()
}

/// The number of ports of each slot.
pub(super) fn ports_per_slot(ports: u8) -> u16 {
    layout::DOORBELL_PORT_BYTES / u16::from(ports)
}

/// Connects the doorbells to ports and event connections, which the guest cannot move. Returns the
/// records for the vendor-specific capability.
pub(super) fn connect(
    bells: &mut Doorbells,
    description: &Description,
    slot: u8,
    resources: &Resources,
) -> Vec<Record> {
    if matches!(description.front, Front::Virtio(_)) {
        return Vec::new(); // Its driver knows no other way than the notify area.
    }
    let (mut records, numbers) = (Vec::new(), bells.numbers());
    let mut connect = |kind, range: DoorbellRange| match bells.set_range(kind, Some(range)) {
        Ok(()) => records.extend(range.record(kind)),
        Err(e) => tracing::warn!("slot {slot} has no doorbells of kind {kind:?}: {e}"),
    };
    // A kind is offered only if it can ring every doorbell that the device can have.
    let ports = ports_per_slot(resources.ports);
    if resources.backing.pio && description.doorbell_count <= u32::from(ports) {
        let base = layout::DOORBELL_PORTS + (u16::from(slot) - 1) * ports;
        connect(DoorbellKind::Pio, DoorbellRange { base: base.into(), stride: PORT_STRIDE });
    }
    if resources.backing.hypercall && description.doorbell_count == numbers {
        let base = (u32::from(slot) * CONNECTIONS).into();
        connect(DoorbellKind::Hypercall, DoorbellRange { base, stride: 1 });
    }
    let sints = resources.backing.sints;
    if let Some((sints, Ok(base))) = sints.map(|sints| (sints, u32::try_from(sints.base))) {
        let mut record = [0; capability::RECORD_BYTES as usize];
        record[0] = capability::KIND_SINT;
        record[2..4].copy_from_slice(&sints.stride.to_le_bytes());
        record[4..].copy_from_slice(&base.to_le_bytes());
        records.push(record);
    }
    records
}
