// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The machine: it puts all components together, and lives from the first start over resets to its
//! end.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use kvm_ioctls::{Cap, Kvm};
use serde_json::{Value, json};
use vbus_kvm::{Capabilities, DoorbellKind, Sints};

use crate::boot::Image;
use crate::components::Components;
use crate::control;
use crate::cpuid::Model;
use crate::cpus::Cpus;
use crate::events::{EventSender, Parking, VmEvent};
use crate::irqchip::IrqChip;
use crate::layout;
use crate::marks::Marks;
use crate::memory::Ram;
use crate::pci::{Backing, PORTS_MAX, PciRoot};
use crate::power::Power;
use crate::seccomp::{self, Thread};
use crate::serial::{AttachedPort, SerialOptions, Target};
use crate::snapshot::description::Description;
use crate::snapshot::{Clock, SavedMachine};
use crate::vcpu::{Buses, Vcpu};
use crate::vcpu_gate::VcpuGate;

/// The address where KVM may put three pages of its own, which old processors of Intel need.
const TSS: usize = 0xfffb_d000;
/// How long the answer to a client whose machine was moved may take.
const ANSWER: Duration = Duration::from_secs(5);
/// KVM's API version. It has not changed since Linux 2.6.22.
const API: i32 = 12;

/// The configuration of a machine.
pub struct Config {
    /// The kernel, its initramfs and its command line. `None`, only for a machine that is restored:
    /// it ends when it should boot again.
    pub image: Option<Image>,
    /// The number of virtual CPUs.
    pub cpus: u32,
    /// The size of memory in MiB.
    pub memory: u64,
    /// The other ends of COM1 and COM2.
    pub serial: Vec<Target>,
    /// The I/O APIC is in this process (a split irqchip).
    pub split: bool,
    /// Names and sockets of the devices that are plugged at the start.
    pub devices: Vec<(String, PathBuf)>,
    /// The number of slots for devices.
    pub slots: u8,
    /// Doorbells in BARs end in the kernel.
    pub mmio: bool,
    /// The guest may ring doorbells by ports.
    pub pio: bool,
    /// The guest may ring doorbells by hypercalls, if KVM has them.
    pub hypercalls: bool,
    /// The path of the control socket.
    pub control: Option<PathBuf>,
    /// The guest may set marks.
    pub marks: bool,
    /// Filters restrict the system calls of every thread.
    pub filter: bool,
    /// Standard input is a terminal in raw mode.
    pub raw: bool,
}

/// Why the machine has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest has powered the machine off.
    PowerOff,
    /// A signal, a key or a control client has ended the machine.
    Quit,
    /// The machine runs on in another process.
    Moved,
}

/// The machine.
pub struct Machine {
    components: Arc<Components>,
    image: Option<Image>,
    serial: Vec<AttachedPort>,
    events: Receiver<VmEvent>,
    filter: bool,
    /// It has a saved state, and must not boot.
    restored: bool,
    /// Removes the control socket when it is dropped.
    control: Option<control::Socket>,
}

impl Machine {
    /// Makes the machine. Nothing runs yet. The second value sends events to it.
    ///
    /// # Errors
    /// KVM is missing or lacks a feature, a value of `config` is out of range, or a device cannot
    /// be plugged. The error says which.
    pub fn new(config: Config) -> Result<(Machine, EventSender)> {
        Machine::make(config, None)
    }

    /// Makes a machine for a saved one, whose description determines the values of `config` that
    /// the guest can notice. Its devices are in their slots. [`load`](Self::load) must follow.
    ///
    /// # Errors
    /// As [`new`](Self::new). Also: this machine's processor lacks a feature, or the devices are
    /// others. A sender learns of it.
    pub fn restore(mut config: Config, saved: &SavedMachine) -> Result<(Machine, EventSender)> {
        let description = saved.description();
        config.cpus = description.cpus;
        config.memory = description.memory_mib;
        config.split = description.split;
        config.slots = description.slots;
        config.mmio = description.mmio;
        config.pio = description.pio;
        config.hypercalls = description.hypercalls;
        let slots = 1..=PORTS_MAX;
        let make = || {
            let slot = description.slots;
            ensure!(slots.contains(&slot), "the saved machine is damaged: {slot} slots");
            let there: Vec<_> = config.devices.iter().map(|(name, _)| &**name).collect();
            description.check_devices(&there)?;
            Machine::make(config, Some(description))
        };
        make().inspect_err(|error| saved.refuse(error))
    }

