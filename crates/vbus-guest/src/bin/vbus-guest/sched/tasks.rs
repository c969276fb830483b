// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tasks of this machine, from /proc: their scheduling class, and their CPU.

use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use vbus_driver::sched::Class;

/// The time between two searches for real-time tasks among all tasks.
const CENSUS: Duration = Duration::from_secs(1);

/// The present state of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The CPU that the task runs on, or ran on last.
    pub cpu: u32,
    /// Its scheduling class.
    pub class: Class,
    /// Whether the task runs, or waits only for the CPU.
    is_runnable: bool,
    /// Whether it is a thread of the kernel.
    is_kernel: bool,
}

/// Reads `/proc/.../stat`. Returns `None` if the task does not exist any more or has ended.
fn sample(path: &str) -> Option<Sample> {
    parse(&fs::read_to_string(path).ok()?)
}

fn parse(stat: &str) -> Option<Sample> {
    const KERNEL_THREAD: u64 = 0x0020_0000;
    // The name may have any characters, so the search begins at its end. The first field after the
    // name is the third of the line.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<i64>().ok();
    let number = |number: usize| i32::try_from(field(number)?).ok();
    let state = *fields.first()?;
    if state == "Z" || state == "X" {
        return None;
    }
    let (nice, priority) = (number(19)?, number(40)?);
    let class = match field(41)? {
        0 => Class::Normal(nice),
        1 => Class::Fifo(priority),
        2 => Class::RoundRobin(priority),
        3 => Class::Batch(nice),
        5 => Class::Idle,
        // SCHED_DEADLINE goes before every task with a priority.
        6 => Class::Fifo(99),
        // A class of the kernel itself, or an unknown one.
        _ => Class::Own,
    };
    Some(Sample {
        cpu: u32::try_from(field(39)?).ok()?,
        class,
        is_runnable: state == "R",
        is_kernel: u64::try_from(field(9)?).ok()? & KERNEL_THREAD != 0,
    })
}

/// The entries of a folder of procfs that are numbers.
fn numbers(folder: &str) -> Vec<u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The tasks that decide the class of each CPU.
pub enum Watched {
    /// One thread.
    Thread(u32),
    /// All threads of one process.
    Process(u32),
    /// All real-time tasks except those of this process.
    RealTime(Census),
}

/// A task: the numbers of its process and of its thread.
type Id = (u32, u32);

/// The real-time tasks of this machine. A search takes long, so a thread that is not a real-time
/// task does it.
pub struct Census {
    /// Whether tasks that sleep count. Then threads of the kernel do not count, because many of
    /// them sleep on each CPU.
    sleeping: bool,
    newest: Arc<Mutex<Vec<Id>>>,
    known: Vec<Id>,
}

impl Census {
    /// Starts the searches. `sleeping` says whether tasks that sleep count. Call this before the
    /// calling thread becomes a real-time task, because the new thread inherits its class.
    pub fn new(sleeping: bool) -> Result<Census> {
        let known = take_census(sleeping);
        let newest = Arc::new(Mutex::new(known.clone()));
        let taken = Arc::downgrade(&newest);
        let thread = std::thread::Builder::new().name("vbus-census".into());
        thread.spawn(move || {
            while let Some(newest) = taken.upgrade() {
                let census = take_census(sleeping);
                *newest.lock().unwrap_or_else(PoisonError::into_inner) = census;
                drop(newest);
                std::thread::sleep(CENSUS);
            }
        })?;
        Ok(Census { sleeping, newest, known })
    }

    fn samples(&mut self) -> Vec<Sample> {
        // Do not wait for the lock: the thread that holds it may have to wait for the CPU.
        if let Ok(newest) = self.newest.try_lock() {
            self.known.clone_from(&newest);
        }
        let samples = self.known.iter().filter_map(|id| sample(&path(*id)));
        samples
            .filter(|sample| sample.class.is_real_time() && (sample.is_runnable || self.sleeping))
            .collect()
    }
}

fn path((process, thread): Id) -> String {
    format!("/proc/{process}/task/{thread}/stat")
}

