// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two NICs on the switch that exchange numbered frames for the whole run. venet loses no frame
//! between them: the sender waits for the receiver (spec/venet.md). Each frame must arrive once, in
//! order, and unchanged, whatever others do on the same bus.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use vbus_driver::venet::{HEADER_BYTES, Nic, Piece, Rx, Tx};
use vbus_driver::{Dma, Function, Hal};
use vbus_process::{Process, ProcessMemory};
use vbus_shm::signal::Armed;

/// The names of the two devices.
pub const NAMES: [&str; 2] = ["meter-a", "meter-b"];

/// Frames of a batch, and the time between two batches: 640 frames a second each way, so that the
/// guests have the machine.
const BATCH: u64 = 32;
const PAUSE: Duration = Duration::from_millis(50);
/// How long the last frames may take, and how long a meter may hear nothing.
const BOUND: Duration = Duration::from_secs(60);

const ENTRIES: u32 = 64;
const BUFFER: u32 = 4096;
/// Memory for a frame to be sent.
const SLOT: usize = 2048;
/// The protocol number for local experiments.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// Addresses, protocol number and the frame's own number.
const HEAD: usize = 14 + 8;

/// The lines of the configuration for the two devices.
pub fn config() -> String {
    let settings = |end: usize| {
        format!("backend = \"switch\"\nmac = \"{}\"\nbackpressure-ms = 60000", show(mac(end)))
    };
    [0, 1].map(|end| crate::bus::device(NAMES[end], "venet", &settings(end))).concat()
}

fn mac(end: usize) -> [u8; 6] {
    [2, 0, 0, 0xee, 0, u8::from(end == 1)]
}

fn show(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// What both threads and their owner see.
#[derive(Default)]
struct Shared {
    /// No more frames are sent.
    last: AtomicBool,
    /// How many frames each end has sent.
    sent: [AtomicU64; 2],
    /// Whether that number is its last.
    done: [AtomicBool; 2],
    /// How many each end has received.
    received: [AtomicU64; 2],
    /// An end has found a fault, so the other need not go on.
    faulty: AtomicBool,
    fault: Mutex<Option<String>>,
}

/// The two meters. Dropping them ends them without a last check.
pub struct Meters {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Meters {
    /// Opens both devices and begins. The sockets are in the folder `bus`.
    ///
    /// # Errors
    /// A device cannot be opened.
    pub fn start(bus: &Path) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let mut meters = Self { shared: shared.clone(), threads: Vec::new() };
        let stations: Vec<_> = NAMES
            .iter()
            .map(|name| {
                let socket = bus.join(format!("{name}.sock"));
                Station::open(&socket).with_context(|| format!("opening {name}"))
            })
            .collect::<Result<_>>()?;
        for (end, mut station) in stations.into_iter().enumerate() {
            let shared = shared.clone();
            let run = move || {
                if let Err(error) = station.run(end, &shared) {
                    let mut fault = shared.fault.lock().unwrap_or_else(PoisonError::into_inner);
                    fault.get_or_insert(format!("{}: {error:#}", NAMES[end]));
                    shared.faulty.store(true, Ordering::Relaxed);
                }
            };
            meters.threads.push(std::thread::Builder::new().name("meter".into()).spawn(run)?);
        }
        Ok(meters)
    }

    /// Frames received so far, by both.
    pub fn frames(&self) -> u64 {
        self.shared.received.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// Whether all is well so far.
    ///
    /// # Errors
    /// A frame was lost, changed, repeated or misplaced, or a connection ended.
    pub fn check(&self) -> Result<()> {
        match &*self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(fault) => Err(anyhow!("{fault}")),
            None => Ok(()),
        }
    }

    /// Sends no more frames, and waits for those under way. Returns how many arrived.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn finish(mut self) -> Result<u64> {
        self.shared.last.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| anyhow!("a meter's thread panicked"))?;
        }
        self.check()?;
        Ok(self.frames())
    }
}

/// A NIC with one queue pair.
struct Station {
    process: Process,
    nic: Nic<Process>,
    tx: Tx<Process>,
    rx: Rx<Process>,
    sending: ProcessMemory,
}

