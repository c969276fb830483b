// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A function without the registers of vbus. It has two BARs, MSI-X in a third one, and a
//! vendor-specific capability of its own.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use serde_json::Value;
use vbus_core::{Executor, InterruptSink, Tuning, state};
use vbus_pci::vbus_pci_config::{Builder, Header, MsixLayout, capabilities};
use vbus_pci::{BarHandler, FunctionState, Interrupts, IrqIndex, PciFunction, Peer, region};
use vbus_test_driver::saved::{Verdict, content, document, forge};

/// The calls of a handler, in order.
type Calls = Arc<Mutex<Vec<String>>>;

/// A BAR whose bytes read as its number. It notes its calls.
struct Noting(u8, Calls);

impl Noting {
    fn note(&self, what: std::fmt::Arguments<'_>) {
        self.1.lock().unwrap().push(format!("{} {what}", self.0));
    }
}

impl BarHandler for Noting {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.note(format_args!("read {} at {offset:#x}", data.len()));
        data.fill(self.0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.note(format_args!("write {data:?} at {offset:#x}"));
    }

    fn reset(&mut self) -> bool {
        self.note(format_args!("reset"));
        false
    }

    fn bus_master_cleared(&mut self) -> bool {
        self.note(format_args!("bus master cleared"));
        false
    }

    fn save(&mut self) -> Result<Value, String> {
        state::part(&self.0)
    }

    fn restore(&mut self, saved: &Value) -> Result<(), String> {
        let number: u8 = state::read_part(saved)?;
        if number == self.0 { Ok(()) } else { Err(format!("it is BAR {number}")) }
    }
}

const LAYOUT: MsixLayout =
    MsixLayout { vectors: 3, table_bar: 4, table: 0, pending_bar: 4, pending: 0x800 };

fn function(calls: &Calls) -> (PciFunction, Arc<Interrupts>) {
    let header = Header { vendor: 0x1234, device: 0x5678, interrupt_pin: 1, ..Header::default() };
    let config = Builder::new(256, &header)
        .bar(0, 0x1000)
        .bar(2, 0x100)
        .bar(4, 0x1000)
        .vendor(0x40, &[0, b'x', b'y'])
        .msix(0x48, LAYOUT)
        .build();
    let interrupts = Arc::new(Interrupts::of(&config));
    let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
    let worker = executor.next_worker();
    let function = PciFunction::new(config, interrupts.clone(), executor, worker)
        .with_bar(0, Box::new(Noting(1, calls.clone())))
        .with_bar(2, Box::new(Noting(2, calls.clone())));
    (function, interrupts)
}

fn read<const N: usize>(function: &mut PciFunction, region: u32, offset: u64) -> [u8; N] {
    let mut data = [0xaa; N];
    function.read(region, offset, &mut data);
    data
}

#[test]
fn accesses_go_to_the_handler_of_their_bar() {
    let calls = Calls::default();
    let (mut function, _interrupts) = function(&calls);
    assert_eq!([0, 1, 2, 4, 7].map(|region| function.region_size(region)), {
        [0x1000, 0, 0x100, 0x1000, 256]
    });
    let config: [u8; 256] = read(&mut function, region::CONFIG, 0);
    let list: Result<Vec<_>, _> = capabilities(&config).collect();
    assert_eq!(list.unwrap(), [(9, 0x40), (0x11, 0x48)]);
    assert_eq!(config[0x40..0x45], [9, 0x48, 5, b'x', b'y']);

    assert_eq!(read(&mut function, 0, 0xffe), [1, 1, 1, 1]);
    assert_eq!(read(&mut function, 2, 4), [2, 2]);
    function.write(2, 0xff, &[7]);
    // Beyond a BAR, without a BAR, and without a handler: reads return zeros and writes do nothing.
    for (region, offset) in [(0, 0x1000), (2, 0x100), (1, 0), (4, 0x900), (8, 0), (99, 0)] {
        assert_eq!(read(&mut function, region, offset), [0; 4]);
        function.write(region, offset, &[1]);
    }
    let expected = ["1 read 4 at 0xffe", "2 read 2 at 0x4", "2 write [7] at 0xff"];
    assert_eq!(*calls.lock().unwrap(), expected);
    calls.lock().unwrap().clear();

    function.write(region::CONFIG, 4, &[4, 0]);
    function.write(region::CONFIG, 4, &[0, 0]);
    function.reset();
    let expected = ["1 bus master cleared", "2 bus master cleared", "1 reset", "2 reset"];
    assert_eq!(*calls.lock().unwrap(), expected);
}

