// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The files of the Linux driver: `/dev/vbus/DEVICE/PAGE`. They need no root.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vbus_driver::state::Owner;
use vbus_guest::{Found, is_meant};

use super::{Listed, Printer, no_page};

/// What the driver says of its devices and their pages.
const CLASS: &str = "/sys/class/vbus-state";

/// The pages of a device.
pub struct Nodes(Vec<Node>);

/// A page.
pub struct Node {
    path: PathBuf,
    listed: Listed,
    number: u32,
}

impl Nodes {
    /// The device of the Linux driver that `wanted` names, by its name or its PCI address. Without
    /// `wanted`, the first one. `None`: the driver has no such device.
    pub fn find(wanted: Option<&str>) -> Result<Option<Self>> {
        let Ok(entries) = fs::read_dir(CLASS) else { return Ok(None) };
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        let mut devices = Vec::new();
        // The name of a page's node has that of the device before the `!`.
        for name in names.iter().filter(|name| !name.contains('!')) {
            let function = Path::new(CLASS).join(name).join("device");
            let Ok(place) = fs::canonicalize(&function) else { continue };
            let id = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let own = fs::read_to_string(function.join("vbus/name")).unwrap_or_default();
            let found = Found { id, class: None };
            let is_it = |wanted| wanted == name || is_meant(&found, own.trim_end(), wanted);
            if wanted.is_none_or(is_it) {
                devices.push((found, name));
            }
        }
        devices.sort();
        let Some((_, device)) = devices.first() else { return Ok(None) };
        let of_device = |name: &&String| {
            name.strip_prefix(&device[..]).is_some_and(|rest| rest.starts_with('!'))
        };
        let mut nodes = names
            .iter()
            .filter(of_device)
            .map(|name| Node::new(name))
            .collect::<Result<Vec<_>>>()?;
        nodes.sort_by_key(|node| node.number);
        Ok(Some(Self(nodes)))
    }

    /// All pages, in the order of their numbers.
    pub fn list(self) -> Vec<Listed> {
        self.0.into_iter().map(|node| node.listed).collect()
    }

    /// The page of this name.
    pub fn page(self, name: &str) -> Result<Node> {
        self.0.into_iter().find(|node| node.listed.name == name).with_context(|| no_page(name))
    }
}

impl Node {
    fn new(name: &str) -> Result<Self> {
        let read = |file: &str| {
            let path = Path::new(CLASS).join(name).join(file);
            let text = fs::read_to_string(&path);
            text.map(|text| text.trim_end_matches('\n').to_owned())
                .with_context(|| format!("cannot read {}", path.display()))
        };
        let owner = match &read("owner")?[..] {
            "device" => Owner::Device,
            _ => Owner::Driver,
        };
        let listed = Listed { name: read("page")?, owner, bytes: read("bytes")?.parse()? };
        let path = Path::new("/dev/vbus").join(name.replace('!', "/"));
        Ok(Self { path, listed, number: read("number")?.parse()? })
    }

    /// Bytes of its value.
    pub fn value_bytes(&self) -> usize {
        self.listed.bytes as usize
    }

    /// The error of a system call, with what to do.
    fn failed(&self, error: io::Error) -> Error {
        let path = self.path.display();
        let hint = match (error.kind(), error.raw_os_error().map(Errno::from_raw_os_error)) {
            (ErrorKind::PermissionDenied, _) if self.listed.owner == Owner::Device => {
                format!("{path} may not be read by this user, and the device writes it")
            }
            (ErrorKind::PermissionDenied, _) => format!(
                "{path} is not for this user; the administrator gives it away by a rule of udev, or \
                 by chown"
            ),
            (_, Some(Errno::NODATA)) => format!("{path} has no value since the driver was loaded"),
            (_, Some(Errno::AGAIN)) => {
                format!("{path} waits for its bus, which has ended or stands still")
            }
            (_, Some(Errno::BUSY)) => format!("a process that has mapped {path} writes it"),
            (_, Some(Errno::NODEV)) => format!("the device of {path} has gone"),
            _ => path.to_string(),
        };
        Error::new(error).context(hint)
    }

    fn open(&self, options: &OpenOptions) -> Result<File> {
        options.open(&self.path).map_err(|error| self.failed(error))
    }

    fn read(&self, file: &File) -> Result<Vec<u8>> {
        let mut value = vec![0; self.value_bytes()];
        file.read_exact_at(&mut value, 0).map_err(|error| self.failed(error))?;
        Ok(value)
    }

    /// The current value.
    pub fn get(&self) -> Result<Vec<u8>> {
        self.read(&self.open(OpenOptions::new().read(true))?)
    }

    /// Makes `value`, with zeros behind it, the current value. It has the bytes of a value at most.
    pub fn set(&self, mut value: Vec<u8>) -> Result<()> {
        if self.listed.owner == Owner::Device {
            bail!("the device writes the page {}, and not its driver", self.listed.name);
        }
        value.resize(self.value_bytes(), 0);
        let file = self.open(OpenOptions::new().write(true))?;
        file.write_all_at(&value, 0).map_err(|error| self.failed(error))
    }

    /// Prints the current value, and each later one. The driver keeps the page while the bus is
    /// away.
    pub fn watch(&self, printer: &mut Printer) -> Result<()> {
        let file = self.open(OpenOptions::new().read(true))?;
        while !printer.is_done() {
            let mut fds = [PollFd::new(&file, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) => printer.print(&self.read(&file)?),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("poll"),
            }
        }
        Ok(())
    }
}
