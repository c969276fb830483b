// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Plugs a device of the bus into a running QEMU, and unplugs it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use vbus_qmp::{QemuError, Qmp};

/// The path of QEMU's devices that have an id.
const PERIPHERAL: &str = "/machine/peripheral";
const ROOT_PORT: &str = "child<pcie-root-port>";
const VFIO_USER: &str = "child<vfio-user-pci>";

/// The id that `vbus qemu-args` gives to root port number `number`.
pub fn root_port_id(number: usize) -> String {
    format!("vbus-port{number}")
}

/// The most root ports that [`root_port`] can place.
pub const ROOT_PORTS_MAX: usize = 8 * 22;

/// The value of `-device` for a root port. Eight root ports share a slot of q35's bus, so that many
/// fit. They begin at slot 8, because other devices use the slots below.
pub fn root_port(number: usize) -> String {
    let (slot, function) = (8 + number / 8, number % 8);
    let first = if function == 0 { ",multifunction=on" } else { "" };
    format!(
        "pcie-root-port,id={},bus=pcie.0,addr={slot:#x}.{function:x}{first},chassis=100,slot={number}",
        root_port_id(number)
    )
}

/// QEMU's id of the device `name`. It always begins with a letter, as QEMU requires.
fn device_id(name: &str) -> String {
    format!("vbus-{name}")
}

/// How long QEMU waits for the reply to an access, in milliseconds. QEMU's own default is 5 s.
/// After that it ends the connection, and the device is lost for its guest. A bus that stands still
/// (a debugger, a frozen control group, a loaded machine) is not dead: the socket of a dead one
/// closes.
const MESSAGE_TIMEOUT: u32 = 60_000;

/// The value of `-device` for a device of the bus, which is also the arguments of `device_add`.
pub fn device(name: &str, socket: &Path, port: &str) -> Value {
    json!({
        "driver": "vfio-user-pci",
        "id": device_id(name),
        "bus": port,
        "socket": { "type": "unix", "path": socket },
        "x-msg-timeout": MESSAGE_TIMEOUT,
    })
}

/// Whether `device`, as the bus describes it, is one that QEMU has as the front end of vhost-user.
pub fn is_vhost_user(device: &Value) -> bool {
    device["protocol"] == "vhost-user"
}

/// The options of QEMU for a device that it has as the front end of vhost-user: a socket, which
/// QEMU connects again after the bus was gone; the network; and the network card in root port
/// `port`.
pub fn vhost_user_options(device: &Value, port: &str) -> [[String; 2]; 3] {
    let text = |key: &str| device[key].as_str().unwrap_or_default();
    let (id, card) = (device_id(text("name")), &device["device"]);
    let pairs = card["queue-pairs"].as_u64().unwrap_or(1);
    // QEMU ends a value at a comma, unless there are two.
    let socket = text("socket").replace(',', ",,");
    let mut function = format!(
        "virtio-net-pci,id={id},bus={port},netdev={id}-net,mac={},rx_queue_size={QUEUE_SIZE},\
         tx_queue_size={QUEUE_SIZE}",
        card["mac"].as_str().unwrap_or_default(),
    );
    if pairs > 1 {
        function += &format!(",mq=on,vectors={}", 2 * pairs + 2);
    }
    [
        [
            "-chardev".into(),
            format!("socket,id={id}-socket,path={socket},reconnect-ms={RECONNECT_MS}"),
        ],
        ["-netdev".into(), format!("vhost-user,id={id}-net,chardev={id}-socket,queues={pairs}")],
        ["-device".into(), function],
    ]
}

/// Descriptors of each queue: the most that QEMU has.
const QUEUE_SIZE: u16 = 1024;
/// The pause before QEMU connects again.
const RECONNECT_MS: u16 = 500;

/// A free place in a running QEMU.
pub struct Slot {
    qmp: Qmp,
    port: String,
}

