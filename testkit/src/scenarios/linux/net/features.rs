// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One thing after the other that an interface can do for its user, each with the tool that a user
//! has for it.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::{FAR, LIMIT, NICS, Station};
use crate::linux::{self, IP};
use crate::nic;
use crate::pair::ADDRESS;

/// Datagrams that a sender throws at a filter: more than the frames that the systems send of their
/// own accord meanwhile.
const THROWN: u64 = 64;

/// The addresses of the interfaces in VLAN 5, which both have, and in VLAN 6, which only the second
/// one has.
const VLAN_5: [&str; 2] = ["10.5.0.1", "10.5.0.2"];
const VLAN_6: [&str; 2] = ["10.6.0.1", "10.6.0.2"];

/// A group of IPv4.
const GROUP: &str = "239.1.2.3";

/// The bytes of a message that becomes datagrams on its way, of a datagram, and how many messages.
const MESSAGE: u64 = 16_000;
const SEGMENT: u64 = 1000;
const MESSAGES: u64 = 40;

/// Bytes that go each way between two changes.
const FLOW: u64 = 1 << 20;

impl Station {
    /// All of them.
    pub(super) fn features(&self) -> Result<()> {
        self.vlans().context("VLANs")?;
        self.group().context("a group")?;
        self.segments().context("segmentation of UDP")?;
        self.announcement().context("an announcement")?;
        self.netconsole().context("netconsole")?;
        self.programs_and_queues().context("XDP with several queues")?;
        self.queues_under_load().context("queues that change under load")?;
        self.reset_under_load().context("a reset of the function under load")?;
        self.queue_stats().context("statistics of queues")
    }

    /// A VLAN that both ends have carries frames. The device keeps those of other VLANs from the
    /// driver, unless the driver wants all.
    fn vlans(&self) -> Result<()> {
        let guest = self.guest();
        for (place, name, id, address) in
            [("", "near", 5, VLAN_5[0]), (FAR, "far", 5, VLAN_5[1]), (FAR, "far", 6, VLAN_6[1])]
        {
            let add =
                format!("{place}{IP} link add link {name} name {name}.{id} type vlan id {id}");
            guest.ok(&add)?;
            nic::set_up_in(guest, place, &format!("{name}.{id}"), &format!("{address}/24"))?;
        }
        nic::ping(guest, VLAN_5[1], 3)?;
        self.0.exchange_between(VLAN_5, super::BYTES / 4)?;

        let mac = self.mac()?;
        for (id, address) in [(5, VLAN_5[0]), (6, VLAN_6[0])] {
            let known = format!("{FAR}{IP} neigh replace {address} lladdr {mac} dev far.{id}");
            guest.ok(&known)?;
        }
        self.filter("frames of a VLAN that it does not have", VLAN_6[0], false)?;
        self.filter("frames of a VLAN that it has", VLAN_5[0], true)?;
        guest.ok("ip link set near promisc on")?;
        self.filter("frames of any VLAN", VLAN_6[0], true)?;
        guest.ok("ip link set near promisc off")?;
        self.filter("frames of a VLAN that it does not have", VLAN_6[0], false)?;
        guest.ok(&format!("{IP} link del near.5"))?;
        self.filter("frames of a VLAN that it had", VLAN_5[0], false)?;
        guest.ok(&format!("{FAR}{IP} link del far.5 && {FAR}{IP} link del far.6")).map(drop)
    }

    /// Frames to a group come while a program is its member, or while all groups are wanted.
    fn group(&self) -> Result<()> {
        let guest = self.guest();
        guest.ok(&format!("{FAR}{IP} route add {GROUP} dev far"))?;
        self.filter("frames to a group that it is not in", GROUP, false)?;
        let member =
            guest.start(&format!("exec guest-agent datagrams print {GROUP}:9 {}", ADDRESS[0]))?;
        member.wait_for("ready", LIMIT)?;
        self.filter("frames to its group", GROUP, true)?;
        member.wait_for("thrown", LIMIT).context("the member of the group gets no datagram")?;
        member.kill()?;
        self.filter("frames to a group that it has left", GROUP, false)?;
        guest.ok(&format!("{IP} link set near allmulticast on"))?;
        self.filter("frames to any group", GROUP, true)?;
        guest.ok(&format!("{IP} link set near allmulticast off"))?;
        self.filter("frames to a group that it is not in", GROUP, false)
    }

