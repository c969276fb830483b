// SPDX-License-Identifier: Apache-2.0 OR MIT
//! L1: a Linux with a real KVM and with our programs.

use std::cell::{Cell, RefCell};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::guest::Guest;
use crate::initramfs::{self, Archive};
use crate::kit::Kit;
use crate::lab::{Accel, Lab, Scene};
use crate::lost;
use crate::process::{Process, command_line};
use crate::put::Put;
use crate::report::Skip;
use crate::system::System;
use crate::vm::{BOOT, Listener, Processor, Vm, VmSpec};

/// What L1's clock follows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The host's clock. L1 has two CPUs.
    Time,
    /// The count of instructions that the only CPU has executed: figures repeat from run to run.
    /// L1 is always emulated then.
    Instructions,
}

/// How long L1 may be silent before it counts as hung. It answers within a millisecond if it gets
/// processor time.
const SILENCE: Duration = Duration::from_secs(90);

/// The kernel modules for L1: KVM on AMD's SVM, the disk from which L1 reads QEMU, virtio-net's
/// other end in the kernel, and the bridge between the buses of a guest that moves.
const MODULES: [&str; 4] = ["kvm_amd", "virtio_blk", "vhost_net", "bridge"];

/// A running L1. Dropping it ends it.
pub struct L1<'a> {
    /// Runs commands in it.
    pub guest: Guest,
    scene: Scene<'a>,
    kind: L1Kind,
    clock: Clock,
    /// Whether an L2 hung or was lost; see [`L1::hung`].
    l2_hung: Cell<bool>,
    /// See [`L1::proof`].
    proof: RefCell<Option<String>>,
    /// The bytes of L1's console that are from before the attempt; see [`L1::begin`].
    console_before: Cell<usize>,
}

/// Where L1 runs.
enum L1Kind {
    /// In a virtual machine of its own.
    Vm(Box<Vm>),
    /// On the host, in namespaces of its own.
    Host(#[expect(dead_code, reason = "it lives as long as L1")] Process),
}

impl<'a> L1<'a> {
    /// Starts L1 and waits until its agent answers. Its guests boot what all guests of the lab do.
    pub fn start(scene: Scene<'a>, clock: Clock, files: &[Put]) -> Result<Self> {
        let l2 = scene.lab.system();
        Self::start_with(scene, clock, files, l2)
    }

    /// The same with guests that boot `l2`.
    pub fn start_with(scene: Scene<'a>, clock: Clock, files: &[Put], l2: &System) -> Result<Self> {
        let (guest, kind) = if clock == Clock::Time && scene.lab.accel() == Accel::Kvm {
            let (guest, agent) = start_on_host(&scene, files, l2)?;
            (guest, L1Kind::Host(agent))
        } else {
            let vm = machine(&scene, clock, files, l2)?.start(&scene)?;
            (vm.guest.clone(), L1Kind::Vm(Box::new(vm)))
        };
        guest.wait_boot(1, BOOT)?;
        guest.watch(SILENCE);
        guest.ok("test -c /dev/kvm").context("no /dev/kvm came up")?;
        if let L1Kind::Vm(_) = kind {
            // Linux patches code of its scheduler when the first virtual machine starts and when
            // the last one ends. On two emulated processors it sometimes dies of that
            // ("Oops: int3"). The virtual machine that `hold-kvm` keeps prevents both.
            guest.start("exec guest-agent hold-kvm")?.wait_for("held", BOOT)?;
        }
        let l1 = Self {
            guest,
            scene,
            kind,
            clock,
            l2_hung: Cell::new(false),
            proof: RefCell::default(),
            console_before: Cell::default(),
        };
        l1.guest.ok(&format!("mkdir -p {}", l1.run_dir()))?;
        Ok(l1)
    }

    /// The folder in L1 for sockets and logs.
    pub fn run_dir(&self) -> String {
        match self.kind {
            L1Kind::Vm(_) => "/run/vbus".into(),
            L1Kind::Host(_) => self.scene.dir().join("run").display().to_string(),
        }
    }

    /// The folder in L1 that holds the L2's kernel (`kernel`), its root file system (`initramfs`),
    /// and the guest without an operating system (`flat`).
    pub fn l2_dir(&self) -> String {
        match self.kind {
            L1Kind::Vm(_) => "/l2".into(),
            L1Kind::Host(_) => self.scene.dir().join("l2").display().to_string(),
        }
    }

