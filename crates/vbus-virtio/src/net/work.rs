// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the parts of a session share, and what the driver's commands change there.

use std::sync::{Arc, Mutex};
use std::task::Poll;

use serde::{Deserialize, Serialize};
use vbus_core::{ErrorCode, TaskHandle, lock};
use vbus_net::front::{Choices, Pairs, Receiver, ReceiverState, Setting};
use vbus_net::{Done, Offloads, Rss};

use super::card::VirtioNic;
use super::command::{Coalesce, Command, Wanted, WantedState, Which};
use super::ring::{RxFrames, TxFrames};
use crate::device::{Driver, Record};

/// What the session and the task of its control queue share.
pub struct Work {
    pub nic: Arc<VirtioNic>,
    pub driver: Driver,
    pub receiver: Arc<Receiver>,
    pub pairs: Pairs<TxFrames, RxFrames>,
    pub coalescing: Mutex<Coalescing>,
    /// Which frames the driver wants. A reset of the control queue does not change it.
    pub wanted: Mutex<Wanted>,
    /// The setting-up of the back end that is under way. A reset of the control queue does not end
    /// it.
    setting_up: Mutex<Option<Arc<Mutex<SettingUp>>>>,
    /// What gets the driver's choices, if somebody keeps them.
    record: Mutex<Option<Record>>,
}

/// What the driver has chosen by commands: these fields of a session's state.
#[derive(Serialize)]
struct ByCommands<'a> {
    receiver: &'a ReceiverState,
    wanted: &'a WantedState,
    coalescing: &'a CoalescingState,
}

/// A setting-up of the back end, for a command of the control queue.
#[derive(Default)]
struct SettingUp {
    result: Option<Result<(), ErrorCode>>,
    /// The task to wake at the end.
    task: Option<TaskHandle>,
}

/// How the interrupts of the pairs' queues are held back.
pub struct Coalescing {
    /// The setting of each queue. `None`: the queue is not enabled.
    queues: Vec<Option<Arc<Setting>>>,
    /// What a queue gets that the driver enables: receive queues, transmit queues.
    of_new: [Coalesce; 2],
}

impl Coalescing {
    /// No queue is enabled. None of `pairs` pairs will hold its interrupts back.
    pub fn new(pairs: u16) -> Coalescing {
        let queues = (0..pairs * 2).map(|_| None).collect();
        Coalescing { queues, of_new: Default::default() }
    }

    /// The settings as plain data.
    pub fn save(&self) -> CoalescingState {
        let of = |setting: &Option<Arc<Setting>>| setting.as_ref().map(|setting| setting.get());
        let pair = |coalesce: Coalesce| (coalesce.usecs, coalesce.frames);
        let [rx, tx] = self.of_new.map(pair);
        CoalescingState { rx, tx, queues: self.queues.iter().map(of).collect() }
    }

    /// Goes on from what [`save`](Self::save) returned, with the same queues enabled. If the
    /// process that had them was killed, some may have come or gone since.
    ///
    /// # Errors
    /// They are others.
    pub fn restore(&mut self, saved: &CoalescingState, was_killed: bool) -> Result<(), String> {
        let CoalescingState { rx, tx, queues } = saved;
        let mut both = self.queues.iter().zip(queues);
        let same = was_killed || both.all(|(a, b)| a.is_some() == b.is_some());
        if self.queues.len() != queues.len() || !same {
            return Err("coalescing is of other queues than those that are enabled".into());
        }
        self.of_new = [*rx, *tx].map(|(usecs, frames)| Coalesce { frames, usecs });
        for (setting, saved) in self.queues.iter().zip(queues) {
            if let (Some(setting), Some((usecs, frames))) = (setting, saved) {
                setting.set(*usecs, *frames);
            }
        }
        Ok(())
    }

    /// The driver has enabled queue `number`. Returns its setting. `None`: no pair has it.
    fn enable(&mut self, number: u16) -> Option<Arc<Setting>> {
        let slot = self.queues.get_mut(usize::from(number))?;
        let setting = Arc::new(Setting::default());
        let Coalesce { frames, usecs } = self.of_new[usize::from(number % 2)];
        setting.set(usecs, frames);
        *slot = Some(setting.clone());
        Some(setting)
    }

    /// The setting of queue `number`, if it is enabled.
    fn of(&self, number: u16) -> Option<&Arc<Setting>> {
        self.queues.get(usize::from(number))?.as_ref()
    }

    /// Returns false if there is no such queue.
    fn set(&mut self, which: Which, coalesce: Coalesce) -> bool {
        let Coalesce { frames, usecs } = coalesce;
        let direction = match which {
            Which::Rx => 0,
            Which::Tx => 1,
            Which::Queue(number) => {
                return self.of(number).map(|setting| setting.set(usecs, frames)).is_some();
            }
        };
        self.of_new[direction] = coalesce;
        for setting in self.queues.iter().skip(direction).step_by(2).flatten() {
            setting.set(usecs, frames);
        }
        true
    }
}

/// How interrupts are held back, as plain data (spec/state-format.md, "virtio-net"): microseconds
/// and frames each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoalescingState {
    /// Of queues that the driver enables: receive queues, transmit queues.
    rx: (u32, u32),
    tx: (u32, u32),
    /// Of each queue; `None`: it is not enabled.
    queues: Vec<Option<(u32, u32)>>,
}

impl Work {
    /// The state of a session that begins.
    pub fn new(
        (nic, driver): (Arc<VirtioNic>, Driver),
        receiver: Arc<Receiver>,
        pairs: Pairs<TxFrames, RxFrames>,
        wanted: Wanted,
    ) -> Work {
        let coalescing = Mutex::new(Coalescing::new(nic.nic().config.queue_pairs));
        let (wanted, setting_up) = (Mutex::new(wanted), Mutex::default());
        let record = Mutex::default();
        Work { nic, driver, receiver, pairs, coalescing, wanted, setting_up, record }
    }

