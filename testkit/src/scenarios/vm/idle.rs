// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The cost of an idle bus.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::bus::Bus;
use crate::bus::device;
use crate::lab::Scene;

const DEVICES: usize = 64;
const MOST_KIB: u64 = 64 * 1024;
/// How long the test measures the idle bus.
const WATCHED: Duration = Duration::from_secs(3);
/// The processor time that the bus may use in that time: a tenth. A quiet machine shows none. The
/// kernel counts in ticks, and may charge whole ticks for the few moments in which the bus looks
/// around. A worker that does not sleep uses all of the time.
const MOST_CPU: Duration = Duration::from_millis(300);

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

    // After SIGTERM the bus ends without an error and leaves no socket.
    let status = bus.process.terminate(Duration::from_secs(60))?;
    ensure!(status.success(), "the bus ended with {status}");
    let left = std::fs::read_dir(bus.dir()).map_or(0, Iterator::count);
    ensure!(left == 0, "the bus left {left} files in {}", bus.dir().display());
    Ok(())
}
