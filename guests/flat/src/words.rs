// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel command line: words of the form `key=value`, separated by blanks.

/// A command line.
#[derive(Clone, Copy, Debug)]
pub struct Words<'a>(pub &'a str);

impl<'a> Words<'a> {
    /// The value of the last word with this key. So a word that is appended to a command line wins.
    pub fn get(&self, key: &str) -> Option<&'a str> {
        let mut words = self.0.split_ascii_whitespace();
        words.rfind(|word| is(word, key)).map(|word| &word[key.len() + 1..])
    }

    /// The value as a number, decimal or with 0x in front; `default` if there is none. An error
    /// contains the text that is not a number.
    pub fn number(&self, key: &str, default: u64) -> Result<u64, &'a str> {
        let Some(text) = self.get(key) else { return Ok(default) };
        let number = match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        number.map_err(|_| text)
    }

    /// The value as a list, separated by commas; `default` if there is none.
    pub fn list(&self, key: &str, default: &'a str) -> impl Iterator<Item = &'a str> + use<'a> {
        self.get(key).unwrap_or(default).split(',').filter(|item| !item.is_empty())
    }
}

fn is(word: &str, key: &str) -> bool {
    word.strip_prefix(key).is_some_and(|rest| rest.starts_with('='))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn words_are_found_by_key_and_the_last_one_wins() {
        let words = Words("console=ttyS0 test=venet  count=5\tcount=0x10 tests=no quiet");
        assert_eq!(words.get("test"), Some("venet"));
        assert_eq!(words.number("count", 1), Ok(16));
        assert_eq!(words.number("other", 7), Ok(7));
        assert_eq!(words.get("quiet"), None);
        assert_eq!(Words("").get("test"), None);
    }

    #[test]
    fn an_error_names_the_text_that_is_not_a_number() {
        for text in ["", "x", "-1", "0x", "18446744073709551616"] {
            assert_eq!(Words(&format!("count={text}")).number("count", 1), Err(text));
        }
    }

    #[test]
    fn lists_have_items_between_commas() {
        let items = |line| Words(line).list("test", "a,b").collect::<Vec<_>>().join("+");
        assert_eq!(items("test=venet,state,,pic,"), "venet+state+pic");
        assert_eq!(items("x=y"), "a+b");
        assert_eq!(items("test="), "");
    }
}
