// SPDX-License-Identifier: Apache-2.0 OR MIT
//! State pages by a mapping of their files, `/dev/vbus/DEVICE/PAGE`.
#![allow(unsafe_code)] // The memory is shared, and the standard library has no poll.

use std::ffi::{c_int, c_short, c_ulong};
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vbus_shm::signal::end::{Device, Driver};
use vbus_shm::state::{DEFAULT_SLOTS, Layout, Reader, Writer};
use vbus_shm::sync::Word;

use crate::map::map;
use crate::stream::number;

#[repr(C)]
struct PollFd {
    fd: c_int,
    events: c_short,
    revents: c_short,
}

const POLLIN: c_short = 1;
const POLLHUP: c_short = 16;

unsafe extern "C" {
    /// A function of the C library, which the standard library links.
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
}

/// A page's file and its memory, which stays mapped until the program ends.
struct Page {
    file: File,
    layout: Layout,
    words: &'static [Word],
}

impl Page {
    fn open(path: &str, writable: bool) -> io::Result<Self> {
        let mut file = File::options().read(true).write(writable).open(path)?;
        // A file has the size of a value, and a mapping that of the page.
        let bytes = u32::try_from(file.seek(SeekFrom::End(0))?).map_err(io::Error::other)?;
        let layout = Layout::new(bytes, DEFAULT_SLOTS).map_err(|_| io::Error::other("no page"))?;
        let at = map(&file, 0, layout.bytes(), writable)?;
        // SAFETY: the mapping has as many bytes and is never unmapped. Words are atomics, and a
        // reader does not write them.
        let words = unsafe { std::slice::from_raw_parts(at.cast(), layout.words()) };
        Ok(Self { file, layout, words })
    }

    /// Waits until the page has a newer value than at the last call. Returns false if its device
    /// has gone.
    fn wait(&self) -> io::Result<bool> {
        let mut fd = PollFd { fd: self.file.as_raw_fd(), events: POLLIN, revents: 0 };
        // SAFETY: it is one descriptor.
        if unsafe { poll(&raw mut fd, 1, -1) } < 0 {
            return Err(io::Error::last_os_error());
        }
        if fd.revents & POLLHUP != 0 {
            return Ok(false);
        }
        // A read of no bytes takes note of the version.
        self.file.read_at(&mut [], 0)?;
        Ok(true)
    }

    fn value(&self) -> io::Result<String> {
        let mut value = vec![0; self.layout.value_bytes()];
        // The device writes this page. The header is the driver's, and does not change.
        let reader = Reader::attach(self.words, Driver).map_err(|_| io::Error::other("no page"))?;
        reader.read(&mut value).map_err(|_| io::Error::other("the page changes all the time"))?;
        let text = String::from_utf8_lossy(&value).into_owned();
        Ok(text.trim_end_matches('\0').to_owned())
    }
}

/// Prints the value of a page that the device writes, and each later one, `count` in all. Ends when
/// the device goes: then it prints `gone`, and the last value once more.
pub fn read(path: &str, count: &str) -> io::Result<()> {
    let page = Page::open(path, false)?;
    let mut out = io::stdout();
    for _ in 0..number(count)? {
        if !page.wait()? {
            writeln!(out, "gone {}", page.value()?)?;
            return out.flush();
        }
        writeln!(out, "{}", page.value()?)?;
        out.flush()?;
    }
    Ok(())
}

/// Writes values to a page that the driver writes. While it has the page mapped, others cannot
/// write it.
pub fn write(path: &str, values: &[&str]) -> io::Result<()> {
    let page = Page::open(path, true)?;
    let broken = |_| io::Error::other("no page");
    let (mut writer, kick) = Writer::resume(page.words, Driver).map_err(broken)?;
    let mut wanted = kick.is_wanted();
    for value in values {
        wanted |= writer.write(value.as_bytes()).is_wanted();
    }
    let busy = page.file.write_at(&vec![0; page.layout.value_bytes()], 0);
    if busy.is_ok() {
        return Err(io::Error::other("a page that is mapped for writing could be written"));
    }
    if wanted {
        page.file.sync_data()?;
    }
    let mut last = vec![0; page.layout.value_bytes()];
    let reader = Reader::attach(page.words, Device).map_err(broken)?;
    let version = reader.read(&mut last).map_err(|_| io::Error::other("overrun"))?;
    println!("version {version}");
    Ok(())
}
