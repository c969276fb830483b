// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interrupts without an exit at their end (spec/pic.md): the driver of the class `pic`.
//!
//! The controller has a page for each processor, in memory that both ends write, and one vector for
//! each page. Its lines are interrupts of the kernel with numbers of their own, in a domain. It
//! carries the interrupts of this module's other devices, as far as the bus allows that: then their
//! own vectors are silent. The vector's handler takes lines from the page and ends them, with loads
//! and stores alone. Only the vector itself has an end that may be an exit, once for all lines that
//! came together.
//!
//! Locks, in this order: [`Core::state`], then the list of all sources ([`sources::lock`]). What
//! interrupts share is behind the lock of a page.
#![allow(unsafe_code, reason = "interrupts and the shim refer to what they are kept with")]

mod domain;
mod ffi;
mod page;
mod processor;
mod routes;
pub mod sources;

use core::ffi::{c_int, c_void};
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use vbus_driver::pic::{Nesting, Pic};
use vbus_driver::{Error, Events};
use vbus_shm::pic::LINES_MAX;

use self::domain::{Allowed, Domain};
use self::page::Unmasked;
use self::processor::{Owner, Processor};
use self::routes::{Carrier, Homes, Lines, Tried, home};
use self::sources::Carrying;
use crate::connection::{BUDGET, Connection};
use crate::device::{Class, Device, report};
use crate::hal::KernelHal;
use crate::interrupt::{Interrupt, Interrupts};
use crate::kernel::irq::bind;
use crate::kernel::lock::Mutex;
use crate::kernel::{Errno, KBox, KVec, cpu};
use crate::watch::{Watch, Watched};

/// Takes a device of the class.
pub fn probe(device: &Device) -> Result<KBox<Controller>, Errno> {
    let core = Core::new(device)?;
    let watch = KBox::new(Watch::new(core)?)?;
    let mut this = KBox::new(Controller { carrying: None, interrupts: KVec::new(), watch })?;
    let Controller { carrying, interrupts, watch } = &mut *this;
    watch.watch.store((&raw const **watch).cast_mut(), Ordering::Release);
    let name = device.info().name;
    let is_bound = watch.cpus.len() > 1;
    for (vector, cpu) in (0..).zip(watch.cpus.iter()) {
        let target = NonNull::from(cpu);
        let run = |cpu: &Processor<Core>, _| cpu.message();
        let vectors = device.interrupts();
        // SAFETY: the core with its processors stays at its place until the interrupt is dropped.
        let interrupt = unsafe {
            let request = Interrupts::request_for_others;
            request(vectors, vector, format_args!("vbus-{name}-{vector}"), target, is_bound, run)
        };
        let interrupt = interrupt?;
        if is_bound {
            cpu.set_irq(interrupt.number());
        }
        interrupts.push(interrupt)?;
    }
    // SAFETY: the watch stays at its place until the list knows it no more.
    let carrying = carrying.insert(unsafe { Carrying::new(NonNull::from(&**watch)) }?);
    watch.carrier.store(carrying.id(), Ordering::Relaxed);
    watch.reopen().map_err(|error| report(device.pci(), error))?;
    Ok(this)
}

/// A device of the class.
pub struct Controller {
    /// Dropped first: lines have no handlers any more.
    carrying: Option<Carrying>,
    interrupts: KVec<Interrupt<Processor<Core>>>,
    watch: KBox<Watch<Core>>,
}

/// What the callbacks find.
struct Core {
    hal: KernelHal,
    /// The kind of doorbell in use.
    doorbell: u8,
    /// With their timers, which are dropped before the domain.
    cpus: KVec<Processor<Core>>,
    /// None only until the core is complete.
    domain: Option<Domain>,
    /// The pages that routes shall lead to.
    homes: Homes,
    /// The pages of the connection, or of the last one: the device may take fewer than there are
    /// processors. Only a hint for `move_to`: a route beyond them leads to one of them.
    pages: AtomicU32,
    /// The lines that the kernel wants.
    unmasked: [AtomicU64; LINES_MAX as usize / 64],
    state: Mutex<State>,
    /// The number in the list of carriers.
    carrier: AtomicU64,
    /// With the watch over it.
    watch: AtomicPtr<Watch<Core>>,
    /// The device sends messages without lines.
    fault: AtomicBool,
}

struct State {
    connection: Connection<Open>,
    lines: Lines,
}

