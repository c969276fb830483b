// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages of vhost-user: their numbers, their lengths, and how many descriptors come with
//! each. All numbers are little-endian, as on the machines that QEMU shares memory between.

use std::fmt;

/// Bytes of a header: request, flags, and bytes of the body.
pub const HEADER_BYTES: usize = 12;
/// The longest body that this end accepts, in bytes.
pub const BODY_MAX: usize = 4096;
/// The most descriptors of a message.
pub const FDS_MAX: usize = 32;
/// The most regions in one table of memory.
const REGIONS_MAX: usize = FDS_MAX;
/// Bytes of a region.
const REGION_BYTES: usize = 32;
/// The most bytes of the device configuration that a message reads.
const CONFIG_MAX: usize = 256;

/// Bits of a header's flags.
mod flag {
    pub const VERSION_MASK: u32 = 3;
    pub const VERSION: u32 = 1;
    pub const REPLY: u32 = 1 << 2;
    pub const NEED_REPLY: u32 = 1 << 3;
}

/// The bit of the payload of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR which says that no
/// descriptor comes with it.
const NO_FD: u64 = 1 << 8;

/// Feature bits of vhost-user. They share the space of the device's features.
pub mod feature {
    /// Both ends negotiate the [`protocol`](super::protocol) features.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// The device logs the pages that it writes, in the bitmap of SET_LOG_BASE.
    pub const LOG_ALL: u64 = 1 << 26;

    /// All of them.
    pub const ALL: u64 = PROTOCOL_FEATURES | LOG_ALL;
}

/// Bits of the protocol features.
pub mod protocol {
    /// GET_QUEUE_NUM, and more than one queue pair.
    pub const MQ: u64 = 1 << 0;
    /// SET_LOG_BASE has the descriptor of a bitmap.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// SEND_RARP.
    pub const RARP: u64 = 1 << 2;
    /// The front end may ask for a reply to any message.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// NET_SET_MTU.
    pub const NET_MTU: u64 = 1 << 4;
    /// SET_BACKEND_REQ_FD: a socket for what the device has to say.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// GET_CONFIG and SET_CONFIG.
    pub const CONFIG: u64 = 1 << 9;
    /// GET_INFLIGHT_FD and SET_INFLIGHT_FD.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// RESET_DEVICE.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// GET_MAX_MEM_SLOTS, ADD_MEM_REG and REM_MEM_REG.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// SET_STATUS and GET_STATUS.
    pub const STATUS: u64 = 1 << 16;
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The number of the request.
    pub request: u32,
    /// The front end wants a reply also to a request that has none.
    pub need_reply: bool,
    /// Bytes of the body.
    pub size: usize,
}

/// Why a message makes no sense. The connection has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The version in the flags.
    #[error("{}: its version is {version}, not {}", Name(*request), flag::VERSION)]
    Version { request: u32, version: u32 },
    /// It says that it is a reply.
    #[error("{}: it is a reply, and nobody has asked", Name(*.0))]
    Reply(u32),
    /// The body is longer than any that there is.
    #[error("{}: a body of {size} bytes, more than {BODY_MAX}", Name(*request))]
    TooLong { request: u32, size: u32 },
    /// The body has another length than this request needs.
    #[error("{}: a body of {got} bytes, not {expected}", Name(*request))]
    Length { request: u32, got: usize, expected: usize },
    /// Another number of descriptors came with it than this request needs.
    #[error("{}: {got} descriptors, not {expected}", Name(*request))]
    Descriptors { request: u32, got: usize, expected: usize },
    /// It has more regions than a message can have.
    #[error("{}: {regions} regions of memory, more than {REGIONS_MAX}", Name(*request))]
    Regions { request: u32, regions: u32 },
}

