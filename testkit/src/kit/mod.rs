// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kit in `target/kit`: all files that a guest needs and that this machine may lack.
//!
//! It has QEMU 11 with all of its libraries, a stock Debian cloud kernel with its modules, a static
//! busybox, iperf3, passt and ethtool. libc and its loader are among the libraries, so QEMU also
//! runs on an older system. apt downloads the packages with a configuration and an empty dpkg
//! status of the kit's own, and they are unpacked into one folder. Nothing is installed, and no
//! root is needed.
//!
//! The folder gets its final name only when it is complete. So a later run never takes the rest of
//! an interrupted download for a kit.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::progress::Progress;

/// The edition of the kit's contents. A kit of another edition is fetched again.
const EDITION: u32 = 1;

/// The Debian packages of the kit, apart from the kernel.
const PACKAGES: [&str; 5] = ["qemu-system-x86", "busybox-static", "iperf3", "passt", "ethtool"];

/// The package that depends on the newest cloud kernel.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// The advice for a machine that cannot fetch the kit.
const WITHOUT_KIT: &str = "\
    apt makes the kit from Debian packages. On another distribution pass your own files:\n  \
    --qemu PATH        a qemu-system-x86_64 of version 10.1 or newer\n  \
    --kernel PATH      a Linux kernel (bzImage) with its modules in --modules DIR, or built in:\n\
    \x20                    uio, uio_pci_generic, tun, virtio_net\n  \
    --initramfs PATH   a cpio archive with /bin/busybox, and iperf3 on its PATH\n\
    or, where apt and Debian's archive keyring are installed: --mirror URL of a Debian mirror";

/// A complete kit.
pub struct Kit {
    root: PathBuf,
    stamp: Stamp,
}

/// The versions in a kit: the contents of its file `stamp.json`.
#[derive(Serialize, Deserialize)]
struct Stamp {
    edition: u32,
    qemu: String,
    kernel: String,
    packages: Vec<String>,
}

impl Kit {
    /// Opens the kit in `target/kit`, fetching it first if it is not there.
    ///
    /// `mirror` is the address of a Debian mirror; `None` takes it from the machine's apt
    /// configuration.
    pub fn get(target: &Path, mirror: Option<&str>) -> Result<Self> {
        let dir = target.join("kit");
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        // If two runs start at once, the second waits and then finds the kit of the first.
        let lock = File::create(dir.join("lock"))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
        let root = dir.join("root");
        if let Some(kit) = Self::open(&root) {
            return Ok(kit);
        }
        let began = Instant::now();
        let fresh = dir.join("unfinished");
        remove(&fresh)?;
        let stamp = fetch(&fresh, mirror)?;
        fs::write(fresh.join("root/stamp.json"), serde_json::to_vec_pretty(&stamp)?)?;
        remove(&root)?;
        fs::rename(fresh.join("root"), &root)?;
        remove(&fresh)?;
        eprintln!(
            "kit: QEMU {}, Linux {}, {} packages in {} ({:.0} s)",
            stamp.qemu,
            stamp.kernel,
            stamp.packages.len(),
            root.display(),
            began.elapsed().as_secs_f32()
        );
        Ok(Self { root, stamp })
    }

    fn open(root: &Path) -> Option<Self> {
        let stamp: Stamp = serde_json::from_slice(&fs::read(root.join("stamp.json")).ok()?).ok()?;
        (stamp.edition == EDITION).then(|| Self { root: root.to_owned(), stamp })
    }

