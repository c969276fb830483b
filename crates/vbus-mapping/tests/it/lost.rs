// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Each way to take memory away.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use vbus_mapping::{Backing, Mapping, Piece, losses, touch};

const BOTH: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);
const MIB: usize = 1 << 20;
const HUGE: usize = 2 * MIB;

fn file(bytes: usize) -> OwnedFd {
    let file = memfd_create("peer", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, bytes as u64).unwrap();
    file
}

fn backing() -> Arc<Backing> {
    Backing::zeros(4096).unwrap()
}

fn read(mapping: &Mapping, at: usize) -> u8 {
    assert!(at < mapping.len());
    // SAFETY: the byte is mapped.
    unsafe { mapping.base().as_ptr().add(at).read_volatile() }
}

fn write(mapping: &Mapping, at: usize, value: u8) {
    assert!(at < mapping.len());
    // SAFETY: the byte is mapped.
    unsafe { mapping.base().as_ptr().add(at).write_volatile(value) };
}

#[test]
fn a_truncated_file_reads_as_zeros_and_takes_writes() {
    let (lost, stays) = (file(8 * MIB), file(8 * MIB));
    let (first, second) = (backing(), backing());
    let gone = Mapping::file(&lost, 0, 8 * MIB, BOTH, &first).unwrap();
    let other = Mapping::file(&stays, 0, 8 * MIB, BOTH, &second).unwrap();
    write(&gone, 5 * MIB, 1);
    write(&other, 5 * MIB, 2);
    ftruncate(&lost, 4096).unwrap();
    assert!(!first.is_lost(), "nobody has noticed yet");
    write(&gone, 5 * MIB + 1, 7);
    assert!(first.is_lost() && !second.is_lost());
    assert_eq!((read(&gone, 5 * MIB), read(&gone, 5 * MIB + 1)), (0, 7));
    // Every page, by reading and by writing, a second time too.
    for at in (0..8 * MIB).step_by(4096) {
        read(&gone, at);
        write(&gone, at, 3);
    }
    assert_eq!(read(&other, 5 * MIB), 2);
}

#[test]
fn a_shrunken_file_of_tmpfs_is_no_different() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("ram");
    let shared = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    shared.set_len(MIB as u64).unwrap();
    let backing = backing();
    let mapping = Mapping::file(&shared, 0, MIB, BOTH, &backing).unwrap();
    write(&mapping, 0, 1);
    File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert_eq!((read(&mapping, 0), backing.is_lost()), (0, true));
}

#[test]
fn many_threads_may_find_the_loss_at_once() {
    let (file, backing) = (file(32 * MIB), backing());
    let mapping = Mapping::file(&file, 0, 32 * MIB, BOTH, &backing).unwrap();
    ftruncate(&file, 0).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let mapping = &mapping;
            scope.spawn(move || {
                for at in (0..32 * MIB).step_by(64 << 10) {
                    write(mapping, at, thread);
                    read(mapping, at + 1);
                }
            });
        }
    });
    assert!(backing.is_lost());
}

#[test]
fn the_owner_is_woken() {
    let (file, backing) = (file(4096), backing());
    let mapping = Mapping::file(&file, 0, 4096, BOTH, &backing).unwrap();
    ftruncate(&file, 0).unwrap();
    assert_eq!(read(&mapping, 0), 0);
    let mut event = [PollFd::from_borrowed_fd(losses().unwrap(), PollFlags::IN)];
    let long = Timespec { tv_sec: 60, tv_nsec: 0 };
    assert_eq!(poll(&mut event, Some(&long)), Ok(1));
}

#[test]
fn a_system_call_fails_and_touching_finds_the_loss() {
    let (file, backing) = (file(MIB), backing());
    let mapping = Mapping::file(&file, 0, MIB, BOTH, &backing).unwrap();
    ftruncate(&file, 4096).unwrap();
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    // SAFETY: the bytes are mapped, and only the kernel reads them.
    let bytes = unsafe { std::slice::from_raw_parts(mapping.base().as_ptr().add(8192), 8) };
    assert_eq!(rustix::io::write(&writer, bytes), Err(Errno::FAULT));
    assert!(!backing.is_lost(), "a system call raises no signal");
    // SAFETY: the range is mapped.
    unsafe { touch(mapping.base().add(8192), 8) };
    assert!(backing.is_lost());
}

#[test]
fn pieces_of_files_are_lost_alike() {
    let (first, second, backing) = (file(MIB), file(MIB), backing());
    let piece = |file: &'static OwnedFd, offset| Piece { file: file.as_fd(), offset, len: 8192 };
    let (first, second): (&OwnedFd, &OwnedFd) =
        (Box::leak(Box::new(first)), Box::leak(Box::new(second)));
    let pieces = [piece(first, 4096), piece(second, 0), piece(first, 65536)];
    let mapping = Mapping::pieces(pieces.into_iter(), 4096, &backing).unwrap();
    assert_eq!(mapping.len(), 3 * 8192);
    write(&mapping, 8192 + 5, 9);
    let mut byte = [0];
    rustix::io::pread(second, &mut byte, 5).unwrap();
    assert_eq!(byte, [9]);
    ftruncate(second, 0).unwrap();
    assert_eq!((read(&mapping, 8192 + 5), backing.is_lost()), (0, true));
    // A piece that cannot be mapped leaves nothing behind.
    let bad = [piece(first, 0), Piece { offset: 1, ..piece(first, 0) }];
    assert!(Mapping::pieces(bad.into_iter(), 4096, &backing).is_err());
    assert!(Mapping::pieces([].into_iter(), 4096, &backing).is_err());
}