    /// Gives the machine its saved state. [`run`](Self::run) lets it go on from there.
    ///
    /// # Errors
    /// The state is damaged, or KVM does not take it. A sender learns of it, and goes on.
    pub fn load(&mut self, mut saved: SavedMachine, clock: Clock) -> Result<()> {
        if self.filter {
            seccomp::apply(Thread::Main)?;
        }
        saved.load(&self.components, clock).inspect_err(|error| saved.refuse(error))?;
        self.restored = true;
        Ok(())
    }

    fn make(config: Config, saved: Option<&Description>) -> Result<(Machine, EventSender)> {
        let kvm = open_kvm(config.split)?;
        let (cpus, most) = (config.cpus, layout::CPUS_MAX.min(u32::try_from(kvm.get_max_vcpus())?));
        ensure!((1..=most).contains(&cpus), "there can be 1 to {most} virtual CPUs, not {cpus}");
        let vm = Arc::new(kvm.create_vm().context("KVM cannot make a virtual machine")?);
        vm.set_tss_address(TSS).context("KVM does not accept the address of its own pages")?;
        let ram = Ram::new(config.memory.saturating_mul(1 << 20))?;
        ram.give_to(&vm)?;
        let irqchip = Arc::new(IrqChip::new(&vm, config.split)?);
        let hyperv = config.hypercalls && has_hyperv(&kvm);
        let model = match saved {
            None => Model::new(&kvm, cpus, hyperv)?,
            Some(saved) => {
                let same = hyperv == saved.hypercalls;
                ensure!(same, "the saved machine rings by hypercalls, which this KVM lacks");
                Model::saved(&kvm, &saved.cpuid, cpus, hyperv)?
            }
        };
        let vcpus: Vec<_> =
            (0..cpus).map(|number| Vcpu::new(&kvm, &vm, number, &model)).collect::<Result<_>>()?;
        let tsc_khz = match saved {
            Some(saved) => saved.tsc_khz,
            None => vcpus.first().context("no virtual CPU")?.tsc_khz()?,
        };
        let counters: Arc<[_]> = vcpus.iter().map(Vcpu::counters).collect();

        let (sender, events) = channel();
        let gate = VcpuGate::new();
        let mut buses = Buses { io_apic: irqchip.io_apic().cloned(), ..Default::default() };
        irqchip.attach(&mut buses.mmio);
        let power = Power::new(irqchip.clone(), gate.clone(), sender.clone());
        power.attach(&mut buses.pio);
        let marks = config.marks.then(|| Marks::new(counters.clone()));
        if let Some(marks) = &marks {
            marks.attach(&mut buses.pio);
        }
        let options = SerialOptions { raw: config.raw, filter: config.filter };
        let serial = config.serial.iter().enumerate();
        let serial = serial.map(|(number, target)| {
            AttachedPort::start(number, target, &irqchip, &mut buses.pio, &sender, options)
        });
        let serial = serial.collect::<Result<Vec<_>>>()?;

        let sints = Sints { base: layout::SINTS, stride: layout::SINT_STRIDE, processors: cpus };
        let sints = Some(sints).filter(|_| hyperv);
        let backing = Backing { mmio: config.mmio, pio: config.pio, hypercall: hyperv, sints };
        let pci = PciRoot::new(
            irqchip.routes().clone(),
            irqchip.io_apic().cloned(),
            ram.regions(),
            config.slots,
            backing,
            config.filter,
        )?;
        pci.attach(&mut buses.mmio, &mut buses.pio);
        plug_all(&pci, &config.devices, saved, config.filter)?;

        let cpus = Cpus::start(vcpus, &Arc::new(buses), gate, &sender, config.filter)?;
        let info = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "cpus": config.cpus,
            "memory_mib": config.memory,
            "irqchip": if config.split { "split" } else { "full" },
            "hypercalls": hyperv,
            "slots": config.slots,
        });
        let description = Description {
            version: env!("CARGO_PKG_VERSION").into(),
            cpus: config.cpus,
            memory_mib: config.memory,
            split: config.split,
            slots: config.slots,
            mmio: config.mmio,
            pio: config.pio,
            hypercalls: hyperv,
            tsc_khz,
            cpuid: model.leaves(),
            devices: Vec::new(),
        };
        let events_of_clients = sender.clone();
        let components = Arc::new(Components {
            cpus,
            counters,
            ram,
            irqchip,
            serial: serial.iter().map(|attached| attached.port.clone()).collect(),
            pci,
            power,
            marks,
            events: events_of_clients,
            info,
            description,
        });
        let control = config
            .control
            .map(|path| control::start(&path, &components, config.filter))
            .transpose()?;
        let (image, filter) = (config.image, config.filter);
        components.ram.watch(sender.clone(), filter)?;
        let restored = false;
        let machine = Machine { components, image, serial, events, filter, restored, control };
        Ok((machine, sender))
    }

    /// Runs the machine until it ends. `report` is called for each reset, at the start and at the
    /// end.
    ///
    /// # Errors
    /// The machine could not go on.
    pub fn run(mut self, report: &dyn Fn(&str, Value)) -> Result<End> {
        if self.restored {
            self.components.cpus.run();
            report("restored", self.components.info.clone());
        } else {
            if self.filter {
                seccomp::apply(Thread::Main)?;
            }
            self.start()?;
            report("started", self.components.info.clone());
        }
        let end = loop {
            match self.events.recv().context("every thread has ended")? {
                VmEvent::Reset(why) => {
                    self.components.cpus.hold()?;
                    // This reset covers those that have been asked for meanwhile.
                    let others = self.events.try_iter();
                    let others: Vec<_> =
                        others.filter(|event| !matches!(event, VmEvent::Reset(_))).collect();
                    self.send_again(others);
                    self.start()?;
                    report("reset", json!({ "why": why }));
                }
                VmEvent::Dump(tell) => {
                    // The client may have gone.
                    let _ = tell.send(self.dump());
                }
                VmEvent::Park(parking) => {
                    if self.park(&parking) {
                        break Ok(End::Moved);
                    }
                }
                VmEvent::PowerOff => break Ok(End::PowerOff),
                VmEvent::Quit => break Ok(End::Quit),
                VmEvent::Fail(error) => break Err(error),
            }
        };
        // A device that does not answer must not keep the machine from ending.
        if let Err(error) = self.components.cpus.hold() {
            tracing::warn!("{error:#}");
        }
        let exits: Vec<_> =
            self.components.counters.iter().map(|counters| counters.exits().to_json()).collect();
        if let Ok(end) = end {
            let how = match end {
                End::PowerOff => "power-off",
                End::Quit => "quit",
                End::Moved => "moved",
            };
            let marks = self.components.marks.as_ref().map(|marks| marks.list());
            report(how, json!({ "user_exits": exits, "marks": marks }));
        }
        drop(self.control.take());
        end
    }

    /// Stops the virtual CPUs, finds out what they and everything else do, and lets them go on.
    fn dump(&self) -> Vec<Value> {
        let components = &*self.components;
        let held = components.cpus.hold();
        let mut items = Vec::new();
        if let Err(error) = &held {
            items.push(json!({ "error": format!("{error:#}") }));
        }
        let cpus = components.cpus.dump(components.ram.map());
        for (state, counters) in cpus.into_iter().zip(components.counters.iter()) {
            let mut item = counters.to_json();
            item["state"] = state;
            items.push(item);
        }
        items.extend(components.irqchip.dump());
        items.extend(self.serial.iter().map(|attached| attached.port.dump()));
        items.extend(components.pci.dump());
        if !self.has_stopped() {
            components.cpus.run();
        }
        items
    }

    /// Whether the machine, whose virtual CPUs are held, stands still for another reason too.
    ///
    /// A virtual CPU that has stopped the machine has sent the reason before it came to the gate.
    /// The machine then stands still until the main thread has handled it.
    fn has_stopped(&self) -> bool {
        let others: Vec<_> = self.events.try_iter().collect();
        let asks = |event: &VmEvent| matches!(event, VmEvent::Dump(_) | VmEvent::Park(_));
        let stopped = others.iter().any(|event| !asks(event));
        self.send_again(others);
        stopped
    }

    /// Lets the machine stand still while it is saved. Returns whether it runs elsewhere then.
    fn park(&self, parking: &Parking) -> bool {
        let held = self.components.cpus.hold().map_err(|error| format!("{error:#}"));
        let stopped = self.has_stopped();
        let stands = match held {
            Ok(()) if stopped => Err("the machine resets or ends just now: try again".to_owned()),
            held => held,
        };
        let stands_still = stands.is_ok();
        // Whoever asked may have gone.
        let told = parking.told.send(stands).is_ok();
        let moved = stands_still && told && parking.then.recv().unwrap_or(false);
        if moved {
            // Whoever asked for it gets its answer first.
            let _ = parking.then.recv_timeout(ANSWER);
        }
        if !moved && !stopped {
            self.components.cpus.run();
        }
        moved
    }

    /// Puts events back that were taken too early.
    fn send_again(&self, events: Vec<VmEvent>) {
        for event in events {
            // This value has the receiver, so sending does not fail.
            let _ = self.components.events.send(event);
        }
    }

    /// Puts every component into the state after a reset, loads the kernel, and lets the virtual
    /// CPUs run, which must be held.
    fn start(&mut self) -> Result<()> {
        let components = &self.components;
        components.power.reset();
        components.pci.reset();
        components.marks.iter().for_each(|marks| marks.reset());
        self.serial.iter().for_each(|attached| attached.port.reset());
        components.irqchip.reset()?;
        components.ram.clear()?;
        let count = u32::try_from(components.cpus.count())?;
        let image = self.image.as_mut().context(
            "the machine cannot boot again: it was restored without a kernel (see --kernel)",
        )?;
        let start = image.load(&components.ram, count)?;
        components.ram.note_load();
        components.cpus.reset(&start)?;
        components.cpus.run();
        Ok(())
    }
}

