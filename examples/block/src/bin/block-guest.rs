// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Drives a disk: the first one on the PCI bus of this machine, which needs root, or the one at a
//! socket. It reads to the standard output, and writes what comes from the standard input.

use std::io::{Read, Write, stdin, stdout};
use std::time::Duration;

use anyhow::{Result, ensure};
use example_block::{CLASS, SECTOR, driver::Disk};
use vbus_guest::{PciSource, SocketSource, Source, USER_CLASS, claim, wait};

const HELP: &str = "usage: block-guest [--socket PATH] sectors | read SECTOR COUNT | write SECTOR";

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--socket", path, ref command @ ..] => run(&SocketSource::One(path.into()), command),
        ref command => run(&PciSource::new()?, command),
    }
}

fn run(source: &impl Source, command: &[&str]) -> Result<()> {
    ensure!(matches!(command, ["sectors"] | ["read", _, _] | ["write", _]), HELP);
    let (_, (hal, mut interrupt)) = claim(source, USER_CLASS, CLASS, None)?;
    // If the function has gone, `wait` returns an error. The driver then finds that out by itself.
    let mut disk =
        Disk::open(hal, || wait(&mut *interrupt, Duration::from_secs(1)).unwrap_or(false))?;
    match *command {
        ["read", sector, count] => {
            let mut data = vec![0; usize::from(count.parse::<u8>()?) * SECTOR];
            disk.read(sector.parse()?, &mut data)?;
            stdout().write_all(&data)?;
        }
        ["write", sector] => {
            let mut data = Vec::new();
            stdin().read_to_end(&mut data)?;
            data.resize(data.len().next_multiple_of(SECTOR), 0);
            disk.write(sector.parse()?, &data)?;
        }
        _ => println!("{}", disk.sectors()?),
    }
    Ok(())
}
