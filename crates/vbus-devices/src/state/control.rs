// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests of control clients (spec/state.md, "Requests").

use std::time::Duration;

use hex::FromHexError;
use serde::Deserialize;
use serde_json::{Value, json};

use super::StatePages;
use super::page::{Current, Page, Wait};

/// How often a watch asks whether its client is still there.
const PROBE: Duration = Duration::from_millis(500);

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
enum Request {
    List,
    Get { page: String },
    Set { page: String, text: Option<String>, hex: Option<String> },
    Watch { page: String },
}

/// Whether a request may change a page.
pub fn changes(request: &Value) -> bool {
    matches!(Request::deserialize(request), Ok(Request::Set { .. }))
}

/// Serves one request.
pub fn serve(
    device: &StatePages,
    request: &Value,
    reply: &mut dyn FnMut(Value) -> bool,
) -> Result<(), String> {
    match Request::deserialize(request).map_err(|error| error.to_string())? {
        Request::List => {
            reply(json!({ "pages": device.pages.iter().map(Page::inspect).collect::<Vec<_>>() }));
        }
        Request::Get { page } => {
            let page = device.page(&page)?;
            reply(show(page, &page.current()));
        }
        Request::Set { page, text, hex } => {
            let page = device.page(&page)?;
            let value = match (text, hex) {
                (Some(text), None) => text.into_bytes(),
                (None, Some(hex)) => from_hex(&hex)?,
                _ => return Err("give the value either as \"text\" or as \"hex\"".into()),
            };
            let version = page.set(value)?;
            reply(json!({ "page": page.name, "version": version }));
        }
        Request::Watch { page } => {
            let page = device.page(&page)?;
            let _watching = Watching::begin(page);
            device.wake();
            watch(page, reply);
        }
    }
    Ok(())
}

/// Replies with the current value, then with each newer one. If values come faster than the client
/// reads them, the client gets the newest.
fn watch(page: &Page, reply: &mut dyn FnMut(Value) -> bool) {
    let mut current = page.current();
    while reply(show(page, &current)) {
        current = loop {
            match page.wait_newer(current.version, PROBE) {
                Wait::Newer(newer) => break newer,
                Wait::Nothing if reply(Value::Null) => {}
                Wait::Nothing | Wait::Removed => return,
            }
        };
    }
}

/// Counts a client that watches a page. Dropping it ends the watch.
struct Watching<'a>(&'a Page);

impl<'a> Watching<'a> {
    fn begin(page: &'a Page) -> Watching<'a> {
        page.watch(true);
        Watching(page)
    }
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.watch(false);
    }
}

/// A value in JSON: all its bytes in hexadecimal, and also as text if the value is text with zeros
/// at its end.
fn show(page: &Page, current: &Current) -> Value {
    let end = current.value.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    let text = std::str::from_utf8(&current.value[..end]).ok();
    let text = text.filter(|text| !text.chars().any(|c| c.is_control() && c != '\n' && c != '\t'));
    let mut shown = json!({ "page": page.name, "version": current.version, "hex": hex::encode(&current.value) });
    if let Some(text) = text {
        shown["text"] = text.into();
    }
    shown
}

fn from_hex(text: &str) -> Result<Vec<u8>, String> {
    hex::decode(text).map_err(|error| match error {
        FromHexError::InvalidHexCharacter { c, .. } => format!("{c:?} is not a hexadecimal digit"),
        _ => "a hexadecimal value needs two digits for each byte".into(),
    })
}