#[test]
fn msix_lies_where_the_configuration_space_says() {
    let (mut function, interrupts) = function(&Calls::default());
    let counts = [IrqIndex::Intx, IrqIndex::Msi, IrqIndex::Msix].map(|i| function.irq_count(i));
    assert_eq!(counts, [1, 0, 3], "this function has no MSI");
    assert_eq!(read(&mut function, 4, 12), [1, 0, 0, 0], "masked after power-on");
    function.write(4, 32, &0x1122_3344_fee0_1003u64.to_le_bytes());
    assert_eq!(read(&mut function, 4, 32), [0, 0x10, 0xe0, 0xfe]);
    assert_eq!(read(&mut function, 0, 32), [1; 4], "in BAR 4 alone");

    let new = || -> (OwnedFd, OwnedFd) {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        (fd.try_clone().unwrap(), fd)
    };
    let (first, fd) = new();
    function.connect_irqs(IrqIndex::Msix, 0, vec![Some(fd)]).unwrap();
    interrupts.trigger(0);
    interrupts.trigger(2);
    rustix::io::read(&first, &mut [0; 8]).unwrap();
    assert_eq!(read(&mut function, 4, 0x800), [0b100, 0, 0, 0]);
    function.write(4, 0x800, &[0; 8]);
    let (third, fd) = new();
    function.connect_irqs(IrqIndex::Msix, 2, vec![Some(fd)]).unwrap();
    rustix::io::read(&third, &mut [0; 8]).unwrap();
    assert_eq!(read(&mut function, 4, 0x800), [0; 8]);
    function.reset();
    assert_eq!(read(&mut function, 4, 32), [0; 4]);
}

/// Whatever a forged state says, it is refused, or the function that goes on answers as its
/// configuration space says.
#[test]
fn forged_states_of_a_bare_function_do_no_harm() {
    let (mut original, interrupts) = function(&Calls::default());
    original.write(region::CONFIG, 4, &[6, 0]);
    original.write(4, 32, &0x1122_3344_fee0_1003u64.to_le_bytes());
    interrupts.trigger(2);
    let state = content(&original.save().unwrap());
    let fixed: [u8; 4] = read(&mut original, region::CONFIG, 0);
    forge(&state, 0..600, |seed, forged| {
        let Some(state) = document::<FunctionState>(&forged) else { return Verdict::Unread };
        let (mut next, interrupts) = function(&Calls::default());
        let peer = if seed % 2 == 0 { Peer::Same } else { Peer::Other };
        let verdict = match next.restore(&state, peer) {
            Err(error) => Verdict::Refused(error.why),
            Ok(()) => Verdict::Taken,
        };
        assert_eq!(read(&mut next, region::CONFIG, 0), fixed, "seed {seed}");
        (0..3).for_each(|vector| interrupts.trigger(vector));
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        let given = vec![None, None, Some(fd.try_clone().unwrap())];
        next.connect_irqs(IrqIndex::Msix, 0, given).unwrap();
        next.reset();
        next.write(region::CONFIG, 4, &[6, 0]);
        assert_eq!(read(&mut next, 4, 0x800), [0; 4], "seed {seed}: pending after a reset");
        let again = content(&next.save().unwrap());
        assert_eq!(again["interrupts"]["msix_pending"], serde_json::json!([]), "seed {seed}");
        verdict
    });
}
