// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One PCI function: probe, the class's driver, and the function's life until its removal.
#![allow(unsafe_code, reason = "the entry points of the shim")]

use core::ffi::{c_int, c_long, c_uint, c_ulong, c_void};
use core::fmt::Write;

use vbus_driver::{Costs, Doorbell, Error, Function, Info, has_signature};
use vbus_shm::abi;

use crate::hal::KernelHal;
use crate::interrupt::Interrupts;
use crate::kernel::pci::{Claimed, Pci};
use crate::kernel::{Errno, KBox, cpu, sysfs};
use crate::{dev_err, dev_info, dev_warn};

/// The most vectors that the driver takes: one for each queue pair of the largest NIC, and one for
/// events. An interrupt controller has one for each processor.
const VECTORS_MAX: u32 = 17;
/// How often each kind of doorbell is rung when the driver measures them.
const RINGS: u32 = 32;
/// Bits of an address that a device can use.
const ADDRESS_BITS: u32 = 64;

/// What a class's driver does. Its value is dropped when the function goes: it then closes its
/// connection and leaves the rest of the kernel.
pub trait Class: Send + Sync {
    /// Ends the connection: the system goes to sleep or down, or the function is about to be reset.
    /// May sleep.
    fn suspend(&self);

    /// Opens the connection again, with all settings: the system has woken, or the function was
    /// reset. If that fails, the class tries again later. May sleep.
    fn resume(&self) -> Result<(), Error>;
}

/// A class's driver behind the trait.
pub fn class<T: Class + 'static>(class: KBox<T>) -> KBox<dyn Class> {
    let class: *mut dyn Class = class.into_raw();
    // SAFETY: the address came from `into_raw`, and nobody else has it.
    unsafe { KBox::from_raw(class) }
}

/// What takes a device for a class.
type Probe = fn(&Device) -> Result<KBox<dyn Class>, Errno>;

/// What takes a device of this class, if the driver knows the class. Each class has its arm here.
fn driver_of(class: u32) -> Option<Probe> {
    // Class numbers have 16 bits.
    match u16::try_from(class).ok()? {
        abi::class::VENET => Some(|device| Ok(self::class(crate::net::probe(device)?))),
        abi::class::PIC => Some(|device| Ok(self::class(crate::pic::probe(device)?))),
        abi::class::SCHED => Some(|device| Ok(self::class(crate::sched::probe(device)?))),
        abi::class::STATE => Some(|device| Ok(self::class(crate::state::probe(device)?))),
        _ => None,
    }
}

/// A function of vbus that is enabled, as its class finds it.
#[derive(Debug)]
pub struct Device {
    /// For what the registers say; it is never opened.
    inspect: Function<KernelHal>,
    costs: Costs,
    interrupts: Interrupts,
    /// Given back when all of the above is gone.
    _claimed: Claimed,
}

impl Device {
    /// Enables the function. If there is a driver for its class, measures its doorbells and
    /// allocates its vectors.
    fn new(pci: &Pci) -> Result<(Self, Probe), Errno> {
        if !has_signature(|offset| pci.config_read32(offset)) {
            dev_info!(pci, "this is no function of vbus: it has no capability with the signature");
            return Err(Errno::NO_DEVICE);
        }
        let claimed = Claimed::new(pci)?;
        pci.set_dma_bits(ADDRESS_BITS)?;
        let hal = KernelHal::new(pci)?;
        let mut inspect = Function::probe(hal).map_err(|error| report(pci, error))?;
        let info = inspect.info();
        let Some(probe) = driver_of(info.class) else {
            let (name, number, device) = (info.class_name, info.class, info.name);
            dev_info!(
                pci,
                "this version of the driver does not know the class {name} ({number}) of the \
                 device {device}; it leaves the device to others"
            );
            return Err(Errno::NO_DEVICE);
        };
        let class = info.class;
        // Without it VMMs withhold the function's messages.
        pci.set_master(true);
        KernelHal::claim_ports(&inspect);
        let costs = inspect.choose_doorbell(RINGS);
        let most = if class == u32::from(abi::class::PIC) { cpu::numbers() } else { VECTORS_MAX };
        let interrupts = Interrupts::new(&inspect, most)
            .inspect_err(|error| dev_err!(pci, "the kernel has no interrupt for it: {error}"))?;
        pci.save();
        Ok((Self { inspect, costs, interrupts, _claimed: claimed }, probe))
    }

    /// The PCI function, for messages.
    pub fn pci(&self) -> &Pci {
        self.hal().pci()
    }

    /// The environment.
    pub fn hal(&self) -> &KernelHal {
        self.inspect.hal()
    }

