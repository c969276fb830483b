// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `DEVICE_SET_IRQS`: changes of interrupts.

use super::fields::{Body, Fields, Malformed, check_body_size};

/// What `DEVICE_SET_IRQS` does with the interrupts of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqVerb {
    /// Mask them, or connect eventfds that mask them.
    Mask,
    /// Unmask them, or connect eventfds that unmask them.
    Unmask,
    /// Trigger them, or connect eventfds by which the device triggers them.
    Trigger,
}

/// How `DEVICE_SET_IRQS` selects interrupts of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqData<'a> {
    /// All of them.
    None,
    /// Those whose byte is not zero.
    Bool(&'a [u8]),
    /// All of them. The message carries the descriptors.
    Eventfd,
}

/// `DEVICE_SET_IRQS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    /// The interrupt index (INTx, MSI, MSI-X, ...).
    pub index: u32,
    /// First interrupt of the range.
    pub start: u32,
    /// Number of interrupts in the range.
    pub count: u32,
    /// What to do.
    pub verb: IrqVerb,
    /// The interrupts that it does this to.
    pub data: IrqData<'a>,
}

impl<'a> SetIrqs<'a> {
    const LEN: usize = 20;

    /// Parses a body.
    ///
    /// # Errors
    /// The body is too short, `argsz` is not its size, or the flags do not have exactly one verb
    /// and one kind of data.
    pub fn parse(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut f = Fields::new(body);
        let (argsz, flags, index, start, count) =
            (f.u32()?, f.u32()?, f.u32()?, f.u32()?, f.u32()?);
        check_body_size(argsz, Self::LEN, body.len())?;
        let verb = match flags & 0x38 {
            0x08 => IrqVerb::Mask,
            0x10 => IrqVerb::Unmask,
            0x20 => IrqVerb::Trigger,
            _ => return Err(Malformed::Flags(flags)),
        };
        let data = match flags & !0x38 {
            0x1 => IrqData::None,
            0x2 => {
                let need = Self::LEN.saturating_add(count as usize);
                check_body_size(argsz, need, body.len())?;
                let bools = f.rest.get(..count as usize);
                IrqData::Bool(bools.ok_or(Malformed::Short { need, have: body.len() })?)
            }
            0x4 => IrqData::Eventfd,
            _ => return Err(Malformed::Flags(flags)),
        };
        Ok(Self { index, start, count, verb, data })
    }

    /// Returns the body of the request. The reply has no body.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        let (kind, bools): (u32, &[u8]) = match self.data {
            IrqData::None => (1, &[]),
            IrqData::Bool(bools) => (2, bools),
            IrqData::Eventfd => (4, &[]),
        };
        let verb = match self.verb {
            IrqVerb::Mask => 0x08,
            IrqVerb::Unmask => 0x10,
            IrqVerb::Trigger => 0x20,
        };
        let argsz = u32::try_from(Self::LEN + bools.len()).unwrap_or(u32::MAX);
        let body = Body::default().u32(argsz).u32(kind | verb);
        body.u32(self.index).u32(self.start).u32(self.count).bytes(bools).0
    }
}
