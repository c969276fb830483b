// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus-guest sched` against a bus. Threads of this test take the place of virtual CPUs.
#![allow(unsafe_code)] // There is no safe wrapper for sched_setscheduler.

use std::process::{Child, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::support::{Served, has_ended, vbus_guest, wait_until};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// A thread that sleeps until it is dropped.
struct Sleeper {
    tid: i32,
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Sleeper {
    /// Starts a thread with this priority in the class FIFO, or an ordinary thread if it is 0.
    /// Returns `None` without the permission.
    fn start(priority: i32) -> Option<Sleeper> {
        let ((tell, told), (end, ended)) = (channel(), channel());
        let thread = std::thread::spawn(move || {
            let parameter = libc::sched_param { sched_priority: priority };
            let class = if priority == 0 { libc::SCHED_OTHER } else { libc::SCHED_FIFO };
            // SAFETY: the kernel only reads the structure. 0 means the calling thread.
            let result = unsafe { libc::sched_setscheduler(0, class, &raw const parameter) };
            tell.send((result == 0).then(|| rustix::thread::gettid().as_raw_nonzero().get()))
                .unwrap();
            let _ = ended.recv();
        });
        let tid = told.recv().unwrap()?;
        Some(Sleeper { tid, end: Some(end), thread: Some(thread) })
    }

    /// The number of its scheduling policy in Linux, and its real-time priority.
    fn class(&self) -> (i32, i32) {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{}/stat", self.tid)).unwrap();
        // The first field after the name is the third of the line.
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split_whitespace().collect();
        (fields[41 - 3].parse().unwrap(), fields[40 - 3].parse().unwrap())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        drop(self.end.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A bus with a device, a thread for each CPU of this machine, and a real-time task of priority 7.
struct Stage {
    bus: Served,
    cpus: Vec<Sleeper>,
    task: Sleeper,
}

impl Stage {
    fn set(settings: &str) -> Option<Stage> {
        let possible = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap();
        let count: usize =
            possible.trim().rsplit([',', '-']).next().unwrap().parse::<usize>().unwrap() + 1;
        let count = count.min(256);
        let cpus: Option<Vec<_>> = (0..count).map(|_| Sleeper::start(0)).collect();
        let (Some(cpus), Some(task)) = (cpus, Sleeper::start(7)) else {
            eprintln!("skipped: this process may not make a thread a real-time one (CAP_SYS_NICE)");
            return None;
        };
        let tids: Vec<_> = cpus.iter().map(|cpu| cpu.tid.to_string()).collect();
        let threads = tids.join(", ");
        let bus = Served::start(&format!(
            "[[device]]\nname = \"cpus\"\nclass = \"sched\"\nthreads = [{threads}]\n{settings}\n"
        ));
        Some(Stage { bus, cpus, task })
    }

    fn follow(&self, args: &[&str]) -> Child {
        let mut command = vbus_guest();
        command.arg("sched").args(args).arg("--dir").arg(&self.bus.dir);
        command.stderr(Stdio::null()).spawn().unwrap()
    }

    fn follow_task(&self) -> Child {
        self.follow(&["--tid", &self.task.tid.to_string()])
    }

    fn wait_boosted(&self, class: (i32, i32)) {
        wait_until("a thread to get the task's class", || {
            self.cpus.iter().any(|cpu| cpu.class() == class)
        });
    }

    fn wait_own(&self) {
        wait_until("the threads to get their own class back", || self.are_own());
    }

    fn are_own(&self) -> bool {
        self.cpus.iter().all(|cpu| cpu.class() == (0, 0))
    }
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_task_is_followed_and_shown_until_it_ends() {
    let Some(stage) = Stage::set("priority-max = 5\nboost-ms = 200") else { return };
    let mut driver = stage.follow_task();
    stage.wait_boosted((1, 5));
    // This is longer than a class lasts without renewal.
    std::thread::sleep(std::time::Duration::from_millis(800));
    stage.wait_boosted((1, 5));
    let is_boosted = |cpu: &&Value| cpu["class"] == "fifo";
    let shown = stage.bus.guest().json(&["sched", "show"]);
    let cpu = shown["cpus"].as_array().unwrap().iter().find(is_boosted).unwrap();
    assert_eq!((&cpu["priority"], &cpu["outcome"]), (&5.into(), &"clamped".into()));
    assert!(cpu["updates"].as_u64() >= Some(4), "it was renewed: {cpu}");
    assert_eq!(cpu["expired"], 0);
    let table = stage.bus.guest().good(&["sched", "show"]);
    assert!(table.starts_with("CPU") && table.contains("highest priority 5"), "{table}");
    let shown = stage.bus.json(&["device", "show", "cpus"]);
    let cpu = shown["device"]["cpus"].as_array().unwrap().iter().find(is_boosted).unwrap();
    assert_eq!((&cpu["priority"], &cpu["outcome"]), (&5.into(), &"clamped".into()));
    assert_eq!(shown["device"]["policy"]["priority-max"], 5);
    // The driver ends with the task, without an error.
    let Stage { bus, cpus, task } = stage;
    drop(task);
    assert!(driver.wait().unwrap().success());
    assert!(cpus.iter().all(|cpu| cpu.class() == (0, 0)));
    // Without a driver, the command opens the device itself.
    let shown = bus.guest().json(&["sched", "show"]);
    assert!(shown["cpus"].as_array().unwrap().iter().any(|cpu| cpu["changes"].as_u64() >= Some(2)));
}

#[test]
fn sleeping_tasks_count_with_the_option() {
    let Some(stage) = Stage::set("priority-max = 99") else { return };
    let driver = stage.follow(&["--sleeping"]);
    // Other tasks of this machine may have a higher priority.
    wait_until("a thread to get a class", || !stage.are_own());
    end(driver);
    stage.wait_own();
}

#[test]
fn every_end_restores_the_threads() {
    let Some(mut stage) = Stage::set("") else { return };
    let driver = stage.follow_task();
    stage.wait_boosted((1, 7));
    end(driver);
    stage.wait_own();

    let mut driver = stage.follow_task();
    stage.wait_boosted((1, 7));
    rustix::process::kill_process(Pid::from_child(&driver), Signal::TERM).unwrap();
    assert!(driver.wait().unwrap().success());
    stage.wait_own();

    let driver = stage.follow_task();
    stage.wait_boosted((1, 7));
    stage.bus.good(&["device", "remove", "cpus", "--force"]);
    assert!(stage.are_own(), "once the device is removed");
    end(driver);

    let tids: Vec<_> = stage.cpus.iter().map(|cpu| cpu.tid.to_string()).collect();
    let threads = format!("threads=[{}]", tids.join(","));
    stage.bus.good(&["device", "add", "cpus", "--class", "sched", "--set", &threads]);
    let driver = stage.follow_task();
    stage.wait_boosted((1, 7));
    let supervisor = stage.bus.supervisor();
    stage.bus.signal(Signal::TERM);
    assert!(stage.bus.child.wait().unwrap().success());
    assert!(stage.are_own(), "once the bus has ended");
    assert!(has_ended(supervisor), "an orderly end leaves no supervisor");
    end(driver);
}

#[test]
fn the_threads_are_restored_when_the_bus_is_killed() {
    let Some(mut stage) = Stage::set("boost-ms = 60000") else { return };
    let driver = stage.follow_task();
    stage.wait_boosted((1, 7));
    let first = stage.bus.supervisor();
    // Signals for the bus do not end the supervisor.
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT] {
        wait_until("the supervisor to catch its signals", || {
            let status = std::fs::read_to_string(format!("/proc/{first}/status")).unwrap();
            let caught = status
                .lines()
                .find_map(|line| line.strip_prefix("SigCgt:"))
                .unwrap()
                .trim()
                .to_owned();
            u64::from_str_radix(&caught, 16).unwrap() & 1 << (signal.as_raw() - 1) != 0
        });
        rustix::process::kill_process(Pid::from_raw(first).unwrap(), signal).unwrap();
    }
    stage.bus.signal(Signal::KILL);
    stage.bus.child.wait().unwrap();
    stage.wait_own();
    wait_until("the supervisor to end", || has_ended(first));
    end(driver);
    let log = std::fs::read_to_string(&stage.bus.log).unwrap();
    assert!(log.contains("the bus was killed: 1 threads got their scheduling class back"), "{log}");
}

#[test]
fn the_bus_goes_on_without_its_supervisor() {
    let bus = Served::start("[[device]]\nname = \"net0\"\nclass = \"venet\"\n");
    let supervisor = bus.supervisor();
    rustix::process::kill_process(Pid::from_raw(supervisor).unwrap(), Signal::KILL).unwrap();
    wait_until("the supervisor to end", || has_ended(supervisor));
    // What is there works. Nothing new can be opened, and the error says why.
    assert!(bus.guest().good(&["list"]).contains("net0"));
    let error = bus.bad(&["device", "add", "net1", "--class", "venet"]);
    assert!(error.contains("the supervisor of the bus has ended; start the bus anew"), "{error}");
    bus.good(&["device", "remove", "net0"]);
}

#[test]
fn threads_and_priorities_are_those_that_the_configuration_allows() {
    let bus = Served::start("[allow]\nsched-priority-max = 20\n");
    let add = |settings: &[&str]| {
        let mut args = vec!["device", "add", "cpus", "--class", "sched"];
        settings.iter().for_each(|setting| args.extend(["--set", setting]));
        bus.run(&args)
    };
    let own = format!("threads=[{}]", std::process::id());
    let error = add(&[&own]).err;
    assert!(error.contains("set \"sched-threads\" in [allow] to true"), "{error}");
    let qmp = format!("qmp={}", bus.dir.join("qmp").display());
    let error = add(&[&qmp, "priority-max=21"]).err;
    assert!(error.contains("raise \"sched-priority-max\" in [allow]"), "{error}");
    let error = add(&[&qmp, "nice-min=-1"]).err;
    assert!(error.contains("leave \"nice-min\" out"), "{error}");
    let done = add(&[&qmp, "priority-max=20"]);
    assert_eq!(done.code, Some(0), "{}", done.err);
    let bus = Served::start("[allow]\nsched-threads = true\n");
    bus.good(&["device", "add", "cpus", "--class", "sched", "--set", &own]);
}
