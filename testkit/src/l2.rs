// SPDX-License-Identifier: Apache-2.0 OR MIT
//! L2: a guest on the KVM of L1, under `vbus-vmm` or QEMU, and the bus that serves its devices.

use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::guest::{Guest, Running};
use crate::l1::L1;
use crate::lost;
use crate::vm::{KERNEL_WORDS, vfio_user};

/// How long an L2 may take to boot. Alone on its processor it needs 7 to 13 s. With ten times as
/// much work as processors it needs 50 s.
pub const BOOT: Duration = Duration::from_secs(300);

/// How long an L2 may be silent before it counts as hung.
const SILENCE: Duration = Duration::from_secs(180);

/// How long a process in L1 may take to end after SIGKILL.
const KILL: Duration = Duration::from_secs(120);

/// How long a request to a VMM may take. An unplug request waits for the guest.
const CONTROL: Duration = Duration::from_secs(120);

/// How long `vbus serve` may take to start.
const START: Duration = Duration::from_secs(120);

/// The program that runs the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// `vbus-vmm`.
    Vbus,
    /// The kit's QEMU.
    Qemu,
}

/// The description of an L2.
#[derive(Clone)]
pub struct L2Spec {
    /// The name of its sockets and logs.
    pub name: &'static str,
    /// The program that runs it.
    pub vmm: Vmm,
    /// Its virtual CPUs.
    pub cpus: u32,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// More words for the VMM's command line.
    pub args: String,
    /// More words for the kernel's command line.
    pub append: &'static str,
}

impl L2Spec {
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

    /// Adds a device of the bus that is present at boot.
    #[must_use]
    pub fn device(self, name: &str, socket: &str) -> Self {
        let words = match self.vmm {
            Vmm::Vbus => format!("--device {name}={socket}"),
            Vmm::Qemu => {
                let device = vfio_user(name, &format!("port-{name}"), Path::new(socket));
                let chassis = self.args.matches("pcie-root-port").count() + 1;
                format!(
                    "-device pcie-root-port,id=port-{name},chassis={chassis},io-reserve=0 -device \
                     '{device}'"
                )
            }
        };
        self.args(&words)
    }

    fn command(&self, l1: &L1) -> String {
        let Self { name, cpus, memory_mib: memory, args, append, .. } = self;
        let (run, l2) = (l1.run_dir(), l1.l2_dir());
        let common = format!("{KERNEL_WORDS} {append}");
        let place = l1.guest_processor();
        match self.vmm {
            Vmm::Vbus => format!(
                "VBUS_LOG=info exec {place}vbus-vmm --kernel {l2}/kernel --initramfs \
                 {l2}/initramfs --append '{common}' --cpus {cpus} \
                 --memory {memory} --serial file:{run}/{name}.console.log --serial \
                 unix:{run}/{name}.agent \
                 --control {run}/{name}.control {args}"
            ),
            Vmm::Qemu => format!(
                "exec {place}qemu-system-x86_64 -nodefaults -no-user-config -display none -accel \
                 kvm -cpu host \
                 -M q35,memory-backend=ram,vmport=off,hpet=off -smp {cpus} -m {memory}M \
                 -object memory-backend-memfd,id=ram,size={memory}M,share=on \
                 -kernel {l2}/kernel -initrd {l2}/initramfs -append '{common}' \
                 -serial file:{run}/{name}.console.log \
                 -chardev socket,id=agent,path={run}/{name}.agent,server=on,wait=off -serial \
                 chardev:agent \
                 -qmp unix:{run}/{name}.control,server=on,wait=off {args}"
            ),
        }
    }

    /// Starts the guest and waits until its agent answers.
    pub fn boot<'a>(&self, l1: &'a L1<'a>) -> Result<L2<'a>> {
        let l2 = self.start(l1)?;
        l2.wait_boot(1)?;
        Ok(l2)
    }

