// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests of `vbus-vmm` that are saved, restored, and moved to another process.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::guest::Guest;
use crate::l1::L1;
use crate::l2::{L2, L2Spec};
use crate::report::Figures;

/// How long a snapshot or a move may take.
pub(super) const MOVE: Duration = Duration::from_secs(240);
/// The longest time in milliseconds for which the clock of a guest may stand still to itself. The
/// emulated machine shares two processors with others, so this shows only gross errors: a clock
/// that has jumped has jumped by hours.
const GAP_MS: i64 = 300_000;

/// Starts what the guest goes on with while it is saved and moved.
fn prepare(guest: &Guest) -> Result<()> {
    guest.ok("dd if=/dev/urandom of=/run/data bs=1M count=8 2>/dev/null; \
         sha256sum /run/data > /run/hash; \
         guest-agent clocks /run/clocks </dev/null >/dev/null 2>&1 & \
         until [ -s /run/clocks ]; do sleep 0.1; done")?;
    Ok(())
}

/// What the guest has counted: looks at its clocks, steps backwards, the longest gap, and how far
/// the time of day has left the monotonic clock.
fn clocks(guest: &Guest) -> Result<[i64; 4]> {
    let text = guest.ok("cat /run/clocks")?;
    let numbers: Vec<i64> = text.split_whitespace().map_while(|word| word.parse().ok()).collect();
    numbers.try_into().map_err(|_| anyhow::anyhow!("no clocks: {text:?}"))
}

/// The guest goes on from where it was: it counts on, its clocks are right, its memory is whole.
fn check(guest: &Guest, before: [i64; 4]) -> Result<()> {
    let mut now = clocks(guest)?;
    for _ in 0..600 {
        if now[0] > before[0] + 4 {
            break;
        }
        guest.ok("sleep 0.1")?;
        now = clocks(guest)?;
    }
    let [looks, backwards, longest, apart] = now;
    ensure!(looks > before[0], "the guest counts no more: {before:?}, {now:?}");
    ensure!(backwards == 0, "a clock ran backwards {backwards} times");
    ensure!(longest < GAP_MS, "a clock jumped by {longest} ms");
    ensure!(apart.abs() < 1000, "the time of day left the monotonic clock by {apart} ms");
    guest.ok("sha256sum -c /run/hash").context("the guest's memory has changed")?;
    Ok(())
}

/// The guest's time of day less that of L1, in seconds.
fn behind(l1: &L1, guest: &Guest) -> Result<i64> {
    let seconds = |guest: &Guest| -> Result<i64> { Ok(guest.ok("date +%s")?.trim().parse()?) };
    Ok(seconds(guest)? - seconds(&l1.guest)?)
}

/// Saves the guest to a file, and returns what the command tells. `words` are more for it.
pub(super) fn save(l1: &L1, l2: &L2, file: &str, words: &str) -> Result<Value> {
    let control = l2.control_socket();
    let told = l1
        .guest
        .start(&format!("exec vbus-vmm snapshot --control {control} {file} --json {words}"))?
        .ok(MOVE)?;
    let told: Value = serde_json::from_str(&told)?;
    let bytes: u64 = l1.guest.ok(&format!("stat -c %s {file}"))?.trim().parse()?;
    ensure!(told["bytes"] == bytes, "the file has {bytes} bytes: {told}");
    Ok(told)
}

/// Moves a guest to another process of `vbus-vmm`, and returns that and what the command tells.
pub(super) fn relocate<'a>(l1: &'a L1<'a>, l2: L2<'a>, to: &L2Spec) -> Result<(L2<'a>, Value)> {
    let socket = format!("{}/{}.moved", l1.run_dir(), to.name);
    let there = to.restore(l1, &format!("--listen {socket}"))?;
    l1.guest.ok(&format!("until [ -S {socket} ]; do sleep 0.05; done"))?;
    let control = l2.control_socket();
    let told = l1
        .guest
        .start(&format!("exec vbus-vmm migrate --control {control} --to {socket} --json"))?
        .ok(MOVE)?;
    let said = l2.vmm.said().1;
    let times = said.lines().find(|line| line.contains("stood still")).unwrap_or_default();
    eprintln!("{times}");
    l2.moved().context("the machine that was moved")?;
    Ok((there.join()?, serde_json::from_str(&told)?))
}

