// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guests' root file system: a cpio archive that the kernel unpacks into memory.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::kit::{Kit, LIBRARIES, LOADER};

/// An archive in the "newc" format of cpio, built in memory.
///
/// The kernel unpacks several archives in a row as if they were one.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    folders: BTreeSet<String>,
}

impl Archive {
    /// Adds a regular file and the folders above it.
    pub fn file(&mut self, path: &str, mode: u32, contents: &[u8]) -> Result<()> {
        self.parents(path)?;
        self.entry(path, 0o100_000 | mode, contents)
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.parents(path)?;
        self.entry(path, 0o120_777, target.as_bytes())
    }

    /// Adds a folder, unless the archive has it.
    pub fn folder(&mut self, path: &str) -> Result<()> {
        self.parents(path)?;
        if self.folders.insert(path.to_owned()) {
            self.entry(path, 0o040_755, &[])?;
        }
        Ok(())
    }

    fn parents(&mut self, path: &str) -> Result<()> {
        match path.rsplit_once('/') {
            Some((parent, _)) => self.folder(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(contents.len())
            .with_context(|| format!("{path} is too large for a cpio archive"))?;
        let name = u32::try_from(path.len() + 1)?;
        // Magic, inode, mode, uid, gid, links, mtime, size, device (2), device node (2), length of
        // the name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            write!(self.bytes, "{field:08x}")?;
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The finished archive.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }
}

/// The modules that a guest loads at boot. Those that they depend on are loaded too.
pub const MODULES: [&str; 5] = ["uio_pci_generic", "tun", "virtio_pci", "virtio_net", "virtio_mem"];

/// Adds busybox, iperf3 and ethtool with their libraries, and the kernel's modules.
pub fn add_userland(archive: &mut Archive, kit: &Kit) -> Result<()> {
    let busybox = fs::read(kit.busybox()).context("the kit has no busybox")?;
    archive.file("bin/busybox", 0o755, &busybox)?;
    for program in ["iperf3", "ethtool"] {
        add_program(archive, kit.root(), "bin", program)?;
    }
    // No list of libraries names this one. libc loads it when a program cancels a thread, and
    // iperf3 does.
    let unwinder = "libgcc_s.so.1";
    archive.file(
        &format!("lib/x86_64-linux-gnu/{unwinder}"),
        0o755,
        &fs::read(kit.libraries().join(unwinder))?,
    )?;
    Ok(())
}

/// Adds a dynamically linked program and every library that it loads. `root` is the folder of
/// unpacked packages that has both. The program goes into the folder `bin` of the archive.
pub fn add_program(archive: &mut Archive, root: &Path, bin: &str, program: &str) -> Result<()> {
    let path = ["usr/bin", "usr/sbin"].map(|dir| root.join(dir).join(program));
    let path = path
        .iter()
        .find(|path| path.exists())
        .with_context(|| format!("the kit has no {program}"))?;
    archive.file(&format!("{bin}/{program}"), 0o755, &fs::read(path)?)?;
    let loader = root.join(LOADER);
    let output = std::process::Command::new(&loader)
        .args(["--list", "--library-path"])
        .args([&root.join(LIBRARIES), path])
        .output()
        .context("cannot run the kit's dynamic loader")?;
    ensure!(output.status.success(), "the kit's {program} lacks a library");
    // Lines of the form "libz.so.1 => /path/to/libz.so.1 (0x...)".
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Some((name, rest)) = line.trim().split_once(" => ") else { continue };
        let file = rest.split(" (").next().unwrap_or(rest);
        let target = format!(
            "lib/x86_64-linux-gnu/{}",
            Path::new(name).file_name().unwrap_or_default().to_string_lossy()
        );
        if archive.folders.insert(format!("({target})")) {
            archive.file(
                &target,
                0o755,
                &fs::read(file).with_context(|| format!("cannot read {file}"))?,
            )?;
        }
    }
    if archive.folders.insert("(loader)".into()) {
        archive.file("lib64/ld-linux-x86-64.so.2", 0o755, &fs::read(loader)?)?;
    }
    Ok(())
}

/// Adds iproute2's `ip` and `tc`, `bpftool`, and `kexec`. They come before busybox's on the PATH.
///
/// # Errors
/// The kit cannot fetch them.
pub fn add_tools(archive: &mut Archive, kit: &Kit) -> Result<()> {
    let root = kit.tools()?;
    for program in ["ip", "tc", "bpftool", "kexec"] {
        add_program(archive, &root, "usr/local/bin", program)?;
    }
    // The shell of busybox takes busybox's own programs first.
    archive.file("etc/profile", 0o644, b"alias ip=/usr/local/bin/ip\n")
}

/// Adds the modules `names` and those that they depend on as `/modules/NN-NAME.ko`. The numbers NN
/// give the order in which to load them.
///
/// `unxz` decompresses a module: Debian compresses modules with xz.
pub fn add_modules(
    archive: &mut Archive,
    modules: &Path,
    names: &[&str],
    unxz: impl Fn(&Path) -> Result<Vec<u8>>,
) -> Result<()> {
    let mut files = Vec::new();
    find(&modules.join("kernel"), &mut files)?;
    let mut loaded = Vec::new();
    for name in names {
        add_module(archive, name, &files, &unxz, &mut loaded)?;
    }
    Ok(())
}

fn add_module(
    archive: &mut Archive,
    name: &str,
    files: &[std::path::PathBuf],
    unxz: &impl Fn(&Path) -> Result<Vec<u8>>,
    loaded: &mut Vec<String>,
) -> Result<()> {
    if loaded.iter().any(|other| other == name) {
        return Ok(());
    }
    loaded.push(name.to_owned());
    // A module's file may have '-' where its name has '_'.
    let is_it = |path: &&std::path::PathBuf| {
        let file = path.file_name().unwrap_or_default().to_string_lossy().replace('-', "_");
        file.strip_prefix(name).is_some_and(|rest| rest == ".ko" || rest == ".ko.xz")
    };
    // A missing module is built into the kernel. If it is not, the guest reports what it lacks.
    let Some(path) = files.iter().find(is_it) else { return Ok(()) };
    let module =
        if path.extension().is_some_and(|e| e == "xz") { unxz(path)? } else { fs::read(path)? };
    for needed in depends(&module) {
        add_module(archive, &needed, files, unxz, loaded)?;
    }
    let order = archive.entries;
    archive.file(&format!("modules/{order:05}-{name}.ko"), 0o644, &module)
}

/// The names in the `depends=` field of a module's `.modinfo` section.
fn depends(module: &[u8]) -> Vec<String> {
    let text = modinfo(module, "depends").unwrap_or_default();
    text.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// A field of a module's `.modinfo` section, as the program modinfo prints it.
pub fn modinfo(module: &[u8], field: &str) -> Option<String> {
    let key = format!("\0{field}=");
    let at = module.windows(key.len()).position(|window| window == key.as_bytes())?;
    let value = module[at + key.len()..].split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(value).into_owned())
}

fn find(dir: &Path, files: &mut Vec<std::path::PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("no modules in {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Adds `/init`, the agent, and the program that drives devices.
pub fn add_ours(archive: &mut Archive, agent: &Path, guest: &Path) -> Result<()> {
    archive.file("init", 0o755, INIT.as_bytes())?;
    for (name, path) in [("guest-agent", agent), ("vbus-guest", guest)] {
        let contents = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        archive.file(&format!("bin/{name}"), 0o755, &contents)?;
    }
    for folder in ["proc", "sys", "dev", "tmp", "run", "root", "etc", "sbin", "usr"] {
        archive.folder(folder)?;
    }
    archive.link("usr/bin", "../bin")?;
    archive.link("usr/sbin", "../sbin")?;
    archive.file("etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n")?;
    archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n")
}

/// The guest's init: it prepares the system and starts the agent. People use `ttyS0` as the
/// console; the agent uses `ttyS1`.
const INIT: &str = r"#!/bin/busybox sh
export PATH=/root:/usr/local/bin:/bin:/sbin HOME=/root TERM=vt100
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /dev/hugepages
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t hugetlbfs hugetlbfs /dev/hugepages
for module in /modules/*.ko; do [ -e $module ] && insmod $module; done
ip link set lo up
cd /root
stty -F /dev/ttyS1 raw -echo
(while :; do setsid cttyhack sh -l </dev/ttyS0 >/dev/ttyS0 2>&1; sleep 1; done) &
while :; do guest-agent serve /dev/ttyS1; sleep 1; done
";
