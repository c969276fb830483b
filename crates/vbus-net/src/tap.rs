// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Back end `tap`: a TAP interface of this machine, with a queue for each queue pair. The kernel
//! reads and writes the driver's buffers directly.

use std::sync::Arc;

use rustix::io::Errno;
use serde_json::{Value, json};
use vbus_core::io_vec::{IoVec, IoVecMut, readv, writev};
use vbus_core::memory::DriverSlice;
use vbus_core::settings::Settings;
use vbus_core::{CreateError, ErrorCode, Interest, TaskHandle};
use vbus_tap::{HEADER_BYTES, Mac, Offloads, advice};

use crate::backend::{Backend, Plug, Port, Queue, Sent, TxDrop};
use crate::frame::{Body, ETH_BYTES, PIECES_MAX, Packet, TAG_BYTES};
use crate::link::Link;
use crate::opener::Opener;
use crate::sink::{Reserved, RxSink, Waiter};

/// Reads the setting `tap`, the name of an interface.
pub fn name(settings: &mut Settings) -> Result<String, CreateError> {
    let name = settings.text("tap")?.unwrap_or_else(|| "vbus%d".into());
    // IFNAMSIZ is 16 bytes with the final zero.
    let plain = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':';
    if name.is_empty() || name.len() > 15 || name == "." || name == ".." || !name.bytes().all(plain)
    {
        let text = format!(
            "is {name:?}, not the name of an interface; use 1 to 15 letters, digits and signs"
        );
        return Err(settings.error("tap", text));
    }
    Ok(name)
}

/// The back end: an interface with its queues.
pub struct Tap {
    name: String,
    queues: Vec<Arc<vbus_tap::Queue>>,
    offloads: Offloads,
    link: Arc<Link>,
}

impl Tap {
    /// Attaches `queues` queues to the interface called `name`, and creates it if it does not
    /// exist. Sets its MTU and brings it up.
    pub fn new(
        opener: &dyn Opener,
        name: &str,
        queues: u16,
        mtu: u16,
        link: Arc<Link>,
    ) -> Result<Tap, CreateError> {
        let (name, queues) = opener.tap(name, queues, mtu).map_err(|error| {
            let advice = Errno::from_io_error(&error).map(|error| format!("; {}", advice(error)));
            CreateError(format!("\"tap\" is {name:?}: {error}{}", advice.unwrap_or_default()))
        })?;
        let queues: Vec<_> = queues.into_iter().map(Arc::new).collect();
        let offloads = queues[0].known_offloads();
        set_carrier(&queues[0], false);
        Ok(Tap { name, queues, offloads, link })
    }
}

fn set_carrier(queue: &vbus_tap::Queue, up: bool) {
    if let Err(error) = queue.set_carrier(up) {
        tracing::debug!(%error, "the carrier of the TAP interface cannot be set");
    }
}

impl Backend for Tap {
    fn tx_offloads(&self) -> Offloads {
        self.offloads
    }

    fn rx_offloads(&self) -> Offloads {
        self.offloads
    }

    fn steers(&self) -> bool {
        // The kernel chooses the queue by the flow of the frame.
        self.queues.len() == 1
    }

