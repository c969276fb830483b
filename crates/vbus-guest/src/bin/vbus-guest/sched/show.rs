// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus-guest sched show`. A device has one driver at a time, so this command asks the running
//! `vbus-guest sched`. If none runs, it opens the device itself.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vbus_driver::Hal;
use vbus_driver::sched::{Class, Cpu, Limits, Outcome};
use vbus_shm::abi::{class, sched as abi};

use super::session::Session;
use vbus_cli::output::{columns, emit, emit_json, plain};
use vbus_guest::{Found, Source, claim, is_meant};

/// How long a running driver may take to answer. It answers between two looks at its tasks.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The address of the abstract socket at which the driver of function `id` answers.
fn address(id: &str) -> std::io::Result<SocketAddr> {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    SocketAddr::from_abstract_name(format!("vbus-guest-sched-{:016x}", hasher.finish()))
}

/// Answers `vbus-guest sched show` while this process drives the device.
pub struct Teller {
    listener: UnixListener,
    name: String,
}

impl Teller {
    /// Listens for function `id`, whose device has the name `name`.
    pub fn new(id: &str, name: &str) -> Option<Teller> {
        let bind = || -> std::io::Result<UnixListener> {
            let listener = UnixListener::bind_addr(&address(id)?)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = bind()
            .inspect_err(
                |error| tracing::warn!(%error, "`vbus-guest sched show` will get no answer"),
            )
            .ok()?;
        Some(Teller { listener, name: name.to_owned() })
    }

    /// Answers all clients that wait.
    pub fn answer(&self, description: &Value) {
        while let Ok((mut stream, _)) = self.listener.accept() {
            let answer = json!({ "name": self.name, "device": description }).to_string();
            // The answer fits the empty buffer of a new socket. An error means that the client has
            // gone.
            let _ = stream.set_nonblocking(true).and_then(|()| stream.write_all(answer.as_bytes()));
        }
    }
}

impl AsFd for Teller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Runs the command.
pub fn run<S: Source>(source: &S, wanted: Option<&str>, as_json: bool) -> Result<()> {
    let told = source.scan()?.iter().find_map(|found| ask(found, wanted));
    let description = match told {
        Some(told) => told,
        None => {
            let (found, claimed) = claim(source, class::SCHED, "sched", wanted)?;
            let session = Session::open(claimed).with_context(|| found.id)?;
            describe(session.cpus.limits(), &session.pages)?
        }
    };
    if as_json {
        emit_json(&description);
        return Ok(());
    }
    let keys = [
        "cpu", "class", "priority", "outcome", "updates", "changes", "clamped", "refused",
        "limited", "expired",
    ];
    let mut table = vec![keys.map(str::to_uppercase).to_vec()];
    for row in description["cpus"].as_array().into_iter().flatten() {
        table.push(keys.map(|key| plain(&row[key])).to_vec());
    }
    let limits = &description["limits"];
    let list = |key: &str| {
        limits[key].as_array().into_iter().flatten().map(plain).collect::<Vec<_>>().join(", ")
    };
    emit(&columns(&table));
    emit(&format!(
        "allowed: {}; highest priority {}, lowest nice {}, {} changes a second; real time: \
         renewed within {} ms, {} % of a processor\n",
        list("allow"),
        limits["priority-max"],
        limits["nice-min"].as_i64().map_or("its own".into(), |nice| nice.to_string()),
        limits["changes"],
        limits["boost-ms"],
        limits["boost-share"]
    ));
    Ok(())
}

/// Asks the driver of `found`. Returns `None` if none runs, or if `wanted` names another device.
fn ask(found: &Found, wanted: Option<&str>) -> Option<Value> {
    let mut stream = UnixStream::connect_addr(&address(&found.id).ok()?).ok()?;
    stream.set_read_timeout(Some(TIMEOUT)).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let mut answer: Value = serde_json::from_str(&text).ok()?;
    let name = answer["name"].as_str()?;
    wanted.is_none_or(|wanted| is_meant(found, name, wanted)).then(|| answer["device"].take())
}

/// The limits of the device, and its report for each CPU.
pub fn describe<H: Hal>(limits: &Limits, pages: &[Cpu<H>]) -> Result<Value> {
    let mut cpus = Vec::new();
    for (number, page) in pages.iter().enumerate() {
        let report = page.report()?.0;
        let (class, priority) = show(report.class);
        cpus.push(json!({
            "cpu": number,
            "class": class,
            "priority": priority,
            "outcome": outcome(report.outcome),
            "updates": report.updates,
            "changes": report.changes,
            "clamped": report.clamped,
            "refused": report.refused,
            "limited": report.limited,
            "expired": report.expired,
        }));
    }
    let classes = [
        (abi::CLASS_NORMAL, "normal"),
        (abi::CLASS_BATCH, "batch"),
        (abi::CLASS_IDLE, "idle"),
        (abi::CLASS_FIFO, "fifo"),
        (abi::CLASS_RR, "rr"),
    ];
    let allow: Vec<_> = classes
        .iter()
        .filter(|(class, _)| limits.classes & 1 << class != 0)
        .map(|(_, name)| name)
        .collect();
    let limits = json!({
        "allow": allow,
        "priority-max": limits.priority_max,
        "nice-min": limits.nice_min,
        "changes": limits.changes,
        "boost-ms": limits.boost_ms,
        "boost-share": limits.share,
    });
    Ok(json!({ "limits": limits, "cpus": cpus }))
}

fn show(class: Class) -> (&'static str, i32) {
    match class {
        Class::Own => ("none", 0),
        Class::Normal(nice) => ("normal", nice),
        Class::Batch(nice) => ("batch", nice),
        Class::Idle => ("idle", 0),
        Class::Fifo(priority) => ("fifo", priority),
        Class::RoundRobin(priority) => ("rr", priority),
    }
}

fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Granted => "granted",
        Outcome::Clamped => "clamped",
        Outcome::BadRequest => "bad-request",
        Outcome::NotAllowed => "not-allowed",
        Outcome::Expired => "expired",
        Outcome::NoThread => "no-thread",
        Outcome::Failed => "failed",
        Outcome::Spent => "spent",
    }
}
