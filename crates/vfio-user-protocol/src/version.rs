// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Version negotiation: the client's proposal, and the server's answer.
//!
//! The reply has no capability that the client did not name. The specification says so, and QEMU
//! needs it: its buffer for the reply has the size of its request.

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::message::{MAJOR, MINOR, Version};

/// The most bytes of version data that this crate accepts. QEMU sends about 200.
pub const MAX_VERSION_DATA: usize = 4096;

/// The most descriptors in one message that this crate accepts. QEMU accepts no server that names
/// more than 16.
pub const MAX_MSG_FDS: usize = 16;

/// The most descriptors that a UNIX socket carries in one message (the kernel's `SCM_MAX_FD`).
pub const KERNEL_MSG_FDS: usize = 253;

/// The most bytes of data in one message that this crate accepts. This is the specification's
/// default, so it also holds for a client that does not ask.
pub const MAX_TRANSFER: usize = 1 << 20;

/// The most mappings of one client at the same time. This is the specification's default for an end
/// that names no number.
pub const MAX_DMA_MAPS: u32 = 65535;

/// Bytes of the smallest page. Addresses and sizes of DMA mappings are multiples of it.
pub const PAGE_SIZE: u64 = 4096;

/// The negotiated parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub struct Negotiated {
    /// The minor version.
    pub minor: u16,
    /// The most descriptors in one message that the peer accepts.
    pub peer_fds: usize,
    /// The most bytes of data in one message that the peer accepts.
    pub peer_transfer: usize,
    /// The most mappings at the same time.
    pub max_dma_maps: usize,
    /// The smallest page of a mapping: its address, size and file offset are multiples of it.
    pub page_size: u64,
    /// Whether the ends use `REGION_WRITE_MULTI`.
    pub write_multiple: bool,
}

impl Negotiated {
    /// Whether a server of this crate can have agreed on these parameters.
    pub(crate) fn is_possible(&self) -> bool {
        self.minor <= MINOR
            && self.peer_fds <= KERNEL_MSG_FDS
            && self.peer_transfer <= MAX_TRANSFER
            && self.max_dma_maps <= MAX_DMA_MAPS as usize
            && self.page_size.is_power_of_two()
            && self.page_size >= PAGE_SIZE
    }
}

/// The capabilities that this crate knows. It ignores others (`migration`). A capability that is
/// not in the reply is not in use.
#[derive(Default)]
struct Capabilities {
    max_msg_fds: Option<u64>,
    max_data_xfer_size: Option<u64>,
    max_dma_maps: Option<u64>,
    pgsizes: Option<u64>,
    write_multiple: Option<bool>,
    /// The sender offers, or has set up, a second socket. This crate uses none.
    twin_socket: bool,
}

/// The reason why the two ends do not agree.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Disagreement {
    /// The peer has another major version.
    #[error("major version {0}; this end supports only {MAJOR}")]
    Major(u16),
    /// The reply has a newer minor version than the request.
    #[error("minor version {0}, newer than proposed")]
    Minor(u16),
    /// The version data has no NUL at its end, or has one within.
    #[error("version data is not a text ended by NUL")]
    NotText,
    /// The version data has more than [`MAX_VERSION_DATA`] bytes.
    #[error("version data of {0} bytes, more than {MAX_VERSION_DATA}")]
    TooLong(usize),
    /// The version data is not the JSON that the specification describes.
    #[error("version data: {0}")]
    Json(#[from] serde_json::Error),
    /// A value of the JSON has another type than the specification says.
    #[error("version data: {0} has the wrong type")]
    Type(&'static str),
    /// All page sizes of the client are below 4 KiB.
    #[error("page sizes {0:#x}, none of 4 KiB or more")]
    PageSizes(u64),
    /// The server sends its commands on a second socket, which the client has not asked for.
    #[error("a second socket, which this end has not asked for")]
    TwinSocket,
}

impl Disagreement {
    /// The errno for the reply.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Major(_) | Self::Minor(_) => Errno::OPNOTSUPP,
            _ => Errno::INVAL,
        }
    }
}

