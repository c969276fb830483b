//! Tests in whole virtual machines: stock Linux guests under stock QEMU.

mod backends;
mod deaths;
mod flat;
mod harness;
mod hostile;
mod idle;
mod pair;
mod plug;
mod sched;
mod state;
mod traffic;

use anyhow::Result;
pub use pair::device;

use crate::lab::{Lab, Options, Scene};
use crate::report::{Outcome, Report, Skip};

/// One test: a name, a line about it, and what it does.
pub struct Scenario {
    pub name: &'static str,
    pub about: &'static str,
    run: fn(&Scene) -> Result<()>,
}

/// All of them, the quick and basic ones first.
pub const SCENARIOS: &[Scenario] = &[
    scenario("boot", "a guest boots, runs commands, and powers off", harness::boot),
    scenario("reboot", "a guest is reset and reboots by itself", harness::reboot),
    scenario(
        "two_guests",
        "two guests under QEMU's own virtio-net: the test of the tests",
        harness::two_guests,
    ),
    scenario("traffic", "1 queue pair, MTU 1500, offloads; data checked by hash", traffic::plain),
    scenario("traffic_mtu_9000", "the same with an MTU of 9000", traffic::jumbo),
    scenario("traffic_two_pairs", "the same with 2 queue pairs and 2 CPUs", traffic::two_pairs),
    scenario("traffic_no_offloads", "the same without offloads", traffic::no_offloads),
    scenario(
        "few_kicks",
        "under load fewer than 5 doorbells and 5 interrupts per 1,000 packets",
        traffic::few_kicks,
    ),
    scenario(
        "stream",
        "the stream back end against QEMU's netdev and virtio-net",
        backends::stream,
    ),
    scenario("passt", "the stream back end against passt, to the host and back", backends::passt),
    scenario(
        "tap",
        "TCP to the host by TAP, against QEMU's virtio-net in the same guest",
        backends::tap,
    ),
    scenario("idle_64", "64 idle devices: memory, threads, processor time", idle::many_devices),
    scenario("state", "state pages from and to the host, up to 1 MiB", state::pages),
    scenario(
        "plug_cycles",
        "20 times plug, use and unplug beside traffic on another NIC",
        plug::cycles,
    ),
    scenario("plug_all", "one driver follows NICs that come and go, and their links", plug::follow),
    scenario("kill_guest", "kill -9 of a guest in mid-traffic", deaths::guest),
    scenario("kill_driver", "kill -9 of the driver in mid-traffic", deaths::driver),
    scenario("kill_bus", "kill -9 of the bus in mid-traffic", deaths::bus),
    scenario("reset_guest", "a guest is reset in mid-traffic", deaths::reboot),
    scenario("reopen", "the driver is opened 100 times, without a leak", deaths::reopen),
    scenario(
        "hostile_guest",
        "random writes of one guest beside the traffic of two others",
        hostile::scribbler,
    ),
    scenario(
        "flat",
        "a guest without an operating system: MSI and MSI-X, frames and state pages",
        flat::drives_devices,
    ),
    scenario(
        "sched",
        "virtual CPUs' threads follow a guest's real-time tasks, and are given back",
        sched::follows,
    ),
    scenario(
        "sched_kill_bus",
        "kill -9 of the bus: the threads are given back all the same",
        sched::bus_killed,
    ),
    scenario(
        "sched_latency",
        "how late a guest's real-time task wakes under load, with and without sched",
        sched::latency,
    ),
    scenario("share_off", "memory that is not shared is found out", hostile::share_off),
];

const fn scenario(
    name: &'static str,
    about: &'static str,
    run: fn(&Scene) -> Result<()>,
) -> Scenario {
    Scenario { name, about, run }
}

/// Runs `scenarios` one after the other.
pub fn run(report: &mut Report, scenarios: &[&Scenario], options: &Options) {
    let lab = Lab::new(options);
    for scenario in scenarios {
        report.run(&format!("vm::{}", scenario.name), || {
            let lab = lab
                .as_ref()
                .map_err(|error| anyhow::anyhow!("no guest can be started: {error:#}"))?;
            let scene = lab.scene(scenario.name)?;
            match (scenario.run)(&scene) {
                Ok(()) => Ok(Outcome::Passed),
                Err(error) if error.is::<Skip>() => Ok(Outcome::Skipped(error.to_string())),
                Err(error) => {
                    let logs = scene.save_logs()?;
                    Ok(Outcome::Failed(format!("{error:#}\n    logs: {}", logs.display())))
                }
            }
        });
    }
}
