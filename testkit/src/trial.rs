// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Chooses the guests' accelerator: KVM if a guest boots with it, otherwise TCG.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::lab::{Accel, Lab, Options, kvm_is_missing};
use crate::vm::VmSpec;
use crate::workspace;

/// How long a guest may take to boot under KVM before KVM counts as broken. A working KVM needs
/// 1 s.
const KVM_TRIAL: Duration = Duration::from_secs(12);

/// Fetches the kit, builds the guests' programs and finds out which accelerator works.
///
/// # Errors
/// The kit cannot be fetched, a program does not build, or an option names a missing file.
pub fn open(options: &Options) -> Result<Lab> {
    let mut lab = Lab::prepare(options)?;
    let (accel, why) = match options.accel {
        Some(Accel::Tcg) => (Accel::Tcg, "as asked for".to_owned()),
        Some(Accel::Kvm) => {
            ensure!(
                boots(&mut lab)?,
                "--accel kvm: no guest boots with this /dev/kvm within {} s; leave --accel out, or \
                 take --accel tcg, which is slower and works anywhere",
                KVM_TRIAL.as_secs()
            );
            (Accel::Kvm, "as asked for".to_owned())
        }
        None => match kvm_is_missing() {
            Some(why) => (Accel::Tcg, why),
            None if boots(&mut lab)? => (Accel::Kvm, "a guest boots with /dev/kvm".into()),
            None => (Accel::Tcg, "no guest boots with this /dev/kvm".into()),
        },
    };
    lab.set_accel(accel);
    eprintln!(
        "guests: QEMU {} with {accel} ({why}), Linux {}",
        lab.qemu_version(),
        lab.system().kernel_version()
    );
    Ok(lab)
}

/// Whether a guest boots with /dev/kvm.
///
/// A /dev/kvm that can be opened proves nothing: it may be emulated, or lack what Linux needs. So
/// this function boots a guest. It keeps the answer in a file until the host reboots.
fn boots(lab: &mut Lab) -> Result<bool> {
    let device = fs::metadata("/dev/kvm").context("no /dev/kvm")?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let key = format!(
        "{} {:x} {} {}",
        boot.trim(),
        device.rdev(),
        lab.qemu_version(),
        lab.system().kernel_version()
    );
    let folder = workspace::target().join("xtask");
    let cache = folder.join("accel.json");
    let known =
        fs::read(&cache).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    let known = known.filter(|known| known["key"] == key);
    if let Some(works) = known.and_then(|known| known["kvm"].as_bool()) {
        return Ok(works);
    }
    eprintln!("guests: trying /dev/kvm with a guest, for {} s at most", KVM_TRIAL.as_secs());
    lab.set_accel(Accel::Kvm);
    let trial = VmSpec::new("kvm").start(&lab.scene("trial")?);
    let works = trial.is_ok_and(|vm| vm.guest.with_patience(1).wait_boot(1, KVM_TRIAL).is_ok());
    fs::create_dir_all(&folder)?;
    fs::write(&cache, json!({"key": key, "kvm": works}).to_string())?;
    Ok(works)
}
