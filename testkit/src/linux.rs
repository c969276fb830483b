// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests that drive their devices with the Linux driver, the kernel module `vbus`.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::guest::Guest;
use crate::initramfs::{self, Archive};
use crate::kit::kernels::{DebianKernel, Flavour, Series};
use crate::lab::{KernelChoice, Scene};
use crate::module;
use crate::report::Skip;
use crate::system::System;

/// Where the module is in a guest.
pub const MODULE: &str = "/lib/vbus.ko";

/// iproute2's `ip` in a guest. The shell of busybox takes its own `ip` for the name alone, and that
/// one knows no namespaces.
pub const IP: &str = "/usr/local/bin/ip";

/// What Linux writes to its log when something is wrong with it.
const FAULTS: [&str; 14] = [
    "WARNING:",
    "BUG:",
    "UBSAN:",
    "INFO: trying to register non-static key",
    STALL,
    "Oops",
    "Call Trace",
    "general protection fault",
    "blocked for more than",
    "corruption",
    " violation",
    "DMA-API",
    "DMAR: [",
    "Unknown symbol",
];

/// What a kernel that checks DMA says at boot.
const NO_FAULTS: [&str; 2] = ["DMA-API: preallocated", "DMA-API: debugging enabled"];

/// What RCU writes if a processor has not let go of the kernel for long. On an emulated machine
/// that waits for the host's processors, that alone is no fault of anybody.
const STALL: &str = "detected stall";

/// The ends of the traces in a report of RCU, and what a line has if another trace follows.
const TRACE_END: &str = "</TASK>";
const MORE_TRACES: [&str; 4] = ["rcu:", "Sending NMI", "NMI backtrace", "] CPU:"];

/// The line around the reports of KASAN and KCSAN.
const FRAME: &str = "==========";

/// Prints the memory that a kernel with kmemleak has lost; nothing in other kernels. Memory counts
/// as lost five seconds after it was allocated, and if two scans find no pointer to it.
const LEAKS: &str = "mount -t debugfs debugfs /sys/kernel/debug 2> /dev/null; \
    cd /sys/kernel/debug && [ -e kmemleak ] || exit 0; \
    sleep 6; echo scan > kmemleak && echo scan > kmemleak && cat kmemleak";

/// The bits of `/proc/sys/kernel/tainted` that a module from elsewhere sets: out of tree (4096) and
/// unsigned (8192).
const TAINT: u64 = 4096 | 8192;

/// How long loading or unloading the module may take.
const LIMIT: Duration = Duration::from_secs(120);

/// One of Debian's kernels with the module, and with the tools that a user of it has: ip, tc,
/// bpftool, kexec. The module is built if its sources have changed.
///
/// # Errors
/// The module does not build, or the kit cannot fetch what it needs. It is a [`Skip`] if the mirror
/// lacks the kernel, or if the options replace the whole kit.
pub fn system(scene: &Scene, kernel: DebianKernel) -> Result<System> {
    let base = scene.lab.debian(kernel)?;
    let module = module::build(kernel, scene.lab.options().mirror.as_deref())?;
    let release = base.kernel_version();
    ensure!(
        module.release == release,
        "the module is for Linux {}, and the guest has {release}: the mirror got a newer kernel \
         meanwhile; remove target/kit, and it is fetched anew",
        module.release
    );
    let mut archive = Archive::default();
    add(&mut archive, &module)?;
    if let Some(kit) = scene.lab.kit() {
        initramfs::add_tools(&mut archive, kit)?;
    }
    base.extend(archive, scene.dir())
}

/// The same with the kernel of `--kernel`, or Linux 6.12 without it.
///
/// # Errors
/// Those of [`system`]. It is a [`Skip`] if the kernel is a file of the user's.
pub fn chosen_system(scene: &Scene) -> Result<System> {
    match &scene.lab.options().kernel {
        Some(KernelChoice::Debian(kernel)) => system(scene, *kernel),
        None => system(scene, cloud(Series::V6_12)),
        Some(KernelChoice::File(path)) => {
            let why =
                format!("the module is built for Debian's kernels, not for {}", path.display());
            Err(Skip(why).into())
        }
    }
}

/// The kernel for a scenario that is about this series: that of `--kernel` if it is of the series,
/// and the cloud flavour otherwise.
pub fn kernel_of(scene: &Scene, series: Series) -> DebianKernel {
    match scene.lab.options().kernel {
        Some(KernelChoice::Debian(kernel)) if kernel.series == series => kernel,
        _ => cloud(series),
    }
}

fn cloud(series: Series) -> DebianKernel {
    DebianKernel { series, flavour: Flavour::Cloud }
}

