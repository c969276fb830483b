// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A complete device and its driver. The device returns each text in capital letters.

use vbus_core::service::{Service, Sizes};
use vbus_core::{ErrorCode, Identity};
use vbus_driver::requests::Requests;
use vbus_driver::{Error, Function, Hal};

/// The longest text, in bytes.
pub const TEXT_MAX: u32 = 4096;

/// The device. `vbus_core::service::device` puts it on a bus.
pub struct Shout;

impl Service for Shout {
    fn identity(&self) -> Identity {
        Identity::user("shout")
    }

    fn sizes(&self) -> Sizes {
        Sizes { request: TEXT_MAX, response: TEXT_MAX }
    }

    fn answer(&self, request: &[u8], response: &mut Vec<u8>) -> Result<(), ErrorCode> {
        response.extend(request.iter().map(u8::to_ascii_uppercase));
        Ok(())
    }
}

/// The driver, for any environment. `wait` sleeps until an interrupt comes, and returns whether one
/// came.
pub fn shout<H: Hal>(hal: H, text: &str, wait: impl FnMut() -> bool) -> Result<String, Error> {
    let mut requests = Requests::open(Function::probe(hal)?, "shout", 1, 0)?;
    let mut response = vec![0; requests.response_max()];
    let len = requests.call(text.as_bytes(), &mut response, wait)?;
    response.truncate(len);
    String::from_utf8(response).map_err(|_| Error::Corrupt("not the text that it was"))
}
