// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask deb` makes the Debian package `vbus`: the programs, linked statically, their man
//! pages and completions, and the units of systemd in `packaging/`. With `--dkms` it makes
//! `vbus-dkms` ([`dkms`]), for guests.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testkit::process::RunDir;
use testkit::workspace;

use crate::{dkms, man};

/// The files of `packaging/`, with their places in the package.
const FILES: [(&str, &str); 6] = [
    ("vbus@.service", "usr/lib/systemd/system/vbus@.service"),
    ("vbus@.socket", "usr/lib/systemd/system/vbus@.socket"),
    ("vbus.sysusers", "usr/lib/sysusers.d/vbus.conf"),
    ("vbus.tmpfiles", "usr/lib/tmpfiles.d/vbus.conf"),
    ("example.toml", "usr/share/doc/vbus/examples/bus.toml"),
    ("grafana-dashboard.json", "usr/share/vbus/grafana-dashboard.json"),
];

#[derive(clap::Args)]
pub struct Args {
    /// The folder to write the package to [default: target/debian]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Build nothing: use the programs as they were built last
    #[arg(long)]
    as_built: bool,
    /// Make the package `vbus-dkms` instead: the Linux driver for guests, which DKMS builds for
    /// each kernel there
    #[arg(long, conflicts_with = "as_built")]
    dkms: bool,
    /// The Debian mirror to fetch the driver's compiler from, in place of the one in apt's
    /// configuration
    #[arg(long, value_name = "URL", requires = "dkms")]
    mirror: Option<String>,
}

/// Makes the package, and prints its path.
pub fn run(args: &Args) -> Result<bool> {
    let out = match &args.out {
        Some(out) => std::path::absolute(out)?,
        None => workspace::target().join("debian"),
    };
    let package = if args.dkms {
        dkms::make(&out, args.mirror.as_deref())?
    } else {
        make(&out, args.as_built)?
    };
    println!("{}", package.display());
    Ok(true)
}

/// Makes the package in the folder `out`. Returns its path.
fn make(out: &Path, as_built: bool) -> Result<PathBuf> {
    let built = workspace::build_programs(as_built)?;
    let programs = [("vbus", built.vbus), ("vbus-guest", built.guest)];
    let dir = RunDir::new()?;
    let (documents, root) = (dir.path().join("documents"), dir.path().join("root"));
    man::write(&programs, &documents)?;
    for (name, path) in &programs {
        put(path, &root.join("usr/bin").join(name), 0o755)?;
        for (from, to) in [
            (format!("bash/{name}.bash"), format!("bash-completion/completions/{name}")),
            (format!("zsh/_{name}"), format!("zsh/vendor-completions/_{name}")),
            (format!("fish/{name}.fish"), format!("fish/vendor_completions.d/{name}.fish")),
        ] {
            let from = documents.join("completions").join(from);
            put(&from, &root.join("usr/share").join(to), 0o644)?;
        }
    }
    for page in fs::read_dir(documents.join("man")).context("there are no man pages")? {
        let page = page?;
        let to = root.join("usr/share/man/man1").join(page.file_name());
        put(&page.path(), &to, 0o644)?;
        done(Command::new("gzip").args(["--best", "--no-name"]).arg(to))?;
    }
    let packaging = workspace::root().join("packaging");
    for (from, to) in FILES {
        put(&packaging.join(from), &root.join(to), 0o644)?;
    }
    fs::create_dir_all(root.join("etc/vbus"))?;
    put_copyright(&root, "vbus")?;
    let architecture = text(Command::new("dpkg").arg("--print-architecture"))?;
    let version = env!("CARGO_PKG_VERSION");
    let control = fs::read_to_string(packaging.join("debian/control"))?
        .replace("@VERSION@", version)
        .replace("@ARCHITECTURE@", &architecture);
    fs::create_dir_all(root.join("DEBIAN"))?;
    fs::write(root.join("DEBIAN/control"), control)?;
    for script in ["postinst", "prerm", "postrm"] {
        put(&packaging.join("debian").join(script), &root.join("DEBIAN").join(script), 0o755)?;
    }
    pack(&root, out, &format!("vbus_{version}_{architecture}.deb"))
}

