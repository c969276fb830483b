// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Debian packages by apt, into a folder: nothing is installed, and no root is needed. apt runs
//! with a configuration and an empty dpkg status of the folder's own.

use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::part::remove;
use crate::progress::Progress;
use crate::report::Skip;

/// The advice for a machine that cannot fetch the kit.
const WITHOUT_KIT: &str = "\
    apt makes the kit from Debian packages. On another distribution pass your own files:\n  \
    --qemu PATH        a qemu-system-x86_64 of version 10.1 or newer\n  \
    --kernel PATH      a Linux kernel (bzImage) with its modules in --modules DIR, or built in:\n\
    \x20                    uio, uio_pci_generic, tun, virtio_net\n  \
    --initramfs PATH   a cpio archive with /bin/busybox, and iperf3 on its PATH\n\
    or, where apt and Debian's archive keyring are installed: --mirror URL of a Debian mirror";

/// Where packages come from.
pub struct Source {
    /// The address of a Debian mirror.
    mirror: String,
    /// The suites. apt prefers the last one where a call says so.
    suites: Vec<String>,
}

impl Source {
    /// The suites that have QEMU 11, by this machine's release of Debian. `mirror` is the address
    /// of a Debian mirror; `None` takes it from the machine's apt configuration.
    ///
    /// # Errors
    /// There is no `mirror`, and this machine is no Debian or its apt has none.
    pub fn with_qemu(mirror: Option<&str>) -> Result<Self> {
        let release = Release::of_machine();
        let suites = match mirror {
            None if release.id == "debian" => suites(&release.codename),
            _ => vec!["trixie", "trixie-backports"],
        };
        Self::new(mirror, &suites)
    }

    /// One suite, whatever release this machine has. For `mirror` see
    /// [`with_qemu`](Self::with_qemu).
    ///
    /// # Errors
    /// Those of [`with_qemu`](Self::with_qemu).
    pub fn suite(mirror: Option<&str>, suite: &str) -> Result<Self> {
        Self::new(mirror, &[suite])
    }

    fn new(mirror: Option<&str>, suites: &[&str]) -> Result<Self> {
        ensure!(
            cfg!(target_arch = "x86_64"),
            "the guests are x86-64 machines, and so must the host be"
        );
        let release = Release::of_machine();
        let mirror = match mirror {
            Some(url) => url.to_owned(),
            None if release.id == "debian" => machine_mirror(&release.codename)?,
            None => bail!("this machine runs {}, not Debian.\n{WITHOUT_KIT}", release.name),
        };
        Ok(Self { mirror, suites: suites.iter().map(|&suite| suite.to_owned()).collect() })
    }

    /// The suite that apt prefers where a call says so.
    pub fn preferred(&self) -> &str {
        self.suites.last().map_or("", String::as_str)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.mirror, self.suites.join(", "))
    }
}

/// This machine's distribution.
struct Release {
    id: String,
    codename: String,
    name: String,
}

impl Release {
    fn of_machine() -> Self {
        let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .unwrap_or("")
                .trim_matches('"')
                .to_owned()
        };
        Self { id: field("ID"), codename: field("VERSION_CODENAME"), name: field("PRETTY_NAME") }
    }
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

/// The packages that a part of the kit consists of.
#[derive(Default)]
pub struct Packages {
    /// Packages that come with all that they depend on, from [`Source::preferred`] where it has
    /// them.
    pub complete: Vec<String>,
    /// Packages that come alone.
    pub alone: Vec<String>,
    /// Whether something is compiled with the headers of C that the packages have.
    pub keep_headers: bool,
}

