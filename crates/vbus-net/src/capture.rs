// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A decorator around a back end: records the frames that a driver sends and receives in a capture
//! file.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vbus_core::shm::signal::Armed;
use vbus_core::{CreateError, ErrorCode, TaskHandle, state};
use vbus_tap::{Mac, Offloads};

use crate::backend::{Backend, Done, Plug, Port, Queue, Sent};
use crate::frame::Packet;
use crate::inbound::{Inbound, InboundState};
use crate::limits::Limits;
use crate::opener::Opener;
use crate::pcap::PcapFile;
use crate::sink::{
    Delivery, OnFull, Read, Reserved, RxDrop, RxSink, SharedFront, SharedSink, Waiter,
};

/// The name of the file among the descriptors.
pub(crate) const PCAP: &str = "pcap";

/// A back end that records frames as they pass the driver's rings. It copies each frame to the
/// driver once more than the inner back end does.
pub struct Captured {
    inner: Box<dyn Backend>,
    path: PathBuf,
    file: Arc<PcapFile>,
}

impl Captured {
    /// Records the frames that pass `inner` in the file `path`. Creates or overwrites the file. The
    /// file gets the first `snap` bytes of each frame. If the file is a FIFO, each of its readers
    /// gets a capture that begins when it comes.
    pub fn new(
        opener: &Arc<dyn Opener>,
        inner: Box<dyn Backend>,
        path: &Path,
        snap: u32,
    ) -> Result<Captured, CreateError> {
        Captured::with(opener, inner, path, snap, None)
    }

    /// The same, with a file that another process has begun.
    pub(crate) fn with(
        opener: &Arc<dyn Opener>,
        inner: Box<dyn Backend>,
        path: &Path,
        snap: u32,
        begun: Option<OwnedFd>,
    ) -> Result<Captured, CreateError> {
        let file = PcapFile::create(opener.clone(), path.into(), snap, begun)
            .map_err(|error| CreateError(format!("\"pcap\" is {path:?}: {error}")))?;
        Ok(Captured { inner, path: path.into(), file: Arc::new(file) })
    }
}

impl Drop for Captured {
    /// The file is complete once the device is gone, although senders on a switch may hold a
    /// receiver for longer.
    fn drop(&mut self) {
        self.file.close();
    }
}

impl Backend for Captured {
    fn tx_offloads(&self) -> Offloads {
        self.inner.tx_offloads()
    }

    fn rx_offloads(&self) -> Offloads {
        self.inner.rx_offloads()
    }

    fn shares_sinks(&self, by_hash: bool) -> bool {
        self.inner.shares_sinks(by_hash)
    }

    fn steers(&self) -> bool {
        self.inner.steers()
    }

    fn reserve(&self, mac: Mac) {
        self.inner.reserve(mac);
    }

    fn set_limits(&self, limits: &Limits) -> bool {
        self.inner.set_limits(limits)
    }

    fn plug(&self, port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode> {
        let lane = |sink: &SharedSink| -> SharedSink {
            let file = self.file.clone();
            SharedFront::sink(sink, move |sink, packet, on_full| {
                deliver(sink, &file, packet, on_full)
            })
        };
        let lanes = port.lanes.iter().map(lane).collect();
        let inner = self.inner.plug(Arc::new(port.with_lanes(lanes)))?;
        Ok(Arc::new(CapturedPlug { inner, file: self.file.clone() }))
    }

    fn inspect(&self) -> Value {
        let mut value = self.inner.inspect();
        value["pcap"] = json!({
            "file": self.path,
            "open": self.file.is_open(),
            "records": self.file.records,
            "left-out": self.file.left_out,
        });
        value
    }

    fn quiesce(&self) {
        self.inner.quiesce();
        self.file.settle();
    }

    fn resume(&self) {
        self.inner.resume();
    }

    fn save(&self) -> Result<Value, String> {
        let (records, left_out) = (self.file.records.get(), self.file.left_out.get());
        state::part(&FileState { records, left_out, inner: self.inner.save()? })
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        let FileState { records, left_out, inner } = state::read_part(saved)?;
        state::check_count("records", records)?;
        state::check_count("left_out", left_out)?;
        self.file.records.add(records);
        self.file.left_out.add(left_out);
        self.inner.restore(&inner)
    }

    fn descriptors(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        let mut all = self.inner.descriptors()?;
        all.extend(self.file.descriptor()?.map(|fd| (PCAP.into(), fd)));
        Ok(all)
    }
}

struct CapturedPlug {
    inner: Arc<dyn Plug>,
    file: Arc<PcapFile>,
}

impl Plug for CapturedPlug {
    fn queue(&self, index: u16, task: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode> {
        let inner = self.inner.queue(index, task)?;
        Ok(Box::new(CapturedQueue { inner, file: self.file.clone(), inbound: Box::default() }))
    }

    fn configure(&self, queues: u16, offloads: Offloads, done: Done) -> Result<(), ErrorCode> {
        self.inner.configure(queues, offloads, done)
    }

    fn set_mac(&self, mac: Mac) -> bool {
        self.inner.set_mac(mac)
    }

    fn filter_changed(&self) {
        self.inner.filter_changed();
    }

    fn save(&self) -> Result<Value, String> {
        self.inner.save()
    }

    fn restore(&self, state: &Value) -> Result<(), String> {
        self.inner.restore(state)
    }
}

struct CapturedQueue {
    inner: Box<dyn Queue>,
    file: Arc<PcapFile>,
    /// The frame that `reserve` has read. It may wait for the receive queue.
    inbound: Box<Inbound>,
}

impl Queue for CapturedQueue {
    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        let sent = self.inner.send(packet);
        if let Sent::Done { .. } = sent {
            self.file.record(packet);
        }
        sent
    }