/// What the guests of L1 boot, with the module beside it. It is the lab's kernel, for which the
/// module is built.
///
/// # Errors
/// Those of [`system`]. It is a [`Skip`] if the lab's kernel is another one.
pub fn lab_system(scene: &Scene) -> Result<System> {
    let base = scene.lab.system();
    let module = module::build(cloud(Series::V6_12), scene.lab.options().mirror.as_deref())?;
    let release = base.kernel_version();
    if module.release != release {
        let why = format!("the module is for Linux {}, the guests have {release}", module.release);
        return Err(Skip(why).into());
    }
    let mut archive = Archive::default();
    add(&mut archive, &module)?;
    let folder = scene.dir().join("l2");
    fs::create_dir_all(&folder)?;
    base.extend(archive, &folder)
}

/// Adds the module to a root file system.
fn add(archive: &mut Archive, module: &module::Module) -> Result<()> {
    let bytes =
        fs::read(&module.path).with_context(|| format!("cannot read {}", module.path.display()))?;
    archive.file(MODULE.trim_start_matches('/'), 0o644, &bytes)
}

/// Loads the module. `parameters` are its parameters.
///
/// # Errors
/// The kernel refuses it.
pub fn insert(guest: &Guest, parameters: &str) -> Result<()> {
    guest.start(&format!("insmod {MODULE} {parameters}"))?.ok(LIMIT).map(drop)
}

/// Unloads the module.
///
/// # Errors
/// The kernel refuses, or it does not come to an end.
pub fn remove(guest: &Guest) -> Result<()> {
    guest.start("rmmod vbus")?.ok(LIMIT).map(drop)
}

/// The PCI address of the function behind root port `slot` of a [`VmSpec`](crate::vm::VmSpec): the
/// first port leads to bus 1.
pub fn address(slot: usize) -> String {
    format!("0000:{:02x}:00.0", slot + 1)
}

/// The folder of that function in the guest's sysfs.
pub fn function(slot: usize) -> String {
    format!("/sys/bus/pci/devices/{}", address(slot))
}

/// The network interface of the function behind root port `slot`, once the driver has made it.
///
/// # Errors
/// The driver makes none.
pub fn interface(guest: &Guest, slot: usize) -> Result<String> {
    // virtio puts a device of its own between.
    let function = function(slot);
    let command = once(&format!("{{ ls {function}/net || ls {function}/virtio*/net; }}"));
    let name = guest.start(&command)?.ok(LIMIT);
    let name = name.with_context(|| format!("no interface of the device in slot {slot}"))?;
    Ok(name.trim().to_owned())
}

/// The network interface of the only device that the driver has made one for.
///
/// # Errors
/// The driver makes none, or more than one.
pub fn only_interface(guest: &Guest) -> Result<String> {
    let folders = "/sys/bus/pci/drivers/vbus/*/net";
    let name = guest.start(&once(&format!("ls {folders}")))?.ok(LIMIT).context("no interface")?;
    ensure!(name.lines().count() == 1, "one interface was expected: {name:?}");
    Ok(name.trim().to_owned())
}

/// A command that repeats another one until it succeeds, for a minute at most.
fn once(command: &str) -> String {
    format!("for i in $(seq 600); do {command} 2> /dev/null && exit; sleep 0.1; done; exit 1")
}

/// Checks that the guest's kernel has complained of nothing, and that nothing but the module's
/// origin taints it.
///
/// # Errors
/// It has. The error has the lines of its log.
pub fn check_kernel(guest: &Guest) -> Result<()> {
    let log = guest.ok("dmesg")?;
    let (log, races) = without_races(&log);
    let (log, stalls) = without_stalls(&log);
    if let Some(complaint) = complaint(&log) {
        anyhow::bail!("the guest's kernel complains:\n{complaint}");
    }
    if races > 0 {
        eprintln!("{races} data races in the guest's kernel, and none of them in the driver");
    }
    if stalls > 0 {
        eprintln!("{stalls} stalls in the guest's kernel, and none of them in the driver");
    }
    let lost = guest.start(LEAKS)?.ok(LIMIT)?;
    ensure!(lost.is_empty(), "the guest's kernel has lost memory:\n{lost}");
    let text = guest.ok("cat /proc/sys/kernel/tainted")?;
    let taint: u64 = text.trim().parse().with_context(|| format!("tainted is {text:?}"))?;
    ensure!(taint & !TAINT == 0, "the guest's kernel is tainted by {:#x}", taint & !TAINT);
    Ok(())
}

/// A kernel's log without the data races that KCSAN has found in the kernel alone, and their
/// number. A trace has the name of the module behind each of its functions.
fn without_races(log: &str) -> (String, usize) {
    let (mut kept, mut races) = (String::new(), 0);
    for piece in log.split_inclusive(FRAME) {
        if piece.contains("BUG: KCSAN:") && !piece.contains("[vbus]") {
            races += 1;
        } else {
            kept.push_str(piece);
        }
    }
    (kept, races)
}