/// A Linux guest with two CPUs is saved and goes on; is killed and restored; and is moved to
/// another process and back. It counts on, no clock of it runs backwards, and its memory is whole.
pub fn snapshot(l1: &L1, figures: &mut Figures) -> Result<()> {
    let spec = L2Spec { cpus: 2, memory_mib: 256, ..L2Spec::new("linux") };
    let there = L2Spec { name: "there", ..spec.clone() };
    let file = format!("{}/saved", l1.run_dir());
    let l2 = spec.boot(l1)?;
    prepare(&l2.guest)?;
    let before = clocks(&l2.guest)?;
    let told = save(l1, &l2, &file, "")?;
    eprintln!("a snapshot: {told}");
    figures.insert("snapshot".into(), told);
    check(&l2.guest, before).context("after the snapshot")?;
    l2.guest.ok("touch /run/later")?;
    l2.kill()?;

    refuse(l1, &file)?;
    let restored = spec.restore(l1, &file)?;
    let mut l2 = restored.join().context("the guest that was restored does not answer")?;
    l2.guest.ok("[ ! -e /run/later ]").context("it knows what came after the snapshot")?;
    check(&l2.guest, before).context("after it was restored")?;

    let times = l1.lab().times().unwrap_or(1);
    let mut down = Vec::new();
    for turn in 0..times {
        for (to, way) in [(&there, "there"), (&spec, "back")] {
            let began = Instant::now();
            let (before, off) = (clocks(&l2.guest)?, behind(l1, &l2.guest)?);
            let (moved, told) = relocate(l1, l2, to)?;
            l2 = moved;
            eprintln!("{way} ({turn}), in {:.1} s: {told}", began.elapsed().as_secs_f32());
            check(&l2.guest, before).with_context(|| format!("moved {way} ({turn})"))?;
            let drift = behind(l1, &l2.guest)? - off;
            ensure!(drift.abs() <= 60, "the time of day has gone off by {drift} s");
            down.push(told["down_time_ms"].clone());
        }
    }
    figures.insert("down-time of moves in ms".into(), down.into());
    fail(l1, &l2)?;
    check(&l2.guest, clocks(&l2.guest)?).context("after a move that failed")?;
    l2.power_off()
}

/// What is no saved machine, or that of another one, is refused with its reason.
fn refuse(l1: &L1, file: &str) -> Result<()> {
    let fault = |words: &str| -> Result<String> {
        let said = l1.guest.run(&format!("vbus-vmm restore {words} --serial none"))?;
        ensure!(said.code == 1, "{words} is accepted: {said:?}");
        Ok(said.stderr)
    };
    let cut = format!("{file}.cut");
    l1.guest.ok(&format!("head -c 1000000 {file} > {cut}"))?;
    // A byte more, and as many as a section has.
    let more = [1, 16].map(|count| (format!("{file}.{count}"), count));
    for (longer, count) in &more {
        l1.guest.ok(&format!("cp {file} {longer}; head -c {count} /dev/zero >> {longer}"))?;
    }
    for (words, reason) in [
        (format!("{file} --cpus 1"), "has 2 virtual CPUs, not 1"),
        (format!("{file} --memory 128"), "256 MiB of memory, not 128"),
        (format!("{file} --device net=/nowhere"), "no devices net"),
        (cut.clone(), "cut off"),
        (more[0].0.clone(), "more after its end"),
        (more[1].0.clone(), "more after its end"),
        ("/bin/vbus-vmm".into(), "no saved machine"),
        ("/nowhere".into(), "cannot restore /nowhere"),
    ] {
        let said = fault(&words)?;
        ensure!(said.contains(reason), "{words}: {said}");
    }
    // They are in memory.
    l1.guest.ok(&format!("rm {cut} {} {}", more[0].0, more[1].0)).map(drop)
}

/// Moves that fail leave the guest where it is: the receiver refuses, is not there, or is killed,
/// and the command is interrupted.
fn fail(l1: &L1, l2: &L2) -> Result<()> {
    let (run, control) = (l1.run_dir(), l2.control_socket());
    let socket = format!("{run}/fail.moved");
    let migrate = format!("vbus-vmm migrate --control {control} --to {socket}");
    let nobody = l1.guest.run(&migrate)?;
    ensure!(nobody.code == 1 && nobody.stderr.contains("nobody listens"), "{nobody:?}");
    // The receiver insists on another machine.
    let listen = format!("vbus-vmm restore --listen {socket} --serial none");
    let receiver = l1.guest.start(&format!("exec {listen} --cpus 1"))?;
    l1.guest.ok(&format!("until [ -S {socket} ]; do sleep 0.05; done"))?;
    let refused = l1.guest.run(&migrate)?;
    ensure!(refused.code == 1 && refused.stderr.contains("2 virtual CPUs, not 1"), "{refused:?}");
    ensure!(receiver.wait(MOVE)?.code == 1, "the receiver ends with an error");
    // A receiver that takes nothing, until the command is interrupted.
    let receiver = l1.guest.start(&format!("exec guest-agent accept {socket}"))?;
    l1.guest.ok(&format!("until [ -S {socket} ]; do sleep 0.05; done"))?;
    let asking = l1.guest.start(&format!("echo $$ > {run}/asking; exec {migrate}"))?;
    receiver.wait_for("connected", MOVE)?;
    l1.guest.ok(&format!("kill -INT $(cat {run}/asking)"))?;
    let ended = asking.wait(MOVE)?;
    ensure!(ended.code == 1 && ended.stderr.contains("ended by a signal"), "{ended:?}");
    receiver.kill()?;
    receiver.wait(MOVE)?;
    l2.guest.ok("true").map(drop).context("the guest does not go on")
}
