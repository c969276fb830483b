//! Back end `null`: frames vanish; if so configured, frames come out of it without end. For
//! benchmarks.

use std::sync::Arc;

use serde_json::{Value, json};
use vbus_core::ErrorCode;
use vbus_core::memory::View;
use vbus_core::shm::abi::venet::{F_CSUM, F_TSO, F_USO};

use super::frame::Packet;
use super::port::{Backend, Link, Port, Queue, Sent};
use super::rx::Delivery;
use vbus_core::lock;

/// Experimental EtherType (IEEE 802): no protocol stack takes these frames for its own.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// The settings.
pub struct Null {
    pub source_bytes: u16,
    pub link: Arc<Link>,
}

impl Backend for Null {
    fn features(&self) -> u64 {
        F_CSUM | F_TSO | F_USO
    }

    fn connect(&self, port: &Arc<Port>) -> Result<Vec<Box<dyn Queue>>, ErrorCode> {
        self.link.set(true);
        let queue = |index: usize| {
            let mut frame = vec![0; usize::from(self.source_bytes)];
            if frame.len() >= 14 {
                frame[..6].copy_from_slice(&port.mac);
                frame[6] = 2;
                frame[12..14].copy_from_slice(&ETHERTYPE);
            }
            Box::new(NullQueue { port: port.clone(), index, frame, link: self.link.clone() })
                as Box<dyn Queue>
        };
        Ok((0..port.lanes.len()).map(queue).collect())
    }

    fn inspect(&self) -> Value {
        json!({ "source-bytes": self.source_bytes })
    }
}

struct NullQueue {
    port: Arc<Port>,
    index: usize,
    /// The frame that comes out; empty if none does.
    frame: Vec<u8>,
    link: Arc<Link>,
}

impl Drop for NullQueue {
    fn drop(&mut self) {
        self.link.set(false);
    }
}

impl Queue for NullQueue {
    fn send(&mut self, _packet: &Packet<'_>) -> Sent {
        Sent::Done { units: 1 }
    }

    fn receive(&mut self, view: &View<'_>, budget: u32) -> Result<u32, ErrorCode> {
        let Some(packet) = Packet::plain(&self.frame) else { return Ok(0) };
        let lane = &self.port.lanes[self.index];
        let Some(rx) = &mut *lock(&lane.rx) else { return Ok(0) };
        for n in 0..budget {
            if !rx.has_room(view, packet.len()) {
                if let Some(task) = lane.task.get() {
                    rx.wait(self.port.key(lane.index), task);
                }
                return Ok(n);
            }
            match rx.deliver_in(view, &packet, true) {
                Delivery::Done => {}
                Delivery::Wait(_) => return Ok(n),
                Delivery::TooLong => lane.counters.rx.drops.too_long.one(),
            }
        }
        Ok(budget)
    }
}