impl Header {
    /// Reads a header of a request.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Header, Malformed> {
        let mut fields = Fields(bytes);
        let (request, flags, size) = (fields.u32(), fields.u32(), fields.u32());
        let version = flags & flag::VERSION_MASK;
        if version != flag::VERSION {
            return Err(Malformed::Version { request, version });
        }
        if flags & flag::REPLY != 0 {
            return Err(Malformed::Reply(request));
        }
        let fits = usize::try_from(size).ok().filter(|size| *size <= BODY_MAX);
        let size = fits.ok_or(Malformed::TooLong { request, size })?;
        Ok(Header { request, need_reply: flags & flag::NEED_REPLY != 0, size })
    }
}

/// The bytes of a reply to `request`.
pub fn reply(request: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let header = [request, flag::VERSION | flag::REPLY, size].map(u32::to_le_bytes);
    [header.as_flattened(), body].concat()
}

/// A region of the front end's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its address for the driver.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Its address in the front end.
    pub user: u64,
    /// Where it begins in its file.
    pub offset: u64,
}

/// Where a ring is: addresses in the front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The descriptors.
    pub descriptors: u64,
    /// Split: the used ring. Packed: the device's event suppression.
    pub used: u64,
    /// Split: the available ring. Packed: the driver's event suppression.
    pub available: u64,
}

/// The bit of the flags of SET_VRING_ADDR which says that the writes to the used ring are logged,
/// at the address that the message has.
const LOG_USED: u32 = 1;

/// The message that tells of a change of the device configuration, on the socket of
/// SET_BACKEND_REQ_FD. It wants no reply.
pub fn config_changed() -> [u8; HEADER_BYTES] {
    const CONFIG_CHANGE: u32 = 2;
    let mut message = [0; HEADER_BYTES];
    for (bytes, word) in message.chunks_exact_mut(4).zip([CONFIG_CHANGE, flag::VERSION, 0]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    message
}

/// The regions of the buffers in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// Bytes of all of them.
    pub size: u64,
    /// Where they begin in their file.
    pub offset: u64,
    /// For so many rings.
    pub rings: u16,
    /// Descriptors of each ring.
    pub ring_size: u16,
    /// Bytes of the body that says so: some front ends fill it up to a multiple of 8.
    pub body: usize,
}

/// Bytes of a body about the buffers in flight, without and with what fills it up.
const IN_FLIGHT_BYTES: [usize; 2] = [20, 24];

impl InFlight {
    fn parse(request: u32, body: &[u8]) -> Result<InFlight, Malformed> {
        if !IN_FLIGHT_BYTES.contains(&body.len()) {
            let [expected, _] = IN_FLIGHT_BYTES;
            return Err(Malformed::Length { request, got: body.len(), expected });
        }
        let mut fields = Fields(body);
        Ok(InFlight {
            size: fields.u64(),
            offset: fields.u64(),
            rings: fields.u16(),
            ring_size: fields.u16(),
            body: body.len(),
        })
    }

    /// The body of the reply.
    pub fn bytes(&self) -> Vec<u8> {
        let InFlight { size, offset, rings, ring_size, body } = *self;
        let numbers = [size, offset].map(u64::to_le_bytes);
        let counts = [rings, ring_size].map(u16::to_le_bytes);
        let mut bytes = [numbers.as_flattened(), counts.as_flattened()].concat();
        bytes.resize(body, 0);
        bytes
    }
}

