// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device classes of the program.

use std::sync::Arc;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use vbus_core::DeviceClass;
use vbus_net::{Direct, Opener, Switches};
use vbus_sched::SchedClass;
use vbus_virtio::net::VirtioNetClass;

/// Returns the classes of vbus, with `sched` as the class of that name, followed by `more`.
/// `opener` opens what their devices need.
///
/// # Errors
/// Two classes have the same name.
pub fn all(
    opener: Arc<dyn Opener>,
    sched: SchedClass,
    more: Vec<Box<dyn DeviceClass>>,
) -> Result<Vec<Box<dyn DeviceClass>>> {
    let switches = Switches::default();
    let mut classes = vbus_devices::classes_on(switches.clone(), opener.clone());
    classes.push(Box::new(VirtioNetClass::on(switches, opener)));
    classes.push(Box::new(sched));
    for class in more {
        let name = class.name();
        ensure!(
            classes.iter().all(|known| known.name() != name),
            "there are two classes called {name:?}; give the one of this program another name"
        );
        classes.push(class);
    }
    Ok(classes)
}

/// The same for a program that serves no bus: it checks settings and names the classes.
///
/// # Errors
/// Two classes have the same name.
pub fn unserved(more: Vec<Box<dyn DeviceClass>>) -> Result<Vec<Box<dyn DeviceClass>>> {
    all(Arc::new(Direct), SchedClass::new(), more)
}

/// The name and the help text of each class, in JSON.
pub fn describe<'a>(classes: impl Iterator<Item = &'a dyn DeviceClass>) -> Value {
    classes.map(|class| json!({ "name": class.name(), "help": class.help() })).collect()
}
