// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The metrics of a running bus, for Prometheus (spec/control.md, "Metrics"): the table `[metrics]`
//! of the configuration, and the sockets that answer a scraper.
//!
//! `server` is the thread that all scrapers share, `http` serves one of them, and `openmetrics`
//! writes the text.

mod http;
mod openmetrics;
mod server;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;
use vbus_core::CreateError;
use vbus_core::settings::Settings;

use crate::access::{Access, Accounts, SocketSpec};
use vbus_cli::rundir::METRICS;

pub use openmetrics::{Exporter, Kept};
pub use server::{Door, MetricsServer, TIMEOUT};

/// The table `[metrics]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetricsSpec {
    /// Where the UNIX socket is, and who may use it. `None`: in the directory of the bus, for those
    /// who may read by the table `[control]`.
    socket: Option<SocketSpec>,
    /// The address of the TCP port, if there is one: a loopback address.
    listen: Option<SocketAddr>,
}

impl MetricsSpec {
    /// Reads the table, a JSON object.
    ///
    /// # Errors
    /// A value is wrong, or a user or a group does not exist on this machine. The text begins with
    /// the key at fault, without the table's name.
    pub fn parse(table: &Value, accounts: Accounts) -> Result<MetricsSpec, CreateError> {
        let mut settings = Settings::new(table)?;
        let socket = settings.value("socket").as_ref().map(SocketSpec::parse).transpose()?;
        if let (Some(socket), Accounts::Check) = (&socket, accounts) {
            socket.check()?;
        }
        let listen = match settings.text("listen")? {
            None => None,
            Some(text) => Some(loopback(&text).map_err(|why| settings.error("listen", why))?),
        };
        settings.finish()?;
        Ok(MetricsSpec { socket, listen })
    }

    /// The path of the UNIX socket of a bus in `dir`.
    pub fn path(&self, dir: &Path) -> PathBuf {
        self.named_path(dir).unwrap_or_else(|| dir.join(METRICS))
    }

    /// The path, if the table names it.
    pub fn named_path(&self, dir: &Path) -> Option<PathBuf> {
        Some(dir.join(self.socket.as_ref()?.path.as_deref()?))
    }

    /// Who may connect, if the table says so. Otherwise those may who may read the state of the
    /// bus.
    pub fn access(&self) -> Option<&Access> {
        self.socket.as_ref().map(|socket| &socket.access)
    }

    /// Whether the socket is in the directory of the bus, and for other users too.
    pub fn is_shared(&self) -> bool {
        self.socket.as_ref().is_some_and(|s| s.path.is_none() && s.access.is_shared())
    }

    /// Listens at the TCP port, if there is one. `former` is the port of the bus whose place this
    /// one takes, if it has one: it is used if it is the right one.
    ///
    /// # Errors
    /// The port is taken, or the system refuses.
    pub fn bind(&self, former: Option<(SocketAddr, OwnedFd)>) -> Result<Option<TcpListener>> {
        let Some(address) = self.listen else { return Ok(None) };
        let fits = |former: SocketAddr| {
            former == address || address.port() == 0 && former.ip() == address.ip()
        };
        if let Some((_, socket)) = former.filter(|(former, _)| fits(*former)) {
            return Ok(Some(socket.into()));
        }
        let bind = || -> io::Result<TcpListener> {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let bound = bind().with_context(|| {
            format!("\"listen\" of [metrics]: cannot listen at {address}; choose another port")
        });
        bound.map(Some)
    }
}

/// Reads the address of a port that only this machine reaches.
fn loopback(text: &str) -> Result<SocketAddr, String> {
    const SUCH: &str = "such as \"127.0.0.1:9464\" or \"[::1]:9464\"";
    let address: SocketAddr = text
        .parse()
        .map_err(|_| format!("is {text:?}; use a loopback address and a port, {SUCH}"))?;
    if !address.ip().is_loopback() {
        return Err(format!(
            "is {text:?}, which other machines can reach; use a loopback address, {SUCH}, and a \
             proxy with a password in front of it"
        ));
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_table_is_checked() {
        let dir = Path::new("/run/bus");
        let default = MetricsSpec::parse(&json!({}), Accounts::Check).unwrap();
        assert_eq!(default.path(dir), dir.join("metrics.sock"));
        assert_eq!((default.access(), default.bind(None).unwrap().is_none()), (None, true));
        let spec = MetricsSpec::parse(
            &json!({
                "socket": { "path": "m", "group": "0" }, "listen": "127.0.0.1:0",
            }),
            Accounts::Check,
        )
        .unwrap();
        assert_eq!((spec.path(dir), spec.access().unwrap().mode), (dir.join("m"), 0o660));
        assert!(!spec.is_shared(), "it is elsewhere");
        let port = spec.bind(None).unwrap().unwrap().local_addr().unwrap();
        assert!(port.ip().is_loopback());
        let taken =
            MetricsSpec::parse(&json!({ "listen": port.to_string() }), Accounts::Check).unwrap();
        let _holder = TcpListener::bind(port).unwrap();
        let error = taken.bind(None).unwrap_err().to_string();
        assert!(
            error.starts_with("\"listen\" of [metrics]: cannot listen at 127.0.0.1:"),
            "{error}"
        );
        assert!(MetricsSpec::parse(&json!({ "listen": "[::1]:9464" }), Accounts::Check).is_ok());
        for (table, text) in [
            (json!({ "listen": "0.0.0.0:1" }), "\"listen\" is \"0.0.0.0:1\", which other machines"),
            (json!({ "listen": "[::]:1" }), "\"listen\" is \"[::]:1\", which other machines"),
            (json!({ "listen": "192.0.2.1:1" }), "\"listen\" is \"192.0.2.1:1\", which other"),
            (json!({ "listen": "localhost:1" }), "\"listen\" is \"localhost:1\"; use a loopback"),
            (json!({ "listen": "127.0.0.1" }), "\"listen\" is \"127.0.0.1\"; use a loopback"),
            (json!({ "listen": 9464 }), "\"listen\" is 9464; use"),
            (json!({ "lisen": "" }), "\"lisen\" is no setting here; did you mean \"listen\"?"),
            (json!({ "socket": 7 }), "\"socket\" is 7; use a path"),
            (json!({ "socket": { "mode": "9" } }), "\"socket.mode\" is \"9\"; use an octal"),
            (json!({ "socket": { "group": "no one" } }), "\"socket.group\" is \"no one\": there"),
        ] {
            let error = MetricsSpec::parse(&table, Accounts::Check).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }
}
