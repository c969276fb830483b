// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask man` writes the man pages and shell completions of every program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testkit::process::RunDir;
use testkit::workspace;

/// The programs that are installed: `vbus`, `vbus-guest` and `vbus-vmm`, with the path of each.
pub fn programs(as_built: bool) -> Result<[(&'static str, PathBuf); 3]> {
    let programs = workspace::build_programs(as_built)?;
    let vmm = workspace::build_vmm(as_built)?;
    Ok([("vbus", programs.vbus), ("vbus-guest", programs.guest), ("vbus-vmm", vmm)])
}

#[derive(clap::Args)]
pub struct Args {
    /// The folder to write to: man/*.1, and completions/ for bash, zsh and fish [default:
    /// target/documents]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Build nothing: use the programs as they were built last
    #[arg(long)]
    as_built: bool,
}

/// Writes the documents.
pub fn run(args: &Args) -> Result<bool> {
    let dir = match &args.out {
        Some(out) => std::path::absolute(out)?,
        None => workspace::target().join("documents"),
    };
    write(&programs(args.as_built)?, &dir)?;
    println!("{}", dir.display());
    Ok(true)
}

/// Writes the documents of `programs` into the folder `dir`.
pub fn write(programs: &[(&str, PathBuf)], dir: &Path) -> Result<()> {
    for (name, path) in programs {
        let status = Command::new(path)
            .arg("generate-documents")
            .arg(dir)
            .status()
            .with_context(|| format!("cannot run {}", path.display()))?;
        ensure!(status.success(), "{name} cannot make its documents");
    }
    Ok(())
}

/// Every program has its pages and its completions.
pub fn check(programs: &[(&str, PathBuf)]) -> Result<()> {
    let dir = RunDir::new()?;
    write(programs, dir.path())?;
    let read = |name: &str| {
        fs::read_to_string(dir.path().join(name)).with_context(|| format!("there is no {name}"))
    };
    for (program, _) in programs {
        let page = read(&format!("man/{program}.1"))?;
        ensure!(page.contains(".SH NAME") && page.contains(".SH OPTIONS"), "{program}.1: {page}");
        for completions in [
            format!("bash/{program}.bash"),
            format!("zsh/_{program}"),
            format!("fish/{program}.fish"),
        ] {
            let text = read(&format!("completions/{completions}"))?;
            ensure!(text.contains(program), "completions/{completions}: {text}");
        }
    }
    for (page, word) in [
        ("vbus-device-add", "KEY=VALUE"),
        ("vbus-serve", "NOTIFY_SOCKET"),
        ("vbus-guest-net", "queue"),
    ] {
        let text = read(&format!("man/{page}.1"))?;
        ensure!(text.contains(word), "{page}.1 does not mention {word}: {text}");
    }
    // What only the program itself runs has no page.
    ensure!(
        !dir.path().join("man/vbus-supervisor.1").exists(),
        "there is a page of vbus supervisor"
    );
    Ok(())
}
