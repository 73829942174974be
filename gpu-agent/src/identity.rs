//! Mutual TLS towards a control plane: who this node is, and whom it believes.
//!
//! Files are read for each connection, so that what is new in them counts from the next one on.

use anyhow::{Context, bail};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore,
    SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
};
use std::{io, path::PathBuf, sync::Arc};
use webpki::EndEntityCert;

/// Path of the SPIFFE id of a control plane.
const CONTROL_PLANE: &str = "control-plane";

/// The files of a node's identity.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// PEM, leaf first.
    pub(crate) certificate: PathBuf,
    /// PEM.
    pub(crate) key: PathBuf,
    /// PEM: whom to believe.
    pub(crate) ca: PathBuf,
}

impl Identity {
    /// What hands are shaken with.
    ///
    /// # Errors
    /// A file cannot be read, or holds something else.
    pub(crate) fn client(&self) -> anyhow::Result<ClientConfig> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.ca)? {
            roots.add(certificate).context("--peer-tls-ca")?;
        }
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .with_context(|| format!("--peer-tls-key {}", self.key.display()))?;
        let provider = Arc::new(ring::default_provider());
        let verifier = ControlPlane {
            roots,
            algorithms: provider.signature_verification_algorithms,
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(certificates(&self.certificate)?, key)
            .context("--peer-tls-cert, --peer-tls-key")?;
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

fn certificates(path: &PathBuf) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let read = || format!("certificates of {}", path.display());
    let all = CertificateDer::pem_file_iter(path).with_context(read)?;
    let all: Vec<_> = all.collect::<Result<_, _>>().with_context(read)?;
    if all.is_empty() {
        bail!("{}: there is none", read());
    }
    Ok(all)
}

/// Believes whom the CAs vouch for as the control plane of a trust domain. Any node has a certificate of theirs, too.
#[derive(Debug)]
struct ControlPlane {
    roots: RootCertStore,
    algorithms: WebPkiSupportedAlgorithms,
}

/// Why hands were not shaken. What we found wrong ourselves, rustls would print as a structure.
pub(crate) fn in_words(error: io::Error) -> io::Error {
    let cause = error
        .get_ref()
        .and_then(|cause| cause.downcast_ref::<Error>());
    match cause {
        Some(Error::InvalidCertificate(CertificateError::Other(found))) => {
            io::Error::other(found.0.to_string())
        }
        _ => error,
    }
}

/// The URIs of a server that is none.
#[derive(Debug, thiserror::Error)]
#[error(
    "the server is no control plane: its certificate is of {0:?}, and not of spiffe://TRUST-DOMAIN/{CONTROL_PLANE}"
)]
struct Other(Vec<String>);

fn is_control_plane(uri: &str) -> bool {
    let rest = uri.strip_prefix("spiffe://");
    let parts = rest.and_then(|rest| rest.split_once('/'));
    parts.is_some_and(|(domain, path)| !domain.is_empty() && path == CONTROL_PLANE)
}

impl ServerCertVerifier for ControlPlane {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        let parsed = EndEntityCert::try_from(end_entity)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if parsed.valid_uri_names().any(is_control_plane) {
            return Ok(ServerCertVerified::assertion());
        }
        let other = Other(parsed.valid_uri_names().map(str::to_owned).collect());
        let other = CertificateError::Other(OtherError(Arc::new(other)));
        Err(Error::InvalidCertificate(other))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_plane_is_known_by_its_path_in_any_trust_domain() {
        assert!(is_control_plane("spiffe://fleet.example/control-plane"));
        for other in [
            "spiffe://fleet.example/node/a",
            "spiffe:///control-plane",
            "spiffe://a/b/control-plane",
            "https://fleet.example/control-plane",
        ] {
            assert!(!is_control_plane(other), "{other}");
        }
    }
}
