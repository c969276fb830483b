// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a journal costs: the time of a read with its reply, and of a posted write, by message,
//! without a journal and with one. Both take turns, so that the load of the machine hits both.
//!
//! ```text
//! cargo run --release -p vfio-user-protocol --example journal_cost
//! ```

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vfio_user_protocol::message::{Kind, message};
use vfio_user_protocol::{Errno, IrqAction, IrqInfo, RegionInfo, Server, Target, journal, pci};

/// A device of one register.
struct Register;

impl Target for Register {
    fn region_info(&self, _: u32) -> RegionInfo {
        RegionInfo::read_write(4096)
    }
    fn irq_info(&self, _: u32) -> IrqInfo {
        IrqInfo::default()
    }
    fn read(&mut self, _: u32, _: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.fill(0);
        Ok(())
    }
    fn write(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }
    fn set_irqs(&mut self, _: u32, _: IrqAction) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }
    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }
    fn disconnected(&mut self) {}
}

const TURNS: usize = 41;
const READS: u32 = 2000;
const WRITES: u32 = 500;

/// A server and its client, which take turns in one thread: no time of a scheduler is in it. The
/// times are those of the server, by message.
struct Lane {
    server: Server<Register>,
    client: UnixStream,
    reads: Vec<Duration>,
    writes: Vec<Duration>,
}

impl Lane {
    fn new(path: PathBuf, with_journal: bool) -> io::Result<Lane> {
        let mut server = Server::bind(&path, "register", Register)?;
        if with_journal {
            server.set_journal(journal::create()?, Instant::now())?;
        }
        let client = UnixStream::connect(&path)?;
        let mut lane = Lane { server, client, reads: Vec::new(), writes: Vec::new() };
        lane.call(&command(1, false, &[0; 4]), 20)?;
        Ok(lane)
    }

    /// Returns the server's part of the time.
    fn call(&mut self, message: &[u8], reply: usize) -> io::Result<Duration> {
        self.client.write_all(message)?;
        let start = Instant::now();
        while self.server.ready(Instant::now()).more {}
        let time = start.elapsed();
        self.client.read_exact(&mut vec![0; reply])?;
        Ok(time)
    }

    fn turn(&mut self) -> io::Result<()> {
        let access = |bytes: u32| {
            let mut body = 0u64.to_ne_bytes().to_vec();
            body.extend(pci::REGION_BAR0.to_ne_bytes());
            body.extend(bytes.to_ne_bytes());
            body
        };
        let read = command(9, false, &access(4));
        let mut time = Duration::ZERO;
        for _ in 0..READS {
            time += self.call(&read, 36)?;
        }
        self.reads.push(time / READS);
        let mut write = access(4);
        write.extend([0; 4]);
        let write = command(10, true, &write);
        let mut time = Duration::ZERO;
        for _ in 0..WRITES {
            time += self.call(&write, 0)?;
        }
        self.writes.push(time / WRITES);
        Ok(())
    }
}

fn command(number: u16, no_reply: bool, body: &[u8]) -> Vec<u8> {
    message(1, number, Kind::Command { no_reply }, body)
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let mut lanes = [
        Lane::new(folder.path().join("without"), false)?,
        Lane::new(folder.path().join("with"), true)?,
    ];
    for _ in 0..TURNS {
        lanes.iter_mut().try_for_each(Lane::turn)?;
    }
    let [without, with] = &mut lanes;
    for (what, without, with) in [
        ("read", &mut without.reads, &mut with.reads),
        ("posted write", &mut without.writes, &mut with.writes),
    ] {
        let (without, with) = (median(without), median(with));
        let ratio = with.as_secs_f64() / without.as_secs_f64();
        println!("{what:13} without {without:>9.1?}   with {with:>9.1?}   ratio {ratio:.2}");
    }
    Ok(())
}
