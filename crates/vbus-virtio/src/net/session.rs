// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A network card at work for one driver.

use std::convert::Infallible;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, Weak};

use vbus_core::{ErrorCode, Task, TaskHandle};
use vbus_net::front::{Pairs, Receiver, Setup};
use vbus_net::{Filter, Steering};

use super::abi::{config, feature};
use super::card::VirtioNic;
use super::command::Wanted;
use super::control::{Control, ControlTask};
use super::offloads;
use super::ring::{RxFrames, TxFrames};
use super::work::{Coalescing, Work};
use crate::device::{Driver, Enabled, Kind, Session, Transport, VirtioDevice, feature as common};

impl VirtioDevice for VirtioNic {
    fn kind(&self) -> Kind {
        VirtioNic::kind(self)
    }

    fn config_bytes(&self) -> usize {
        config::BYTES
    }

    fn attach(&self, transport: Weak<dyn Transport>) {
        VirtioNic::attach(self, transport);
    }

    fn start(self: Arc<Self>, driver: Driver) -> Result<Box<dyn Session>, ErrorCode> {
        Ok(Box::new(NicSession::start(self, driver)?))
    }
}

/// A session. It has the rings of the queues that the driver has enabled.
pub struct NicSession {
    work: Arc<Work>,
    control: Option<TaskHandle>,
}

impl NicSession {
    /// Plugs the driver in.
    pub fn start(card: Arc<VirtioNic>, driver: Driver) -> Result<NicSession, ErrorCode> {
        let (features, nic) = (driver.features, card.nic());
        let wanted = Wanted::new(features & feature::CTRL_VLAN != 0);
        let filter = Arc::new(Filter::new(nic.config.mac));
        filter.set_addresses(wanted.addresses());
        filter.set_vlans(wanted.vlans());
        let receiver = Arc::new(Receiver {
            mtu: usize::from(nic.config.mtu),
            filter,
            offloads: AtomicU64::new(offloads::to_driver(features).bits()),
            steering: Arc::new(Steering::new(1)),
            hash: features & feature::HASH_REPORT != 0,
            backpressure: nic.config.backpressure,
            moved: Box::new(|| {}),
        });
        let pairs = Pairs::start(&Setup {
            nic,
            receiver: &receiver,
            by_hash: features & feature::RSS != 0,
            tx_offloads: offloads::from_driver(features),
            memory: &driver.memory,
            place: (&driver.executor, driver.worker, &driver.counters),
            fail: driver.fail.clone(),
        })?;
        let coalescing = Mutex::new(Coalescing::new(nic.config.queue_pairs));
        let wanted = Mutex::new(wanted);
        let work = Arc::new(Work { nic: card, driver, receiver, pairs, coalescing, wanted });
        let fail = work.driver.fail.clone();
        // The rings come next. The back end may take longer to set itself up.
        work.configure(Box::new(move |done| {
            if let Err(code) = done {
                fail(code);
            }
        }))?;
        Ok(NicSession { work, control: None })
    }

    /// The number of the control queue, if the driver uses it.
    fn control_queue(&self) -> Option<u16> {
        let features = self.work.driver.features;
        let several = features & (feature::MQ | feature::RSS) != 0;
        let pairs = if several { self.work.queue_pairs() } else { 1 };
        (features & feature::CTRL_VQ != 0).then_some(pairs * 2)
    }
}

impl Session for NicSession {
    fn enable(&mut self, index: u16, enabled: Enabled) -> Result<(), ErrorCode> {
        let work = &self.work;
        let features = work.driver.features;
        let doorbell = enabled.doorbell.clone();
        if self.control_queue() == Some(index) {
            let fail = work.driver.fail.clone();
            let made = work.driver.executor.spawn_with(
                work.driver.worker,
                work.driver.counters.clone(),
                move |code| fail(code),
                |task| {
                    let control = Control::new(work.clone(), enabled, task.clone());
                    Ok::<_, Infallible>(Box::new(ControlTask(control)) as Box<dyn Task>)
                },
            );
            let Ok(task) = made;
            let bound = doorbell.bind(&task);
            self.control = Some(task);
            return bound;
        }
        let pair = usize::from(index / 2);
        let Some(task) = work.pairs.task(pair) else { return Ok(()) };
        let Some(coalesce) = work.coalesce_new(index) else { return Ok(()) };
        let memory = work.driver.memory.clone();
        let header_bytes = work.receiver.header_bytes();
        if index % 2 == 0 {
            let mergeable = features & feature::MRG_RXBUF != 0;
            let indirect = features & common::INDIRECT_DESC != 0;
            let ring = RxFrames::new(enabled, memory, header_bytes, (mergeable, indirect));
            work.pairs.set_rx(pair, Some((ring, coalesce)));
        } else {
            let ring = TxFrames::new(enabled, memory);
            work.pairs.set_tx(pair, Some((ring, header_bytes, coalesce)));
        }
        doorbell.bind(task)
    }

    fn disable(&mut self, index: u16) {
        if self.control_queue() == Some(index) {
            if let Some(task) = self.control.take() {
                task.stop();
            }
            return;
        }
        let pair = usize::from(index / 2);
        match index % 2 {
            0 => self.work.pairs.set_rx(pair, None),
            _ => self.work.pairs.set_tx(pair, None),
        }
        self.work.forget_coalesce(index);
    }
}

impl Drop for NicSession {
    fn drop(&mut self) {
        // The control task first: it may change the pairs.
        if let Some(task) = self.control.take() {
            task.stop();
        }
        self.work.pairs.stop();
    }
}
