// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two TAP interfaces, and the ways to carry frames over them.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use serde_json::json;
use vbus_core::Bus;
use vbus_core::shm::ring::Entry;
use vbus_tap::{Queue, Setup, set_up};

use crate::driver::{Net, Shape, bus};
use crate::loops::{self, BUFFER};
use crate::network;
use crate::ring::Ring;

/// The frames of a round in each way and direction.
pub const FRAMES: usize = 1000;
/// The entries of the driver's rings: the next power of two.
const ENTRIES: u32 = 1024;
/// The sizes of the batches of io_uring.
const BATCHES: [usize; 3] = [8, 32, 64];
/// The address of the driver, and of the one behind the bare interface.
const DRIVER: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// How long a round may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A direction, as the driver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Frames to the interface. The kernel knows no protocol for them, and does the least that it
    /// can do with a frame: it drops it.
    Out,
    /// Frames from the interface. They wait in its queue when a round begins.
    In,
}

impl Direction {
    pub fn what(self) -> &'static str {
        match self {
            Direction::Out => "out, to the kernel",
            Direction::In => "in, from the kernel",
        }
    }

    pub fn key(self) -> &'static str {
        match self {
            Direction::Out => "out",
            Direction::In => "in",
        }
    }
}

/// A way to carry frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A bare loop of `writev` or `readv`: the floor.
    Calls,
    /// A bare loop of io_uring, with so many frames in each of its calls.
    Ring { batch: usize },
    /// The back end: from the driver's doorbell until the device has done the last frame.
    Vbus,
}

impl Way {
    pub fn what(self) -> String {
        match self {
            Way::Calls => "a bare loop of calls".into(),
            Way::Ring { batch } => format!("a bare loop of io_uring by {batch}"),
            Way::Vbus => "vbus".into(),
        }
    }

    pub fn key(self) -> String {
        match self {
            Way::Calls => "calls".into(),
            Way::Ring { batch } => format!("ring_{batch}"),
            Way::Vbus => "vbus".into(),
        }
    }
}

/// The interfaces and the driver.
pub struct Stage {
    net: Net,
    /// Sends frames to the driver.
    to_driver: UdpSocket,
    /// The interface of the bare loops.
    pub bare: Queue,
    /// Sends frames to the bare loops.
    to_bare: UdpSocket,
    rings: Vec<(usize, Ring)>,
    /// Why there is no io_uring.
    pub no_ring: Option<String>,
    /// The frames of the bare loops.
    buffers: Vec<u8>,
    /// Where the frames that the driver sends begin.
    frames: u64,
    _bus: Bus,
}

impl Stage {
    /// Makes the interfaces.
    ///
    /// # Errors
    /// The process may not make a TAP interface, or cannot set it up.
    pub fn new() -> Result<Stage, String> {
        let (bare, bare_name) = Queue::attach("bare%d", Setup::default())
            .map_err(|error| format!("no TAP interface: {}", vbus_tap::advice(error)))?;
        set_up(&bare_name).map_err(|error| format!("{bare_name} cannot be set up: {error}"))?;
        let bus = bus(1);
        let config = json!({ "mac": vbus_tap::show_mac(DRIVER), "backend": "tap" });
        let endpoint = bus.create("net", "venet", &config).map_err(|error| error.to_string())?;
        let shape = Shape { entries: ENTRIES, buffer_bytes: BUFFER as u32, ..Shape::default() };
        let mut net = Net::open(&endpoint, shape);
        let frames = net.memory.alloc(FRAMES * BUFFER);
        let inspected = endpoint.inspect();
        let name = inspected["device"]["backend"]["tap"].as_str().unwrap_or_default();
        let to_bare = network::set_up(&bare_name, 1, DRIVER, 2 * FRAMES)?;
        let to_driver = network::set_up(name, 2, DRIVER, 2 * FRAMES)?;
        let rings = BATCHES.map(|batch| Ring::new(&bare, batch).map(|ring| (batch, ring)));
        let rings: Result<Vec<_>, _> = rings.into_iter().collect();
        let no_ring = rings.as_ref().err().map(ToString::to_string);
        let (rings, buffers) = (rings.unwrap_or_default(), vec![0; FRAMES * BUFFER]);
        let mut stage =
            Stage { net, to_driver, bare, to_bare, rings, no_ring, buffers, frames, _bus: bus };
        stage.wait_for_carrier()?;
        Ok(stage)
    }

    /// The ways that this machine has. The floor comes first.
    pub fn ways(&self) -> Vec<Way> {
        let rings = self.rings.iter().map(|(batch, _)| Way::Ring { batch: *batch });
        [Way::Calls].into_iter().chain(rings).chain([Way::Vbus]).collect()
    }

    /// The kernel drops frames until it has seen the carrier of an interface. So this sends until
    /// one arrives.
    fn wait_for_carrier(&mut self) -> Result<(), String> {
        let end = Instant::now() + PATIENCE;
        for (name, arrived) in [("the bare interface", true), ("the driver", false)] {
            loop {
                let socket = if arrived { &self.to_bare } else { &self.to_driver };
                let _ = socket.send(&[0; 22]);
                std::thread::sleep(Duration::from_millis(5));
                let buffers = &mut self.buffers;
                if arrived && loops::read(&self.bare, buffers) > 0 || !arrived && self.drain() > 0 {
                    break;
                }
                if Instant::now() > end {
                    return Err(format!("no frame comes to {name}"));
                }
            }
        }
        Ok(())
    }