/// Parses the capabilities in version data. `None`: there is no data. `Some(None)`: the data has no
/// capabilities.
fn parse(data: &[u8]) -> Result<Option<Option<Capabilities>>, Disagreement> {
    if data.is_empty() {
        return Ok(None);
    }
    if data.len() > MAX_VERSION_DATA {
        return Err(Disagreement::TooLong(data.len()));
    }
    let end = data.iter().position(|&b| b == 0).ok_or(Disagreement::NotText)?;
    let (text, padding) = data.split_at(end);
    if padding.iter().any(|&b| b != 0) {
        return Err(Disagreement::NotText);
    }
    let data: Map<String, Value> = serde_json::from_slice(text)?;
    let capabilities = match data.get("capabilities") {
        None => return Ok(Some(None)),
        Some(Value::Object(map)) => map,
        Some(_) => return Err(Disagreement::Type("capabilities")),
    };
    let number = |name| match capabilities.get(name) {
        None => Ok(None),
        Some(value) => value.as_u64().map(Some).ok_or(Disagreement::Type(name)),
    };
    let write_multiple = match capabilities.get("write_multiple") {
        None => None,
        Some(value) => Some(value.as_bool().ok_or(Disagreement::Type("write_multiple"))?),
    };
    let twin_socket = match capabilities.get("twin_socket") {
        None => false,
        Some(Value::Object(twin)) => match twin.get("supported") {
            None => false,
            Some(value) => value.as_bool().ok_or(Disagreement::Type("twin_socket.supported"))?,
        },
        Some(_) => return Err(Disagreement::Type("twin_socket")),
    };
    Ok(Some(Some(Capabilities {
        max_msg_fds: number("max_msg_fds")?,
        max_data_xfer_size: number("max_data_xfer_size")?,
        max_dma_maps: number("max_dma_maps")?,
        pgsizes: number("pgsizes")?,
        write_multiple,
        twin_socket,
    })))
}

/// Returns version data with these capabilities and its NUL.
fn encode(capabilities: Option<Capabilities>) -> Vec<u8> {
    let mut data = json!({});
    if let Some(c) = capabilities {
        let mut map = Map::new();
        let mut set = |name: &str, value: Option<Value>| {
            value.and_then(|value| map.insert(name.to_owned(), value))
        };
        set("max_msg_fds", c.max_msg_fds.map(Value::from));
        set("max_data_xfer_size", c.max_data_xfer_size.map(Value::from));
        set("max_dma_maps", c.max_dma_maps.map(Value::from));
        set("pgsizes", c.pgsizes.map(Value::from));
        set("write_multiple", c.write_multiple.map(Value::from));
        data["capabilities"] = map.into();
    }
    let mut text = data.to_string().into_bytes();
    text.push(0);
    text
}

fn limit(value: Option<u64>, default: usize, max: usize) -> usize {
    value.map_or(default, |v| usize::try_from(v).unwrap_or(usize::MAX)).min(max)
}

/// The number of mappings by this capability, or by the default if it is missing.
fn maps(value: Option<u64>) -> usize {
    limit(value, MAX_DMA_MAPS as usize, MAX_DMA_MAPS as usize)
}

/// The smallest of these page sizes, or the default if they are not stated.
fn smallest(pgsizes: Option<u64>) -> u64 {
    pgsizes.map_or(PAGE_SIZE, |sizes| 1 << sizes.trailing_zeros().min(63))
}

