// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;
use vbus_core::service::{self, Service, Sizes};
use vbus_core::settings::Settings;
use vbus_core::{CreateError, Device, DeviceClass, ErrorCode, Identity};

use crate::{CLASS, DATA_MAX, Header, NO_SUCH_SECTOR, READ, SECTOR, WRITE};

/// The class. It makes devices from their settings.
pub struct BlockClass;

impl DeviceClass for BlockClass {
    fn name(&self) -> &'static str {
        CLASS
    }

    fn help(&self) -> &'static str {
        "A file as a disk: path = FILE, whose size is that of the disk."
    }

    fn create(&self, _name: &str, config: &Value) -> Result<Arc<dyn Device>, CreateError> {
        let path = path(config)?;
        let fault = |error| CreateError(format!("\"path\" is {path:?}: {error}"));
        let file = File::options().read(true).write(true).open(&path).map_err(fault)?;
        let bytes = file.metadata().map_err(fault)?.len();
        service::device(Block { file, path, sectors: bytes / SECTOR as u64 })
    }

    // A check opens no file.
    fn check(&self, _name: &str, config: &Value) -> Result<(), CreateError> {
        path(config).map(drop)
    }

    fn files(&self, config: &Value) -> Vec<PathBuf> {
        path(config).map(PathBuf::from).into_iter().collect()
    }
}

/// Reads the settings.
fn path(config: &Value) -> Result<String, CreateError> {
    let mut settings = Settings::new(config)?;
    let path = settings.text("path")?;
    let path = settings.required("path", path, "the path of a file")?;
    settings.finish().map(|()| path)
}

/// One disk.
struct Block {
    file: File,
    path: String,
    sectors: u64,
}

impl Service for Block {
    fn identity(&self) -> Identity {
        Identity::user(CLASS)
    }

    fn sizes(&self) -> Sizes {
        Sizes { request: Header::BYTES + DATA_MAX, response: DATA_MAX }
    }

    fn config(&self) -> Vec<u8> {
        self.sectors.to_le_bytes().to_vec()
    }

    // A file can block, so the requests run on threads of the device's own.
    fn threads(&self) -> usize {
        2
    }

    fn answer(&self, request: &[u8], response: &mut Vec<u8>) -> Result<(), ErrorCode> {
        // The driver may ask for anything.
        let (Header(kind, count, sector), data) =
            Header::parse(request).ok_or(ErrorCode::BAD_LENGTH)?;
        let bytes = (count as usize).saturating_mul(SECTOR);
        if bytes > DATA_MAX as usize || data.len() != if kind == WRITE { bytes } else { 0 } {
            return Err(ErrorCode::BAD_LENGTH);
        }
        if sector.checked_add(count.into()).is_none_or(|end| end > self.sectors) {
            return Err(NO_SUCH_SECTOR);
        }
        let offset = sector * SECTOR as u64;
        let result = match kind {
            READ => {
                response.resize(bytes, 0);
                self.file.read_exact_at(response, offset)
            }
            WRITE => self.file.write_all_at(data, offset).and_then(|()| self.file.sync_data()),
            _ => return Err(ErrorCode::BAD_ARGUMENT),
        };
        result.map_err(|error| {
            // The driver is told that the log has the reason.
            tracing::warn!("{}: {error}", self.path);
            ErrorCode::FAILED
        })
    }
}