/// A request of the front end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Which features are there?
    GetFeatures,
    /// The features that the driver has accepted.
    SetFeatures(u64),
    /// The front end begins.
    SetOwner,
    /// All rings stop. An old form of [`ResetDevice`](Self::ResetDevice).
    ResetOwner,
    /// All memory, with a descriptor for each region.
    SetMemTable(Vec<Region>),
    /// Where the bitmap of the pages is that the device writes: its descriptor comes too.
    SetLogBase { size: u64, offset: u64 },
    /// An eventfd that may be signalled when the bitmap changes.
    SetLogFd,
    /// The size of a ring.
    SetVringNum { ring: u32, size: u32 },
    /// Where a ring is. `log`: the guest address at which writes to its used ring are logged.
    SetVringAddr { ring: u32, addresses: Addresses, log: Option<u64> },
    /// Where the device goes on in a ring.
    SetVringBase { ring: u32, base: u32 },
    /// Stops a ring. Where would the device go on?
    GetVringBase(u32),
    /// How the driver wakes the device: by the descriptor, or not at all.
    SetVringKick(u8),
    /// How the device interrupts the driver, likewise.
    SetVringCall(u8),
    /// How the device tells of an error, likewise.
    SetVringErr(u8),
    /// Which protocol features are there?
    GetProtocolFeatures,
    /// The protocol features that the front end uses.
    SetProtocolFeatures(u64),
    /// How many queue pairs are there?
    GetQueueNum,
    /// The ring is in use from now on, or is not.
    SetVringEnable { ring: u32, enabled: bool },
    /// Tells the network where the driver's address is now.
    SendRarp([u8; 6]),
    /// A socket for what the device has to say.
    SetBackendReqFd,
    /// The MTU that the driver sees.
    SetMtu(u64),
    /// Reads the device configuration.
    GetConfig { offset: u32, size: u32, flags: u32 },
    /// Writes the device configuration.
    SetConfig,
    /// Memory for the buffers in flight, which the front end keeps.
    GetInFlight(InFlight),
    /// That memory, whose descriptor comes too. A back end that has died may have left it.
    SetInFlight(InFlight),
    /// All rings stop, and the device forgets its driver.
    ResetDevice,
    /// How many regions of memory can there be?
    GetMaxMemSlots,
    /// One more region, with its descriptor.
    AddMemReg(Region),
    /// One region less.
    RemMemReg(Region),
    /// The device status.
    SetStatus(u64),
    /// The device status?
    GetStatus,
    /// One that this end does not serve.
    Unsupported(u32),
}

/// The numbers of the requests.
mod number {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// The requests of the document, in the order of their numbers, from 1 on.
const NAMES: [&str; 43] = [
    "GET_FEATURES",
    "SET_FEATURES",
    "SET_OWNER",
    "RESET_OWNER",
    "SET_MEM_TABLE",
    "SET_LOG_BASE",
    "SET_LOG_FD",
    "SET_VRING_NUM",
    "SET_VRING_ADDR",
    "SET_VRING_BASE",
    "GET_VRING_BASE",
    "SET_VRING_KICK",
    "SET_VRING_CALL",
    "SET_VRING_ERR",
    "GET_PROTOCOL_FEATURES",
    "SET_PROTOCOL_FEATURES",
    "GET_QUEUE_NUM",
    "SET_VRING_ENABLE",
    "SEND_RARP",
    "NET_SET_MTU",
    "SET_BACKEND_REQ_FD",
    "IOTLB_MSG",
    "SET_VRING_ENDIAN",
    "GET_CONFIG",
    "SET_CONFIG",
    "CREATE_CRYPTO_SESSION",
    "CLOSE_CRYPTO_SESSION",
    "POSTCOPY_ADVISE",
    "POSTCOPY_LISTEN",
    "POSTCOPY_END",
    "GET_INFLIGHT_FD",
    "SET_INFLIGHT_FD",
    "GPU_SET_SOCKET",
    "RESET_DEVICE",
    "VRING_KICK",
    "GET_MAX_MEM_SLOTS",
    "ADD_MEM_REG",
    "REM_MEM_REG",
    "SET_STATUS",
    "GET_STATUS",
    "GET_SHARED_OBJECT",
    "SET_DEVICE_STATE_FD",
    "CHECK_DEVICE_STATE",
];

/// A request's number, shown with its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name(pub u32);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.0.checked_sub(1).and_then(|at| usize::try_from(at).ok());
        match at.and_then(|at| NAMES.get(at)) {
            Some(name) => f.write_str(name),
            None => write!(f, "request {}", self.0),
        }
    }
}

