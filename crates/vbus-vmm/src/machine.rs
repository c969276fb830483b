// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The machine: it puts all components together, and lives from the first start over resets to its
//! end.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kvm_ioctls::{Cap, Kvm};
use serde_json::{Value, json};
use vbus_kvm::{Capabilities, DoorbellKind, Sints};

use crate::boot::Image;
use crate::components::Components;
use crate::control;
use crate::cpuid::Model;
use crate::cpus::Cpus;
use crate::events::{EventSender, VmEvent};
use crate::irqchip::IrqChip;
use crate::layout;
use crate::marks::Marks;
use crate::memory::Ram;
use crate::pci::{Backing, PciRoot};
use crate::power::Power;
use crate::seccomp::{self, Thread};
use crate::serial::{AttachedPort, SerialOptions, Target};
use crate::vcpu::{Buses, Vcpu};
use crate::vcpu_gate::VcpuGate;

/// The address where KVM may put three pages of its own, which old processors of Intel need.
const TSS: usize = 0xfffb_d000;
/// KVM's API version. It has not changed since Linux 2.6.22.
const API: i32 = 12;

/// The configuration of a machine.
pub struct Config {
    /// The kernel, its initramfs and its command line.
    pub image: Image,
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
}

/// The machine.
pub struct Machine {
    components: Arc<Components>,
    irqchip: Arc<IrqChip>,
    ram: Ram,
    image: Image,
    serial: Vec<AttachedPort>,
    events: Receiver<VmEvent>,
    filter: bool,
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
        let kvm = open_kvm(config.split)?;
        let (cpus, most) = (config.cpus, layout::CPUS_MAX.min(u32::try_from(kvm.get_max_vcpus())?));
        ensure!((1..=most).contains(&cpus), "there can be 1 to {most} virtual CPUs, not {cpus}");
        let vm = Arc::new(kvm.create_vm().context("KVM cannot make a virtual machine")?);
        vm.set_tss_address(TSS).context("KVM does not accept the address of its own pages")?;
        let ram = Ram::new(config.memory.saturating_mul(1 << 20))?;
        ram.give_to(&vm)?;
        let irqchip = Arc::new(IrqChip::new(&vm, config.split)?);
        let hyperv = config.hypercalls && has_hyperv(&kvm);

        let model = Model::new(&kvm, cpus, hyperv)?;
        let vcpus: Vec<_> =
            (0..cpus).map(|number| Vcpu::new(&kvm, &vm, number, &model)).collect::<Result<_>>()?;
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
        plug_all(&pci, &config.devices, config.filter)?;

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
        let events_of_clients = sender.clone();
        let components = Arc::new(Components {
            cpus,
            counters,
            pci,
            power,
            marks,
            events: events_of_clients,
            info,
        });
        let control = config
            .control
            .map(|path| control::start(&path, &components, config.filter))
            .transpose()?;
        let (image, filter) = (config.image, config.filter);
        ram.watch(sender.clone(), filter)?;
        let machine = Machine { components, irqchip, ram, image, serial, events, filter, control };
        Ok((machine, sender))
    }

    /// Runs the machine until it ends. `report` is called for each reset, at the start and at the
    /// end.
    ///
    /// # Errors
    /// The machine could not go on.
    pub fn run(mut self, report: &dyn Fn(&str, Value)) -> Result<End> {
        if self.filter {
            seccomp::apply(Thread::Main)?;
        }
        self.start()?;
        report("started", self.components.info.clone());
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
            let how = if end == End::PowerOff { "power-off" } else { "quit" };
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
        let cpus = components.cpus.dump(self.ram.map());
        for (state, counters) in cpus.into_iter().zip(components.counters.iter()) {
            let mut item = counters.to_json();
            item["state"] = state;
            items.push(item);
        }
        items.extend(self.irqchip.dump());
        items.extend(self.serial.iter().map(|attached| attached.port.dump()));
        items.extend(components.pci.dump());
        // A virtual CPU that has stopped the machine has sent the reason before it came to the
        // gate. The machine then stands still until the main thread has handled it.
        let others: Vec<_> = self.events.try_iter().collect();
        let stopped = others.iter().any(|event| !matches!(event, VmEvent::Dump(_)));
        self.send_again(others);
        if !stopped {
            components.cpus.run();
        }
        items
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
        self.irqchip.reset()?;
        self.ram.clear()?;
        let count = u32::try_from(components.cpus.count())?;
        let start = self.image.load(&self.ram, count)?;
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
fn plug_all(pci: &PciRoot, devices: &[(String, PathBuf)], filter: bool) -> Result<()> {
    let plug = || {
        if filter {
            seccomp::apply(Thread::Control)?;
        }
        let mut devices = devices.iter();
        let failed = devices.find_map(|(name, socket)| Some((name, pci.plug(name, socket).err()?)));
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
