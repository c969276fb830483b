//! `vbus state`.

use anyhow::Result;

/// Commands.
#[derive(clap::Subcommand, Debug)]
pub enum Command {}

/// Runs one.
pub fn run(command: &Command) -> Result<()> {
    match *command {}
}
