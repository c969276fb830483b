// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kinds of back ends that settings can choose, and the settings that choose them.

use std::path::PathBuf;
use std::sync::Arc;

use vbus_core::CreateError;
use vbus_core::settings::Settings;

use crate::backend::Backend;
use crate::link::Link;
use crate::null::{self, Null};
use crate::opener::{HandedOver, Opener};
use crate::stream::Stream;
use crate::switch::{SwitchBackend, SwitchPort, Switches};
use crate::tap::{self, Tap};

/// A kind of back end with its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A port of a switch.
    Switch(SwitchPort),
    /// The TAP interface with this name. The kernel replaces a `%d` in it by a number.
    Tap(String),
    /// The stream socket at this path, as the end that connects.
    Connect(PathBuf),
    /// The stream socket at this path, as the end that listens.
    Listen(PathBuf),
    /// No network. The value is the size of the frames (14 bytes or more) that the back end
    /// generates without end; 0: none.
    Null(u16),
}

/// The word of the setting `backend`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Switch,
    Tap,
    Stream,
    Null,
}

const KINDS: [(&str, Kind); 4] =
    [("switch", Kind::Switch), ("tap", Kind::Tap), ("stream", Kind::Stream), ("null", Kind::Null)];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Switch => "switch",
            Kind::Tap => "tap",
            Kind::Stream => "stream",
            Kind::Null => "null",
        }
    }

    /// The settings that only this kind has.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Kind::Switch => SwitchPort::KEYS,
            Kind::Tap => &["tap"],
            Kind::Stream => &["connect", "listen"],
            Kind::Null => &["source-bytes"],
        }
    }
}

impl Medium {
    /// Reads `backend` and the settings of the back end that it names, for a device with this MTU.
    ///
    /// # Errors
    /// A value is wrong, or a setting belongs to another back end.
    pub fn parse(settings: &mut Settings, mtu: u16) -> Result<Medium, CreateError> {
        let kind = settings.choice("backend", &KINDS)?.unwrap_or(Kind::Switch);
        for (its, other) in KINDS.iter().filter(|(_, other)| *other != kind) {
            if let Some(key) = other.keys().iter().find(|key| settings.has(key)) {
                let this = kind.name();
                let text = format!("is a setting of backend {its:?}, not of {this:?}");
                return Err(settings.error(key, text));
            }
        }
        Ok(match kind {
            Kind::Switch => Medium::Switch(SwitchPort::parse(settings)?),
            Kind::Tap => Medium::Tap(tap::name(settings)?),
            Kind::Stream => match (path(settings, "connect")?, path(settings, "listen")?) {
                (Some(path), None) => Medium::Connect(path),
                (None, Some(path)) => Medium::Listen(path),
                _ => {
                    return Err(settings.error(
                        "backend",
                        "is \"stream\", which needs either connect = PATH or listen = PATH",
                    ));
                }
            },
            Kind::Null => Medium::Null(null::source_bytes(settings, mtu)?),
        })
    }

    /// Whether the back end is one socket, which has one queue and carries plain frames.
    pub fn is_stream(&self) -> bool {
        matches!(self, Medium::Connect(_) | Medium::Listen(_))
    }

    /// Makes the back end for a device with `queues` queue pairs and this MTU. `opener` opens what
    /// the back end needs. The back end sets the carrier of `link`. The error's text begins with
    /// the setting at fault.
    pub fn open(
        &self,
        switches: &Switches,
        opener: &Arc<dyn Opener>,
        queues: u16,
        mtu: u16,
        link: Arc<Link>,
    ) -> Result<Box<dyn Backend>, CreateError> {
        self.open_with(switches, opener, (queues, mtu), link, &mut HandedOver::default())
    }

    /// The same with what another process has handed over.
    pub(crate) fn open_with(
        &self,
        switches: &Switches,
        opener: &Arc<dyn Opener>,
        (queues, mtu): (u16, u16),
        link: Arc<Link>,
        handed: &mut HandedOver,
    ) -> Result<Box<dyn Backend>, CreateError> {
        Ok(match self {
            Medium::Switch(SwitchPort { switch, rules }) => {
                Box::new(SwitchBackend::new(switches.get(switch), rules.clone(), link))
            }
            Medium::Tap(name) => match Tap::adopt(name, queues, &link, handed)? {
                Some(tap) => Box::new(tap),
                None => Box::new(Tap::new(&**opener, name, queues, mtu, link)?),
            },
            Medium::Connect(path) => {
                Box::new(Stream::connecting(opener.clone(), path, link, handed)?)
            }
            Medium::Listen(path) => {
                Box::new(Stream::listening(opener.clone(), path, link, handed)?)
            }
            Medium::Null(source_bytes) => Box::new(Null::new(*source_bytes, link)),
        })
    }
}

fn path(settings: &mut Settings, key: &'static str) -> Result<Option<PathBuf>, CreateError> {
    Ok(settings.text(key)?.map(PathBuf::from))
}
