//! The driver. It works in a guest and in a plain process.

use vbus_driver::requests::Requests;
use vbus_driver::{Error, Function, Hal};

/// An open device.
pub struct MyDevice<H: Hal> {
    requests: Requests<H>,
}

impl<H: Hal> MyDevice<H> {
    /// Opens the device behind `hal`.
    pub fn open(hal: H) -> Result<MyDevice<H>, Error> {
        let requests = Requests::open(Function::probe(hal)?, "my-device", 1, 0)?;
        Ok(MyDevice { requests })
    }

    /// Sends `text` to the device and returns the answer. `wait` sleeps until an interrupt comes,
    /// and returns whether one came.
    pub fn ask(&mut self, text: &str, wait: impl FnMut() -> bool) -> Result<String, Error> {
        let mut response = vec![0; self.requests.response_max()];
        let len = self.requests.call(text.as_bytes(), &mut response, wait)?;
        response.truncate(len);
        String::from_utf8(response).map_err(|_| Error::Corrupt("the answer is no text"))
    }
}
