//! The machine: everything put together, and its life from the first start over resets to its end.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kvm_ioctls::{Cap, Kvm};
use serde_json::{Value, json};
use vbus_kvm::Sints;
use vbus_kvm::Stats;

use crate::boot::Image;
use crate::control;
use crate::cpuid::Model;
use crate::cpus::Cpus;
use crate::exits::Exits;
use crate::irqchip::IrqChip;
use crate::layout;
use crate::marks::Marks;
use crate::memory::Ram;
use crate::pci::{Backing, PciRoot};
use crate::power::Power;
use crate::seccomp::{self, Thread};
use crate::serial::{How, Running, Target};
use crate::vcpu::{Buses, Vcpu};

/// Where KVM may put three pages of its own, for old processors of Intel.
const TSS: usize = 0xfffb_d000;
/// KVM's version; there has never been another since Linux 2.6.22.
const API: i32 = 12;

/// What is wanted.
pub struct Config {
    /// What to boot.
    pub image: Image,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory: u64,
    /// What COM1 and COM2 lead to.
    pub serial: Vec<Target>,
    /// The I/O APIC in this process.
    pub split: bool,
    /// Devices that are there from the beginning: name and socket.
    pub devices: Vec<(String, PathBuf)>,
    /// Slots for devices.
    pub slots: u8,
    /// Doorbells in BARs end in the kernel.
    pub mmio: bool,
    /// Doorbells by ports.
    pub pio: bool,
    /// KVM's Hyper-V part, if it has one.
    pub hypercalls: bool,
    /// The control socket.
    pub control: Option<PathBuf>,
    /// The guest may set marks.
    pub marks: bool,
    /// Filters of system calls.
    pub filter: bool,
    /// Standard input is a terminal in raw mode.
    pub raw: bool,
}

/// What is asked of the machine, by the guest or from outside.
pub enum Ask {
    /// To begin anew; who asks.
    Reset(String),
    /// To end: the guest has powered off.
    PowerOff,
    /// To end at once.
    Quit,
    /// To end: it cannot go on.
    Fail(anyhow::Error),
}

/// Why the machine has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest has powered off.
    PowerOff,
    /// From outside.
    Quit,
}

/// The machine.
pub struct Machine {
    parts: Arc<Parts>,
    ram: Ram,
    image: Image,
    serial: Vec<Running>,
    asks: Receiver<Ask>,
    filter: bool,
    /// Removes the control socket.
    control: Option<control::Socket>,
}

/// What control clients reach too.
pub struct Parts {
    /// The virtual CPUs.
    pub cpus: Cpus,
    /// PCI, with the devices.
    pub pci: Arc<PciRoot>,
    /// The power button.
    pub power: Arc<Power>,
    /// To ask.
    pub asks: Sender<Ask>,
    /// What does not change, for `info`.
    pub info: Value,
    /// What was counted at the guest's marks, if it may set any.
    pub marks: Option<Arc<Marks>>,
    chip: Arc<IrqChip>,
}

impl Parts {
    /// What KVM and this program have counted of each virtual CPU.
    pub fn counters(&self) -> Vec<Value> {
        let of = |(cpu, _, exits, stats): (usize, _, &Exits, Option<&Stats>)| {
            // A KVM without statistics (before Linux 5.14) has none to show.
            let kvm = stats.and_then(|stats| stats.read().ok());
            json!({ "cpu": cpu, "user_exits": exits.to_json(), "kvm": kvm })
        };
        self.cpus.list().map(of).collect()
    }
}

