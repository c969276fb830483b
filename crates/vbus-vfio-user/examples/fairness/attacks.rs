// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a hostile client can do by messages of vfio-user. Each attack runs until it is told to stop
//! or its connection ends, and is then run again.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, OFlags, SealFlags};
use rustix::fs::{fcntl_add_seals, fcntl_setfl, ftruncate, memfd_create};
use vbus_core::shm::abi::{command, reg};
use vbus_driver::Function;
use vbus_driver::state::Pages;
use vbus_process::Process;
use vfio_user_protocol::message::{IrqVerb, MultiWrite, command as message};
use vfio_user_protocol::{Client, ClientError, pci};

use crate::stage::Targets;

/// An attack: what it is called, what it does, how often it is done in a test at least.
pub struct Attack {
    pub name: &'static str,
    pub what: &'static str,
    /// 0: it cannot be counted, or does nothing.
    pub operations: u64,
    pub run: fn(&Targets, &AtomicBool, &AtomicU64),
}

/// All attacks. The first is none, for comparison.
pub const ATTACKS: &[Attack] = &[
    Attack { name: "none", what: "nothing", operations: 0, run: none },
    Attack {
        name: "region-add",
        what: "REGION_ADD of 4096 scattered pages, and REGION_DROP",
        operations: 2,
        run: region_add,
    },
    Attack {
        name: "region-add-refused",
        what: "REGION_ADD of 4096 scattered pages with an id that the class refuses",
        operations: 2,
        run: region_add_refused,
    },
    Attack {
        name: "write-multi",
        what: "REGION_WRITE_MULTI with 256 commands, each a REGION_ADD of 4096 scattered pages",
        operations: 0,
        run: write_multi,
    },
    Attack {
        name: "posted",
        what: "the same, posted: no reply holds the client back",
        operations: 1,
        run: posted,
    },
    Attack {
        name: "doorbells",
        what: "posted REGION_WRITE_MULTI with 256 doorbells",
        operations: 16,
        run: doorbells,
    },
    Attack {
        name: "reads",
        what: "REGION_READ of all of BAR 0, 16 KiB",
        operations: 16,
        run: reads,
    },
    Attack {
        name: "maps",
        what: "DMA_MAP and DMA_UNMAP of 64 MiB whose pages are in memory",
        operations: 4,
        run: maps,
    },
    Attack {
        name: "close",
        what: "CLOSE with 16 state pages of 1 MiB, each with a new value",
        operations: 1,
        run: close,
    },
    Attack {
        name: "reconnect",
        what: "connect, negotiate, map memory, open, and go without a word",
        operations: 4,
        run: reconnect,
    },
    Attack {
        name: "interrupts",
        what: "DEVICE_SET_IRQS triggers an eventfd that is full and blocks",
        operations: 16,
        run: interrupts,
    },
];

/// The driver's memory as the device sees it.
const BASE: u64 = 0x1_0000_0000;
const PAGE: u64 = 4096;
/// Pages of a region.
const PAGES: u64 = 4096;
/// Every second page, and the list after them.
const BYTES: u64 = 2 * PAGES * PAGE + LIST_BYTES;
const LIST: u64 = 2 * PAGES * PAGE;
const LIST_BYTES: u64 = PAGES * 8;
/// Where the handshake word is.
const HANDSHAKE: u64 = BASE + PAGE;

/// Goes on until it is told to stop, or the connection ends.
fn repeat(
    over: &AtomicBool,
    operations: &AtomicU64,
    mut once: impl FnMut() -> Result<(), ClientError>,
) {
    while !over.load(Ordering::Relaxed) {
        if once().is_err_and(|error| error.is_final()) {
            return;
        }
        operations.fetch_add(1, Ordering::Relaxed);
    }
}

/// A client that says what it likes.
struct Raw {
    client: Client,
    memory: OwnedFd,
}

impl Raw {
    /// `None`: the client before has not gone yet.
    fn connect(path: &Path) -> Option<Raw> {
        let client = Client::connect(path).ok()?;
        let memory = memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .expect("a memory file");
        ftruncate(&memory, BYTES).expect("a memory file");
        fcntl_add_seals(&memory, SealFlags::SHRINK).expect("a seal");
        Some(Raw { client, memory })
    }

    /// Connects, maps the memory, opens the device, and writes the list of scattered pages.
    fn open(path: &Path) -> Option<Raw> {
        let mut raw = Raw::connect(path)?;
        raw.client.dma_map(raw.memory.as_fd(), 0, BASE, BYTES).ok()?;
        let list: Vec<u8> =
            (0..PAGES).rev().flat_map(|page| (BASE + 2 * page * PAGE).to_le_bytes()).collect();
        rustix::io::pwrite(&raw.memory, &list, LIST).expect("the list");
        let word = 0x1234_5678_9abc_def0_u64;
        rustix::io::pwrite(&raw.memory, &word.to_le_bytes(), PAGE).expect("the handshake word");
        raw.command(command::OPEN, [1, 0, HANDSHAKE, word]).ok()?;
        Some(raw)
    }

    fn command(&mut self, number: u32, arguments: [u64; 4]) -> Result<u32, ClientError> {
        let bytes = arguments.map(u64::to_le_bytes);
        let number = number.to_le_bytes();
        let bar = pci::REGION_BAR0;
        let mut writes: Vec<_> = (0..)
            .zip(&bytes)
            .map(|(i, data)| MultiWrite { region: bar, offset: reg::ARGUMENT + 8 * i, data })
            .collect();
        writes.push(MultiWrite { region: bar, offset: reg::COMMAND, data: &number });
        self.client.region_write_multi(&writes)?;
        let mut result = [0; 4];
        self.client.region_read(bar, reg::RESULT, &mut result)?;
        Ok(u32::from_le_bytes(result))
    }

