//! What a bus costs that has nothing to do.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::bus::Bus;
use crate::bus::device;
use crate::lab::Scene;

const DEVICES: usize = 64;
const MOST_KIB: u64 = 64 * 1024;
/// How long the bus is watched doing nothing. A time to measure over, not one to wait for
/// something.
const WATCHED: Duration = Duration::from_secs(3);
/// What may be used in that time, in clock ticks of 10 ms: none, but one for what a measurement
/// itself sets off.
const MOST_CPU: Duration = Duration::from_millis(10);

/// 64 idle devices take less than 64 MiB, no thread each, and no processor time.
pub fn many_devices(scene: &Scene) -> Result<()> {
    let config: String =
        (0..DEVICES).map(|n| device(&format!("net{n}"), "venet", "backend = \"switch\"")).collect();
    let mut bus = Bus::start(scene, &config)?;
    let before = bus.cpu_time()?;
    std::thread::sleep(WATCHED);
    let used = bus.cpu_time()?.saturating_sub(before);
    let (memory, threads) = (bus.resident_kib()?, bus.threads()?);
    eprintln!(
        "{DEVICES} idle devices: {memory} KiB, {threads} threads, {} ms of processor time in {} s",
        used.as_millis(),
        WATCHED.as_secs()
    );
    ensure!(memory < MOST_KIB, "{memory} KiB are resident, {MOST_KIB} may be");
    ensure!(threads < DEVICES as u64 / 2, "{threads} threads for {DEVICES} devices");
    ensure!(used <= MOST_CPU, "{} ms of processor time while idle", used.as_millis());

    // Asked to end, it ends well and leaves no socket behind.
    let status = bus.process.terminate(Duration::from_secs(10))?;
    ensure!(status.success(), "the bus ended with {status}");
    let left = std::fs::read_dir(bus.dir()).map_or(0, Iterator::count);
    ensure!(left == 0, "the bus left {left} files in {}", bus.dir().display());
    Ok(())
}