impl Machine {
    /// Makes it; nothing runs yet. The second part is a way to ask for its end.
    pub fn new(config: Config) -> Result<(Machine, Sender<Ask>)> {
        let kvm = open_kvm(config.split)?;
        let (cpus, most) = (config.cpus, layout::CPUS_MAX.min(u32::try_from(kvm.get_max_vcpus())?));
        ensure!((1..=most).contains(&cpus), "there can be 1 to {most} virtual CPUs, not {cpus}");
        let vm = Arc::new(kvm.create_vm().context("KVM makes no virtual machine")?);
        vm.set_tss_address(TSS).context("KVM does not take its own pages")?;
        let ram = Ram::new(config.memory.saturating_mul(1 << 20))?;
        ram.give_to(&vm)?;
        let chip = Arc::new(IrqChip::new(&vm, config.split)?);
        let hyperv = config.hypercalls && has_hyperv(&kvm);

        let (asks, asked) = channel();
        let mut buses = Buses { io_apic: chip.io_apic().cloned(), ..Default::default() };
        chip.attach(&mut buses.mmio);
        let power = Power::new(chip.clone(), asks.clone());
        power.attach(&mut buses.pio);
        let marks = config.marks.then(Arc::<Marks>::default);
        if let Some(marks) = &marks {
            marks.attach(&mut buses.pio);
        }
        let how = How { raw: config.raw, filter: config.filter };
        let serial = config.serial.iter().enumerate();
        let serial = serial.map(|(number, target)| {
            Running::start(number, target, &chip, &mut buses.pio, &asks, how)
        });
        let serial = serial.collect::<Result<Vec<_>>>()?;

        let sints = Sints { base: layout::SINTS, stride: layout::SINT_STRIDE, processors: cpus };
        let sints = Some(sints).filter(|_| hyperv);
        let backing = Backing { mmio: config.mmio, pio: config.pio, hypercall: hyperv, sints };
        let pci = PciRoot::new(
            chip.routes().clone(),
            chip.io_apic().cloned(),
            ram.regions(),
            config.slots,
            backing,
            config.filter,
        )?;
        pci.attach(&mut buses.mmio, &mut buses.pio);
        for (name, socket) in &config.devices {
            pci.plug(name, socket).with_context(|| format!("cannot plug {name}"))?;
        }

        let model = Model::new(&kvm, cpus, hyperv)?;
        let vcpus =
            (0..cpus).map(|number| Vcpu::new(&kvm, &vm, number, &model)).collect::<Result<_>>()?;
        let cpus = Cpus::start(vcpus, &Arc::new(buses), &asks, config.filter)?;
        power.set_brake(cpus.brake());
        let info = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "cpus": config.cpus,
            "memory_mib": config.memory,
            "irqchip": if config.split { "split" } else { "full" },
            "hypercalls": hyperv,
            "slots": config.slots,
        });
        let parts = Arc::new(Parts { cpus, pci, power, asks: asks.clone(), info, marks, chip });
        if let Some(marks) = &parts.marks {
            marks.set_parts(&parts);
        }
        let control =
            config.control.map(|path| control::start(&path, &parts, config.filter)).transpose()?;
        let filter = config.filter;
        Ok((
            Machine { parts, ram, image: config.image, serial, asks: asked, filter, control },
            asks,
        ))
    }

    /// Runs until its end. `tell` hears of what happens on the way.
    pub fn run(mut self, tell: &dyn Fn(&str, Value)) -> Result<End> {
        if self.filter {
            seccomp::apply(Thread::Main)?;
        }
        self.start()?;
        tell("started", self.parts.info.clone());
        let end = loop {
            match self.asks.recv().context("every thread has ended")? {
                Ask::Reset(why) => {
                    self.parts.cpus.hold()?;
                    // What else was asked for meanwhile has come true; but for an end.
                    let end = self.asks.try_iter().find(|ask| !matches!(ask, Ask::Reset(_)));
                    if let Some(end) = end {
                        let _ = self.parts.asks.send(end);
                    }
                    self.start()?;
                    tell("reset", json!({ "why": why }));
                }
                Ask::PowerOff => break Ok(End::PowerOff),
                Ask::Quit => break Ok(End::Quit),
                Ask::Fail(error) => break Err(error),
            }
        };
        // A device that does not answer must not keep the machine from its end.
        if let Err(error) = self.parts.cpus.hold() {
            tracing::warn!("{error:#}");
        }
        let exits: Vec<_> =
            self.parts.cpus.list().map(|(_, _, exits, _)| exits.to_json()).collect();
        if let Ok(end) = end {
            let how = if end == End::PowerOff { "power-off" } else { "quit" };
            let marks = self.parts.marks.as_ref().map(|marks| marks.list());
            tell(how, json!({ "user_exits": exits, "marks": marks }));
        }
        drop(self.control.take());
        end
    }

    /// Brings everything into the state after a reset, loads the kernel, and lets the virtual CPUs
    /// run, which are held.
    fn start(&mut self) -> Result<()> {
        let parts = &self.parts;
        parts.power.reset();
        parts.pci.reset();
        parts.marks.iter().for_each(|marks| marks.reset());
        self.serial.iter().for_each(|running| running.port.reset());
        parts.chip.reset()?;
        self.ram.clear()?;
        let count = u32::try_from(parts.cpus.list().count())?;
        let start = self.image.load(&self.ram, count)?;
        parts.cpus.reset(&start)?;
        parts.cpus.run();
        Ok(())
    }
}

/// Opens /dev/kvm, if it has what this program needs.
fn open_kvm(split: bool) -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|error| {
        let error = io::Error::from(error);
        match error.kind() {
            io::ErrorKind::NotFound => {
                anyhow!(
                    "there is no /dev/kvm: the processor's virtualization is off, or kvm_amd or kvm_intel is not loaded"
                )
            }
            io::ErrorKind::PermissionDenied => {
                anyhow!("no permission to open /dev/kvm: become a member of its group (often kvm)")
            }
            _ => anyhow!("cannot open /dev/kvm: {error}"),
        }
    })?;
    let version = kvm.get_api_version();
    ensure!(
        version == API,
        "/dev/kvm is no KVM that this program knows (version {version}, not {API})"
    );
    let mut needed = vec![
        (Cap::UserMemory, "user memory"),
        (Cap::Irqchip, "irqchip"),
        (Cap::ImmediateExit, "immediate exit (Linux 4.13)"),
        (Cap::Irqfd, "irqfd"),
        (Cap::IrqfdResample, "irqfd with resample"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::IoeventfdNoLength, "ioeventfd of any length (Linux 4.4)"),
        (Cap::SignalMsi, "signal MSI"),
        (Cap::ExtCpuid, "CPUID"),
    ];
    if split {
        needed.push((Cap::SplitIrqchip, "split irqchip (Linux 4.5)"));
    }
    let missing: Vec<_> = needed
        .into_iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, name)| name)
        .collect();
    if !missing.is_empty() {
        bail!("this KVM is too old: it lacks {}", missing.join(", "));
    }
    Ok(kvm)
}

/// Whether a guest can ring doorbells by hypercalls, and take interrupts by the SynIC.
fn has_hyperv(kvm: &Kvm) -> bool {
    vbus_kvm::Capabilities::probe(kvm).has(vbus_kvm::DoorbellKind::Hypercall)
}
