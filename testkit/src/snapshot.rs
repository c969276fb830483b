// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Snapshots of a machine under QEMU, with its devices as they are.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::lab::Scene;
use crate::vm::Vm;

/// How long QEMU may take for a job.
const LIMIT: Duration = Duration::from_secs(120);

/// The most bytes of the disk that the guest does not see. It has room for snapshots beside them.
const BYTES: u32 = 1 << 20;

/// Gives QEMU a disk that holds snapshots. The guest has it not.
///
/// # Errors
/// QEMU makes none.
pub fn add_disk(scene: &Scene, vm: &mut Vm) -> Result<()> {
    let name = format!("{}.qcow2", vm.guest.name());
    let image = scene.dir().join(name).display().to_string();
    let file = json!({ "driver": "file", "filename": image, "size": 0 });
    job(vm, "blockdev-create", json!({ "options": file }))?;
    let file = json!({ "driver": "file", "node-name": "image", "filename": image });
    vm.control.execute("blockdev-add", file)?;
    let disk = json!({ "driver": "qcow2", "file": "image", "size": BYTES });
    job(vm, "blockdev-create", json!({ "options": disk }))?;
    let disk = json!({ "driver": "qcow2", "node-name": "disk", "file": "image" });
    vm.control.execute("blockdev-add", disk).map(drop)
}

/// Saves the machine in the snapshot `name` of the disk.
///
/// # Errors
/// QEMU does not.
pub fn save(vm: &mut Vm, name: &str) -> Result<()> {
    let snapshot = json!({ "tag": name, "vmstate": "disk", "devices": ["disk"] });
    job(vm, "snapshot-save", snapshot)
}

/// Restores the machine from the snapshot `name`.
///
/// # Errors
/// QEMU does not.
pub fn load(vm: &mut Vm, name: &str) -> Result<()> {
    let snapshot = json!({ "tag": name, "vmstate": "disk", "devices": ["disk"] });
    job(vm, "snapshot-load", snapshot)
}

/// Runs a job of QEMU to its end.
fn job(vm: &mut Vm, command: &str, mut arguments: Value) -> Result<()> {
    arguments["job-id"] = "job".into();
    vm.control.execute(command, arguments)?;
    let began = Instant::now();
    loop {
        let jobs = vm.control.execute("query-jobs", json!({}))?;
        let job = jobs.as_array().and_then(|jobs| jobs.first()).context("QEMU has lost the job")?;
        if job["status"] == "concluded" {
            ensure!(job["error"].is_null(), "{command}: {}", job["error"]);
            return vm.control.execute("job-dismiss", json!({ "id": "job" })).map(drop);
        }
        ensure!(began.elapsed() < LIMIT, "{command} does not end: {job}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