    /// Waits until datagrams from the far end to `address` come to the near interface, or until its
    /// device keeps them from it: the device learns of a change a while after the command.
    fn filter(&self, what: &str, address: &str, passes: bool) -> Result<()> {
        let guest = self.guest();
        let counts = || -> Result<[u64; 2]> {
            let came = guest.ok("cat /sys/class/net/near/statistics/rx_packets")?;
            Ok([came.trim().parse()?, self.0.bus.unwanted_frames(NICS[0])?])
        };
        let began = Instant::now();
        loop {
            let before = counts()?;
            guest.ok(&format!("{FAR}guest-agent datagrams throw {address}:9 {THROWN}"))?;
            let [came, filtered] = loop {
                let now = counts()?;
                let more = [now[0] - before[0], now[1] - before[1]];
                if more[0] + more[1] >= THROWN || began.elapsed() > LIMIT {
                    break more;
                }
            };
            let (most, least) = if passes { (came, filtered) } else { (filtered, came) };
            if most >= THROWN && least < THROWN {
                return Ok(());
            }
            ensure!(
                began.elapsed() < LIMIT,
                "{what}: of {THROWN} frames {came} came, and {filtered} were filtered"
            );
        }
    }

    /// A message of UDP goes through the driver as one frame, and comes as many datagrams. Either
    /// the sender's kernel, the device, or the receiver's kernel segments it.
    fn segments(&self) -> Result<()> {
        let guest = self.guest();
        let frames = |place: &str, counter: &str| -> Result<u64> {
            let name = if place.is_empty() { "near" } else { "far" };
            let command = format!(
                "{place}ethtool -S {name} | awk '/ {counter}[0-9]+_frames:/{{n+=$2}} END{{print n}}'"
            );
            guest.ok(&command)?.trim().parse().with_context(|| format!("no counter {counter}"))
        };
        let datagrams = MESSAGE / SEGMENT * MESSAGES;
        let words = format!("{MESSAGES} {MESSAGE} {SEGMENT}");
        // The sender's offload, and that of the receiver.
        for (from, to) in [("on", "on"), ("on", "off"), ("off", "off")] {
            let what = format!("tx-udp-segmentation {from}, rx-gro-hw {to}");
            guest.ok(&format!("ethtool -K near tx-udp-segmentation {from}"))?;
            guest.ok(&format!("{FAR}ethtool -K far rx-gro-hw {to}"))?;
            let before = [frames("", "tx")?, frames(FAR, "rx")?];
            let receive = format!("{FAR}guest-agent datagrams receive {}:7001 {words}", ADDRESS[1]);
            let receives = guest.start(&receive)?;
            receives.wait_for("ready", LIMIT)?;
            let send = format!("guest-agent datagrams send {}:7001 {words}", ADDRESS[1]);
            guest.start(&send)?.ok(LIMIT).with_context(|| what.clone())?;
            receives.ok(LIMIT).with_context(|| what.clone())?;
            let went = [frames("", "tx")? - before[0], frames(FAR, "rx")? - before[1]];
            for (end, state, frames) in [("sent", from, went[0]), ("received", to, went[1])] {
                let whole = frames < datagrams / 2;
                ensure!(
                    frames >= MESSAGES && whole == (state == "on"),
                    "{what}: {datagrams} datagrams in {MESSAGES} messages were {end} as {frames} \
                     frames"
                );
            }
        }
        guest.ok("ethtool -K near tx-udp-segmentation on")?;
        guest.ok(&format!("{FAR}ethtool -K far rx-gro-hw on")).map(drop)
    }

    /// When the device begins anew, the interface tells the others where it is now.
    fn announcement(&self) -> Result<()> {
        let guest = self.guest();
        let mac = self.mac()?;
        let local = guest.ok(&format!(
            "{IP} -6 -o addr show dev near scope link | awk '{{print $4}}' | cut -d/ -f1"
        ))?;
        let addresses = [ADDRESS[0], local.trim()];
        ensure!(local.trim().starts_with("fe80:"), "near has no address of IPv6: {local:?}");
        for address in addresses {
            // A wrong one, which nobody uses: so nobody asks for the right one.
            guest.ok(&format!(
                "{FAR}{IP} neigh replace {address} lladdr 02:00:00:00:00:77 nud stale dev far"
            ))?;
        }
        self.0.bus.run(&["device", "reincarnate", NICS[0]])?;
        for address in addresses {
            let knows = format!("{FAR}{IP} neigh show {address} dev far | grep -q {mac}");
            guest
                .start(&format!("until {knows}; do sleep 0.05; done"))?
                .ok(LIMIT)
                .with_context(|| format!("the other end has not learned of {address}"))?;
        }
        self.ping()
    }