impl Request {
    /// Reads the request `number` with this body. `fds` descriptors came with it.
    ///
    /// # Errors
    /// Body or descriptors do not fit the request.
    pub fn parse(number: u32, body: &[u8], fds: usize) -> Result<Request, Malformed> {
        let exact = |expected: usize| match body.len() {
            got if got == expected => Ok(Fields(body)),
            got => Err(Malformed::Length { request: number, got, expected }),
        };
        let none = |request: Request| exact(0).map(|_| request);
        let word = || exact(8).map(|mut fields| fields.u64());
        let ring = || exact(8).map(|mut fields| (fields.u32(), fields.u32()));
        let (request, expected) = match number {
            number::GET_FEATURES => (none(Request::GetFeatures)?, 0),
            number::SET_FEATURES => (Request::SetFeatures(word()?), 0),
            number::SET_OWNER => (none(Request::SetOwner)?, 0),
            number::RESET_OWNER => (none(Request::ResetOwner)?, 0),
            number::SET_MEM_TABLE => {
                let regions = regions(body)?;
                let count = regions.len();
                (Request::SetMemTable(regions), count)
            }
            number::SET_LOG_BASE => {
                let mut fields = exact(16)?;
                (Request::SetLogBase { size: fields.u64(), offset: fields.u64() }, 1)
            }
            number::SET_LOG_FD => (none(Request::SetLogFd)?, 1),
            number::SET_VRING_NUM => {
                let (ring, size) = ring()?;
                (Request::SetVringNum { ring, size }, 0)
            }
            number::SET_VRING_ADDR => {
                let mut fields = exact(40)?;
                let ring = fields.u32();
                let flags = fields.u32();
                let addresses = Addresses {
                    descriptors: fields.u64(),
                    used: fields.u64(),
                    available: fields.u64(),
                };
                let log = fields.u64();
                let log = (flags & LOG_USED != 0).then_some(log);
                (Request::SetVringAddr { ring, addresses, log }, 0)
            }
            number::SET_VRING_BASE => {
                let (ring, base) = ring()?;
                (Request::SetVringBase { ring, base }, 0)
            }
            number::GET_VRING_BASE => (Request::GetVringBase(ring()?.0), 0),
            number::SET_VRING_KICK => signal(word()?, Request::SetVringKick),
            number::SET_VRING_CALL => signal(word()?, Request::SetVringCall),
            number::SET_VRING_ERR => signal(word()?, Request::SetVringErr),
            number::GET_PROTOCOL_FEATURES => (none(Request::GetProtocolFeatures)?, 0),
            number::SET_PROTOCOL_FEATURES => (Request::SetProtocolFeatures(word()?), 0),
            number::GET_QUEUE_NUM => (none(Request::GetQueueNum)?, 0),
            number::SET_VRING_ENABLE => {
                let (ring, enabled) = ring()?;
                (Request::SetVringEnable { ring, enabled: enabled != 0 }, 0)
            }
            number::SEND_RARP => {
                let [mac @ .., _, _] = word()?.to_le_bytes();
                (Request::SendRarp(mac), 0)
            }
            number::SET_BACKEND_REQ_FD => (none(Request::SetBackendReqFd)?, 1),
            number::NET_SET_MTU => (Request::SetMtu(word()?), 0),
            number::GET_CONFIG | number::SET_CONFIG => (config(number, body)?, 0),
            number::GET_INFLIGHT_FD => (Request::GetInFlight(InFlight::parse(number, body)?), 0),
            number::SET_INFLIGHT_FD => (Request::SetInFlight(InFlight::parse(number, body)?), 1),
            number::RESET_DEVICE => (none(Request::ResetDevice)?, 0),
            number::GET_MAX_MEM_SLOTS => (none(Request::GetMaxMemSlots)?, 0),
            number::ADD_MEM_REG | number::REM_MEM_REG => {
                let mut fields = exact(8 + REGION_BYTES)?;
                let _padding = fields.u64();
                let region = fields.region();
                match number {
                    number::ADD_MEM_REG => (Request::AddMemReg(region), 1),
                    // Some front ends send the descriptor again.
                    _ => (Request::RemMemReg(region), fds.min(1)),
                }
            }
            number::SET_STATUS => (Request::SetStatus(word()?), 0),
            number::GET_STATUS => (none(Request::GetStatus)?, 0),
            other => (Request::Unsupported(other), fds),
        };
        if fds != expected {
            return Err(Malformed::Descriptors { request: number, got: fds, expected });
        }
        Ok(request)
    }
}

