// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Test `doorbells`: the cost of each kind of doorbell.

use vbus_driver::Doorbell;
use vbus_driver::venet::Nic;
use vbus_shm::abi::{class, venet};

use crate::hal::{KINDS, kind_name};
use crate::report::{Failure, Outcome, line};
use crate::{Setting, clock, mark};

/// Rings the doorbell of a region of the first NIC `count=` times by each kind that the device
/// offers, between two marks. The driver has posted nothing, so the device polls the ring, finds
/// nothing, and does not interrupt.
pub fn run<'a>(setting: &Setting<'a>) -> Outcome<'a> {
    let count = setting.number("count", 2000);
    let hal =
        setting.of_class(class::VENET).next().ok_or(Failure::Said("no device of class venet"))?;
    for kind in KINDS {
        // A device does not offer every kind.
        let Ok(function) = hal.with_kind(kind).function() else { continue };
        let mut nic = Nic::open(function, 0, 0)?;
        // Its handle follows the handle of the status page.
        nic.queue_pair(0, 32, 4096, 0)?;
        let Doorbell { base, stride, .. } = nic.function().doorbell();
        let bell = nic.function().bell(HANDLE);
        bell.ring();
        let began = clock::now();
        let from = mark::set();
        for _ in 0..count {
            bell.ring();
        }
        let to = mark::set();
        let ns = (clock::now() - began) / count.max(1);
        nic.function().check()?;
        nic.close();
        line("doorbells")
            .value("ok", true)
            .text("kind", kind_name(kind))
            .text("base", format_args!("{base:#x}"))
            .value("stride", stride)
            .value("count", count)
            .value("from", from)
            .value("to", to)
            .value("ns", ns)
            .end();
    }
    Ok(())
}

/// The lowest free handle, because the status page has the first one.
const HANDLE: u32 = 1;
const _: () = assert!(venet::REGION_STATUS != venet::tx(0));
