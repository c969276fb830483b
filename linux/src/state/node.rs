// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the kernel has of a state device: a folder in /dev/vbus, with a node for each page.
#![allow(unsafe_code, reason = "calls the shim")]

use core::ffi::{c_int, c_uint, c_void};
use core::fmt::{self, Write};
use core::ptr::NonNull;

use super::ffi;
use super::page::Page;
use crate::kernel::log::Text;
use crate::kernel::pci::Pci;
use crate::kernel::{Errno, KBox, Ref};

/// The longest name in a path, in bytes: the longest name of a page, with each byte escaped.
const NAME_BYTES: usize = 3 * 56;

/// A name as one part of a path. A byte that a path or the kernel could take for something else is
/// written as `%` and two hexadecimal digits: `/`, `!`, `%`, control characters, and a dot at the
/// beginning.
pub struct PathName(Text<NAME_BYTES>);

impl PathName {
    /// The path of `name`.
    pub fn new(name: &str) -> Self {
        Self::with_suffix(name, format_args!(""))
    }

    /// The path of `name`, with the address of a function behind it.
    pub fn with_address(name: &str, address: &str) -> Self {
        Self::with_suffix(name, format_args!("@{address}"))
    }

    fn with_suffix(name: &str, suffix: fmt::Arguments<'_>) -> Self {
        let mut text = Text::new(format_args!(""));
        for (at, c) in name.chars().enumerate() {
            let is_plain = !c.is_control() && !matches!(c, '/' | '!' | '%') && (at > 0 || c != '.');
            // There is room for the longest name. A longer one is cut.
            let _ = match u32::from(c) {
                _ if is_plain => text.write_char(c),
                code => write!(text, "%{code:02x}"),
            };
        }
        let _ = text.write_fmt(suffix);
        Self(text)
    }

    fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    fn is_empty(&self) -> bool {
        self.as_bytes().is_empty()
    }
}

/// The folder of a device in /dev/vbus. Its nodes are dropped before.
pub struct Folder(NonNull<c_void>);

// SAFETY: the kernel's functions take the handle in any thread.
unsafe impl Send for Folder {}
// SAFETY: as above.
unsafe impl Sync for Folder {}

impl Folder {
    /// A folder of this name. `EEXIST`: there is one.
    pub fn new(pci: &Pci, name: &PathName) -> Result<Self, Errno> {
        let bytes = name.as_bytes();
        if name.is_empty() {
            return Err(Errno::INVALID);
        }
        let mut error: c_int = 0;
        // SAFETY: the handle and the name are valid during the call.
        let folder = unsafe {
            ffi::shim_folder_new(pci.handle(), bytes.as_ptr(), bytes.len() as u64, &raw mut error)
        };
        NonNull::new(folder).map(Self).ok_or_else(|| failed(error))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // SAFETY: it has no nodes any more.
        unsafe { ffi::shim_folder_free(self.0.as_ptr()) };
    }
}

/// The node of a page. Dropping it takes it away from /dev; who has it open keeps the page.
pub struct Node(NonNull<c_void>);

// SAFETY: the kernel's functions take the handle in any thread.
unsafe impl Send for Node {}
// SAFETY: as above.
unsafe impl Sync for Node {}

impl Node {
    /// A node for `page` with the permissions `mode`. It can be opened at once.
    pub fn new(
        folder: &Folder,
        name: &PathName,
        mode: c_uint,
        page: &Ref<Page>,
    ) -> Result<Self, Errno> {
        let bytes = name.as_bytes();
        if name.is_empty() {
            return Err(Errno::INVALID);
        }
        let page = KBox::new(page.clone())?.into_raw();
        let mut error: c_int = 0;
        // SAFETY: the folder is valid, the name during the call, and the page until it is freed.
        let node = unsafe {
            let (name, length) = (bytes.as_ptr(), bytes.len() as u64);
            ffi::shim_node_new(folder.0.as_ptr(), name, length, mode, page.cast(), &raw mut error)
        };
        NonNull::new(node).map(Self).ok_or_else(|| {
            // SAFETY: it came from `into_raw` above, and the shim does not use it.
            drop(unsafe { KBox::from_raw(page) });
            failed(error)
        })
    }

    /// Wakes all who wait for the page. From any context.
    pub fn wake(&self) {
        // SAFETY: the node is valid as long as this.
        unsafe { ffi::shim_node_wake(self.0.as_ptr()) };
    }

    /// Takes the memory of all mappings away. Their next accesses ask for it again.
    pub fn unmap(&self) {
        // SAFETY: as above.
        unsafe { ffi::shim_node_unmap(self.0.as_ptr()) };
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // SAFETY: nobody here uses it again.
        unsafe { ffi::shim_node_free(self.0.as_ptr()) };
    }
}

fn failed(error: c_int) -> Errno {
    Errno::check(error).err().unwrap_or(Errno::IO)
}