/// The number of a ring and the descriptors that come with the message.
fn signal(word: u64, request: fn(u8) -> Request) -> (Request, usize) {
    let [ring, ..] = word.to_le_bytes();
    (request(ring), usize::from(word & NO_FD == 0))
}

fn regions(body: &[u8]) -> Result<Vec<Region>, Malformed> {
    let request = number::SET_MEM_TABLE;
    let wrong = |expected| Malformed::Length { request, got: body.len(), expected };
    if body.len() < 8 {
        return Err(wrong(8));
    }
    let mut fields = Fields(body);
    let (regions, _padding) = (fields.u32(), fields.u32());
    let count = usize::try_from(regions).ok().filter(|count| *count <= REGIONS_MAX);
    let count = count.ok_or(Malformed::Regions { request, regions })?;
    let expected = 8 + count * REGION_BYTES;
    if body.len() != expected {
        return Err(wrong(expected));
    }
    Ok((0..count).map(|_| fields.region()).collect())
}

fn config(request: u32, body: &[u8]) -> Result<Request, Malformed> {
    let wrong = |expected| Malformed::Length { request, got: body.len(), expected };
    if body.len() < 12 {
        return Err(wrong(12));
    }
    let mut fields = Fields(body);
    let (offset, size, flags) = (fields.u32(), fields.u32(), fields.u32());
    let bytes = usize::try_from(size).unwrap_or(usize::MAX).min(CONFIG_MAX);
    if body.len() != 12 + bytes {
        return Err(wrong(12 + bytes));
    }
    Ok(match request {
        number::GET_CONFIG => Request::GetConfig { offset, size, flags },
        _ => Request::SetConfig,
    })
}

