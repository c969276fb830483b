//! `vbus-guest sched`: tells the host which class and priority run on each CPU.

mod session;
mod show;
mod tasks;

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vbus_driver::sched::{Class, Limits, Outcome};
use vbus_driver::{Error, Hal};
use vbus_shm::abi::class;

use session::Session;
use show::Teller;
use tasks::{Census, Watched, wanted};
use vbus_cli::signals;
use vbus_guest::{Source, claim, keep_open};

/// Give this machine's virtual CPUs, on the host, the class and priority of what runs on them here.
///
/// Without --pid or --tid that is the highest real-time task that is runnable on each CPU. A look
/// costs little but comes only every --every ms: a task that runs for less may go unseen, and one
/// that has just become real-time is seen within a second. Where a task must be served at once when
/// it wakes, name it, or use --sleeping: its CPU then keeps its class also while it sleeps.
#[derive(clap::Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// Which sched device: its name, PCI address or socket [default: the first that is free]
    #[arg(long, value_name = "DEVICE", global = true)]
    device: Option<String>,
    #[command(flatten)]
    run: Run,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Args, Debug)]
struct Run {
    /// Only the threads of this process, whether they run or sleep; ends with them
    #[arg(long, value_name = "PID", conflicts_with_all = ["tid", "sleeping"])]
    pid: Option<u32>,
    /// Only this thread, likewise
    #[arg(long, value_name = "TID", conflicts_with = "sleeping")]
    tid: Option<u32>,
    /// Real-time tasks that sleep, too, other than the kernel's own
    #[arg(long)]
    sleeping: bool,
    /// Look every so many milliseconds
    #[arg(long, value_name = "MS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    every: u64,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Show what the host has made of it
    Show {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// Runs it.
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
    /// Posts what the tasks want, until they have gone, or the device, or a signal comes.
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
            // One read of a register, which leaves the virtual machine: not every time.
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

    /// Waits for the next look, and answers who asks meanwhile. True: a signal has come.
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

/// When a real-time class is posted again, so that it does not end: often enough for one look that
/// comes late.
fn renewal(limits: &Limits) -> Duration {
    Duration::from_millis(u64::from(limits.boost_ms / 3).max(1))
}

/// A line for the log when the host begins to do other than was asked.
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

/// Makes this process a real-time one itself, before all others: it must come to its looks and
/// renewals while a real-time task keeps a CPU busy. Without the privilege it goes on as it is.
#[allow(unsafe_code)] // There is no safe wrapper for the system call.
fn go_first() {
    let parameter = libc::sched_param { sched_priority: 99 };
    // SAFETY: the kernel only reads the structure; 0 is the calling thread.
    let result = unsafe {
        libc::sched_setscheduler(
            0,
            libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK,
            &raw const parameter,
        )
    };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "cannot become a real-time task: a busy one may keep this one from its work");
    }
}