    /// The kernel's messages go out by the interface, also while it is busy.
    fn netconsole(&self) -> Result<()> {
        let guest = self.guest();
        let print = format!("exec {FAR}guest-agent datagrams print {}:6666 -", ADDRESS[1]);
        let log = guest.start(&print)?;
        log.wait_for("ready", LIMIT)?;
        let folder = "/sys/kernel/config/netconsole/near";
        let far = guest.ok(&format!("{FAR}cat /sys/class/net/far/address"))?;
        guest.ok(&format!(
            "mount -t configfs configfs /sys/kernel/config; mkdir {folder} && cd {folder} && \
             echo near > dev_name && echo {} > local_ip && echo {} > remote_ip && \
             echo {} > remote_mac && echo 1 > enabled",
            ADDRESS[0],
            ADDRESS[1],
            far.trim()
        ))?;
        guest.ok("echo '<2>a quiet message' > /dev/kmsg")?;
        log.wait_for("a quiet message", LIMIT)?;
        let load = self.0.load()?;
        self.0.flow(FLOW)?;
        guest.ok("for i in $(seq 100); do echo \"<2>message $i\" > /dev/kmsg; done")?;
        self.0.flow(FLOW)?;
        load.end()?;
        guest.ok("echo '<2>a last message' > /dev/kmsg")?;
        log.wait_for("a last message", LIMIT)?;
        guest.ok(&format!("echo 0 > {folder}/enabled && rmdir {folder}"))?;
        log.kill()
    }

    /// A program runs in each queue. The indirection table says which ones get frames.
    fn programs_and_queues(&self) -> Result<()> {
        let guest = self.guest();
        // The frames that the program has sent back, for each queue.
        let sent = || -> Result<Vec<u64>> {
            let counts = guest.ok("ethtool -S near | awk '/ rx[0-9]+_xdp_tx:/{print $2}'")?;
            counts.lines().map(|count| Ok(count.trim().parse()?)).collect()
        };
        let throw = format!("{FAR}guest-agent datagrams throw {}:9 {THROWN}", ADDRESS[0]);
        guest.ok("ethtool -L near combined 4")?;
        self.0.with_program("back", || {
            for (table, busy) in [("equal 4", 2..=4), ("weight 0 0 1 0", 1..=1)] {
                guest.ok(&format!("ethtool -X near {table}"))?;
                // The far end learns the address again.
                self.0.ping_near()?;
                let (before, began) = (sent()?, Instant::now());
                guest.ok(&throw)?;
                let more = loop {
                    let now = sent()?;
                    let more: Vec<_> = now.iter().zip(&before).map(|(n, b)| n - b).collect();
                    if more.iter().sum::<u64>() >= THROWN {
                        break more;
                    }
                    ensure!(began.elapsed() < LIMIT, "{table}: {more:?} frames were sent back");
                };
                let queues = more.iter().filter(|frames| **frames > 0).count();
                let last = table.starts_with("weight") && more[2] < THROWN;
                ensure!(
                    busy.contains(&queues) && !last,
                    "{table}: the queues have sent back {more:?} frames"
                );
            }
            Ok(())
        })?;
        self.0.with_program("around", || self.0.ping_near())?;
        guest.ok("ethtool -X near default")?;
        self.transfers()
    }

    /// The number of queue pairs changes while frames go.
    fn queues_under_load(&self) -> Result<()> {
        let load = self.0.load()?;
        self.0.flow(FLOW)?;
        for pairs in [1, 3, 2, 4] {
            let set = format!(
                "ethtool -L near combined {pairs} && \
                 ethtool -l near | awk '/^Combined/{{n=$2}} END{{print n}}'"
            );
            self.check(&[
                (&set, &pairs.to_string()),
                // The kernel has so many queues: the connection was made anew with them.
                ("ls /sys/class/net/near/queues | wc -l", &(2 * pairs).to_string()),
            ])?;
            self.0.flow(FLOW).with_context(|| format!("with {pairs} queue pairs"))?;
        }
        load.end()?;
        self.transfers()
    }