    /// Starts the guest.
    pub fn start<'a>(&self, l1: &'a L1<'a>) -> Result<L2<'a>> {
        if self.vmm == Vmm::Qemu {
            l1.unpack_qemu()?;
        }
        let (run, name) = (l1.run_dir(), self.name);
        l1.guest.ok(&format!("rm -f {run}/{name}.agent {run}/{name}.control"))?;
        let vmm = l1.guest.start(&self.command(l1))?;
        // The test connects long before the guest's kernel has booted: no output of the agent is
        // lost.
        let port = l1.guest.tunnel(&format!("exec guest-agent join {run}/{name}.agent"))?;
        let guest = Guest::new(name, port)?;
        let watched = Cell::new(false);
        Ok(L2 { guest, vmm, vmm_kind: self.vmm, l1, name, watched, ended: false })
    }
}

impl L2Spec {
    /// Starts `vbus-vmm restore WORDS` for a guest that was saved or is to be moved. Its `args` are
    /// for that command.
    pub fn restore<'a>(&self, l1: &'a L1<'a>, words: &str) -> Result<Restored<'a>> {
        let (run, name, place, args) = (l1.run_dir(), self.name, l1.guest_processor(), &self.args);
        l1.guest.ok(&format!("rm -f {run}/{name}.agent {run}/{name}.control"))?;
        let vmm = l1.guest.start(&format!(
            "VBUS_LOG=info exec {place}vbus-vmm restore {words} --serial \
             file:{run}/{name}.console.log --serial unix:{run}/{name}.agent --control \
             {run}/{name}.control {args}"
        ))?;
        Ok(Restored { l1, vmm, name })
    }
}

/// A VMM that restores a guest.
pub struct Restored<'a> {
    l1: &'a L1<'a>,
    vmm: Running,
    name: &'static str,
}

impl<'a> Restored<'a> {
    /// Waits until the guest's agent answers. The guest has booted long ago, so the agent does not
    /// announce itself.
    pub fn join(self) -> Result<L2<'a>> {
        let Self { l1, vmm, name } = self;
        let port =
            l1.guest.tunnel(&format!("exec guest-agent join {}/{name}.agent", l1.run_dir()))?;
        let guest = Guest::new(name, port)?;
        guest.watch(SILENCE);
        let watched = Cell::new(true);
        let l2 = L2 { guest, vmm, vmm_kind: Vmm::Vbus, l1, name, watched, ended: false };
        ensure!(l2.guest.answers(), "the agent of {name} does not answer: {:?}", l2.vmm.said());
        Ok(l2)
    }
}

/// A running L2. Dropping it ends its VMM.
pub struct L2<'a> {
    /// Runs commands in it.
    pub guest: Guest,
    /// Its VMM.
    pub vmm: Running,
    vmm_kind: Vmm,
    l1: &'a L1<'a>,
    name: &'static str,
    /// Whether it has booted and is watched for silence.
    watched: Cell<bool>,
    /// Whether the test has told it to end.
    ended: bool,
}