    /// Measures all `ways` in each round, each round beginning with another one. Returns, for each
    /// way, the nanoseconds a frame of each round.
    ///
    /// # Errors
    /// A frame was lost, or the kernel refuses one.
    pub fn measure(
        &mut self,
        direction: Direction,
        ways: &[Way],
        rounds: usize,
    ) -> Result<Vec<Vec<f64>>, String> {
        let mut samples = vec![Vec::with_capacity(rounds); ways.len()];
        // The first round does not count.
        for round in 0..=rounds {
            for at in 0..ways.len() {
                let at = (at + round) % ways.len();
                let took = match direction {
                    Direction::Out => self.send(ways[at])?,
                    Direction::In => self.receive(ways[at])?,
                };
                if round > 0 {
                    samples[at].push(took.as_nanos() as f64 / FRAMES as f64);
                }
            }
        }
        Ok(samples)
    }

    fn send(&mut self, way: Way) -> Result<Duration, String> {
        // All ways have their frames at the same distances.
        let frame = [&[0; 12][..], &crate::driver::frame(DRIVER, DRIVER, 1, 64)].concat();
        if way == Way::Vbus {
            let len = frame.len() as u32;
            for n in 0..FRAMES {
                let addr = self.frames + (n * BUFFER) as u64;
                self.net.memory.write(addr, &frame);
                let entry = Entry { addr, len, id: 0, flags: 0 };
                self.net.pairs[0].tx.submit(entry).map_err(|error| format!("{error:?}"))?;
            }
        } else {
            for buffer in self.buffers.chunks_exact_mut(BUFFER) {
                buffer[..frame.len()].copy_from_slice(&frame);
            }
        }
        let start = Instant::now();
        match way {
            Way::Calls => loops::write(&self.bare, &self.buffers, frame.len())
                .map_err(|error| format!("writev: {error}"))?,
            Way::Ring { batch } => {
                let ring = self.rings.iter_mut().find(|(size, _)| *size == batch);
                let (_, ring) = ring.ok_or("there is no such ring")?;
                let written = ring.write(&self.buffers, frame.len());
                all(written.map_err(|error| format!("io_uring: {error}"))?)?;
            }
            Way::Vbus => {
                self.net.kick_tx(0);
                // The device may nap, and would look by itself a little later.
                self.net.endpoint.ring(self.net.pairs[0].tx_handle.into());
                let tx = &mut self.net.pairs[0].tx;
                while tx.in_flight() > 0 {
                    tx.reap_count(u32::MAX).map_err(|error| format!("{error:?}"))?;
                    if start.elapsed() > PATIENCE {
                        return Err("the device does not send".into());
                    }
                    std::hint::spin_loop();
                }
            }
        }
        Ok(start.elapsed())
    }

    fn receive(&mut self, way: Way) -> Result<Duration, String> {
        let socket = if way == Way::Vbus { &self.to_driver } else { &self.to_bare };
        // The kernel may have sent a frame of its own.
        loops::read(&self.bare, &mut self.buffers);
        for _ in 0..FRAMES {
            socket.send(&[0; 22]).map_err(|error| format!("send: {error}"))?;
        }
        let start = Instant::now();
        let received = match way {
            Way::Calls => loops::read(&self.bare, &mut self.buffers),
            Way::Ring { batch } => {
                let ring = self.rings.iter_mut().find(|(size, _)| *size == batch);
                let (_, ring) = ring.ok_or("there is no such ring")?;
                ring.read(&mut self.buffers).map_err(|error| format!("io_uring: {error}"))?
            }
            Way::Vbus => {
                for id in 0..FRAMES as u16 {
                    self.net.post_buffer(0, id);
                }
                return self.take_from_device();
            }
        };
        let took = start.elapsed();
        all(received).map(|()| took)
    }

    /// The driver has put its buffers into the ring. Posts them, and takes the time until all are
    /// full.
    fn take_from_device(&mut self) -> Result<Duration, String> {
        let start = Instant::now();
        self.net.kick_rx(0);
        self.net.endpoint.ring(self.net.pairs[0].rx_handle.into()); // As in `send`.
        let rx = &mut self.net.pairs[0].rx;
        while rx.in_flight() > 0 {
            rx.reap_all(u32::MAX, |_| ()).map_err(|error| format!("{error:?}"))?;
            if start.elapsed() > PATIENCE {
                return Err("the device does not receive all frames".into());
            }
            std::hint::spin_loop();
        }
        Ok(start.elapsed())
    }

    /// Posts one buffer, and takes the frame that fills it. Returns how many frames came.
    fn drain(&mut self) -> usize {
        if self.net.pairs[0].rx.in_flight() == 0 {
            self.net.post_buffer(0, 0);
            self.net.kick_rx(0);
        }
        let end = Instant::now() + Duration::from_millis(100);
        let rx = &mut self.net.pairs[0].rx;
        while rx.in_flight() > 0 && Instant::now() < end {
            let _ = rx.reap_all(u32::MAX, |_| ());
            std::thread::yield_now();
        }
        usize::from(rx.in_flight() == 0)
    }
}

/// Whether all frames of a round have passed.
fn all(frames: usize) -> Result<(), String> {
    if frames == FRAMES { Ok(()) } else { Err(format!("{frames} of {FRAMES} frames passed")) }
}
