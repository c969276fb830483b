// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The frame of a saved machine: a header, and then sections (`spec/vmm-snapshot.md`). A file of
//! `vbus-vmm snapshot` and the stream of `vbus-vmm migrate` have the same form.
//!
//! A reader takes nothing on trust: a section that is longer than its kind may be is refused before
//! any memory is taken for it.

use std::io::{self, ErrorKind, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::vcpu_state::STATE_BYTES_MAX;

/// The first bytes.
const MAGIC: [u8; 8] = *b"vbusvmm\x1a";
/// The version of the format.
pub(crate) const VERSION: u32 = 1;
/// Bytes of the header of a section.
const HEADER: usize = 16;

/// Bytes of a page of memory.
pub(crate) const PAGE: u64 = PAGE_BYTES as u64;
/// The same, for slices.
pub(crate) const PAGE_BYTES: usize = 4096;
/// The most pages of one section.
pub(crate) const PAGES_MAX: usize = 256;
/// The most bytes of a piece of a device's data.
pub(crate) const DEVICE_BYTES_MAX: usize = 1 << 20;
/// The most bytes of a section in JSON.
const JSON_BYTES_MAX: u64 = 1 << 20;
/// More bytes than the states of the kernel's interrupt controllers have.
const CHIP_BYTES_MAX: u64 = 4096;

/// Why something is no saved machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    /// It cannot be read.
    #[error("cannot read the saved machine: {0}")]
    Io(#[from] io::Error),
    /// It begins otherwise.
    #[error("this is no saved machine of vbus-vmm")]
    Foreign,
    /// It has a version that this program does not know.
    #[error(
        "the machine was saved in version {0} of the format; this program knows version {VERSION}"
    )]
    Version(u32),
    /// It ends too early.
    #[error("the saved machine is cut off: it ends within {0}")]
    Cut(&'static str),
    /// A section is not what it has to be.
    #[error("the saved machine is damaged: {0}")]
    Damaged(String),
}

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The description of the machine. It is the first section.
    Machine,
    /// Pages of memory: the address of the first, and their bytes.
    Pages,
    /// Pages of zeros: the address of the first, and their number.
    Zeros,
    /// The state of the virtual CPU whose number the section has.
    Cpu,
    /// The state of an interrupt controller or a timer of the kernel. The number says which.
    Chip,
    /// The state of the devices of this program.
    Devices,
    /// A piece of the data of the device in the slot whose number the section has.
    Device,
    /// There is no more. The receiver answers.
    End,
    /// Only in a stream: the sender gives the machine up, and the receiver lets it run.
    Go,
}

impl Kind {
    const ALL: [Kind; 9] = [
        Kind::Machine,
        Kind::Pages,
        Kind::Zeros,
        Kind::Cpu,
        Kind::Chip,
        Kind::Devices,
        Kind::Device,
        Kind::End,
        Kind::Go,
    ];

    fn number(self) -> u32 {
        self as u32 + 1
    }

    /// The most bytes of a section of this kind.
    fn limit(self) -> u64 {
        match self {
            Kind::Machine | Kind::Devices => JSON_BYTES_MAX,
            Kind::Pages => 8 + PAGES_MAX as u64 * PAGE,
            Kind::Zeros => 16,
            Kind::Cpu => STATE_BYTES_MAX,
            Kind::Chip => CHIP_BYTES_MAX,
            Kind::Device => DEVICE_BYTES_MAX as u64,
            Kind::End | Kind::Go => 0,
        }
    }
}

/// Writes a saved machine.
pub(crate) struct Writer<W> {
    to: W,
    bytes: u64,
}

impl<W: Write> Writer<W> {
    /// Writes the header.
    pub(crate) fn new(mut to: W) -> io::Result<Writer<W>> {
        let mut header = [0; 16];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        to.write_all(&header)?;
        Ok(Writer { to, bytes: 16 })
    }

    /// Writes a section, whose content is `parts` one after the other.
    pub(crate) fn section(&mut self, kind: Kind, number: u32, parts: &[&[u8]]) -> io::Result<()> {
        let len = parts.iter().map(|part| part.len() as u64).sum::<u64>();
        if len > kind.limit() {
            return Err(io::Error::other(format!("{kind:?} of {len} bytes is too long")));
        }
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&kind.number().to_le_bytes());
        header[4..8].copy_from_slice(&number.to_le_bytes());
        header[8..].copy_from_slice(&len.to_le_bytes());
        self.to.write_all(&header)?;
        self.bytes += HEADER as u64 + len;
        parts.iter().try_for_each(|part| self.to.write_all(part))
    }

    /// Writes a section in JSON.
    pub(crate) fn json(&mut self, kind: Kind, value: &impl Serialize) -> io::Result<()> {
        self.section(kind, 0, &[&serde_json::to_vec(value)?])
    }

    /// Passes on what a buffer holds back.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }

    /// The bytes so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// A section that was read.
pub(crate) struct Section<'a> {
    /// What it holds.
    pub(crate) kind: Kind,
    /// Its number.
    pub(crate) number: u32,
    /// Its content.
    pub(crate) content: &'a [u8],
}

impl Section<'_> {
    /// Decodes a section in JSON.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, FrameError> {
        serde_json::from_slice(self.content)
            .map_err(|error| FrameError::Damaged(format!("{:?}: {error}", self.kind)))
    }

    /// The 64-bit number at the beginning, and what follows.
    pub(crate) fn word(&self) -> Result<(u64, &[u8]), FrameError> {
        let (word, rest) = self.content.split_first_chunk().ok_or_else(|| {
            FrameError::Damaged(format!("{:?} of {} bytes", self.kind, self.content.len()))
        })?;
        Ok((u64::from_le_bytes(*word), rest))
    }
}

