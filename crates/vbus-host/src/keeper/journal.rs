// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the keeper has of a bus (spec/keeper.md, "Messages").

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use vbus_vfio_user::Closer;

use crate::take_over::{Frame, HeldPart, Offer, Parcel, now, pack, read};

/// The kinds of messages of a bus to its keeper.
pub mod kind {
    /// The offer of the take-over.
    pub const BUS: u8 = 16;
    /// A device: its name and its state.
    pub const DEVICE: u8 = 17;
    /// A device has gone. The body is its name.
    pub const GONE: u8 = 18;
    /// The keeper has everything of this bus.
    pub const WHOLE: u8 = 19;
    /// The bus ends as somebody asked, and nobody is to start another one.
    pub const ENDS: u8 = 20;
    /// Another bus has taken over. The body is its process, in decimal.
    pub const MOVED: u8 = 21;
    /// The process of the supervisor, as a descriptor. It cleans up when the bus has ended.
    pub const SUPERVISOR: u8 = 22;
    /// The descriptors of a client's message that the bus is about to receive. The body is the name
    /// of the device and the number of the message.
    pub const HELD: u8 = 23;
    /// An eventfd, which is readable once somebody else keeps the bus, or another bus has taken
    /// over.
    pub const LEASE: u8 = 24;
}

/// The most devices that a keeper keeps.
const DEVICES_MAX: usize = 4096;
/// The most bytes of states that it keeps.
const BYTES_MAX: usize = 256 << 20;
/// Bytes before the name in the message of a device: its length.
const NAME_LEN: usize = 1;

/// The last state of each device, and what the bus has beside them.
#[derive(Default)]
pub struct Journal {
    /// `None`: the bus has sent no offer yet.
    bus: Option<(Offer, Vec<OwnedFd>)>,
    devices: HashMap<String, Parcel>,
    /// By device, the last message that came with descriptors.
    held: HashMap<String, Message>,
    /// The process that cleans up behind the bus.
    supervisor: Option<OwnedFd>,
    lease: Option<OwnedFd>,
}

/// The descriptors of a message of a client's. They may be of anything, and to close one can take
/// as long as the client likes: the keeper does not wait for it.
struct Message {
    number: u64,
    fds: Vec<OwnedFd>,
}

impl Drop for Message {
    fn drop(&mut self) {
        Closer::let_go(std::mem::take(&mut self.fds));
    }
}

/// What a message means for whoever follows the bus.
#[derive(Debug, PartialEq, Eq)]
pub enum News {
    /// A state or a descriptor, which the journal has now.
    Kept,
    /// The journal has everything of the bus.
    Whole,
    /// The bus ends as somebody asked.
    Ends,
    /// This process has taken over.
    Moved(i32),
}

impl Journal {
    /// Takes a message. What the state of a device says is not looked at.
    ///
    /// # Errors
    /// It is none of these messages, or too much.
    pub fn take(&mut self, frame: Frame) -> Result<News> {
        let Frame { kind, mut body, mut descriptors } = frame;
        match kind {
            kind::BUS => {
                let offer: Offer = read(&body).context("its offer")?;
                self.bus = Some((offer, descriptors));
            }
            kind::DEVICE => {
                let name = name(&body)?.to_owned();
                body.drain(..NAME_LEN + name.len());
                let others = self.devices.iter().filter(|(other, _)| **other != name);
                let bytes: usize = others.map(|(_, parcel)| parcel.body.len()).sum();
                ensure!(bytes + body.len() <= BYTES_MAX, "its states are too long");
                self.devices.insert(name, Parcel { body, descriptors });
                ensure!(self.devices.len() <= DEVICES_MAX, "it has too many devices");
            }
            kind::GONE => {
                let name = std::str::from_utf8(&body)?;
                self.devices.remove(name);
                self.held.remove(name);
            }
            kind::HELD => {
                let name = name(&body)?.to_owned();
                let number = body.get(NAME_LEN + name.len()..).unwrap_or_default();
                let number = number.try_into().context("the number of a message")?;
                ensure!(self.devices.contains_key(&name), "a message of no device");
                let number = u64::from_le_bytes(number);
                match descriptors.is_empty() {
                    true => drop(self.held.remove(&name)),
                    false => drop(self.held.insert(name, Message { number, fds: descriptors })),
                }
            }
            kind::SUPERVISOR => self.supervisor = descriptors.pop(),
            kind::LEASE => self.lease = descriptors.pop(),
            kind::WHOLE => return Ok(News::Whole),
            kind::ENDS => return Ok(News::Ends),
            kind::MOVED => return Ok(News::Moved(std::str::from_utf8(&body)?.parse()?)),
            other => bail!("it sent message {other}"),
        }
        Ok(News::Kept)
    }

