// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Both ends of the control protocol, by which programs talk to a running bus and to `vbus-vmm`
//! (`spec/control.md`, "The control protocol").
//!
//! A request is one line of JSON. Each answer is a line with one member. Any number of `item`
//! answers come first. The last answer is `ok`, or `error` with a text for people. The [`Handler`]
//! defines the requests. A request with the member `progress` also gets reports of its
//! [`Progress`].
//!
//! A [`Server`] gives each client its own thread. It limits the number of clients, the length of a
//! line, and the time that a client may be silent. A client can at worst end its own connection: if
//! all places are taken, one that has no request under way gives way to the next. The handler
//! learns who a client is ([`Peer`]), can turn it away, and says how many places its user gets
//! ([`Share`]). A [`Connection`] is the client's end.
//!
//! ```
//! use std::os::unix::net::{UnixListener, UnixStream};
//!
//! use serde_json::{Value, json};
//! use vbus_control::{Client, Connection, Handler, Limits, Server};
//!
//! #[derive(serde::Deserialize)]
//! #[serde(tag = "op", rename_all = "kebab-case")]
//! enum Request {
//!     Count { to: u64 },
//! }
//!
//! struct Counter;
//!
//! impl Handler for Counter {
//!     type Request = Request;
//!
//!     fn handle(&self, Request::Count { to }: Request, client: &Client<'_>) -> anyhow::Result<Value> {
//!         (0..to).try_for_each(|n| client.item(json!(n)))?;
//!         Ok(json!("done"))
//!     }
//! }
//!
//! # fn main() -> anyhow::Result<()> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("control.sock");
//! let server = Server::new(UnixListener::bind(&path)?, Limits { clients: 4, line: 1000 }, Counter)?;
//! let mut connection = Connection::new(UnixStream::connect(&path)?, "the counter");
//! server.accept()?; // when poll(2) says so
//! let mut items = Vec::new();
//! let last = connection.stream(&json!({ "op": "count", "to": 2 }), &mut |item| items.push(item))?;
//! assert_eq!((items, last), (vec![json!(0), json!(1)], json!("done")));
//! # Ok(())
//! # }
//! ```

mod client;
mod peer;
mod server;

pub use client::{Connection, Progress};
pub use peer::{Peer, SO_PASSRIGHTS, refuse_descriptors};
pub use server::{Client, Handler, Limits, Server, Share};

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
