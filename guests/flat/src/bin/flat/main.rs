// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest without an operating system: it boots by PVH, finds the functions of a vbus, drives them
//! with `vbus-driver`, and reports each result as a line of JSON on the serial port. README.md says
//! how to run it.
#![no_std]
#![no_main]
#![allow(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits here, and registers are written in parts"
)]

mod apic;
mod bells;
mod boot;
mod clock;
mod cpu;
mod dma;
mod hal;
mod hyperv;
mod interrupts;
mod kvm;
mod lines;
mod mark;
mod memory;
mod net;
mod pages;
mod power;
mod processors;
mod report;
mod smp;
mod start;
mod state;
mod stream;
mod traps;
mod virtio;
mod ways;

use core::{fmt, mem};

use flat::pci::{Functions, Window};
use flat::words::Words;
use vbus_driver::Function;
use vbus_shm::abi::class;

use crate::hal::{ConfigPorts, FlatHal};
use crate::report::{Outcome, line};

/// The default of `window=` and `window-bytes=`: the addresses for BARs that firmware has not
/// placed. They are those of vbus-vmm.
const WINDOW: u64 = 0xe000_0000;
const WINDOW_BYTES: u64 = 0x1000_0000;

/// The default of `test=`.
const TESTS: &str = "list,state,venet";

/// The input of every test.
pub struct Setting<'a> {
    /// The command line.
    words: Words<'a>,
    /// The functions that the walk has found.
    functions: &'a Functions,
    /// The kind of doorbell that the tests ring (`doorbell=`).
    kind: u8,
}

impl Setting<'_> {
    /// A number of the command line. A text that is not a number ends the guest.
    pub fn number(&self, key: &str, default: u64) -> u64 {
        number(self.words, key, default)
    }

    /// The functions of one class that have the chosen kind of doorbell.
    pub fn of_class(&self, class: u16) -> impl Iterator<Item = FlatHal> + '_ {
        let hals = self.functions.iter().map(|found| FlatHal::new(found).with_kind(self.kind));
        hals.filter(move |hal| matches!(hal.function(), Ok(function) if function.info().class == u32::from(class)))
    }

    /// The NICs that are on a switch.
    pub fn on_switch(&self) -> impl Iterator<Item = FlatHal> + '_ {
        self.of_class(class::VENET).filter(net::is_on_switch)
    }
}

fn number(words: Words<'_>, key: &str, default: u64) -> u64 {
    match words.number(key, default) {
        Ok(number) => number,
        Err(text) => panic!("{key}={text} is not a number"),
    }
}

/// The guest's main program, on its first processor, with paging on and interrupts off.
/// `start_info` is the address that PVH passes.
pub fn main(start_info: u64) -> ! {
    let start = start::read(start_info);
    traps::init(0);
    apic::init();
    clock::init();
    dma::init(start.memory);
    let words = Words(start.command_line());
    let cpus = smp::start(number(words, "cpus", 1));
    line("boot")
        .value("mhz", clock::mhz())
        .value("x2apic", apic::is_x2apic())
        .value("memory", dma::bytes())
        .value("cpus", cpus)
        .end();

    let next = number(words, "window", WINDOW);
    let window =
        Window { next, end: next.saturating_add(number(words, "window-bytes", WINDOW_BYTES)) };
    let functions = Functions::find(&ConfigPorts, window);
    let name = words.get("doorbell").unwrap_or("mmio");
    let Some(kind) = hal::KINDS.into_iter().find(|kind| hal::kind_name(*kind) == name) else {
        panic!("doorbell={name} is not a kind of doorbell");
    };
    mark::init(u16::try_from(number(words, "marks", 0)).expect("marks= is not a port"));
    let setting = Setting { words, functions: &functions, kind };

    let mut failed = 0;
    for test in words.list("test", TESTS) {
        let outcome = match test {
            "list" => list(&setting),
            "doorbells" => bells::run(&setting),
            "interrupts" => interrupts::run(&setting),
            "pic" => lines::run(&setting),
            "processors" => processors::run(&setting),
            "state" => state::run(&setting),
            "venet" => net::run(&setting),
            "virtio" => virtio::run(&setting),
            other => Err(report::Failure::Unknown(other)),
        };
        if let Err(error) = outcome {
            failed += 1;
            line(test).value("ok", false).text("error", error).end();
        }
    }
    line("done")
        .value("ok", failed == 0)
        .value("failed", failed)
        .value("pages", dma::pages_in_use())
        .end();
    power::off()
}

/// Reports the functions.
fn list<'a>(setting: &Setting<'a>) -> Outcome<'a> {
    for found in setting.functions.iter() {
        let function = FlatHal::new(found).function()?;
        let info = function.info();
        line("list")
            .text("at", found.address)
            .text("name", info.name)
            .text("class", info.class_name)
            .value("vectors", info.vectors)
            .text("doorbells", Kinds(&function))
            .end();
    }
    Ok(())
}

/// The names of the kinds of doorbell that a function offers.
struct Kinds<'a>(&'a Function<FlatHal>);

impl fmt::Display for Kinds<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut between = "";
        self.0.doorbells_offered().try_for_each(|doorbell| {
            write!(f, "{}{}", mem::replace(&mut between, " "), hal::kind_name(doorbell.kind))
        })
    }
}