    fn plug(&self, port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode> {
        set_carrier(&self.queues[0], true);
        self.link.set_carrier(true);
        let (queues, link) = (self.queues.clone(), self.link.clone());
        Ok(Arc::new(TapPlug { port, queues, link }))
    }

    fn inspect(&self) -> Value {
        json!({ "tap": self.name, "queues": self.queues.len() })
    }
}

/// A driver's use of the interface.
struct TapPlug {
    port: Arc<Port>,
    queues: Vec<Arc<vbus_tap::Queue>>,
    link: Arc<Link>,
}

impl TapPlug {
    fn failed(&self, error: Errno) -> ErrorCode {
        tracing::error!(device = self.port.name, %error, "the TAP interface cannot be set up");
        ErrorCode::FAILED
    }
}

impl Plug for TapPlug {
    fn queue(&self, index: u16, task: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode> {
        let queue = self.queues.get(usize::from(index)).ok_or(ErrorCode::BAD_ARGUMENT)?.clone();
        let waiter = Waiter { key: self.port.key(index), task: task.clone() };
        let port = self.port.clone();
        Ok(Box::new(TapQueue { queue, port, index, waiter, watched: false }))
    }

    fn set_queues(&self, queues: u16) -> Result<(), ErrorCode> {
        for (index, queue) in self.queues.iter().enumerate() {
            if queue.is_multi_queue() {
                let enabled = index < usize::from(queues);
                queue.set_enabled(enabled).map_err(|error| self.failed(error))?;
            }
        }
        Ok(())
    }

    fn set_rx_offloads(&self, offloads: Offloads) -> Result<(), ErrorCode> {
        self.queues[0].set_offloads(offloads).map_err(|error| self.failed(error))
    }

    fn set_mac(&self, mac: Mac) -> bool {
        self.port.filter.set_mac(mac);
        true
    }
}

impl Drop for TapPlug {
    fn drop(&mut self) {
        // Reset the offloads, because the next driver may not accept those of this one. Take the
        // carrier down, because there is no driver.
        let _ = self.queues[0].set_offloads(Offloads::NONE);
        set_carrier(&self.queues[0], false);
        self.link.set_carrier(false);
    }
}

struct TapQueue {
    queue: Arc<vbus_tap::Queue>,
    port: Arc<Port>,
    index: u16,
    waiter: Waiter,
    watched: bool,
}

impl TapQueue {
    /// Watches the interface while the queue is in use. A queue that the kernel does not use
    /// reports an error all the time.
    fn watch(&mut self, wanted: bool) -> Result<(), ErrorCode> {
        if wanted == self.watched {
            return Ok(());
        }
        if wanted {
            self.waiter.task.watch(&*self.queue, Interest::ReadWrite).map_err(|error| {
                tracing::error!(device = self.port.name, %error, "cannot watch the TAP interface");
                ErrorCode::FAILED
            })?;
        } else {
            self.waiter.task.unwatch(&*self.queue);
        }
        self.watched = wanted;
        Ok(())
    }
}

impl Queue for TapQueue {
    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        let mut head = [0; HEADER_BYTES + ETH_BYTES + TAG_BYTES];
        head[..HEADER_BYTES].copy_from_slice(&packet.header.bytes(0));
        head[HEADER_BYTES..].copy_from_slice(&packet.front());
        let mut vector = [IoVec::EMPTY; PIECES_MAX + 1];
        vector[0] = IoVec::new(&head[..HEADER_BYTES + packet.front_bytes()]);
        let mut count = 1;
        match packet.body {
            Body::Bytes(bytes) => {
                vector[1] = IoVec::new(bytes);
                count += 1;
            }
            Body::Driver(parts) => {
                let slices = parts.iter().flat_map(DriverSlice::io_vecs);
                for (to, slice) in vector[1..].iter_mut().zip(slices) {
                    *to = slice;
                    count += 1;
                }
            }
        }
        match writev(&*self.queue, &vector[..count]) {
            Ok(_) => Sent::Done { units: 1 },
            Err(Errno::AGAIN) => Sent::Wait { until: None, moved: false },
            // The driver has taken the memory away. Touching it lets the bus see that.
            Err(Errno::FAULT) => {
                if let Body::Driver(parts) = packet.body {
                    parts.iter().for_each(DriverSlice::touch);
                }
                Sent::Dropped(TxDrop::Refused)
            }
            // The interface is down or gone, or the kernel does not use this queue.
            Err(Errno::IO | Errno::BADFD) => Sent::Dropped(TxDrop::NoLink),
            Err(_) => Sent::Dropped(TxDrop::Refused),
        }
    }

    fn receive(&mut self, sink: &mut dyn RxSink, budget: u32) -> Result<u32, ErrorCode> {
        let used = self.index < self.port.steering.queues();
        self.watch(used)?;
        if !used {
            return Ok(0);
        }
        let mut read = |vector: &mut [IoVecMut<'_>]| readv(&*self.queue, vector);
        for n in 0..budget {
            match sink.reserve(&mut read) {
                Reserved::Frame => {}
                Reserved::Full => {
                    sink.wait(&self.waiter);
                    return Ok(n);
                }
                // EIO: the interface is down. It becomes readable when it is up again.
                Reserved::Nothing
                | Reserved::Failed(Errno::AGAIN | Errno::INTR | Errno::IO | Errno::BADFD) => {
                    return Ok(n);
                }
                // The driver has taken its buffers away. The bus has seen that, or the next frame
                // goes into other ones.
                Reserved::Failed(Errno::FAULT) => return Ok(n),
                Reserved::Failed(error) => {
                    let device = &self.port.name;
                    tracing::error!(device, %error, "cannot read from the TAP interface");
                    return Err(ErrorCode::FAILED);
                }
            }
        }
        Ok(budget)
    }
}

impl Drop for TapQueue {
    fn drop(&mut self) {
        let _ = self.watch(false); // The end of a watch cannot fail.
    }
}
