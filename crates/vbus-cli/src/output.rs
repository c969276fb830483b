//! What goes to the terminal: plain text, columns, colour only where a person looks.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use serde_json::Value;

/// Writes to standard output. When its reader has gone (`vbus ... | head`), the program ends
/// without a word.
pub fn emit(text: &str) {
    let mut out = io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// One line of JSON on standard output.
pub fn emit_json(value: &Value) {
    emit(&format!("{value}\n"));
}

/// Whether a person looks at standard output and wants colour.
pub fn colour() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// `text` in bold, if there is colour.
pub fn bold(text: &str) -> String {
    if colour() { format!("\x1b[1m{text}\x1b[0m") } else { text.into() }
}

/// Columns, each as wide as its widest cell; the first row is the heading.
pub fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |i: usize| {
        rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut out = String::new();
    for (number, row) in rows.iter().enumerate() {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        let line = line.trim_end();
        let _ = writeln!(out, "{}", if number == 0 { bold(line) } else { line.to_owned() });
    }
    out
}

/// The members of a JSON value, as paths with dots and what is there; in the order in which they
/// stand.
pub fn flatten(value: &Value) -> Vec<(String, &Value)> {
    fn walk<'a>(prefix: &str, value: &'a Value, out: &mut Vec<(String, &'a Value)>) {
        let join =
            |key: &str| if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
        match value {
            Value::Object(map) => map.iter().for_each(|(key, value)| walk(&join(key), value, out)),
            Value::Array(list) if list.iter().any(|v| v.is_object() || v.is_array()) => {
                list.iter()
                    .enumerate()
                    .for_each(|(i, value)| walk(&join(&i.to_string()), value, out));
            }
            _ => out.push((prefix.to_owned(), value)),
        }
    }
    let mut out = Vec::new();
    walk("", value, &mut out);
    out
}

/// A JSON value as a person writes it: strings without quotes.
pub fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nested_values_become_paths() {
        let value = json!({ "a": { "b": 1, "c": [1, 2] }, "d": [{ "e": "x" }], "f": null });
        let flat: Vec<_> =
            flatten(&value).into_iter().map(|(k, v)| format!("{k}={}", plain(v))).collect();
        assert_eq!(flat, ["a.b=1", "a.c=[1,2]", "d.0.e=x", "f=-"]);
    }
}
