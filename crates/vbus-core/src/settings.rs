// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads the settings of a device. An error names the key, its value, and what to write instead.
//!
//! ```
//! use serde_json::json;
//! use vbus_core::settings::Settings;
//!
//! let value = json!({ "mtu": 99999, "mode": "fast" });
//! let mut settings = Settings::new(&value)?;
//! let fast = settings.choice("mode", &[("fast", true), ("safe", false)])?.unwrap_or(false);
//! assert!(fast);
//! let error = settings.integer::<u16>("mtu", 68..=9000).unwrap_err();
//! assert_eq!(error.to_string(), "\"mtu\" is 99999; use a number from 68 to 9000");
//! # Ok::<(), vbus_core::CreateError>(())
//! ```
//!
//! The text of each error begins with the key in quotes. `vbus` uses it to find the line of the
//! configuration file. A key within a list of tables is written `pages[2].owner`.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::CreateError;

/// The longest value that an error repeats.
const SHOWN_MAX: usize = 60;

/// The settings of a device, or a table within them. Reading a key removes it.
/// [`finish`](Self::finish) reports the keys that are left.
#[derive(Debug)]
pub struct Settings {
    left: Map<String, Value>,
    /// The text before a key in errors: empty, or for example `pages[2].`.
    prefix: String,
    /// The keys that the class has asked for.
    known: Vec<&'static str>,
}

impl Settings {
    /// The settings `value`: an object, or null for none.
    ///
    /// # Errors
    /// `value` is something else.
    pub fn new(value: &Value) -> Result<Settings, CreateError> {
        let left = match value {
            Value::Null => Map::new(),
            Value::Object(map) => map.clone(),
            other => {
                return Err(CreateError(format!(
                    "the settings are {}; use a table of keys and values",
                    shown(other)
                )));
            }
        };
        Ok(Settings { left, prefix: String::new(), known: Vec::new() })
    }

    /// The settings in the table `value`, which is the value of `key`. Errors write their keys as
    /// `key.owner`.
    ///
    /// # Errors
    /// `value` is no table.
    pub fn within(key: &str, value: &Value) -> Result<Settings, CreateError> {
        match value {
            Value::Object(map) => {
                Ok(Settings { left: map.clone(), prefix: format!("{key}."), known: Vec::new() })
            }
            other => Err(CreateError(format!("{key:?} is {}; use a table", shown(other)))),
        }
    }

    /// An error about `key`: the key in quotes, then `text`.
    pub fn error(&self, key: &str, text: impl fmt::Display) -> CreateError {
        CreateError(format!("\"{}{key}\" {text}", self.prefix))
    }

    /// Whether `key` is there and has not been read.
    pub fn has(&self, key: &str) -> bool {
        self.left.contains_key(key)
    }

    /// The number at `key`, if it is there.
    ///
    /// # Errors
    /// The value is no integer, or it is outside `range`.
    pub fn integer<T>(
        &mut self,
        key: &'static str,
        range: RangeInclusive<T>,
    ) -> Result<Option<T>, CreateError>
    where
        T: TryFrom<i64> + PartialOrd + fmt::Display,
    {
        let Some(value) = self.take(key) else { return Ok(None) };
        number(&value, &range).map(Some).ok_or_else(|| self.out_of_range(key, &value, &range))
    }