    /// The arguments of REGION_ADD of all scattered pages, as region `id`.
    fn scattered(id: u32) -> [u64; 4] {
        let shift = u64::from(PAGE.trailing_zeros());
        [u64::from(id) | shift << 48, BASE + LIST, PAGES * PAGE, command::NO_SIGNAL]
    }
}

/// Writes COMMAND 256 times: so many commands, with the same arguments.
fn commands(number: u32) -> Vec<u8> {
    let data = number.to_le_bytes();
    let write = || MultiWrite { region: pci::REGION_BAR0, offset: reg::COMMAND, data: &data };
    MultiWrite::body(&std::iter::repeat_with(write).take(256).collect::<Vec<_>>())
}

fn none(_: &Targets, _: &AtomicBool, _: &AtomicU64) {
    std::thread::sleep(std::time::Duration::from_millis(1));
}

fn region_add(targets: &Targets, over: &AtomicBool, operations: &AtomicU64) {
    let Some(mut raw) = Raw::open(&targets.takes) else { return };
    repeat(over, operations, || {
        let result = raw.command(command::REGION_ADD, Raw::scattered(0))?;
        assert_eq!(result, 0, "the region is refused");
        raw.command(command::REGION_DROP, [0; 4]).map(drop)
    });
}

fn region_add_refused(targets: &Targets, over: &AtomicBool, operations: &AtomicU64) {
    let Some(mut raw) = Raw::open(&targets.takes) else { return };
    repeat(over, operations, || {
        let result = raw.command(command::REGION_ADD, Raw::scattered(9999))?;
        assert_ne!(result, 0, "the region is taken");
        Ok(())
    });
}

fn write_multi(targets: &Targets, over: &AtomicBool, operations: &AtomicU64) {
    let Some(mut raw) = Raw::open(&targets.takes) else { return };
    if raw.command(command::REGION_ADD, Raw::scattered(9999)).is_err() {
        return;
    }
    let body = commands(command::REGION_ADD);
    repeat(over, operations, || raw.client.call(message::REGION_WRITE_MULTI, &body, &[]).map(drop));
}

fn posted(targets: &Targets, over: &AtomicBool, operations: &AtomicU64) {
    let Some(mut raw) = Raw::open(&targets.takes) else { return };
    if raw.command(command::REGION_ADD, Raw::scattered(9999)).is_err() {
        return;
    }
    let body = commands(command::REGION_ADD);
    repeat(over, operations, || raw.client.post(message::REGION_WRITE_MULTI, &body));
}

fn doorbells(targets: &Targets, over: &AtomicBool, operations: &AtomicU64) {
    let Some(mut raw) = Raw::open(&targets.takes) else { return };
    let write = MultiWrite { region: pci::REGION_BAR0, offset: 0x1000, data: &[1, 0, 0, 0] };
    let body = MultiWrite::body(&[write; 256]);
    repeat(over, operations, || raw.client.post(message::REGION_WRITE_MULTI, &body));
}

fn reads(targets: &Targets, over: &AtomicBool, operations: &AtomicU64) {
    let Some(mut raw) = Raw::connect(&targets.takes) else { return };
    let mut bytes = vec![0; 0x4000];
    repeat(over, operations, || raw.client.region_read(pci::REGION_BAR0, 0, &mut bytes));
}

fn maps(targets: &Targets, over: &AtomicBool, operations: &AtomicU64) {
    const MAPPED: u64 = 64 << 20;
    let Some(mut raw) = Raw::connect(&targets.takes) else { return };
    let memory = memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .expect("a memory file");
    ftruncate(&memory, MAPPED).expect("a memory file");
    fcntl_add_seals(&memory, SealFlags::SHRINK).expect("a seal");
    let block = vec![1; 1 << 20];
    for at in (0..MAPPED).step_by(block.len()) {
        rustix::io::pwrite(&memory, &block, at).expect("memory");
    }
    repeat(over, operations, || {
        raw.client.dma_map(memory.as_fd(), 0, BASE, MAPPED)?;
        raw.client.dma_unmap(BASE, MAPPED)
    });
}

fn close(targets: &Targets, over: &AtomicBool, operations: &AtomicU64) {
    while !over.load(Ordering::Relaxed) {
        // The client before may not have gone yet.
        let Ok(process) = Process::connect(&targets.pages, 128 << 20) else { continue };
        let Ok(function) = Function::probe(process) else { continue };
        let Ok(mut pages) = Pages::open(function) else { continue };
        let value = vec![1; 1 << 20];
        let writer = |number| {
            let page = pages.describe(number)?;
            let mut writer = pages.writer(&page, 0)?;
            writer.write(&value);
            Ok::<_, vbus_driver::Error>(writer)
        };
        let writers: Vec<_> = (0..16).map(writer).collect();
        drop((writers, pages));
        operations.fetch_add(1, Ordering::Relaxed);
    }
}

fn reconnect(targets: &Targets, over: &AtomicBool, operations: &AtomicU64) {
    while !over.load(Ordering::Relaxed) {
        if Raw::open(&targets.takes).is_some() {
            operations.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn interrupts(targets: &Targets, over: &AtomicBool, operations: &AtomicU64) {
    let Some(mut raw) = Raw::connect(&targets.takes) else { return };
    let trigger = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
    if raw.client.connect_irqs(pci::IRQ_MSI, 0, &[trigger.as_fd()]).is_err() {
        return;
    }
    rustix::io::write(&trigger, &(u64::MAX - 1).to_ne_bytes()).expect("an empty counter");
    fcntl_setfl(&trigger, OFlags::empty()).expect("flags");
    repeat(over, operations, || raw.client.irq(pci::IRQ_MSI, 0, IrqVerb::Trigger));
}