/// Takes numbers from the front of some bytes. What is not there is 0: the length was checked.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((first, rest)) = self.0.split_first_chunk::<N>() else { return [0; N] };
        self.0 = rest;
        *first
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn region(&mut self) -> Region {
        Region { guest: self.u64(), size: self.u64(), user: self.u64(), offset: self.u64() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(request: u32, flags: u32, size: u32) -> Result<Header, Malformed> {
        let words = [request, flags, size].map(u32::to_le_bytes);
        Header::parse(words.as_flattened().try_into().unwrap())
    }

    #[test]
    fn a_header_has_the_version_and_a_length_that_can_be() {
        let good = Header { request: 1, need_reply: true, size: 8 };
        assert_eq!(header(1, 9, 8), Ok(good));
        for flags in [0, 2, 3, 8] {
            assert!(matches!(header(1, flags, 0), Err(Malformed::Version { .. })), "{flags}");
        }
        assert_eq!(header(1, 5, 0), Err(Malformed::Reply(1)));
        let error = header(5, 1, 4097).unwrap_err();
        assert_eq!(error.to_string(), "SET_MEM_TABLE: a body of 4097 bytes, more than 4096");
        assert_eq!(
            header(200, 0, 0).unwrap_err().to_string(),
            "request 200: its version is 0, not 1"
        );
        assert_eq!(Name(43).to_string(), "CHECK_DEVICE_STATE");
    }

    #[test]
    fn each_request_has_its_length_and_its_descriptors() {
        // Bytes of the body, and descriptors.
        let exact = [
            (1, 0, 0),
            (2, 8, 0),
            (3, 0, 0),
            (4, 0, 0),
            (6, 16, 1),
            (7, 0, 1),
            (8, 8, 0),
            (9, 40, 0),
            (10, 8, 0),
            (11, 8, 0),
            (12, 8, 1),
            (13, 8, 1),
            (14, 8, 1),
            (15, 0, 0),
            (16, 8, 0),
            (17, 0, 0),
            (18, 8, 0),
            (19, 8, 0),
            (20, 8, 0),
            (21, 0, 1),
            (34, 0, 0),
            (36, 0, 0),
            (37, 40, 1),
            (39, 8, 0),
            (40, 0, 0),
        ];
        for (number, bytes, fds) in exact {
            let body = vec![0; bytes];
            assert!(Request::parse(number, &body, fds).is_ok(), "{number}");
            let longer = vec![0; bytes + 1];
            let error = Request::parse(number, &longer, fds).unwrap_err();
            let got = bytes + 1;
            assert_eq!(error, Malformed::Length { request: number, got, expected: bytes });
            let error = Request::parse(number, &body, fds + 1).unwrap_err();
            assert!(matches!(error, Malformed::Descriptors { .. }), "{number}");
        }
        let no_fd = 0x103_u64.to_le_bytes();
        assert_eq!(Request::parse(12, &no_fd, 0), Ok(Request::SetVringKick(3)));
        assert!(Request::parse(12, &no_fd, 1).is_err());
        assert_eq!(Request::parse(28, &[1], 2), Ok(Request::Unsupported(28)));
        let rarp = Request::parse(19, &[1, 2, 3, 4, 5, 6, 7, 8], 0);
        assert_eq!(rarp, Ok(Request::SendRarp([1, 2, 3, 4, 5, 6])));
    }

    #[test]
    fn a_body_about_buffers_in_flight_may_be_filled_up() {
        for len in IN_FLIGHT_BYTES {
            let body: Vec<u8> = (1..=20).chain([0; 4]).take(len).collect();
            let Ok(Request::SetInFlight(in_flight)) = Request::parse(32, &body, 1) else {
                panic!()
            };
            assert_eq!((in_flight.rings, in_flight.ring_size), (0x1211, 0x1413));
            assert_eq!(in_flight.bytes(), body);
            assert_eq!(Request::parse(31, &body, 0), Ok(Request::GetInFlight(in_flight)));
        }
        assert!(Request::parse(31, &[0; 21], 0).is_err() && Request::parse(31, &[], 0).is_err());
    }

    #[test]
    fn a_table_of_memory_has_as_many_regions_as_it_says() {
        let table = |count: u32, regions: usize| {
            let mut body = vec![0; 8 + regions * REGION_BYTES];
            body[..4].copy_from_slice(&count.to_le_bytes());
            body
        };
        assert!(Request::parse(5, &table(2, 2), 2).is_ok());
        assert_eq!(Request::parse(5, &table(0, 0), 0), Ok(Request::SetMemTable(Vec::new())));
        assert!(Request::parse(5, &table(2, 2), 1).is_err());
        assert!(Request::parse(5, &table(3, 2), 2).is_err());
        assert!(Request::parse(5, &[0; 7], 0).is_err());
        let error = Request::parse(5, &table(u32::MAX, 2), 2).unwrap_err();
        assert!(matches!(error, Malformed::Regions { .. }), "{error}");
    }

    #[test]
    fn a_read_of_the_configuration_has_room_for_it() {
        let read = |size: u32, room: usize| {
            let mut body = vec![0; 12 + room];
            body[4..8].copy_from_slice(&size.to_le_bytes());
            Request::parse(24, &body, 0)
        };
        assert_eq!(read(24, 24), Ok(Request::GetConfig { offset: 0, size: 24, flags: 0 }));
        assert!(read(24, 23).is_err() && read(u32::MAX, 256).is_ok());
        assert!(Request::parse(24, &[0; 11], 0).is_err());
    }
}