/// Opens /dev/kvm and checks that it has all features that this program needs.
fn open_kvm(split: bool) -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|error| {
        let error = io::Error::from(error);
        match error.kind() {
            io::ErrorKind::NotFound => {
                anyhow!(
                    "there is no /dev/kvm: the processor's virtualization is off, or kvm_amd or \
                     kvm_intel is not loaded"
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

/// Plugs the devices that the machine has from its start. Threads that this starts have the filter
/// of plugging.
///
/// The devices of a saved machine go into their slots.
fn plug_all(
    pci: &PciRoot,
    devices: &[(String, PathBuf)],
    saved: Option<&Description>,
    filter: bool,
) -> Result<()> {
    let plug_one = |name: &str, socket: &PathBuf| match saved {
        None => pci.plug(name, socket),
        Some(saved) => {
            let found = saved.devices.iter().find(|device| device.name == name);
            pci.plug_saved(name, socket, found.map_or(0, |device| device.slot))
        }
    };
    let plug = || {
        if filter {
            seccomp::apply(Thread::Control)?;
        }
        let mut devices = devices.iter();
        let failed = devices.find_map(|(name, socket)| Some((name, plug_one(name, socket).err()?)));
        Ok(failed)
    };
    let plugged: Result<_> = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("plug".into()).spawn_scoped(scope, plug)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    match plugged? {
        None => Ok(()),
        Some((name, error)) => Err(error).with_context(|| format!("cannot plug {name}")),
    }
}

/// Whether a guest can ring doorbells by hypercalls and take interrupts by the SynIC.
fn has_hyperv(kvm: &Kvm) -> bool {
    Capabilities::probe(kvm).has(DoorbellKind::Hypercall)
}