impl L2<'_> {
    /// Waits until the guest has booted `times` times. Then the watch for silence begins.
    pub fn wait_boot(&self, times: u32) -> Result<()> {
        let until = Instant::now() + BOOT;
        while let Err(error) = self.guest.wait_boot(times, Duration::from_secs(1)) {
            if Instant::now() > until || !self.vmm.runs() {
                let (l1, run) = (&self.l1.guest, self.l1.run_dir());
                let console =
                    l1.run(&format!("tail -n 20 {run}/{}.console.log", self.name))?.stdout;
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
        control_socket(self.l1, self.name)
    }

    /// Sends a request to the control socket of its VMM, see `control`.
    ///
    /// # Errors
    /// As `control`.
    pub fn control(&self, request: &str) -> Result<(Vec<Value>, Value)> {
        control(self.l1, self.name, request)
    }

    /// Waits for the end of the VMM, whose guest runs in another one now.
    pub fn moved(mut self) -> Result<()> {
        self.ended = true;
        let end = self.vmm.wait(KILL)?;
        ensure!(end.code == 0, "the VMM of {} ended with {end:?}", self.name);
        Ok(())
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
        let end = self.vmm.wait(Duration::from_secs(120))?;
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

fn control_socket(l1: &L1, name: &str) -> String {
    format!("{}/{name}.control", l1.run_dir())
}

/// Sends a request, JSON without a `'`, to the control socket of the VMM of the guest `name`.
/// Returns the items of the answer, and what it ends with.
///
/// # Errors
/// If there is no answer, or the request is refused: the text is that of the refusal.
fn control(l1: &L1, name: &str, request: &str) -> Result<(Vec<Value>, Value)> {
    let command = format!("echo '{request}' | guest-agent join {}", control_socket(l1, name));
    let answers = l1.guest.start(&command)?.ok(CONTROL)?;
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

/// Finds out what the guest `name`, its VMM and its devices do, and keeps it among the logs.
pub fn look(l1: &L1, name: &str, vmm: Vmm) {
    let mut text = String::new();
    // QEMU has no control socket that the test kit can use in L1.
    let looks = if vmm == Vmm::Vbus { lost::LOOKS } else { 0 };
    for look in 1..=looks {
        let told = match control(l1, name, r#"{"op":"dump"}"#) {
            Ok((items, _)) => items.iter().map(|item| format!("{item}\n")).collect(),
            Err(error) => format!("vbus-vmm does not tell: {error:#}\n"),
        };
        text += &format!("== look {look} of vbus-vmm\n{told}");
    }
    let program = if vmm == Vmm::Vbus { "vbus-vmm" } else { "qemu-system-x86_64" };
    text += &lost::in_l1(&l1.guest, program, &format!("{}/bus", l1.run_dir()));
    l1.keep(name, &text);
}

impl Drop for L2<'_> {
    fn drop(&mut self) {
        let (out, err) = self.vmm.said();
        let fell = self.l1.is_emulated() && err.contains("triple fault");
        if !self.ended && self.vmm.runs() && !self.l1.guest.hung() {
            look(self.l1, self.name, self.vmm_kind);
        }
        // A failed wait is shorter than the time after which a silent guest counts as hung.
        let hangs =
            || !self.ended && self.watched.get() && self.vmm.runs() && !self.guest.answers();
        if fell || self.guest.hung() || hangs() {
            self.l1.note_hang();
        }
        // If the test asked for the end, there is nothing to report.
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

/// `vbus serve` in L1. Dropping it ends the process.
pub struct L1Bus<'a> {
    l1: &'a L1<'a>,
    dir: String,
    process: Running,
}

impl<'a> L1Bus<'a> {
    /// Serves the bus that `config` describes.
    pub fn start(l1: &'a L1<'a>, config: &str) -> Result<Self> {
        Self::start_named(l1, "bus", config)
    }

    /// The same beside other buses. `name` is that of its folder.
    pub fn start_named(l1: &'a L1<'a>, name: &str, config: &str) -> Result<Self> {
        let dir = format!("{}/{name}", l1.run_dir());
        ensure!(!config.contains('\''), "the configuration goes through a shell in quotes");
        l1.guest.ok(&format!("echo '{config}' > {dir}.toml"))?;
        let process =
            l1.guest.start(&format!("exec vbus serve --config {dir}.toml --dir {dir}"))?;
        let bus = Self { l1, dir, process };
        let until = Instant::now() + START;
        while l1.guest.run(&format!("vbus device list --dir {}", bus.dir))?.code != 0 {
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
        self.l1.guest.ok(&format!("vbus {words} --dir {}", self.dir))
    }

    /// Starts `vbus WORDS --dir DIR` and returns at once.
    pub fn spawn(&self, words: &str) -> Result<Running> {
        self.l1.guest.start(&format!("vbus {words} --dir {}", self.dir))
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

impl Drop for L1Bus<'_> {
    fn drop(&mut self) {
        // Fails only if L1 has ended.
        let _ = self.kill();
    }
}
