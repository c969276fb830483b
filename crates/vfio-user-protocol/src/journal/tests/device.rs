// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device, and the process that serves it until it is killed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::keeper::{self, Frame};
use crate::journal::fault;
use crate::state::{Held, ServerData, ServerState};
use crate::{IoEventFd, IrqAction, IrqInfo, Mapping, RegionInfo, Server, Target};

/// Registers of region 0, 8 bytes each.
pub(super) mod register {
    /// Write: one more value.
    pub(crate) const VALUE: u64 = 0;
    /// Read: how many values, and which, in order.
    pub(crate) const SUM: u64 = 8;
    /// Read: a number that nobody else has got. A read changes the device.
    pub(crate) const TICKET: u64 = 24;
    /// Read: of the memory that is mapped, which.
    pub(crate) const MEMORY: u64 = 32;
}
/// Bytes of region 1, which takes and gives long messages.
pub(super) const LONG: u64 = 1 << 20;

/// What the device has done. Every value counts, and their order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sum {
    pub(super) count: u64,
    pub(super) hash: u64,
}

impl Sum {
    pub(super) fn add(&mut self, value: u64) {
        self.count += 1;
        self.hash = self.hash.wrapping_mul(0x100_0000_01b3).wrapping_add(value).wrapping_add(1);
    }

    pub(super) fn add_bytes(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            self.add(chunk.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte)));
        }
    }
}

/// The content of region 1 at an offset.
pub(super) fn pattern(offset: u64) -> u8 {
    (offset / 251).to_le_bytes()[0]
}

/// The first 8 bytes of a file.
fn token(file: impl AsFd) -> Result<u64, Errno> {
    let mut bytes = [0; 8];
    rustix::io::pread(file, &mut bytes, 0)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// What of the device is no descriptor.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct State {
    sum: Sum,
    tickets: u64,
    /// Address and size.
    maps: Vec<(u64, u64)>,
    has_irq: bool,
    has_doorbell: bool,
}

struct Device {
    state: State,
    files: Vec<OwnedFd>,
    irq: Option<OwnedFd>,
    doorbell: Option<OwnedFd>,
    changed: bool,
    channel: OwnedFd,
}

impl Device {
    fn send(&self, frame: &Frame, fds: &[BorrowedFd<'_>]) {
        fault::step();
        keeper::send(&self.channel, frame, fds);
        fault::step();
    }
}

impl Target for Device {
    fn region_info(&self, region: u32) -> RegionInfo {
        match region {
            0 => RegionInfo::read_write(64),
            1 => RegionInfo::read_write(LONG),
            _ => RegionInfo::default(),
        }
    }

    fn irq_info(&self, index: u32) -> IrqInfo {
        if index == 1 { IrqInfo::messages(1) } else { IrqInfo::default() }
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        if region == 1 {
            (offset..).zip(data).for_each(|(at, byte)| *byte = pattern(at));
            return Ok(());
        }
        let words = match offset {
            register::SUM => vec![self.state.sum.count, self.state.sum.hash],
            register::TICKET => {
                self.changed = true;
                self.state.tickets += 1;
                vec![self.state.tickets - 1]
            }
            register::MEMORY => {
                let mut sum = Sum::default();
                for file in &self.files {
                    sum.add(token(file)?);
                }
                vec![sum.count, sum.hash]
            }
            _ => return Err(Errno::INVAL),
        };
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        data.copy_from_slice(bytes.get(..data.len()).ok_or(Errno::INVAL)?);
        Ok(())
    }

    fn write(&mut self, region: u32, _: u64, data: &[u8]) -> Result<(), Errno> {
        self.changed = true;
        match region {
            1 => self.state.sum.add_bytes(data),
            _ => self.state.sum.add(u64::from_ne_bytes(data.try_into().unwrap())),
        }
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, action: IrqAction) -> Result<(), Errno> {
        match action {
            IrqAction::DisableAll => (self.irq, self.changed) = (None, true),
            IrqAction::Connect { eventfds, .. } => {
                self.irq = eventfds.into_iter().next().flatten();
                self.changed = true;
            }
            IrqAction::Trigger(_) => {
                let irq = self.irq.as_ref().ok_or(Errno::NOENT)?;
                rustix::io::write(irq, &1u64.to_ne_bytes())?;
            }
            _ => return Err(Errno::OPNOTSUPP),
        }
        Ok(())
    }

