// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One opening of a page's node: what system calls on it do.
#![allow(unsafe_code, reason = "the entry points of the shim, and memory of processes")]

use core::ffi::{c_int, c_long, c_uint, c_ulong, c_void};
use core::fmt::Write;
use core::ptr::NonNull;

use vbus_driver::state::Owner;

use super::ffi;
use super::page::{Page, Ready};
use crate::kernel::lock::Mutex;
use crate::kernel::{Errno, KBox, KVec, Ref, sysfs};

/// An opening. Several threads may use it at a time.
struct File {
    page: Ref<Page>,
    /// The shim's node, which is there as long as the opening.
    node: NonNull<c_void>,
    writes: bool,
    state: Mutex<State>,
}

// SAFETY: the shim's functions take the node in any thread.
unsafe impl Sync for File {}

struct State {
    /// The version of the value that was read last. None: nothing was read.
    seen: Option<u64>,
    /// A value on its way to or from a process. It has memory from the first use on.
    buffer: KVec<u8>,
}

impl State {
    fn buffer(&mut self, bytes: usize) -> Result<&mut [u8], Errno> {
        if self.buffer.is_empty() {
            self.buffer = KVec::from_fn(bytes, |_| Ok::<u8, Errno>(0))?;
        }
        Ok(&mut self.buffer)
    }
}

impl File {
    /// A page of the device cannot be written.
    fn open(page: &Ref<Page>, node: NonNull<c_void>, writes: bool) -> Result<KBox<Self>, Errno> {
        if writes && page.description().owner == Owner::Device {
            return Err(Errno::ACCESS);
        }
        page.prepare()?;
        let state = Mutex::new(State { seen: None, buffer: KVec::new() })?;
        Ok(KBox::new(Self { page: page.clone(), node, writes, state })?)
    }

    fn wake(&self) {
        // SAFETY: the node is valid as long as the opening.
        unsafe { ffi::shim_node_wake(self.node.as_ptr()) };
    }

    /// At offset 0: the whole value, into as many bytes at least. Into 0 bytes: the caller takes
    /// note of the current version only. At the value's end there is nothing more to read.
    ///
    /// # Safety
    /// `user` is an address of the calling process, which the shim checks.
    unsafe fn read(&self, user: *mut c_void, bytes: u64, offset: u64) -> Result<usize, Errno> {
        let value = self.page.value_bytes();
        if offset == value as u64 {
            return Ok(0);
        }
        if offset != 0 || bytes != 0 && bytes < value as u64 {
            return Err(Errno::INVALID);
        }
        let mut state = self.state.lock();
        if bytes == 0 {
            state.seen = Some(self.page.version()?);
            return Ok(0);
        }
        let buffer = state.buffer(value)?;
        let version = self.page.read(buffer)?;
        // SAFETY: the buffer has as many bytes, and the shim checks the process's address.
        let copied = unsafe { ffi::shim_copy_to_user(user, buffer.as_ptr().cast(), value as u64) };
        Errno::check(copied)?;
        state.seen = Some(version);
        Ok(value)
    }

    /// At offset 0, the whole value.
    ///
    /// # Safety
    /// As for `read`.
    unsafe fn write(&self, user: *const c_void, bytes: u64, offset: u64) -> Result<usize, Errno> {
        let value = self.page.value_bytes();
        if offset != 0 || bytes != value as u64 {
            return Err(Errno::INVALID);
        }
        let mut state = self.state.lock();
        let buffer = state.buffer(value)?;
        // SAFETY: the buffer has as many bytes, and the shim checks the process's address.
        let copied =
            unsafe { ffi::shim_copy_from_user(buffer.as_mut_ptr().cast(), user, value as u64) };
        Errno::check(copied)?;
        self.page.write(buffer)?;
        drop(state);
        self.wake();
        Ok(value)
    }

    fn poll(&self) -> u32 {
        let seen = self.state.lock().seen;
        let out = if self.writes { ffi::POLL_OUT } else { 0 };
        match self.page.poll(seen) {
            Ready::Newer => ffi::POLL_IN | out,
            Ready::Waiting => out,
            Ready::Gone => ffi::POLL_IN | ffi::POLL_GONE | out,
        }
    }
}

/// An opening, as a reference.
///
/// # Safety
/// `file` came from [`vbus_state_open`], and [`vbus_state_release`] has not begun.
unsafe fn opened<'a>(file: *mut c_void) -> &'a File {
    // SAFETY: by the caller's promise. The value is only shared until it is released.
    unsafe { &*file.cast::<File>() }
}

