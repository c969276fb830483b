// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Configuration files. Each is accepted, or refused with an error that points into the text. The
//! check changes nothing outside the process.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vbus_host::fuzzing::Checker;

static CHECKER: LazyLock<Checker> = LazyLock::new(Checker::default);

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let Err(error) = CHECKER.check(text.to_owned()) else { return };
    // `bus.toml:LINE:COLUMN: WHY`, the line, and a mark under it.
    let rest = error.strip_prefix("bus.toml:").unwrap_or_else(|| panic!("no place: {error}"));
    let mut parts = rest.splitn(3, ':');
    let mut number = || parts.next().and_then(|part| part.parse::<usize>().ok());
    let (Some(line), Some(column)) = (number(), number()) else { panic!("no place: {error}") };
    let lines = text.split('\n').collect::<Vec<_>>();
    assert!((1..=lines.len()).contains(&line), "{error}");
    assert!((1..=lines[line - 1].chars().count() + 1).contains(&column), "{error}");
    let why = parts.next().unwrap_or_default().trim();
    assert!(!why.is_empty() && error.lines().last().is_some_and(|mark| mark.ends_with('^')));
});
