// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One page: its memory, and who reads, writes, maps and waits for it.
#![allow(unsafe_code, reason = "memory that is mapped by processes")]

use core::ffi::c_void;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vbus_driver::state::{Description, Owner, Pages};
use vbus_driver::{Bell, Dma as _, Error, Hal, Memory};
use vbus_shm::signal::Armed;
use vbus_shm::signal::end::{Device, Driver};
use vbus_shm::state::{Layout, Overrun, Reader, Writer};

use super::Shared;
use super::ffi;
use crate::hal::{Dma, KernelHal};
use crate::kernel::dma::PAGE;
use crate::kernel::lock::{Mutex, SpinLock};
use crate::kernel::{Errno, Ref};
use crate::{dev_err_limited, dev_warn_limited};

/// A page of the device. Its memory is registered when somebody first opens it, and from then on
/// as long as the device is there. So a page that nobody uses costs nothing.
///
/// Locks are taken in this order: the connection, `inner`, `waiting`. Neither of them is held while
/// memory of a process is accessed, because a fault there may ask for this page.
pub struct Page {
    shared: Ref<Shared>,
    description: Description,
    layout: Layout,
    vector: u16,
    inner: Mutex<Backing>,
    waiting: SpinLock<Option<Waiting>>,
    /// Mappings that can be written. While there are any, the page is theirs to write.
    writers: AtomicU32,
    /// Whether mappings may have written since the driver's last write.
    written: AtomicBool,
}

/// What is behind a page.
enum Backing {
    /// Nothing yet.
    None,
    /// Memory that the device reaches, or will reach again.
    Live(Live),
    /// The device has gone. The last memory, for those who have mapped it; there may have been no
    /// room for it.
    Gone(Option<Copy>),
}

struct Live {
    memory: Dma,
    ends: Ends,
    /// Rings for the device; none while there is no connection.
    bell: Option<Bell<KernelHal>>,
}

enum Ends {
    Device(Reader<Dma, Driver>),
    /// The driver's own page: it reads there what it has written.
    Driver(Writer<Dma, Driver>, Reader<Dma, Device>),
}

/// For whoever waits for a value of the device.
struct Waiting {
    reader: Reader<Dma, Driver>,
    /// The version after which an interrupt is to come.
    armed: Option<u64>,
}

/// What a poll finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// The page has another value than the caller has seen.
    Newer,
    /// It has not. The node is woken when it does.
    Waiting,
    /// The device has gone.
    Gone,
}

impl Page {
    /// The page with this description. Its interrupts come on `vector`.
    pub fn new(shared: &Ref<Shared>, page: &Description, vector: u16) -> Result<Self, Errno> {
        Ok(Self {
            shared: shared.clone(),
            description: *page,
            layout: page.layout()?,
            vector,
            inner: Mutex::new(Backing::None)?,
            waiting: SpinLock::new(None)?,
            writers: AtomicU32::new(0),
            written: AtomicBool::new(false),
        })
    }

    /// What the device said of it.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The vector of its interrupts.
    pub fn vector(&self) -> u16 {
        self.vector
    }

    /// Bytes of a value.
    pub fn value_bytes(&self) -> usize {
        self.layout.value_bytes()
    }

    /// Registers the page if it is not. May sleep. `EAGAIN`: the device is not open now, and the
    /// driver tries to open it again.
    pub fn prepare(&self) -> Result<(), Errno> {
        if self.is_live() {
            return Ok(());
        }
        self.shared.with_connection(|pages| {
            // Somebody else may have done it meanwhile. Whoever has the connection is alone here.
            if self.is_live() {
                return Ok(());
            }
            self.register(pages).map_err(|error| {
                let (pci, name) = (self.shared.pci(), self.description.name);
                dev_warn_limited!(pci, "the page {name} cannot be registered: {error}");
                Errno::from(error)
            })
        })
    }

    /// Whether the page has been registered, so that it belongs into every further connection.
    pub fn is_live(&self) -> bool {
        matches!(&*self.inner.lock(), Backing::Live(_))
    }

    /// Registers the page with an open device. A page that was registered in an earlier connection
    /// keeps its memory, its version and its value: mappings notice nothing. The caller holds the
    /// connection.
    pub fn register(&self, pages: &mut Pages<KernelHal>) -> Result<(), Error> {
        let now = pages.describe(self.description.number)?;
        let was = &self.description;
        if (now.name, now.value_bytes, now.owner) != (was.name, was.value_bytes, was.owner) {
            return Err(Error::Corrupt("a state page is another one than at probe"));
        }
        let (memory, fresh) = match &*self.inner.lock() {
            Backing::Live(live) => {
                self.repair(live)?;
                (live.memory.clone(), false)
            }
            _ => {
                let memory = pages.function().hal().alloc(self.layout.bytes())?;
                self.format(&memory, 0)?;
                (memory, true)
            }
        };
        // The ends are attached before the device can write the header.
        let fresh = fresh.then(|| self.attach(&memory)).transpose()?;
        let (_, bell) = pages.register(was, self.vector, &memory)?;
        let mut inner = self.inner.lock();
        if let Some((ends, waiting)) = fresh {
            *self.waiting.lock() = Some(waiting);
            *inner = Backing::Live(Live { memory, ends, bell: Some(bell) });
        } else if let Backing::Live(live) = &mut *inner {
            live.bell = Some(bell);
        }
        Ok(())
    }