impl Slot {
    /// Finds an empty root port. With `port`, checks that this one is empty.
    pub fn find(qmp: &Path, timeout: Duration, port: Option<&str>) -> Result<Slot> {
        let mut qmp = Qmp::connect(qmp, timeout)?;
        let ports = peripherals(&mut qmp, ROOT_PORT)?;
        let mut occupied = 0;
        for id in ports.iter().filter(|id| port.is_none_or(|port| port == id.as_str())) {
            // The port's bus is an object below it with the same name; its children are links
            // called "child[0]".
            let Some(bus) = children(&mut qmp, &format!("{PERIPHERAL}/{id}/{id}"))? else {
                continue;
            };
            if !names(&bus).any(|(name, _)| name.starts_with("child[")) {
                return Ok(Slot { qmp, port: id.clone() });
            }
            occupied += 1;
        }
        match port {
            Some(port) if occupied > 0 => bail!("root port {port:?} is occupied"),
            Some(port) => {
                bail!("this QEMU has no root port with id {port:?}; it has: {}", ports.join(", "))
            }
            None if occupied > 0 => {
                bail!(
                    "all {occupied} root ports of this QEMU are occupied; start it with more \
                     (vbus qemu-args --spare-ports)"
                )
            }
            None => bail!(
                "this QEMU has no root port with an id; start it with some (vbus qemu-args \
                 --spare-ports)"
            ),
        }
    }

    /// The root port's id.
    pub fn port(&self) -> &str {
        &self.port
    }

    /// Plugs the device into the root port.
    pub fn plug(&mut self, name: &str, socket: &Path) -> Result<()> {
        self.qmp.run("device_add", device(name, socket, &self.port)).map(drop)
    }
}

/// Unplugs the device that QEMU has from `socket`. QEMU asks the guest to release it; this function
/// waits until the guest has done so.
pub fn unplug(qmp: &Path, timeout: Duration, name: &str, socket: &Path) -> Result<()> {
    let mut qmp = Qmp::connect(qmp, timeout)?;
    let id = find(&mut qmp, name, socket)?;
    match qmp.run("device_del", json!({ "id": id })) {
        Ok(_) => {}
        // Somebody else, or an earlier attempt that timed out, has asked for it before. The event
        // will still come.
        Err(error) if under_way(&error) => {}
        Err(error) => return Err(error),
    }
    while let Some(event) = qmp.event()? {
        if let Some(outcome) = released(&event, &id) {
            return outcome;
        }
    }
    Err(anyhow!("the guest did not release it within {} s", timeout.as_secs())).context(
        "a guest that has not booted yet, or has no PCI hotplug, cannot release it; if the guest \
         releases it later, remove the device again",
    )
}

/// Whether QEMU waits for the guest already.
pub fn under_way(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<QemuError>()
        .is_some_and(|e| e.description.contains("already in the process of unplug"))
}

/// Whether QEMU has answered that it does not unplug the device.
pub fn is_refused(error: &anyhow::Error) -> bool {
    error.is::<QemuError>() && !under_way(error)
}

/// Whether this event of QEMU tells what became of `device_del` for the device `id`.
pub fn released(event: &Value, id: &str) -> Option<Result<()>> {
    let device = event.pointer("/data/device").and_then(Value::as_str);
    match event.get("event").and_then(Value::as_str) {
        Some("DEVICE_DELETED") if device == Some(id) => Some(Ok(())),
        Some("DEVICE_UNPLUG_GUEST_ERROR" | "MEM_UNPLUG_ERROR") if device == Some(id) => {
            Some(Err(anyhow!("the guest refuses to release it")))
        }
        Some("SHUTDOWN") => Some(Err(anyhow!("the machine shut down before it released it"))),
        _ => None,
    }
}

/// A device that a running QEMU has over vfio-user, with all that it takes to plug it in again.
#[derive(Clone, Debug, PartialEq)]
pub struct Plugged {
    /// QEMU's id.
    pub id: String,
    /// The arguments of `device_add`.
    pub arguments: Value,
    /// It has MSI-X: QEMU 11.1 aborts when it is unplugged.
    pub has_msix: bool,
}

/// The options of a device that stay the same when it is plugged in again, if they are set.
const KEPT: [&str; 4] = ["x-msg-timeout", "x-no-posted-writes", "x-send-queued", "acpi-index"];

