//! Back end `tap`: a TAP interface of this machine, a queue of it for each queue pair. Frames are
//! read and written straight from and to the driver's buffers.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use rustix::io::{Errno, readv, writev};
use serde_json::{Value, json};
use vbus_core::memory::{DriverSlice, View};
use vbus_core::shm::abi::venet::{F_TSO, F_USO, FRAME_MAX, HEADER_BYTES};
use vbus_core::{CreateError, ErrorCode, Interest};

use super::frame::{Body, ETH_BYTES, ETH_OVERHEAD, PIECES_MAX, Packet};
use super::port::{Backend, Drop as DropReason, Link, Port, Queue, Sent};
use super::rx::ReadIn;
use super::tun::{self, Tun};
use vbus_core::lock;

/// The settings.
pub struct Tap {
    name: String,
    tuns: Vec<Arc<Tun>>,
    features: u64,
    link: Arc<Link>,
}

impl Tap {
    /// Attaches to the interface called `name`, or makes it.
    pub fn new(name: &str, queues: u16, mtu: u16, link: Arc<Link>) -> Result<Tap, CreateError> {
        let failed =
            |error: Errno| CreateError(format!("tap = {name:?}: {error}; {}", tun::advice(error)));
        let (first, name) = Tun::attach(name, queues > 1).map_err(failed)?;
        let mut tuns = vec![Arc::new(first)];
        for _ in 1..queues {
            tuns.push(Arc::new(Tun::attach(&name, true).map_err(failed)?.0));
        }
        if let Err(error) = tun::configure(&name, mtu) {
            tracing::warn!(tap = name, mtu, %error, "cannot set the MTU and bring the interface up: do it with `ip link`");
        }
        let features = tuns[0].features();
        let tap = Tap { name, tuns, features, link };
        tap.set_carrier(false);
        Ok(tap)
    }

    fn set_carrier(&self, up: bool) {
        // Kernels before 5.0 cannot; there the interface seems to be plugged in always.
        if let Err(error) = self.tuns[0].set_carrier(up) {
            tracing::debug!(tap = self.name, %error, "no carrier control");
        }
    }
}

impl Backend for Tap {
    fn features(&self) -> u64 {
        self.features
    }

    fn connect(&self, port: &Arc<Port>) -> Result<Vec<Box<dyn Queue>>, ErrorCode> {
        let failed = |error: Errno| {
            tracing::error!(device = port.name, tap = self.name, %error, "the TAP interface cannot be set up");
            ErrorCode::FAILED
        };
        for (q, tun) in self.tuns.iter().enumerate() {
            if tun.is_multi() {
                tun.set_enabled(q < port.lanes.len()).map_err(failed)?;
            }
        }
        self.tuns[0].set_offload(port.features).map_err(failed)?;
        self.set_carrier(true);
        self.link.set(true);
        let session = Arc::new(Session { tun: self.tuns[0].clone(), link: self.link.clone() });
        let segments = port.features & (F_TSO | F_USO) != 0;
        let longest = if segments { FRAME_MAX } else { HEADER_BYTES + port.mtu + ETH_OVERHEAD };
        let queue = |(index, tun): (usize, &Arc<Tun>)| {
            let (tun, port, session) = (tun.clone(), port.clone(), session.clone());
            Box::new(TapQueue { tun, port, index, longest, watched: false, _session: session })
                as Box<dyn Queue>
        };
        Ok(self.tuns.iter().take(port.lanes.len()).enumerate().map(queue).collect())
    }

    fn inspect(&self) -> Value {
        json!({ "tap": self.name, "queues": self.tuns.len() })
    }
}

/// A connection's use of the interface, until the last of its queues is gone.
struct Session {
    tun: Arc<Tun>,
    link: Arc<Link>,
}

impl Drop for Session {
    fn drop(&mut self) {
        // What was left to the last driver must not be left to the next; and without a driver
        // nobody is there.
        let _ = self.tun.set_offload(0);
        let _ = self.tun.set_carrier(false);
        self.link.set(false);
    }
}

struct TapQueue {
    tun: Arc<Tun>,
    port: Arc<Port>,
    index: usize,
    /// Room for the longest frame, with its header.
    longest: usize,
    watched: bool,
    _session: Arc<Session>,
}

impl TapQueue {
    /// Lets the task be woken by the interface. Once the task knows itself.
    fn watch(&mut self) -> Result<(), ErrorCode> {
        if let (false, Some(task)) = (self.watched, self.port.lanes[self.index].task.get()) {
            task.watch(&self.tun.fd, Interest::ReadWrite).map_err(|error| {
                tracing::error!(device = self.port.name, %error, "cannot watch the TAP interface");
                ErrorCode::FAILED
            })?;
            self.watched = true;
        }
        Ok(())
    }
}

impl Queue for TapQueue {
    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        let mut head = [0; HEADER_BYTES + ETH_BYTES];
        head[..HEADER_BYTES].copy_from_slice(&packet.header.bytes(0));
        head[HEADER_BYTES..].copy_from_slice(&packet.eth);
        let mut vector = [IoSlice::new(&[]); PIECES_MAX + 1];
        vector[0] = IoSlice::new(&head);
        let mut count = 1;
        match packet.body {
            Body::Bytes(bytes) => {
                vector[1] = IoSlice::new(bytes);
                count += 1;
            }
            Body::Driver(parts) => {
                let slices = parts.iter().flat_map(DriverSlice::io_slices);
                for (to, slice) in vector[1..].iter_mut().zip(slices) {
                    *to = slice;
                    count += 1;
                }
            }
        }
        match writev(&self.tun.fd, &vector[..count]) {
            Ok(_) => Sent::Done { units: 1 },
            Err(Errno::AGAIN) => Sent::Wait { until: None, moved: false },
            Err(Errno::IO | Errno::BADFD) => Sent::Dropped(DropReason::NoLink), // The interface is down, or gone.
            Err(_) => Sent::Dropped(DropReason::Refused),
        }
    }

    fn receive(&mut self, view: &View<'_>, budget: u32) -> Result<u32, ErrorCode> {
        self.watch()?;
        let lane = &self.port.lanes[self.index];
        let mut guard = lock(&lane.rx);
        let Some(rx) = guard.as_mut() else { return Ok(0) };
        let mut read = |vector: &mut [IoSliceMut<'_>]| readv(&self.tun.fd, vector);
        for n in 0..budget {
            match rx.read_in(view, self.longest, &mut read, |mac| self.port.accepts(mac)) {
                ReadIn::Frame => {}
                ReadIn::NoBuffers => {
                    if let Some(task) = lane.task.get() {
                        rx.wait(self.port.key(lane.index), task);
                    }
                    return Ok(n);
                }
                ReadIn::Empty => return Ok(n),
                ReadIn::Failed(Errno::AGAIN | Errno::INTR) => return Ok(n),
                ReadIn::Failed(Errno::IO | Errno::BADFD) => {
                    // The interface is down; it becomes readable when it is up again.
                    return Ok(n);
                }
                ReadIn::Failed(error) => {
                    tracing::error!(device = self.port.name, %error, "cannot read from the TAP interface");
                    return Err(ErrorCode::FAILED);
                }
            }
        }
        Ok(budget)
    }
}

impl Drop for TapQueue {
    fn drop(&mut self) {
        if let Some(task) = self.port.lanes[self.index].task.get() {
            task.unwatch(&self.tun.fd);
        }
    }
}
