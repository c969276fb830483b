// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds functions in sysfs and binds them to `uio_pci_generic`.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, flock, makedev, mknodat};
use vbus_shm::abi::{PCI_DEVICE, PCI_VENDOR, bar0};

use super::bar::Bar;
use super::hal::PciHal;
use super::uio::{COMMAND, UioInterrupt};
use super::{huge, uevent};
use crate::source::{Found, Interrupt, Source};

const DRIVER: &str = "uio_pci_generic";
const BUS: &str = "/sys/bus/pci";
/// The offset of BAR 0 in the configuration space.
const BAR0: u64 = 0x10;

/// The PCI bus of this machine. Its drop gives the reserved huge pages back to the kernel, so drop
/// all functions first.
#[derive(Debug)]
pub struct PciSource(());

impl PciSource {
    /// Checks that this machine has a PCI bus.
    ///
    /// # Errors
    /// sysfs shows no PCI bus.
    pub fn new() -> Result<PciSource> {
        ensure!(
            Path::new(BUS).exists(),
            "{BUS} is not there: either this machine has no PCI bus or sysfs is not mounted \
             (`mount -t sysfs sysfs /sys`)"
        );
        Ok(PciSource(()))
    }
}

impl Drop for PciSource {
    fn drop(&mut self) {
        huge::give_back();
    }
}

/// Whether the function in this folder of sysfs has the signature of vbus. False if the process may
/// not read that part of the configuration space.
fn has_signature(folder: &Path) -> bool {
    let Ok(space) = fs::read(folder.join("config")) else { return false };
    vbus_driver::has_signature(|offset| {
        let word = space.get(usize::from(offset)..).and_then(|rest| rest.first_chunk());
        word.map_or(0, |word| u32::from_le_bytes(*word))
    })
}

impl Source for PciSource {
    type Hal = PciHal;

    fn scan(&self) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(format!("{BUS}/devices"))? {
            let entry = entry?;
            let number = |file: &str| read_hex(&entry.path().join(file));
            // The signature identifies a function, whatever its ids are. Only root can read the
            // signature; for other users the ids decide. Files that cannot be read belong to a
            // function that is going at this moment.
            let ids = (number("vendor"), number("device"));
            if has_signature(&entry.path()) || ids == (Some(PCI_VENDOR), Some(PCI_DEVICE)) {
                found.push(Found {
                    id: entry.file_name().to_string_lossy().into_owned(),
                    class: number("subsystem_device"),
                });
            }
        }
        found.sort();
        Ok(found)
    }

    fn look(&self, id: &str) -> Result<PciHal> {
        let folder = folder(id);
        let config = open(&folder.join("config"))?;
        // The function only answers while its memory space is enabled. It stays enabled, which
        // does no harm.
        const MEMORY: u16 = 1 << 1;
        let mut command = [0; 2];
        config
            .read_exact_at(&mut command, COMMAND)
            .context("cannot read the configuration space; this needs root")?;
        let command = u16::from_le_bytes(command);
        if command & MEMORY == 0 {
            config
                .write_all_at(&(command | MEMORY).to_le_bytes(), COMMAND)
                .context("cannot enable the function's memory space")?;
        }
        let bar = Bar::map(&open(&folder.join("resource0"))?, bar_len()?)?;
        Ok(PciHal::new(bar, config, None))
    }

    fn claim(&self, id: &str) -> Result<(PciHal, Box<dyn Interrupt>)> {
        let folder = folder(id);
        let resource = open(&folder.join("resource0"))?;
        // Two drivers of one function would close each other's connection.
        if flock(&resource, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!("in use by another process");
        }
        check_no_iommu(&folder)?;
        bind(id, &folder)?;
        let uio = open_uio(&folder)?;
        let config = open(&folder.join("config"))?;
        place_bar(&folder, &config)?;
        let interrupt = UioInterrupt::new(uio, config)?;
        let bar = Bar::map(&resource, bar_len()?)?;
        let hal = PciHal::new(bar, open(&folder.join("config"))?, Some(resource));
        Ok((hal, Box::new(interrupt)))
    }

    fn changes(&self) -> Option<OwnedFd> {
        uevent::listen()
            .inspect_err(
                |error| tracing::debug!(%error, "no messages of the kernel; looking once a second"),
            )
            .ok()
    }

    fn comes_back(&self) -> bool {
        // A function that was unplugged is another function when the VMM plugs it in again. The
        // configuration space does not help: QEMU 11.1 aborts when it is read behind a server that
        // has died.
        false
    }
}

