// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Man pages and shell completions. Each program makes them from the definition of its command
//! line.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;

/// The hidden command by which a program makes its documents: `PROGRAM generate-documents DIR`.
pub const COMMAND: &str = "generate-documents";

/// The shells for which there are completions, with the folder of each.
pub const SHELLS: [(Shell, &str); 3] =
    [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")];

/// Makes the documents of the program with the command line `command`, if `args` ask for them.
/// `args` are the arguments after the program's name. A program calls this before it parses them.
/// Returns `None` if `args` ask for something else.
pub fn make_if_asked(
    command: Command,
    args: impl IntoIterator<Item = OsString>,
) -> Option<Result<()>> {
    let mut args = args.into_iter();
    if args.next()? != COMMAND {
        return None;
    }
    let dir = PathBuf::from(args.next()?);
    Some(make(command, &dir))
}

/// Makes a man page for the program and for each of its commands in `DIR/man`, and completions in
/// `DIR/completions/SHELL`.
///
/// # Errors
/// A folder or a file cannot be made.
pub fn make(mut command: Command, dir: &Path) -> Result<()> {
    let name = command.get_name().to_owned();
    for (shell, folder) in SHELLS {
        let folder = made(dir.join("completions").join(folder))?;
        clap_complete::generate_to(shell, &mut command, &name, &folder)
            .with_context(|| format!("cannot write to {}", folder.display()))?;
    }
    let folder = made(dir.join("man"))?;
    clap_mangen::generate_to(command, &folder)
        .with_context(|| format!("cannot write to {}", folder.display()))
}

fn made(folder: PathBuf) -> Result<PathBuf> {
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}