#[test]
fn a_device_that_has_gone_reads_as_ones() {
    let file = file(0x4000);
    let backing = Backing::ones(0x4000).unwrap();
    let mapping = Mapping::file(&file, 0, 0x4000, BOTH, &backing).unwrap();
    ftruncate(&file, 0).unwrap();
    assert_eq!((read(&mapping, 0), read(&mapping, 0x3fff)), (0xff, 0xff));
}

#[test]
fn what_a_mapping_holds_goes_after_it_was_unmapped() {
    let (file, backing) = (file(256 * MIB), backing());
    let share = Arc::new(());
    let mapping = Mapping::file(&file, 0, 256 * MIB, BOTH, &backing).unwrap();
    let base = mapping.base().as_ptr() as usize;
    let mapping = mapping.holding(share.clone());
    drop(mapping);
    let begun = Instant::now();
    while Arc::strong_count(&share) > 1 {
        assert!(begun.elapsed() < Duration::from_secs(60), "it is never unmapped");
        std::thread::yield_now();
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains(&format!("{base:x}-")), "it is still mapped");
}

/// Huge pages of 2 MiB, if there are any: a file with all that are free.
fn huge_pages() -> Option<(OwnedFd, usize)> {
    let free =
        std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").ok()?;
    let free: usize = free.trim().parse().ok().filter(|free| *free >= 2)?;
    let flags = MemfdFlags::CLOEXEC
        | MemfdFlags::ALLOW_SEALING
        | MemfdFlags::HUGETLB
        | MemfdFlags::HUGE_2MB;
    let file = memfd_create("huge", flags).ok()?;
    ftruncate(&file, (free * HUGE) as u64).ok()?;
    Some((file, free))
}

#[test]
fn a_hole_in_huge_pages_with_no_page_left() {
    let Some((file, pages)) = huge_pages() else {
        eprintln!("skipped: there are no two free huge pages (vm.nr_hugepages)");
        return;
    };
    let backing = Backing::zeros(HUGE).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    let mapped = Mapping::file_of_pages(&file, 0, 2 * HUGE, HUGE, BOTH, &backing);
    let Ok(mapping) = mapped else {
        eprintln!("skipped: another process has taken the huge pages");
        return;
    };
    write(&mapping, 5, 1);
    write(&mapping, HUGE + 5, 2);
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, hole, 0, 2 * HUGE as u64).unwrap();
    // Another file takes every page, so that none is left for the hole.
    let Some((rest, now)) = huge_pages() else { return };
    let taken = fallocate(&rest, FallocateFlags::empty(), 0, (now * HUGE) as u64);
    assert!(taken.is_err() || now <= pages);
    assert_eq!(read(&mapping, 5), 0);
    if taken.is_ok() {
        assert!(backing.is_lost());
    }
    write(&mapping, HUGE + 5, 3);
    drop(rest);
}

#[test]
fn a_file_system_that_is_full() {
    vbus_test_driver::run_with_own_mounts("lost::touches_a_file_in_a_full_file_system");
}

#[test]
#[ignore = "runs in a process of its own"]
fn touches_a_file_in_a_full_file_system() {
    use rustix::mount::{MountFlags, mount};
    let folder = tempfile::tempdir().unwrap();
    let size = Some(c"size=1m");
    if let Err(error) = mount("none", folder.path(), "tmpfs", MountFlags::empty(), size) {
        eprintln!("{}{error}", vbus_test_driver::NO_MOUNT);
        return;
    }
    let open = |name| {
        let path = folder.path().join(name);
        File::options().read(true).write(true).create_new(true).open(path).unwrap()
    };
    let (sparse, full) = (open("sparse"), open("full"));
    sparse.set_len(4 * MIB as u64).unwrap();
    let backing = backing();
    let mapping = Mapping::file(&sparse, 0, 4 * MIB, BOTH, &backing).unwrap();
    while rustix::io::write(&full, &[1; 4096]).is_ok_and(|bytes| bytes > 0) {}
    write(&mapping, 0, 1);
    write(&mapping, 3 * MIB, 1);
    assert!(backing.is_lost());
    // The mount goes with this process's name space.
}

/// Mappings of the process within the range of `mapping`.
fn mappings_within(mapping: &Mapping) -> usize {
    let (base, maps) = (mapping.base().as_ptr() as usize, std::fs::read("/proc/self/maps"));
    let maps = String::from_utf8(maps.unwrap()).unwrap();
    let within = |line: &&str| {
        let (begin, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let number = |text| usize::from_str_radix(text, 16).unwrap();
        number(begin) < base + mapping.len() && number(end) > base
    };
    maps.lines().filter(within).count()
}

#[test]
fn many_lost_parts_do_not_use_up_the_mappings_of_the_process() {
    const PARTS: usize = 200;
    let (first, second) = (file(PARTS * HUGE), file(PARTS * HUGE));
    let backing = backing();
    for (file, most) in [(&first, 2 * 64 + 1), (&second, 1)] {
        let mapping = Mapping::file(file, 0, PARTS * HUGE, BOTH, &backing).unwrap();
        write(&mapping, 0, 1);
        ftruncate(file, 0).unwrap();
        for part in (0..PARTS).step_by(2) {
            write(&mapping, part * HUGE, 5);
            assert!(mappings_within(&mapping) <= most, "after part {part}");
        }
        assert_eq!(mappings_within(&mapping), 1, "the whole range is one mapping in the end");
        assert!(backing.is_lost());
        assert_eq!((read(&mapping, PARTS * HUGE - 1), read(&mapping, HUGE)), (0, 0));
    }
}
