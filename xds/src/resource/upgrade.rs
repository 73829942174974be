//! `upgrade_configs` of connection managers and routes: what an HTTP/1.1 connection may become.

use crate::{
    problems::ConfigErrors,
    wire::envoy::{
        config::route::v3::route_action as route,
        extensions::filters::network::http_connection_manager::v3::http_connection_manager as manager,
    },
};

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upgrade {
    /// As in the `upgrade` header, lower case.
    pub name: String,
    /// Whether it may.
    pub enabled: bool,
}

impl Upgrade {
    fn new(name: &str, enabled: Option<bool>) -> Result<Self, ConfigErrors> {
        let name = name.to_ascii_lowercase();
        let place = "upgrade_type";
        match name.as_str() {
            "" => Err(ConfigErrors::one(place, "must not be empty")),
            "connect" | "connect-udp" => Err(ConfigErrors::one(
                place,
                format!("not supported yet: {name}"),
            )),
            _ => Ok(Self {
                name,
                enabled: enabled.unwrap_or(true),
            }),
        }
    }
}

/// What `all` says of an `upgrade` header; `None` is nothing.
#[must_use]
pub fn find(all: &[Upgrade], wanted: &[u8]) -> Option<bool> {
    let mut found = all.iter();
    let found = found.find(|upgrade| wanted.eq_ignore_ascii_case(upgrade.name.as_bytes()));
    found.map(|upgrade| upgrade.enabled)
}

impl TryFrom<manager::UpgradeConfig> for Upgrade {
    type Error = ConfigErrors;

    fn try_from(wire: manager::UpgradeConfig) -> Result<Self, ConfigErrors> {
        Self::new(&wire.upgrade_type, wire.enabled)
    }
}

impl TryFrom<route::UpgradeConfig> for Upgrade {
    type Error = ConfigErrors;

    fn try_from(wire: route::UpgradeConfig) -> Result<Self, ConfigErrors> {
        Self::new(&wire.upgrade_type, wire.enabled)
    }
}

impl From<&Upgrade> for manager::UpgradeConfig {
    fn from(plain: &Upgrade) -> Self {
        Self {
            upgrade_type: plain.name.clone(),
            enabled: (!plain.enabled).then_some(false),
        }
    }
}

impl From<&Upgrade> for route::UpgradeConfig {
    fn from(plain: &Upgrade) -> Self {
        Self {
            upgrade_type: plain.name.clone(),
            enabled: (!plain.enabled).then_some(false),
        }
    }
}
