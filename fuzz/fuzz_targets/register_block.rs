// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads and writes any offset of a function, and changes the memory behind it meanwhile. After any
//! input, the function answers, and can be closed and opened again.
#![no_main]

use std::os::fd::OwnedFd;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vbus_core::shm::abi::{bar0, command, reg};
use vbus_core::shm::ring::DeviceEnd;
use vbus_core::shm::signal::Armed;
use vbus_core::{
    Access, Bus, Connection, Device, ErrorCode, Executor, Identity, Interrupt, MemoryContext, Open,
    Progress, Region, Tuning, Window,
};
use vbus_pci::{IrqIndex, Options, PciFunction, device_function, region};

/// Address and size of the memory. Small numbers of the input are likely to hit it.
const BASE: u64 = 0x1000;
const BYTES: u64 = 0x4000;

/// A device that accepts rings and returns all their entries.
struct Fuzzed;

#[derive(Default)]
struct Rings(Vec<(u32, DeviceEnd<Window>, Interrupt)>);

impl Device for Fuzzed {
    fn identity(&self) -> Identity {
        Identity::user("fuzzed").with_features(7).with_vectors(4)
    }

    fn open(&self, _open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::<Rings>::default())
    }
}

impl Connection for Rings {
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        self.0.push((region.handle, DeviceEnd::attach(region.window)?, region.interrupt));
        Ok(())
    }

    fn region_dropped(&mut self, handle: u32) -> Result<(), ErrorCode> {
        self.0.retain(|(h, ..)| *h != handle);
        Ok(())
    }

    fn call(&mut self, function: u32, _flags: u32, buffer: &mut [u8]) -> Result<u64, ErrorCode> {
        buffer.reverse();
        Ok(function.into())
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let mut progress = Progress::Idle;
        for (_, ring, interrupt) in &mut self.0 {
            for _ in 0..budget {
                let Some(entry) = ring.take()? else { break };
                ring.give_back(entry.into());
                progress = Progress::Busy;
            }
            interrupt.kick(ring.post());
        }
        Ok(progress)
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        let missed = self
            .0
            .iter_mut()
            .fold(false, |missed, (_, ring, _)| missed | (ring.arm(0) == Armed::Missed));
        Ok(if missed { Armed::Missed } else { Armed::Waiting })
    }
}

static BUS: LazyLock<Bus> = LazyLock::new(|| {
    let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).expect("threads");
    Bus::new(executor, Vec::new())
});

fn file() -> OwnedFd {
    let fd = memfd_create("fuzz", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a file");
    ftruncate(&fd, BYTES).expect("room");
    fd
}

fn write(function: &mut PciFunction, offset: u64, value: u64) {
    function.write(region::BAR0, offset, &value.to_le_bytes());
}

fn read32(function: &mut PciFunction, offset: u64) -> u32 {
    let mut data = [0; 4];
    function.read(region::BAR0, offset, &mut data);
    u32::from_le_bytes(data)
}

fn run(function: &mut PciFunction, number: u32) -> u32 {
    function.write(region::BAR0, reg::COMMAND, &number.to_le_bytes());
    read32(function, reg::RESULT)
}

fn open(function: &mut PciFunction, memory: &MemoryContext) {
    memory.view().write(BASE, &77u64.to_le_bytes()).expect("mapped");
    for (i, argument) in (0..).zip([1, 5, BASE, 77]) {
        write(function, reg::ARGUMENT + 8 * i, argument);
    }
    assert_eq!(run(function, command::OPEN), 0);
}

fuzz_target!(|input: &[u8]| {
    let Some((&flags, steps)) = input.split_first() else { return };
    let endpoint = BUS.add("fuzzed", Arc::new(Fuzzed)).expect("a free name");
    let options = Options { msix: flags & 1 != 0, express: flags & 2 != 0 };
    let mut function = device_function(endpoint.clone(), options);
    let (file, memory) = (file(), MemoryContext::new());
    memory
        .map(BASE, BYTES, Some((file.try_clone().expect("a descriptor"), 0)), Access::BOTH)
        .expect("mapped");
    endpoint.map(BASE, BYTES, Some((file, 0)), Access::BOTH).expect("mapped");
    if flags & 4 != 0 {
        open(&mut function, &memory);
    }
    for step in steps.chunks_exact(12) {
        let [action, size, low, high, value @ ..] = step else { return };
        let value: [u8; 8] = value.try_into().expect("12 bytes");
        let offset = u64::from(u16::from_le_bytes([*low, *high]));
        let mut data: Vec<u8> = value.into_iter().cycle().take(usize::from(*size % 17)).collect();
        let number = u32::from(*low % 6);
        match action % 16 {
            // Access the registers more often than the rest, in their sizes.
            0..=3 => {
                function.write(region::BAR0, reg::ARGUMENT + u64::from(low % 14) * 4, &value[..4])
            }
            4 | 5 => write(
                &mut function,
                reg::ARGUMENT + u64::from(low % 4) * 8,
                u64::from_le_bytes(value),
            ),
            6 => drop(run(&mut function, number)),
            7 => function.write(region::BAR0, bar0::DOORBELLS + offset % 64, &data),
            8 => function.write(region::BAR0, offset, &data),
            9 => function.read(region::BAR0, offset, &mut data),
            10 => function.write(region::CONFIG, offset, &data),
            11 => function.read(region::CONFIG, offset, &mut data),
            12 => {
                let fd = eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor");
                let index = IrqIndex::from_number(u32::from(size % 3)).expect("0 to 2");
                let _ =
                    function.connect_irqs(index, number, vec![(action & 16 == 0).then_some(fd)]);
            }
            13 => drop(function.mask_irq(IrqIndex::Intx, action & 16 == 0)),
            14 if action & 16 == 0 => function.reset(),
            14 => drop(endpoint.unmap(u64::from(*low) << 12, u64::from(*high) << 12)),
            _ => drop(memory.view().write(BASE + offset % BYTES & !7, &value)),
        }
    }
    assert_eq!(read32(&mut function, reg::MAGIC), reg::MAGIC_VALUE);
    assert_eq!(run(&mut function, command::CLOSE), 0);
    assert_eq!(read32(&mut function, reg::CONNECTION), reg::CONNECTION_CLOSED);
    endpoint.unmap_all();
    let file = self::file();
    let memory = MemoryContext::new();
    memory
        .map(BASE, BYTES, Some((file.try_clone().expect("a descriptor"), 0)), Access::BOTH)
        .expect("mapped");
    endpoint.map(BASE, BYTES, Some((file, 0)), Access::BOTH).expect("mapped");
    open(&mut function, &memory);
    drop(function);
    BUS.remove("fuzzed").expect("added above");
});