/// The server's part. Returns the negotiated parameters and the body of the reply. `max_dma_maps`
/// is the most mappings that the device accepts. A client that names its own number gets the lower
/// of the two as its limit. A client that names none has the specification's limit of 65535.
///
/// # Errors
/// The two ends do not agree. The connection then ends.
pub fn answer(
    request: &Version<'_>,
    max_dma_maps: u32,
) -> Result<(Negotiated, Vec<u8>), Disagreement> {
    if request.major != MAJOR {
        return Err(Disagreement::Major(request.major));
    }
    let minor = request.minor.min(MINOR);
    let proposed = parse(request.data)?;
    let (had_data, asked) = (proposed.is_some(), matches!(proposed, Some(Some(_))));
    let theirs = proposed.flatten().unwrap_or_default();
    let pgsizes = match theirs.pgsizes {
        Some(sizes) if sizes & !(PAGE_SIZE - 1) == 0 => return Err(Disagreement::PageSizes(sizes)),
        Some(sizes) => Some(sizes & !(PAGE_SIZE - 1)),
        None => None,
    };
    let ours = Capabilities {
        max_msg_fds: theirs.max_msg_fds.map(|_| MAX_MSG_FDS as u64),
        max_data_xfer_size: theirs.max_data_xfer_size.map(|_| MAX_TRANSFER as u64),
        max_dma_maps: theirs
            .max_dma_maps
            .map(|theirs| theirs.min(max_dma_maps.min(MAX_DMA_MAPS).into())),
        pgsizes,
        write_multiple: theirs.write_multiple.filter(|&wanted| wanted),
        twin_socket: false,
    };
    let negotiated = Negotiated {
        minor,
        peer_fds: limit(theirs.max_msg_fds, 1, KERNEL_MSG_FDS),
        peer_transfer: limit(theirs.max_data_xfer_size, MAX_TRANSFER, MAX_TRANSFER),
        max_dma_maps: maps(ours.max_dma_maps),
        page_size: smallest(ours.pgsizes),
        write_multiple: ours.write_multiple == Some(true),
    };
    let data = if had_data { encode(asked.then_some(ours)) } else { Vec::new() };
    Ok((negotiated, Version { major: MAJOR, minor, data: &data }.body()))
}

/// Returns the client's proposal: the body of its request.
#[must_use]
pub fn proposal() -> Vec<u8> {
    let data = encode(Some(Capabilities {
        max_msg_fds: Some(KERNEL_MSG_FDS as u64),
        max_data_xfer_size: Some(MAX_TRANSFER as u64),
        max_dma_maps: Some(MAX_DMA_MAPS.into()),
        pgsizes: Some(PAGE_SIZE),
        write_multiple: Some(true),
        twin_socket: false,
    }));
    Version { major: MAJOR, minor: MINOR, data: &data }.body()
}

