//! TLS towards clients and peers that connect to us.

use super::{
    Peer, Stream, TlsFacts,
    material::{Find, Material, is_not_ready, not_ready},
    pem, provider,
    verify::NamedClient,
    versions,
};
use crate::{metrics::ListenerStats, socket::Socket};
use arc_swap::ArcSwapOption;
use outrigger_xds::resource::tls::{CommonTls, DownstreamTls};
use rustls::{
    CertificateError, Error, ProtocolVersion, ServerConfig, ServerConnection,
    crypto::CryptoProvider,
    server::{
        Acceptor, ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
    },
    sign::CertifiedKey,
};
use std::{io, sync::Arc, time::Duration};
use tokio_rustls::{LazyConfigAcceptor, TlsStream};
use webpki::EndEntityCert;

/// What a listener needs to shake hands.
pub(crate) struct Server {
    resource: DownstreamTls,
    handshake_timeout: Duration,
    material: Material,
    /// None while its secrets are not there.
    built: ArcSwapOption<Built>,
}

/// A client that offers protocols of which we have none goes on without, as with Envoy; rustls would refuse it.
struct Built {
    with_alpn: Arc<ServerConfig>,
    without_alpn: Arc<ServerConfig>,
    certificates: Arc<Certificates>,
}

impl Server {
    /// Reads all files.
    ///
    /// # Errors
    /// What is wrong with them, with the secrets, or with the algorithms.
    pub(crate) fn new(
        resource: &DownstreamTls,
        handshake_timeout: Duration,
        find: Find<'_>,
    ) -> Result<Self, String> {
        let (material, common) = Material::new(&resource.common, find)?;
        let built = common.map(|common| Built::new(resource, &common));
        Ok(Self {
            resource: resource.clone(),
            handshake_timeout,
            material,
            built: ArcSwapOption::new(built.transpose()?.map(Arc::new)),
        })
    }

    /// Whether it is what these say.
    pub(crate) fn is(&self, resource: &DownstreamTls, handshake_timeout: Duration) -> bool {
        self.resource == *resource && self.handshake_timeout == handshake_timeout
    }

    /// Whether it is made of the same resource as the other.
    pub(crate) fn says_the_same(&self, other: &Self) -> bool {
        other.is(&self.resource, self.handshake_timeout)
    }

    /// Builds it anew if its secrets or files hold something else now; connections that are open go on. Gives whether
    /// it did.
    ///
    /// # Errors
    /// What is wrong with them; then it stays as it was.
    pub(crate) fn renew(&self, find: Find<'_>) -> Result<bool, String> {
        let Some(common) = self.material.renewed(&self.resource.common, find)? else {
            return Ok(false);
        };
        let built = Built::new(&self.resource, &common)?;
        self.built.store(Some(Arc::new(built)));
        self.material.shown(&common);
        Ok(true)
    }

    /// What it is made of.
    pub(crate) fn material(&self) -> &Material {
        &self.material
    }

    /// Most that a handshake may take; zero is off.
    pub(crate) fn handshake_timeout(&self) -> Duration {
        self.handshake_timeout
    }

    /// Shakes hands, and counts how it went.
    pub(crate) async fn accept(
        &self,
        socket: Socket,
        stats: &ListenerStats,
    ) -> io::Result<(Stream, TlsFacts)> {
        match self.shake(socket).await {
            Ok((stream, local_uri_sans)) => {
                let facts = TlsFacts {
                    local_uri_sans,
                    ..facts(stream.get_ref().1)
                };
                stats.ssl_handshake.increment(1);
                if stream.get_ref().1.peer_certificates().is_none() {
                    stats.ssl_no_certificate.increment(1);
                }
                Ok((Stream::Tls(Box::new(TlsStream::from(stream))), facts))
            }
            Err(error) => {
                count(&error, stats);
                Err(error)
            }
        }
    }

    /// The connection, and the URI names of the certificate that the client saw.
    async fn shake(
        &self,
        socket: Socket,
    ) -> io::Result<(tokio_rustls::server::TlsStream<Socket>, Arc<[String]>)> {
        let begun = LazyConfigAcceptor::new(Acceptor::default(), socket).await?;
        let Some(built) = self.built.load_full() else {
            return Err(not_ready());
        };
        let hello = begun.client_hello();
        let ours = &built.with_alpn.alpn_protocols;
        let common = hello
            .alpn()
            .is_none_or(|mut offered| offered.any(|theirs| ours.iter().any(|our| our == theirs)));
        let config = if common {
            &built.with_alpn
        } else {
            &built.without_alpn
        };
        let shown = built.certificates.fitting(&hello);
        let uris = shown.map_or_else(Arc::default, |shown| shown.uris.clone());
        Ok((begun.into_stream(config.clone()).await?, uris))
    }
}

