// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A network to boot from: the test holds the other end of a NIC's stream, and answers ARP, DHCP
//! and TFTP there. It needs no root. Frames are not lost on a stream, so nothing is sent twice
//! unless the client asks again.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result};

/// The server's address.
pub const SERVER: &str = "10.0.2.1";

const SERVER_IP: [u8; 4] = [10, 0, 2, 1];
const CLIENT_IP: [u8; 4] = [10, 0, 2, 15];
const SERVER_MAC: [u8; 6] = [2, 0xb0, 0, 0, 0, 1];

/// The longest frame that a client may send.
const FRAME_MAX: usize = 9018;
/// The longest block of TFTP that fits an MTU of 1500.
const BLOCK_MAX: usize = 1468;
/// The block of a client that asks for no other.
const BLOCK: usize = 512;

/// Ports of UDP.
const DHCP: u16 = 67;
const DHCP_CLIENT: u16 = 68;
const TFTP: u16 = 69;
/// The first port of a transfer.
const TRANSFERS: u16 = 2000;

/// What clients have asked for.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Clients that have accepted an address.
    pub leases: u32,
    /// The files that clients have got whole, and how often.
    pub files: BTreeMap<String, u32>,
    /// The files that were asked for, in order.
    pub asked: Vec<String>,
}

/// A server for one NIC. Dropping it ends it.
pub struct Server {
    stream: UnixStream,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `files` on the stream at `path`. DHCP names `boot` as the file to boot.
    ///
    /// # Errors
    /// Nothing listens there.
    pub fn start(path: &Path, files: BTreeMap<String, Vec<u8>>, boot: &str) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to the stream {}", path.display()))?;
        let seen = Arc::<Mutex<Seen>>::default();
        let mut service =
            Service { files, boot: boot.to_owned(), seen: seen.clone(), transfers: Vec::new() };
        let mut peer = stream.try_clone()?;
        let thread = std::thread::spawn(move || {
            // It ends with the stream.
            while let Ok(frame) = read(&mut peer) {
                let answer = service.answer(&frame);
                if answer.is_some_and(|answer| write(&mut peer, &answer).is_err()) {
                    break;
                }
            }
        });
        Ok(Self { stream, seen, thread: Some(thread) })
    }

    /// What clients have asked for so far.
    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It fails only if the other end has closed the connection.
        let _ = self.stream.shutdown(Shutdown::Both);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads a frame. Each has its length before it.
fn read(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > FRAME_MAX {
        return Err(io::Error::other("the frame is too long"));
    }
    let mut frame = vec![0; length];
    stream.read_exact(&mut frame)?;
    Ok(frame)
}

fn write(stream: &mut UnixStream, frame: &[u8]) -> io::Result<()> {
    let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], frame].concat())
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

/// Who sent a datagram, and where it goes.
#[derive(Clone, Copy)]
struct Ends {
    mac: [u8; 6],
    ip: [u8; 4],
    /// The client's port, and the server's.
    ports: (u16, u16),
}

/// A file on its way to a client.
struct Transfer {
    client: u16,
    name: String,
    block: usize,
    /// The blocks that the client has.
    done: usize,
}

struct Service {
    files: BTreeMap<String, Vec<u8>>,
    boot: String,
    seen: Arc<Mutex<Seen>>,
    /// Those of server port [`TRANSFERS`] and the next ones.
    transfers: Vec<Transfer>,
}

impl Service {
    /// The frame that answers this one.
    fn answer(&mut self, frame: &[u8]) -> Option<Vec<u8>> {
        let mac: [u8; 6] = *frame.get(6..)?.first_chunk()?;
        let packet = frame.get(14..)?;
        match word(frame, 12)? {
            0x0806 => arp(mac, packet),
            0x0800 => self.ip(mac, packet),
            _ => None,
        }
    }

    fn ip(&mut self, mac: [u8; 6], packet: &[u8]) -> Option<Vec<u8>> {
        let header = usize::from(packet.first()? & 15) * 4;
        if packet.get(9)? != &17 {
            return None;
        }
        let ip = *packet.get(12..)?.first_chunk()?;
        let udp = packet.get(header..)?;
        let ports = (word(udp, 0)?, word(udp, 2)?);
        let data = udp.get(8..usize::from(word(udp, 4)?))?;
        let ends = Ends { mac, ip, ports };
        match ports.1 {
            DHCP => self.dhcp(mac, data),
            TFTP => self.ask(ends, data),
            port => self.go_on(ends, port, data),
        }
    }

