// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's memory: one memfd, which this process maps, KVM uses, and the servers of devices
//! share. In addition there is a page of firmware, which no server gets.
#![allow(unsafe_code, reason = "KVM gets the address of the memory")]

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use vbus_mapping::{Backing, Guard};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::events::{EventSender, VmEvent};
use crate::layout;
use crate::seccomp::{self, Thread};

/// The least memory of a guest in bytes. The kernel is loaded at 1 MiB, and its tables are below.
pub const RAM_MIN: u64 = 16 << 20;
/// The most memory of a guest in bytes: what 40 bits of physical address and the hole below 4 GiB
/// leave, rounded down.
pub const RAM_MAX: u64 = 512 << 30;

/// The size of a page of the memory, in bytes.
const PAGE: usize = 4096;

/// The address at which a processor starts after an INIT, unless it waits to be started: the last
/// 16 bytes below 4 GiB.
const FIRST_INSTRUCTION: u64 = 0xffff_fff0;
/// The code at that address. It resets the machine, as a PC's firmware would: `mov al, VALUE;
/// mov dx, PORT; out dx, al; hlt`, in 16-bit mode.
const RESET: [u8; 7] = {
    let [low, high] = layout::RESET_PORT.to_le_bytes();
    [0xb0, layout::RESET_VALUE, 0xba, low, high, 0xee, 0xf4]
};

/// A range of the guest's memory that a vfio-user server can map.
#[derive(Clone, Debug)]
pub struct RamRegion {
    /// Its address in the guest.
    pub base: u64,
    /// Its size in bytes, which is that of whole pages.
    pub bytes: u64,
    /// The memfd of the memory. Seals forbid any change of its size.
    pub file: Arc<File>,
    /// The offset of the range in the file.
    pub file_offset: u64,
}

/// All of the guest's memory.
pub struct Ram {
    /// Ends before the memory is unmapped.
    _guards: Vec<Guard>,
    backing: Arc<Backing>,
    file: Arc<File>,
    bytes: u64,
    map: GuestMemoryMmap,
    firmware: GuestMemoryMmap,
}

impl Ram {
    /// Makes `bytes` bytes of memory, all zero. `bytes` is from [`RAM_MIN`] to [`RAM_MAX`], and
    /// that of whole pages.
    ///
    /// # Errors
    /// `bytes` is out of range, or the memory cannot be mapped.
    pub fn new(bytes: u64) -> Result<Ram> {
        ensure!(
            (RAM_MIN..=RAM_MAX).contains(&bytes),
            "memory must be {} to {} MiB",
            RAM_MIN >> 20,
            RAM_MAX >> 20
        );
        let make = || -> io::Result<File> {
            let file = memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            ftruncate(&file, bytes)?;
            // Without these seals a server could truncate the memory of this process. A server
            // might also refuse to map memory that could be truncated.
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(file.into())
        };
        let file = Arc::new(make().context("cannot make the guest's memory")?);
        let ranges = ranges(bytes).map(|(base, bytes, offset)| {
            // If an address space cannot hold the size, the mapping below fails.
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            (GuestAddress(base), bytes, Some(FileOffset::from_arc(file.clone(), offset)))
        });
        let map = GuestMemoryMmap::from_ranges_with_files(ranges)
            .context("cannot map the guest's memory")?;
        let page = (GuestAddress(layout::FIRMWARE), layout::FIRMWARE_BYTES);
        let firmware =
            GuestMemoryMmap::from_ranges(&[page]).context("cannot map the guest's firmware")?;
        let backing = Backing::zeros(PAGE)?;
        let _guards = map.iter().map(|region| guard(region, &backing)).collect::<Result<_>>()?;
        let ram = Ram { _guards, backing, file, bytes, map, firmware };
        ram.write_firmware()?;
        Ok(ram)
    }

    fn write_firmware(&self) -> Result<()> {
        Ok(self.firmware.write_slice(&RESET, GuestAddress(FIRST_INSTRUCTION))?)
    }

    /// The ranges that a server can map.
    pub fn regions(&self) -> Vec<RamRegion> {
        let region = |(base, bytes, file_offset)| RamRegion {
            base,
            bytes,
            file: self.file.clone(),
            file_offset,
        };
        ranges(self.bytes).map(region).collect()
    }

    /// Starts a thread that ends the machine when memory is lost: a server has punched a hole into
    /// the memory, and the system has no page for it. `filter`: the thread has a filter of system
    /// calls.
    ///
    /// # Errors
    /// The system has no descriptor or no thread left.
    pub fn watch(&self, events: EventSender, filter: bool) -> Result<()> {
        let losses = vbus_mapping::losses()?;
        let backing = self.backing.clone();
        std::thread::Builder::new().name("ram-watch".into()).spawn(move || {
            if let Err(error) = if filter { seccomp::apply(Thread::Memory) } else { Ok(()) } {
                let _ = events.send(VmEvent::Fail(error));
                return;
            }
            while !backing.is_lost() {
                let _ = poll(&mut [PollFd::from_borrowed_fd(losses, PollFlags::IN)], None);
            }
            let _ = events.send(VmEvent::Fail(anyhow!(
                "the guest's memory has a hole, for which the system has no memory left"
            )));
        })?;
        Ok(())
    }

