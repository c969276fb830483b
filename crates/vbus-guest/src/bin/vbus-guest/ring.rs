// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus-guest ring`: rings a doorbell, and does nothing else. It is for measurements, and for
//! tests with a driver that rings without end.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vbus_driver::{Function, Hal};

use crate::doorbell::Choice;
use vbus_cli::output::{emit, emit_json};
use vbus_guest::{Source, is_meant};

/// The arguments of `vbus-guest ring`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The name, PCI address or socket of the device; another process may drive it at the same
    /// time
    device: String,
    /// The number of rings
    #[arg(long, value_name = "N", default_value_t = 1000)]
    count: u64,
    /// The number of the doorbell: the handle of a region [default: the highest, which hardly any
    /// region has]
    #[arg(long, value_name = "N")]
    handle: Option<u32>,
    /// The kind of doorbell
    #[arg(long, value_enum, value_name = "KIND", default_value_t = Choice::Auto)]
    doorbell: Choice,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run<S: Source>(source: &S, args: &Args) -> Result<()> {
    for found in source.scan()? {
        let probed = source.look(&found.id).and_then(|hal| Ok(Function::probe(hal)?));
        let Ok(mut function) = probed else { continue };
        if is_meant(&found, function.info().name.as_str(), &args.device) {
            return ring(&mut function, args).context(found.id);
        }
    }
    anyhow::bail!(
        "there is no device {:?} here; `vbus-guest list` shows what there is",
        args.device
    )
}

fn ring<H: Hal>(function: &mut Function<H>, args: &Args) -> Result<()> {
    args.doorbell.apply(function)?;
    let regions = function.info().max_regions;
    let handle = args.handle.unwrap_or(regions.saturating_sub(1));
    ensure!(handle < regions, "the device has doorbells 0 to {} only", regions.saturating_sub(1));
    let start = function.hal().now();
    for _ in 0..args.count {
        function.ring(handle);
    }
    let took = function.hal().now().saturating_sub(start);
    let (kind, each) = (function.doorbell().to_string(), took / args.count.max(1));
    if args.json {
        emit_json(&json!({ "doorbell": kind, "handle": handle, "count": args.count, "ns": each }));
    } else {
        emit(&format!(
            "rang doorbell {handle} {} times by {kind}: {}.{} us each\n",
            args.count,
            each / 1000,
            each % 1000 / 100
        ));
    }
    Ok(())
}