    /// Offers the address, or confirms it.
    fn dhcp(&self, mac: [u8; 6], data: &[u8]) -> Option<Vec<u8>> {
        const KIND: u8 = 53;
        let mut options = data.get(240..)?;
        let mut kind = None;
        while let [option, length, rest @ ..] = options {
            match option {
                0 => options = &options[1..],
                255 => break,
                _ => {
                    let value = rest.get(..usize::from(*length))?;
                    kind = if *option == KIND { value.first() } else { kind };
                    options = &rest[value.len()..];
                }
            }
        }
        let answer = match kind? {
            1 => 2,
            3 => {
                lock(&self.seen).leases += 1;
                5
            }
            _ => return None,
        };
        let mut reply = vec![0; 236];
        reply[..4].copy_from_slice(&[2, 1, 6, 0]);
        reply[4..8].copy_from_slice(data.get(4..8)?);
        reply[10..12].copy_from_slice(data.get(10..12)?);
        reply[16..20].copy_from_slice(&CLIENT_IP);
        reply[20..24].copy_from_slice(&SERVER_IP);
        reply[28..44].copy_from_slice(data.get(28..44)?);
        reply[108..108 + self.boot.len()].copy_from_slice(self.boot.as_bytes());
        reply.extend([99, 130, 83, 99, KIND, 1, answer]);
        for (option, value) in [(54, SERVER_IP), (51, [0, 0, 14, 16]), (1, [255, 255, 255, 0])] {
            reply.extend([option, 4]);
            reply.extend(value);
        }
        reply.push(255);
        reply.resize(300, 0);
        Some(datagram(Ends { mac, ip: [255; 4], ports: (DHCP_CLIENT, DHCP) }, &reply))
    }

    /// A client asks for a file.
    fn ask(&mut self, ends: Ends, data: &[u8]) -> Option<Vec<u8>> {
        let text = data.strip_prefix(&[0, 1])?;
        let words: Vec<_> = text.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let name = words.first()?.trim_start_matches('/').to_owned();
        lock(&self.seen).asked.push(name.clone());
        let port = TRANSFERS + u16::try_from(self.transfers.len()).ok()?;
        let ends = Ends { ports: (ends.ports.0, port), ..ends };
        let Some(file) = self.files.get(&name) else {
            return Some(datagram(ends, b"\0\x05\0\x01no such file\0"));
        };
        let option = |name: &str| {
            let mut pairs = words.get(2..)?.chunks_exact(2);
            pairs.find(|pair| pair[0].eq_ignore_ascii_case(name))?[1].parse::<usize>().ok()
        };
        let mut agreed = Vec::new();
        let block = option("blksize").map(|block| block.clamp(8, BLOCK_MAX));
        for (name, value) in [("blksize", block), ("tsize", option("tsize").map(|_| file.len()))] {
            agreed.extend(value.map(|value| format!("{name}\0{value}\0")));
        }
        let block = block.unwrap_or(BLOCK);
        let transfer = Transfer { client: ends.ports.0, name, block, done: 0 };
        let first = match agreed.is_empty() {
            true => self.block(&transfer, 0)?,
            false => [b"\0\x06", agreed.concat().as_bytes()].concat(),
        };
        self.transfers.push(transfer);
        Some(datagram(ends, &first))
    }

    /// The message with a block, or `None` behind the last one.
    fn block(&self, transfer: &Transfer, number: usize) -> Option<Vec<u8>> {
        let file = self.files.get(&transfer.name)?;
        let from = number * transfer.block;
        let bytes = file.get(from..)?;
        let bytes = &bytes[..bytes.len().min(transfer.block)];
        let number = u16::try_from((number + 1) & 0xffff).unwrap_or(0);
        Some([&[0, 3][..], &number.to_be_bytes(), bytes].concat())
    }

    /// A client has got a block, or the options.
    fn go_on(&mut self, ends: Ends, port: u16, data: &[u8]) -> Option<Vec<u8>> {
        let at = usize::from(port.checked_sub(TRANSFERS)?);
        let transfer = self.transfers.get(at).filter(|other| other.client == ends.ports.0)?;
        if word(data, 0)? != 4 {
            return None; // An error: the client gives up, or wanted only the options.
        }
        let ends = Ends { ports: (ends.ports.0, port), ..ends };
        let has_next = usize::from(word(data, 2)?) == (transfer.done + 1) & 0xffff;
        let done = transfer.done + usize::from(has_next);
        let answer = self.block(transfer, done);
        let name = transfer.name.clone();
        self.transfers.get_mut(at)?.done = done;
        if answer.is_none() && has_next {
            *lock(&self.seen).files.entry(name).or_default() += 1;
        }
        answer.map(|answer| datagram(ends, &answer))
    }
}