    /// The process that cleans up behind the bus.
    pub fn supervisor(&self) -> Option<&OwnedFd> {
        self.supervisor.as_ref()
    }

    /// Whether the bus has another keeper, or another bus has taken over, without a word to this
    /// one: it stood still at that time.
    pub fn is_replaced(&self) -> bool {
        self.lease.as_ref().is_some_and(|lease| {
            let mut fds = [PollFd::new(lease, PollFlags::IN)];
            let polled = retry_on_intr(|| poll(&mut fds, Some(&Timespec::default())));
            polled.is_ok() && fds[0].revents().contains(PollFlags::IN)
        })
    }

    /// The files of the sockets of the bus, which serves in `dir`.
    pub fn files(&self, dir: &Path) -> BTreeSet<PathBuf> {
        self.bus.as_ref().map(|(offer, _)| offer.files(dir)).unwrap_or_default()
    }

    /// The offer to the next bus: of the devices whose state is there.
    ///
    /// # Errors
    /// There is none, or this process has as many descriptors as it may have.
    pub fn offer(&self) -> Result<Parcel> {
        let (offer, descriptors) = self.bus.as_ref().context("the bus has offered nothing")?;
        let mut offer = offer.clone();
        offer.devices.retain(|device| self.devices.contains_key(&device.name));
        pack(&offer, duplicates(descriptors)?)
    }

    /// The state for the next bus: of the devices of [`offer`](Self::offer), in their order.
    ///
    /// # Errors
    /// As for `offer`.
    pub fn state(&self) -> Result<Parcel> {
        let (offer, _) = self.bus.as_ref().context("the bus has offered nothing")?;
        let mut body = format!("{{\"stopped\":{},\"devices\":[", now()).into_bytes();
        let mut descriptors = Vec::new();
        let there = offer.devices.iter().filter_map(|device| self.devices.get(&device.name));
        for (number, device) in there.enumerate() {
            body.extend((number > 0).then_some(b','));
            body.extend_from_slice(&device.body);
            descriptors.extend(duplicates(&device.descriptors)?);
        }
        body.extend_from_slice(b"],\"held\":");
        let mut held = Vec::new();
        let is_given = |name: &str| {
            let mut names = offer.devices.iter().map(|device| &*device.name);
            self.devices.contains_key(name) && names.any(|given| given == name)
        };
        for (name, Message { number, fds }) in self.held.iter().filter(|(name, _)| is_given(name)) {
            let count = u32::try_from(fds.len()).unwrap_or(u32::MAX);
            held.push(HeldPart { name: name.clone(), number: *number, descriptors: count });
            descriptors.extend(duplicates(fds)?);
        }
        body.extend(serde_json::to_vec(&held)?);
        body.push(b'}');
        Ok(Parcel { body, descriptors })
    }

    /// The number of devices that the next bus would get.
    pub fn devices(&self) -> usize {
        self.devices.len()
    }
}

/// The body of a device's message.
pub fn device(name: &str, state: &[u8]) -> io::Result<Vec<u8>> {
    let len = u8::try_from(name.len()).map_err(|_| io::Error::other("its name is too long"))?;
    Ok([&[len][..], name.as_bytes(), state].concat())
}

/// The name in the body of a device's message.
fn name(body: &[u8]) -> Result<&str> {
    let name = body.split_first().and_then(|(len, rest)| rest.get(..usize::from(*len)));
    Ok(std::str::from_utf8(name.context("the message of a device is too short")?)?)
}

