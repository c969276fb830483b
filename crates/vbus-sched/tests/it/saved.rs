// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that are saved, and go on in fresh ones.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;
use serde_json::{Value, json};
use vbus_core::shm::abi::sched::{self as abi, report};
use vbus_core::{Bus, DeviceState};
use vbus_sched::interview::Language;
use vbus_sched::{Held, Limits, SchedClass, Setting, TakeError, Threads};
use vbus_test_driver::Random;
use vbus_test_driver::saved::{
    World, content, forged_devices, same_when_saved, save, save_to_outlast, still,
};

use crate::sched::{Driver, Pages, Report, read};

/// Virtual CPUs.
const CPUS: usize = 2;

/// Threads that are only here: class and priority of each that has not its own class.
#[derive(Clone, Default)]
struct Invented(Arc<Mutex<BTreeMap<i32, (u32, i32)>>>);

struct Thread(Invented, i32);

impl Threads for Invented {
    fn check(&self, _: &Limits) -> Result<(), String> {
        Ok(())
    }

    fn ask_vmm(&self, _: &Path, _: Language) -> std::io::Result<(OwnedFd, i32)> {
        Err(Error::from(ErrorKind::Unsupported))
    }

    fn take(&self, _: Option<i32>, tid: i32) -> Result<Box<dyn Held>, TakeError> {
        Ok(Box::new(Thread(self.clone(), tid)))
    }

    fn is_privileged(&self) -> bool {
        true
    }

    fn tells_time(&self) -> bool {
        true
    }
}

impl Held for Thread {
    fn time(&self) -> Duration {
        Duration::ZERO
    }

    fn own_nice(&mut self) -> Result<i32, Errno> {
        Ok(0)
    }

    fn apply(&mut self, setting: Setting) -> Result<(), Errno> {
        // The kernel refuses one of them.
        if setting.class == abi::CLASS_RR && setting.priority == 1 {
            return Err(Errno::PERM);
        }
        self.0.0.lock().unwrap().insert(self.1, (setting.class, setting.priority));
        Ok(())
    }

    fn restore(&mut self) -> Result<bool, Errno> {
        Ok(self.0.0.lock().unwrap().remove(&self.1).is_some())
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        let _ = self.restore();
    }
}

/// Nothing ends within a test, and no request waits for the rate.
fn settings() -> Value {
    json!({
        "threads": [1, 2], "boost-ms": 60_000, "changes": 100_000, "boost-share": 100,
        "allow": ["normal", "fifo", "rr"], "priority-max": 30, "nice-min": -5,
    })
}

fn bus(threads: &Invented) -> Bus {
    let class = SchedClass::through(Arc::new(threads.clone()));
    vbus_test_driver::bus(1, vec![Box::new(class)])
}

/// A driver of two virtual CPUs.
struct Machine {
    bus: Bus,
    threads: Invented,
    driver: Driver,
    pages: [Option<Pages>; CPUS],
    /// Whether the device may not have read the newest request.
    is_asked: [bool; CPUS],
    random: Random,
    seen: Vec<String>,
    /// What a keeper has of the device. `None`: there is none, and it is saved when it goes.
    kept: Option<DeviceState>,
}

impl Machine {
    fn new(seed: u64) -> Machine {
        let threads = Invented::default();
        let bus = bus(&threads);
        let mut driver = Driver::open(&bus.create("sched", "sched", &settings()).unwrap());
        let pages = [0, 1].map(|cpu| Some(driver.pages(cpu)));
        let (is_asked, random, seen) = ([false; CPUS], Random(seed), Vec::new());
        Machine { bus, threads, driver, pages, is_asked, random, seen, kept: None }
    }

    /// As [`new`](Self::new), of a device that has a keeper.
    fn kept(seed: u64) -> Machine {
        let mut machine = Machine::new(seed);
        machine.kept = Some(save_to_outlast(&machine.driver.endpoint));
        machine
    }

    /// Gives the keeper the state, as after a message, if there is one.
    fn commit(&mut self) {
        self.kept = self.kept.take().map(|_| save_to_outlast(&self.driver.endpoint));
    }

    /// Waits for the report of the newest request, and notes it. The count of changes depends on
    /// whether the device was saved: the thread had its own class meanwhile. If the kernel refused
    /// the request, that stays its class, and the driver asks for no class.
    fn look(&mut self, cpu: usize) {
        let Some(pages) = &mut self.pages[cpu] else { return };
        self.is_asked[cpu] = false;
        loop {
            let version = pages.requests.version();
            let is_newest = |report: &Report| report.version == version;
            let mut report = self.driver.wait(pages, "the report of a request", is_newest);
            report.changes = 0;
            if self.kept.is_some() {
                // What was counted since the last message is lost.
                report = Report { updates: 0, clamped: 0, refused: 0, ..report };
            }
            let failed = report.outcome == report::FAILED;
            if failed {
                (report.class, report.priority) = (0, 0);
                self.driver.post(pages, abi::CLASS_NONE, 0);
            }
            self.seen.push(format!("{cpu}: {report:?}"));
            if !failed {
                return;
            }
        }
    }