    fn attach(&self, memory: &Dma) -> Result<(Ends, Waiting), Error> {
        let reader = || Reader::attach(memory.clone(), Driver).map_err(|_| LAYOUT);
        let ends = match self.description.owner {
            Owner::Device => Ends::Device(reader()?),
            Owner::Driver => Ends::Driver(
                Writer::attach(memory.clone(), Driver).map_err(|_| LAYOUT)?,
                Reader::attach(memory.clone(), Device).map_err(|_| LAYOUT)?,
            ),
        };
        Ok((ends, Waiting { reader: reader()?, armed: None }))
    }

    fn format(&self, memory: &Dma, version: u64) -> Result<(), Error> {
        self.layout.format(memory, version).map_err(|_| LAYOUT)
    }

    /// Writes the header again if it is not what it was: the device, or a process that had mapped
    /// the page, has changed it.
    fn repair(&self, live: &Live) -> Result<(), Error> {
        let header = Reader::attach(live.memory.clone(), Driver).map(|reader| reader.layout());
        if header == Ok(self.layout) {
            return Ok(());
        }
        self.format(&live.memory, live.version())
    }

    /// Rings no more: there is no connection.
    pub fn disconnect(&self) {
        if let Backing::Live(live) = &mut *self.inner.lock() {
            live.bell = None;
        }
    }

    /// The device has gone for good. Mappings keep the last values, in memory that the device does
    /// not reach: the node's are to be taken away afterwards. The device has let go of the page.
    pub fn retire(&self) {
        *self.waiting.lock() = None;
        let mut inner = self.inner.lock();
        let copy = match &*inner {
            Backing::Live(live) => Copy::of(&live.memory),
            _ => None,
        };
        *inner = Backing::Gone(copy);
    }

    /// Copies the current value into the front of `out` and returns its version. A page of the
    /// driver has no value until it was written (`ENODATA`).
    pub fn read(&self, out: &mut [u8]) -> Result<u64, Errno> {
        let inner = self.inner.lock();
        let Backing::Live(live) = &*inner else { return Err(Errno::NO_DEVICE) };
        let read = match &live.ends {
            Ends::Device(reader) => reader.read(out),
            Ends::Driver(_, reader) if reader.version() == 0 => return Err(Errno::NO_DATA),
            Ends::Driver(_, reader) => reader.read(out),
        };
        read.map_err(|Overrun| {
            let (pci, name) = (self.shared.pci(), self.description.name);
            dev_err_limited!(pci, "the page {name} changes during every read of it");
            Errno::IO
        })
    }

    /// The current version.
    pub fn version(&self) -> Result<u64, Errno> {
        match &*self.inner.lock() {
            Backing::Live(live) => Ok(live.version()),
            _ => Err(Errno::NO_DEVICE),
        }
    }

    /// Makes `value` the current value of a page of the driver. `EBUSY`: a process has mapped the
    /// page for writing.
    pub fn write(&self, value: &[u8]) -> Result<(), Errno> {
        let mut inner = self.inner.lock();
        let Backing::Live(live) = &mut *inner else { return Err(Errno::NO_DEVICE) };
        // Pairs with the change in `mapped`. A mapping that comes meanwhile is a second writer,
        // which spoils values and nothing else.
        if self.writers.load(Ordering::Relaxed) > 0 {
            return Err(Errno::BUSY);
        }
        if self.written.swap(false, Ordering::Relaxed) {
            self.repair(live)?;
            if let Ends::Driver(writer, _) = &mut live.ends {
                let (resumed, kick) =
                    Writer::resume(live.memory.clone(), Driver).map_err(|_| Errno::PROTOCOL)?;
                *writer = resumed;
                live.bell.as_ref().map(|bell| bell.kick(kick));
            }
        }
        let Ends::Driver(writer, _) = &mut live.ends else { return Err(Errno::ACCESS) };
        let kick = writer.write(value);
        live.bell.as_ref().map(|bell| bell.kick(kick));
        Ok(())
    }

    /// Rings for the device: a process has written by a mapping.
    pub fn ring(&self) {
        if let Backing::Live(Live { bell: Some(bell), ends: Ends::Driver(..), .. }) =
            &*self.inner.lock()
        {
            bell.ring();
        }
    }

