//! KVM's own statistics (`KVM_GET_STATS_FD`).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use kvm_ioctls::{VcpuFd, VmFd};
use rustix::io::pread;

use crate::{Error, sys};

/// The header's bytes, those of a descriptor without its name, and the most of both that is
/// believed.
const HEADER_BYTES: usize = 24;
const DESCRIPTOR_BYTES: usize = 16;
const NAME_MAX: u32 = 256;
const COUNT_MAX: u32 = 4096;

/// What KVM counts of one virtual machine or one virtual CPU: exits, interrupts injected, and so
/// on, by the names that the kernel gives them (`exits`, `irq_exits`, `io_exits`, `mmio_exits`,
/// `hypercalls`, `halt_exits`, `irq_injections`, ...).
#[derive(Debug)]
pub struct Stats {
    fd: OwnedFd,
    /// Names, and where their values are in the file.
    names: Vec<(String, u64)>,
}

/// Values at one moment. Each is right by itself; while the virtual CPU runs, they are not all of
/// the same moment.
pub type Values = BTreeMap<String, u64>;

impl Stats {
    /// Those of the virtual machine.
    ///
    /// # Errors
    /// What the kernel says; before 5.14 it has none.
    pub fn of_vm(vm: &VmFd) -> Result<Stats, Error> {
        Stats::new(sys::vm_stats(vm).map_err(Error::system("KVM_GET_STATS_FD"))?)
    }

    /// Those of a virtual CPU. They can be read by another thread than the one that runs it.
    ///
    /// # Errors
    /// As [`of_vm`](Self::of_vm).
    pub fn of_vcpu(vcpu: &VcpuFd) -> Result<Stats, Error> {
        Stats::new(sys::vcpu_stats(vcpu).map_err(Error::system("KVM_GET_STATS_FD"))?)
    }

    fn new(fd: OwnedFd) -> Result<Stats, Error> {
        let mut header = [0; HEADER_BYTES];
        read(&fd, &mut header, 0)?;
        let field = |number: usize| u32_at(&header, number * 4);
        let (name_bytes, count) = (field(1).min(NAME_MAX) as usize, field(2).min(COUNT_MAX));
        let (descriptors, data) = (u64::from(field(4)), u64::from(field(5)));
        let mut descriptor = vec![0; DESCRIPTOR_BYTES + name_bytes];
        let mut names = Vec::new();
        for number in 0..u64::from(count) {
            let at = descriptors + number * descriptor.len() as u64;
            read(&fd, &mut descriptor, at)?;
            let values = u16::from_le_bytes([descriptor[6], descriptor[7]]);
            let name = descriptor[DESCRIPTOR_BYTES..].split(|&b| b == 0).next().unwrap_or_default();
            // Histograms have more than one.
            if values == 1 {
                let value = data + u64::from(u32_at(&descriptor, 8));
                names.push((String::from_utf8_lossy(name).into_owned(), value));
            }
        }
        Ok(Stats { fd, names })
    }

    /// All values now. Histograms are left out.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read(&self) -> Result<Values, Error> {
        let value = |(name, at): &(String, u64)| {
            let mut value = [0; 8];
            read(&self.fd, &mut value, *at)?;
            Ok((name.clone(), u64::from_le_bytes(value)))
        };
        self.names.iter().map(value).collect()
    }

    /// One value now; `None` if this kernel does not count it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn get(&self, name: &str) -> Result<Option<u64>, Error> {
        let Some((_, at)) = self.names.iter().find(|(n, _)| n == name) else { return Ok(None) };
        let mut value = [0; 8];
        read(&self.fd, &mut value, *at)?;
        Ok(Some(u64::from_le_bytes(value)))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn read(fd: &OwnedFd, out: &mut [u8], at: u64) -> Result<(), Error> {
    let mut done = 0;
    while done < out.len() {
        match pread(fd, &mut out[done..], at + done as u64) {
            Ok(0) => return Err(Error::Missing("statistics where it says")),
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::system("reading KVM's statistics")(error)),
        }
    }
    Ok(())
}
