//! L2: a guest on the KVM of L1, under `vbus-vmm` or QEMU, and the bus that serves its devices.

use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::guest::{Guest, Running};
use crate::machine::{KERNEL_WORDS, vfio_user};
use crate::rig::Rig;

/// How long L2 may take to boot: 7 to 13 s with the processor to itself.
pub const BOOT: Duration = Duration::from_secs(150);

/// How long L2 may say nothing before it counts as hung.
const SILENCE: Duration = Duration::from_secs(180);

/// How long a process in L1 may take to end when it is killed.
const KILL: Duration = Duration::from_secs(30);

/// How long a request to a VMM may take: an unplugging waits for the guest.
const CONTROL: Duration = Duration::from_secs(120);

/// How long `vbus serve` may take to start.
const START: Duration = Duration::from_secs(30);

/// Who runs the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// `vbus-vmm`.
    Vbus,
    /// QEMU of the kit.
    Qemu,
}

/// What a guest in L1 is made of.
#[derive(Clone)]
pub struct Spec {
    /// Names its sockets and logs.
    pub name: &'static str,
    /// Who runs it.
    pub vmm: Vmm,
    /// Its virtual CPUs.
    pub cpus: u32,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// More words for the VMM's command line.
    pub args: String,
    /// More words for the kernel's.
    pub append: &'static str,
}

impl Spec {
    /// A guest of `vbus-vmm` with one CPU.
    pub fn new(name: &'static str) -> Self {
        Self { name, vmm: Vmm::Vbus, cpus: 1, memory_mib: 384, args: String::new(), append: "" }
    }

    /// Adds words to the VMM's command line.
    #[must_use]
    pub fn args(mut self, words: &str) -> Self {
        self.args.push(' ');
        self.args.push_str(words);
        self
    }

    /// Adds a device of the bus that is there at boot.
    #[must_use]
    pub fn device(self, name: &str, socket: &str) -> Self {
        let words = match self.vmm {
            Vmm::Vbus => format!("--device {name}={socket}"),
            Vmm::Qemu => {
                let device = vfio_user(name, &format!("port-{name}"), Path::new(socket));
                let chassis = self.args.matches("pcie-root-port").count() + 1;
                format!(
                    "-device pcie-root-port,id=port-{name},chassis={chassis},io-reserve=0 -device '{device}'"
                )
            }
        };
        self.args(&words)
    }

    fn command(&self, rig: &Rig) -> String {
        let Self { name, cpus, memory_mib: memory, args, append, .. } = self;
        let (run, l2) = (rig.run_dir(), rig.l2_dir());
        let common = format!("{KERNEL_WORDS} {append}");
        let place = rig.guest_processor();
        match self.vmm {
            Vmm::Vbus => format!(
                "VBUS_LOG=info exec {place}vbus-vmm --kernel {l2}/kernel --initramfs {l2}/initramfs --append '{common}' --cpus {cpus} \
                 --memory {memory} --serial file:{run}/{name}.console.log --serial unix:{run}/{name}.agent \
                 --control {run}/{name}.control {args}"
            ),
            Vmm::Qemu => format!(
                "exec {place}qemu-system-x86_64 -nodefaults -no-user-config -display none -accel kvm -cpu host \
                 -M q35,memory-backend=ram,vmport=off,hpet=off -smp {cpus} -m {memory}M \
                 -object memory-backend-memfd,id=ram,size={memory}M,share=on \
                 -kernel {l2}/kernel -initrd {l2}/initramfs -append '{common}' \
                 -serial file:{run}/{name}.console.log \
                 -chardev socket,id=agent,path={run}/{name}.agent,server=on,wait=off -serial chardev:agent \
                 -qmp unix:{run}/{name}.control,server=on,wait=off {args}"
            ),
        }
    }

    /// Starts the guest and waits until its agent answers.
    pub fn boot<'a>(&self, rig: &'a Rig<'a>) -> Result<Inner<'a>> {
        let inner = self.start(rig)?;
        inner.wait_boot(1)?;
        Ok(inner)
    }

    /// Starts the guest.
    pub fn start<'a>(&self, rig: &'a Rig<'a>) -> Result<Inner<'a>> {
        if self.vmm == Vmm::Qemu {
            rig.unpack_qemu()?;
        }
        let (run, name) = (rig.run_dir(), self.name);
        rig.guest.ok(&format!("rm -f {run}/{name}.agent {run}/{name}.control"))?;
        let vmm = rig.guest.start(&self.command(rig))?;
        // Connected long before the guest's kernel has booted, so that nothing is lost of what its
        // agent says.
        let port = rig.guest.tunnel(&format!("exec guest-agent join {run}/{name}.agent"))?;
        let guest = Guest::new(name, port)?;
        Ok(Inner { guest, vmm, rig, name, watched: Cell::new(false), ended: false })
    }
}

/// A guest in L1; it ends when this is dropped.
pub struct Inner<'a> {
    /// Runs commands in it.
    pub guest: Guest,
    /// Its VMM.
    pub vmm: Running,
    rig: &'a Rig<'a>,
    name: &'static str,
    /// It has booted, and is watched for silence.
    watched: Cell<bool>,
    /// It was told to end.
    ended: bool,
}

