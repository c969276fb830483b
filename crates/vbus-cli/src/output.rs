// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The output of commands: plain text and columns. It has colour only on a terminal.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use serde_json::Value;

use crate::{log, standard};

/// Writes to standard output. If that fails, or if standard output is closed, the program ends. If
/// the reader has gone (`vbus ... | head`), it ends silently. Otherwise it ends with an error and
/// exit code 1, so that no script takes a part of the output for the whole.
pub fn emit(text: &str) {
    emit_bytes(text.as_bytes());
}

/// Writes bytes, which need not be text, as [`emit`] does.
pub fn emit_bytes(bytes: &[u8]) {
    let mut out = io::stdout().lock();
    let written = match standard::output_was_closed() {
        true => Err(io::Error::other("it is closed")),
        false => out.write_all(bytes).and_then(|()| out.flush()),
    };
    let Err(error) = written else { return };
    if error.kind() == io::ErrorKind::BrokenPipe {
        std::process::exit(0);
    }
    log::line(&format!("error: cannot write to standard output: {error}"));
    log::flush();
    std::process::exit(1);
}

/// The arguments of the program, by its definition `command`. Wrong arguments end the program with
/// exit code 2. A request for help or for the version is answered, and ends it with exit code 0, or
/// with 1 if the answer cannot be written.
pub fn arguments(
    mut command: clap::Command,
    args: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> clap::ArgMatches {
    match command.try_get_matches_from_mut(args) {
        Ok(matches) => matches,
        Err(error) if error.use_stderr() => error.exit(),
        Err(answer) => {
            let text = answer.render();
            emit(&if colour() { text.ansi().to_string() } else { text.to_string() });
            std::process::exit(0);
        }
    }
}

/// Writes one line of JSON to standard output.
pub fn emit_json(value: &Value) {
    emit(&format!("{value}\n"));
}

/// Whether standard output is a terminal and the user wants colour.
pub fn colour() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Returns `text` in bold if the output has colour.
pub fn bold(text: &str) -> String {
    if colour() { format!("\x1b[1m{text}\x1b[0m") } else { text.into() }
}

/// Formats rows as columns, each as wide as its widest cell. The first row is the heading.
pub fn columns(rows: &[Vec<String>]) -> String {
    match aligned(rows).split_first() {
        Some((heading, rest)) => bold(heading) + "\n" + &ended(rest),
        None => String::new(),
    }
}

/// Formats rows as [`columns`] does, without a heading.
pub fn table(rows: &[Vec<String>]) -> String {
    ended(&aligned(rows))
}

/// `lines` as one text, each with its line end.
fn ended(lines: &[String]) -> String {
    lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect()
}

fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |i: usize| {
        rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let line = |row: &Vec<String>| {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        line.trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// Returns the members of a JSON value at all depths, each as its path with dots and its value, in
/// the order of the value.
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

/// Formats a JSON value for people: strings have no quotes, and null is "-".
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
