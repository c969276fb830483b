// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests of a control client to a bus, over its socket. Each line gets one answer, after some
//! items. Whatever was sent, every device can be removed afterwards.
//!
//! An `@` in the input stands for the directory of the bus.
#![no_main]

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use vbus_host::fuzzing::{ServedBus, supervise_if_asked};

struct Setting {
    bus: ServedBus,
    dir: PathBuf,
    files: HashSet<OsString>,
}

static SETTING: LazyLock<Setting> = LazyLock::new(|| {
    let dir = std::env::temp_dir().join(format!("vbus-fuzz-{}", std::process::id()));
    let bus = ServedBus::start(&dir);
    let files = names(&dir).collect();
    Setting { bus, dir, files }
});

fn names(dir: &Path) -> impl Iterator<Item = OsString> {
    std::fs::read_dir(dir).expect("the folder").map(|entry| entry.expect("an entry").file_name())
}

fuzz_target!(init: supervise_if_asked(), |input: &[u8]| {
    let Setting { bus, dir, files } = &*SETTING;
    let dir_text = dir.to_str().expect("UTF-8").as_bytes();
    let bytes: Vec<u8> = input
        .split_inclusive(|byte| *byte == b'@')
        .flat_map(|piece| match piece.split_last() {
            Some((b'@', front)) => [front, dir_text].concat(),
            _ => piece.to_vec(),
        })
        .collect();
    let answers = bus.exchange(&bytes);
    let text = std::str::from_utf8(&answers).expect("answers are text");
    assert!(text.is_empty() || text.ends_with('\n'));
    let mut last = 0;
    for line in text.lines() {
        let answer: Value = serde_json::from_str(line).expect("an answer is JSON");
        let (key, value) = match answer.as_object().map(|object| object.iter().collect::<Vec<_>>()) {
            Some(members) if members.len() == 1 => members[0],
            _ => panic!("{line}"),
        };
        last += usize::from(key != "item");
        match &**key {
            "ok" | "item" => {}
            "error" => assert!(value.as_str().is_some_and(|why| !why.is_empty()), "{line}"),
            _ => panic!("{line}"),
        }
    }
    // A line without JSON ends the connection.
    let lines = bytes.split_inclusive(|byte| *byte == b'\n').count();
    assert!(last <= lines && (last > 0 || lines == 0), "{last} answers to {lines} requests");
    bus.clear();
    for name in names(dir).filter(|name| !files.contains(name)) {
        let path = dir.join(name);
        assert!(path.extension().is_none_or(|extension| extension != "sock"), "a socket is left");
        std::fs::remove_file(&path).expect("a capture");
    }
});