    /// Unpacks QEMU in L1, if L1 does not have it yet.
    pub fn unpack_qemu(&self) -> Result<()> {
        let unpack = "command -v qemu-system-x86_64 >/dev/null || (cd / && cpio -idu < /dev/vda)";
        self.guest.ok(unpack).map(drop).context("L1 has no QEMU")
    }

    /// A counter of L1's KVM, summed over all of its guests.
    pub fn kvm_stat(&self, name: &str) -> Result<u64> {
        let debug = "/sys/kernel/debug";
        let mounted = format!("[ -d {debug}/kvm ] || mount -t debugfs debugfs {debug}");
        if self.guest.run(&mounted)?.code != 0 {
            return Err(Skip("only root can read the statistics of this KVM".into()).into());
        }
        let text = self.guest.ok(&format!("cat {debug}/kvm/{name}"))?;
        text.trim().parse().with_context(|| format!("KVM's counter {name} is {text:?}"))
    }

    /// The command prefix for a program that runs virtual CPUs in L1.
    ///
    /// It keeps the program off the first processor of an emulated L1, because of a fault in QEMU
    /// 11. Every emulated processor calls `cpu_clear_ignne` when it loads its FPU state, which
    /// happens at each task switch. That function clears bit 7 (IGNNE) of `hflags2` of the *first*
    /// processor, and the update is not atomic. If the first processor enters or leaves a guest at
    /// that moment, the update that VMRUN or #VMEXIT made to the same word is lost.
    ///
    /// A debugger showed two results. L1 ran on with nested paging: its next fetch caused a second
    /// #VMEXIT, which replaced the guest's registers by L1's. Or a guest ran without nested paging.
    /// Both end in a triple fault or in code at a wrong address. One of ten runs under load lost
    /// its guest in this way.
    pub fn guest_processor(&self) -> &'static str {
        match self.kind {
            L1Kind::Vm(_) if self.clock == Clock::Time => "taskset 2 ",
            _ => "",
        }
    }

    /// Begins another scenario in this L1. What was there before proves nothing about it.
    pub fn begin(&self) {
        self.proof.take();
        self.console_before.set(self.console().map_or(0, |log| log.len()));
    }

    /// What the console of a virtual machine has said.
    fn console(&self) -> Option<Vec<u8>> {
        match &self.kind {
            L1Kind::Vm(_) => fs::read(self.scene.dir().join("l1.console.log")).ok(),
            L1Kind::Host(_) => None,
        }
    }

    /// What shows that the emulated processor did something that no processor does, if anything
    /// does: what [`L1::prove`] got, or a fault of L1's own kernel, which no program in L1 can
    /// cause. It is from after [`L1::begin`]. A machine that merely hangs shows nothing.
    pub fn proof(&self) -> Option<String> {
        let proof = self.proof.borrow().clone();
        proof.or_else(|| {
            let log = self.console()?;
            kernel_fault(&String::from_utf8_lossy(log.get(self.console_before.get()..)?))
        })
    }

    /// Notes a proof that the emulated processor failed; see [`L1::proof`].
    pub fn prove(&self, proof: String) {
        self.proof.borrow_mut().get_or_insert(proof);
    }

    /// Whether L1 or an L2 has hung, or L1 has rebooted by itself. [`L1::look`] then has something
    /// to find.
    pub fn hung(&self) -> bool {
        self.l2_hung.get() || self.guest.hung() || self.guest.boots() > 1
    }

    /// Notes that an L2 hung, or that the emulated processor lost it in a triple fault.
    pub fn note_hang(&self) {
        self.l2_hung.set(true);
    }

