// SPDX-License-Identifier: Apache-2.0 OR MIT
//! KVM's own statistics (`KVM_GET_STATS_FD`).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use kvm_ioctls::{VcpuFd, VmFd};
use rustix::io::pread;

use crate::{Error, sys};

/// Bytes of the header, and of a descriptor without its name. The two limits bound what this
/// program accepts from the kernel.
const HEADER_BYTES: usize = 24;
const DESCRIPTOR_BYTES: usize = 16;
const NAME_MAX: u32 = 256;
const COUNT_MAX: u32 = 4096;

/// KVM's counters of one virtual machine or one virtual CPU, by the kernel's names: `exits`,
/// `irq_exits`, `io_exits`, `mmio_exits`, `hypercalls`, `halt_exits`, `irq_injections`, and so on.
#[derive(Debug)]
pub struct Stats {
    fd: OwnedFd,
    /// Each counter's name, and the offset of its value in the file.
    names: Vec<(String, u64)>,
}

/// The values of all counters. Each value is exact, but while the virtual CPU runs they are not all
/// of the same moment.
pub type Values = BTreeMap<String, u64>;

impl Stats {
    /// Opens the counters of the virtual machine.
    ///
    /// # Errors
    /// [`Error::System`] if the kernel refuses. Linux before 5.14 has no such counters.
    pub fn of_vm(vm: &VmFd) -> Result<Stats, Error> {
        Stats::new(sys::vm_stats(vm).map_err(Error::system("KVM_GET_STATS_FD"))?)
    }

    /// Opens the counters of a virtual CPU. Any thread may read them while another one runs the
    /// CPU.
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
            // A histogram has more than one value.
            if values == 1 {
                let value = data + u64::from(u32_at(&descriptor, 8));
                names.push((String::from_utf8_lossy(name).into_owned(), value));
            }
        }
        Ok(Stats { fd, names })
    }

    /// Reads all counters, except histograms.
    ///
    /// # Errors
    /// [`Error::System`] if the kernel refuses.
    pub fn read(&self) -> Result<Values, Error> {
        let value = |(name, at): &(String, u64)| {
            let mut value = [0; 8];
            read(&self.fd, &mut value, *at)?;
            Ok((name.clone(), u64::from_le_bytes(value)))
        };
        self.names.iter().map(value).collect()
    }

    /// Reads one counter. Returns `None` if this kernel does not have it.
    ///
    /// # Errors
    /// [`Error::System`] if the kernel refuses.
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