/// Parses the server's reply to [`proposal`].
///
/// # Errors
/// The reply is not a possible answer to the proposal.
pub fn accept(reply: &Version<'_>) -> Result<Negotiated, Disagreement> {
    if reply.major != MAJOR {
        return Err(Disagreement::Major(reply.major));
    }
    if reply.minor > MINOR {
        return Err(Disagreement::Minor(reply.minor));
    }
    let theirs = parse(reply.data)?.flatten().unwrap_or_default();
    if theirs.twin_socket {
        return Err(Disagreement::TwinSocket);
    }
    Ok(Negotiated {
        minor: reply.minor,
        peer_fds: limit(theirs.max_msg_fds, 1, KERNEL_MSG_FDS),
        peer_transfer: limit(theirs.max_data_xfer_size, MAX_TRANSFER, MAX_TRANSFER),
        max_dma_maps: maps(theirs.max_dma_maps),
        page_size: smallest(theirs.pgsizes),
        write_multiple: theirs.write_multiple == Some(true),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(data: &[u8]) -> Result<(Negotiated, Vec<u8>), Disagreement> {
        answer(&Version { major: 0, minor: 0, data }, 512)
    }

    /// QEMU's request. Its buffer for the reply has the size of this request, so the reply must not
    /// be longer.
    const QEMU: &[u8] = b"{\"capabilities\": {\"migration\": \
        {\"pgsize\": 4096, \"max_bitmap_size\": 268435456}, \
        \"max_msg_fds\": 16, \"max_data_xfer_size\": 1048576, \"pgsizes\": 4096, \
        \"max_dma_maps\": 65535, \
        \"write_multiple\": true}}\0";

    #[test]
    fn qemu_gets_what_it_understands() {
        let (negotiated, body) = ask(QEMU).expect("QEMU's proposal is fine");
        assert_eq!(
            negotiated,
            Negotiated {
                minor: 0,
                peer_fds: 16,
                peer_transfer: 1 << 20,
                max_dma_maps: 512,
                page_size: 4096,
                write_multiple: true
            }
        );
        assert!(body.len() <= QEMU.len() + 4);
        let text = std::str::from_utf8(&body[4..body.len() - 1]).expect("JSON is UTF-8");
        assert_eq!(
            text,
            "{\"capabilities\":{\"max_data_xfer_size\":1048576,\"max_dma_maps\":512,\"max_msg_fds\":16,\
             \"pgsizes\":4096,\"write_multiple\":true}}"
        );
    }

    #[test]
    fn nothing_is_offered_that_was_not_proposed() {
        assert_eq!(ask(b"").expect("no data is legal").1, [0; 4]);
        assert_eq!(&ask(b"{}\0").expect("an empty object is legal").1[4..], b"{}\0");
        let (negotiated, body) =
            ask(b"{\"capabilities\":{\"write_multiple\":false,\"new\":[1]}}\0").expect("legal");
        assert_eq!(&body[4..], b"{\"capabilities\":{}}\0");
        assert!(!negotiated.write_multiple);
        assert_eq!((negotiated.peer_fds, negotiated.peer_transfer), (1, MAX_TRANSFER));
        assert_eq!(negotiated.max_dma_maps, 65535, "what an unstated number means");
    }

    #[test]
    fn wrong_versions_and_texts_are_told_apart() {
        assert!(matches!(
            answer(&Version { major: 1, minor: 0, data: b"" }, 512),
            Err(Disagreement::Major(1))
        ));
        assert_eq!(
            answer(&Version { major: 0, minor: 9, data: b"" }, 512).expect("newer minor").0.minor,
            MINOR
        );
        for text in [&b"{}"[..], b"{\0}\0", b"{}\0x"] {
            assert!(matches!(ask(text), Err(Disagreement::NotText)), "{text:?}");
        }
        for text in [&b"\0"[..], b"{\0", b"[]\0", b"\xff\xfe\0"] {
            assert!(matches!(ask(text), Err(Disagreement::Json(_))), "{text:?}");
        }
        for text in [
            &b"{\"capabilities\":[]}\0"[..],
            b"{\"capabilities\":{\"max_msg_fds\":-1}}\0",
            b"{\"capabilities\":{\"write_multiple\":1}}\0",
        ] {
            assert!(matches!(ask(text), Err(Disagreement::Type(_))), "{text:?}");
        }
        assert!(matches!(
            ask(b"{\"capabilities\":{\"pgsizes\":512}}\0"),
            Err(Disagreement::PageSizes(512))
        ));
        assert!(matches!(ask(&[b' '; MAX_VERSION_DATA + 1]), Err(Disagreement::TooLong(_))));
        let deep = [vec![b'['; 4000], vec![0]].concat();
        assert!(matches!(ask(&deep), Err(Disagreement::Json(_))));
    }

    #[test]
    fn both_ends_agree() {
        let body = proposal();
        let request = Version::parse(&body).expect("our own");
        let (server, reply) = answer(&request, 700).expect("our own");
        let client = accept(&Version::parse(&reply).expect("our own")).expect("our own");
        assert_eq!((client.minor, server.minor), (MINOR, MINOR));
        assert!(client.write_multiple && server.write_multiple);
        assert_eq!((client.max_dma_maps, server.max_dma_maps), (700, 700));
        let silent = Version { major: 0, minor: 1, data: b"" };
        assert_eq!(accept(&silent).expect("no data is legal").max_dma_maps, 65535);
        assert_eq!((client.peer_fds, server.peer_fds), (MAX_MSG_FDS, KERNEL_MSG_FDS));
    }
}