    /// The lab that L1 was started from.
    pub fn lab(&self) -> &'a Lab {
        self.scene.lab
    }

    /// One line that says which KVM and which Linux this is.
    pub fn describe(&self) -> Result<String> {
        let kernel = self.guest.ok("uname -r")?;
        let place = match self.kind {
            L1Kind::Vm(_) => "QEMU's emulated SVM",
            L1Kind::Host(_) => "the host's own KVM",
        };
        Ok(format!("{place}, Linux {}", kernel.trim()))
    }

    /// Whether L1 is a virtual machine with emulated SVM. Otherwise it is this host.
    pub fn is_emulated(&self) -> bool {
        matches!(self.kind, L1Kind::Vm(_))
    }

    /// Keeps what was found out about a machine among the logs.
    pub fn keep(&self, name: &str, text: &str) {
        // Without it the logs still have the rest.
        let _ = fs::write(self.scene.dir().join(format!("{name}.lost.log")), text);
    }

    /// Finds out what L1 itself does, and keeps it among the logs.
    pub fn look(&self) {
        if let L1Kind::Vm(vm) = &self.kind {
            let cpus = if self.clock == Clock::Time { 2 } else { 1 };
            self.keep("l1", &lost::under_qemu(vm.qmp_socket(), cpus));
        }
    }

    /// Copies the logs to a folder that outlives the run, and returns that folder. The logs inside
    /// L1 are among them if L1 answers.
    pub fn save_logs(&self) -> Result<PathBuf> {
        let list =
            self.guest.run(&format!("cd {} && ls *.log", self.run_dir())).unwrap_or_default();
        for name in list.stdout.lines() {
            let log = self
                .guest
                .run(&format!("tail -c 65536 {}/{name}", self.run_dir()))
                .unwrap_or_default();
            fs::write(self.scene.dir().join(name), log.stdout)?;
        }
        self.scene.save_logs()
    }
}

/// The report of a kernel's fault in its console's log: its first line, and those that follow.
/// A program of ours that dies is none: the kernel reports it as `traps:`, and panics if the
/// program was init.
fn kernel_fault(log: &str) -> Option<String> {
    const LINES: usize = 30;
    const FAULTS: [&str; 3] = ["Oops:", "Kernel panic", "general protection fault"];
    const OF_A_PROGRAM: [&str; 2] = ["traps: ", "Attempted to kill init"];
    let has = |line: &str, pieces: &[&str]| pieces.iter().any(|piece| line.contains(piece));
    let is_fault = |line: &&str| has(line, &FAULTS) && !has(line, &OF_A_PROGRAM);
    let lines = log.lines().skip_while(|line| !is_fault(line)).take(LINES).collect::<Vec<_>>();
    (!lines.is_empty()).then(|| lines.join("\n"))
}

/// The virtual machine with emulated SVM.
fn machine(scene: &Scene, clock: Clock, files: &[Put], l2: &System) -> Result<VmSpec> {
    let lab = scene.lab;
    let mut archive = Archive::default();
    lab.system().add_modules(&mut archive, &MODULES)?;
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    archive.file("bin/vbus", 0o755, &read(lab.vbus())?)?;
    archive.file("bin/vbus-vmm", 0o755, &read(&lab.vmm()?)?)?;
    archive.file("bin/vbus-kvm-tests", 0o755, &read(&lab.kvm_tests()?)?)?;
    archive.file("l2/kernel", 0o644, &read(l2.kernel())?)?;
    archive.file("l2/initramfs", 0o644, &read(l2.initramfs())?)?;
    archive.file("l2/flat", 0o644, &read(&lab.flat()?)?)?;
    for file in files {
        file.add_to(&mut archive)?;
    }
    let system = scene.extend(archive)?;

    let mut machine = VmSpec::new("l1");
    if let Some(kit) = lab.kit() {
        let disk = scene.dir().join("qemu.cpio");
        fs::write(&disk, qemu_archive(kit)?)?;
        machine.args = vec![
            "-drive".into(),
            format!("file={},format=raw,if=virtio,readonly=on,file.locking=off", disk.display()),
        ];
    }
    machine.memory_mib = 2048;
    machine.slots = 0;
    machine.share = false;
    machine.system = Some(system);
    // The kernel puts words that it does not know into the environment of init.
    machine.append = "L2=/l2 oops=panic".into();
    (machine.cpus, machine.processor) = match clock {
        Clock::Time => (2, Processor::Svm),
        Clock::Instructions => (1, Processor::CountedSvm),
    };
    Ok(machine)
}

/// An archive of QEMU with its libraries and firmware. It is on a disk, not in the root file
/// system, because only some scenarios need it.
fn qemu_archive(kit: &Kit) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    initramfs::add_program(&mut archive, kit.root(), "bin", "qemu-system-x86_64")?;
    for firmware in ["qemu/kvmvapic.bin", "qemu/linuxboot_dma.bin", "seabios/bios-256k.bin"] {
        let path = kit.root().join("usr/share").join(firmware);
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        archive.file(&format!("usr/share/{firmware}"), 0o644, &bytes)?;
    }
    let mut bytes = archive.finish()?;
    // A disk consists of whole sectors.
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    Ok(bytes)
}

