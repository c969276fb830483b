// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus-guest sched`: tells the host the scheduling class and priority of each CPU's task.

mod session;
mod show;
mod tasks;

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vbus_driver::sched::{Class, Limits, Outcome};
use vbus_driver::{Error, Hal};
use vbus_shm::abi::class;

use session::Session;
use show::Teller;
use tasks::{Census, Watched, wanted};
use vbus_cli::signals;
use vbus_guest::{Found, Source, claim, is_meant, keep_open};

/// Give the threads of this machine's virtual CPUs, on the host, the scheduling class and priority
/// of the tasks that run on the CPUs.
///
/// Without --pid or --tid, the runnable real-time task with the highest priority decides for each
/// CPU. vbus-guest looks at the tasks every --every ms. It may miss a task that runs for a shorter
/// time. It finds a task that has become real-time within a second. If a task must run at once when
/// it wakes, name it with --pid or --tid, or use --sleeping: its CPU then keeps its class while the
/// task sleeps.
#[derive(clap::Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// The name, PCI address or socket of the sched device [default: the first free one]
    #[arg(long, value_name = "DEVICE", global = true)]
    device: Option<String>,
    #[command(flatten)]
    run: Run,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Args, Debug)]
struct Run {
    /// Watch only the threads of this process, running or sleeping, and end when they end
    #[arg(long, value_name = "PID", conflicts_with_all = ["tid", "sleeping"])]
    pid: Option<u32>,
    /// Watch only this thread, running or sleeping, and end when it ends
    #[arg(long, value_name = "TID", conflicts_with = "sleeping")]
    tid: Option<u32>,
    /// Also watch sleeping real-time tasks, except those of the kernel
    #[arg(long)]
    sleeping: bool,
    /// The milliseconds between two readings of the tasks
    #[arg(long, value_name = "MS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    every: u64,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Show the classes that the host has granted
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Args {
    /// Checks that no Linux driver has the device: it posts what the CPUs run by itself, and this
    /// program would take the device away from it.
    pub fn check_driver(&self) -> Result<()> {
        let Ok(functions) = fs::read_dir("/sys/bus/pci/drivers/vbus") else { return Ok(()) };
        for function in functions {
            let function = function?;
            let read = |file: &str| fs::read_to_string(function.path().join("vbus").join(file));
            let (Ok(class), Ok(name)) = (read("class"), read("name")) else { continue };
            let id = function.file_name().to_string_lossy().into_owned();
            let found = Found { id, class: None };
            let wanted = self.device.as_deref();
            let is_it = wanted.is_none_or(|wanted| is_meant(&found, name.trim_end(), wanted));
            ensure!(
                class.trim_end() != "sched" || !is_it,
                "the Linux driver has the device {}, and posts the class of what each CPU runs by \
                 itself; its parameter /sys/module/vbus/parameters/sched_sleeping is --sleeping. \
                 On the host `vbus device show` tells the classes. To use this program instead: \
                 `echo {} > /sys/bus/pci/drivers/vbus/unbind`",
                name.trim_end(),
                found.id
            );
        }
        Ok(())
    }
}

/// Runs the command.
pub fn run<S: Source>(source: &S, args: &Args) -> Result<()> {
    let device = args.device.as_deref();
    if let Some(Command::Show { json }) = args.command {
        return show::run(source, device, json);
    }
    let mut watched = match (args.run.tid, args.run.pid) {
        (Some(tid), _) => Watched::Thread(tid),
        (None, Some(pid)) => Watched::Process(pid),
        (None, None) => Watched::RealTime(Census::new(args.run.sleeping)?),
    };
    let (found, claimed) = claim(source, class::SCHED, "sched", device)?;
    let every = Duration::from_millis(args.run.every);
    let signals = signals::termination()?;
    go_first();
    keep_open(source, &found.id, claimed, Some(signals.as_fd()), |claimed| {
        let session = Session::open(claimed).with_context(|| found.id.clone())?;
        let teller = Teller::new(&found.id, session.cpus.function().info().name.as_str());
        session.follow(&mut watched, every, &signals, teller.as_ref())
    })
    .map(drop)
}

impl<H: Hal> Session<H> {
    /// Posts the classes of the tasks until the tasks have ended or a signal comes.
    ///
    /// # Errors
    /// The connection was lost, or the device has gone.
    fn follow(
        mut self,
        watched: &mut Watched,
        every: Duration,
        signals: &OwnedFd,
        teller: Option<&Teller>,
    ) -> Result<()> {
        let limits = *self.cpus.limits();
        let mut posted = vec![(Class::Own, Instant::now()); self.pages.len()];
        let mut outcomes = vec![Outcome::Granted; self.pages.len()];
        let mut checked = Instant::now();
        loop {
            let now = Instant::now();
            let Some(samples) = watched.samples() else { break };
            let wanted = wanted(&samples, self.pages.len());
            for (number, ((page, last), class)) in
                self.pages.iter_mut().zip(&mut posted).zip(wanted).enumerate()
            {
                if class != last.0 || class.is_real_time() && now >= last.1 + renewal(&limits) {
                    if class != last.0 {
                        tracing::debug!(cpu = number, ?class, "posted");
                    }
                    page.post(class);
                    *last = (class, now);
                }
                let outcome = page.report()?.0.outcome;
                if std::mem::replace(&mut outcomes[number], outcome) != outcome {
                    tell(number, last.0, outcome);
                }
            }
            // This reads a register, which costs an exit of the virtual machine, so not every time.
            if now >= checked + Duration::from_secs(1) {
                checked = now;
                self.cpus.function().check()?;
            }
            if self.sleep(every, signals, teller)? {
                break;
            }
        }
        self.cpus.close();
        Ok(())
    }

