// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What interrupts cost Linux on KVM, with and without the bus's interrupt controller, and with and
//! without KVM's bit that spares the guest an exit at the end of an interrupt (PV EOI).

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::flat;
use crate::exits::{ByVector, Ends};
use crate::flat::{device_names, with_receivers};
use crate::guest::Guest;
use crate::l1::{Clock, L1};
use crate::l2::L2Spec;
use crate::linux::{self, IP};
use crate::report::{Figures, Skip};

/// The most NICs that interrupt.
const NICS: u32 = 16;
/// Frames that go to each NIC in a measurement.
const FRAMES: u32 = 100;
/// How long a measurement may take.
const LIMIT: Duration = Duration::from_secs(300);
/// The seconds from one frame to the next. Until then the guest has slept again.
const APART: f64 = 0.05;

/// 1, 4 and 16 NICs interrupt a Linux guest with one CPU: one after the other, and all together.
pub fn interrupts(l1: &L1, figures: &mut Figures) -> Result<()> {
    if l1.lab().times().is_none() {
        let why = "only with --times: it boots an L1 and two guests of its own";
        return Err(Skip(why.into()).into());
    }
    let home = l1.lab().scene("kvm-pic-system")?;
    let system = linux::chosen_system(&home)?;
    let scene = l1.lab().scene("kvm-pic")?;
    let own = L1::start_with(scene, Clock::Time, &[], &system)?;
    let measured = measure(&own);
    if measured.is_err() {
        if let Some(proof) = own.proof() {
            l1.prove(proof);
        }
        eprintln!("logs: {}", own.save_logs()?.display());
    }
    figures.insert("linux_interrupts".into(), measured?.into());
    Ok(())
}

fn measure(l1: &L1) -> Result<Vec<Value>> {
    let mut table = Vec::new();
    let config = with_receivers(NICS);
    let names = device_names(&config);
    // Without its paravirtual interface Linux ends interrupts by the register of the APIC.
    for (way, append) in [("pv-eoi", ""), ("register", "nopv")] {
        let bus = flat::start_bus(l1, &config)?;
        let spec = L2Spec { append, ..L2Spec::new("linux") };
        let mut spec = spec.args(&format!("--slots {}", names.len()));
        for name in &names {
            spec = spec.device(name, &bus.socket(name));
        }
        let l2 = spec.boot(l1)?;
        let setup = Setup::new(&l2.guest)?;
        for carried in [false, true] {
            setup.carry(&l2.guest, carried)?;
            for nics in [1, 4, NICS] {
                for together in [false, true] {
                    if nics == 1 && together {
                        continue;
                    }
                    let cost = setup.cost(l1, &l2.guest, nics, together)?;
                    let said = cost.json(way, carried, nics, together);
                    eprintln!("{said}");
                    cost.check(way, carried, nics, l1.is_emulated())
                        .with_context(|| said.to_string())?;
                    table.push(said);
                }
            }
        }
        linux::check_kernel(&l2.guest)?;
        l2.power_off()?;
    }
    Ok(table)
}

/// The guest, ready to measure.
struct Setup {
    /// The PCI address of the controller.
    pic: String,
    /// The vectors of the controller and of the NICs that interrupt.
    vectors: BTreeSet<u64>,
}

/// What interrupts cost.
struct Cost {
    /// Interrupts that the NICs raised.
    raised: u64,
    /// Ends that were exits.
    exits: u64,
    /// Ends by KVM's bit.
    by_bit: u64,
}