/// Finds the real-time tasks among all tasks except those of this process.
fn take_census(sleeping: bool) -> Vec<Id> {
    let processes = numbers("/proc").into_iter().filter(|process| *process != std::process::id());
    let tasks = processes.flat_map(|process| {
        numbers(&format!("/proc/{process}/task")).into_iter().map(move |thread| (process, thread))
    });
    let counts = |sample: Sample| sample.class.is_real_time() && !(sleeping && sample.is_kernel);
    tasks.filter(|id| sample(&path(*id)).is_some_and(counts)).collect()
}

impl Watched {
    /// The present state of the tasks that count. Returns `None` once they have all ended.
    pub fn samples(&mut self) -> Option<Vec<Sample>> {
        match self {
            Watched::Thread(thread) => {
                sample(&format!("/proc/{thread}/stat")).map(|sample| vec![sample])
            }
            Watched::Process(process) => {
                let threads = numbers(&format!("/proc/{process}/task")).into_iter();
                let samples: Vec<_> =
                    threads.filter_map(|thread| sample(&path((*process, thread)))).collect();
                (!samples.is_empty()).then_some(samples)
            }
            Watched::RealTime(census) => Some(census.samples()),
        }
    }
}

/// The class of each of `cpus` CPUs: that of the most urgent task on it.
pub fn wanted(samples: &[Sample], cpus: usize) -> Vec<Class> {
    let mut wanted = vec![Class::Own; cpus];
    for sample in samples {
        if let Some(class) = usize::try_from(sample.cpu).ok().and_then(|cpu| wanted.get_mut(cpu)) {
            if urgency(sample.class) > urgency(*class) {
                *class = sample.class;
            }
        }
    }
    wanted
}

/// A class that goes first has a greater urgency.
fn urgency(class: Class) -> (u8, i32) {
    match class {
        Class::Own => (0, 0),
        Class::Idle => (1, 0),
        Class::Batch(nice) => (2, -nice),
        Class::Normal(nice) => (3, -nice),
        Class::RoundRobin(priority) | Class::Fifo(priority) => (4, priority),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(
        name: &str,
        state: char,
        flags: u32,
        nice: i32,
        cpu: u32,
        priority: u32,
        policy: u32,
    ) -> String {
        // Fields 3 to 41.
        format!(
            "7 ({name}) {state} 1 7 7 0 -1 {flags} 0 0 0 0 0 0 0 0 20 {nice} 1 0 5 0 0 0 0 0 0 0 \
             0 0 0 0 0 0 0 0 17 {cpu} {priority} {policy} 0"
        )
    }

    #[test]
    fn tasks_are_read() {
        let read = |text: &str| parse(text).unwrap();
        let sample = read(&stat("a b) (c", 'R', 0x40, -5, 3, 0, 0));
        assert_eq!(
            sample,
            Sample { cpu: 3, class: Class::Normal(-5), is_runnable: true, is_kernel: false }
        );
        let sample = read(&stat("migration/0", 'S', 0x0420_8040, 0, 0, 99, 1));
        assert_eq!(
            sample,
            Sample { cpu: 0, class: Class::Fifo(99), is_runnable: false, is_kernel: true }
        );
        assert_eq!(read(&stat("x", 'S', 0, 0, 0, 7, 2)).class, Class::RoundRobin(7));
        assert_eq!(read(&stat("x", 'S', 0, 0, 0, 0, 6)).class, Class::Fifo(99));
        assert!(parse(&stat("x", 'Z', 0, 0, 0, 0, 0)).is_none());
        assert!(parse("").is_none() && parse("1 (x) R 1").is_none());
        let own = sample_of_this_thread();
        assert!(own.is_runnable && !own.is_kernel);
    }

    fn sample_of_this_thread() -> Sample {
        sample("/proc/thread-self/stat").unwrap()
    }

    #[test]
    fn the_most_urgent_task_decides() {
        let on = |cpu, class| Sample { cpu, class, is_runnable: true, is_kernel: false };
        let samples = [
            on(0, Class::Fifo(3)),
            on(0, Class::RoundRobin(4)),
            on(0, Class::Normal(-20)),
            on(1, Class::Normal(5)),
            on(1, Class::Idle),
            on(1, Class::Normal(4)),
            on(9, Class::Fifo(99)),
        ];
        assert_eq!(wanted(&samples, 3), [Class::RoundRobin(4), Class::Normal(4), Class::Own]);
    }
}
