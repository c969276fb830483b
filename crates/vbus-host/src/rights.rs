// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What control clients may do (spec/control.md, "Rights of control clients"): the table
//! `[control]` of the configuration.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_control::Peer;
use vbus_core::CreateError;
use vbus_core::settings::Settings;

use crate::access::{self, Access, Accounts};

/// What a client may do. A higher level includes the lower one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Read the state of the bus: `info`, `list`, `show`.
    Read,
    /// Everything.
    Full,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Read => "read",
            Level::Full => "full",
        }
    }
}

/// The table `[control]`: who may connect to the control socket, and what each client may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControlSpec {
    /// The owner, the group and the mode of the control socket, if the configuration names one of
    /// them.
    access: Option<Access>,
    /// The groups whose members may do everything.
    full: Vec<String>,
    /// The groups whose members may read.
    read: Vec<String>,
}

impl ControlSpec {
    /// Reads the table, a JSON object.
    ///
    /// # Errors
    /// A value is wrong, or a user or a group does not exist on this machine. The text begins with
    /// the key at fault, without the table's name.
    pub fn parse(table: &Value, accounts: Accounts) -> Result<ControlSpec, CreateError> {
        let mut settings = Settings::new(table)?;
        let access = Access::parse(&mut settings)?;
        if let (Some(access), Accounts::Check) = (&access, accounts) {
            access.check()?;
        }
        let full = groups(&mut settings, "full-access", accounts)?;
        let read = groups(&mut settings, "read-access", accounts)?;
        settings.finish()?;
        Ok(ControlSpec { access, full, read })
    }

    /// The owner, the group and the mode of the control socket. Without a setting, the members of
    /// the groups that may do anything may connect.
    pub fn access(&self) -> Access {
        if let Some(access) = &self.access {
            return access.clone();
        }
        let mut groups: Vec<_> = self.full.iter().chain(&self.read).collect();
        groups.dedup();
        match groups[..] {
            [] => Access::default(),
            [group] => Access { group: Some(group.clone()), mode: 0o660, ..Access::default() },
            // A file has one group. The bus turns everybody else away.
            _ => Access { mode: 0o666, ..Access::default() },
        }
    }

    /// Looks the groups up.
    ///
    /// # Errors
    /// A group does not exist any more.
    pub fn rights(&self) -> Result<Rights> {
        let ids = |groups: &[String]| -> Result<Vec<u32>> {
            Ok(groups.iter().map(|name| access::group(name)).collect::<Result<_, _>>()?)
        };
        let own = rustix::process::geteuid().as_raw();
        Ok(Rights { own, full: ids(&self.full)?, read: ids(&self.read)? })
    }
}

/// Reads a list of groups, each of which must exist.
fn groups(
    settings: &mut Settings,
    key: &'static str,
    accounts: Accounts,
) -> Result<Vec<String>, CreateError> {
    let names = settings.texts(key)?.unwrap_or_default();
    if accounts == Accounts::Known {
        return Ok(names);
    }
    for (at, name) in names.iter().enumerate() {
        access::group(name).map_err(|error| {
            settings.error(&format!("{key}[{at}]"), format!("is {name:?}: {error}"))
        })?;
    }
    Ok(names)
}

/// The rights of clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rights {
    /// The user of the bus.
    own: u32,
    full: Vec<u32>,
    read: Vec<u32>,
}

impl Rights {
    /// What `peer` may do. `None`: nothing.
    fn level(&self, peer: &Peer) -> Option<Level> {
        let is_in = |groups: &[u32]| groups.iter().any(|group| peer.is_member(*group));
        if peer.uid == 0 || peer.uid == self.own || is_in(&self.full) {
            Some(Level::Full)
        } else if is_in(&self.read) {
            Some(Level::Read)
        } else {
            None
        }
    }

    /// Checks that `peer` may do anything at all. Returns what it may do.
    ///
    /// # Errors
    /// It may do nothing. The text says which right is missing.
    pub fn admit(&self, peer: &Peer) -> Result<Level> {
        self.level(peer).with_context(|| {
            format!(
                "user {} has no right here: only the user of the bus, root, and the members of the \
                 groups in \"full-access\" and \"read-access\" of [control] may control it",
                peer.uid
            )
        })
    }

    /// Checks that `peer` may make the request `op`, which needs `level`.
    ///
    /// # Errors
    /// It may not. The text says which right is missing.
    pub fn check(&self, peer: &Peer, op: &str, level: Level) -> Result<()> {
        if self.level(peer) < Some(level) {
            bail!(
                "{op:?} needs the right {needed:?}, and user {uid} has {has:?}; the groups in \
                 \"{needed}-access\" of [control] have it",
                needed = level.name(),
                uid = peer.uid,
                has = self.level(peer).map_or("none", Level::name),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn peer(uid: u32, groups: &[u32]) -> Peer {
        Peer { pid: 1, uid, groups: groups.to_vec() }
    }

    #[test]
    fn the_level_depends_on_user_and_groups() {
        let rights = Rights { own: 1000, full: vec![50], read: vec![60, 61] };
        for (peer, level) in [
            (peer(0, &[0]), Some(Level::Full)),
            (peer(1000, &[1000]), Some(Level::Full)),
            (peer(1001, &[1001, 50]), Some(Level::Full)),
            (peer(1001, &[61, 50]), Some(Level::Full)),
            (peer(1001, &[61]), Some(Level::Read)),
            (peer(1001, &[1001, 0]), None),
        ] {
            assert_eq!(rights.level(&peer), level, "{peer:?}");
            assert_eq!(rights.admit(&peer).ok(), level);
            assert_eq!(rights.check(&peer, "show", Level::Read).is_ok(), level.is_some());
            let full = rights.check(&peer, "add", Level::Full);
            assert_eq!(full.is_ok(), level == Some(Level::Full));
        }
        let error = rights.check(&peer(7, &[60]), "add", Level::Full).unwrap_err().to_string();
        assert_eq!(
            error,
            "\"add\" needs the right \"full\", and user 7 has \"read\"; the groups in \
             \"full-access\" of [control] have it"
        );
    }

    #[test]
    fn the_mode_of_the_socket_follows_the_groups() {
        let access = |table: Value| ControlSpec::parse(&table, Accounts::Check).unwrap().access();
        assert_eq!(access(json!({})), Access::default());
        let one = Access { owner: None, group: Some("7".into()), mode: 0o660 };
        assert_eq!(access(json!({ "read-access": ["7"] })), one);
        assert_eq!(access(json!({ "full-access": ["7"], "read-access": ["7"] })), one);
        assert_eq!(access(json!({ "full-access": ["7"], "read-access": ["8"] })).mode, 0o666);
        assert_eq!(access(json!({ "full-access": ["7"], "mode": "0600" })).mode, 0o600);
        for (table, text) in [
            (json!({ "full-access": "7" }), "\"full-access\" is \"7\"; use a list"),
            (json!({ "read-access": ["7", "no one"] }), "\"read-access[1]\" is \"no one\": there"),
            (json!({ "read-acess": [] }), "\"read-acess\" is no setting here; did you mean"),
        ] {
            let error = ControlSpec::parse(&table, Accounts::Check).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }
}