/// Downloads packages of `source` and unpacks them into `dir/root`. `choose` names them, once apt
/// has read what the mirror has. `what` says in a few words what they are, for the progress.
/// Returns the names of the packages with their versions.
///
/// # Errors
/// apt or dpkg-deb fails, and the error has its words. It is a [`Skip`] if the mirror lacks a suite
/// or a package, or does not hand it out. Or those of `choose`.
pub fn fetch(
    dir: &Path,
    source: &Source,
    what: &str,
    choose: impl FnOnce(&Apt) -> Result<Packages>,
) -> Result<Vec<String>> {
    let place = dir.parent().unwrap_or(dir);
    let place = place.strip_prefix(crate::workspace::root()).unwrap_or(place).display();
    let mut progress = Progress::begin(
        "kit",
        &format!(
            "{what} into {place}; nothing is installed on this system.\nkit: reading which \
             packages {source} has"
        ),
    );
    let apt = Apt::new(dir, source)?;
    apt.run("apt-get", &["update"], None, &mut progress)?;
    drop(progress);

    let packages = choose(&apt)?;
    let mut install =
        vec!["install", "--yes", "--download-only", "--target-release", source.preferred()];
    install.extend(packages.complete.iter().map(String::as_str));
    let mut download = vec!["download"];
    download.extend(packages.alone.iter().map(String::as_str));
    let archives = dir.join("cache/archives");
    let runs: Vec<(&[&str], Option<&Path>)> = [
        (&packages.complete, &install[..], None),
        (&packages.alone, &download[..], Some(archives.as_path())),
    ]
    .into_iter()
    .filter(|(names, ..)| !names.is_empty())
    .map(|(_, args, folder)| (args, folder))
    .collect();
    let (mut number, mut bytes) = (0, 0);
    for (args, _) in &runs {
        let sizes = apt.sizes(args)?;
        (number, bytes) = (number + sizes.0, bytes + sizes.1);
    }
    let work = format!("downloading {number} packages, {} MB, into {place}", bytes / 1_000_000);
    let mut progress = Progress::begin("kit", &work);
    for (args, folder) in runs {
        apt.run("apt-get", args, folder, &mut progress)?;
    }
    drop(progress);
    let root = dir.join("root");
    let names = unpack(&archives, &root)?;
    prune(&root, packages.keep_headers)?;
    Ok(names)
}

/// Unpacks all packages in the folder `archives` into the folder `root`. Returns their names.
fn unpack(archives: &Path, root: &Path) -> Result<Vec<String>> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(archives)?.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|e| e == "deb"));
    files.sort();
    let work = format!("unpacking {} packages", files.len());
    let mut progress = Progress::begin("kit", &work);
    let mut packages = Vec::new();
    for (done, file) in files.iter().enumerate() {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        progress.at(&format!("{} of {}: {name}", done + 1, files.len()));
        let status = Command::new("dpkg-deb")
            .arg("--extract")
            .arg(file)
            .arg(root)
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
    Ok(packages)
}

/// Removes the files that no guest and no program of the kit reads. They are half of the kit.
fn prune(root: &Path, keep_headers: bool) -> Result<()> {
    for unused in
        ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/perl5", "usr/share/info"]
    {
        remove(&root.join(unused))?;
    }
    if keep_headers { Ok(()) } else { remove(&root.join("usr/include")) }
}

/// An apt that uses only the kit's folder.
pub struct Apt {
    config: PathBuf,
    log: PathBuf,
    /// The mirror and its suites, as errors name them.
    source: String,
}

