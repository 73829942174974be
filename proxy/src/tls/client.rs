//! TLS towards upstreams and peers that we connect to.

use super::{
    Stream,
    material::{Find, Material, not_ready},
    pem, provider,
    verify::NamedServer,
    versions,
};
use crate::socket::Socket;
use arc_swap::ArcSwapOption;
use outrigger_filters::endpoints::Secured;
use outrigger_xds::resource::{
    cluster::UpstreamProtocol,
    tls::{CommonTls, UpstreamTls},
};
use rustls::{
    ClientConfig,
    client::Resumption,
    pki_types::{IpAddr, ServerName},
    sign::SingleCertAndKey,
};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use tokio_rustls::{TlsConnector, TlsStream};

static NEXT_CONTEXT: AtomicU64 = AtomicU64::new(1);

/// What a cluster needs to shake hands.
#[derive(Debug)]
pub(crate) struct Client {
    resource: UpstreamTls,
    material: Material,
    /// None while its secrets are not there.
    built: ArcSwapOption<Built>,
    name: ServerName<'static>,
}

#[derive(Debug)]
struct Built {
    /// What is no HTTP.
    raw: Arc<ClientConfig>,
    http1: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
}

impl Built {
    /// `common` is the resource's with its secrets in place.
    fn new(resource: &UpstreamTls, common: &CommonTls) -> Result<Self, String> {
        let provider = provider(&common.params)?;
        let roots = common.validation.as_ref();
        let roots = roots.map(|validation| pem::roots(&validation.trusted_ca));
        let names = common.validation.as_ref();
        let verifier = NamedServer {
            roots: roots.transpose()?,
            names: names.map_or_else(Vec::new, |validation| validation.names.clone()),
            algorithms: provider.signature_verification_algorithms,
        };
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&versions(&common.params))
            .map_err(|error| format!("tls_params: {error}"))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match common.certificates.first() {
            None => builder.with_no_client_auth(),
            Some(certificate) => {
                let pair = pem::pair(certificate, &provider)?;
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(pair)))
            }
        };
        config.resumption = Resumption::disabled();
        config.enable_sni = !resource.sni.is_empty();
        let speaking = |fallback: Option<&str>| {
            let mut config = config.clone();
            config.alpn_protocols = match common.alpn.as_slice() {
                // As Envoy's pools do.
                [] => fallback.into_iter().map(Into::into).collect(),
                given => given.iter().map(|name| name.as_bytes().to_vec()).collect(),
            };
            Arc::new(config)
        };
        Ok(Self {
            raw: speaking(None),
            http1: speaking(Some("http/1.1")),
            http2: speaking(Some("h2")),
        })
    }
}

impl Client {
    /// Reads all files.
    ///
    /// # Errors
    /// What is wrong with them, with the secrets, or with the algorithms.
    pub(crate) fn new(resource: &UpstreamTls, find: Find<'_>) -> Result<Self, String> {
        let name = if resource.sni.is_empty() {
            ServerName::IpAddress(IpAddr::from(std::net::Ipv4Addr::UNSPECIFIED))
        } else {
            ServerName::try_from(resource.sni.clone())
                .map_err(|_| format!("sni: '{}' is no host name", resource.sni))?
        };
        let (material, common) = Material::new(&resource.common, find)?;
        let built = common.map(|common| Built::new(resource, &common));
        Ok(Self {
            resource: resource.clone(),
            material,
            built: ArcSwapOption::new(built.transpose()?.map(Arc::new)),
            name,
        })
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

    /// As endpoints carry it.
    pub(crate) fn secured(self) -> Secured {
        Secured {
            id: NEXT_CONTEXT.fetch_add(1, Relaxed),
            context: Arc::new(self),
        }
    }

    /// What an endpoint carries, if it was made here.
    pub(crate) fn of(secured: &Secured) -> Option<&Self> {
        secured.context.downcast_ref()
    }

    /// Whether it is what `resource` says.
    pub(crate) fn is(&self, resource: &UpstreamTls) -> bool {
        self.resource == *resource
    }

    /// Shakes hands; `protocol` is none for what is no HTTP.
    pub(crate) async fn connect(
        &self,
        socket: Socket,
        protocol: Option<UpstreamProtocol>,
    ) -> io::Result<Stream> {
        let Some(built) = self.built.load_full() else {
            return Err(not_ready());
        };
        let config = match protocol {
            None => &built.raw,
            Some(UpstreamProtocol::Http2) => &built.http2,
            Some(UpstreamProtocol::Http1 | UpstreamProtocol::Downstream) => &built.http1,
        };
        let connector = TlsConnector::from(config.clone());
        let stream = connector.connect(self.name.clone(), socket).await?;
        Ok(Stream::Tls(Box::new(TlsStream::from(stream))))
    }
}
