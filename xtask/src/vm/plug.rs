//! Devices that come and go while guests run.

use anyhow::{Result, ensure};

use super::pair::{ADDRESS, Pair, Spec};
use crate::lab::Scene;
use crate::nic::Nic;

const CYCLES: u32 = 20;

/// Twenty times a second NIC is plugged, driven and unplugged, while a stream runs over the first one.
pub fn cycles(scene: &Scene) -> Result<()> {
    let pair = Pair::start(scene, Spec::default())?;
    let qmp = pair.vms[0].qmp_socket().display().to_string();
    let stream = pair.b().start("guest-agent receive 0.0.0.0:5000")?;
    pair.b().ok("until grep -q ':1388 [0:]* 0A' /proc/net/tcp; do sleep 0.05; done")?;
    // It ends when the test ends it, so that it runs during every cycle.
    let sender = pair.a().start(&format!("guest-agent send {}:5000 1000000000000 3", ADDRESS[1]))?;
    let (mut plugs, mut unplugs) = (Vec::new(), Vec::new());
    for cycle in 0..CYCLES {
        let began = std::time::Instant::now();
        pair.bus.run(&["device", "add", "extra", "--class", "venet", "--set", "backend=null", "--qmp", &qmp])?;
        pair.a().ok("until vbus guest list | grep -q extra; do sleep 0.02; done")?;
        plugs.push(began.elapsed().as_millis());
        let nic = Nic::up(&pair.vms[0], "extra", "vbus1", "10.0.1.1/24", "")?;
        let began = std::time::Instant::now();
        pair.bus.run(&["device", "remove", "extra", "--qmp", &qmp])?;
        unplugs.push(began.elapsed().as_millis());
        let ended = nic.driver.wait(super::pair::TRANSFER)?;
        ensure!(!nic.interface.is_empty() && ended.code != 101, "cycle {cycle}: the driver panicked: {}", ended.stderr);
        ensure!(sender.runs() && stream.runs(), "cycle {cycle} ended the stream on the other NIC: {:?}", sender.said());
    }
    eprintln!("plugged in {plugs:?} ms, unplugged in {unplugs:?} ms");
    sender.kill()?;
    stream.kill()?;
    pair.transfer(5001, 16 << 20)
}
