// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The settings of a device with state pages.

use std::collections::HashSet;

use serde_json::Value;
use vbus_core::CreateError;
use vbus_core::settings::Settings;
use vbus_core::shm::abi::state::{NAME_MAX, PAGES_MAX};
use vbus_core::shm::state::MAX_VALUE;

use super::page::{Owner, Page};

/// Checks the settings of a device.
pub fn parse(config: &Value) -> Result<Vec<Page>, CreateError> {
    let mut settings = Settings::new(config)?;
    let tables = settings.tables("pages")?;
    let example = "pages = [{ name = \"speed\", bytes = 8, owner = \"device\" }]";
    let tables = settings.required("pages", tables, example)?;
    if tables.is_empty() || tables.len() > PAGES_MAX as usize {
        let text = format!("has {} pages; give 1 to {PAGES_MAX}", tables.len());
        return Err(settings.error("pages", text));
    }
    let mut names = HashSet::new();
    let mut pages = Vec::with_capacity(tables.len());
    for table in tables {
        let page = page(table, &mut names)?;
        pages.push(page);
    }
    settings.finish()?;
    Ok(pages)
}

fn page(mut settings: Settings, names: &mut HashSet<String>) -> Result<Page, CreateError> {
    let name = settings.text("name")?;
    let name = settings.required("name", name, "name = TEXT")?;
    if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
        let text = format!("is {name:?}; use 1 to {NAME_MAX} bytes of text");
        return Err(settings.error("name", text));
    }
    if !names.insert(name.clone()) {
        return Err(settings
            .error("name", format!("is {name:?}, which another page has; use another name")));
    }
    let bytes = settings.integer("bytes", 1..=MAX_VALUE)?;
    let bytes = settings.required("bytes", bytes, &format!("bytes = 1 to {MAX_VALUE}"))?;
    let owners = [("device", Owner::Device), ("driver", Owner::Driver)];
    let owner = settings.choice("owner", &owners)?;
    let owner = settings.required("owner", owner, "owner = \"device\" or \"driver\"")?;
    let initial = settings.text("initial")?.map(String::into_bytes);
    if let Some(initial) = initial.as_ref().filter(|initial| initial.len() > bytes as usize) {
        let text = format!("has {} bytes, but the page has {bytes}; use fewer", initial.len());
        return Err(settings.error("initial", text));
    }
    settings.finish()?;
    Ok(Page::new(name, bytes, owner, initial))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn errors_say_what_to_write() {
        let page =
            |name: &str, bytes: u32| json!({ "name": name, "bytes": bytes, "owner": "driver" });
        for (config, text) in [
            (json!({}), "\"pages\" is missing"),
            (json!({ "pages": [] }), "give 1 to 256"),
            (json!({ "pages": [page("", 1)] }), "\"pages[0].name\" is \"\""),
            (json!({ "pages": [page(&"x".repeat(57), 1)] }), "1 to 56 bytes"),
            (json!({ "pages": [page("a", 0)] }), "use a number from 1 to 1048576"),
            (json!({ "pages": [page("a", (1 << 20) + 1)] }), "use a number from 1 to 1048576"),
            (
                json!({ "pages": [page("a", 1), page("a", 2)] }),
                "\"pages[1].name\" is \"a\", which another page has",
            ),
            (
                json!({ "pages": [{ "name": "a", "bytes": 1, "owner": "guest" }] }),
                "\"pages[0].owner\" is \"guest\"; use \"device\" or \"driver\"",
            ),
            (
                json!({ "pages": [
                    { "name": "a", "bytes": 1, "owner": "device", "initial": "ab" },
                ] }),
                "\"pages[0].initial\" has 2 bytes, but the page has 1",
            ),
            (
                json!({ "pages": [{ "name": "a", "bytes": 1, "owner": "device", "size": 1 }] }),
                "\"pages[0].size\" is no setting here",
            ),
        ] {
            let error = parse(&config).err().unwrap().to_string();
            assert!(error.contains(text), "{config}: {error}");
        }
        assert_eq!(
            parse(&json!({ "pages": [page("a", 1), page("b", 1 << 20)] })).unwrap().len(),
            2
        );
    }
}