/// Starts an agent on the host. It is root in user, network, mount and process namespaces of its
/// own.
fn start_on_host(scene: &Scene, files: &[Put], system: &System) -> Result<(Guest, Process)> {
    let lab = scene.lab;
    let (root, l2, bin) =
        (scene.dir().join("root"), scene.dir().join("l2"), scene.dir().join("bin"));
    for dir in [&root, &l2, &bin] {
        fs::create_dir_all(dir)?;
    }
    // Busybox comes first on the PATH: commands mean the same as in a virtual machine.
    let mut busybox = lab.busybox();
    let installed =
        busybox.args(["--install", "-s"]).arg(&bin).status().context("cannot run busybox")?;
    ensure!(installed.success(), "busybox --install failed ({installed})");
    let link = |source: &Path, target: PathBuf| {
        let source = fs::canonicalize(source)
            .with_context(|| format!("there is no {}", source.display()))?;
        let _ = fs::remove_file(&target);
        std::os::unix::fs::symlink(&source, &target)
            .with_context(|| format!("cannot make {}", target.display()))
    };
    link(lab.vbus(), bin.join("vbus"))?;
    link(&lab.vmm()?, bin.join("vbus-vmm"))?;
    link(&lab.kvm_tests()?, bin.join("vbus-kvm-tests"))?;
    link(lab.agent(), bin.join("guest-agent"))?;
    fs::write(bin.join("qemu-system-x86_64"), script(&lab.qemu()))?;
    fs::set_permissions(bin.join("qemu-system-x86_64"), fs::Permissions::from_mode(0o755))?;
    link(system.kernel(), l2.join("kernel"))?;
    link(system.initramfs(), l2.join("initramfs"))?;
    link(&lab.flat()?, l2.join("flat"))?;
    for file in files {
        let name = file
            .target
            .strip_prefix("root/")
            .with_context(|| format!("/{} is the host's", file.target))?;
        let target = root.join(name);
        fs::write(&target, file.read()?)
            .with_context(|| format!("cannot write {}", target.display()))?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755))?;
    }

    let listener = Listener::new(scene.dir().join("agent"))?;
    // The agent ends when its socket closes. It is the first process of its namespace, so the
    // kernel then ends all processes that it has started.
    let mut command = lab.busybox();
    command.args(["unshare", "-n", "-m", "-p", "-f", "--mount-proc"]);
    if !rustix::process::geteuid().is_root() {
        command.arg("-r");
    }
    command.arg(lab.agent()).arg("serve").arg(listener.path());
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{}:{path}", root.display(), bin.display()));
    command.env("L2", &l2).env("HOME", &root).current_dir(&root);
    let mut process =
        Process::start(command, "the agent on the host", &scene.dir().join("agent.log"))?;
    let port = listener.accept(&mut process)?;
    let guest = Guest::new("l1", port)?;
    guest.wait_boot(1, BOOT)?;
    guest.ok("ip link set lo up")?;
    Ok((guest, process))
}

/// A shell script that runs `command` with the script's own arguments added.
fn script(command: &Command) -> String {
    format!("#!/bin/sh\nexec {} \"$@\"\n", command_line(command))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_report_of_a_fault_is_one() {
        assert_eq!(kernel_fault("[ 1.0] virtio_blk: 1 MiB\n[ 2.0] kvm_amd: nested paging\n"), None);
        let fault = kernel_fault("[ 1.0] up\n[ 2.0] Oops: int3: 0000 [#1] SMP\n[ 2.0] CPU: 1\n");
        assert_eq!(fault.as_deref(), Some("[ 2.0] Oops: int3: 0000 [#1] SMP\n[ 2.0] CPU: 1"));
        let fault = kernel_fault("[ 2.0] general protection fault: 0000 [#1] SMP\n");
        assert_eq!(fault.as_deref(), Some("[ 2.0] general protection fault: 0000 [#1] SMP"));
        let program = "[ 2.0] traps: vbus[77] general protection fault ip:401000 sp:7ffc error:0\n\
                       [ 2.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0xb\n";
        assert_eq!(kernel_fault(program), None);
    }
}