    /// Waits until the next look, and answers `vbus-guest sched show` meanwhile. Returns true if a
    /// signal has come.
    fn sleep(&self, every: Duration, signals: &OwnedFd, teller: Option<&Teller>) -> Result<bool> {
        let end = Instant::now() + every;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut fds = vec![
                PollFd::new(signals, PollFlags::IN),
                PollFd::from_borrowed_fd(self.interrupt.lifeline(), PollFlags::RDHUP),
            ];
            fds.extend(
                teller.map(|teller| PollFd::from_borrowed_fd(teller.as_fd(), PollFlags::IN)),
            );
            match poll(&mut fds, Some(&Timespec::try_from(left)?)) {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error).context("poll"),
            }
            if !fds[0].revents().is_empty() {
                return Ok(true);
            }
            if !fds[1].revents().is_empty() {
                return Err(Error::Gone.into());
            }
            if let Some(teller) = teller {
                teller.answer(&show::describe(self.cpus.limits(), &self.pages)?);
            }
        }
    }
}

/// The time after which a real-time class is posted again, so that it does not expire even if one
/// look comes late.
fn renewal(limits: &Limits) -> Duration {
    Duration::from_millis(u64::from(limits.boost_ms / 3).max(1))
}

/// Logs a new outcome of a class that was posted.
fn tell(cpu: usize, class: Class, outcome: Outcome) {
    match outcome {
        Outcome::Granted => tracing::debug!(cpu, ?class, "granted"),
        Outcome::Clamped => {
            tracing::info!(cpu, ?class, "granted at the nearest priority that the host allows")
        }
        Outcome::NotAllowed => tracing::warn!(cpu, ?class, "the host does not allow this class"),
        Outcome::NoThread => tracing::warn!(cpu, "the host does not know this CPU's thread yet"),
        Outcome::Failed => {
            tracing::warn!(cpu, ?class, "the host's kernel refuses; the log of the bus says why")
        }
        Outcome::Expired => tracing::warn!(cpu, ?class, "not renewed in time"),
        Outcome::Spent => tracing::debug!(cpu, ?class, "has used its share of the time"),
        Outcome::BadRequest => tracing::warn!(cpu, ?class, "the device knows no such class"),
    }
}

/// Makes this process a real-time task of the highest priority, so that it can look and renew while
/// a real-time task keeps a CPU busy. Without the privilege the process keeps its class.
#[allow(unsafe_code)] // There is no safe wrapper for the system call.
fn go_first() {
    let parameter = libc::sched_param { sched_priority: 99 };
    // SAFETY: the kernel only reads the structure. 0 means the calling thread.
    let result = unsafe {
        libc::sched_setscheduler(
            0,
            libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK,
            &raw const parameter,
        )
    };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(
            %error,
            "cannot become a real-time task: a busy real-time task may delay this program"
        );
    }
}