    /// What the registers said at probe.
    pub fn info(&self) -> &Info {
        self.inspect.info()
    }

    /// The vectors.
    pub fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    /// The kind of doorbell that was the cheapest at probe.
    pub fn doorbell(&self) -> Doorbell {
        self.inspect.doorbell()
    }

    /// A function for the class to open, with the cheapest kind of doorbell.
    pub fn function(&self) -> Result<Function<KernelHal>, Error> {
        self.hal().function(self.doorbell().kind)
    }

    /// Writes an attribute of sysfs.
    fn show(&self, which: c_uint, text: &mut dyn Write) -> Result<(), Errno> {
        let info = self.info();
        match which {
            sysfs::SHOW_CLASS => writeln!(text, "{}", info.class_name),
            sysfs::SHOW_NAME => writeln!(text, "{}", info.name),
            sysfs::SHOW_DOORBELL => writeln!(text, "{}", self.doorbell()),
            sysfs::SHOW_COSTS => self
                .costs
                .iter()
                .try_for_each(|cost| writeln!(text, "{} {}", cost.doorbell, cost.nanoseconds)),
            sysfs::SHOW_INCARNATION => writeln!(text, "{:#018x}", self.inspect.incarnation()?),
            sysfs::SHOW_INTERRUPTS => {
                writeln!(text, "{} {}", self.interrupts.kind(), self.interrupts.count())
            }
            _ => return Err(Errno::INVALID),
        }?;
        Ok(())
    }
}

/// Logs why a device cannot be used.
pub fn report(pci: &Pci, error: Error) -> Errno {
    dev_err!(pci, "the device cannot be used: {error}");
    error.into()
}

/// A function with its class's driver: what the kernel keeps for us.
struct Bound {
    class: KBox<dyn Class>,
    device: Device,
}

impl Bound {
    fn new(pci: &Pci) -> Result<KBox<Self>, Errno> {
        let (device, probe) = Device::new(pci)?;
        let class = probe(&device)?;
        let info = device.info();
        dev_info!(
            pci,
            "{} device {}, doorbell {}, interrupts {} {}",
            info.class_name,
            info.name,
            device.doorbell(),
            device.interrupts.kind(),
            device.interrupts.count()
        );
        Ok(KBox::new(Self { class, device })?)
    }
}

/// What the kernel keeps, as a reference.
///
/// # Safety
/// `device` came from [`vbus_probe`], and [`vbus_remove`] has not begun.
unsafe fn bound<'a>(device: *mut c_void) -> &'a Bound {
    // SAFETY: by the caller's promise. The value is only shared until it is removed.
    unsafe { &*device.cast::<Bound>() }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_probe(pci: *mut c_void, device: *mut *mut c_void) -> c_int {
    // SAFETY: the shim passes a function that the kernel has given to this driver.
    let Some(pci) = (unsafe { Pci::new(pci) }) else { return Errno::INVALID.negative() };
    match Bound::new(&pci) {
        Ok(bound) => {
            // SAFETY: the shim passes a place for it.
            unsafe { *device = bound.into_raw().cast() };
            0
        }
        Err(error) => error.negative(),
    }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_remove(device: *mut c_void) {
    // SAFETY: it came from `vbus_probe`, and the shim does not use it again.
    drop(unsafe { KBox::from_raw(device.cast::<Bound>()) });
}

#[unsafe(no_mangle)]
extern "C" fn vbus_shutdown(device: *mut c_void) {
    if device.is_null() {
        return;
    }
    // SAFETY: as the shim says.
    let bound = unsafe { bound(device) };
    // First of all: this ends the connection, and no DMA comes after it.
    bound.device.pci().set_master(false);
    bound.class.suspend();
    // The class's watch may just have opened a connection that it had found lost. It has ended now.
    bound.device.pci().set_master(false);
}

#[unsafe(no_mangle)]
extern "C" fn vbus_suspend(device: *mut c_void) {
    // SAFETY: as the shim says.
    unsafe { bound(device) }.class.suspend();
}

#[unsafe(no_mangle)]
extern "C" fn vbus_resume(device: *mut c_void) {
    // SAFETY: as the shim says.
    let bound = unsafe { bound(device) };
    let pci = bound.device.pci();
    pci.set_master(true);
    if let Err(error) = bound.class.resume() {
        dev_warn!(pci, "the device cannot be opened again yet: {error}");
    }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_show(
    device: *mut c_void,
    which: c_uint,
    out: *mut u8,
    bytes: c_ulong,
) -> c_long {
    // SAFETY: as the shim says.
    let device = unsafe { &bound(device).device };
    // SAFETY: the shim passes that many bytes.
    unsafe { sysfs::show(out, bytes, |text| device.show(which, text)) }
}