fn count(result: Result<usize, Errno>) -> c_long {
    match result {
        // Values have 1 MiB at most.
        Ok(bytes) => bytes as c_long,
        Err(error) => c_long::from(error.negative()),
    }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_state_open(
    page: *mut c_void,
    node: *mut c_void,
    writes: bool,
    file: *mut *mut c_void,
) -> c_int {
    // SAFETY: the shim passes what it got with the node, which it has not given back yet.
    let page = unsafe { &*page.cast::<Ref<Page>>() };
    let Some(node) = NonNull::new(node) else { return Errno::INVALID.negative() };
    match File::open(page, node, writes) {
        Ok(opened) => {
            // SAFETY: the shim passes a place for it.
            unsafe { *file = opened.into_raw().cast() };
            0
        }
        Err(error) => error.negative(),
    }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_state_release(file: *mut c_void) {
    // SAFETY: it came from `vbus_state_open`, and the shim does not use it again.
    drop(unsafe { KBox::from_raw(file.cast::<File>()) });
}

#[unsafe(no_mangle)]
extern "C" fn vbus_state_bytes(file: *mut c_void) -> u64 {
    // SAFETY: as the shim says.
    unsafe { opened(file) }.page.value_bytes() as u64
}

#[unsafe(no_mangle)]
extern "C" fn vbus_state_read(
    file: *mut c_void,
    user: *mut c_void,
    bytes: u64,
    offset: u64,
) -> c_long {
    // SAFETY: as the shim says.
    count(unsafe { opened(file).read(user, bytes, offset) })
}

#[unsafe(no_mangle)]
extern "C" fn vbus_state_write(
    file: *mut c_void,
    user: *const c_void,
    bytes: u64,
    offset: u64,
) -> c_long {
    // SAFETY: as the shim says.
    count(unsafe { opened(file).write(user, bytes, offset) })
}

#[unsafe(no_mangle)]
extern "C" fn vbus_state_poll(file: *mut c_void) -> u32 {
    // SAFETY: as the shim says.
    unsafe { opened(file) }.poll()
}

#[unsafe(no_mangle)]
extern "C" fn vbus_state_sync(file: *mut c_void) -> c_int {
    // SAFETY: as the shim says.
    let file = unsafe { opened(file) };
    if file.writes {
        file.page.ring();
        file.wake();
    }
    0
}

#[unsafe(no_mangle)]
extern "C" fn vbus_state_map(file: *mut c_void, first: u64, pages: u64, writable: bool) -> c_int {
    // SAFETY: as the shim says.
    let file = unsafe { opened(file) };
    if writable && !file.writes {
        return Errno::ACCESS.negative();
    }
    Errno::result(file.page.check_mapping(first, pages))
}

#[unsafe(no_mangle)]
extern "C" fn vbus_state_mapped(file: *mut c_void, more: bool) {
    // SAFETY: as the shim says.
    unsafe { opened(file) }.page.mapped(more);
}

#[unsafe(no_mangle)]
extern "C" fn vbus_state_fault(file: *mut c_void, page: u64, fault: *mut c_void) -> u32 {
    // SAFETY: as the shim says.
    unsafe { opened(file).page.fault(page, fault) }.unwrap_or(u32::MAX)
}

#[unsafe(no_mangle)]
extern "C" fn vbus_state_show(
    page: *mut c_void,
    which: c_uint,
    out: *mut u8,
    bytes: c_ulong,
) -> c_long {
    // SAFETY: the shim passes what it got with the node, which it has not given back yet.
    let page = unsafe { &*page.cast::<Ref<Page>>() };
    let owner = match page.description().owner {
        Owner::Device => "device",
        Owner::Driver => "driver",
    };
    let write = |text: &mut dyn Write| {
        match which {
            ffi::STATE_OWNER => writeln!(text, "{owner}"),
            ffi::STATE_BYTES => writeln!(text, "{}", page.value_bytes()),
            ffi::STATE_NUMBER => writeln!(text, "{}", page.description().number),
            ffi::STATE_PAGE => writeln!(text, "{}", page.description().name),
            _ => return Err(Errno::INVALID),
        }?;
        Ok(())
    };
    // SAFETY: the shim passes that many bytes.
    unsafe { sysfs::show(out, bytes, write) }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_state_free(page: *mut c_void) {
    // SAFETY: it came from `into_raw` with the node, and the shim does not use it again.
    drop(unsafe { KBox::from_raw(page.cast::<Ref<Page>>()) });
}
