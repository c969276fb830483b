//! The device. It answers each text with the same text in capital letters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};
use vbus_core::service::{self, Service, Sizes};
use vbus_core::settings::Settings;
use vbus_core::{CreateError, Device, DeviceClass, ErrorCode, Identity, Metric};

/// The class. It makes devices from their settings.
pub struct MyDeviceClass;

impl DeviceClass for MyDeviceClass {
    fn name(&self) -> &'static str {
        "my-device"
    }

    fn help(&self) -> &'static str {
        "Answers each text in capital letters, followed by suffix = TEXT (default: none)."
    }

    fn create(&self, _name: &str, config: &Value) -> Result<Arc<dyn Device>, CreateError> {
        let mut settings = Settings::new(config)?;
        let suffix = settings.text("suffix")?.unwrap_or_default();
        if suffix.len() > 16 {
            return Err(settings.error("suffix", "is too long; use at most 16 bytes"));
        }
        settings.finish()?;
        service::device(MyDevice { suffix, count: AtomicU64::new(0) })
    }

    // What the numbers in `inspect` mean, for `vbus stats`, `vbus top` and Prometheus.
    fn metrics(&self) -> Vec<Metric> {
        vec![
            Metric::counter("count", "my_device_requests", "Texts that were answered")
                .unit("texts"),
        ]
    }
}

/// One device.
struct MyDevice {
    suffix: String,
    /// The number of requests so far.
    count: AtomicU64,
}

impl Service for MyDevice {
    fn identity(&self) -> Identity {
        Identity::user("my-device")
    }

    fn sizes(&self) -> Sizes {
        Sizes { request: 4096, response: 4096 + 16 }
    }

    // This runs in a thread that other devices share, so it must not block. A device that has to
    // block implements `threads`, which gives it that many threads of its own.
    fn answer(&self, request: &[u8], response: &mut Vec<u8>) -> Result<(), ErrorCode> {
        let text = std::str::from_utf8(request).map_err(|_| ErrorCode::BAD_ARGUMENT)?;
        response.extend(text.to_ascii_uppercase().bytes());
        response.extend(self.suffix.bytes());
        self.count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn inspect(&self) -> Value {
        json!({ "suffix": self.suffix, "count": self.count.load(Ordering::Relaxed) })
    }

    fn control(&self, request: &Value, reply: &mut dyn FnMut(Value) -> bool) -> Result<(), String> {
        match request["op"].as_str() {
            Some("count") => {
                reply(json!({ "count": self.count.load(Ordering::Relaxed) }));
                Ok(())
            }
            _ => Err(r#"unknown request; the known one is {"op": "count"}"#.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_checked() {
        let error = |config| MyDeviceClass.check("a", &config).unwrap_err().to_string();
        assert!(error(json!({ "sufix": "!" })).contains("did you mean \"suffix\"?"));
        assert!(error(json!({ "suffix": "x".repeat(17) })).contains("at most 16 bytes"));
        assert!(MyDeviceClass.check("a", &json!({ "suffix": "!" })).is_ok());
    }
}