/// The value that BAR 0 must have, if the configuration space has another one. The VMM resets the
/// function when it restores the machine from a snapshot, and does not restore the BAR. The kernel
/// does not know that, and still has the address.
fn misplaced_bar(folder: &Path, config: &File) -> Option<u32> {
    let read = |at: u64| {
        let mut word = [0xff; 4];
        config.read_exact_at(&mut word, at).ok().map(|()| u32::from_le_bytes(word))
    };
    let resources = fs::read_to_string(folder.join("resource")).ok()?;
    let start = resources.split_whitespace().next()?.trim_start_matches("0x");
    let start = u32::from_str_radix(start, 16).ok().filter(|start| *start != 0)?;
    let is_there = read(0)? != u32::MAX;
    (is_there && read(BAR0)? & !0xf != start).then_some(start)
}

/// Gives BAR 0 back its address, if it has lost it.
fn place_bar(folder: &Path, config: &File) -> Result<()> {
    let Some(start) = misplaced_bar(folder, config) else { return Ok(()) };
    tracing::warn!("the function was reset while it was in use; setting its BAR again");
    let write = |at: u64, bytes: &[u8]| config.write_all_at(bytes, at);
    // The BAR moves while Memory Space is clear.
    write(COMMAND, &[0; 2])
        .and_then(|()| write(BAR0, &start.to_le_bytes()))
        .context("cannot write the configuration space")
}

fn folder(id: &str) -> PathBuf {
    Path::new(BUS).join("devices").join(id)
}

fn bar_len() -> Result<usize> {
    Ok(usize::try_from(bar0::SIZE)?)
}

fn read_hex(file: &Path) -> Option<u16> {
    u16::from_str_radix(fs::read_to_string(file).ok()?.trim().trim_start_matches("0x"), 16).ok()
}

fn open(file: &Path) -> Result<File> {
    OpenOptions::new().read(true).write(true).open(file).map_err(|error| {
        let hint = if error.kind() == std::io::ErrorKind::PermissionDenied {
            "; driving a function needs root"
        } else {
            ""
        };
        anyhow::anyhow!("cannot open {}: {error}{hint}", file.display())
    })
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {text:?} to {}", file.display()))
}

/// Checks that no IOMMU translates the function's addresses. This driver gives physical addresses
/// to the device, which would not reach memory behind such an IOMMU.
fn check_no_iommu(folder: &Path) -> Result<()> {
    let kind = fs::read_to_string(folder.join("iommu_group/type"));
    match kind.as_deref().map(str::trim) {
        Ok("identity") | Err(_) => Ok(()),
        Ok(kind) => bail!(
            "the function is behind an IOMMU that translates ({kind}); boot with iommu=pt, or \
             `echo identity > {}/iommu_group/type`",
            folder.display()
        ),
    }
}

/// Unbinds the function from its present driver, and binds it to `uio_pci_generic`.
fn bind(id: &str, folder: &Path) -> Result<()> {
    let driver = Path::new(BUS).join("drivers").join(DRIVER);
    if !driver.exists() {
        // The check below reports a failure of modprobe, whatever its reason.
        let _ = Command::new("modprobe")
            .arg(DRIVER)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status();
        ensure!(
            driver.exists(),
            "the kernel's driver {DRIVER} is not loaded: `modprobe {DRIVER}` (Debian has it in \
             the ordinary kernel package)"
        );
    }
    let bound = fs::read_link(folder.join("driver")).ok();
    if bound.as_deref().and_then(Path::file_name).is_some_and(|name| name == DRIVER) {
        return Ok(());
    }
    if bound.is_some() {
        write(&folder.join("driver/unbind"), id)?;
    }
    write(&folder.join("driver_override"), DRIVER)?;
    write(&driver.join("bind"), id)
}

/// Opens `/dev/uioN` of the function, and makes the node if it does not exist.
fn open_uio(folder: &Path) -> Result<File> {
    let uio = folder.join("uio");
    let entry = fs::read_dir(&uio).ok().and_then(|mut entries| entries.next()).transpose()?;
    let entry = entry.with_context(|| {
        format!(
            "{} is not there: {DRIVER} has found no interrupt line; see the kernel's log",
            uio.display()
        )
    })?;
    let device = Path::new("/dev").join(entry.file_name());
    if !device.exists() {
        let numbers = fs::read_to_string(entry.path().join("dev"))?;
        let (major, minor) = numbers.trim().split_once(':').context("bad device number")?;
        let number = makedev(major.parse()?, minor.parse()?);
        mknodat(
            rustix::fs::CWD,
            &device,
            FileType::CharacterDevice,
            Mode::from_raw_mode(0o600),
            number,
        )
        .with_context(|| format!("cannot make {}", device.display()))?;
    }
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits())?;
    let file = OpenOptions::new().read(true).write(true).custom_flags(nonblocking).open(&device);
    file.with_context(|| format!("cannot open {}", device.display()))
}
