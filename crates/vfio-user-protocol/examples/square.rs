//! A PCI device with one BAR and one interrupt. A driver writes a number to offset 0 of BAR 0. The
//! device raises INTx, and its square is at offset 4. A write of zero to offset 8 lowers INTx.
#![allow(clippy::cast_possible_truncation, reason = "an offset lies within its region")]
use std::{fs::File, io::Write};
use vfio_user_protocol::{Errno, IrqAction, IrqInfo, RegionInfo, Server, Target, pci};

struct Square {
    regions: [Vec<u8>; 9], // by VFIO's numbers: 0 is BAR 0, 7 is the configuration space
    intx: Option<File>,
    masked: bool, // by having fired, until the client says that the interrupt has ended
}

impl Square {
    fn new() -> Square {
        let mut regions = [4096, 0, 0, 0, 0, 0, 0, 256, 0].map(|bytes| vec![0; bytes]);
        regions[7][..4].copy_from_slice(&[0xf4, 0x1a, 0xf0, 0x10]); // vendor and device
        (regions[7][0x0b], regions[7][0x3d]) = (0xff, 1); // class: others; pin: INTA
        Square { regions, intx: None, masked: false }
    }

    /// Fires INTx if it is pending and neither masked nor disabled by the driver.
    fn update(&mut self) -> Result<(), Errno> {
        let pending = self.regions[0][8] != 0;
        let due = pending && !self.masked && self.regions[7][5] & 4 == 0;
        if let Some(intx) = self.intx.as_mut().filter(|_| due) {
            self.masked = intx.write(&1u64.to_ne_bytes()).is_ok();
        }
        self.regions[7][6] = u8::from(pending || self.masked) << 3; // Interrupt Status
        Ok(())
    }
}

impl Target for Square {
    fn region_info(&self, region: u32) -> RegionInfo {
        RegionInfo::read_write(self.regions[region as usize].len() as u64)
    }
    fn irq_info(&self, index: u32) -> IrqInfo {
        if index == pci::IRQ_INTX { IrqInfo::intx() } else { IrqInfo::default() }
    }
    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.regions[region as usize][offset as usize..][..data.len()]);
        Ok(())
    }
    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let mut new = self.regions[region as usize].clone();
        new[offset as usize..][..data.len()].copy_from_slice(data);
        if region == pci::REGION_CONFIG {
            self.regions[7][4..6].copy_from_slice(&[new[4] & 6, new[5] & 4]); // command
            self.regions[7][17..20].copy_from_slice(&[new[17] & 0xf0, new[18], new[19]]); // BAR 0
        } else {
            let number = u32::from_le_bytes([new[0], new[1], new[2], new[3]]);
            new[4..8].copy_from_slice(&number.wrapping_mul(number).to_le_bytes());
            new[8] |= u8::from(offset == 0);
            self.regions[0] = new;
        }
        self.update()
    }
    fn set_irqs(&mut self, _intx: u32, action: IrqAction) -> Result<(), Errno> {
        self.masked = matches!(action, IrqAction::Mask(_));
        self.intx = match action {
            IrqAction::DisableAll => None,
            IrqAction::Connect { mut eventfds, .. } => eventfds.pop().flatten().map(File::from),
            _ => self.intx.take(),
        };
        self.update()
    }
    fn reset(&mut self) -> Result<(), Errno> {
        *self = Square { intx: self.intx.take(), ..Square::new() };
        Ok(())
    }
    fn disconnected(&mut self) {
        *self = Square::new();
    }
}

fn main() -> std::io::Result<()> {
    let path = std::env::args().nth(1).expect("usage: square SOCKET");
    Server::bind(path, "square", Square::new())?.run()
}