impl Station {
    fn open(socket: &Path) -> Result<Self> {
        let process = Process::connect(socket, 4 << 20)?;
        let mut nic = Nic::open(Function::probe(process.clone())?, 0, 0)?;
        let (tx, mut rx) = nic.queue_pair(0, ENTRIES, BUFFER, 0)?;
        for id in 0..u16::try_from(rx.space())? {
            rx.give(id)?;
        }
        rx.post();
        nic.start()?;
        let sending = process.alloc(SLOT * ENTRIES as usize).map_err(vbus_driver::Error::from)?;
        Ok(Self { process, nic, tx, rx, sending })
    }

    /// Sends and receives until the owner says that it is over, and all frames have come.
    fn run(&mut self, end: usize, shared: &Shared) -> Result<()> {
        let (mut sent, mut received) = (0, 0);
        let mut next = Instant::now();
        let mut heard = Instant::now();
        loop {
            let last = shared.last.load(Ordering::Relaxed);
            if !last && Instant::now() >= next {
                next = Instant::now() + PAUSE;
                sent += self.send(end, sent)?;
                shared.sent[end].store(sent, Ordering::Relaxed);
            }
            if last {
                // Pairs with the load below: who sees it, sees the last number too.
                shared.done[end].store(true, Ordering::Release);
            }
            let before = received;
            while let Some(frame) = self.receive()? {
                // Other stations' broadcasts come too.
                if frame.get(12..14) == Some(&ETHERTYPE) {
                    ensure!(
                        frame == self::frame(1 - end, received),
                        "the frame behind number {received} is not the next one, or has changed: \
                         it begins with {:02x?}",
                        &frame[..frame.len().min(HEAD + 8)]
                    );
                    received += 1;
                }
            }
            shared.received[end].store(received, Ordering::Relaxed);
            if received != before {
                heard = Instant::now();
            }
            // Pairs with the store above.
            let done = shared.done[1 - end].load(Ordering::Acquire);
            // A frame can arrive before it was counted.
            let to_come = shared.sent[1 - end].load(Ordering::Relaxed).saturating_sub(received);
            if last && done && to_come == 0 || shared.faulty.load(Ordering::Relaxed) {
                return Ok(());
            }
            ensure!(
                to_come == 0 || heard.elapsed() < BOUND,
                "{to_come} frames have not arrived for {} s",
                BOUND.as_secs()
            );
            if self.rx.arm(0) == Armed::Waiting {
                self.process.wait(PAUSE / 4);
                self.nic.function().acknowledge();
            }
            self.rx.disarm();
        }
    }

    /// Sends a batch from number `first` on, or as much of it as there is room for. Returns how
    /// many.
    fn send(&mut self, end: usize, first: u64) -> Result<u64> {
        self.tx.reclaim()?;
        let mut count = 0;
        while count < BATCH && self.tx.space() > 0 {
            let number = first + count;
            let slot = usize::try_from(number % u64::from(ENTRIES))? * SLOT;
            let mut bytes = vec![0; HEADER_BYTES];
            bytes.extend(frame(end, number));
            self.sending.copy_in(slot, &bytes);
            let piece =
                Piece { addr: self.sending.address(slot), len: u32::try_from(bytes.len())? };
            if !self.tx.submit(&[piece])? {
                break;
            }
            count += 1;
        }
        self.tx.post();
        Ok(count)
    }

    /// Takes the next frame, if there is one, and gives its buffers back.
    fn receive(&mut self) -> Result<Option<Vec<u8>>> {
        let Some(pieces) = self.rx.receive()? else { return Ok(None) };
        let pieces = pieces.to_vec();
        let mut frame = Vec::new();
        for piece in pieces {
            let at = frame.len();
            frame.resize(at + piece.len as usize, 0);
            self.rx.buffers().copy_out(usize::from(piece.id) * BUFFER as usize, &mut frame[at..]);
            self.rx.give(piece.id)?;
        }
        self.rx.post();
        if frame.len() < self.rx.header_bytes() {
            bail!("a frame without a header");
        }
        Ok(Some(frame.split_off(self.rx.header_bytes())))
    }
}

/// Frame `number` of the meter `end`. Its length and its bytes follow from the number.
fn frame(end: usize, number: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(number << 1 | end as u64);
    let mut frame = Vec::with_capacity(1514);
    frame.extend(mac(1 - end));
    frame.extend(mac(end));
    frame.extend(ETHERTYPE);
    frame.extend(number.to_le_bytes());
    frame.resize(random.usize(60..=1514), 0);
    random.fill(&mut frame[HEAD..]);
    frame
}
