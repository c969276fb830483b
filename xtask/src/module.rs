// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask module` builds the Linux driver.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use testkit::kit::kernels::DebianKernel;
use testkit::module;

/// The text at the end of `--help`.
const HELP: &str = "\
The command needs apt, and neither root nor a compiler of this system: gcc, make, rustc and the
kernels' headers come into target/kit. It prints the path of each module.

Examples:
  cargo xtask module                        for Linux 6.1, 6.12 and 7.x, the cloud flavour of each
  cargo xtask module --kernel 6.12-generic  for one kernel
  cargo xtask module --all --out modules    for all of them: modules/RELEASE/vbus.ko

In a guest with the kernel RELEASE (`uname -r` says it), as root:
  insmod vbus.ko
  dmesg | grep vbus";

#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// A kernel of Debian: 6.1, 6.12 or 7.x, or one of them with -generic after it; or 6.12-kasan
    /// or 6.12-kcsan; repeat it for more [default: 6.1, 6.12 and 7.x]
    #[arg(long = "kernel", value_name = "KERNEL")]
    kernels: Vec<DebianKernel>,
    /// Build for both flavours, cloud and generic, of every kernel
    #[arg(long, conflicts_with = "kernels")]
    all: bool,
    /// Copy each module to DIR/RELEASE/vbus.ko
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The Debian mirror, in place of the one in apt's configuration
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
}

/// Builds the modules, and prints their paths.
pub fn run(args: &Args) -> Result<bool> {
    let mut kernels = args.kernels.clone();
    if kernels.is_empty() {
        kernels.extend(DebianKernel::CLOUD);
    }
    if args.all {
        kernels.extend(DebianKernel::GENERIC);
    }
    for kernel in kernels {
        let module = module::build(kernel, args.mirror.as_deref())
            .with_context(|| format!("the module for Linux {kernel}"))?;
        let mut path = module.path;
        if let Some(out) = &args.out {
            let folder = out.join(&module.release);
            fs::create_dir_all(&folder)
                .with_context(|| format!("--out: cannot make {}", folder.display()))?;
            let copy = folder.join("vbus.ko");
            fs::copy(&path, &copy)
                .with_context(|| format!("--out: cannot write {}", copy.display()))?;
            path = copy;
        }
        println!("{}", path.display());
    }
    Ok(true)
}
