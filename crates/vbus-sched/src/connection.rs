// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver's use of a `sched` device.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::shm::abi::sched as abi;
use vbus_core::shm::signal::Armed;
use vbus_core::{Connection, ErrorCode, Open, Progress, Region, Task, TaskHandle, lock, state};

use crate::cpu::{Cpu, CpuState};
use crate::cpus::{Cpus, CpusState};

/// A connection. Its task follows the request pages.
pub struct SchedConnection {
    device: Arc<Cpus>,
    task: TaskHandle,
}

impl SchedConnection {
    pub fn new(device: Arc<Cpus>, open: &Open) -> SchedConnection {
        device.begin();
        let fail = open.fail.clone();
        let follow = |task: &TaskHandle| {
            let follow = Follow { device: device.clone(), task: task.clone(), deadline: None };
            Ok::<_, Infallible>(Box::new(follow) as Box<dyn Task>)
        };
        let counters = open.counters.clone();
        let spawned =
            open.executor.spawn_with(open.worker, counters, move |error| fail.fail(error), follow);
        let Ok(task) = spawned;
        SchedConnection { device, task }
    }

    /// The connection of a driver that had these regions with a device that this one goes on for.
    pub fn again(
        device: Arc<Cpus>,
        open: &Open,
        regions: Vec<Region>,
        saved: &Value,
    ) -> Result<SchedConnection, String> {
        let Saved { cpus } = state::read_part(saved)?;
        let connection = SchedConnection::new(device, open);
        for region in regions {
            let shown = connection.show_again(&region);
            shown.map_err(|error| format!("region id {}: {error}", region.id))?;
        }
        connection.device.restore(&cpus)?;
        Ok(connection)
    }

    fn show_again(&self, region: &Region) -> Result<(), ErrorCode> {
        let (cpu, is_report) = self.page(region.id)?;
        {
            let mut state = lock(&self.device.state);
            let cpu = state.cpus.get_mut(cpu).ok_or(ErrorCode::BAD_ARGUMENT)?;
            if is_report {
                return cpu.show_reports_again(region);
            }
            cpu.show_requests(region)?;
        }
        region.doorbell.bind(&self.task)
    }

    /// The page that region `id` holds: the number of the virtual CPU, and whether the page is the
    /// report page.
    fn page(&self, id: u32) -> Result<(usize, bool), ErrorCode> {
        let cpu = id / 2;
        if cpu >= self.device.config.cpus {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        Ok((cpu as usize, id == abi::report_page(cpu)))
    }
}

/// A connection as plain data (spec/state-format.md, "sched").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    /// All virtual CPUs of the device, by number.
    cpus: Vec<CpuState>,
}

impl Connection for SchedConnection {
    fn check_region(&mut self, id: u32, _: u64) -> Result<(), ErrorCode> {
        self.page(id).map(drop)
    }

    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        let (cpu, is_report) = self.page(region.id)?;
        let mut state = lock(&self.device.state);
        let cpu = state.cpus.get_mut(cpu).ok_or(ErrorCode::BAD_ARGUMENT)?;
        if is_report {
            return cpu.show_reports(&region);
        }
        cpu.show_requests(&region)?;
        drop(state);
        region.doorbell.bind(&self.task).inspect_err(|_| {
            let _ = self.region_dropped(region.handle);
        })
    }

    fn save(&mut self) -> Result<Value, String> {
        state::part(&Saved { cpus: self.device.save() })
    }

    fn region_dropped(&mut self, handle: u32) -> Result<(), ErrorCode> {
        lock(&self.device.state).cpus.iter_mut().for_each(|cpu| cpu.hide(handle));
        Ok(())
    }
}

impl Drop for SchedConnection {
    fn drop(&mut self) {
        self.task.stop();
        self.device.end();
    }
}

/// The task that follows the request pages.
struct Follow {
    device: Arc<Cpus>,
    /// The task's own handle. The VMM's answer wakes the task.
    task: TaskHandle,
    deadline: Option<Instant>,
}

impl Task for Follow {
    fn work(&self) -> String {
        "request pages".into()
    }

    fn poll(&mut self, _budget: u32) -> Result<Progress, ErrorCode> {
        let (now, mut busy) = (Instant::now(), false);
        let mut state = lock(&self.device.state);
        let CpusState { cpus, lookup } = &mut *state;
        self.deadline = None;
        let mut not_after = |at: Instant| {
            self.deadline = Some(self.deadline.map_or(at, |deadline| deadline.min(at)))
        };
        for cpu in cpus.iter_mut() {
            let step = cpu.step(now, &self.device.config.policy);
            busy |= step.busy;
            step.deadline.into_iter().for_each(&mut not_after);
        }
        // The task asks the VMM only when a thread is wanted.
        if let Some(lookup) = lookup {
            if lookup.is_talking() || cpus.iter().any(Cpu::wants_thread) {
                let wanted = |cpu: u32| cpus.get(cpu as usize).is_some_and(Cpu::wants_thread);
                let found = lookup.poll(now, &self.task, &wanted);
                busy |= !found.is_empty();
                for (cpu, thread) in found {
                    if let Some(cpu) = cpus.get_mut(cpu as usize) {
                        cpu.give_thread(thread);
                    }
                }
                lookup.deadline().into_iter().for_each(&mut not_after);
            }
        }
        Ok(if busy { Progress::Busy } else { Progress::Idle })
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        // Arm every page, even after one has missed: the task may sleep nevertheless.
        let missed = lock(&self.device.state)
            .cpus
            .iter_mut()
            .map(Cpu::arm)
            .filter(|armed| *armed == Armed::Missed)
            .count();
        Ok(if missed == 0 { Armed::Waiting } else { Armed::Missed })
    }

    fn disarm(&mut self) {
        lock(&self.device.state).cpus.iter_mut().for_each(Cpu::disarm);
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }
}