impl Apt {
    fn new(dir: &Path, source: &Source) -> Result<Self> {
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
        let mirror = &source.mirror;
        let list = source
            .suites
            .iter()
            .map(|suite| format!("deb [arch=amd64{signed}] {mirror} {suite} main\n"));
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
        Ok(Self { config, log: dir.join("apt.log"), source: source.to_string() })
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
        let begin = log.metadata()?.len();
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
            // What an earlier command said, and went on without, is not why this one failed.
            let mut said = Vec::new();
            let mut log = File::open(&self.log)?;
            log.seek(SeekFrom::Start(begin))?;
            log.read_to_end(&mut said)?;
            let said = String::from_utf8_lossy(&said);
            let errors: Vec<&str> =
                said.lines().filter(|l| l.starts_with("E:") || l.starts_with("Err:")).collect();
            return Err(self.failed(program, args, status, &errors.join("\n")));
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
            return Err(self.failed("apt-get", args, output.status, said.trim()));
        }
        // Lines of the form "'URI' FILE BYTES HASH".
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let sizes = text.lines().filter(|line| line.starts_with('\''));
        let sizes = sizes.filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
        Ok(sizes.fold((0, 0), |(number, sum), bytes| (number + 1, sum + bytes)))
    }

    /// The packages that `package` depends on; none if the mirror lacks it. Of alternatives only
    /// the first is named.
    pub fn depends(&self, package: &str) -> Result<Vec<String>> {
        let output = self
            .command("apt-cache")
            .args(["depends", package])
            .output()
            .with_context(|| format!("cannot run apt-cache.\n{WITHOUT_KIT}"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text
            .lines()
            .filter_map(|line| line.trim().trim_start_matches('|').strip_prefix("Depends: "))
            .map(str::to_owned)
            .collect())
    }

    /// The error for a program of apt that failed.
    fn failed(
        &self,
        program: &str,
        args: &[&str],
        status: ExitStatus,
        said: &str,
    ) -> anyhow::Error {
        let text = format!(
            "{program} {} failed ({status}).\n{said}\nThe mirror must be {}; --mirror URL names \
             another.",
            args.join(" "),
            self.source
        );
        let lacks = [
            "does not have a Release file",
            "Unable to locate package",
            // What HTTP says of a file that the mirror, or a proxy before it, does not hand out.
            "403  Forbidden",
            "404  Not Found",
        ];
        if lacks.iter().any(|words| said.contains(words)) {
            return Skip(text).into();
        }
        anyhow!(text)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::ExitStatusExt;

    use super::*;
    use crate::process::RunDir;

    #[test]
    fn what_a_mirror_lacks_is_a_skip_and_what_is_wrong_with_it_a_failure() {
        let apt = Apt { config: PathBuf::new(), log: PathBuf::new(), source: "mirror".into() };
        let status = ExitStatus::from_raw(100 << 8);
        for (said, is_skip) in [
            ("E: The repository 'mirror bookworm Release' does not have a Release file.", true),
            (
                "E: Failed to fetch mirror/InRelease  403  Forbidden [IP: 192.0.2.1 80]\n\
                 E: The repository 'mirror bookworm InRelease' is not signed.",
                true,
            ),
            ("E: Failed to fetch mirror/a.deb  404  Not Found [IP: 192.0.2.1 80]", true),
            ("E: Unable to locate package gcc", true),
            ("E: The repository 'mirror bookworm InRelease' is not signed.", false),
            ("E: Failed to fetch mirror/a.deb  Hash Sum mismatch", false),
        ] {
            let error = apt.failed("apt-get", &["update"], status, said);
            assert_eq!(error.is::<Skip>(), is_skip, "{said}");
            assert!(error.to_string().contains(said));
        }
    }

    #[test]
    fn what_an_earlier_command_said_is_not_why_a_later_one_failed() {
        let dir = RunDir::new().unwrap();
        let (config, log) = (dir.path().join("script"), dir.path().join("log"));
        let apt = Apt { config: config.clone(), log, source: "mirror".into() };
        // The shell takes the words of apt's configuration for a command.
        let run = |script: &str| {
            fs::write(&config, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&config, Permissions::from_mode(0o700)).unwrap();
            apt.run("sh", &[], None, &mut Progress::begin("test", "a shell"))
        };
        run("echo 'Err:1 mirror/a  404  Not Found'").unwrap();
        let error = run("echo 'E: Hash Sum mismatch'; exit 100").unwrap_err();
        assert!(!error.is::<Skip>() && error.to_string().contains("Hash Sum mismatch"), "{error}");
        let error = run("echo 'Err:1 mirror/b  404  Not Found'; exit 100").unwrap_err();
        assert!(error.is::<Skip>() && !error.to_string().contains("Hash"), "{error}");
    }
}
