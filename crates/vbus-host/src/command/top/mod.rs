// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus top`: a full screen of devices, rates and queues that shows what the bus does now.
//!
//! `state` is what the screen shows and what keys change, `draw` draws it, and `terminal` takes
//! the terminal and gives it back.

mod draw;
mod state;
mod terminal;

use std::io::IsTerminal;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use crossterm::event::{self, Event};
use ratatui::crossterm;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use vbus_cli::{output, signals};
use vbus_core::DeviceClass;

use crate::classes;
use crate::client::{BusDir, Client};
use crate::telemetry::Table;
use state::{Action, Top};
use terminal::Screen;

/// The longest time until a signal or a new reading is noticed.
const TICK: Duration = Duration::from_millis(100);

/// The longest time between two drawings.
const REDRAW: Duration = Duration::from_secs(1);

const HELP: &str = "\
Keys: arrows choose a device, Enter shows one device with its queues and counters, s and S change
the order, r reverses it, p or space pauses, ? explains the columns, q ends.

Without a terminal, `vbus stats --watch` prints the same numbers as lines.";

/// Arguments.
#[derive(clap::Args, Debug)]
#[command(after_help = HELP)]
pub struct Args {
    #[command(flatten)]
    bus: BusDir,
    /// The seconds between two readings
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    interval: f64,
}

/// A reading of all devices, or why there is none.
type News = (Instant, Result<Vec<Value>, String>);

/// Runs it until the user ends it, or a signal does. `more` are the classes that the program has
/// beside those of vbus.
pub fn run(args: &Args, more: Vec<Box<dyn DeviceClass>>) -> Result<()> {
    if !(0.1..=3600.0).contains(&args.interval) {
        bail!("--interval must be from 0.1 to 3600 seconds");
    }
    let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    if dumb || !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        bail!("`vbus top` draws on a terminal, and this is none; use `vbus stats --watch` instead");
    }
    let interval = Duration::from_secs_f64(args.interval);
    let classes = classes::unserved(more)?;
    let table = Table::new(classes.iter().map(|class| &**class));
    let client = Client::connect(args.bus.dir.as_deref())?;
    let mut top = Top::new(&table, client.dir().display().to_string(), interval, output::colour());
    let news = read_always(client, interval)?;
    // From here on no signal ends the process without giving the terminal back.
    let stop = signals::termination()?;
    let mut screen = Screen::open().context("cannot use this terminal")?;
    let mut drawn: Option<Instant> = None;
    loop {
        for (at, result) in news.try_iter() {
            top.news(at, result);
            drawn = None;
        }
        // The times on the screen go on without news.
        if drawn.is_none_or(|at| at.elapsed() >= REDRAW) {
            screen.draw(|frame| draw::draw(frame, &mut top))?;
            drawn = Some(Instant::now());
        }
        if event::poll(TICK).context("reading the keyboard")? {
            // A key, or another size.
            drawn = None;
            if let Event::Key(key) = event::read().context("reading the keyboard")? {
                match top.key(key) {
                    Action::Go => {}
                    Action::End => return Ok(()),
                    Action::Suspend => screen.suspend()?,
                }
            }
        }
        if is_readable(&stop) {
            return Ok(());
        }
    }
}

/// Reads the devices again and again, in a thread of its own: a bus that does not answer must not
/// keep the keys waiting.
fn read_always(client: Client, interval: Duration) -> Result<Receiver<News>> {
    let (sender, receiver) = sync_channel(1);
    let read = move || {
        loop {
            let result = client.list().map_err(|error| format!("{error:#}"));
            if sender.send((Instant::now(), result)).is_err() {
                return;
            }
            std::thread::sleep(interval);
        }
    };
    std::thread::Builder::new().name("reader".into()).spawn(read).context("starting a thread")?;
    Ok(receiver)
}

fn is_readable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}
