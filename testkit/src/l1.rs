//! L1: a Linux with a real KVM, and our programs.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::guest::Guest;
use crate::initramfs::{self, Archive};
use crate::kit::Kit;
use crate::lab::{Accel, Lab, Scene};
use crate::machine::{BOOT, Machine, Processor, Vm};
use crate::process::{Process, command_line};
use crate::put::Put;
use crate::report::Skip;

/// By what L1's time goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// By the host's, on two CPUs.
    Time,
    /// By the instructions carried out on the only CPU, so that figures repeat. Always under
    /// emulation.
    Instructions,
}

/// How long L1 may say nothing before it counts as hung. It answers within a millisecond unless it
/// has no processor.
const SILENCE: Duration = Duration::from_secs(90);

/// The modules that make a machine with SVM a KVM host, and the one for files brought along on a
/// disk.
const MODULES: [&str; 2] = ["kvm_amd", "virtio_blk"];

/// A running L1.
pub struct Rig<'a> {
    /// Runs commands in it.
    pub guest: Guest,
    scene: Scene<'a>,
    place: Place,
    clock: Clock,
    /// A guest in L1 hung or was lost, see [`Rig::hung`].
    inner_hung: Cell<bool>,
}

/// Where L1 is.
enum Place {
    /// In a machine of its own.
    Machine(#[expect(dead_code, reason = "it lives as long as the rig")] Box<Vm>),
    /// On the host, in name spaces of its own.
    Host(#[expect(dead_code, reason = "it lives as long as the rig")] Process),
}

impl<'a> Rig<'a> {
    /// Starts L1 and waits until its agent answers.
    pub fn start(scene: Scene<'a>, clock: Clock, files: &[Put]) -> Result<Self> {
        let (guest, place) = if clock == Clock::Time && scene.lab.accel() == Accel::Kvm {
            let (guest, agent) = start_on_host(&scene, files)?;
            (guest, Place::Host(agent))
        } else {
            let vm = machine(&scene, clock, files)?.start(&scene)?;
            (vm.guest.clone(), Place::Machine(Box::new(vm)))
        };
        guest.wait_boot(1, BOOT)?;
        guest.watch(SILENCE);
        guest.ok("test -c /dev/kvm").context("no /dev/kvm came up")?;
        if let Place::Machine(_) = place {
            // The first virtual machine and the last one patch code of the scheduler, from which
            // Linux on two emulated processors dies now and then ("Oops: int3"). With one that
            // stays, no other is the first or the last.
            guest.start("exec guest-agent hold-kvm")?.wait_for("held", BOOT)?;
        }
        let rig = Self { guest, scene, place, clock, inner_hung: Cell::new(false) };
        rig.guest.ok(&format!("mkdir -p {}", rig.run_dir()))?;
        Ok(rig)
    }

    /// The folder in L1 for sockets and logs.
    pub fn run_dir(&self) -> String {
        match self.place {
            Place::Machine(_) => "/run/vbus".into(),
            Place::Host(_) => self.scene.dir().join("run").display().to_string(),
        }
    }

    /// The folder in L1 with the kernel and the root file system of its guests, and the guest
    /// without an operating system.
    pub fn l2_dir(&self) -> String {
        match self.place {
            Place::Machine(_) => "/l2".into(),
            Place::Host(_) => self.scene.dir().join("l2").display().to_string(),
        }
    }

    /// Puts QEMU in its place in L1, if it is not there yet.
    pub fn unpack_qemu(&self) -> Result<()> {
        let unpack = "command -v qemu-system-x86_64 >/dev/null || (cd / && cpio -idu < /dev/vda)";
        self.guest.ok(unpack).map(drop).context("L1 has no QEMU")
    }

    /// A counter of KVM, summed over all guests of L1.
    pub fn kvm_stat(&self, name: &str) -> Result<u64> {
        let debug = "/sys/kernel/debug";
        let mounted = format!("[ -d {debug}/kvm ] || mount -t debugfs debugfs {debug}");
        if self.guest.run(&mounted)?.code != 0 {
            return Err(Skip(
                "the statistics of this KVM are not to be had: that takes root".into(),
            )
            .into());
        }
        let text = self.guest.ok(&format!("cat {debug}/kvm/{name}"))?;
        text.trim().parse().with_context(|| format!("KVM's counter {name} is {text:?}"))
    }

    /// What stands before a program on its command line that runs virtual CPUs.
    ///
    /// It keeps them off the first processor of an emulated L1. QEMU 11 has a flag there, bit 7 of
    /// `hflags2` (IGNNE), that every processor clears when it loads the state of its FPU, so at
    /// each change of tasks: `cpu_clear_ignne` takes it out of the *first* processor's word, and
    /// not atomically. If that one just enters or leaves a guest, what VMRUN or #VMEXIT has changed
    /// in the same word is lost. Seen, in a debugger: L1 with nested paging left on, whose next
    /// fetch is a second #VMEXIT that puts L1's own registers in the place of the guest's; and a
    /// guest with nested paging off. It ends in a triple fault, or in whatever is at the wrong
    /// address. Guests under load were lost in one of ten runs.
    pub fn guest_processor(&self) -> &'static str {
        match self.place {
            Place::Machine(_) if self.clock == Clock::Time => "taskset 2 ",
            _ => "",
        }
    }

    /// Whether L1 or a guest in it has hung, or begun anew by itself: a fault of the emulation as a
    /// rule, and no result of a test.
    pub fn hung(&self) -> bool {
        self.inner_hung.get() || self.guest.hung() || self.guest.boots() > 1
    }

    /// Notes that a guest in L1 hung, or that the emulated processor has lost it by a triple fault.
    pub fn note_hang(&self) {
        self.inner_hung.set(true);
    }

    /// The lab that it was started from.
    pub fn lab(&self) -> &'a Lab {
        self.scene.lab
    }