    /// From now on `record` gets the driver's choices.
    pub fn record_with(&self, record: Record) {
        *lock(&self.record) = Some(record);
        self.chosen();
    }

    /// The driver has chosen something, and has no answer yet.
    pub fn chosen(&self) {
        let record = lock(&self.record);
        let Some(record) = &*record else { return };
        let choices = ByCommands {
            receiver: &self.receiver.save(),
            wanted: &lock(&self.wanted).save(),
            coalescing: &lock(&self.coalescing).save(),
        };
        match serde_json::to_value(&choices) {
            Ok(choices) => record(&choices),
            Err(error) => tracing::error!(%error, "the choices of a driver are no text"),
        }
    }

    /// Lets the back end set itself up, by `begin`, for what a command has changed since `before`.
    /// Wakes `task` at the end.
    ///
    /// # Errors
    /// The back end cannot begin. Nothing has changed.
    pub fn set_up(
        &self,
        before: Choices,
        task: &TaskHandle,
        begin: impl FnOnce(Choices, Done) -> Result<(), ErrorCode>,
    ) -> Result<(), ErrorCode> {
        let begun = SettingUp { result: None, task: Some(task.clone()) };
        let begun = Arc::new(Mutex::new(begun));
        *lock(&self.setting_up) = Some(begun.clone());
        let done = move |result| {
            let mut setting_up = lock(&begun);
            setting_up.result = Some(result);
            setting_up.task.iter().for_each(TaskHandle::wake);
        };
        begin(before, Box::new(done)).inspect_err(|_| *lock(&self.setting_up) = None)
    }

    /// The result of the setting-up, once, when it has ended. `Pending`: it goes on. `None`: there
    /// is none.
    pub fn take_set_up(&self) -> Poll<Option<Result<(), ErrorCode>>> {
        let mut setting_up = lock(&self.setting_up);
        let Some(begun) = &*setting_up else { return Poll::Ready(None) };
        let Some(result) = lock(begun).result else { return Poll::Pending };
        *setting_up = None;
        Poll::Ready(Some(result))
    }

    /// Whether a setting-up is under way, or its result was not taken.
    pub fn is_setting_up(&self) -> bool {
        lock(&self.setting_up).is_some()
    }

    /// Wakes `task` at the end of a setting-up that is under way, in place of a former task.
    pub fn wake_when_set_up(&self, task: &TaskHandle) {
        if let Some(begun) = &*lock(&self.setting_up) {
            lock(begun).task = Some(task.clone());
        }
    }

    /// The most queue pairs.
    pub fn queue_pairs(&self) -> u16 {
        self.nic.nic().config.queue_pairs
    }

    /// Changes the offloads that the driver accepts. No frame is delivered by the old ones after
    /// this.
    pub fn set_offloads(&self, offloads: Offloads) {
        self.receiver.set_offloads(offloads);
        self.pairs.settle();
    }

    /// Uses the first `queues` pairs. A frame's flow chooses its receive queue from now on. Returns
    /// false, and changes nothing, if there are not so many.
    pub fn set_queues(&self, queues: u16) -> bool {
        let (_, rss) = self.receiver.steering.state();
        self.steer(queues, rss.map(Rss::without_table))
    }

    /// Chooses receive queues by a hash, and uses as many pairs as the hash and `tx` need. Returns
    /// false, and changes nothing, if there are not so many.
    pub fn set_scale(&self, rss: Option<Rss>, tx: u16) -> bool {
        let highest = rss.as_ref().and_then(Rss::highest_queue);
        // A table may name queue 65535. No device has that many.
        let queues = tx.max(highest.map_or(0, |highest| highest.saturating_add(1)));
        self.steer(queues, rss)
    }

    fn steer(&self, queues: u16, rss: Option<Rss>) -> bool {
        if queues > self.queue_pairs() || !self.receiver.steering.replace(queues, rss) {
            return false;
        }
        self.pairs.queues_changed();
        true
    }

    /// Changes which frames the driver gets. Returns false if the command says nothing of that.
    pub fn filter(&self, command: &Command) -> bool {
        let mut wanted = lock(&self.wanted);
        let changed = wanted.change(command);
        if changed {
            self.receiver.filter.set_addresses(wanted.addresses());
            self.receiver.filter.set_vlans(wanted.vlans());
            self.pairs.plug().filter_changed();
        }
        changed
    }

    /// The driver has enabled queue `number`. Returns how its interrupts are held back. `None`: no
    /// pair has it.
    pub fn coalesce_new(&self, number: u16) -> Option<Arc<Setting>> {
        lock(&self.coalescing).enable(number)
    }

    /// Queue `number` is not enabled any more.
    pub fn forget_coalesce(&self, number: u16) {
        if let Some(slot) = lock(&self.coalescing).queues.get_mut(usize::from(number)) {
            *slot = None;
        }
    }

    /// Holds the interrupts of queues back from now on. Returns false if there is no such queue.
    pub fn set_coalesce(&self, which: Which, coalesce: Coalesce) -> bool {
        let found = lock(&self.coalescing).set(which, coalesce);
        // An interrupt that is held back may go now.
        self.pairs.tasks().for_each(TaskHandle::wake);
        found
    }

    /// How the interrupts of queue `number` are held back. `None`: no pair has it, or it is not
    /// enabled.
    pub fn coalesce_of(&self, number: u16) -> Option<Coalesce> {
        let (usecs, frames) = lock(&self.coalescing).of(number)?.get();
        Some(Coalesce { frames, usecs })
    }
}
