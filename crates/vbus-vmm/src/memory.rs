//! The guest's memory: one memfd, mapped here, given to KVM, and shown to the servers of devices;
//! and a page of firmware, which is nobody's.
#![allow(unsafe_code, reason = "KVM is told where the memory lies")]

use std::fs::File;
use std::io;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout;

/// The least memory of a guest, in bytes: the kernel is loaded at 1 MiB, and its tables lie below.
pub const RAM_MIN: u64 = 16 << 20;
/// The most: what 40 bits of physical address and the hole below 4 GiB leave, rounded down.
pub const RAM_MAX: u64 = 512 << 30;

/// Where a processor begins after an INIT, other than one that waits to be started: the last 16
/// bytes below 4 GiB.
const FIRST_INSTRUCTION: u64 = 0xffff_fff0;
/// What is there: it resets the machine, as a PC's firmware would. `mov al, VALUE; mov dx, PORT;
/// out dx, al; hlt`, in 16-bit mode.
const RESET: [u8; 7] = {
    let [low, high] = layout::RESET_PORT.to_le_bytes();
    [0xb0, layout::RESET_VALUE, 0xba, low, high, 0xee, 0xf4]
};

/// A piece of the guest's memory as a vfio-user server can map it.
#[derive(Clone, Debug)]
pub struct RamRegion {
    /// Where the guest has it.
    pub base: u64,
    /// Bytes, whole pages.
    pub bytes: u64,
    /// The memory itself: a memfd, sealed against any change of its size.
    pub file: Arc<File>,
    /// Where in the file it begins.
    pub file_offset: u64,
}

/// All of the guest's memory.
pub struct Ram {
    file: Arc<File>,
    bytes: u64,
    map: GuestMemoryMmap,
    firmware: GuestMemoryMmap,
}

impl Ram {
    /// Makes memory of `bytes` bytes, whole pages, from [`RAM_MIN`] to [`RAM_MAX`]; all zero.
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
            // Without these seals a server could cut the memory off under this process, or refuse
            // to map it for fear of that.
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(file.into())
        };
        let file = Arc::new(make().context("cannot make the guest's memory")?);
        let ranges = ranges(bytes).map(|(base, bytes, offset)| {
            // What an address space cannot hold fails to be mapped just below.
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            (GuestAddress(base), bytes, Some(FileOffset::from_arc(file.clone(), offset)))
        });
        let map = GuestMemoryMmap::from_ranges_with_files(ranges)
            .context("cannot map the guest's memory")?;
        let page = (GuestAddress(layout::FIRMWARE), layout::FIRMWARE_BYTES);
        let firmware =
            GuestMemoryMmap::from_ranges(&[page]).context("cannot map the guest's firmware")?;
        let ram = Ram { file, bytes, map, firmware };
        ram.write_firmware()?;
        Ok(ram)
    }

    fn write_firmware(&self) -> Result<()> {
        Ok(self.firmware.write_slice(&RESET, GuestAddress(FIRST_INSTRUCTION))?)
    }

    /// What a server can map.
    pub fn regions(&self) -> Vec<RamRegion> {
        let region = |(base, bytes, file_offset)| RamRegion {
            base,
            bytes,
            file: self.file.clone(),
            file_offset,
        };
        ranges(self.bytes).map(region).collect()
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The memory as this process sees it.
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Gives the memory to `vm`, whose virtual CPUs must not run after this `Ram` is gone.
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
                .context("KVM does not take the guest's memory")?;
        }
        Ok(())
    }

    /// Makes it all zero again, for a new start, and the firmware what it was, which a guest could
    /// write too.
    pub fn clear(&self) -> Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, 0, self.bytes).context("cannot clear the guest's memory")?;
        self.write_firmware()
    }
}

/// The pieces of `bytes` bytes of memory: guest address, bytes, offset in the file.
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
        // Both pieces are the same file's, the upper one behind the lower one.
        ram.map().write_obj(7_u32, GuestAddress(layout::HIGH_RAM)).unwrap();
        assert_eq!(ram.regions()[1].file_offset, 3 << 30);
        ram.clear().unwrap();
        assert_eq!(ram.map().read_obj::<u32>(GuestAddress(layout::HIGH_RAM)).unwrap(), 0);
        assert!(ram.map().read_obj::<u32>(GuestAddress(layout::LOW_RAM_END)).is_err());
        assert!(Ram::new(1 << 20).is_err());
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
