// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changes a document at random, as somebody who forges it does.

use serde_json::{Map, Value, json};

use crate::Random;

/// Changes one value anywhere in `document`.
pub fn mutate(document: &mut Value, random: &mut Random) {
    let leaves = count(document);
    let mut at = random.below(leaves.max(1));
    change(document, &mut at, random);
}

/// Values in a document: each object and array, and what is in it.
fn count(value: &Value) -> u64 {
    1 + match value {
        Value::Object(fields) => fields.values().map(count).sum(),
        Value::Array(items) => items.iter().map(count).sum(),
        _ => 0,
    }
}

/// Changes value number `at`, if it is within `value`. Returns whether it was.
fn change(value: &mut Value, at: &mut u64, random: &mut Random) -> bool {
    if *at == 0 {
        *value = other(value, random);
        return true;
    }
    *at -= 1;
    match value {
        Value::Object(fields) => fields.values_mut().any(|field| change(field, at, random)),
        Value::Array(items) => items.iter_mut().any(|item| change(item, at, random)),
        _ => false,
    }
}

/// Another value in place of this one. As a rule it has the same type.
fn other(value: &Value, random: &mut Random) -> Value {
    match value {
        Value::Number(_) if random.below(8) != 0 => json!(random.edge()),
        Value::Bool(is) => json!(!is),
        Value::String(text) if random.below(8) != 0 => {
            let mut bytes = text.clone().into_bytes();
            match random.below(4) {
                0 => bytes.truncate(bytes.len() / 2 * 2 / 2),
                1 => bytes.extend_from_within(..),
                _ if bytes.is_empty() => {}
                _ => {
                    let at = random.index(bytes.len());
                    bytes[at] = b"0123456789abcdef"[random.index(16)];
                }
            }
            json!(String::from_utf8(bytes).unwrap_or_default())
        }
        Value::Array(items) if !items.is_empty() && random.below(8) != 0 => {
            let mut items = items.clone();
            match random.below(3) {
                0 => drop(items.pop()),
                1 => items.extend_from_within(..),
                _ => items.reverse(),
            }
            Value::Array(items)
        }
        Value::Object(fields) if !fields.is_empty() && random.below(8) != 0 => {
            let mut fields = fields.clone();
            let name = fields.keys().nth(random.index(fields.len())).cloned().unwrap_or_default();
            match random.below(2) {
                0 => drop(fields.remove(&name)),
                _ => drop(fields.insert(format!("{name}s"), Value::Null)),
            }
            Value::Object(fields)
        }
        _ => match random.below(5) {
            0 => Value::Null,
            1 => json!([]),
            2 => Value::Object(Map::new()),
            3 => json!("x"),
            _ => json!(-1),
        },
    }
}
