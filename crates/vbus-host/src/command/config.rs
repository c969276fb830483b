// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus config`.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;
use vbus_core::{Bus, DeviceClass, Executor, Tuning};

use crate::config::{Config, ConfigError, Source};
use crate::{classes, config};
use vbus_cli::output::{emit, emit_json};

/// Commands.
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Check a configuration file without serving the bus
    Check {
        /// The configuration file
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Runs a command. `more` are the classes that the program has beside those of vbus.
pub fn run(command: &Command, more: Vec<Box<dyn DeviceClass>>) -> Result<()> {
    let Command::Check { file, json } = command;
    let (config, source) = config::read(file)?;
    // The classes check their own settings without making a device: a bus may run with this
    // configuration at the same time and must not be disturbed.
    let executor = Executor::start(Tuning { workers: 1, ..config.tuning })?;
    let bus = Bus::new(executor, classes::unserved(more)?);
    check(&config, &source, &bus)?;
    if *json {
        let names: Vec<_> = config.devices.iter().map(|device| &device.name).collect();
        emit_json(&json!({ "ok": true, "devices": names }));
    } else {
        let devices = match config.devices.len() {
            1 => "1 device".to_owned(),
            count => format!("{count} devices"),
        };
        emit(&format!("{}: good, {devices}\n", file.display()));
    }
    Ok(())
}

/// Lets the classes of `bus` check the settings of each device. The bus makes no device.
///
/// # Errors
/// A setting is wrong. The text points to its place.
pub fn check(config: &Config, source: &Source, bus: &Bus) -> Result<(), ConfigError> {
    for (number, spec) in config.devices.iter().enumerate() {
        spec.check_class(bus.classes())
            .and_then(|()| bus.check(&spec.name, &spec.class, &spec.settings))
            .map_err(|error| source.device_error(number, &error.to_string()))?;
    }
    Ok(())
}
