// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who may use a socket: the owner, the group and the mode of its file (spec/control.md,
//! "Sockets").
//!
//! Names of users and groups are looked up when the socket is made.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, chmod, chownat, fstat, open};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::CreateError;
use vbus_core::settings::Settings;

/// The mode of a socket whose settings name none.
const PRIVATE: u32 = 0o600;

/// Whether the users and groups that a configuration names must exist on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accounts {
    /// They are looked up.
    Check,
    /// Another process has looked them up. This one may have no right to.
    Known,
}

/// The owner, the group and the mode of a socket's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    /// The user that owns it, by name or number. `None`: the user of the bus.
    pub owner: Option<String>,
    /// Its group, by name or number. `None`: the group of the bus.
    pub group: Option<String>,
    /// Its mode. Whoever may write to a socket may connect to it.
    pub mode: u32,
}

impl Default for Access {
    fn default() -> Self {
        Access { owner: None, group: None, mode: PRIVATE }
    }
}

/// The setting `socket` of a device: where its socket is, and who may use it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SocketSpec {
    /// The path. A relative path begins in the directory of the bus. `None`: the device's name and
    /// `.sock`, in the directory of the bus.
    pub path: Option<PathBuf>,
    /// Who may use it.
    pub access: Access,
}

impl SocketSpec {
    /// Reads the value of the setting `socket`: a path, or a table of `path`, `owner`, `group` and
    /// `mode`.
    ///
    /// # Errors
    /// The value is something else. The text begins with the key at fault.
    pub fn parse(value: &Value) -> Result<SocketSpec, CreateError> {
        match value {
            Value::String(path) => Ok(SocketSpec {
                path: Some(checked_path("socket", path)?),
                access: Access::default(),
            }),
            Value::Object(_) => {
                let mut settings = Settings::within("socket", value)?;
                let path = settings.text("path")?;
                let path = path.map(|path| checked_path("socket.path", &path)).transpose()?;
                let access = Access::parse(&mut settings)?.unwrap_or_default();
                settings.finish()?;
                Ok(SocketSpec { path, access })
            }
            other => Err(CreateError(format!(
                "\"socket\" is {other}; use a path in quotes, or a table such as {{ group = \
                    \"kvm\", \
                 mode = \"0660\" }}"
            ))),
        }
    }

    /// As [`Access::check`], for a table `socket`.
    ///
    /// # Errors
    /// The text begins with the key, in the table `socket`.
    pub fn check(&self) -> Result<(), CreateError> {
        let named =
            |error: CreateError| CreateError(error.to_string().replacen('"', "\"socket.", 1));
        self.access.check().map_err(named)
    }
}

fn checked_path(key: &str, path: &str) -> Result<PathBuf, CreateError> {
    if path.is_empty() || path.contains('\0') {
        return Err(CreateError(format!("{key:?} is {path:?}; use the path of a socket")));
    }
    Ok(path.into())
}

impl Access {
    /// Reads `owner`, `group` and `mode`. Returns `None` if there is none of them. With a group and
    /// without a mode, the members of the group may connect: the mode is 0660.
    ///
    /// # Errors
    /// A value is wrong. Whether the user and the group exist is for [`check`](Self::check).
    pub fn parse(settings: &mut Settings) -> Result<Option<Access>, CreateError> {
        let owner = settings.text("owner")?;
        let group = settings.text("group")?;
        let mode = match settings.text("mode")? {
            None => None,
            Some(text) => {
                let mode = u32::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o777);
                Some(mode.ok_or_else(|| {
                    let text = format!("is {text:?}; use an octal number such as \"0660\"");
                    settings.error("mode", text)
                })?)
            }
        };
        if owner.is_none() && group.is_none() && mode.is_none() {
            return Ok(None);
        }
        let mode = mode.unwrap_or(if group.is_some() { 0o660 } else { PRIVATE });
        Ok(Some(Access { owner, group, mode }))
    }

    /// Checks that the user and the group exist on this machine.
    ///
    /// # Errors
    /// One of them does not. The text begins with its key.
    pub fn check(&self) -> Result<(), CreateError> {
        let failed = |key: &str, name: &str, error: io::Error| {
            CreateError(format!("\"{key}\" is {name:?}: {error}"))
        };
        if let Some(name) = &self.owner {
            user(name).map_err(|error| failed("owner", name, error))?;
        }
        if let Some(name) = &self.group {
            group(name).map_err(|error| failed("group", name, error))?;
        }
        Ok(())
    }

    /// Whether somebody else than the user of the bus may connect. That user must be able to search
    /// the directory then.
    pub fn is_shared(&self) -> bool {
        self.owner.is_some() || self.mode & 0o022 != 0
    }

    /// Gives the socket at `path`, which the caller has just made, this owner, group and mode.
    ///
    /// # Errors
    /// There is no such user or group, the system refuses, or `path` is no socket.
    pub fn apply(&self, path: &Path) -> io::Result<()> {
        if *self == Access::default() {
            return Ok(());
        }
        let refuse = |error: io::Error, what: &str| {
            io::Error::new(error.kind(), format!("cannot set the {what} of the socket: {error}"))
        };
        let uid = self.owner.as_deref().map(user).transpose()?;
        let gid = self.group.as_deref().map(group).transpose()?;
        // A descriptor of the file itself: whoever replaces the file changes nothing here.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = open(path, flags, Mode::empty())?;
        if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::Socket {
            return Err(io::Error::other("another file has taken the place of the socket"));
        }
        if uid.is_some() || gid.is_some() {
            let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
            chownat(&file, "", uid, gid, AtFlags::EMPTY_PATH)
                .map_err(|error| refuse(error.into(), "owner or group"))?;
        }
        let file = format!("/proc/self/fd/{}", file.as_raw_fd());
        chmod(file, Mode::from_raw_mode(self.mode)).map_err(|error| refuse(error.into(), "mode"))
    }
}