fn duplicates(descriptors: &[OwnedFd]) -> io::Result<Vec<OwnedFd>> {
    descriptors.iter().map(|fd| fd.as_fd().try_clone_to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use rustix::fs::{MemfdFlags, memfd_create};
    use serde_json::{Value, json};

    use super::*;
    use crate::take_over::Wire;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn file() -> OwnedFd {
        memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap()
    }

    fn inode(fd: &OwnedFd) -> u64 {
        rustix::fs::fstat(fd).unwrap().st_ino
    }

    fn offer(names: &[&str]) -> Vec<u8> {
        let device = |name: &&str| {
            json!({
                "name": name, "class": "venet", "msix": false, "express": false, "pic": null,
                "socket": { "path": null, "access": { "owner": null, "group": null, "mode": 384 } },
                "settings": {}, "configured": true,
            })
        };
        let devices: Vec<_> = names.iter().map(device).collect();
        let offer = json!({
            "version": "1", "pid": 7, "sockets": [], "port": null, "manager": null,
            "devices": devices,
        });
        offer.to_string().into_bytes()
    }

    fn frame(kind: u8, body: Vec<u8>, descriptors: Vec<OwnedFd>) -> Frame {
        Frame { kind, body, descriptors }
    }

    #[test]
    fn the_next_bus_gets_the_last_state_of_each_device_in_the_order_of_the_offer() {
        let mut journal = Journal::default();
        assert!(journal.offer().is_err() && journal.state().is_err());
        let (lock, old, new, other) = (file(), file(), file(), file());
        let inodes = [&new, &other].map(inode);
        let kept = Ok(News::Kept);
        let mut take = |kind, body: Vec<u8>, fds| {
            journal.take(frame(kind, body, fds)).map_err(|error| error.to_string())
        };
        assert_eq!(take(kind::BUS, offer(&["b", "a", "late"]), vec![lock]), kept);
        assert_eq!(take(kind::DEVICE, device("a", b"{\"n\":1}").unwrap(), vec![old]), kept);
        assert_eq!(take(kind::DEVICE, device("b", b"{\"n\":2}").unwrap(), vec![other]), kept);
        assert_eq!(take(kind::DEVICE, device("a", b"{\"n\":3}").unwrap(), vec![new]), kept);
        // It is on the bus, and in no offer yet.
        assert_eq!(take(kind::DEVICE, device("c", b"{}").unwrap(), vec![]), kept);
        assert_eq!(take(kind::WHOLE, Vec::new(), vec![]), Ok(News::Whole));
        assert_eq!(take(kind::MOVED, b"12".to_vec(), vec![]), Ok(News::Moved(12)));
        assert_eq!(take(kind::ENDS, Vec::new(), vec![]), Ok(News::Ends));
        let given: Offer = serde_json::from_slice(&journal.offer().unwrap().body).unwrap();
        let names: Vec<_> = given.devices.iter().map(|device| &*device.name).collect();
        assert_eq!(names, ["b", "a"], "a device without a state is none");
        let Parcel { body, descriptors } = journal.state().unwrap();
        let state: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(state["devices"], json!([{ "n": 2 }, { "n": 3 }]));
        assert_eq!(descriptors.iter().map(inode).collect::<Vec<_>>(), [inodes[1], inodes[0]]);
        // The descriptors of the last message that came with some.
        let (one, two) = (file(), file());
        let inodes = [inodes[1], inodes[0], inode(&two)];
        for (number, fd) in [(7_u64, one), (8, two)] {
            let body = device("a", &number.to_le_bytes()).unwrap();
            journal.take(frame(kind::HELD, body, vec![fd])).unwrap();
        }
        let Parcel { body, descriptors } = journal.state().unwrap();
        let state: Value = serde_json::from_slice(&body).unwrap();
        let expected = json!([{ "name": "a", "number": 8, "descriptors": 1 }]);
        assert_eq!(state["held"], expected);
        assert_eq!(descriptors.iter().map(inode).collect::<Vec<_>>(), inodes);
        // None: the state has their message.
        let body = device("a", &9_u64.to_le_bytes()).unwrap();
        journal.take(frame(kind::HELD, body, vec![])).unwrap();
        let Parcel { body, descriptors } = journal.state().unwrap();
        let state: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&state["held"], descriptors.len()), (&json!([]), 2));
        journal.take(frame(kind::GONE, b"b".to_vec(), vec![])).unwrap();
        let state: Value = serde_json::from_slice(&journal.state().unwrap().body).unwrap();
        assert_eq!(state["devices"], json!([{ "n": 3 }]));
    }

    /// A socket that lingers waits for its peer, as a file system of the client's would.
    #[test]
    fn the_keeper_does_not_wait_for_the_close_of_what_a_client_has_sent() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        rustix::io::ioctl_fionbio(&socket, true).unwrap();
        while rustix::io::write(&socket, &[0; 1 << 16]).is_ok() {}
        rustix::io::ioctl_fionbio(&socket, false).unwrap();
        let long = Duration::from_secs(120);
        rustix::net::sockopt::set_socket_linger(&socket, Some(long)).unwrap();
        let mut journal = Journal::default();
        journal.take(frame(kind::DEVICE, device("a", b"{}").unwrap(), vec![])).unwrap();
        let body = device("a", &1_u64.to_le_bytes()).unwrap();
        journal.take(frame(kind::HELD, body, vec![socket.into()])).unwrap();
        let begun = Instant::now();
        journal.take(frame(kind::GONE, b"a".to_vec(), vec![])).unwrap();
        assert!(begun.elapsed() < long / 2, "it waits");
        drop(peer);
    }

    #[test]
    fn what_is_no_message_of_a_bus_is_refused() {
        let mut heavy: Value = serde_json::from_slice(&offer(&["a"])).unwrap();
        heavy["devices"][0]["settings"] = vec![json!({ "": 0 }); 1 << 18].into();
        let heavy = heavy.to_string().into_bytes();
        assert!(serde_json::from_slice::<Offer>(&heavy).is_ok());
        for (what, kind, body) in [
            ("another kind", 1, Vec::new()),
            ("no offer", kind::BUS, b"{}".to_vec()),
            ("an offer that takes much memory", kind::BUS, heavy),
            ("no name", kind::DEVICE, Vec::new()),
            ("a message of nobody", kind::HELD, b"\x01a\0\0\0\0\0\0\0\0".to_vec()),
            ("half a name", kind::DEVICE, b"\x05net0".to_vec()),
            ("no text", kind::DEVICE, b"\x01\xff{}".to_vec()),
            ("no process", kind::MOVED, b"x".to_vec()),
        ] {
            assert!(Journal::default().take(frame(kind, body, vec![])).is_err(), "{what}");
        }
    }

    /// A bus may be killed at any instruction: of what it sends, any number of bytes may be there,
    /// and any number of batches of descriptors. The journal has the state before, or that after.
    #[test]
    fn a_kill_at_any_byte_of_a_message_leaves_a_whole_state() {
        let message = |text: &str, files: &[OwnedFd]| {
            // The bytes as the wire has them, each with the descriptors that go with it.
            let (one, other) = UnixStream::pair().unwrap();
            let fds: Vec<_> = files.iter().map(|fd| fd.as_fd()).collect();
            let body = device("a", text.as_bytes()).unwrap();
            Wire::new(one.as_fd()).send(kind::DEVICE, &body, &fds, soon()).unwrap();
            drop(one);
            other
        };
        let (first, second) = ("{\"n\":1}", "{\"n\":2}");
        let files: Vec<_> = (0..300).map(|_| file()).collect();
        let whole = {
            use std::io::Read as _;
            let mut bytes = Vec::new();
            message(second, &files).read_to_end(&mut bytes).unwrap();
            bytes
        };
        // The head comes with 253 descriptors, the next byte with the others.
        for cut in 0..=whole.len() {
            let mut journal = Journal::default();
            journal.take(frame(kind::BUS, offer(&["a"]), vec![file()])).unwrap();
            let before = message(first, &files[..1]);
            let got = Wire::new(before.as_fd()).receive(soon()).unwrap().unwrap();
            journal.take(got).unwrap();
            let (one, other) = UnixStream::pair().unwrap();
            send_cut(&one, &whole[..cut], &files);
            drop(one);
            if let Ok(Some(frame)) = Wire::new(other.as_fd()).receive(soon()) {
                journal.take(frame).unwrap();
            }
            let Parcel { body, descriptors } = journal.state().unwrap();
            let state: Value = serde_json::from_slice(&body).unwrap();
            let is_after = cut == whole.len();
            let expected = if is_after { (2, 300) } else { (1, 1) };
            assert_eq!(
                (&state["devices"][0]["n"], descriptors.len()),
                (&json!(expected.0), expected.1)
            );
        }
    }

    /// Sends the first bytes of a message with 300 descriptors, as the wire does.
    fn send_cut(socket: &UnixStream, bytes: &[u8], files: &[OwnedFd]) {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let (head, batches) = (16, [&files[..253], &files[253..]]);
        let send = |bytes: &[u8], fds: &[OwnedFd]| {
            if bytes.is_empty() {
                return;
            }
            let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
            let mut space =
                vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&fds));
            }
            let parts = [io::IoSlice::new(bytes)];
            assert_eq!(sendmsg(socket, &parts, &mut control, SendFlags::empty()), Ok(bytes.len()));
        };
        let part = |from: usize, to: usize| bytes.get(from.min(bytes.len())..to.min(bytes.len()));
        send(part(0, head).unwrap_or_default(), batches[0]);
        send(part(head, head + 1).unwrap_or_default(), batches[1]);
        send(part(head + 1, bytes.len()).unwrap_or_default(), &[]);
    }
}