/// Answers who asks for the server's address.
fn arp(mac: [u8; 6], packet: &[u8]) -> Option<Vec<u8>> {
    if word(packet, 6)? != 1 || packet.get(24..28)? != SERVER_IP {
        return None;
    }
    let mut answer = [&mac[..], &SERVER_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]].concat();
    answer.extend([&SERVER_MAC[..], &SERVER_IP, packet.get(8..18)?].concat());
    Some(answer)
}

/// A frame with a datagram from the server. UDP needs no checksum.
fn datagram(Ends { mac, ip, ports }: Ends, data: &[u8]) -> Vec<u8> {
    let length = |more: usize| u16::try_from(data.len() + more).unwrap_or(0).to_be_bytes();
    let mut header = [0; 20];
    (header[0], header[8], header[9]) = (0x45, 64, 17);
    header[2..4].copy_from_slice(&length(28));
    header[12..16].copy_from_slice(&SERVER_IP);
    header[16..].copy_from_slice(&ip);
    let sum: u32 = header.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    header[10..12].copy_from_slice(&(!sum).to_be_bytes()[2..]);
    let (to, from) = (ports.0.to_be_bytes(), ports.1.to_be_bytes());
    [&mac[..], &SERVER_MAC, &[8, 0], &header, &from, &to, &length(8), &[0, 0], data].concat()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn service() -> Service {
        let files = [("kernel".to_owned(), vec![7; 1000])].into();
        let (seen, transfers) = (Arc::default(), Vec::new());
        Service { files, boot: "kernel".into(), seen, transfers }
    }

    /// A client's datagram. It has the server's addresses as its own; the server does not mind.
    fn ask(port: u16, data: &[u8]) -> Vec<u8> {
        let mut frame = datagram(Ends { mac: MAC, ip: SERVER_IP, ports: (port, 1234) }, data);
        frame[6..12].copy_from_slice(&MAC);
        frame
    }

    #[test]
    fn a_file_comes_in_blocks() {
        let mut service = service();
        let reply = service
            .answer(&ask(TFTP, b"\x00\x01/kernel\x00octet\x00blksize\x00600\x00tsize\x000\x00"));
        let reply = reply.unwrap();
        assert_eq!(&reply[42..], b"\x00\x06blksize\x00600\x00tsize\x001000\x00");
        let port = word(&reply, 34).unwrap();
        let mut got = Vec::new();
        for number in 0..2_u8 {
            let data = service.answer(&ask(port, &[0, 4, 0, number])).unwrap();
            assert_eq!(data[42..46], [0, 3, 0, number + 1]);
            got.extend_from_slice(&data[46..]);
        }
        assert_eq!((got.len(), lock(&service.seen).files.len()), (1000, 0));
        // Asked again, the block comes again.
        assert!(service.answer(&ask(port, &[0, 4, 0, 1])).is_some());
        assert_eq!(service.answer(&ask(port, &[0, 4, 0, 2])), None);
        assert_eq!(lock(&service.seen).files, [("kernel".to_owned(), 1)].into());
        let refused = service.answer(&ask(TFTP, b"\0\x01nothing\0octet\0")).unwrap();
        assert_eq!(refused[42..46], [0, 5, 0, 1]);
    }

    #[test]
    fn a_client_gets_an_address() {
        let mut service = service();
        for (kind, answer, leases) in [(1, 2, 0), (3, 5, 1)] {
            let mut request = vec![0; 240];
            request.extend([53, 1, kind, 255]);
            let reply = service.answer(&ask(DHCP, &request)).unwrap();
            assert_eq!(reply[58..62], CLIENT_IP);
            assert_eq!(reply[282..285], [53, 1, answer]);
            assert_eq!(lock(&service.seen).leases, leases);
        }
        let asks = [&[0xff; 6][..], &MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &MAC, &CLIENT_IP];
        let asks = [&asks.concat()[..], &[0; 6], &SERVER_IP].concat();
        let reply = service.answer(&asks).unwrap();
        assert_eq!((&reply[22..28], &reply[38..42]), (&SERVER_MAC[..], &CLIENT_IP[..]));
    }
}