/// The number of the user `name`, which may be the number itself.
///
/// # Errors
/// There is no such user.
pub fn user(name: &str) -> io::Result<u32> {
    let number = |name: &str| {
        let found = nix::unistd::User::from_name(name).map_err(io::Error::from)?;
        Ok(found.map(|user| user.uid.as_raw()))
    };
    id(name, "user", number)
}

/// The number of the group `name`, which may be the number itself.
///
/// # Errors
/// There is no such group.
pub fn group(name: &str) -> io::Result<u32> {
    let number = |name: &str| {
        let found = nix::unistd::Group::from_name(name).map_err(io::Error::from)?;
        Ok(found.map(|group| group.gid.as_raw()))
    };
    id(name, "group", number)
}

fn id(
    name: &str,
    kind: &str,
    look_up: impl Fn(&str) -> io::Result<Option<u32>>,
) -> io::Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    look_up(name)?.ok_or_else(|| io::Error::other(format!("there is no {kind} {name:?} here")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::net::UnixListener;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_socket_is_a_path_or_a_table() {
        let parse = |value: Value| SocketSpec::parse(&value).map_err(|error| error.to_string());
        let private = Access::default();
        let path = |path: &str| Some(PathBuf::from(path));
        assert_eq!(
            parse(json!("a.sock")),
            Ok(SocketSpec { path: path("a.sock"), access: private })
        );
        let shared = Access { owner: None, group: Some("0".into()), mode: 0o660 };
        assert_eq!(parse(json!({ "group": "0" })), Ok(SocketSpec { path: None, access: shared }));
        let all = parse(json!({ "path": "/a", "owner": "root", "group": "7", "mode": "620" }));
        let access = Access { owner: Some("root".into()), group: Some("7".into()), mode: 0o620 };
        assert_eq!(all, Ok(SocketSpec { path: path("/a"), access }));
        for (value, text) in [
            (json!(7), "\"socket\" is 7; use a path in quotes, or a table"),
            (json!(""), "\"socket\" is \"\"; use the path"),
            (json!({ "path": "" }), "\"socket.path\" is \"\"; use the path"),
            (json!({ "mode": 660 }), "\"socket.mode\" is 660; use text in quotes"),
            (json!({ "mode": "0880" }), "\"socket.mode\" is \"0880\"; use an octal number"),
            (json!({ "mode": "1777" }), "\"socket.mode\" is \"1777\"; use an octal number"),
            (
                json!({ "grup": "kvm" }),
                "\"socket.grup\" is no setting here; did you mean \"group\"",
            ),
        ] {
            let error = parse(value.clone()).unwrap_err();
            assert!(error.starts_with(text), "{value}: {error}");
        }
    }

    #[test]
    fn accounts_must_exist() {
        let access = |owner: &str, group: &str| Access {
            owner: Some(owner.into()),
            group: Some(group.into()),
            mode: PRIVATE,
        };
        assert!(access("root", "0").check().is_ok());
        let error = access("no one", "0").check().unwrap_err().to_string();
        assert_eq!(error, "\"owner\" is \"no one\": there is no user \"no one\" here");
        let error = access("0", "no one").check().unwrap_err().to_string();
        assert_eq!(error, "\"group\" is \"no one\": there is no group \"no one\" here");
    }

    #[test]
    fn a_socket_gets_its_mode_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let own = rustix::process::getegid().as_raw().to_string();
        let access = Access { owner: None, group: Some(own), mode: 0o660 };
        access.apply(&path).unwrap();
        let data = std::fs::metadata(&path).unwrap();
        assert_eq!(data.permissions().mode() & 0o777, 0o660);
        assert_eq!(data.gid(), rustix::process::getegid().as_raw());
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let before = std::fs::metadata(&file).unwrap().permissions();
        assert!(access.apply(&file).unwrap_err().to_string().contains("taken the place"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(access.apply(&link).is_err());
        assert_eq!(std::fs::metadata(&file).unwrap().permissions(), before);
    }
}
