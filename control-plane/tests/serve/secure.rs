//! CAs, and clients that shake hands.

use hyper_util::rt::TokioIo;
use outrigger_control_plane::{
    ca::{self, Authority, Pair},
    tls,
};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    SupportedProtocolVersion,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
};
use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint};

/// A CA in a directory of its own.
pub(crate) struct Ca {
    pub(crate) dir: PathBuf,
    authority: Authority,
}

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

impl Ca {
    pub(crate) fn new(name: &str, trust_domain: &str) -> Self {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ca-{name}"));
        let _ = fs::remove_dir_all(&dir);
        ca::init(&dir, &trust_domain.parse().unwrap()).unwrap();
        Self {
            authority: Authority::load(&dir).unwrap(),
            dir,
        }
    }

    pub(crate) fn pem(&self) -> &str {
        &self.authority.bundle
    }

    /// Holds from five minutes before `from`, until so long after it.
    pub(crate) fn pair(&self, id: &str, from: SystemTime, ttl: Duration) -> Pair {
        self.authority
            .issue(&id.parse().unwrap(), ttl, from)
            .unwrap()
    }

    pub(crate) fn good(&self, id: &str) -> Pair {
        self.pair(id, SystemTime::now(), HOUR)
    }

    pub(crate) fn options(&self) -> tls::Options {
        tls::Options {
            ca: Some(self.dir.clone()),
            ..tls::Options::default()
        }
    }
}

/// Believes who a CA vouches for, whatever the name, as Envoy does.
#[derive(Debug)]
struct Believes(RootCertStore, CryptoProvider);

impl ServerCertVerifier for Believes {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.1.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.0,
            intermediates,
            now,
            algorithms,
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.1.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.1.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.1.signature_verification_algorithms.supported_schemes()
    }
}

/// A client with a certificate, or without.
pub(crate) fn client(
    ca: &Ca,
    pair: Option<&Pair>,
    version: &'static SupportedProtocolVersion,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(der(ca.pem())).unwrap();
    let provider = ring::default_provider();
    let builder = ClientConfig::builder_with_provider(Arc::new(provider.clone()))
        .with_protocol_versions(&[version])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Believes(roots, provider)));
    let mut config = match pair {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
            let chain = vec![der(&pair.chain)];
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

pub(crate) fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

pub(crate) async fn shake(
    at: SocketAddr,
    config: ClientConfig,
) -> std::io::Result<TlsStream<TcpStream>> {
    let socket = TcpStream::connect(at).await?;
    let name = ServerName::try_from("whoever").unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, socket)
        .await
}

/// A channel of gRPC; an error is known when it is used.
pub(crate) fn channel(at: SocketAddr, config: ClientConfig) -> Channel {
    reconnecting(at, move || config.clone())
}

/// Each connection of it asks what to be.
pub(crate) fn reconnecting(
    at: SocketAddr,
    config: impl Fn() -> ClientConfig + Send + 'static,
) -> Channel {
    let connector = tower::service_fn(move |_: http::Uri| {
        let shaking = shake(at, config());
        async move { shaking.await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://xds").connect_with_connector_lazy(connector)
}
