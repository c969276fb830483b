//! A guest machine: QEMU's command line, and a running one with its control channel and agent.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::guest::Guest;
use crate::lab::{Accel, Scene};
use crate::process::{Process, command_line, tail};
use crate::qmp::Qmp;

/// How long a guest may take to boot: seconds as a rule, more where many share a CPU.
pub const BOOT: Duration = Duration::from_secs(90);

/// What a machine is made of. The defaults suit most tests.
#[derive(Clone)]
pub struct Machine {
    /// Names its sockets and logs.
    pub name: String,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// Its virtual CPUs.
    pub cpus: u32,
    /// Whether the devices get memory that is the guest's (`share=on`).
    pub share: bool,
    /// PCIe root ports, for a device each: `slot0` and so on.
    pub slots: usize,
    /// vfio-user sockets of the devices that are there at boot; the first in `slot0`, with the id
    /// `dev0`.
    pub devices: Vec<PathBuf>,
    /// More words for QEMU's command line.
    pub args: Vec<String>,
    /// More words for the kernel's.
    pub append: String,
    /// What carries its instructions out.
    pub processor: Processor,
    /// A root file system in place of the lab's.
    pub initramfs: Option<PathBuf>,
}

/// What carries a machine's instructions out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// What the lab has chosen.
    Lab,
    /// QEMU's translator with AMD's SVM, so that the guest has a KVM of its own. A thread for each
    /// CPU: taking turns on one, they would lose the guests of that KVM at the first turn that
    /// falls on an injected interrupt.
    Svm,
    /// The same on one thread and by a clock that counts instructions, so that a run can be
    /// repeated.
    CountedSvm,
}

impl Machine {
    /// A machine with the defaults.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            memory_mib: 384,
            cpus: 1,
            share: true,
            slots: 8,
            devices: Vec::new(),
            args: Vec::new(),
            append: String::new(),
            processor: Processor::Lab,
            initramfs: None,
        }
    }

    /// Adds a device that is there at boot.
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

    /// Starts the machine and waits until its agent answers.
    pub fn boot(&self, scene: &Scene) -> Result<Vm> {
        let vm = self.start(scene)?;
        vm.wait_boot(1)?;
        Ok(vm)
    }

    /// Starts the machine.
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
        // Where there can be but one CPU the translator makes several steps of a locked
        // instruction, and no fence (spec/vfio-user.md).
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
        command.arg("-kernel").arg(lab.kernel()).arg("-initrd");
        command.arg(self.initramfs.as_deref().unwrap_or(lab.initramfs()));
        command.arg("-append").arg(format!("{KERNEL_WORDS} {}", self.append));
        for slot in 0..self.slots {
            command.arg("-device").arg(format!(
                "pcie-root-port,id=slot{slot},slot={slot},chassis={slot},io-reserve=0"
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
        let guest = Guest::new(&self.name, agent.accept(&mut process)?)?;
        Ok(Vm { guest, process, control, command_line, began, qmp, console, log: logs.1 })
    }
}

/// The CPU that QEMU's translator runs Linux fastest on: older than "fast" string instructions,
/// which it carries out byte by byte (`-cpu max` moves a quarter of the data over TCP), and than
/// SMAP, five-level paging and AVX state.
const TCG_CPU: &str = "Nehalem";

/// The CPU with SVM; without the "fast" string instructions, for the same reason.
const SVM_CPU: &str = "max,erms=off,fsrm=off";

/// The kernel's command line, without what only slows a guest that lives for seconds.
pub const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 lsm= nowatchdog \
    cryptomgr.notests=1 tsc=reliable no_timer_check";

/// A device of the bus behind the root port `port`, as QEMU wants it said.
pub fn vfio_user(id: &str, port: &str, socket: &Path) -> Value {
    json!({"driver": "vfio-user-pci", "id": id, "bus": port, "socket": {"type": "unix", "path": socket}})
}

/// A running machine; it ends when this is dropped.
pub struct Vm {
    /// Runs commands in the guest.
    pub guest: Guest,
    /// QEMU.
    pub process: Process,
    /// QEMU's control channel, ours alone.
    pub control: Qmp,
    /// The line for a shell that started QEMU.
    pub command_line: String,
    began: Instant,
    qmp: PathBuf,
    console: PathBuf,
    log: PathBuf,
}

impl Vm {
    /// Waits until the guest has booted `times` times.
    pub fn wait_boot(&self, times: u32) -> Result<()> {
        self.guest
            .wait_boot(times, BOOT)
            .map_err(|error| anyhow::anyhow!("{error:#}{}", tail(&self.log)))
    }

    /// Since QEMU was started.
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// A second control socket of QEMU, for `vbus device add --qmp`.
    pub fn qmp_socket(&self) -> &Path {
        &self.qmp
    }

    /// The socket of the guest's console.
    pub fn console_socket(&self) -> &Path {
        &self.console
    }

    /// Plugs the device behind `socket` into root port `slot` under the name `id`.
    pub fn plug(&mut self, id: &str, slot: usize, socket: &Path) -> Result<()> {
        self.control.execute("device_add", vfio_user(id, &format!("slot{slot}"), socket)).map(drop)
    }

    /// Unplugs a device and waits until the guest has let go of it.
    pub fn unplug(&mut self, id: &str) -> Result<Duration> {
        let began = Instant::now();
        self.control.execute("device_del", json!({"id": id}))?;
        self.control
            .wait_event("DEVICE_DELETED", Duration::from_secs(30), |data| data["device"] == id)?;
        Ok(began.elapsed())
    }

    /// Resets the machine, as its button would.
    pub fn reset(&mut self) -> Result<()> {
        self.control.execute("system_reset", json!({})).map(drop)
    }

    /// Powers the guest off from inside and waits for QEMU's end.
    pub fn power_off(mut self) -> Result<()> {
        self.guest.start("poweroff -f")?;
        let status = self.process.wait(Duration::from_secs(30))?;
        ensure!(status.success(), self.process.complaint(&format!("ended badly ({status})")));
        Ok(())
    }
}

/// A socket that QEMU connects to, so that nothing it says first is lost.
struct Listener {
    path: PathBuf,
    listener: UnixListener,
}

impl Listener {
    fn new(path: PathBuf) -> Result<Self> {
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("cannot listen on {}", path.display()))?;
        listener.set_nonblocking(true)?;
        Ok(Self { path, listener })
    }

    /// Waits for QEMU; its end is an error.
    fn accept(&self, process: &mut Process) -> Result<UnixStream> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let until = Instant::now() + Duration::from_secs(30);
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
