// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control queue: its task carries out the driver's commands, one after another.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::task::Poll;

use vbus_core::memory::View;
use vbus_core::shm::signal::Armed;
use vbus_core::{ErrorCode, Progress, Task, TaskHandle, lock};
use vbus_net::front::Choices;
use vbus_net::is_group;

use super::abi::{command as number, feature};
use super::command::{BYTES_MAX, Command, Which, parse};
use super::offloads;
use super::queues::Queues;
use super::ring::code;
use super::work::Work;
use crate::device::{Again, Call, Enabled};
use crate::queue::{Chain, Position, Queue, State, Unsettled};

/// The control queue of a session.
pub struct Control {
    queues: Arc<Queues>,
    work: Arc<Work>,
    queue: Queue,
    call: Call,
    chain: Chain,
    /// Chains that another end has taken and not answered.
    taken: VecDeque<Chain>,
    /// The back end is at work for the command in `chain`.
    waits: bool,
    /// The task of this queue.
    task: TaskHandle,
}

/// What is known of a command.
enum Answer {
    /// Its result, and more bytes for the driver.
    Now(bool, Vec<u8>),
    /// The back end will tell.
    Later,
}

impl Control {
    /// The control queue of `enabled`. `taken` are chains that another end has taken and not
    /// answered: those commands are carried out again. `task` serves it.
    pub fn new(
        queues: Arc<Queues>,
        enabled: Enabled,
        taken: Vec<Chain>,
        task: TaskHandle,
    ) -> Control {
        let Enabled { queue, call, .. } = enabled;
        let work = queues.work().clone();
        work.wake_when_set_up(&task);
        let (chain, taken) = (Chain::new(), taken.into());
        Control { queues, work, queue, call, chain, taken, waits: false, task }
    }

    /// How far the queue is. A command that is in work is one that was not answered.
    ///
    /// # Errors
    /// The driver broke the protocol.
    pub fn state(&self) -> Result<State, ErrorCode> {
        let held = self.waits.then_some(&self.chain).into_iter().chain(&self.taken);
        self.queue.state(held).map_err(|unsettled| match unsettled {
            Unsettled::Retired(violation) => code(violation),
            _ => ErrorCode::FAILED,
        })
    }

    /// Replaces the queue by one that `again` makes. A command that is in work comes again.
    ///
    /// # Errors
    /// The driver broke the protocol, or there is no such queue.
    pub fn retake(&mut self, index: u16, again: &mut Again<'_>) -> Result<(), ErrorCode> {
        if let Some(violation) = self.queue.retired() {
            return Err(code(violation));
        }
        let Position { used, used_wrap, .. } = self.queue.position();
        let position = Position { available: used, available_wrap: used_wrap, used, used_wrap };
        self.queue = again(index, *self.queue.layout(), position)?;
        (self.chain, self.waits) = (Chain::new(), false);
        self.taken.clear();
        Ok(())
    }

    /// Carries out the commands that are there, `budget` at most. Returns how many. None begins
    /// while the back end is at work for a former one, also of before a reset of the queue.
    fn serve(&mut self, budget: u32) -> Result<u32, ErrorCode> {
        let memory = self.work.driver.memory.clone();
        let view = memory.view();
        let mut served = 0;
        while served < budget {
            let answer = match self.work.take_set_up() {
                Poll::Pending => break,
                Poll::Ready(Some(result)) if std::mem::take(&mut self.waits) => {
                    Answer::Now(result.is_ok(), Vec::new())
                }
                Poll::Ready(_) => {
                    if let Some(chain) = self.taken.pop_front() {
                        self.chain = chain;
                    } else {
                        let taken =
                            self.queue.turn(&view).and_then(|mut turn| turn.next(&mut self.chain));
                        if !taken.map_err(code)? {
                            break;
                        }
                    }
                    let bytes = read(&self.chain, &view)?;
                    self.carry_out(bytes.as_deref().and_then(parse))
                }
            };
            if let Answer::Now(ok, more) = answer {
                self.work.chosen();
                self.answer(&view, ok, &more)?;
                served += 1;
            }
        }
        Ok(served)
    }

    /// Tells the driver the result of the command in `chain`.
    fn answer(&mut self, view: &View<'_>, ok: bool, more: &[u8]) -> Result<(), ErrorCode> {
        let ack = if ok { number::OK } else { number::ERROR };
        // The last byte is the acknowledgement; before it is room for an answer.
        let room = self.chain.writable_bytes() as usize;
        let more = if room == more.len() + 1 { more } else { &[] };
        let mut left = &[more, &[ack]].concat()[..];
        let mut written = 0;
        for part in self.chain.writable() {
            let n = left.len().min(part.len as usize);
            view.write(part.addr, &left[..n])?;
            left = &left[n..];
            written += u32::try_from(n).unwrap_or(0);
        }
        let mut turn = self.queue.turn(view).map_err(code)?;
        turn.complete(&mut self.chain, written);
        self.call.notify(turn.flush().is_wanted());
        Ok(())
    }