    /// Waits until the threads have the classes that the reports say.
    fn check(&mut self) {
        for (cpu, pages) in self.pages.iter_mut().enumerate() {
            let Some(pages) = pages else { continue };
            let tid = 1 + cpu as i32;
            let (threads, reports) = (&self.threads, &pages.reports);
            self.driver.interrupts.wait("the class of a thread", || {
                let (report, _) = read(reports);
                let has = threads.0.lock().unwrap().get(&tid).copied();
                let is = (report.class, report.priority) == has.unwrap_or_default();
                // A report of a device that went on may come later.
                is.then_some(())
            });
        }
    }
}

impl World for Machine {
    fn step(&mut self) {
        let n = self.random.next();
        let cpu = n as usize % CPUS;
        match self.random.below(10) {
            0..=6 => {
                // One request at a time: the device may leave out what it did not read in time.
                if self.is_asked[cpu] {
                    self.look(cpu);
                }
                let class = self.random.below(7) as u32;
                let priority = self.random.below(40) as i32 - 6;
                if let Some(pages) = &mut self.pages[cpu] {
                    self.driver.post(pages, class, priority);
                    self.is_asked[cpu] = true;
                }
            }
            7 => self.look(cpu),
            8 => {
                self.look(cpu);
                match self.pages[cpu].take() {
                    Some(pages) => pages.handles.into_iter().for_each(|handle| {
                        self.driver.endpoint.region_drop(handle.into()).unwrap();
                    }),
                    None => self.pages[cpu] = Some(self.driver.pages(cpu as u32)),
                }
                self.commit();
            }
            _ if n % 8 == 0 => {
                (0..CPUS).for_each(|cpu| self.look(cpu));
                self.driver.endpoint.close();
                vbus_test_driver::open(&self.driver.endpoint, &self.driver.memory, 0).unwrap();
                self.pages = [0, 1].map(|cpu| Some(self.driver.pages(cpu)));
                self.commit();
            }
            _ => self.check(),
        }
    }

    fn renew(&mut self) {
        let old = self.driver.endpoint.clone();
        let state = save(&old);
        let next = bus(&self.threads);
        let fresh = next.create_quiesced("sched", "sched", &settings()).unwrap();
        fresh.set_interrupt_sink(self.driver.interrupts.clone());
        self.driver.memory.share(&fresh);
        match &self.kept {
            Some(kept) => fresh.restore(kept).unwrap(),
            None => {
                fresh.restore(&state).unwrap();
                assert_eq!(unmoving(&save(&fresh)), unmoving(&state), "as it was restored");
            }
        }
        // The former device has the threads until it is gone.
        (self.driver.endpoint, self.bus) = (fresh, next);
        drop(old);
        self.driver.endpoint.resume();
        self.commit();
    }

    fn save_in_vain(&mut self, _: u64) {
        save(&self.driver.endpoint);
        self.driver.endpoint.resume();
    }

    fn end(mut self) -> Vec<Vec<u8>> {
        (0..CPUS).for_each(|cpu| self.look(cpu));
        self.check();
        assert_eq!(self.bus.devices().len(), 1);
        self.seen.push(format!("{:?}", self.threads.0.lock().unwrap()));
        self.seen.into_iter().map(String::into_bytes).collect()
    }
}

/// A state without what passes by itself.
fn unmoving(state: &DeviceState) -> Value {
    let mut value = content(state);
    still(&mut value["counters"]);
    let cpus = value.pointer_mut("/connection/open/state/cpus").and_then(Value::as_array_mut);
    for cpu in cpus.into_iter().flatten() {
        if let Some(request) = cpu["request"].as_object_mut() {
            request["age_ms"] = json!(0);
        }
    }
    value
}

#[test]
fn drivers_do_not_see_that_their_sched_device_is_saved() {
    same_when_saved(0..40, 80, Machine::new);
}

/// The same if the process is killed, and another one goes on from what a keeper has.
#[test]
fn drivers_do_not_see_that_the_process_of_their_sched_device_was_killed() {
    same_when_saved(0..40, 80, Machine::kept);
}

#[test]
fn forged_states_of_a_sched_device_do_no_harm() {
    let mut machine = Machine::new(1);
    for cpu in 0..CPUS {
        let pages = machine.pages[cpu].as_mut().unwrap();
        assert_eq!(machine.driver.ask(pages, abi::CLASS_FIFO, 7).outcome, report::OK);
    }
    let state = save(&machine.driver.endpoint);
    let class = ("sched", &settings());
    forged_devices(&bus(&machine.threads), class, &state, Some(&machine.driver.memory), 0..1500);
    drop(machine);
}