/// An open device.
struct Open {
    /// Whose pages are in use.
    core: NonNull<Core>,
    pic: Pic<KernelHal>,
    /// Pages that are registered.
    pages: u32,
    tried: Tried,
}

// SAFETY: it shares the core, which is Sync.
unsafe impl Send for Open {}

impl Open {
    fn new(core: &Core) -> Result<Self, Error> {
        let mut function = core.hal.function(core.doorbell)?;
        function.set_budget(Some(BUDGET));
        let pic = Pic::open(function)?;
        let mut this = Self { core: NonNull::from(core), pic, pages: 0, tried: Tried::default() };
        let pages = u32::try_from(core.cpus.len()).unwrap_or(u32::MAX).min(this.pic.cpus());
        for (number, cpu) in (0..pages).zip(core.cpus.iter()) {
            // The vectors of the pages have their numbers.
            let vector = u16::try_from(number).unwrap_or(u16::MAX);
            let controller = this.pic.cpu(number, LINES_MAX, Nesting::Flat, vector)?;
            cpu.install(controller, || core.unmasked());
            this.pages += 1;
        }
        if this.pages == 0 {
            return Err(Error::Corrupt("an interrupt controller without processors"));
        }
        core.pages.store(this.pages, Ordering::Relaxed);
        Ok(this)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        // SAFETY: the core has this connection.
        let core = unsafe { self.core.as_ref() };
        core.cpus.iter().for_each(Processor::uninstall);
        // The connection ends after that. What it carried comes by its own vectors then, once at
        // once.
    }
}

impl Core {
    fn new(device: &Device) -> Result<KBox<Self>, Errno> {
        // The device may take fewer processors. It tells when it is open.
        let pages = u32::from(device.interrupts().count()).min(cpu::numbers());
        let state = State { connection: Connection::Lost(Error::Gone), lines: Lines::new()? };
        let mut core = KBox::new(Self {
            hal: device.hal().clone(),
            doorbell: device.doorbell().kind,
            cpus: KVec::new(),
            domain: None,
            homes: [const { AtomicU32::new(0) }; LINES_MAX as usize],
            pages: AtomicU32::new(pages),
            unmasked: [const { AtomicU64::new(0) }; LINES_MAX as usize / 64],
            state: Mutex::new(state)?,
            carrier: AtomicU64::new(0),
            watch: AtomicPtr::new(ptr::null_mut()),
            fault: AtomicBool::new(false),
        })?;
        let this = NonNull::from(&mut *core);
        // SAFETY: the core stays at its place until it is dropped, and the domain with it.
        core.domain = Some(unsafe { Domain::new(device.pci(), LINES_MAX, this) }?);
        // SAFETY: the core stays at its place until it is dropped, and the processors with it.
        let new = |_| unsafe { Processor::new(this) };
        core.cpus = KVec::from_fn(usize::try_from(pages).unwrap_or(1), new)?;
        for cpu in core.cpus.iter_mut() {
            // SAFETY: the processors stay at their places as long as the core.
            unsafe { cpu.start_timer() }?;
        }
        Ok(core)
    }

    /// The lines that the kernel wants.
    fn unmasked(&self) -> Unmasked {
        // Pairs with the change in `set_masked`, by the lock of each page.
        self.unmasked.each_ref().map(|word| word.load(Ordering::Relaxed))
    }

    /// The kernel wants no interrupts of a line, or wants them again. It holds the lock of the
    /// interrupt.
    fn set_masked(&self, line: u16, masked: bool) {
        let Some(word) = self.unmasked.get(usize::from(line / 64)) else { return };
        let bit = 1 << (line % 64);
        // A page that is installed later loads it with the lock of the page.
        if masked {
            word.fetch_and(!bit, Ordering::Relaxed);
        } else {
            word.fetch_or(bit, Ordering::Relaxed);
        }
        // All pages: masks do not follow a route.
        for cpu in self.cpus.iter() {
            cpu.set_masked(line, masked);
        }
    }