/// A kernel's log without RCU's reports of stalls in which no trace leads through the driver, and
/// the number of these reports.
fn without_stalls(log: &str) -> (String, usize) {
    let (mut kept, mut stalls) = (String::new(), 0);
    let mut lines = log.split_inclusive('\n').peekable();
    while let Some(line) = lines.next() {
        if !line.contains(STALL) {
            kept.push_str(line);
            continue;
        }
        let mut report = line.to_owned();
        while let Some(line) = lines.next() {
            report.push_str(line);
            let goes_on = |next: &&str| {
                MORE_TRACES.iter().any(|text| next.contains(text)) && !next.contains(STALL)
            };
            if line.contains(TRACE_END) && !lines.peek().is_some_and(goes_on) {
                break;
            }
        }
        if report.contains("[vbus]") {
            kept.push_str(&report);
        } else {
            stalls += 1;
        }
    }
    (kept, stalls)
}

/// The first complaint in a kernel's log, with the lines after it.
fn complaint(log: &str) -> Option<String> {
    const LINES: usize = 40;
    let has = |line: &str, what: &[&str]| what.iter().any(|text| line.contains(text));
    let is_fault = |line: &&str| has(line, &FAULTS) && !has(line, &NO_FAULTS);
    let lines: Vec<&str> = log.lines().skip_while(|line| !is_fault(line)).take(LINES).collect();
    (!lines.is_empty()).then(|| lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_of_the_kernel_is_found() {
        let quiet =
            "[ 0.0] Linux version 6.1\n[ 1.0] vbus: loading out-of-tree module taints kernel.\n";
        assert_eq!(complaint(quiet), None);
        let log = format!(
            "{quiet}[ 2.0] WARNING: CPU: 0 PID: 1 at net/core/dev.c:1\n[ 2.0] Call Trace:\n"
        );
        let found = complaint(&log).unwrap_or_default();
        assert!(found.starts_with("[ 2.0] WARNING:") && found.ends_with("Call Trace:"), "{found}");
        assert_eq!(complaint("[ 0.5] DMA-API: preallocated 65536 debug entries\n"), None);
        assert!(complaint("[ 3.0] DMA-API: exceeded 7 overlapping mappings\n").is_some());
    }

    #[test]
    fn a_stall_counts_if_the_driver_has_a_part_in_it() {
        let stall = |function: &str| {
            format!(
                "[ 21.0] rcu: INFO: rcu_preempt self-detected stall on CPU\n\
                 [ 21.0] rcu: \t1-....: (2099 ticks this GP)\n[ 21.0] CPU: 1 PID: 88\n\
                 [ 21.0] Call Trace:\n[ 21.0]  <IRQ>\n[ 21.0]  </IRQ>\n[ 21.0]  <TASK>\n\
                 [ 21.0]  {function}\n[ 21.0]  </TASK>\n[ 21.0] Sending NMI from CPU 1 to CPUs 0:\n\
                 [ 21.0] NMI backtrace for cpu 0\n[ 21.0] Call Trace:\n[ 21.0]  <TASK>\n\
                 [ 21.0]  </TASK>\n"
            )
        };
        let (kernels, ours) = (stall("memset+0x1/0x2"), stall("shim_poll+0x1/0x2 [vbus]"));
        let (log, stalls) = without_stalls(&format!("{kernels}[ 22.0] vbus: well\n{kernels}"));
        assert_eq!((log.as_str(), stalls), ("[ 22.0] vbus: well\n", 2));
        let (log, stalls) = without_stalls(&format!("{kernels}{ours}{kernels}"));
        assert!(stalls == 2 && complaint(&log).is_some_and(|text| text.contains("shim_poll")));
        let warning = "[ 23.0] WARNING: CPU: 0 at net/core/dev.c:1\n";
        assert!(complaint(&without_stalls(&format!("{kernels}{warning}")).0).is_some());
    }

    #[test]
    fn a_data_race_counts_if_the_driver_has_a_part_in_it() {
        let race = |function: &str| {
            format!(
                "[ 3.0] {FRAME}{FRAME}\n[ 3.0] BUG: KCSAN: data-race in tcp_poll / {function}\n\
                 [ 3.0] Call Trace:\n[ 3.0]  {function}\n[ 3.0] {FRAME}{FRAME}\n"
            )
        };
        let (kernels, ours) = (race("tcp_sendmsg"), race("shim_poll+0x1/0x2 [vbus]"));
        let (log, races) = without_races(&format!("{kernels}[ 4.0] vbus: well\n{kernels}"));
        assert_eq!((complaint(&log), races), (None, 2));
        let (log, races) = without_races(&format!("{kernels}{ours}{kernels}"));
        assert!(races == 2 && complaint(&log).is_some_and(|text| text.contains("shim_poll")));
    }
}