    fn forget(&mut self) {
        self.inner.forget();
    }

    fn rest(&mut self) {
        *self.inbound = Inbound::default();
        self.inner.rest();
    }

    fn flush(&mut self) {
        self.inner.flush();
    }

    fn receive(&mut self, sink: &mut dyn RxSink, budget: u32) -> Result<u32, ErrorCode> {
        let (file, inbound) = (&*self.file, &mut *self.inbound);
        let mut recorder = Recorder { sink, file, inbound, left: budget };
        // A frame that waits comes before those of the back end, whatever limits them. If it still
        // waits, the back end finds no room, and waits for the receive queue.
        if recorder.inbound.is_held() {
            recorder.deliver_held();
        }
        let received = self.inner.receive(&mut recorder, budget)?;
        Ok(received.max(budget - recorder.left))
    }

    fn receive_shared(&mut self, budget: u32) -> Result<u32, ErrorCode> {
        self.inner.receive_shared(budget)
    }

    fn arm(&mut self) -> Armed {
        self.inner.arm()
    }

    fn deadline(&self) -> Option<Instant> {
        self.inner.deadline()
    }

    fn save(&mut self) -> Result<Value, String> {
        state::part(&CapturedState { frame: self.inbound.save(), inner: self.inner.save()? })
    }

    fn restore(&mut self, saved: &Value) -> Result<(), String> {
        let CapturedState { frame, inner } = state::read_part(saved)?;
        self.inbound.restore(frame.as_ref())?;
        self.inner.restore(&inner)
    }
}

/// A back end with a capture as plain data (spec/state-format.md, "Back ends").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileState {
    /// Frames recorded, and frames not recorded.
    records: u64,
    left_out: u64,
    inner: Value,
}

/// A queue with a capture as plain data (spec/state-format.md, "Back ends").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CapturedState {
    /// The frame that waits for the receive queue.
    frame: Option<InboundState>,
    inner: Value,
}

/// Delivers to `sink`, and records the frames that it accepts.
fn deliver(
    sink: &mut dyn RxSink,
    file: &PcapFile,
    packet: &Packet<'_>,
    on_full: OnFull,
) -> Delivery {
    let delivery = sink.deliver(packet, on_full);
    if let Delivery::Delivered { .. } = delivery {
        file.record(packet);
    }
    delivery
}

/// Records in front of a receive queue that the front lends for a poll.
struct Recorder<'a> {
    sink: &'a mut dyn RxSink,
    file: &'a PcapFile,
    inbound: &'a mut Inbound,
    /// What the poll may still deliver.
    left: u32,
}

impl Recorder<'_> {
    /// Delivers the frame that was read, or the rest of it.
    fn deliver_held(&mut self) {
        let (file, left) = (self.file, &mut self.left);
        self.inbound.deliver(self.sink, (None, OnFull::Wait), left, |sink, packet, on_full| {
            deliver(sink, file, packet, on_full)
        });
    }
}

impl RxSink for Recorder<'_> {
    fn deliver(&mut self, packet: &Packet<'_>, on_full: OnFull) -> Delivery {
        deliver(self.sink, self.file, packet, on_full)
    }

    fn has_room(&mut self, bytes: usize) -> bool {
        self.sink.has_room(bytes)
    }

    /// Reads the frame into its own memory first. In the driver's buffers, the driver could change
    /// the frame before it is recorded. The next call of [`Queue::receive`] delivers what finds too
    /// few buffers now.
    fn reserve(&mut self, read: &mut Read<'_>) -> Reserved {
        let is_open = self.left != 0 && !self.inbound.is_held();
        if !is_open || !self.sink.has_room(self.sink.longest()) {
            return Reserved::Full;
        }
        match self.inbound.read(read) {
            Ok(true) => {}
            Ok(false) => return Reserved::Nothing,
            Err(error) => return Reserved::Failed(error),
        }
        self.deliver_held();
        Reserved::Frame
    }

    fn longest(&self) -> usize {
        self.sink.longest()
    }

    fn post(&mut self) {
        self.sink.post();
    }

    fn wait(&mut self, waiter: &Waiter) {
        self.sink.wait(waiter);
    }

    fn arm(&mut self) -> Armed {
        self.sink.arm()
    }

    fn count_drop(&mut self, reason: RxDrop) {
        self.sink.count_drop(reason);
    }
}