/// The devices that QEMU has over vfio-user.
///
/// # Errors
/// QEMU has one without an id, which nobody can unplug, or does not tell its socket.
pub fn plugged(qmp: &mut Qmp) -> Result<Vec<Plugged>> {
    let anonymous = qmp.run("qom-list", json!({ "path": "/machine/peripheral-anon" }))?;
    if names(&anonymous).any(|(_, kind)| kind == VFIO_USER) {
        bail!(
            "this QEMU has a device of the bus without an id, and cannot unplug it; start QEMU \
             with what `vbus qemu-args` prints"
        );
    }
    let mut found = Vec::new();
    for id in peripherals(qmp, VFIO_USER)? {
        match describe(qmp, &id) {
            Ok(device) => found.extend(device),
            // It may have gone between two questions.
            Err(_) if children(qmp, &format!("{PERIPHERAL}/{id}"))?.is_none() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// `None`: QEMU does not have it any more.
fn describe(qmp: &mut Qmp, id: &str) -> Result<Option<Plugged>> {
    let path = format!("{PERIPHERAL}/{id}");
    let Some(children) = children(qmp, &path)? else { return Ok(None) };
    let socket = socket_of(&children)
        .with_context(|| format!("this QEMU does not tell the socket of its device {id:?}"))?;
    let mut property = |name: &str| {
        qmp.run("qom-get", json!({ "path": path, "property": name })).with_context(|| id.to_owned())
    };
    // The path of the bus ends with its name. The place has the device in its upper five bits, and
    // the function in the rest; the property is a string for some versions of QEMU.
    let bus = property("parent_bus")?;
    let bus = bus.as_str().and_then(|path| path.rsplit('/').next()).unwrap_or_default().to_owned();
    let place = property("addr")?;
    let place = place.as_u64().or_else(|| place.as_str()?.parse().ok());
    let mut arguments = json!({
        "driver": "vfio-user-pci",
        "id": id,
        "bus": bus,
        "socket": { "type": "unix", "path": socket },
    });
    if let Some(place) = place {
        arguments["addr"] = format!("{:x}.{:x}", place >> 3, place & 7).into();
    }
    for name in KEPT {
        // Another version of QEMU may not have it.
        if let Ok(value) = property(name) {
            if value != json!(0) {
                arguments[name] = value;
            }
        }
    }
    if let Some(index) = property("bootindex").ok().filter(|index| index.as_i64() >= Some(0)) {
        arguments["bootindex"] = index;
    }
    let has_msix = names(&children).any(|(name, _)| name.starts_with("msix-table"));
    Ok(Some(Plugged { id: id.to_owned(), arguments, has_msix }))
}

/// The socket of a vfio-user device, from the list of its children. QEMU lets nobody read the
/// property, but the name of each BAR's memory begins with it: a few characters are escaped in it,
/// such as a slash by `\x2f`.
fn socket_of(children: &Value) -> Option<PathBuf> {
    let name = names(children).find_map(|(name, _)| {
        Some(name.strip_prefix("vfio-user:")?.split_once(" BAR ")?.0.to_owned())
    })?;
    let name = name.strip_suffix(" base").unwrap_or(&name);
    let mut parts = name.split("\\x");
    let mut path = parts.next()?.to_owned();
    for part in parts {
        let code = u8::from_str_radix(part.get(..2)?, 16).ok()?;
        path.push(char::from(code));
        path.push_str(&part[2..]);
    }
    Some(path.into())
}

/// QEMU's id of the device.
fn find(qmp: &mut Qmp, name: &str, socket: &Path) -> Result<String> {
    let devices = peripherals(qmp, VFIO_USER)?;
    let ours = device_id(name);
    if devices.contains(&ours) {
        return Ok(ours);
    }
    // Somebody else may have plugged the device, with another id. The socket identifies it.
    for id in devices {
        let children = children(qmp, &format!("{PERIPHERAL}/{id}"))?;
        if children.as_ref().and_then(socket_of).is_some_and(|path| path == socket) {
            return Ok(id);
        }
    }
    bail!(
        "this QEMU has no device of {}; give the --qmp of the machine that has it. If none has, \
         omit --qmp: then vbus only removes the device from the bus",
        socket.display()
    )
}

/// The ids of all devices of the type `kind`.
fn peripherals(qmp: &mut Qmp, kind: &str) -> Result<Vec<String>> {
    let list = qmp.run("qom-list", json!({ "path": PERIPHERAL }))?;
    let mut ids: Vec<String> =
        names(&list).filter(|(_, k)| *k == kind).map(|(name, _)| name.to_owned()).collect();
    // QEMU lists them in the order of a hash table. Shorter ids come first here, so that port10
    // follows port9.
    ids.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    Ok(ids)
}

/// The class of QEMU's error for an object that it does not have.
const NOT_FOUND: &str = "DeviceNotFound";

/// The children of the object `path`. `None`: QEMU has no such object, because it has gone since it
/// was listed.
fn children(qmp: &mut Qmp, path: &str) -> Result<Option<Value>> {
    match qmp.run("qom-list", json!({ "path": path })) {
        Ok(list) => Ok(Some(list)),
        Err(error)
            if error.downcast_ref().is_some_and(|QemuError { class, .. }| class == NOT_FOUND) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The names and types in the answer to `qom-list`.
fn names(list: &Value) -> impl Iterator<Item = (&str, &str)> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(|item| Some((item.get("name")?.as_str()?, item.get("type")?.as_str()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_a_devices_memory_tell_its_socket() {
        let list = |names: &[&str]| -> Value {
            names
                .iter()
                .map(|name| json!({ "name": name, "type": "child<memory-region>" }))
                .collect()
        };
        let escaped = r"vfio-user:\x2frun\x2fa \x5b1\x5d.sock BAR 0[0]";
        let children = list(&["bus master[0]", "vfio-user BAR", escaped]);
        assert_eq!(socket_of(&children), Some("/run/a [1].sock".into()));
        let base = list(&[r"vfio-user:\x2fs base BAR 0[0]"]);
        assert_eq!(socket_of(&base), Some("/s".into()));
        for strange in [r"vfio-user:\x2 BAR 0[0]", r"vfio-user:\xé BAR 0[0]", "vfio-user:/s"] {
            assert_eq!(socket_of(&list(&[strange])), None, "{strange}");
        }
    }

    #[test]
    fn events_tell_what_became_of_a_device() {
        let event = |name: &str| json!({ "event": name, "data": { "device": "n" } });
        let is_released = |name: &str, id: &str| released(&event(name), id).map(|it| it.is_ok());
        assert_eq!(is_released("DEVICE_DELETED", "n"), Some(true));
        assert_eq!(is_released("DEVICE_DELETED", "m"), None);
        assert_eq!(is_released("DEVICE_UNPLUG_GUEST_ERROR", "n"), Some(false));
        assert_eq!(is_released("SHUTDOWN", "m"), Some(false));
        assert_eq!(is_released("RESUME", "n"), None);
    }

    #[test]
    fn a_front_end_of_vhost_user_has_three_options() {
        let mut device = json!({
            "name": "n", "socket": "/a,b.sock", "protocol": "vhost-user",
            "device": { "mac": "02:00:00:00:00:01", "queue-pairs": 1 },
        });
        assert!(is_vhost_user(&device) && !is_vhost_user(&json!({ "protocol": "vfio-user" })));
        let [socket, net, function] = vhost_user_options(&device, "p0");
        let expected = "socket,id=vbus-n-socket,path=/a,,b.sock,reconnect-ms=500";
        assert_eq!(socket, ["-chardev", expected]);
        let expected = "vhost-user,id=vbus-n-net,chardev=vbus-n-socket,queues=1";
        assert_eq!(net, ["-netdev", expected]);
        let expected = "virtio-net-pci,id=vbus-n,bus=p0,netdev=vbus-n-net,mac=02:";
        assert!(function[1].starts_with(expected) && !function[1].contains("mq="));
        device["device"]["queue-pairs"] = json!(4);
        let [_, net, function] = vhost_user_options(&device, "p0");
        assert!(net[1].ends_with("queues=4") && function[1].ends_with(",mq=on,vectors=10"));
    }
}