    /// The size of the memory in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The memory as this process maps it.
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Gives the memory to `vm`. The virtual CPUs of `vm` must not run after this `Ram` is dropped.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn give_to(&self, vm: &VmFd) -> Result<()> {
        let all = [&self.map, &self.firmware]
            .into_iter()
            .flat_map(|map| map.iter().map(move |region| (map, region)));
        for (slot, (map, region)) in (0..).zip(all) {
            let start = region.start_addr();
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: start.0,
                memory_size: region.len(),
                userspace_addr: map.get_host_address(start)? as u64,
            };
            // SAFETY: The range is mapped for as long as this `Ram` lives, and the regions do not
            // overlap.
            unsafe { vm.set_user_memory_region(region) }
                .context("KVM does not accept the guest's memory")?;
        }
        Ok(())
    }

    /// Clears the memory for a new start, and restores the firmware, which the guest can write.
    ///
    /// # Errors
    /// The kernel refuses to clear the memory.
    pub fn clear(&self) -> Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, 0, self.bytes).context("cannot clear the guest's memory")?;
        self.write_firmware()
    }
}

/// Makes an access to lost memory of `region` return, instead of ending this process.
fn guard(region: &GuestRegionMmap, backing: &Arc<Backing>) -> Result<Guard> {
    let base = NonNull::new(region.as_ptr()).context("mapped at 0")?;
    // SAFETY: The region is mapped for as long as the `Ram` lives, and the guard ends before.
    Ok(unsafe { Guard::new(base, region.size(), PAGE, backing) }?)
}

/// Splits `bytes` bytes of memory into ranges: address in the guest, size, offset in the file.
pub fn ranges(bytes: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let low = bytes.min(layout::LOW_RAM_END);
    let high = (bytes > low).then(|| (layout::HIGH_RAM, bytes - low, low));
    std::iter::once((0, low, 0)).chain(high)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn memory_leaves_the_hole_free() {
        assert_eq!(ranges(16 << 20).collect::<Vec<_>>(), [(0, 16 << 20, 0)]);
        assert_eq!(ranges(3 << 30).collect::<Vec<_>>(), [(0, 3 << 30, 0)]);
        assert_eq!(
            ranges(4 << 30).collect::<Vec<_>>(),
            [(0, 3 << 30, 0), (4 << 30, 1 << 30, 3 << 30)]
        );
    }

    #[test]
    fn memory_is_sealed_and_can_be_cleared() {
        let ram = Ram::new(4 << 30).unwrap();
        let seals = rustix::fs::fcntl_get_seals(&ram.file).unwrap();
        assert!(seals.contains(SealFlags::SHRINK | SealFlags::SEAL));
        // Both ranges are in the same file, the upper one behind the lower one.
        ram.map().write_obj(7_u32, GuestAddress(layout::HIGH_RAM)).unwrap();
        assert_eq!(ram.regions()[1].file_offset, 3 << 30);
        ram.clear().unwrap();
        assert_eq!(ram.map().read_obj::<u32>(GuestAddress(layout::HIGH_RAM)).unwrap(), 0);
        assert!(ram.map().read_obj::<u32>(GuestAddress(layout::LOW_RAM_END)).is_err());
        assert!(Ram::new(1 << 20).is_err());
    }

    #[test]
    fn memory_that_is_lost_does_not_end_the_process() {
        // A file that can shrink, as if it were the guest's memory.
        let file = memfd_create("lost", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, RAM_MIN).unwrap();
        let shared = File::from(file.try_clone().unwrap());
        let bytes = usize::try_from(RAM_MIN).unwrap();
        let range = (GuestAddress(0), bytes, Some(FileOffset::new(shared, 0)));
        let map = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let backing = Backing::zeros(PAGE).unwrap();
        let _guard = guard(map.iter().next().unwrap(), &backing).unwrap();
        map.write_obj(7_u32, GuestAddress(0x10_0000)).unwrap();
        ftruncate(&file, 0).unwrap();
        assert_eq!(map.read_obj::<u32>(GuestAddress(0x10_0000)).unwrap(), 0);
        assert!(backing.is_lost());
    }

    #[test]
    fn the_firmware_is_there_again_after_a_reset() {
        let ram = Ram::new(RAM_MIN).unwrap();
        let first = GuestAddress(FIRST_INSTRUCTION);
        let read = || ram.firmware.read_obj::<[u8; 7]>(first).unwrap();
        assert_eq!(read(), RESET);
        ram.firmware.write_slice(&[0; 7], first).unwrap();
        ram.clear().unwrap();
        assert_eq!(read(), RESET);
        assert!(
            ram.regions().iter().all(|region| region.base + region.bytes <= layout::FIRMWARE),
            "no server has it"
        );
    }
}
