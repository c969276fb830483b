// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests with the other end in C, in another process. Its author wrote it from the specification
//! alone. Every entry and every value reaches the other end.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::ptr::NonNull;
use std::sync::OnceLock;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use vbus_shm::ledger::{self, Ledger};
use vbus_shm::pic;
use vbus_shm::ring::{self, DeviceEnd, DriverEnd, Entry, NEXT, Return, Returns};
use vbus_shm::signal::Armed;
use vbus_shm::signal::end::Driver;
use vbus_shm::state::{self, Reader, Writer};
use vbus_shm::sync::{Ordering, Word};

const REGION: usize = 16384;
const ENTRIES: u32 = 20_000;
const VALUES: u32 = 20_000;

/// The compiled program, or `None` if there is no C compiler.
fn program() -> Option<&'static PathBuf> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        // Another process may run these tests at the same time. So this test replaces the program
        // and never writes to it.
        let (fresh, program) =
            (directory.join(format!("c_peer-{}", std::process::id())), directory.join("c_peer"));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/c_peer/peer.c");
        let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
        let flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o"];
        match Command::new(compiler).args(flags).arg(&fresh).arg(source).status() {
            Ok(status) => {
                assert!(status.success(), "the peer in C does not compile");
                std::fs::rename(fresh, &program).unwrap();
                Some(program)
            }
            Err(error) => {
                eprintln!("skipped: there is no C compiler ({error})");
                None
            }
        }
    };
    PROGRAM.get_or_init(build).as_ref()
}

/// What this process shares with the one in C.
struct Peer {
    memory: &'static [Word],
    to_us: OwnedFd,
    child: Child,
    to_them: OwnedFd,
}

impl Peer {
    /// Starts the program in C in `role`, over a region that `prepare` has made ready.
    fn start(role: &str, count: u32, prepare: impl FnOnce(&'static [Word])) -> Option<Peer> {
        let program = program()?;
        // None of the descriptors has CLOEXEC, so the child inherits them.
        let file = memfd_create("c_peer", MemfdFlags::empty()).unwrap();
        ftruncate(&file, REGION as u64).unwrap();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let (anywhere, shared) = (std::ptr::null_mut(), MapFlags::SHARED);
        // SAFETY: the kernel chooses the address.
        let at = unsafe { mmap(anywhere, REGION, protection, shared, &file, 0) }.unwrap();
        let at = NonNull::new(at.cast()).unwrap();
        // SAFETY: nothing unmaps the memory. This process accesses it through the slice only.
        let memory = unsafe { vbus_shm::raw::words(at, REGION) }.unwrap();
        prepare(memory);
        let [to_us, to_them] = [(); 2].map(|()| eventfd(0, EventfdFlags::empty()).unwrap());
        let numbers = [
            file.as_raw_fd(),
            i32::try_from(REGION).unwrap(),
            to_them.as_raw_fd(),
            to_us.as_raw_fd(),
        ];
        let arguments = numbers.map(|number| number.to_string());
        let child =
            Command::new(program).arg(role).args(arguments).arg(count.to_string()).spawn().unwrap();
        Some(Peer { memory, to_us, child, to_them })
    }

    fn kick(&self) {
        rustix::io::write(&self.to_them, &1_u64.to_ne_bytes()).unwrap();
    }

    fn wait(&self) {
        let timeout = Timespec { tv_sec: 60, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(&self.to_us, PollFlags::IN)], Some(&timeout)).unwrap();
        assert_eq!(ready, 1, "no kick came: a wake-up is lost");
        rustix::io::read(&self.to_us, &mut [0; 8]).unwrap();
    }