    /// The processor that gets a line soon, of those that are allowed. The caller holds the lock of
    /// the interrupt.
    fn move_to(&self, line: u16, allowed: Allowed<'_>) -> Result<u32, Errno> {
        let pages = self.pages.load(Ordering::Relaxed);
        let now = home(&self.homes, line, pages);
        if allowed.has(now) {
            return Ok(now);
        }
        // Only a processor with a page of its own takes lines.
        if let Some(cpu) = (0..pages).find(|cpu| allowed.has(*cpu)) {
            self.homes.get(usize::from(line)).ok_or(Errno::INVALID)?.store(cpu, Ordering::Relaxed);
            // The route moves in a thread: the device has to do it.
            self.look_soon();
            return Ok(cpu);
        }
        if cpu::is_online(now) {
            return Err(Errno::INVALID);
        }
        // The processor goes. The kernel moves the page's vector, and all lines with it.
        allowed.first().ok_or(Errno::INVALID)
    }
}

impl Owner for Core {
    fn handle(&self, line: u16) {
        if let Some(domain) = &self.domain {
            domain.handle(line);
        }
    }

    /// Lets the watch look at events and routes. From any context.
    fn look_soon(&self) {
        // SAFETY: the watch is there until it is taken out, by the drop of the controller.
        if let Some(watch) = unsafe { self.watch.load(Ordering::Acquire).as_ref() } {
            watch.soon();
        }
    }

    fn fault(&self) {
        self.fault.store(true, Ordering::Relaxed);
    }
}

impl Watched for Core {
    fn hal(&self) -> &KernelHal {
        &self.hal
    }

    fn look(&self) -> Result<Events, Error> {
        let State { connection, lines } = &mut *self.state.lock();
        let events = connection.look(|open| open.pic.function())?;
        let (Connection::Open(open), Some(domain)) = (&mut *connection, &self.domain) else {
            return Ok(events);
        };
        if self.fault.swap(false, Ordering::Relaxed) {
            return Err(Error::Corrupt("the controller sends messages for no lines"));
        }
        let mut carrier = Carrier {
            pic: &mut open.pic,
            tried: &mut open.tried,
            pages: open.pages,
            id: self.carrier.load(Ordering::Relaxed),
            domain,
            homes: &self.homes,
        };
        lines.update(&mut carrier)?;
        // A processor that was off has lost its interrupt to another one.
        for (number, cpu) in (0..).zip(self.cpus.iter()) {
            match cpu.irq() {
                0 => {}
                irq => bind(irq, number),
            }
        }
        Ok(events)
    }

    fn reopen(&self) -> Result<(), Error> {
        let State { connection, lines } = &mut *self.state.lock();
        lines.forget_routes();
        self.fault.store(false, Ordering::Relaxed);
        connection.reopen(|| Open::new(self))?;
        // There are routes to make.
        self.look_soon();
        Ok(())
    }

    fn sleep(&self) {
        self.state.lock().connection = Connection::Asleep;
    }

    fn wake(&self) -> Result<(), Error> {
        self.state.lock().connection.wake();
        self.reopen()
    }

    fn gone(&self) {
        self.state.lock().connection.lose();
    }

    fn config_changed(&self) {
        // The numbers of processors and lines are fixed for the life of a device.
    }

    fn announce(&self) {
        // There is nothing to announce.
    }
}

impl sources::Carrier for Watch<Core> {
    fn wake(&self) {
        self.soon();
    }
}

impl Class for Controller {
    fn suspend(&self) {
        self.watch.suspend();
    }

    fn resume(&self) -> Result<(), Error> {
        self.watch.resume()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        // First the devices get their own vectors back.
        self.watch.suspend();
        self.carrying = None;
        self.watch.watch.store(ptr::null_mut(), Ordering::Release);
        // No handler runs any more that has found the watch before.
        self.interrupts = KVec::new();
    }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_pic_mask(data: *mut c_void, line: u32, masked: bool) {
    if let Ok(line) = u16::try_from(line) {
        // SAFETY: the shim passes what `Domain::new` got.
        unsafe { &*data.cast::<Core>() }.set_masked(line, masked);
    }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_pic_affinity(data: *mut c_void, line: u32, mask: *const c_void) -> c_int {
    let Ok(line) = u16::try_from(line) else { return Errno::INVALID.negative() };
    // SAFETY: the shim passes what `Domain::new` got, and a mask that is valid during the call.
    let (core, allowed) = unsafe { (&*data.cast::<Core>(), Allowed::new(mask)) };
    match core.move_to(line, allowed) {
        Ok(cpu) => c_int::try_from(cpu).unwrap_or(Errno::INVALID.negative()),
        Err(error) => error.negative(),
    }
}
