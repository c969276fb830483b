// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's memory: one memfd, which this process maps, KVM uses, and the servers of devices
//! share. In addition there is a page of firmware, which no server gets.
#![allow(unsafe_code, reason = "KVM gets the address of the memory")]

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, anyhow, ensure};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, SeekFrom, fallocate, fcntl_add_seals, ftruncate,
    memfd_create, seek,
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
    /// See [`loads`](Self::loads).
    loads: AtomicU64,
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
        let loads = AtomicU64::new(0);
        let ram = Ram { _guards, backing, file, bytes, map, firmware, loads };
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
        self.set_slots(vm, 0).context("KVM does not accept the guest's memory")
    }

    /// Lets KVM note the pages that the guest and KVM itself write, or no longer.
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn set_log(&self, vm: &VmFd, on: bool) -> Result<()> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        self.set_slots(vm, flags).context("KVM does not log what the guest writes")
    }

    fn set_slots(&self, vm: &VmFd, flags: u32) -> Result<()> {
        let all = [&self.map, &self.firmware]
            .into_iter()
            .flat_map(|map| map.iter().map(move |region| (map, region)));
        for (slot, (map, region)) in (0..).zip(all) {
            let start = region.start_addr();
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: start.0,
                memory_size: region.len(),
                userspace_addr: map.get_host_address(start)? as u64,
            };
            // SAFETY: The range is mapped for as long as this `Ram` lives, and the regions do not
            // overlap.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        Ok(())
    }

    /// Address and size of each part of the memory, with the firmware as the last.
    pub(crate) fn parts(&self) -> Vec<(u64, u64)> {
        let firmware = (layout::FIRMWARE, layout::FIRMWARE_BYTES as u64);
        ranges(self.bytes).map(|(base, bytes, _)| (base, bytes)).chain([firmware]).collect()
    }

    /// Address and size of each part that devices can reach.
    pub(crate) fn ranges(&self) -> Vec<(u64, u64)> {
        ranges(self.bytes).map(|(base, bytes, _)| (base, bytes)).collect()
    }

    /// The pages of each of [`parts`](Self::parts) that were written since the last call, or since
    /// [`set_log`](Self::set_log): one bit for each page. Writes of this process and of the
    /// devices' servers are not among them.
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn take_log(&self, vm: &VmFd) -> Result<Vec<Vec<u64>>> {
        let log = |(slot, (_, bytes)): (u32, (u64, u64))| {
            vm.get_dirty_log(slot, usize::try_from(bytes)?)
                .context("KVM does not tell what the guest has written")
        };
        (0..).zip(self.parts()).map(log).collect()
    }

    /// How often the memory was loaded anew. After that, what was read before is worth nothing.
    pub(crate) fn loads(&self) -> u64 {
        self.loads.load(Ordering::Acquire)
    }

    /// Notes that the memory was cleared and has been loaded anew. KVM logs neither, so whoever
    /// copies the memory has to look at all of it once more, and not before this.
    pub(crate) fn note_load(&self) {
        // Pairs with the load in `loads`.
        self.loads.fetch_add(1, Ordering::AcqRel);
    }

    /// Address and size of all ranges that may hold anything else than zeros, in whole pages. The
    /// firmware is one of them.
    ///
    /// # Errors
    /// The system does not tell.
    pub(crate) fn data(&self) -> Result<Vec<(u64, u64)>> {
        let next = |from| match seek(&self.file, from) {
            Ok(at) => Ok(Some(at)),
            // There is nothing behind this offset.
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => Err(error).context("cannot look for the guest's data"),
        };
        let mut found = Vec::new();
        for (base, bytes, offset) in ranges(self.bytes) {
            let (mut at, end) = (offset, offset + bytes);
            while at < end {
                let Some(from) = next(SeekFrom::Data(at))?.filter(|from| *from < end) else {
                    break;
                };
                let to = next(SeekFrom::Hole(from))?.unwrap_or(end).min(end);
                let from = from & !(PAGE as u64 - 1);
                at = to.next_multiple_of(PAGE as u64).max(from + PAGE as u64);
                found.push((base + from - offset, at - from));
            }
        }
        found.push((layout::FIRMWARE, layout::FIRMWARE_BYTES as u64));
        Ok(found)
    }

    fn holder(&self, address: u64) -> &GuestMemoryMmap {
        if (layout::FIRMWARE..layout::HIGH_RAM).contains(&address) {
            &self.firmware
        } else {
            &self.map
        }
    }

    /// Reads memory or firmware. The guest may write it meanwhile.
    ///
    /// # Errors
    /// There is no memory at some of the addresses.
    pub(crate) fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.holder(address)
            .read_slice(bytes, GuestAddress(address))
            .with_context(|| format!("no memory at {address:#x}"))
    }

    /// Writes memory or firmware.
    ///
    /// # Errors
    /// There is no memory at some of the addresses.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.holder(address)
            .write_slice(bytes, GuestAddress(address))
            .with_context(|| format!("no memory at {address:#x}"))
    }

    /// Writes zeros over `bytes` bytes, which must be whole pages of one of
    /// [`parts`](Self::parts). It takes no memory for them.
    ///
    /// # Errors
    /// There is no memory at some of the addresses, or the system refuses.
    pub(crate) fn write_zeros(&self, address: u64, bytes: u64) -> Result<()> {
        let whole = address % PAGE as u64 == 0 && bytes % PAGE as u64 == 0 && bytes > 0;
        let end = address.checked_add(bytes).filter(|_| whole);
        let within =
            |base: u64, size: u64| address >= base && end.is_some_and(|e| e <= base + size);
        if within(layout::FIRMWARE, layout::FIRMWARE_BYTES as u64) {
            return self.write(address, &[0; layout::FIRMWARE_BYTES]);
        }
        let found = ranges(self.bytes).find(|(base, size, _)| within(*base, *size));
        let (base, _, offset) = found.with_context(|| format!("no memory at {address:#x}"))?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, offset + (address - base), bytes)
            .context("cannot clear the guest's memory")
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
    fn data_are_found_and_taken_away() {
        let ram = Ram::new(4 << 30).unwrap();
        let firmware = (layout::FIRMWARE, layout::FIRMWARE_BYTES as u64);
        assert_eq!(ram.data().unwrap(), [firmware]);
        let last = layout::LOW_RAM_END - 1;
        for address in [0x5123, last, layout::HIGH_RAM, layout::HIGH_RAM + (1 << 30) - 1] {
            ram.write(address, &[7]).unwrap();
        }
        let pages = [0x5000, last & !0xfff, layout::HIGH_RAM, layout::HIGH_RAM + (1 << 30) - 4096];
        // A system may keep more than a page for each.
        let data = ram.data().unwrap();
        for page in pages {
            let within = |(base, bytes): &(u64, u64)| page >= *base && page + 4096 <= base + bytes;
            assert!(data.iter().any(within), "{page:#x} in {data:x?}");
        }
        for (base, bytes) in ram.parts() {
            assert!(ram.write_zeros(base, bytes + 4096).is_err());
            assert!(ram.write_zeros(base + 1, 4096).is_err());
            ram.write_zeros(base, bytes).unwrap();
        }
        assert_eq!(ram.data().unwrap(), [firmware]);
        for (address, bytes) in [(u64::MAX - 4095, 4096), (0, 0), (0, !4095)] {
            assert!(ram.write_zeros(address, bytes).is_err(), "{bytes:#x} at {address:#x}");
        }
        assert!(ram.write(layout::LOW_RAM_END - 1, &[0; 2]).is_err());
        assert!(ram.read(u64::MAX, &mut [0]).is_err());
        assert!(ram.read(layout::FIRMWARE + 4095, &mut [0; 2]).is_err());
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
