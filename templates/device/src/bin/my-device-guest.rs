//! Drives a device of this class: the first one on the PCI bus of this machine, which needs root,
//! or the one at a socket.

use std::time::Duration;

use anyhow::{Result, bail};
use my_device::driver::MyDevice;
use vbus_guest::{PciSource, SocketSource, Source, USER_CLASS, claim, wait};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--socket", path, text] => run(&SocketSource::One(path.into()), text),
        [text] if !text.starts_with('-') => run(&PciSource::new()?, text),
        _ => bail!("usage: my-device-guest [--socket PATH] TEXT"),
    }
}

fn run(source: &impl Source, text: &str) -> Result<()> {
    let (_, (hal, mut interrupt)) = claim(source, USER_CLASS, "my-device", None)?;
    let mut device = MyDevice::open(hal)?;
    // If the function has gone, `wait` returns an error. `ask` then finds that out by itself.
    let answer =
        device.ask(text, || wait(&mut *interrupt, Duration::from_secs(1)).unwrap_or(false))?;
    println!("{answer}");
    Ok(())
}