    fn has(&self, feature: u64) -> bool {
        self.work.driver.features & feature == feature
    }

    fn carry_out(&mut self, command: Option<Command>) -> Answer {
        let Some(command) = command else { return Answer::Now(false, Vec::new()) };
        let ok = match command {
            Command::Mode(mode, _) => {
                let done = self.has(mode.feature()) && self.work.filter(&command);
                return self.filtered(done);
            }
            Command::Table(..) => {
                let done = self.has(feature::CTRL_RX) && self.work.filter(&command);
                return self.filtered(done);
            }
            Command::Vlan(..) => self.has(feature::CTRL_VLAN) && self.work.filter(&command),
            Command::Address(mac) => {
                let done = self.has(feature::CTRL_MAC_ADDR)
                    && !is_group(mac)
                    && mac != <[u8; 6]>::default()
                    && self.work.pairs.plug().set_mac(mac);
                return self.filtered(done);
            }
            Command::Announced => {
                let may = self.has(feature::GUEST_ANNOUNCE);
                if may {
                    self.work.nic.announced();
                }
                may
            }
            Command::Pairs(queues) => {
                let before = self.work.receiver.choices();
                if !self.has(feature::MQ) || !self.work.set_queues(queues) {
                    return Answer::Now(false, Vec::new());
                }
                return self.configure(before);
            }
            Command::Scale(rss, tx) => {
                let before = self.work.receiver.choices();
                if !self.has(feature::RSS) || !self.work.set_scale(rss, tx) {
                    return Answer::Now(false, Vec::new());
                }
                return self.configure(before);
            }
            Command::Hash(rss) => {
                self.has(feature::HASH_REPORT) && self.work.receiver.steering.set_rss(rss)
            }
            Command::Offloads(bits) => {
                let may = self.work.driver.features & offloads::GUEST;
                if !self.has(feature::CTRL_GUEST_OFFLOADS) || bits & !may != 0 {
                    return Answer::Now(false, Vec::new());
                }
                let before = self.work.receiver.choices();
                self.work.set_offloads(offloads::to_driver(bits));
                return self.configure(before);
            }
            Command::Coalesce(which, coalesce) => {
                let feature = match which {
                    Which::Queue(_) => feature::VQ_NOTF_COAL,
                    _ => feature::NOTF_COAL,
                };
                self.has(feature) && self.work.set_coalesce(which, coalesce)
            }
            Command::CoalesceOf(queue) => {
                let coalesce = self.work.coalesce_of(queue);
                let Some(coalesce) = coalesce.filter(|_| self.has(feature::VQ_NOTF_COAL)) else {
                    return Answer::Now(false, Vec::new());
                };
                let longs = [coalesce.frames.to_le_bytes(), coalesce.usecs.to_le_bytes()];
                return Answer::Now(true, longs.concat());
            }
        };
        Answer::Now(ok, Vec::new())
    }
}

impl Control {
    /// A command about the frames that the driver gets was carried out, if `done`. The back end
    /// sets itself up for it if the kernel chooses the frames.
    fn filtered(&mut self, done: bool) -> Answer {
        match done && self.queues.are_in_kernel() {
            true => self.configure(self.work.receiver.choices()),
            false => Answer::Now(done, Vec::new()),
        }
    }

    /// Lets the back end set itself up for what a command has changed. `before`: what it was.
    fn configure(&mut self, before: Choices) -> Answer {
        let queues = self.queues.clone();
        let begin = move |before, done| queues.configure(before, done);
        if self.work.set_up(before, &self.task, begin).is_err() {
            return Answer::Now(false, Vec::new());
        }
        self.waits = true;
        Answer::Later
    }
}

/// A copy of a command. `None`: it is too long.
fn read(chain: &Chain, view: &View<'_>) -> Result<Option<Vec<u8>>, ErrorCode> {
    let len = chain.readable_bytes() as usize;
    if len > BYTES_MAX {
        return Ok(None);
    }
    let mut bytes = vec![0; len];
    let mut rest = &mut bytes[..];
    for part in chain.readable() {
        let (of_part, after) = rest.split_at_mut(part.len as usize);
        view.read(part.addr, of_part)?;
        rest = after;
    }
    Ok(Some(bytes))
}

/// The task of a control queue.
pub struct ControlTask(pub Arc<Mutex<Control>>);

impl Task for ControlTask {
    fn work(&self) -> String {
        "the control queue".into()
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let served = lock(&self.0).serve(budget)?;
        Ok(if served > 0 { Progress::Busy } else { Progress::Idle })
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        let control = &mut *lock(&self.0);
        if control.work.is_setting_up() {
            return Ok(Armed::Waiting); // The back end wakes the task.
        }
        if !control.taken.is_empty() {
            return Ok(Armed::Missed);
        }
        let memory = control.work.driver.memory.clone();
        let view = memory.view();
        control.queue.turn(&view).map(|mut turn| turn.arm()).map_err(code)
    }
}