    /// The folder that the packages are unpacked in.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The kernel image.
    pub fn kernel(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.stamp.kernel))
    }

    /// The folder of the kernel's modules.
    pub fn modules(&self) -> PathBuf {
        self.root.join("usr/lib/modules").join(&self.stamp.kernel)
    }

    /// The version of QEMU.
    pub fn qemu_version(&self) -> &str {
        &self.stamp.qemu
    }

    /// The statically linked busybox.
    pub fn busybox(&self) -> PathBuf {
        self.root.join("usr/bin/busybox")
    }

    /// The dynamic loader that goes with the kit's libraries.
    pub fn loader(&self) -> PathBuf {
        self.root.join("usr/lib64/ld-linux-x86-64.so.2")
    }

    /// The folder of the kit's libraries.
    pub fn libraries(&self) -> PathBuf {
        self.root.join("usr/lib/x86_64-linux-gnu")
    }

    /// A command that runs `/usr/bin/PROGRAM` of the kit with the kit's libraries.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.loader());
        command
            .arg("--library-path")
            .arg(self.libraries())
            .arg(self.root.join("usr/bin").join(program));
        command
    }

    /// QEMU with its modules and firmware folders.
    pub fn qemu(&self) -> Command {
        let mut command = self.command("qemu-system-x86_64");
        // Without this, QEMU would load the modules of a QEMU that is installed on this machine.
        command.env("QEMU_MODULE_DIR", self.libraries().join("qemu"));
        for dir in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(self.root.join(dir));
        }
        command
    }
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Fetches and unpacks everything into `dir/root`.
fn fetch(dir: &Path, mirror: Option<&str>) -> Result<Stamp> {
    ensure!(
        cfg!(target_arch = "x86_64"),
        "the guests are x86-64 machines, and so must the host be"
    );
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        release
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .unwrap_or("")
            .trim_matches('"')
    };
    let (mirror, suites) = match mirror {
        Some(url) => (url.to_owned(), vec!["trixie", "trixie-backports"]),
        None if field("ID") == "debian" => {
            (machine_mirror(field("VERSION_CODENAME"))?, suites(field("VERSION_CODENAME")))
        }
        None => bail!("this machine runs {}, not Debian.\n{WITHOUT_KIT}", field("PRETTY_NAME")),
    };
    let place = dir.parent().unwrap_or(dir);
    let place = place.strip_prefix(crate::workspace::root()).unwrap_or(place).display();
    let mut progress = Progress::begin(
        "kit",
        &format!(
            "QEMU, a Linux kernel and tools for the guests come into {place}; nothing is \
             installed on this system.\nkit: reading which packages {mirror} has ({})",
            suites.join(", ")
        ),
    );
    let apt = Apt::new(dir, &mirror, &suites)?;
    apt.run("apt-get", &["update"], None, &mut progress)?;
    drop(progress);

    let backports = suites.last().copied().unwrap_or_default();
    let mut install = vec!["install", "--yes", "--download-only", "--target-release", backports];
    install.extend(PACKAGES);
    // Only the kernel's own package: its dependencies make the initramfs of an installed system.
    let kernel = ["download", &apt.kernel_package()?];
    let (number, bytes) = apt.sizes(&install)?;
    let (kernels, kernel_bytes) = apt.sizes(&kernel)?;
    let (number, megabytes) = (number + kernels, (bytes + kernel_bytes) / 1_000_000);
    let work = format!("downloading {number} packages, {megabytes} MB, into {place}");
    let mut progress = Progress::begin("kit", &work);
    apt.run("apt-get", &install, None, &mut progress)?;
    let archives = dir.join("cache/archives");
    apt.run("apt-get", &kernel, Some(&archives), &mut progress)?;
    drop(progress);

    let root = dir.join("root");
    let mut files: Vec<PathBuf> =
        fs::read_dir(&archives)?.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|e| e == "deb"));
    files.sort();
    let work = format!("unpacking {} packages into {place}/root", files.len());
    let mut progress = Progress::begin("kit", &work);
    let mut packages = Vec::new();
    for (done, file) in files.iter().enumerate() {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        progress.at(&format!("{} of {}: {name}", done + 1, files.len()));
        let status = Command::new("dpkg-deb")
            .arg("--extract")
            .arg(file)
            .arg(&root)
            .stdin(Stdio::null())
            .status();
        ensure!(
            status.with_context(|| format!("cannot run dpkg-deb.\n{WITHOUT_KIT}"))?.success(),
            "dpkg-deb could not unpack {}",
            file.display()
        );
        packages.push(name);
    }
    drop(progress);
    prune(&root)?;

    let kernel = fs::read_dir(root.join("usr/lib/modules"))
        .context("the kernel package has no /usr/lib/modules")?;
    let kernel = kernel
        .map(|e| Ok(e?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    ensure!(kernel.len() == 1, "one kernel was expected in the kit, found {kernel:?}");
    let mut kit = Kit {
        root,
        stamp: Stamp { edition: EDITION, qemu: String::new(), kernel: kernel[0].clone(), packages },
    };
    kit.stamp.qemu = qemu_version(kit.qemu())?;
    Ok(kit.stamp)
}

/// Asks QEMU for its version, and checks that QEMU has the device that vbus needs.
pub fn qemu_version(mut qemu: Command) -> Result<String> {
    let name = format!("{:?}", qemu.get_program());
    let output = qemu
        .args(["-nodefaults", "-device", "help"])
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    let devices = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "QEMU does not start: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    ensure!(
        devices.contains("vfio-user-pci"),
        "this QEMU has no device vfio-user-pci; version 10.1 brought it"
    );
    let output = qemu.args(["--version"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_whitespace().skip_while(|word| *word != "version").nth(1);
    Ok(version.with_context(|| format!("QEMU says no version: {text}"))?.to_owned())
}

/// The suites with QEMU 11. apt prefers the last one.
fn suites(codename: &str) -> Vec<&str> {
    match codename {
        "bookworm" | "trixie" => vec!["trixie", "trixie-backports"],
        // A later release has QEMU 11 in its own suite. testing and sid may have no codename.
        "" => vec!["sid"],
        later => vec![later],
    }
}

/// The Debian mirror in this machine's apt configuration.
fn machine_mirror(codename: &str) -> Result<String> {
    let output = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(RELEASE) $(COMPONENT) $(REPO_URI)",
            "Created-By: Packages",
        ])
        .output()
        .with_context(|| format!("cannot run apt-get.\n{WITHOUT_KIT}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let known = [codename, "stable", "testing", "sid", "unstable"];
    text.lines()
        .find_map(|line| {
            let mut words = line.split(' ');
            let (release, component, uri) = (words.next()?, words.next()?, words.next()?);
            (known.contains(&release) && component == "main")
                .then(|| uri.trim_end_matches('/').to_owned())
        })
        .with_context(|| {
            format!(
                "apt's configuration names no mirror of {codename} main (apt-get \
                indextargets).\n{WITHOUT_KIT}"
            )
        })
}

/// Removes the files that no guest and no QEMU reads. They are half of the kit.
fn prune(root: &Path) -> Result<()> {
    for unused in [
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "usr/share/perl5",
        "usr/include",
        "usr/share/info",
    ] {
        remove(&root.join(unused))?;
    }
    Ok(())
}

/// An apt that uses only the kit's folder.
struct Apt {
    config: PathBuf,
    log: PathBuf,
}

impl Apt {
    fn new(dir: &Path, mirror: &str, suites: &[&str]) -> Result<Self> {
        for sub in ["lists/partial", "cache/archives/partial", "state", "root"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        let keyring = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
        // Without a keyring file apt uses the keys that this machine trusts.
        let signed = if keyring.exists() {
            format!(" signed-by={}", keyring.display())
        } else {
            String::new()
        };
        let list =
            suites.iter().map(|suite| format!("deb [arch=amd64{signed}] {mirror} {suite} main\n"));
        fs::write(dir.join("sources.list"), list.collect::<String>())?;
        fs::write(dir.join("status"), "")?;
        let config = dir.join("apt.conf");
        let d = dir.display();
        fs::write(
            &config,
            format!(
                "Dir::State \"{d}/state\";\nDir::State::lists \"{d}/lists\";\nDir::State::status \
                    \"{d}/status\";\n\
                 Dir::Cache \"{d}/cache\";\nDir::Cache::archives \"{d}/cache/archives\";\n\
                 Dir::Etc::sourcelist \"{d}/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n\
                 Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"/dev/null\";\n\
                 APT::Architecture \"amd64\";\nAPT::Architectures {{ \"amd64\"; \
                 }};\nAPT::Default-Release \"\";\n\
                 APT::Install-Recommends \"false\";\nAPT::Install-Suggests \"false\";\n\
                 APT::Sandbox::User \"\";\nAcquire::Languages \"none\";\nAcquire::Retries \"3\";\n\
                 Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
                 Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled \"false\";\n"
            ),
        )?;
        Ok(Self { config, log: dir.join("apt.log") })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(&self.config).stdin(Stdio::null()).env("LC_ALL", "C.UTF-8");
        command
    }

    /// Runs a program of apt. Its output goes to a log, because it reads like an installation, and
    /// nothing is installed here.
    fn run(
        &self,
        program: &str,
        args: &[&str],
        folder: Option<&Path>,
        progress: &mut Progress,
    ) -> Result<()> {
        let mut command = self.command(program);
        // Lines of the form "dlstatus:3:12.5:Retrieving file 3 of 99 (8s remaining)".
        command.args(["-q=2", "-o", "APT::Status-Fd=1"]).args(args);
        if let Some(folder) = folder {
            command.current_dir(folder);
        }
        let mut log = File::options().create(true).append(true).open(&self.log)?;
        command.stderr(log.try_clone()?).stdout(Stdio::piped());
        let mut child =
            command.spawn().with_context(|| format!("cannot run {program}.\n{WITHOUT_KIT}"))?;
        let output = child.stdout.take().context("apt has no output")?;
        for line in BufReader::new(output).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            match line.strip_prefix("dlstatus:").and_then(|rest| rest.splitn(3, ':').nth(2)) {
                Some(status) => progress.at(&status.replace("Retrieving file", "file")),
                None => writeln!(log, "{line}")?,
            }
        }
        let status = child.wait()?;
        if !status.success() {
            let said = fs::read_to_string(&self.log).unwrap_or_default();
            let errors: Vec<&str> =
                said.lines().filter(|l| l.starts_with("E:") || l.starts_with("Err:")).collect();
            return Err(apt_failed(program, args, status, &errors.join("\n")));
        }
        Ok(())
    }

    /// How many packages an `apt-get` with these arguments would download, and how many bytes.
    fn sizes(&self, args: &[&str]) -> Result<(usize, u64)> {
        let output = self
            .command("apt-get")
            .args(["-q=2", "--print-uris"])
            .args(args)
            .output()
            .with_context(|| format!("cannot run apt-get.\n{WITHOUT_KIT}"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(apt_failed("apt-get", args, output.status, said.trim()));
        }
        // Lines of the form "'URI' FILE BYTES HASH".
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let sizes = text.lines().filter(|line| line.starts_with('\''));
        let sizes = sizes.filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
        Ok(sizes.fold((0, 0), |(number, sum), bytes| (number + 1, sum + bytes)))
    }

    /// The package that holds the newest cloud kernel itself.
    fn kernel_package(&self) -> Result<String> {
        let output = self.command("apt-cache").args(["depends", KERNEL_PACKAGE]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let package =
            text.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned);
        package.with_context(|| format!("the mirror has no {KERNEL_PACKAGE}"))
    }
}

/// The error for a program of apt that failed.
fn apt_failed(program: &str, args: &[&str], status: ExitStatus, said: &str) -> anyhow::Error {
    anyhow!(
        "{program} {} failed ({status}).\n{said}\nThe mirror must carry Debian's trixie and \
         trixie-backports; --mirror URL names another.",
        args.join(" ")
    )
}