    /// A line about what this is.
    pub fn describe(&self) -> Result<String> {
        let kernel = self.guest.ok("uname -r")?;
        let place = match self.place {
            Place::Machine(_) => "QEMU's emulated SVM",
            Place::Host(_) => "the host's own KVM",
        };
        Ok(format!("{place}, Linux {}", kernel.trim()))
    }

    /// Whether L1 is a machine of QEMU's own making, and not the host.
    pub fn is_emulated(&self) -> bool {
        matches!(self.place, Place::Machine(_))
    }

    /// Copies the logs, those in L1 too if it answers, to where they outlive the run; returns that
    /// folder.
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

/// The machine with emulated SVM.
fn machine(scene: &Scene, clock: Clock, files: &[Put]) -> Result<Machine> {
    let lab = scene.lab;
    let mut archive = Archive::default();
    lab.add_modules(&mut archive, &MODULES)?;
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    archive.file("bin/vbus", 0o755, &read(lab.vbus())?)?;
    archive.file("bin/vbus-vmm", 0o755, &read(&lab.vmm()?)?)?;
    archive.file("bin/vbus-kvm-tests", 0o755, &read(&lab.kvm_tests()?)?)?;
    archive.file("l2/kernel", 0o644, &read(lab.kernel())?)?;
    archive.file("l2/initramfs", 0o644, &read(lab.initramfs())?)?;
    archive.file("l2/flat", 0o644, &read(&lab.flat()?)?)?;
    for file in files {
        file.add_to(&mut archive)?;
    }
    let initramfs = scene.extend_initramfs(archive)?;

    let mut machine = Machine::new("l1");
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
    machine.initramfs = Some(initramfs);
    // The kernel hands words that it does not know to init as its environment.
    machine.append = "L2=/l2 oops=panic".into();
    (machine.cpus, machine.processor) = match clock {
        Clock::Time => (2, Processor::Svm),
        Clock::Instructions => (1, Processor::CountedSvm),
    };
    Ok(machine)
}

/// QEMU with its libraries and firmware, on a disk of its own since only some scenarios need it.
fn qemu_archive(kit: &Kit) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    initramfs::add_program(&mut archive, kit, "qemu-system-x86_64")?;
    for firmware in ["qemu/kvmvapic.bin", "qemu/linuxboot_dma.bin", "seabios/bios-256k.bin"] {
        let path = kit.root().join("usr/share").join(firmware);
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        archive.file(&format!("usr/share/{firmware}"), 0o644, &bytes)?;
    }
    let mut bytes = archive.finish()?;
    // A disk is made of sectors.
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    Ok(bytes)
}

/// An agent on the host, root in user, network and mount name spaces of its own.
fn start_on_host(scene: &Scene, files: &[Put]) -> Result<(Guest, Process)> {
    let lab = scene.lab;
    let (root, l2, bin) =
        (scene.dir().join("root"), scene.dir().join("l2"), scene.dir().join("bin"));
    for dir in [&root, &l2, &bin] {
        fs::create_dir_all(dir)?;
    }
    // The applets of busybox come first, so that commands mean the same as in a machine.
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
    link(lab.kernel(), l2.join("kernel"))?;
    link(lab.initramfs(), l2.join("initramfs"))?;
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

    let socket = scene.dir().join("agent");
    let listener = UnixListener::bind(&socket)?;
    // The agent ends with its socket, and with it, since it is the first of their name space, all
    // that it has started.
    let mut command = lab.busybox();
    command.args(["unshare", "-n", "-m", "-p", "-f", "--mount-proc"]);
    if !rustix::process::geteuid().is_root() {
        command.arg("-r");
    }
    command.arg(lab.agent()).arg("serve").arg(&socket);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{}:{path}", root.display(), bin.display()));
    command.env("L2", &l2).env("HOME", &root).current_dir(&root);
    let mut process =
        Process::start(command, "the agent on the host", &scene.dir().join("agent.log"))?;
    listener.set_nonblocking(true)?;
    let until = Instant::now() + Duration::from_secs(30);
    let port = loop {
        if let Ok((port, _)) = listener.accept() {
            break port;
        }
        if let Some(status) = process.ended()? {
            return Err(process.complaint(&format!("ended at once ({status})")));
        }
        ensure!(Instant::now() < until, process.complaint("does not connect"));
        std::thread::sleep(Duration::from_millis(10));
    };
    port.set_nonblocking(false)?;
    let guest = Guest::new("l1", port)?;
    guest.wait_boot(1, BOOT)?;
    guest.ok("ip link set lo up")?;
    Ok((guest, process))
}

/// A shell script that runs `command` with the arguments it is given.
fn script(command: &Command) -> String {
    format!("#!/bin/sh\nexec {} \"$@\"\n", command_line(command))
}