/// Reads a saved machine.
pub(crate) struct Reader<R> {
    from: R,
    content: Vec<u8>,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    pub(crate) fn new(mut from: R) -> Result<Reader<R>, FrameError> {
        let mut header = [0; 16];
        match from.read_exact(&mut header) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(FrameError::Foreign);
            }
            result => result?,
        }
        if header[..8] != MAGIC {
            return Err(FrameError::Foreign);
        }
        let version = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        if version != VERSION || header[12..] != [0; 4] {
            return Err(FrameError::Version(version));
        }
        Ok(Reader { from, content: Vec::new() })
    }

    /// Reads the next section. It takes at most as much memory as a section of its kind may have.
    pub(crate) fn next(&mut self) -> Result<Section<'_>, FrameError> {
        let mut header = [0; HEADER];
        self.fill(&mut header, "the header of a section")?;
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (kind, number, len) =
            (word(0), word(4), u64::from(word(12)) << 32 | u64::from(word(8)));
        let found = Kind::ALL.into_iter().find(|known| known.number() == kind);
        let kind = found.ok_or_else(|| FrameError::Damaged(format!("section of kind {kind}")))?;
        if len > kind.limit() {
            return Err(FrameError::Damaged(format!("{kind:?} of {len} bytes")));
        }
        let mut content = std::mem::take(&mut self.content);
        content.resize(usize::try_from(len).unwrap_or(0), 0);
        self.fill(&mut content, "a section")?;
        self.content = content;
        Ok(Section { kind, number, content: &self.content })
    }

    /// Checks that nothing follows the last section.
    pub(crate) fn end(&mut self) -> Result<(), FrameError> {
        match self.from.read_exact(&mut [0]) {
            Ok(()) => Err(FrameError::Damaged("there is more after its end".into())),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn fill(&mut self, bytes: &mut [u8], what: &'static str) -> Result<(), FrameError> {
        self.from.read_exact(bytes).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => FrameError::Cut(what),
            _ => error.into(),
        })
    }

    /// What the sections are read from.
    pub(crate) fn get_ref(&self) -> &R {
        &self.from
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn saved() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes).unwrap();
        writer.json(Kind::Machine, &[1, 2]).unwrap();
        let address = 0x10_0000_u64.to_le_bytes();
        writer.section(Kind::Pages, 0, &[&address, &[7; 4096]]).unwrap();
        writer.section(Kind::Cpu, 3, &[b"state"]).unwrap();
        writer.section(Kind::End, 0, &[]).unwrap();
        assert_eq!(writer.bytes(), bytes.len() as u64);
        bytes
    }

    fn fault(bytes: &[u8]) -> String {
        let mut reader = match Reader::new(bytes) {
            Ok(reader) => reader,
            Err(error) => return error.to_string(),
        };
        loop {
            match reader.next() {
                Err(error) => return error.to_string(),
                Ok(section) if section.kind == Kind::End => return "none".into(),
                Ok(_) => {}
            }
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = saved();
        let mut reader = Reader::new(&bytes[..]).unwrap();
        assert_eq!(reader.next().unwrap().json::<Vec<u32>>().unwrap(), [1, 2]);
        let pages = reader.next().unwrap();
        assert_eq!((pages.kind, pages.word().unwrap()), (Kind::Pages, (0x10_0000, &[7; 4096][..])));
        let cpu = reader.next().unwrap();
        assert_eq!((cpu.kind, cpu.number, cpu.content), (Kind::Cpu, 3, &b"state"[..]));
        assert!(cpu.word().is_err() && cpu.json::<u32>().is_err());
        assert_eq!(reader.next().unwrap().kind, Kind::End);
        reader.end().unwrap();
    }

    /// Not even fewer bytes than a section has may follow.
    #[test]
    fn nothing_follows_the_end() {
        for more in [1, HEADER - 1, HEADER, 100] {
            let bytes = [saved(), vec![0; more]].concat();
            let mut reader = Reader::new(&bytes[..]).unwrap();
            while reader.next().unwrap().kind != Kind::End {}
            assert!(reader.end().unwrap_err().to_string().contains("more after its end"), "{more}");
        }
    }

    #[test]
    fn what_is_none_is_named() {
        let good = saved();
        assert_eq!(fault(&good), "none");
        assert!(fault(b"#!/bin/sh").contains("no saved machine"));
        assert!(fault(&[0; 100]).contains("no saved machine"));
        for len in 16..good.len() {
            assert!(fault(&good[..len]).contains("cut off"), "{len} bytes");
        }
        let changed = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            fault(&bytes)
        };
        assert!(changed(8, 2).contains("version 2"));
        assert!(changed(16, 77).contains("kind 77"));
        assert!(changed(16, 0).contains("kind 0"));
        // Lengths that no memory is taken for.
        assert!(changed(16 + 15, 0x80).contains("damaged"));
        assert!(changed(16 + 11, 0x7f).contains("damaged"));
    }

    /// Any byte at any place, and any cut: an error or a machine, and never more memory than a
    /// section may have.
    #[test]
    fn any_bytes_are_harmless() {
        let good = saved();
        for at in 0..good.len().min(200) {
            for byte in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = byte;
                let _ = fault(&bytes);
            }
        }
        let mut writer = Writer::new(Vec::new()).unwrap();
        assert!(writer.section(Kind::End, 0, &[&[0]]).is_err());
    }
}