    /// The number at `key`, if it is there: an integer, or text with a suffix for a power of 1000,
    /// such as `"250M"`. The suffixes are k, M, G and T.
    ///
    /// # Errors
    /// The value is neither, or it is outside `range`.
    pub fn quantity(
        &mut self,
        key: &'static str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, CreateError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let read = match &value {
            Value::String(text) => quantity(text),
            other => other.as_u64(),
        };
        read.filter(|n| range.contains(n)).map(Some).ok_or_else(|| {
            let (from, to, value) = (range.start(), range.end(), shown(&value));
            let text = format!(
                "is {value}; use a number from {from} to {to}, or text with a suffix, such as \
                 \"250M\""
            );
            self.error(key, text)
        })
    }

    /// The list of numbers at `key`, if it is there.
    ///
    /// # Errors
    /// The value is no list, or one of its items is no integer in `range`.
    pub fn integers<T>(
        &mut self,
        key: &'static str,
        range: RangeInclusive<T>,
    ) -> Result<Option<Vec<T>>, CreateError>
    where
        T: TryFrom<i64> + PartialOrd + fmt::Display,
    {
        let Some(list) = self.list(key, "numbers")? else { return Ok(None) };
        let item = |(at, value): (usize, &Value)| {
            let key = format!("{key}[{at}]");
            number(value, &range).ok_or_else(|| self.out_of_range(&key, value, &range))
        };
        list.iter().enumerate().map(item).collect::<Result<_, _>>().map(Some)
    }

    /// Whether `key` is true or false, if it is there.
    ///
    /// # Errors
    /// The value is neither.
    pub fn flag(&mut self, key: &'static str) -> Result<Option<bool>, CreateError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.error(key, format_args!("is {}; use true or false", shown(&value))))
    }

    /// The text at `key`, if it is there.
    ///
    /// # Errors
    /// The value is no text.
    pub fn text(&mut self, key: &'static str) -> Result<Option<String>, CreateError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => {
                Err(self.error(key, format_args!("is {}; use text in quotes", shown(&other))))
            }
        }
    }

    /// The list of texts at `key`, if it is there.
    ///
    /// # Errors
    /// The value is no list, or one of its items is no text.
    pub fn texts(&mut self, key: &'static str) -> Result<Option<Vec<String>>, CreateError> {
        let Some(list) = self.list(key, "texts in quotes")? else { return Ok(None) };
        let item = |(at, value): (usize, Value)| match value {
            Value::String(text) => Ok(text),
            other => Err(self.error(
                &format!("{key}[{at}]"),
                format_args!("is {}; use text in quotes", shown(&other)),
            )),
        };
        list.into_iter().enumerate().map(item).collect::<Result<_, _>>().map(Some)
    }

    /// The choice that the word at `key` names, if the key is there.
    ///
    /// # Errors
    /// The value is none of the words.
    pub fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, CreateError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        self.chosen(key, &value, choices).map(Some)
    }

    /// The choice for each word of the list at `key`, if the key is there.
    ///
    /// # Errors
    /// The value is no list, or one of its items is none of the words.
    pub fn choices<T: Copy>(
        &mut self,
        key: &'static str,
        choices: &[(&str, T)],
    ) -> Result<Option<Vec<T>>, CreateError> {
        let Some(list) = self.list(key, "words")? else { return Ok(None) };
        let item =
            |(at, value): (usize, &Value)| self.chosen(&format!("{key}[{at}]"), value, choices);
        list.iter().enumerate().map(item).collect::<Result<_, _>>().map(Some)
    }

    /// The tables of the list at `key`, if it is there.
    ///
    /// # Errors
    /// The value is no list of tables.
    pub fn tables(&mut self, key: &'static str) -> Result<Option<Vec<Settings>>, CreateError> {
        let Some(list) = self.list(key, "tables, such as [{ name = \"a\" }]")? else {
            return Ok(None);
        };
        let item = |(at, value): (usize, Value)| match value {
            Value::Object(left) => {
                let prefix = format!("{}{key}[{at}].", self.prefix);
                Ok(Settings { left, prefix, known: Vec::new() })
            }
            other => Err(self.error(
                &format!("{key}[{at}]"),
                format_args!("is {}; use a table, such as {{ name = \"a\" }}", shown(&other)),
            )),
        };
        list.into_iter().enumerate().map(item).collect::<Result<_, _>>().map(Some)
    }

    /// The value of a key that must be there. `value` is the result of reading `key`.
    ///
    /// # Errors
    /// There is no value. `write` follows the word *write* in the error: `"the path of a file"`
    /// gives `"path" is missing; write the path of a file`.
    pub fn required<T>(&self, key: &str, value: Option<T>, write: &str) -> Result<T, CreateError> {
        value.ok_or_else(|| self.error(key, format_args!("is missing; write {write}")))
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// The settings have a key that nobody asked for.
    pub fn finish(self) -> Result<(), CreateError> {
        let Some(key) = self.left.keys().next() else { return Ok(()) };
        let known = &self.known;
        let instead = match meant(key, known) {
            Some(meant) => format!("did you mean \"{meant}\"?"),
            None if known.is_empty() => "there are none".into(),
            None => format!("there are: {}", known.join(", ")),
        };
        Err(self.error(key, format_args!("is no setting here; {instead}")))
    }

    /// The value at `key`, whatever it is.
    pub fn value(&mut self, key: &'static str) -> Option<Value> {
        self.take(key)
    }

    fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        self.left.remove(key)
    }

    fn list(&mut self, key: &'static str, of: &str) -> Result<Option<Vec<Value>>, CreateError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => {
                Err(self.error(key, format_args!("is {}; use a list of {of}", shown(&other))))
            }
        }
    }

    fn chosen<T: Copy>(
        &self,
        key: &str,
        value: &Value,
        choices: &[(&str, T)],
    ) -> Result<T, CreateError> {
        let word = value.as_str();
        if let Some((_, chosen)) = choices.iter().find(|(name, _)| Some(*name) == word) {
            return Ok(*chosen);
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let instead = match word.and_then(|word| meant(word, &names)) {
            Some(meant) => format!("did you mean \"{meant}\"?"),
            None => {
                let quoted: Vec<_> = names.iter().map(|name| format!("\"{name}\"")).collect();
                format!("use {}", quoted.join(" or "))
            }
        };
        Err(self.error(key, format_args!("is {}; {instead}", shown(value))))
    }

    fn out_of_range<T: fmt::Display>(
        &self,
        key: &str,
        value: &Value,
        range: &RangeInclusive<T>,
    ) -> CreateError {
        let (from, to) = (range.start(), range.end());
        self.error(key, format_args!("is {}; use a number from {from} to {to}", shown(value)))
    }
}

