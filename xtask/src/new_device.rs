// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask new-device` makes a crate for a new device class.

use std::path::PathBuf;

use anyhow::Result;
use testkit::template;

/// The text at the end of `--help`.
const HELP: &str = "\
The crate has a device and its driver that work, a program that serves the device (all of `vbus`,
with this class), a program that drives it in a guest or in a plain process, and tests of both. Its
README.md says how to go on. For example:
  cargo xtask new-device my-block --path ../my-block
  cd ../my-block
  cargo test                   # the driver in a process
  cargo test -- --ignored      # the driver in a real guest";

#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// The name of the class and of the crate: at most 16 lower-case letters, digits and hyphens
    name: String,
    /// The folder to make; by default NAME in the current folder
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
}

/// Makes the crate.
pub fn run(args: &Args) -> Result<bool> {
    let path = args.path.clone().unwrap_or_else(|| PathBuf::from(&args.name));
    for file in template::new_device(&args.name, &path)? {
        println!("{}", file.display());
    }
    eprintln!(
        "next: cd {}, then `cargo test`, `cargo test -- --ignored` (in a real guest); README.md \
         says more",
        path.display()
    );
    Ok(true)
}
