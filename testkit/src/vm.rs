// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtual machine under QEMU: its description, and the running machine with its control channel
//! and its agent.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::guest::Guest;
use crate::lab::{Accel, Scene};
use crate::process::{Process, command_line, tail};
use crate::qmp::Qmp;
use crate::system::System;

/// How long a guest may take to boot. It needs a few seconds, and more where many share a CPU.
pub const BOOT: Duration = Duration::from_secs(180);

/// How long a guest may take to let a device go, or to power itself off.
const LIMIT: Duration = Duration::from_secs(120);

/// The description of a virtual machine. The defaults suit most tests.
#[derive(Clone)]
pub struct VmSpec {
    /// The name of its sockets and logs.
    pub name: String,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// Its virtual CPUs.
    pub cpus: u32,
    /// Whether the devices can map the guest's memory (`share=on`).
    pub share: bool,
    /// The number of PCIe root ports, `slot0` and so on. Each takes one device.
    pub slots: usize,
    /// Whether the root ports are functions of one device, 8 at most: then all that is behind them
    /// shares one interrupt line.
    pub one_line: bool,
    /// The vfio-user sockets of the devices that are present at boot. The first is in `slot0` and
    /// has the id `dev0`.
    pub devices: Vec<PathBuf>,
    /// More words for QEMU's command line.
    pub args: Vec<String>,
    /// More words for the kernel's command line.
    pub append: String,
    /// What executes its instructions.
    pub processor: Processor,
    /// A kernel and root file system in place of the lab's.
    pub system: Option<System>,
    /// The unit that translates the addresses of devices, if there is one.
    pub iommu: Option<Iommu>,
    /// QEMU's words for what the machine boots, in place of a kernel with a root file system.
    pub boot: Option<Vec<String>>,
}

/// A unit that translates the addresses of devices. The guest decides what they reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Iommu {
    /// Intel's, VT-d.
    Intel,
    /// virtio's. The guest's root file system needs the module `virtio_iommu`.
    Virtio,
}

impl Iommu {
    /// QEMU's device.
    fn device(self) -> &'static str {
        match self {
            // The server of a device learns each mapping when the guest makes it.
            Self::Intel => "intel-iommu,intremap=off,caching-mode=on",
            Self::Virtio => "virtio-iommu-pci",
        }
    }
}

/// What executes a virtual machine's instructions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// The lab's accelerator.
    Lab,
    /// QEMU's translator with AMD's SVM: the guest has a KVM of its own. Each CPU has a thread of
    /// its own. With one thread for all CPUs QEMU loses a guest of that KVM when it switches CPUs
    /// while an interrupt is being injected.
    Svm,
    /// The same on one thread, with a clock that counts instructions: a run can be repeated.
    CountedSvm,
    /// QEMU's translator on one thread, counting instructions; see [`Vm::instructions`].
    Counted,
}

