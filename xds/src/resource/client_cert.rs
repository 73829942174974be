//! What a connection manager does to `x-forwarded-client-cert`.

use crate::wire::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use hcm::http_connection_manager::{ForwardClientCertDetails as Wire, SetCurrentClientCertDetails};

/// All of it; by default it is taken off.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClientCert {
    /// `forward_client_cert_details`.
    pub forward: Forward,
    /// `subject`.
    pub subject: bool,
    /// `cert`.
    pub cert: bool,
    /// `chain`.
    pub chain: bool,
    /// `dns`.
    pub dns: bool,
    /// `uri`.
    pub uri: bool,
}

/// `forward_client_cert_details`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Forward {
    /// It is taken off.
    #[default]
    Sanitize,
    /// It stays if the client has a certificate, else it is taken off.
    ForwardOnly,
    /// Ours is added if the client has a certificate, else it is taken off.
    AppendForward,
    /// Ours takes its place if the client has a certificate, else it is taken off.
    SanitizeSet,
    /// It stays.
    AlwaysForwardOnly,
}

impl ClientCert {
    pub(super) fn read(wire: &hcm::HttpConnectionManager) -> Self {
        let details = wire.set_current_client_cert_details.unwrap_or_default();
        Self {
            forward: match wire.forward_client_cert_details() {
                Wire::Sanitize => Forward::Sanitize,
                Wire::ForwardOnly => Forward::ForwardOnly,
                Wire::AppendForward => Forward::AppendForward,
                Wire::SanitizeSet => Forward::SanitizeSet,
                Wire::AlwaysForwardOnly => Forward::AlwaysForwardOnly,
            },
            subject: details.subject.unwrap_or(false),
            cert: details.cert,
            chain: details.chain,
            dns: details.dns,
            uri: details.uri,
        }
    }

    pub(super) fn write(&self, wire: &mut hcm::HttpConnectionManager) {
        wire.set_forward_client_cert_details(match self.forward {
            Forward::Sanitize => Wire::Sanitize,
            Forward::ForwardOnly => Wire::ForwardOnly,
            Forward::AppendForward => Wire::AppendForward,
            Forward::SanitizeSet => Wire::SanitizeSet,
            Forward::AlwaysForwardOnly => Wire::AlwaysForwardOnly,
        });
        let details = SetCurrentClientCertDetails {
            subject: self.subject.then_some(true),
            cert: self.cert,
            chain: self.chain,
            dns: self.dns,
            uri: self.uri,
        };
        let is_said = details != SetCurrentClientCertDetails::default();
        wire.set_current_client_cert_details = is_said.then_some(details);
    }
}
