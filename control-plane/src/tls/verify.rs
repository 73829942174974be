//! Whether a client's certificate has an id of our trust domain, beside whether its chain is believed.

use crate::{ca, identity::TrustDomain};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use std::sync::Arc;

/// As rustls' own, and then by id.
#[derive(Debug)]
pub(super) struct OfTrustDomain {
    chain: Arc<dyn ClientCertVerifier>,
    domain: TrustDomain,
}

/// Why an id is none of ours.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Foreign(String);

impl OfTrustDomain {
    pub(super) fn new(chain: Arc<dyn ClientCertVerifier>, domain: TrustDomain) -> Self {
        Self { chain, domain }
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Foreign> {
        let id = ca::id_of(certificate).map_err(|error| Foreign(format!("{error:#}")))?;
        if *id.trust_domain() != self.domain {
            return Err(Foreign(format!("{id} is not of {}", self.domain)));
        }
        Ok(())
    }
}

impl ClientCertVerifier for OfTrustDomain {
    fn offer_client_auth(&self) -> bool {
        self.chain.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chain.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)?;
        self.check(end_entity).map_err(|foreign| {
            Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(foreign))))
        })?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
