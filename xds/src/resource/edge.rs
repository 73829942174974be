//! What a connection manager does to requests at its edge: paths, hosts and addresses made what they mean.

use super::{cidr::CidrRange, client_cert::ClientCert};
use crate::{
    problems::ConfigErrors,
    wire::envoy::{
        config::core::v3::http_protocol_options::HeadersWithUnderscoresAction,
        extensions::filters::network::http_connection_manager::v3 as hcm,
    },
};
use hcm::http_connection_manager::{
    InternalAddressConfig, PathWithEscapedSlashesAction as Action, StripPortMode,
};

/// All of it; nothing is changed by default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Edge {
    /// `normalize_path`.
    pub normalize_path: bool,
    /// `merge_slashes`.
    pub merge_slashes: bool,
    /// `path_with_escaped_slashes_action`.
    pub escaped_slashes: EscapedSlashes,
    /// Which port is taken off a host.
    pub strip_port: StripPort,
    /// `strip_trailing_host_dot`.
    pub strip_trailing_host_dot: bool,
    /// `xff_num_trusted_hops`.
    pub trusted_hops: u32,
    /// `skip_xff_append`.
    pub skip_xff_append: bool,
    /// `append_x_forwarded_port`.
    pub append_x_forwarded_port: bool,
    /// `always_set_request_id_in_response`.
    pub always_set_request_id: bool,
    /// Whose requests come from inside (`internal_address_config.cidr_ranges`).
    pub internal_addresses: Vec<CidrRange>,
    /// Whether those who come over a Unix domain socket are, too.
    pub internal_pipes: bool,
    /// What becomes of `x-forwarded-client-cert`.
    pub client_cert: ClientCert,
    /// `headers_with_underscores_action`.
    pub underscores: Underscores,
}

/// What becomes of headers with an underscore in their name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Underscores {
    /// They stay.
    #[default]
    Allow,
    /// The request is refused.
    Reject,
    /// They are taken off.
    Drop,
}

/// `path_with_escaped_slashes_action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EscapedSlashes {
    /// They stay.
    #[default]
    Keep,
    /// The request is refused.
    Reject,
    /// They become slashes.
    Unescape,
}

/// `strip_matching_host_port` and `strip_any_host_port`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StripPort {
    /// None.
    #[default]
    None,
    /// That of the listener.
    Matching,
    /// Any.
    Any,
}

impl Edge {
    pub(super) fn read(problems: &mut ConfigErrors, wire: &hcm::HttpConnectionManager) -> Self {
        let internal = wire.internal_address_config.clone().unwrap_or_default();
        let place = "internal_address_config.cidr_ranges";
        let internal_addresses = problems.take_all(place, internal.cidr_ranges);
        let common = wire.common_http_protocol_options.as_ref();
        let underscores = common.map(|common| common.headers_with_underscores_action());
        let escaped_slashes = match wire.path_with_escaped_slashes_action() {
            Action::ImplementationSpecificDefault | Action::KeepUnchanged => EscapedSlashes::Keep,
            Action::RejectRequest => EscapedSlashes::Reject,
            Action::UnescapeAndForward => EscapedSlashes::Unescape,
            Action::UnescapeAndRedirect => {
                problems.add(
                    "path_with_escaped_slashes_action",
                    "not supported yet: UNESCAPE_AND_REDIRECT",
                );
                EscapedSlashes::Reject
            }
        };
        let any = wire.strip_port_mode == Some(StripPortMode::StripAnyHostPort(true));
        if any && wire.strip_matching_host_port {
            problems.add(
                "",
                "only one of 'strip_matching_host_port' and 'strip_any_host_port' may be set",
            );
        }
        let strip_port = match (any, wire.strip_matching_host_port) {
            (true, _) => StripPort::Any,
            (false, true) => StripPort::Matching,
            (false, false) => StripPort::None,
        };
        Self {
            normalize_path: wire.normalize_path.unwrap_or(false),
            merge_slashes: wire.merge_slashes,
            escaped_slashes,
            strip_port,
            strip_trailing_host_dot: wire.strip_trailing_host_dot,
            trusted_hops: wire.xff_num_trusted_hops,
            skip_xff_append: wire.skip_xff_append,
            append_x_forwarded_port: wire.append_x_forwarded_port,
            always_set_request_id: wire.always_set_request_id_in_response,
            internal_addresses,
            internal_pipes: internal.unix_sockets,
            client_cert: ClientCert::read(wire),
            underscores: match underscores.unwrap_or_default() {
                HeadersWithUnderscoresAction::Allow => Underscores::Allow,
                HeadersWithUnderscoresAction::RejectRequest => Underscores::Reject,
                HeadersWithUnderscoresAction::DropHeader => Underscores::Drop,
            },
        }
    }

    pub(super) fn write(&self, wire: &mut hcm::HttpConnectionManager) {
        let action = match self.escaped_slashes {
            EscapedSlashes::Keep => Action::ImplementationSpecificDefault,
            EscapedSlashes::Reject => Action::RejectRequest,
            EscapedSlashes::Unescape => Action::UnescapeAndForward,
        };
        wire.set_path_with_escaped_slashes_action(action);
        wire.normalize_path = self.normalize_path.then_some(true);
        wire.merge_slashes = self.merge_slashes;
        wire.strip_matching_host_port = self.strip_port == StripPort::Matching;
        wire.strip_port_mode =
            (self.strip_port == StripPort::Any).then_some(StripPortMode::StripAnyHostPort(true));
        wire.strip_trailing_host_dot = self.strip_trailing_host_dot;
        wire.xff_num_trusted_hops = self.trusted_hops;
        wire.skip_xff_append = self.skip_xff_append;
        wire.append_x_forwarded_port = self.append_x_forwarded_port;
        wire.always_set_request_id_in_response = self.always_set_request_id;
        let ranges = &self.internal_addresses;
        let is_told = !ranges.is_empty() || self.internal_pipes;
        wire.internal_address_config = is_told.then(|| InternalAddressConfig {
            unix_sockets: self.internal_pipes,
            cidr_ranges: ranges.iter().map(Into::into).collect(),
        });
        self.client_cert.write(wire);
        if let Some(common) = &mut wire.common_http_protocol_options {
            common.set_headers_with_underscores_action(match self.underscores {
                Underscores::Allow => HeadersWithUnderscoresAction::Allow,
                Underscores::Reject => HeadersWithUnderscoresAction::RejectRequest,
                Underscores::Drop => HeadersWithUnderscoresAction::DropHeader,
            });
        }
    }
}
