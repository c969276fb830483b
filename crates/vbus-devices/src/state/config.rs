//! The settings of a device with state pages.

use std::collections::HashSet;

use serde::Deserialize;
use serde_json::Value;
use vbus_core::CreateError;
use vbus_core::shm::abi::state::{NAME_MAX, PAGES_MAX};
use vbus_core::shm::state::MAX_VALUE;

use super::page::{Owner, Page};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    pages: Vec<RawPage>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPage {
    name: String,
    bytes: u32,
    owner: Owner,
    initial: Option<String>,
}

/// Checks the settings of a device.
pub fn parse(config: &Value) -> Result<Vec<Page>, CreateError> {
    let bad = |text: String| Err(CreateError(text));
    let raw: Raw =
        serde_json::from_value(config.clone()).map_err(|error| CreateError(error.to_string()))?;
    if raw.pages.is_empty() || raw.pages.len() > PAGES_MAX as usize {
        return bad(format!("there are {} pages; give 1 to {PAGES_MAX}", raw.pages.len()));
    }
    let mut names = HashSet::new();
    let mut pages = Vec::with_capacity(raw.pages.len());
    for RawPage { name, bytes, owner, initial } in raw.pages {
        if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
            return bad(format!("bad page name {name:?}: use 1 to {NAME_MAX} bytes of text"));
        }
        if bytes == 0 || bytes > MAX_VALUE {
            return bad(format!("page {name:?}: bytes is {bytes}; use 1 to {MAX_VALUE}"));
        }
        let initial = initial.map(String::into_bytes);
        if let Some(initial) = initial.as_ref().filter(|initial| initial.len() > bytes as usize) {
            return bad(format!(
                "page {name:?}: the initial value has {} bytes, the page {bytes}",
                initial.len()
            ));
        }
        if !names.insert(name.clone()) {
            return bad(format!("there are two pages called {name:?}"));
        }
        pages.push(Page::new(name, bytes, owner, initial));
    }
    Ok(pages)
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
            (json!({}), "missing field `pages`"),
            (json!({ "pages": [] }), "give 1 to 256"),
            (json!({ "pages": [page("", 1)] }), "bad page name"),
            (json!({ "pages": [page(&"x".repeat(57), 1)] }), "1 to 56 bytes"),
            (json!({ "pages": [page("a", 0)] }), "use 1 to 1048576"),
            (json!({ "pages": [page("a", (1 << 20) + 1)] }), "use 1 to 1048576"),
            (json!({ "pages": [page("a", 1), page("a", 2)] }), "two pages called \"a\""),
            (
                json!({ "pages": [{ "name": "a", "bytes": 1, "owner": "guest" }] }),
                "unknown variant `guest`",
            ),
            (
                json!({ "pages": [{ "name": "a", "bytes": 1, "owner": "device", "initial": "ab" }] }),
                "has 2 bytes, the page 1",
            ),
            (
                json!({ "pages": [{ "name": "a", "bytes": 1, "owner": "device", "size": 1 }] }),
                "unknown field `size`",
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