    /// The function is reset by its file in sysfs while frames go. The interface stays.
    fn reset_under_load(&self) -> Result<()> {
        // The driver ends the connection before the reset, and opens it after it. If it did not,
        // the watch would find the connection lost, and open it again.
        let found_lost = || self.guest().ok("dmesg | grep -c 'opens it again' || true");
        let (load, before) = (self.0.load()?, found_lost()?);
        for _ in 0..3 {
            self.0.flow(FLOW)?;
            let reset = format!("echo 1 > {}/reset", linux::function(0));
            self.guest().start(&reset)?.ok(LIMIT)?;
        }
        self.0.flow(FLOW)?;
        load.end()?;
        self.transfers()?;
        let after = found_lost()?;
        ensure!(after == before, "connections found lost: {before} before the resets, {after} now");
        Ok(())
    }

    /// What netlink tells of the queues are the counts of ethtool, and their sum is that of ip.
    fn queue_stats(&self) -> Result<()> {
        let guest = self.guest();
        let all = |command: &str| -> Result<String> { Ok(guest.ok(command)?.trim().to_owned()) };
        let counters = [
            ("rx", "packets", "frames"),
            ("rx", "bytes", "bytes"),
            ("tx", "packets", "frames"),
            ("tx", "bytes", "bytes"),
        ];
        // Frames may come between two commands. So this is done until none has.
        let began = Instant::now();
        loop {
            let before = all("cat /sys/class/net/near/statistics/[rt]x_packets")?;
            let said = guest.ok("guest-agent qstats near")?;
            let ethtool = guest.ok("ethtool -S near")?;
            let mut link = Vec::new();
            for (half, what, _) in counters {
                link.push(all(&format!("cat /sys/class/net/near/statistics/{half}_{what}"))?);
            }
            if before != all("cat /sys/class/net/near/statistics/[rt]x_packets")? {
                ensure!(began.elapsed() < LIMIT, "frames come all the time");
                continue;
            }
            let of = |queue: &str, half: &str, what: &str| -> Option<u64> {
                let line = said.lines().find_map(|line| line.strip_prefix(&format!("{queue} ")))?;
                let mut words = line.split(' ');
                words.find(|word| *word == format!("{half}-{what}"))?;
                words.next()?.parse().ok()
            };
            let mut of_programs = 0;
            for ((half, what, name), link) in counters.iter().zip(&link) {
                let mut sum = 0;
                for queue in 0..4 {
                    let count = of(&format!("{half}{queue}"), half, what);
                    let counter = |name: &str| -> Option<u64> {
                        let key = format!(" {half}{queue}_{name}:");
                        let found = ethtool.lines().find_map(|line| line.split_once(&key));
                        found?.1.trim().parse().ok()
                    };
                    // Frames of XDP are apart: those of other interfaces, and those sent back.
                    let xdp = match (*half, *what) {
                        ("tx", "packets") => counter("xdp"),
                        ("tx", _) => counter("xdp_bytes"),
                        _ => Some(0),
                    };
                    let expected = counter(name).and_then(|frames| Some(frames + xdp?));
                    if *what == "packets" {
                        of_programs += xdp.unwrap_or(0);
                    }
                    ensure!(
                        count.is_some() && count == expected,
                        "queue {half}{queue} has {count:?} {what}, and for ethtool {expected:?}: \
                         {said}"
                    );
                    sum += count.unwrap_or(0);
                }
                ensure!(
                    sum > 0 && of("all", half, what) == Some(sum) && link.parse().ok() == Some(sum),
                    "the queues have {sum} {half} {what}, the interface has {link}: {said}"
                );
            }
            // A program has sent frames back before.
            ensure!(of_programs >= THROWN, "only {of_programs} frames of XDP were sent");
            return Ok(());
        }
    }

    /// The address of the near interface.
    fn mac(&self) -> Result<String> {
        Ok(self.guest().ok("cat /sys/class/net/near/address")?.trim().to_owned())
    }
}
