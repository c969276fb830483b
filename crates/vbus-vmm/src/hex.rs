// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bytes in JSON, as text of two hexadecimal digits for each.

use serde::{Deserialize, Deserializer, Serializer, de::Error};

/// For `#[serde(with = "...")]`.
pub(crate) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    to.serialize_str(&digits)
}

/// For `#[serde(with = "...")]`.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(from)?;
    let digit =
        |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pair = |pair: &[u8]| match pair {
        [high, low] => Some(digit(high)? << 4 | digit(low)?),
        _ => None,
    };
    let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
    bytes.ok_or_else(|| D::Error::custom("bytes that are no pairs of hexadecimal digits"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Bytes(#[serde(with = "super")] Vec<u8>);

    #[test]
    fn bytes_are_pairs_of_digits() {
        assert_eq!(serde_json::to_string(&Bytes(vec![0, 0xa5, 0xff])).unwrap(), "\"00a5ff\"");
        assert_eq!(serde_json::from_str::<Bytes>("\"00a5FF\"").unwrap().0, [0, 0xa5, 0xff]);
        for wrong in ["\"0\"", "\"0g\"", "\"\u{e9}\"", "\"+1\"", "[0]"] {
            assert!(serde_json::from_str::<Bytes>(wrong).is_err(), "{wrong}");
        }
    }
}
