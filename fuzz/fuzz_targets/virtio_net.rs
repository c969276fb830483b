// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads and writes any offset of a virtio network card's function, and the memory of its driver.
//! After any input, a reset brings the card back.
#![no_main]

use std::os::fd::OwnedFd;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::json;
use vbus_core::{Access, Bus, Executor, MemoryContext, Tuning};
use vbus_net::{Direct, Switches};
use vbus_pci::{IrqIndex, Options, PciFunction, device_function, region};
use vbus_virtio::net::VirtioNetClass;

/// Bytes of the driver's memory, at address 0. Small numbers of the input are likely to hit it.
const BYTES: u64 = 0x1_0000;

/// Offsets in BAR0.
const NOTIFY: u64 = 0x3000;
const DRIVER_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const STATUS: u64 = 0x14;
const SELECT: u64 = 0x16;
const SIZE: u64 = 0x18;
const ENABLE: u64 = 0x1c;
const DESCRIPTORS: u64 = 0x20;

/// Where queue `n` has its areas: descriptors, driver area, device area.
fn areas(n: u64) -> [u64; 3] {
    [0, 0x400, 0x800].map(|at| n * 0x1000 + at)
}

static BUS: LazyLock<Bus> = LazyLock::new(|| {
    let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).expect("threads");
    let class = VirtioNetClass::on(Switches::default(), Arc::new(Direct));
    Bus::new(executor, vec![Box::new(class)])
});

fn file() -> OwnedFd {
    let fd = memfd_create("fuzz", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a file");
    ftruncate(&fd, BYTES).expect("room");
    fd
}

fn write(function: &mut PciFunction, offset: u64, value: u64, len: usize) {
    function.write(region::BAR0, offset, &value.to_le_bytes()[..len]);
}

fn status(function: &mut PciFunction) -> u8 {
    let mut data = [0];
    function.read(region::BAR0, STATUS, &mut data);
    data[0]
}

/// Resets the card and starts it with these features and its five queues.
fn start(function: &mut PciFunction, features: u64) {
    write(function, STATUS, 0, 1);
    assert_eq!(status(function), 0);
    for half in 0..2 {
        write(function, DRIVER_SELECT, half, 4);
        write(function, DRIVER_FEATURE, features >> (32 * half) & 0xffff_ffff, 4);
    }
    write(function, STATUS, 0xb, 1);
    assert_eq!(status(function), 0xb);
    for n in 0..5 {
        write(function, SELECT, n, 2);
        write(function, SIZE, 16, 2);
        for (i, area) in (0..).zip(areas(n)) {
            write(function, DESCRIPTORS + 8 * i, area, 8);
        }
        write(function, ENABLE, 1, 2);
    }
    write(function, STATUS, 0xf, 1);
}

/// VERSION_1, a control queue, several pairs, and what `flags` chooses of the rest.
fn features(flags: u8) -> u64 {
    let mut features = 1 << 32 | 1 << 17 | 1 << 22;
    let choices: [u64; 6] =
        [1 << 28, 1 << 29, 1 << 34, 1 << 35, 1 << 15, 1 << 57 | 1 << 60 | 0x7f_f983];
    for (bit, choice) in choices.into_iter().enumerate() {
        features |= if flags >> bit & 1 != 0 { choice } else { 0 };
    }
    features
}

fuzz_target!(|input: &[u8]| {
    let Some((&[flags, more], steps)) = input.split_first_chunk::<2>() else { return };
    let settings = json!({ "backend": "switch", "queue-pairs": 2, "rss": true });
    let endpoint = BUS.create("fuzzed", "virtio-net", &settings).expect("a free name");
    let options = Options { msix: more & 1 != 0, express: more & 2 != 0 };
    let mut function = device_function(endpoint.clone(), options);
    let (file, memory) = (file(), MemoryContext::new());
    let copy = || Some((file.try_clone().expect("a descriptor"), 0));
    memory.map(0, BYTES, copy(), Access::BOTH).expect("mapped");
    endpoint.map(0, BYTES, copy(), Access::BOTH).expect("mapped");
    let mut offered = [0; 8];
    for half in 0..2usize {
        write(&mut function, 0, half as u64, 4);
        function.read(region::BAR0, 4, &mut offered[half * 4..][..4]);
    }
    let features = features(flags) & u64::from_le_bytes(offered);
    start(&mut function, features);
    for step in steps.chunks_exact(12) {
        let [action, size, low, high, value @ ..] = step else { return };
        let value: [u8; 8] = value.try_into().expect("12 bytes");
        let offset = u64::from(u16::from_le_bytes([*low, *high]));
        let mut data: Vec<u8> = value.into_iter().cycle().take(usize::from(*size % 17)).collect();
        let number = u32::from(*low % 6);
        match action % 16 {
            // Make buffers available more often than the rest: descriptors, and then the index.
            0..=3 => {
                let [descriptors, driver, _] = areas(u64::from(low % 5));
                let slot = u64::from(high % 16);
                let parts = [
                    u64::from(u16::from_le_bytes([value[0], value[1]])),
                    u64::from(value[2]) | u64::from(value[3]) << 32 | u64::from(value[4]) << 48,
                ];
                let bytes = parts.map(u64::to_le_bytes).concat();
                let view = memory.view();
                view.write(descriptors + 16 * slot, &bytes).expect("mapped");
                view.write(driver + 4 + 2 * slot, &[value[5], 0]).expect("mapped");
                view.write(driver + 2, &[value[6], 0]).expect("mapped");
                drop(view);
                write(&mut function, NOTIFY + 4 * u64::from(low % 5), 0, 2);
            }
            4 => write(&mut function, NOTIFY + offset % 64, 0, 2),
            5 => write(&mut function, SELECT, u64::from(low % 6), 2),
            6 => write(&mut function, 0x3a, 1, 2),
            7 => write(&mut function, offset % 0x40, u64::from_le_bytes(value), 1 << (size % 4)),
            8 => function.write(region::BAR0, offset % 0x9000, &data),
            9 => function.read(region::BAR0, offset % 0x9000, &mut data),
            10 => function.write(region::CONFIG, offset % 0x100, &data),
            11 => function.read(region::CONFIG, offset % 0x100, &mut data),
            12 => {
                let fd = eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor");
                let index = IrqIndex::from_number(u32::from(size % 3)).expect("0 to 2");
                let _ =
                    function.connect_irqs(index, number, vec![(action & 16 == 0).then_some(fd)]);
            }
            13 => start(&mut function, features),
            14 if action & 16 == 0 => function.reset(),
            14 => drop(endpoint.unmap(0, BYTES)),
            _ => drop(memory.view().write(offset, &value)),
        }
    }
    endpoint.unmap_all();
    endpoint.map(0, BYTES, copy(), Access::BOTH).expect("mapped");
    memory.view().write(0, &[0; BYTES as usize]).expect("mapped");
    start(&mut function, features);
    assert_eq!(status(&mut function) & 0xf, 0xf);
    drop(function);
    BUS.remove("fuzzed").expect("added above");
});