impl Inner<'_> {
    /// Waits until the guest has booted `times` times; from then on it is watched for silence.
    pub fn wait_boot(&self, times: u32) -> Result<()> {
        let until = Instant::now() + BOOT;
        while let Err(error) = self.guest.wait_boot(times, Duration::from_secs(1)) {
            if Instant::now() > until || !self.vmm.runs() {
                let (rig, run) = (&self.rig.guest, self.rig.run_dir());
                let console =
                    rig.run(&format!("tail -n 20 {run}/{}.console.log", self.name))?.stdout;
                let (out, err) = self.vmm.said();
                return Err(error.context(format!("its console:\n{console}\nits VMM:\n{out}{err}")));
            }
        }
        if !self.watched.replace(true) {
            self.guest.watch(SILENCE);
        }
        Ok(())
    }

    /// The control socket of its VMM, in L1.
    pub fn control_socket(&self) -> String {
        format!("{}/{}.control", self.rig.run_dir(), self.name)
    }

    /// Sends a request, JSON without a `'`, to the control socket of its VMM; returns the items of
    /// the answer, and what it ends with.
    ///
    /// # Errors
    /// If there is no answer, or the request is refused: the text is that of the refusal.
    pub fn control(&self, request: &str) -> Result<(Vec<Value>, Value)> {
        let command = format!("echo '{request}' | guest-agent join {}", self.control_socket());
        let answers = self.rig.guest.start(&command)?.ok(CONTROL)?;
        let mut items = Vec::new();
        for line in answers.lines() {
            let mut answer: Value =
                serde_json::from_str(line).with_context(|| format!("no answer: {line}"))?;
            match (answer["item"].take(), answer.get("ok"), answer["error"].as_str()) {
                (_, Some(ok), _) => return Ok((items, ok.clone())),
                (_, _, Some(error)) => bail!("{error}"),
                (item, ..) => items.push(item),
            }
        }
        bail!("{request} is not answered, only {answers:?}")
    }

    /// Kills the VMM at once (SIGKILL).
    pub fn kill(mut self) -> Result<()> {
        self.ended = true;
        self.vmm.kill()?;
        self.vmm.wait(KILL).map(drop)
    }

    /// Powers the guest off from inside; its VMM has to end well.
    pub fn power_off(mut self) -> Result<()> {
        self.ended = true;
        self.guest.start("poweroff -f")?;
        let end = self.vmm.wait(Duration::from_secs(60))?;
        ensure!(
            end.code == 0,
            "the VMM of {} ended with {}:\n{}{}",
            self.name,
            end.code,
            end.stdout,
            end.stderr
        );
        Ok(())
    }
}

impl Drop for Inner<'_> {
    fn drop(&mut self) {
        let (out, err) = self.vmm.said();
        let fell = self.rig.is_emulated() && err.contains("triple fault");
        // What has failed waited less long than it takes to know that a guest hangs.
        let hangs =
            || !self.ended && self.watched.get() && self.vmm.runs() && !self.guest.answers();
        if fell || self.guest.hung() || hangs() {
            self.rig.note_hang();
        }
        // After an end that was asked for there is nothing to tell.
        let state = if self.vmm.runs() { "runs" } else { "has ended by itself" };
        if !self.ended {
            eprintln!("the VMM of {} {state}; it said:\n{out}{err}", self.name);
        }
        // Fails only if L1 has ended.
        if self.vmm.kill().is_ok() {
            let _ = self.vmm.wait(KILL);
        }
    }
}

/// `vbus serve` in L1; it ends when this is dropped.
pub struct InnerBus<'a> {
    rig: &'a Rig<'a>,
    dir: String,
    process: Running,
}

impl<'a> InnerBus<'a> {
    /// Serves the bus that `config` describes.
    pub fn start(rig: &'a Rig<'a>, config: &str) -> Result<Self> {
        let run = rig.run_dir();
        let dir = format!("{run}/bus");
        ensure!(!config.contains('\''), "the configuration goes through a shell in quotes");
        rig.guest.ok(&format!("echo '{config}' > {run}/bus.toml"))?;
        let process =
            rig.guest.start(&format!("exec vbus serve --config {run}/bus.toml --dir {dir}"))?;
        let bus = Self { rig, dir, process };
        let until = Instant::now() + START;
        while rig.guest.run(&format!("vbus device list --dir {}", bus.dir))?.code != 0 {
            if !bus.process.runs() || Instant::now() > until {
                let (out, err) = bus.process.said();
                bail!("vbus serve gives no answer:\n{out}{err}");
            }
        }
        Ok(bus)
    }

    /// Where its sockets are, in L1.
    pub fn dir(&self) -> &str {
        &self.dir
    }

    /// The vfio-user socket of a device.
    pub fn socket(&self, device: &str) -> String {
        format!("{}/{device}.sock", self.dir)
    }

    /// Runs `vbus WORDS --dir DIR`, which has to succeed; returns what it printed.
    pub fn run(&self, words: &str) -> Result<String> {
        self.rig.guest.ok(&format!("vbus {words} --dir {}", self.dir))
    }

    /// Starts `vbus WORDS --dir DIR` and returns at once.
    pub fn spawn(&self, words: &str) -> Result<Running> {
        self.rig.guest.start(&format!("vbus {words} --dir {}", self.dir))
    }

    /// What it has said so far, on standard output and error.
    pub fn said(&self) -> (String, String) {
        self.process.said()
    }

    /// Kills the bus at once (SIGKILL).
    pub fn kill(&self) -> Result<()> {
        self.process.kill()?;
        self.process.wait(KILL).map(drop)
    }
}

impl Drop for InnerBus<'_> {
    fn drop(&mut self) {
        // Fails only if L1 has ended.
        let _ = self.kill();
    }
}