    /// Whether there is another value than that of version `seen`. If not, an interrupt comes with
    /// the next one.
    pub fn poll(&self, seen: Option<u64>) -> Ready {
        if self.description.owner == Owner::Driver {
            // Whoever writes the page wakes those who wait.
            return match self.version() {
                Ok(version) if Some(version) == seen || version == 0 => Ready::Waiting,
                Ok(_) => Ready::Newer,
                Err(_) => Ready::Gone,
            };
        }
        let mut waiting = self.waiting.lock();
        let Some(Waiting { reader, armed }) = &mut *waiting else { return Ready::Gone };
        let Some(seen) = seen else { return Ready::Newer };
        if reader.version() != seen || reader.arm_newer(seen) == Armed::Missed {
            return Ready::Newer;
        }
        *armed = Some(seen);
        Ready::Waiting
    }

    /// An interrupt has come on the page's vector. Whether it was for those who wait for the page.
    /// In interrupt context.
    pub fn interrupted(&self) -> bool {
        let mut waiting = self.waiting.lock();
        let Some(Waiting { reader, armed }) = &mut *waiting else { return false };
        let newer = armed.is_some_and(|at| reader.version() != at);
        if newer {
            *armed = None;
        }
        newer
    }

    /// Checks a mapping of `pages` pages from page `first` of the memory.
    pub fn check_mapping(&self, first: u64, pages: u64) -> Result<(), Errno> {
        let all = self.layout.bytes().div_ceil(PAGE) as u64;
        let fits = first.checked_add(pages).is_some_and(|end| end <= all);
        if fits { Ok(()) } else { Err(Errno::INVALID) }
    }

    /// There is one more mapping that can be written, or one less.
    pub fn mapped(&self, more: bool) {
        // Both pair with the loads in `write`, where nothing but values depends on them.
        if more {
            self.writers.fetch_add(1, Ordering::Relaxed);
        } else {
            self.written.store(true, Ordering::Relaxed);
            self.writers.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Maps page `page` of the memory for the access `fault`. `None`: there is no such memory.
    ///
    /// # Safety
    /// `fault` is the shim's handle of an access that waits for it.
    pub unsafe fn fault(&self, page: u64, fault: *mut c_void) -> Option<u32> {
        let at = usize::try_from(page).ok()?.checked_mul(PAGE)?;
        // What is mapped here before the lock is released is taken away after `retire`.
        let inner = self.inner.lock();
        let (place, shared) = match &*inner {
            Backing::Live(live) => (live.memory.place(at)?, true),
            Backing::Gone(Some(copy)) => (copy.place(at)?, false),
            Backing::None | Backing::Gone(None) => return None,
        };
        // SAFETY: the handle is valid by the caller's promise. The page of memory at `place` stays
        // until this page is dropped or retired, and mappings do not outlive either.
        Some(unsafe { ffi::shim_fault_insert(fault, place, shared) })
    }
}

impl Live {
    fn version(&self) -> u64 {
        match &self.ends {
            Ends::Device(reader) => reader.version(),
            Ends::Driver(_, reader) => reader.version(),
        }
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Page({})", self.description.name)
    }
}

const LAYOUT: Error = Error::Unsupported("a state page of that size");

/// Memory with the last content of a page.
struct Copy {
    memory: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: it owns its memory, which nobody writes any more but processes that have mapped it.
unsafe impl Send for Copy {}

impl Copy {
    fn of(from: &Dma) -> Option<Self> {
        let bytes = from.bytes();
        // SAFETY: it has no conditions but that the caller may sleep.
        let memory = NonNull::new(unsafe { ffi::shim_pages_new(bytes as u64) })?;
        // SAFETY: the memory has as many bytes, is aligned to a page, and nobody else has it yet.
        let out = unsafe { core::slice::from_raw_parts_mut(memory.as_ptr().cast::<u8>(), bytes) };
        from.copy_out(0, out);
        Some(Self { memory, bytes })
    }

    /// The page at byte `at`, a multiple of the size of a page.
    fn place(&self, at: usize) -> Option<*const c_void> {
        (at < self.bytes).then(|| self.memory.as_ptr().wrapping_byte_add(at).cast_const())
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // SAFETY: it came from `shim_pages_new`. Its mappings are gone.
        unsafe { ffi::shim_pages_free(self.memory.as_ptr()) };
    }
}

impl Dma {
    /// The page of memory at byte `at`, a multiple of the size of a page.
    fn place(&self, at: usize) -> Option<*const c_void> {
        let words = self.words();
        let word = words.get(at / size_of_val(words.first()?))?;
        Some(core::ptr::from_ref(word).cast())
    }
}
