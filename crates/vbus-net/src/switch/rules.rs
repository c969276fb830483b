// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The settings of a port of a switch.

use serde_json::{Value, json};
use vbus_core::CreateError;
use vbus_core::settings::Settings;

use super::vlan::Vlan;

/// The VLAN ids that a port may carry: 0 and 4095 are reserved.
const VLAN_IDS: std::ops::RangeInclusive<u16> = 1..=4094;
/// The highest limit of broadcasts, in frames a second.
const BROADCAST_RATE_MAX: u32 = 1_000_000_000;
/// The limit of broadcasts if the settings give none, in frames a second.
const BROADCAST_RATE: u32 = 10_000;

/// A port of a switch: the name of the switch, and what the port may do.
///
/// ```
/// use vbus_net::{PortRules, SwitchPort};
///
/// let port = SwitchPort::from("lab");
/// assert!(!port.rules.learn && !port.rules.isolated);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchPort {
    /// The name of the switch.
    pub switch: String,
    /// What the port may do.
    pub rules: PortRules,
}

impl From<&str> for SwitchPort {
    /// A port with the rules that settings give by default.
    fn from(switch: &str) -> SwitchPort {
        SwitchPort { switch: switch.into(), rules: PortRules::default() }
    }
}

/// What a port of a switch may do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortRules {
    /// Whether frames may have other source addresses than the device's own. The switch then learns
    /// that these addresses are behind the port.
    pub learn: bool,
    /// Whether the port exchanges frames with the uplinks of the switch only.
    pub isolated: bool,
    /// Whether the port is an uplink. Only an uplink exchanges frames with isolated ports.
    pub uplink: bool,
    /// The VLANs of the port.
    pub vlan: Vlan,
    /// The most frames a second from the port that go to several ports; 0: no limit.
    pub broadcast_rate: u32,
}

impl Default for PortRules {
    fn default() -> PortRules {
        PortRules {
            learn: false,
            isolated: false,
            uplink: false,
            vlan: Vlan::Unaware,
            broadcast_rate: BROADCAST_RATE,
        }
    }
}

impl PortRules {
    /// The rules, for people.
    pub(crate) fn inspect(&self) -> Value {
        let mut value = json!({
            "learn": self.learn,
            "isolated": self.isolated,
            "broadcast-rate": self.broadcast_rate,
        });
        match &self.vlan {
            Vlan::Unaware => {}
            Vlan::Access(id) => value["vlan"] = (*id).into(),
            Vlan::Trunk { ids, native } => {
                value["trunk"] = json!(ids);
                value["native-vlan"] = json!(native);
            }
        }
        value
    }
}

impl SwitchPort {
    /// The settings that a port of a device has.
    pub(crate) const KEYS: &'static [&'static str] =
        &["switch", "learn", "isolated", "vlan", "trunk", "native-vlan", "broadcast-rate"];

    /// Reads [`KEYS`](Self::KEYS).
    pub(crate) fn parse(settings: &mut Settings) -> Result<SwitchPort, CreateError> {
        let mut port = SwitchPort::parse_uplink(settings)?;
        port.rules.learn = settings.flag("learn")?.unwrap_or(false);
        port.rules.isolated = settings.flag("isolated")?.unwrap_or(false);
        port.rules.uplink = false;
        Ok(port)
    }

    /// Reads those of [`KEYS`](Self::KEYS) that an uplink has. An uplink learns, and is not
    /// isolated.
    pub(crate) fn parse_uplink(settings: &mut Settings) -> Result<SwitchPort, CreateError> {
        let switch = settings.text("switch")?.unwrap_or_else(|| "default".into());
        let broadcast_rate =
            settings.integer("broadcast-rate", 0..=BROADCAST_RATE_MAX)?.unwrap_or(BROADCAST_RATE);
        let vlan = vlan(settings)?;
        let rules = PortRules { learn: true, isolated: false, uplink: true, vlan, broadcast_rate };
        Ok(SwitchPort { switch, rules })
    }
}

/// Reads `vlan`, or `trunk` with `native-vlan`.
fn vlan(settings: &mut Settings) -> Result<Vlan, CreateError> {
    let access = settings.integer("vlan", VLAN_IDS)?;
    let trunk = settings.integers("trunk", VLAN_IDS)?;
    let native = settings.integer("native-vlan", VLAN_IDS)?;
    match (access, trunk) {
        (Some(id), Some(_)) => {
            let text =
                format!("is {id}, but the port is a trunk: write native-vlan = {id}, or no trunk");
            Err(settings.error("vlan", text))
        }
        (None, Some(mut ids)) => {
            ids.sort_unstable();
            ids.dedup();
            Ok(Vlan::Trunk { ids, native })
        }
        (_, None) if native.is_some() => {
            Err(settings.error("native-vlan", "needs trunk = [ID, ...]"))
        }
        (Some(id), None) => Ok(Vlan::Access(id)),
        (None, None) => Ok(Vlan::Unaware),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: &Value) -> Result<SwitchPort, CreateError> {
        let mut settings = Settings::new(value)?;
        let port = SwitchPort::parse(&mut settings)?;
        settings.finish()?;
        Ok(port)
    }

    #[test]
    fn a_port_is_safe_by_default() {
        assert_eq!(parse(&Value::Null).unwrap(), SwitchPort::from("default"));
        let port = json!({ "switch": "lab", "learn": true, "isolated": true, "broadcast-rate": 0 });
        let port = parse(&port).unwrap();
        assert_eq!(port.switch, "lab");
        assert!(port.rules.learn && port.rules.isolated && port.rules.broadcast_rate == 0);
    }

    #[test]
    fn a_port_is_an_access_port_or_a_trunk() {
        let vlan = |value| parse(&value).unwrap().rules.vlan;
        assert_eq!(vlan(json!({ "vlan": 10 })), Vlan::Access(10));
        let trunk = json!({ "trunk": [20, 10, 20], "native-vlan": 1 });
        assert_eq!(vlan(trunk), Vlan::Trunk { ids: vec![10, 20], native: Some(1) });
        for (value, text) in [
            (json!({ "vlan": 4095 }), "\"vlan\" is 4095; use a number from 1 to 4094"),
            (json!({ "trunk": [10, 0] }), "\"trunk[1]\" is 0; use a number from 1 to 4094"),
            (json!({ "trunk": 10 }), "\"trunk\" is 10; use a list of numbers"),
            (json!({ "vlan": 10, "trunk": [20] }), "\"vlan\" is 10, but the port is a trunk"),
            (json!({ "vlan": 10, "native-vlan": 1 }), "\"native-vlan\" needs trunk"),
            (json!({ "broadcast-rate": -1 }), "\"broadcast-rate\" is -1; use a number from 0"),
        ] {
            let error = parse(&value).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }
}