fn number<T: TryFrom<i64> + PartialOrd>(value: &Value, range: &RangeInclusive<T>) -> Option<T> {
    value.as_i64().and_then(|n| T::try_from(n).ok()).filter(|n| range.contains(n))
}

/// The number that digits with at most one suffix stand for.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor = match &text[digits.len()..] {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

/// A value as an error repeats it.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// The known word that `word` is probably a misspelling of, if there is one.
pub fn meant<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let distance = |known: &&'a str| strsim::osa_distance(word, known);
    let close = known.iter().min_by_key(|known| distance(known))?;
    (distance(close) <= 2 && distance(close) < close.chars().count()).then_some(*close)
}

/// The keys whose values differ between the settings of a device and other settings for it, in
/// order.
pub fn changed(old: &Value, new: &Value) -> Vec<String> {
    let none = Map::new();
    let [old, new] = [old, new].map(|value| value.as_object().unwrap_or(&none));
    changed_keys(old, new)
}

/// The keys whose values differ between two tables, in order.
pub fn changed_keys(old: &Map<String, Value>, new: &Map<String, Value>) -> Vec<String> {
    let differs = |key: &&String| old.get(*key) != new.get(*key);
    let keys: BTreeSet<_> = old.keys().chain(new.keys()).filter(differs).collect();
    keys.into_iter().cloned().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_with_other_values_are_found() {
        let (old, new) = (json!({ "a": 1, "b": 2, "c": 3 }), json!({ "a": 1, "b": 4, "d": 5 }));
        assert_eq!(changed(&old, &new), ["b", "c", "d"]);
        assert!(changed(&old, &old).is_empty() && changed(&Value::Null, &json!({})).is_empty());
    }

    #[test]
    fn an_error_names_key_value_and_what_to_write() {
        type Reading = fn(&mut Settings) -> Result<(), CreateError>;
        let read = |value: Value, read: Reading| {
            let mut settings = Settings::new(&value)?;
            read(&mut settings)?;
            settings.finish()
        };
        let mtu = |s: &mut Settings| s.integer::<u16>("mtu", 68..=9000).map(drop);
        let pages = |s: &mut Settings| {
            let tables = s.tables("pages")?;
            for mut page in s.required("pages", tables, "pages = [...]")? {
                page.choice("owner", &[("device", 1), ("driver", 2)])?;
                page.finish()?;
            }
            Ok(())
        };
        let ids = |s: &mut Settings| s.integers::<i32>("ids", 1..=i32::MAX).map(drop);
        let flag = |s: &mut Settings| s.flag("tso").map(drop);
        let text = |s: &mut Settings| s.text("path").map(drop);
        let names = |s: &mut Settings| s.texts("names").map(drop);
        let inner = |s: &mut Settings| {
            let mut inner = Settings::within("inner", &s.take("inner").unwrap_or_default())?;
            inner.flag("a")?;
            inner.finish()
        };
        let cases: [(Value, Reading, &str); 19] = [
            (json!({ "mtu": 99999 }), mtu, "\"mtu\" is 99999; use a number from 68 to 9000"),
            (json!({ "mtu": -1 }), mtu, "\"mtu\" is -1; use a number from 68 to 9000"),
            (json!({ "mtu": "x" }), mtu, "\"mtu\" is \"x\"; use a number from 68 to 9000"),
            (json!({ "mtu": 1e30 }), mtu, "\"mtu\" is 1e+30; use a number from 68 to 9000"),
            (json!({ "mut": 1500 }), mtu, "\"mut\" is no setting here; did you mean \"mtu\"?"),
            (json!({ "speed": 1 }), mtu, "\"speed\" is no setting here; there are: mtu"),
            (json!({}), pages, "\"pages\" is missing; write pages = [...]"),
            (json!({ "pages": 1 }), pages, "\"pages\" is 1; use a list of tables"),
            (json!({ "pages": [1] }), pages, "\"pages[0]\" is 1; use a table"),
            (
                json!({ "pages": [{}, { "owner": "guest" }] }),
                pages,
                "\"pages[1].owner\" is \"guest\"; use \"device\" or \"driver\"",
            ),
            (
                json!({ "pages": [{ "owner": "drivr" }] }),
                pages,
                "\"pages[0].owner\" is \"drivr\"; did you mean \"driver\"?",
            ),
            (json!({ "ids": [1, 0] }), ids, "\"ids[1]\" is 0; use a number from 1 to 2147483647"),
            (json!({ "tso": 1 }), flag, "\"tso\" is 1; use true or false"),
            (json!({ "path": ["a"] }), text, "\"path\" is [\"a\"]; use text in quotes"),
            (json!({ "names": "a" }), names, "\"names\" is \"a\"; use a list of texts"),
            (json!({ "names": ["a", 1] }), names, "\"names[1]\" is 1; use text in quotes"),
            (json!({ "inner": 1 }), inner, "\"inner\" is 1; use a table"),
            (json!({ "inner": { "a": 1 } }), inner, "\"inner.a\" is 1; use true or false"),
            (json!([1]), text, "the settings are [1]; use a table"),
        ];
        for (value, reading, expected) in cases {
            let error = read(value.clone(), reading).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{value}: {error}");
        }
        let rate =
            |value| Settings::new(&json!({ "rate": value }))?.quantity("rate", 8..=9_000_000);
        for (value, number) in
            [(json!(8), 8), (json!("9"), 9), (json!("7k"), 7_000), (json!("9M"), 9_000_000)]
        {
            assert_eq!(rate(value).unwrap(), Some(number));
        }
        for bad in [json!(7), json!("M"), json!("-8"), json!("8m"), json!("1G"), json!("9 k")] {
            let error = rate(bad.clone()).unwrap_err().to_string();
            let text = "use a number from 8 to 9000000, or text with a suffix, such as \"250M\"";
            assert_eq!(error, format!("\"rate\" is {bad}; {text}"));
        }
        let long = read(json!({ "mtu": "x".repeat(1000) }), mtu).unwrap_err().to_string();
        assert!(long.len() < 120, "{long}");
        assert!(read(Value::Null, mtu).is_ok() && read(json!({ "mtu": 1500 }), mtu).is_ok());
    }
}
