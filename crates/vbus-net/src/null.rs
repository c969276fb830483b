// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Back end `null`: it drops all frames of the driver. With `source-bytes` it generates frames
//! without end. For benchmarks.

use std::sync::Arc;

use serde_json::{Value, json};
use vbus_core::settings::Settings;
use vbus_core::{CreateError, ErrorCode, TaskHandle, state};
use vbus_tap::{Mac, Offloads};

use crate::backend::{Backend, Plug, Port, Queue, Sent};
use crate::frame::Packet;
use crate::link::Link;
use crate::sink::{Delivery, OnFull, RxSink, Waiter};

/// Experimental EtherType (IEEE 802). No protocol stack handles these frames.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Reads the setting `source-bytes`, for a device with this MTU.
pub fn source_bytes(settings: &mut Settings, mtu: u16) -> Result<u16, CreateError> {
    let bytes = settings.integer("source-bytes", 0..=u16::MAX)?.unwrap_or(0);
    let most = u32::from(mtu) + 14;
    if bytes != 0 && (bytes < 14 || u32::from(bytes) > most) {
        let text = format!("is {bytes}; use 0 (no frames), or a number from 14 to {most}");
        return Err(settings.error("source-bytes", text));
    }
    Ok(bytes)
}

/// The back end; see the module.
pub struct Null {
    source_bytes: u16,
    link: Arc<Link>,
}

impl Null {
    /// Makes a source of frames of `source_bytes` bytes (at least 14; 0: no frames).
    pub fn new(source_bytes: u16, link: Arc<Link>) -> Null {
        Null { source_bytes, link }
    }
}

impl Backend for Null {
    fn tx_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn rx_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn steers(&self) -> bool {
        false // Each queue has a source of its own.
    }

    fn plug(&self, port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode> {
        self.link.set_carrier(true);
        Ok(Arc::new(NullPlug { port, source_bytes: self.source_bytes, link: self.link.clone() }))
    }

    fn inspect(&self) -> Value {
        json!({ "source-bytes": self.source_bytes })
    }

    fn save(&self) -> Result<Value, String> {
        Ok(state::nothing())
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        state::is_nothing(saved)
    }
}

struct NullPlug {
    port: Arc<Port>,
    source_bytes: u16,
    link: Arc<Link>,
}

impl Plug for NullPlug {
    fn queue(&self, index: u16, task: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode> {
        let mut frame = vec![0; usize::from(self.source_bytes)];
        if frame.len() >= 14 {
            frame[6] = 2;
            frame[12..14].copy_from_slice(&ETHERTYPE);
        }
        let waiter = Waiter { key: self.port.key(index), task: task.clone() };
        Ok(Box::new(NullQueue { port: self.port.clone(), index, waiter, frame }))
    }

    fn set_mac(&self, mac: Mac) -> bool {
        self.port.filter.set_mac(mac);
        true
    }
}

impl Drop for NullPlug {
    fn drop(&mut self) {
        self.link.set_carrier(false);
    }
}

struct NullQueue {
    port: Arc<Port>,
    index: u16,
    waiter: Waiter,
    /// The frame that the source generates; empty if it generates none.
    frame: Vec<u8>,
}

impl Queue for NullQueue {
    fn send(&mut self, _packet: &Packet<'_>) -> Sent {
        Sent::Done { units: 1 }
    }

    fn receive(&mut self, sink: &mut dyn RxSink, budget: u32) -> Result<u32, ErrorCode> {
        if self.frame.is_empty() || self.index >= self.port.steering.queues() {
            return Ok(0);
        }
        self.frame[..6].copy_from_slice(&self.port.filter.mac());
        let Some(packet) = Packet::plain(&self.frame) else { return Ok(0) };
        let mut done = 0;
        while done < budget {
            match sink.deliver(&packet, OnFull::Wait) {
                Delivery::Full { .. } => {
                    sink.wait(&self.waiter);
                    break;
                }
                Delivery::Delivered { units } => done += units,
                _ => done += 1,
            }
        }
        Ok(done)
    }
}