impl Setup {
    /// Loads the module and gives the interfaces their addresses.
    fn new(guest: &Guest) -> Result<Self> {
        guest.ok("echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6; true")?;
        linux::insert(guest, "")?;
        let found = guest.ok("cd /sys/bus/pci/drivers/vbus; for d in *:*; do \
             echo $d $(cat $d/vbus/name) $(od -An -tu1 -j124 -N1 $d/config) $(ls $d/net) \
             $(cat $d/net/*/address); done 2>/dev/null")?;
        let (mut pic, mut vectors) = (None, BTreeSet::new());
        for line in found.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [address, name, vector, ..] = words[..] else { continue };
            if name == "pic" {
                pic = Some(address.to_owned());
            }
            if name != "sender" {
                // The low byte of a message's data is its vector.
                vectors.insert(vector.parse().with_context(|| format!("no vector: {line}"))?);
            }
            let [.., interface, mac] = words[..] else { continue };
            match name.strip_prefix("net").and_then(|number| number.parse::<u32>().ok()) {
                Some(number) => guest
                    .ok(&format!("ip link set {interface} up && echo {mac} > /mac-{number}"))?,
                None if name == "sender" => guest.ok(&format!(
                    "ip addr add 10.9.0.1/24 broadcast + dev {interface} && ip link set \
                     {interface} up && echo {interface} > /sender"
                ))?,
                None => continue,
            };
        }
        for number in 0..NICS {
            guest.ok(&format!(
                "{IP} neigh add 10.9.0.{} lladdr $(cat /mac-{number}) dev $(cat /sender)",
                100 + number
            ))?;
        }
        let pic = pic.with_context(|| format!("no controller: {found}"))?;
        ensure!(vectors.len() == NICS as usize + 1, "the vectors are not told apart: {found}");
        Ok(Self { pic, vectors })
    }

    /// Lets the controller carry the NICs' interrupts, or leaves them to their own vectors.
    fn carry(&self, guest: &Guest, carried: bool) -> Result<()> {
        let folder = "/sys/bus/pci/drivers/vbus";
        let (pic, there) = (&self.pic, format!("[ -e {folder}/{} ]", self.pic));
        if !carried {
            return guest.ok(&format!("echo {pic} > {folder}/unbind")).map(drop);
        }
        guest.ok(&format!("{there} || echo {pic} > {folder}/bind"))?;
        let lines = format!(
            "for i in $(seq 600); do [ $(grep -c 'vbus-pic.*vbus-net' /proc/interrupts) -ge \
             {NICS} ] && exit; sleep 0.1; done; exit 1"
        );
        guest.ok(&lines).context("the controller does not carry all NICs")?;
        // What the devices sent when their routes began has come.
        guest.ok("sleep 2").map(drop)
    }

    /// Sends frames to so many NICs, to all at once or to each in its turn.
    fn cost(&self, l1: &L1, guest: &Guest, nics: u32, together: bool) -> Result<Cost> {
        let up = (0..NICS).map(|number| {
            let state = if number < nics { "up" } else { "down" };
            format!(
                "for d in /sys/bus/pci/drivers/vbus/*:*; do [ $(cat $d/vbus/name) = net{number} ] \
                 && ip link set $(ls $d/net) {state}; done; "
            )
        });
        guest.ok(&(up.collect::<String>() + "sleep 2"))?;
        let send = if together {
            format!("ping -q -c {FRAMES} -i {APART} -W 1 10.9.0.255")
        } else {
            let each = (0..nics).map(|number| {
                let (apart, address) = (APART * f64::from(nics), 100 + number);
                format!("ping -q -c {FRAMES} -i {apart} -W 1 10.9.0.{address} & sleep {APART}; ")
            });
            each.collect::<String>() + "wait"
        };
        let before = raised(guest)?;
        let ends = Ends::start(l1)?;
        guest.start(&format!("{{ {send}; }} > /dev/null 2>&1; true"))?.ok(LIMIT)?;
        let (exits, by_bit) = ends.finish()?;
        let raised = raised(guest)? - before;
        let sum = |ends: &ByVector| -> u64 {
            let ours = ends.iter().filter(|((_, vector), _)| self.vectors.contains(vector));
            ours.map(|(_, count)| count).sum()
        };
        Ok(Cost { raised, exits: sum(&exits), by_bit: sum(&by_bit) })
    }
}

impl Cost {
    fn json(&self, way: &str, carried: bool, nics: u32, together: bool) -> Value {
        let per = |count: u64| flat::rounded(count as f64 / self.raised.max(1) as f64);
        json!({
            "pic": carried, "end": way, "devices": nics,
            "frames": if together { "together" } else { "apart" },
            "raised": self.raised, "messages": self.exits + self.by_bit,
            "exits_per_interrupt": per(self.exits),
            "messages_per_interrupt": per(self.exits + self.by_bit),
        })
    }

    /// Checks what holds on any machine. The counts of the guest and of KVM are not taken at one
    /// moment.
    fn check(&self, way: &str, carried: bool, nics: u32, is_emulated: bool) -> Result<()> {
        let slack = 2 * u64::from(nics) + 10;
        ensure!(self.raised >= u64::from(FRAMES), "frames have not come");
        let messages = self.exits + self.by_bit;
        ensure!(messages <= self.raised + slack, "more messages than interrupts");
        if is_emulated {
            ensure!(way == "pv-eoi" || self.by_bit == 0, "KVM's bit is in use");
            ensure!(carried || messages + slack >= self.raised, "messages without an end");
        }
        Ok(())
    }
}

/// The interrupts of the NICs so far: lines of the controller, and their own.
fn raised(guest: &Guest) -> Result<u64> {
    let lines = guest.ok("grep vbus-net /proc/interrupts")?;
    let counts = lines.lines().filter_map(|line| line.split_whitespace().nth(1));
    Ok(counts.filter_map(|count| count.parse::<u64>().ok()).sum())
}