impl VmSpec {
    /// A virtual machine with the defaults.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            memory_mib: 384,
            cpus: 1,
            share: true,
            slots: 8,
            one_line: false,
            devices: Vec::new(),
            args: Vec::new(),
            append: String::new(),
            processor: Processor::Lab,
            system: None,
            iommu: None,
            boot: None,
        }
    }

    /// Adds a device that is present at boot.
    #[must_use]
    pub fn device(mut self, socket: impl Into<PathBuf>) -> Self {
        self.devices.push(socket.into());
        self
    }

    /// Adds words to QEMU's command line.
    #[must_use]
    pub fn args(mut self, words: &[&str]) -> Self {
        self.args.extend(words.iter().map(|&word| word.to_owned()));
        self
    }

    /// Starts the virtual machine and waits until its agent answers.
    pub fn boot(&self, scene: &Scene) -> Result<Vm> {
        let vm = self.start(scene)?;
        vm.wait_boot(1)?;
        Ok(vm)
    }

    /// Starts the virtual machine.
    pub fn start(&self, scene: &Scene) -> Result<Vm> {
        let lab = scene.lab;
        let path = |suffix: &str| scene.dir().join(format!("{}.{suffix}", self.name));
        let (control, agent) = (Listener::new(path("control"))?, Listener::new(path("agent"))?);
        let (qmp, console) = (path("qmp"), path("console"));
        let logs = (path("qemu.log"), path("console.log"));

        let mut command = lab.qemu();
        let share = if self.share { "on" } else { "off" };
        let memory = self.memory_mib;
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-name", &self.name]);
        command.args(["-M", "q35,memory-backend=ram,vmport=off,hpet=off"]);
        // If a machine can only have one CPU, the translator splits a locked instruction into
        // several steps and leaves out the fence (spec/vfio-user.md). So maxcpus is at least 2.
        let smp = format!("{},maxcpus={}", self.cpus, self.cpus.max(2));
        command.args(["-m", &format!("{memory}M"), "-smp", &smp]);
        command
            .arg("-object")
            .arg(format!("memory-backend-memfd,id=ram,size={memory}M,share={share}"));
        match (self.processor, lab.accel()) {
            (Processor::Lab, Accel::Kvm) => command.args(["-accel", "kvm", "-cpu", "host"]),
            (Processor::Lab, Accel::Tcg) => {
                command.args(["-accel", "tcg,thread=multi,tb-size=256", "-cpu", TCG_CPU])
            }
            (Processor::Svm, _) => {
                command.args(["-accel", "tcg,thread=multi,tb-size=512", "-cpu", SVM_CPU])
            }
            (Processor::CountedSvm, _) => command
                .args(["-accel", "tcg,thread=single,tb-size=512", "-cpu", SVM_CPU])
                .args(["-icount", "shift=1,sleep=off", "-rtc", "clock=vm"]),
            // 8 ns an instruction is about the translator's own speed: the guest's clock keeps
            // near the host's, and traffic with the host flows as it does without the count.
            (Processor::Counted, _) => command
                .args(["-accel", "tcg,thread=single,tb-size=256", "-cpu", TCG_CPU])
                .args(["-icount", "shift=3"]),
        };
        let serial = |id: &str, rest: &str| {
            [
                "-chardev".to_owned(),
                format!("socket,id={id},{rest}"),
                "-serial".to_owned(),
                format!("chardev:{id}"),
            ]
        };
        let server =
            format!("path={},server=on,wait=off,logfile={}", console.display(), logs.1.display());
        command.args(serial("console", &server));
        command.args(serial("agent", &format!("path={}", agent.path.display())));
        command.arg("-qmp").arg(format!("unix:{}", control.path.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", qmp.display()));
        let system = self.system.as_ref().unwrap_or(lab.system());
        let iommu = if self.iommu == Some(Iommu::Intel) { "intel_iommu=on" } else { "" };
        match &self.boot {
            Some(words) => command.args(words),
            None => command
                .arg("-kernel")
                .arg(system.kernel())
                .arg("-initrd")
                .arg(system.initramfs())
                .arg("-append")
                .arg(format!("{KERNEL_WORDS} {iommu} {}", self.append)),
        };
        // It must be there before the devices that it is for.
        if let Some(iommu) = self.iommu {
            command.arg("-device").arg(iommu.device());
        }
        for slot in 0..self.slots {
            let place = if self.one_line {
                format!(",multifunction=on,addr={ONE_LINE:#x}.{slot}")
            } else {
                String::new()
            };
            command.arg("-device").arg(format!(
                "pcie-root-port,id=slot{slot},slot={slot},chassis={slot},io-reserve=0{place}"
            ));
        }
        for (slot, socket) in self.devices.iter().enumerate() {
            command
                .arg("-device")
                .arg(vfio_user(&format!("dev{slot}"), &format!("slot{slot}"), socket).to_string());
        }
        command.args(&self.args);

        let (began, command_line) = (Instant::now(), command_line(&command));
        let mut process =
            Process::start(command, &format!("QEMU of guest {}", self.name), &logs.0)?;
        let control = Qmp::new(control.accept(&mut process)?)
            .map_err(|error| process.complaint(&format!("does not start: {error:#}")))?;
        let guest =
            Guest::new(&self.name, agent.accept(&mut process)?)?.with_patience(system.patience());
        Ok(Vm { guest, process, control, command_line, began, qmp, console, log: logs.1 })
    }
}

/// The place on the root bus of the device whose functions are the root ports of a machine with
/// [`VmSpec::one_line`].
const ONE_LINE: u32 = 0x10;

/// The CPU model on which QEMU's translator runs Linux fastest. It has no "fast" string
/// instructions: the translator executes those byte by byte, and TCP with `-cpu max` is four times
/// slower. It also has no SMAP, five-level paging or AVX state.
const TCG_CPU: &str = "Nehalem";

/// The CPU model with SVM. It has no "fast" string instructions either.
const SVM_CPU: &str = "max,erms=off,fsrm=off";

/// The kernel's command line. It turns off what only slows down a guest that lives for seconds.
pub const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 lsm= \
    nowatchdog \
    cryptomgr.notests=1 tsc=reliable no_timer_check";

/// QEMU's arguments for a device of the bus behind the root port `port`.
pub fn vfio_user(id: &str, port: &str, socket: &Path) -> Value {
    let socket = json!({"type": "unix", "path": socket});
    json!({"driver": "vfio-user-pci", "id": id, "bus": port, "socket": socket})
}

/// A running virtual machine. Dropping it ends QEMU.
pub struct Vm {
    /// Runs commands in the guest.
    pub guest: Guest,
    /// QEMU.
    pub process: Process,
    /// QEMU's control channel. Only the test uses it.
    pub control: Qmp,
    /// The shell command that starts QEMU in the same way.
    pub command_line: String,
    began: Instant,
    qmp: PathBuf,
    console: PathBuf,
    log: PathBuf,
}

impl Vm {
    /// Waits until the guest has booted `times` times.
    pub fn wait_boot(&self, times: u32) -> Result<()> {
        self.guest.wait_boot(times, BOOT).map_err(|error| self.with_console(&error))
    }

    /// An error, with what the guest's console said last.
    fn with_console(&self, error: &anyhow::Error) -> anyhow::Error {
        anyhow::anyhow!("{error:#}{}", tail(&self.log))
    }

    /// The time since QEMU was started.
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// How many instructions the guest has executed since it was started. A waiting processor
    /// executes none. It needs [`Processor::Counted`].
    ///
    /// # Errors
    /// QEMU does not tell.
    pub fn instructions(&mut self) -> Result<u64> {
        let replay = self.control.execute("query-replay", json!({}))?;
        replay["icount"].as_u64().with_context(|| format!("QEMU counts no instructions: {replay}"))
    }

    /// A second control socket of QEMU, for `vbus device add --qmp`.
    pub fn qmp_socket(&self) -> &Path {
        &self.qmp
    }

    /// The file of all that the guest's console has said.
    pub fn console_log(&self) -> &Path {
        &self.log
    }

    /// The socket of the guest's console.
    pub fn console_socket(&self) -> &Path {
        &self.console
    }

    /// Plugs the device behind `socket` into root port `slot` under the name `id`.
    pub fn plug(&mut self, id: &str, slot: usize, socket: &Path) -> Result<()> {
        self.control.execute("device_add", vfio_user(id, &format!("slot{slot}"), socket)).map(drop)
    }

    /// Whether QEMU has the device `id`.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn plugged(&mut self, id: &str) -> Result<bool> {
        let list = self.control.execute("qom-list", json!({"path": "/machine/peripheral"}))?;
        Ok(list.as_array().into_iter().flatten().any(|device| device["name"] == id))
    }

    /// Unplugs a device and waits until the guest has released it.
    pub fn unplug(&mut self, id: &str) -> Result<Duration> {
        let began = Instant::now();
        self.control.execute("device_del", json!({"id": id}))?;
        let limit = self.guest.at_most(LIMIT);
        self.control.wait_event("DEVICE_DELETED", limit, |data| data["device"] == id)?;
        Ok(began.elapsed())
    }

    /// Resets the virtual machine, as a reset button does.
    pub fn reset(&mut self) -> Result<()> {
        self.control.execute("system_reset", json!({})).map(drop)
    }

    /// Powers the guest off from inside and waits for QEMU's end.
    pub fn power_off(mut self) -> Result<()> {
        self.guest.start("poweroff -f")?;
        let ended = self.process.wait(self.guest.at_most(LIMIT));
        let status = ended.map_err(|error| self.with_console(&error))?;
        ensure!(status.success(), self.process.complaint(&format!("ended badly ({status})")));
        Ok(())
    }
}

/// A socket that a child process connects to. It exists before the process, so no early output is
/// lost.
pub(crate) struct Listener {
    path: PathBuf,
    listener: UnixListener,
}

impl Listener {
    pub(crate) fn new(path: PathBuf) -> Result<Self> {
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("cannot listen on {}", path.display()))?;
        listener.set_nonblocking(true)?;
        Ok(Self { path, listener })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until the process connects. If it ends first, that is an error.
    pub(crate) fn accept(&self, process: &mut Process) -> Result<UnixStream> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let until = Instant::now() + Duration::from_secs(120);
        let step = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        while Instant::now() < until {
            poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&step))?;
            if let Ok((stream, _)) = self.listener.accept() {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            if let Some(status) = process.ended()? {
                return Err(process.complaint(&format!("ended at once ({status})")));
            }
        }
        Err(process.complaint("does not connect"))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