impl Built {
    /// `common` is the resource's with its secrets in place.
    fn new(resource: &DownstreamTls, common: &CommonTls) -> Result<Self, String> {
        let provider = provider(&common.params)?;
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&versions(&common.params))
            .map_err(|error| format!("tls_params: {error}"))?;
        let builder = match &common.validation {
            None => builder.with_no_client_auth(),
            Some(validation) => {
                let roots = pem::roots(&validation.trusted_ca)?;
                let mut chain =
                    WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
                if !resource.require_client_certificate {
                    chain = chain.allow_unauthenticated();
                }
                let chain = chain
                    .build()
                    .map_err(|error| format!("trusted_ca: {error}"))?;
                builder.with_client_cert_verifier(Arc::new(NamedClient {
                    chain,
                    names: validation.names.clone(),
                }))
            }
        };
        let certificates = Arc::new(Certificates::read(common, &provider)?);
        let mut config = builder.with_cert_resolver(certificates.clone());
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let without_alpn = Arc::new(config.clone());
        config.alpn_protocols = common
            .alpn
            .iter()
            .map(|name| name.as_bytes().to_vec())
            .collect();
        Ok(Self {
            with_alpn: Arc::new(config),
            without_alpn,
            certificates,
        })
    }
}

/// All certificates of a context.
#[derive(Debug)]
struct Certificates(Vec<Shown>);

/// One of them.
#[derive(Debug)]
struct Shown {
    /// DNS names it is for.
    names: Vec<String>,
    /// Its URI names.
    uris: Arc<[String]>,
    pair: Arc<CertifiedKey>,
}

impl Certificates {
    fn read(common: &CommonTls, provider: &CryptoProvider) -> Result<Self, String> {
        let read = |certificate| {
            let pair = pem::pair(certificate, provider)?;
            let leaf = &pair.cert[0];
            let parsed = EndEntityCert::try_from(leaf)
                .map_err(|error| format!("certificate_chain: {error}"))?;
            let names = parsed.valid_dns_names().map(str::to_ascii_lowercase);
            let names = names.collect();
            let uris = parsed.valid_uri_names().map(str::to_owned).collect();
            Ok::<_, String>(Shown { names, uris, pair })
        };
        let certificates = &common.certificates;
        Ok(Self(
            certificates.iter().map(read).collect::<Result<_, _>>()?,
        ))
    }

    /// Envoy's order: the exact name, then `*.` and the rest of it, then any; each only if the client can check its
    /// signature.
    fn fitting(&self, hello: &ClientHello<'_>) -> Option<&Shown> {
        let wanted = hello.server_name().map(str::to_ascii_lowercase);
        let wanted = wanted.as_deref();
        let wildcard = wanted
            .and_then(|name| name.split_once('.'))
            .map(|(_, rest)| format!("*.{rest}"));
        let usable = |shown: &&Shown| {
            let key = &shown.pair.key;
            key.choose_scheme(hello.signature_schemes()).is_some()
        };
        let named = |name: Option<&str>| {
            let name = name?;
            let is_for = |shown: &&Shown| shown.names.iter().any(|known| known == name);
            self.0.iter().filter(is_for).find(usable)
        };
        named(wanted)
            .or_else(|| named(wildcard.as_deref()))
            .or_else(|| self.0.iter().find(usable))
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.fitting(&hello)?.pair.clone())
    }
}

fn facts(connection: &ServerConnection) -> TlsFacts {
    let mut facts = TlsFacts {
        version: match connection.protocol_version() {
            Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
            _ => "TLSv1.3",
        },
        server_name: connection.server_name().unwrap_or_default().to_owned(),
        peer: Peer::of(connection.peer_certificates()),
        ..TlsFacts::default()
    };
    let leaf = connection.peer_certificates().and_then(<[_]>::first);
    if let Some(Ok(parsed)) = leaf.map(EndEntityCert::try_from) {
        let join = |names: Vec<&str>| names.join(",");
        facts.peer_uri_sans = join(parsed.valid_uri_names().collect());
        facts.peer_dns_sans = join(parsed.valid_dns_names().collect());
    }
    facts
}

fn count(error: &io::Error, stats: &ListenerStats) {
    let inner = error.get_ref().and_then(|error| error.downcast_ref());
    match inner {
        None if is_not_ready(error) => stats.ssl_secrets_not_ready.increment(1),
        Some(Error::NoCertificatesPresented) => stats.ssl_fail_verify_no_cert.increment(1),
        Some(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)) => {
            stats.ssl_fail_verify_san.increment(1);
        }
        Some(Error::InvalidCertificate(_)) => stats.ssl_fail_verify_error.increment(1),
        Some(_) => stats.ssl_connection_error.increment(1),
        // The client went away.
        None => {}
    }
    tracing::debug!(%error, "TLS handshake failed");
}