    fn dma_map(&mut self, mapping: Mapping<'_>) -> Result<(), Errno> {
        let (file, _) = mapping.memory.ok_or(Errno::INVAL)?;
        token(file)?;
        self.changed = true;
        self.state.maps.push((mapping.address, mapping.size));
        self.files.push(file.try_clone_to_owned().unwrap());
        Ok(())
    }

    fn dma_unmap(&mut self, address: u64, _: u64) {
        self.changed = true;
        let at = self.state.maps.iter().position(|map| map.0 == address).unwrap();
        self.state.maps.remove(at);
        self.files.remove(at);
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.changed = true;
        self.state.sum = Sum::default();
        Ok(())
    }

    fn io_eventfd_count(&mut self, region: u32) -> usize {
        usize::from(region == 0)
    }

    fn io_eventfds(&mut self, _: u32, _: usize) -> Vec<IoEventFd> {
        let new = || {
            self.changed = true;
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
        };
        let doorbell = self.doorbell.get_or_insert_with(new);
        vec![IoEventFd::new(doorbell.try_clone().unwrap(), 0)]
    }

    fn disconnected(&mut self) {
        (self.irq, self.doorbell, self.changed) = (None, None, true);
        self.state.maps.clear();
        self.files.clear();
    }

    fn wants_commit(&self) -> bool {
        self.changed
    }

    fn commit(&mut self, server: io::Result<ServerState>) {
        let ServerState { data, descriptors, .. } = server.unwrap();
        self.changed = false;
        let mut state = self.state.clone();
        (state.has_irq, state.has_doorbell) = (self.irq.is_some(), self.doorbell.is_some());
        let mut fds: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        fds.extend(self.files.iter().chain(&self.irq).chain(&self.doorbell).map(AsFd::as_fd));
        let of_server = descriptors.len();
        let data = serde_json::to_value(&data).unwrap();
        self.send(&Frame::Commit { data, state, of_server }, &fds);
    }

    fn hold(&mut self, number: u64, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        self.send(&Frame::Hold { number }, fds);
        Ok(())
    }
}

/// Serves until this process is killed. `orders` are those of [`keeper::ORDERS`].
pub(super) fn serve(orders: &str) {
    let (kill_at, broken) = orders.split_once(' ').unwrap();
    fault::KILL_AT.store(kill_at.parse().unwrap(), Ordering::Relaxed);
    fault::FAULT.store(broken.parse().unwrap(), Ordering::Relaxed);
    let channel = io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut device = Device {
        state: State::default(),
        files: Vec::new(),
        irq: None,
        doorbell: None,
        changed: false,
        channel: channel.try_clone().unwrap(),
    };
    let (frame, mut fds) = keeper::receive(&channel).unwrap();
    let mut server = match frame {
        Frame::Begin => {
            let journal = fds.pop().unwrap();
            let listener = fds.pop().unwrap();
            let mut server = Server::with_listener(listener, "x", "test", device).unwrap();
            server.set_journal(journal, Instant::now()).unwrap();
            server
        }
        Frame::GoOn { data, state, of_server, of_device, number } => {
            let mut rest = fds.into_iter();
            let descriptors: Vec<_> = rest.by_ref().take(of_server).collect();
            device.files = rest.by_ref().take(state.maps.len()).collect();
            device.irq = state.has_irq.then(|| rest.next().unwrap());
            device.doorbell = state.has_doorbell.then(|| rest.next().unwrap());
            assert_eq!(
                device.files.len() + usize::from(state.has_irq) + usize::from(state.has_doorbell),
                of_device
            );
            device.state = state;
            let data: ServerData = serde_json::from_value(data).unwrap();
            let held = Held { number, fds: rest.collect() };
            let state = ServerState { data, descriptors, held };
            Server::restore(state, "x", "test", device, Instant::now()).unwrap()
        }
        other => panic!("{other:?}"),
    };
    server.run_until(&channel).unwrap();
    // The client must not see the end of this process.
    server.give_up();
}
