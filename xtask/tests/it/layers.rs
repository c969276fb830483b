// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The crates depend on each other as ARCHITECTURE.md says, and can be published.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// What `cargo metadata` says of the workspace's packages.
fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The packages of the workspace that each of its packages uses, without those that only tests use.
fn uses() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let packages = metadata["packages"].as_array().unwrap();
    let members: BTreeSet<_> = packages.iter().map(|package| text(&package["name"])).collect();
    let uses = |package: &Value| {
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        let used = dependencies.filter(|dependency| dependency["kind"] != "dev");
        used.map(|dependency| text(&dependency["name"]))
            .filter(|name| members.contains(name))
            .collect()
    };
    packages.iter().map(|package| (text(&package["name"]), uses(package))).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The names in the first column of the tables of ARCHITECTURE.md, in order: those of the layers,
/// and those beside them.
fn tables() -> (Vec<String>, Vec<String>) {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let layers = text.split("## Layers").nth(1).unwrap().split("\n## ").next().unwrap();
    let (layers, beside) = layers.split_once("Beside them:").unwrap();
    let names = |table: &str| {
        let rows = table.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        rows.map(|name| name.trim_end_matches('/').to_owned()).collect()
    };
    (names(layers), names(beside))
}

/// All that `package` uses, directly or not.
fn closure(uses: &BTreeMap<String, BTreeSet<String>>, package: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let mut left = vec![package.to_owned()];
    while let Some(package) = left.pop() {
        let new = uses[&package].iter().filter(|used| all.insert((*used).clone()));
        left.extend(new.cloned());
    }
    all
}

#[test]
fn a_crate_uses_only_crates_above_it_in_the_table() {
    let (layers, beside) = tables();
    let uses = uses();
    for (at, name) in layers.iter().enumerate() {
        let used = uses.get(name).unwrap_or_else(|| panic!("there is no crate {name}"));
        for used in used {
            assert!(layers[..at].contains(used), "{name} uses {used}, which is not above it");
        }
    }
    for entry in std::fs::read_dir(root().join("crates")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(layers.contains(&name) || beside.contains(&name), "ARCHITECTURE.md lacks {name}");
    }
    for name in beside.iter().filter(|name| !name.starts_with("vbus-")) {
        assert!(root().join(name).is_dir(), "there is no folder {name}");
    }
}

#[test]
fn no_program_compiles_a_side_that_it_does_not_run() {
    let uses = uses();
    let device = ["vbus-core", "vbus-devices", "vbus-net", "vbus-pci", "vbus-sched"];
    for package in ["vbus-guest", "vbus-process", "vbus-driver", "vbus-vmm"] {
        let all = closure(&uses, package);
        let wrong: Vec<_> = device.iter().filter(|crate_| all.contains(**crate_)).collect();
        assert!(wrong.is_empty(), "{package} uses the device's side: {wrong:?}");
    }
    assert!(!closure(&uses, "vbus-host").contains("vbus-driver"));
    assert!(uses["vfio-user-protocol"].is_empty() && uses["vbus-shm"].is_empty());
}

#[test]
fn a_crate_that_can_be_published_has_what_that_needs() {
    for package in metadata()["packages"].as_array().unwrap() {
        let manifest = Path::new(package["manifest_path"].as_str().unwrap());
        let folder = manifest.parent().unwrap();
        if package["publish"] == serde_json::json!([]) || !folder.starts_with(root().join("crates"))
        {
            continue;
        }
        let name = package["name"].as_str().unwrap();
        for key in ["description", "license", "readme", "rust_version"] {
            assert!(package[key].is_string(), "{name} has no {key}");
        }
        for (key, most) in [("keywords", 5), ("categories", 5)] {
            let count = package[key].as_array().unwrap().len();
            assert!((1..=most).contains(&count), "{name} has {count} {key}");
        }
        let keywords = package["keywords"].as_array().unwrap().iter();
        assert!(keywords.into_iter().all(|word| word.as_str().unwrap().len() <= 20), "{name}");
        for dependency in package["dependencies"].as_array().unwrap() {
            let is_test = dependency["kind"] == "dev";
            let is_local = dependency["path"].is_string();
            let has_version = dependency["req"] != "*";
            assert!(
                !is_local || is_test != has_version,
                "{name}: {} of this tree needs a version, and none if only tests use it",
                dependency["name"]
            );
        }
        let output = Command::new(env!("CARGO"))
            .args(["package", "--list", "--allow-dirty", "--offline", "--package", name])
            .current_dir(root())
            .output()
            .unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let list = String::from_utf8(output.stdout).unwrap();
        for file in ["README.md", "LICENSE-APACHE", "LICENSE-MIT"] {
            assert!(list.lines().any(|line| line == file), "{name} would be packed without {file}");
        }
    }
}
