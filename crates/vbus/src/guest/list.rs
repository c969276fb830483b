//! `vbus guest list`: the functions that are here.

use anyhow::Result;
use serde_json::{Value, json};
use vbus_driver::{Doorbell, Function, Hal, State};
use vbus_shm::abi::capability;

use super::source::Source;
use crate::output::{columns, emit, emit_json};

/// Prints them.
pub fn run<S: Source>(source: &S, as_json: bool) -> Result<()> {
    let mut rows = Vec::new();
    for found in source.scan()? {
        let probed = source.look(&found.id).and_then(|hal| Ok(Function::probe(hal)?));
        rows.push(match probed {
            Ok(function) => describe(&found.id, &function),
            Err(error) => json!({ "id": found.id, "class_number": found.class, "error": format!("{error:#}") }),
        });
    }
    if as_json {
        emit_json(&Value::Array(rows));
    } else if rows.is_empty() {
        emit("no functions of a vbus\n");
    } else {
        let text = |row: &Value, key: &str| match &row[key] {
            Value::String(text) => text.clone(),
            Value::Array(list) => list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","),
            Value::Null => "-".into(),
            other => other.to_string(),
        };
        let mut table =
            vec![["FUNCTION", "NAME", "CLASS", "FEATURES", "DOORBELLS", "STATE"].map(String::from).to_vec()];
        for row in &rows {
            let state = if row["error"].is_null() { "state" } else { "error" };
            table.push(["id", "name", "class", "features", "doorbells", state].map(|key| text(row, key)).to_vec());
        }
        emit(&columns(&table));
    }
    Ok(())
}

fn describe<H: Hal>(id: &str, function: &Function<H>) -> Value {
    let info = function.info();
    let state = match function.state() {
        Ok(State::Closed) => "closed".into(),
        Ok(State::Open) => "open".into(),
        Ok(State::Broken(status)) => format!("broken: {status}"),
        Err(error) => error.to_string(),
    };
    json!({
        "id": id,
        "name": info.name.to_string(),
        "class": info.class_name.to_string(),
        "class_number": info.class,
        "features": format!("{:#x}", info.features),
        "doorbells": function.doorbells_offered().map(kind).collect::<Vec<_>>(),
        "doorbell": kind(function.doorbell()),
        "max_regions": info.max_regions,
        "max_region_bytes": info.max_region_bytes,
        "vectors": info.vectors,
        "state": state,
    })
}

fn kind(doorbell: Doorbell) -> String {
    match doorbell.kind {
        capability::KIND_MMIO => "mmio".into(),
        capability::KIND_PIO => "pio".into(),
        capability::KIND_HYPERCALL => "hypercall".into(),
        other => format!("kind {other}"),
    }
}
