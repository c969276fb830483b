// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus-guest list`: lists the functions of the source.

use anyhow::Result;
use serde_json::{Map, Value, json};
use vbus_driver::{ConnectionState, Function, Hal};

use crate::doorbell;
use vbus_cli::output::{columns, emit, emit_json};
use vbus_guest::Source;

/// Prints the functions. If there are none, prints `hint`, which says where there may be some.
pub fn run<S: Source>(source: &S, as_json: bool, hint: &str) -> Result<()> {
    let (mut rows, in_use) = (Vec::new(), source.in_use());
    for found in source.scan()? {
        // To ask a device that is in use costs its driver something.
        if let Some(used) = in_use.iter().find(|used| used.id == found.id) {
            rows.push(json!({ "id": used.id, "name": used.name, "class": used.class,
                "state": used.state, "error": "in use by another driver" }));
            continue;
        }
        let probed = source.look(&found.id).and_then(|hal| Ok(Function::probe(hal)?));
        rows.push(match probed {
            Ok(mut function) => describe(&found.id, &mut function),
            Err(error) => json!({ "id": found.id, "class_number": found.class,
                "error": format!("{error:#}") }),
        });
    }
    if as_json {
        emit_json(&Value::Array(rows));
    } else if rows.is_empty() {
        emit(&format!("no functions of a vbus here{hint}\n"));
    } else {
        let mut table = vec![
            ["FUNCTION", "NAME", "CLASS", "FEATURES", "DOORBELLS", "STATE"]
                .map(String::from)
                .to_vec(),
        ];
        table.extend(rows.iter().map(cells));
        emit(&columns(&table));
    }
    Ok(())
}

fn describe<H: Hal>(id: &str, function: &mut Function<H>) -> Value {
    let state = function.state();
    // A driver that has the function open would find the rings in its counters.
    let costs: Vec<_> = match state {
        Ok(ConnectionState::Closed) => function.choose_doorbell(doorbell::RINGS).iter().collect(),
        _ => Vec::new(),
    };
    let info = function.info();
    let state = match state {
        Ok(ConnectionState::Closed) => "closed".into(),
        Ok(ConnectionState::Open) => "open".into(),
        Ok(ConnectionState::Broken(error_code)) => format!("broken: {error_code}"),
        Ok(_) => "unknown".into(),
        Err(error) => error.to_string(),
    };
    json!({
        "id": id,
        "name": info.name.to_string(),
        "class": info.class_name.to_string(),
        "class_number": info.class,
        "features": format!("{:#x}", info.features),
        "doorbells": function.doorbells_offered().map(|offered| offered.to_string()).collect::<Vec<_>>(),
        "doorbell": function.doorbell().to_string(),
        "doorbell_ns": costs.iter().map(|cost| (cost.doorbell.to_string(), cost.nanoseconds.into())).collect::<Map<_, _>>(),
        "max_regions": info.max_regions,
        "max_region_bytes": info.max_region_bytes,
        "vectors": info.vectors,
        "state": state,
    })
}

/// The row of the table for people.
fn cells(row: &Value) -> Vec<String> {
    let text = |key: &str| match &row[key] {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    };
    let state = if row["error"].is_null() { "state" } else { "error" };
    let [id, name, class, features, state] = ["id", "name", "class", "features", state].map(text);
    vec![id, name, class, features, doorbells(row), state]
}

/// The kinds of doorbell that the function offers, each with its cost if this process can ring it.
/// The cheapest of several has a star.
fn doorbells(row: &Value) -> String {
    let costs = &row["doorbell_ns"];
    let several = costs.as_object().is_some_and(|costs| costs.len() > 1);
    let one = |name: &Value| {
        let star = if several && *name == row["doorbell"] { "*" } else { "" };
        let name = name.as_str().unwrap_or("-");
        match costs[name].as_u64() {
            Some(ns) => format!("{star}{name} {}.{} us", ns / 1000, ns % 1000 / 100),
            None => name.to_owned(),
        }
    };
    match row["doorbells"].as_array() {
        Some(offered) => offered.iter().map(one).collect::<Vec<_>>().join(", "),
        None => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_doorbell_is_marked() {
        let row = json!({
            "doorbells": ["mmio", "pio", "hypercall"], "doorbell": "pio",
            "doorbell_ns": { "mmio": 43_961, "pio": 28_100 },
        });
        assert_eq!(doorbells(&row), "mmio 43.9 us, *pio 28.1 us, hypercall");
        let row =
            json!({ "doorbells": ["mmio"], "doorbell": "mmio", "doorbell_ns": { "mmio": 300 } });
        assert_eq!(doorbells(&row), "mmio 0.3 us");
        assert_eq!(doorbells(&json!({ "error": "gone" })), "-");
    }
}