    fn end(mut self) {
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The child is still running only if the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn drive(role: &str, returns: Returns) {
    let layout = ring::Layout::new(16, returns).unwrap();
    let mut driver = None;
    let create =
        |memory| driver = Some(DriverEnd::create(memory, layout, (1 << 63) - 1000).unwrap());
    let Some(peer) = Peer::start(role, ENTRIES, create) else { return };
    let mut driver = driver.unwrap();
    let (mut submitted, mut reaped) = (0, 0);
    while reaped < ENTRIES {
        while submitted < ENTRIES {
            let entry =
                Entry { addr: u64::from(submitted) + 1, len: submitted, id: 5, flags: NEXT };
            if driver.submit(entry).is_err() {
                break;
            }
            submitted += 1;
        }
        if driver.post().is_wanted() {
            peer.kick();
        }
        let before = reaped;
        if returns == Returns::Counted {
            reaped += driver.reap_count(u32::MAX).unwrap();
        } else {
            while let Some(back) = driver.reap().unwrap() {
                let id = if returns == Returns::Runs { 0 } else { 5 };
                assert_eq!(back, Return { len: reaped + 1, id, flags: NEXT });
                reaped += 1;
            }
        }
        if reaped == before && driver.arm(0) == Armed::Waiting {
            peer.wait();
        }
    }
    peer.end();
}

#[test]
fn a_device_in_c_returns_every_entry() {
    drive("device", Returns::Entries);
}

#[test]
fn a_device_in_c_counts_every_entry() {
    drive("device", Returns::Counted);
}

#[test]
fn a_device_in_c_returns_runs() {
    drive("device", Returns::Runs);
}

#[test]
fn a_device_in_c_resumes_the_ring_again_and_again() {
    for returns in [Returns::Counted, Returns::Entries, Returns::Runs] {
        drive("mortal_device", returns);
    }
}

/// The ledger of a ring of `entries` returned entries. It lies behind the ring in the region.
fn ledger_behind(memory: &'static [Word], entries: u32) -> &'static [Word] {
    let ring = ring::Layout::new(entries, Returns::Entries).unwrap();
    &memory[ring.words()..]
}

#[test]
fn a_device_in_c_returns_out_of_order_and_resumes_its_ledger() {
    const SLOTS: u16 = 16;
    let layout = ring::Layout::new(SLOTS.into(), Returns::Entries).unwrap();
    let mut driver = None;
    let create = |memory| {
        ledger::format(&ledger_behind(memory, SLOTS.into()), SLOTS.into()).unwrap();
        driver = Some(DriverEnd::create(memory, layout, (1 << 47) - 1000).unwrap());
    };
    let Some(peer) = Peer::start("ledger_device", ENTRIES, create) else { return };
    let mut driver = driver.unwrap();
    // By id, the number of the entry in flight.
    let mut in_flight = [None; SLOTS as usize];
    let (mut submitted, mut reaped, mut overtakings) = (0, 0, 0);
    while reaped < ENTRIES {
        while submitted < ENTRIES {
            let Some(id) = in_flight.iter().position(Option::is_none) else { break };
            let entry = Entry {
                addr: u64::from(submitted) + 1,
                len: submitted,
                id: u16::try_from(id).unwrap(),
                flags: NEXT,
            };
            driver.submit(entry).unwrap();
            in_flight[id] = Some(submitted);
            submitted += 1;
        }
        if driver.post().is_wanted() {
            peer.kick();
        }
        let before = reaped;
        while let Some(back) = driver.reap().unwrap() {
            let number = in_flight[usize::from(back.id)].take().expect("an entry came back twice");
            assert_eq!((back.len, back.flags), (number + 1, NEXT), "the return of another entry");
            overtakings += u32::from(in_flight.iter().flatten().any(|other| *other < number));
            reaped += 1;
        }
        if reaped == before && driver.arm(0) == Armed::Waiting {
            peer.wait();
        }
    }
    assert!(overtakings > 0, "all entries came back in order");
    peer.end();
}

fn serve(role: &str) {
    let Some(peer) = Peer::start(role, ENTRIES, |_| {}) else { return };
    peer.wait();
    let mut device = DeviceEnd::attach(peer.memory).unwrap();
    let (mut done, mut turn) = (0, 0);
    while done < ENTRIES {
        let mut n = 0;
        let answer = |entry: Entry| Return { len: entry.len + 1, ..entry.into() };
        let in_place = turn % 2 == 1;
        if in_place {
            n = device.serve_all(7, |entry| Some(answer(entry))).unwrap();
        }
        while n < 7 && !in_place {
            let Some(entry) = device.take().unwrap() else { break };
            device.give_back(answer(entry));
            n += 1;
        }
        turn += 1;
        if turn % 3 == 0 {
            // As if the device had been killed. Its returns are published by then, unless they are
            // a run that waits for its post.
            let (resumed, kick) = DeviceEnd::resume(peer.memory).unwrap();
            device = resumed;
            if in_place || device.layout().returns() == Returns::Entries {
                done += n;
            }
            if kick.is_wanted() {
                peer.kick();
            }
            continue;
        }
        done += n;
        if device.post().is_wanted() {
            peer.kick();
        }
        if n == 0 && device.arm(0) == Armed::Waiting {
            peer.wait();
        }
    }
    peer.end();
}

#[test]
fn a_driver_in_c_gets_every_entry_back() {
    serve("driver");
}

#[test]
fn a_driver_in_c_gets_every_run_back() {
    serve("driver_of_runs");
}

#[test]
fn a_driver_in_c_makes_a_ledger() {
    let Some(peer) = Peer::start("driver", ENTRIES, |_| {}) else { return };
    peer.wait();
    let mut device = Ledger::attach(peer.memory, ledger_behind(peer.memory, 8)).unwrap();
    let (mut done, mut turn) = (0, 0);
    while done < ENTRIES {
        let taken: Vec<_> = std::iter::from_fn(|| device.take().unwrap()).collect();
        turn += 1;
        if turn % 3 == 0 {
            // As if the device had been killed.
            let ledger = ledger_behind(peer.memory, 8);
            let (resumed, kick) = Ledger::resume(peer.memory, ledger).unwrap();
            device = resumed;
            if kick.is_wanted() {
                peer.kick();
            }
            let mut held: Vec<_> = device.held().collect();
            held.sort_by_key(|held| held.position);
            assert_eq!(held.iter().map(|held| held.entry).collect::<Vec<_>>(), taken);
        }
        for entry in &taken {
            device.give_back(Return { len: entry.len + 1, ..(*entry).into() });
            done += 1;
        }
        if device.ring().post().is_wanted() {
            peer.kick();
        }
        if taken.is_empty() && device.ring().arm(0) == Armed::Waiting {
            peer.wait();
        }
    }
    peer.end();
}

/// Value number `counter`, as the program in C writes it.
fn value(counter: u32) -> [u8; 200] {
    let mut value = [counter.to_le_bytes()[0]; 200];
    value[..4].copy_from_slice(&counter.to_le_bytes());
    value
}

fn page(memory: &'static [Word]) {
    state::Layout::new(200, 4).unwrap().format(&memory, (1 << 63) - 100).unwrap();
}

#[test]
fn a_reader_in_c_sees_whole_values() {
    let Some(peer) = Peer::start("reader", VALUES, page) else { return };
    let mut writer = Writer::attach(peer.memory, Driver).unwrap();
    for counter in 1..=VALUES {
        if writer.write(&value(counter)).is_wanted() {
            peer.kick();
        }
    }
    peer.end();
}

#[test]
fn a_writer_in_c_is_read_whole() {
    let Some(peer) = Peer::start("writer", VALUES, page) else { return };
    let mut reader = Reader::attach(peer.memory, Driver).unwrap();
    let (mut known, mut counter, mut out) = ((1 << 63) - 100, 0, [0; 200]);
    while counter != VALUES {
        // An overrun is no error here: both processes may share one core.
        if let Ok(Some(version)) = reader.read_if_newer(known, &mut out) {
            let read = u32::from_le_bytes([out[0], out[1], out[2], out[3]]);
            assert_eq!(out, value(read), "a torn value");
            assert!(read > counter);
            (known, counter) = (version, read);
        } else if reader.arm_newer(known) == Armed::Waiting {
            peer.wait();
        }
    }
    peer.end();
}

/// How often the device raises a line.
const RAISES: u32 = 30_000;

/// The line that the device raises with number `counter`, the index of the word to which it writes
/// that number, and the index of the word to which the line's handler copies it.
fn line(counter: u32) -> (u16, usize, usize) {
    let line = counter * 7 % 100;
    (u16::try_from(line).unwrap(), 512 + line as usize, 1024 + line as usize)
}

#[test]
fn a_driver_in_c_takes_every_line() {
    let Some(peer) = Peer::start("taker", RAISES, |_| {}) else { return };
    peer.wait();
    let device = pic::DeviceEnd::attach(peer.memory).unwrap();
    assert_eq!(device.lines(), 100);
    for counter in 1..=RAISES {
        let (number, about, _) = line(counter);
        peer.memory[about].store(counter.into(), Ordering::Relaxed);
        if device.raise(number).is_wanted() {
            peer.kick();
        }
        if counter % 3 == 0 {
            let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
            while (counter - 2..=counter)
                .any(|n| peer.memory[line(n).2].load(Ordering::Acquire) < n.into())
            {
                assert!(std::time::Instant::now() < end, "a line is lost");
                std::thread::yield_now();
            }
        }
    }
    peer.end();
}

#[test]
fn a_device_in_c_raises_every_line() {
    let mut driver = None;
    let create = |memory: &'static [Word]| {
        let mut page = pic::DriverEnd::create(memory, 100, pic::Nesting::Flat).unwrap();
        let _ = page.arm();
        driver = Some(page);
    };
    let Some(peer) = Peer::start("raiser", RAISES, create) else { return };
    let mut driver = driver.unwrap();
    let mut last = 0;
    while last < RAISES {
        peer.wait();
        while let Some(number) = driver.take() {
            let about =
                u32::try_from(peer.memory[512 + usize::from(number)].load(Ordering::Relaxed))
                    .unwrap();
            let (of, _, handled) = line(about);
            assert!(about != 0 && of == number, "a line came before its data");
            driver.end(number);
            last = last.max(about);
            peer.memory[handled].store(about.into(), Ordering::Release);
        }
    }
    peer.end();
}
