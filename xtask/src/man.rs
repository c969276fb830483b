// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask man` writes the man pages and shell completions of every program.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use testkit::workspace;

/// The programs. Each is in the package of its name.
pub const PROGRAMS: [&str; 3] = ["vbus", "vbus-guest", "vbus-vmm"];

#[derive(clap::Args)]
pub struct Args {
    /// The folder to write to: man/*.1, and completions/ for bash, zsh and fish [default:
    /// target/documents]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Writes the documents.
pub fn run(args: &Args) -> Result<bool> {
    let dir = match &args.out {
        Some(out) => std::path::absolute(out)?,
        None => workspace::target().join("documents"),
    };
    for program in PROGRAMS {
        let status = workspace::cargo()
            .args(["run", "--quiet", "--package", program, "--bin", program, "--"])
            .arg("generate-documents")
            .arg(&dir)
            .status()
            .context("cannot run cargo")?;
        ensure!(status.success(), "{program} cannot make its documents");
    }
    println!("{}", dir.display());
    Ok(true)
}
