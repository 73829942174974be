//! `server_name` and `server_header_transformation`: what the `server` header of a response says.

use crate::{
    problems::ConfigErrors,
    wire::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::ServerHeaderTransformation as Wire,
};

/// `server` of responses unless `server_name` says otherwise.
pub(super) const NAME_DEFAULT: &str = "outrigger";

/// `server_header_transformation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ServerHeader {
    /// Ours, whatever the upstream said.
    #[default]
    Overwrite,
    /// The upstream's, else ours.
    AppendIfAbsent,
    /// The upstream's or none.
    PassThrough,
}

impl From<Wire> for ServerHeader {
    fn from(wire: Wire) -> Self {
        match wire {
            Wire::Overwrite => Self::Overwrite,
            Wire::AppendIfAbsent => Self::AppendIfAbsent,
            Wire::PassThrough => Self::PassThrough,
        }
    }
}

impl ServerHeader {
    pub(super) fn to_wire(self) -> i32 {
        match self {
            Self::Overwrite => Wire::Overwrite,
            Self::AppendIfAbsent => Wire::AppendIfAbsent,
            Self::PassThrough => Wire::PassThrough,
        }
        .into()
    }
}

pub(super) fn name(problems: &mut ConfigErrors, name: String) -> String {
    if name.bytes().any(|byte| byte.is_ascii_control()) {
        problems.add("server_name", "has a control character");
    }
    if name.is_empty() {
        return NAME_DEFAULT.into();
    }
    name
}