/// Writes the licences to where the package `name` has them.
pub fn put_copyright(root: &Path, name: &str) -> Result<()> {
    let licences = ["LICENSE-APACHE", "LICENSE-MIT"]
        .map(|name| fs::read_to_string(workspace::root().join(name)));
    let [apache, mit] = licences;
    let folder = root.join("usr/share/doc").join(name);
    let copyright = folder.join("copyright");
    fs::create_dir_all(&folder)
        .and_then(|()| fs::write(&copyright, format!("{}\n{}", mit?, apache?)))
        .with_context(|| copyright.display().to_string())
}

/// Makes the package `name` of the files in `root`, in the folder `out`. Returns its path.
pub fn pack(root: &Path, out: &Path, name: &str) -> Result<PathBuf> {
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let package = out.join(name);
    done(
        Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Zxz", "-z1", "--build"])
            .args([root, &package])
            .stdout(std::process::Stdio::null()),
    )?;
    Ok(package)
}

/// Copies a file, with this mode, and makes its folders.
pub fn put(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let copy = || -> std::io::Result<()> {
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::copy(from, to)?;
        fs::set_permissions(to, fs::Permissions::from_mode(mode))
    };
    copy().with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

fn done(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .with_context(|| format!("{name} cannot be run; it makes the package: install it"))?;
    ensure!(status.success(), "{name} failed: {status}");
    Ok(())
}

fn text(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("{name} cannot be run; packages are made on Debian"))?;
    ensure!(output.status.success(), "{name} failed: {}", output.status);
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The most that `systemd-analyze security` may find, times 10.
    const EXPOSURE: &str = "20";

    fn unit() -> PathBuf {
        workspace::root().join("packaging/vbus@.service")
    }

    #[test]
    fn the_unit_exposes_little() {
        let analyze =
            |args: &[&str]| Command::new("systemd-analyze").args(args).arg(unit()).output();
        match analyze(&["security", "--offline=true", "--threshold", EXPOSURE, "--no-pager"]) {
            Err(error) => eprintln!("skipped: systemd-analyze cannot be run: {error}"),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                if said.contains("unrecognized option") {
                    eprintln!("skipped: this systemd-analyze has no --offline");
                    return;
                }
                let found = String::from_utf8_lossy(&output.stdout);
                let last = found.lines().last().unwrap_or_default();
                assert!(output.status.success(), "{last}\n{said}");
            }
        }
    }

    #[test]
    fn the_package_has_every_file_of_packaging() {
        let packaging = workspace::root().join("packaging");
        let mut files: Vec<_> = fs::read_dir(packaging)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "debian" && name != "dkms")
            .collect();
        files.sort();
        let mut known = FILES.map(|(name, _)| name.to_owned());
        known.sort();
        assert_eq!(files, known);
    }

    /// With the keeper as the main process the bus itself talks to systemd, and a kill of the bus
    /// must not end its keeper. A test of `vbus` runs the unit's commands.
    #[test]
    fn a_bus_of_the_unit_has_a_keeper() {
        let unit = fs::read_to_string(unit()).unwrap();
        for line in [
            "Environment=VBUS_KEEP=--keep",
            "NotifyAccess=all",
            "OOMPolicy=continue",
            "KillMode=control-group",
        ] {
            assert!(unit.lines().any(|found| found == line), "the unit has no {line}");
        }
        assert!(unit.contains("ExecStart=/usr/bin/vbus serve $VBUS_KEEP "));
    }

    /// An upgrade of the package cuts no machine off: buses go on until somebody reloads them.
    #[test]
    fn a_package_that_is_installed_ends_no_bus() {
        let path = workspace::root().join("packaging/debian/postinst");
        let script = fs::read_to_string(path).unwrap();
        let calls = script.lines().filter(|line| line.trim_start().starts_with("systemctl "));
        let calls: Vec<_> = calls.map(str::trim).collect();
        assert_eq!(calls, ["systemctl daemon-reload || true"]);
    }
}
