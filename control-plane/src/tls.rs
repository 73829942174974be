//! TLS on the port of xDS: what hands are shaken with, how it is renewed while streams go on, and who is at the other end.
//!
//! Certificates come from files or from the built-in CA ([`crate::ca`]). Both are looked at each second; what is new counts for connections from then on.
//! What is bad changes nothing. Sessions are not resumed: a resumed one would outlive a certificate that was replaced, or a CA that was taken away.

mod port;
mod verify;

pub use port::{Connection, incoming};

use crate::{
    ca::{self, Authority, Pair},
    identity::{self, Rule, SpiffeId, TrustDomain},
};
use anyhow::Context;
use clap::Args;
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::sync::{Notify, watch};
use tonic::Status;
use verify::OfTrustDomain;

/// Between two looks at the files.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Between two looks whether a client's certificate still holds; less where certificates hold for a short time.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// The least of it.
const CHECK_INTERVAL_MIN: Duration = Duration::from_millis(250);

/// Who is believed, and who we are.
#[derive(Debug, Clone, Args)]
// Its group would have the name of another one.
#[group(skip)]
pub struct Options {
    /// Certificate chain of the port of xDS, as PEM; read again when it changes.
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_client_ca", "trust_domain"])]
    pub tls_cert: Option<PathBuf>,
    /// Its private key.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// CAs that vouch for clients.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Of the SPIFFE ids that clients must have.
    #[arg(long, value_name = "NAME", requires = "tls_cert")]
    pub trust_domain: Option<TrustDomain>,
    /// Directory of the built-in CA (`ca init`), in place of those files: it issues certificates, to nodes by SDS, too.
    #[arg(long, value_name = "DIR", conflicts_with = "tls_cert")]
    pub ca: Option<PathBuf>,
    /// How long certificates hold that the CA issues while it runs; they are renewed at half of it.
    #[arg(long, value_name = "S", default_value_t = 86_400, value_parser = clap::value_parser!(u64).range(2..=31_536_000))]
    pub certificate_ttl_s: u64,
    /// Clients whose SPIFFE id has this path may be this node; an ID that ends in * is all that begins so. May be given several times.
    #[arg(long, value_name = "PATH=ID")]
    pub identity: Vec<Rule>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tls_cert: None,
            tls_key: None,
            tls_client_ca: None,
            trust_domain: None,
            ca: None,
            certificate_ttl_s: 86_400,
            identity: Vec::new(),
        }
    }
}

/// Where it all comes from.
#[derive(Debug)]
enum Origin {
    Files {
        certificate: PathBuf,
        key: PathBuf,
        client_ca: PathBuf,
        trust_domain: TrustDomain,
    },
    Ca(PathBuf),
}

/// What hands are shaken with at one moment.
#[derive(Debug)]
struct Material {
    server: Arc<ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
    authority: Option<Arc<Authority>>,
    /// When our own certificate is to be renewed; files are not ours to renew.
    renew_at: Option<SystemTime>,
}

/// Who may come, and as whom.
#[derive(Debug)]
pub struct Access {
    origin: Origin,
    rules: Vec<Rule>,
    ttl: Duration,
    current: watch::Sender<Arc<Material>>,
}

impl Access {
    /// None without TLS.
    ///
    /// # Errors
    /// A file cannot be read, or is not what it should be.
    pub fn new(options: &Options) -> anyhow::Result<Option<Arc<Self>>> {
        let files = (&options.tls_cert, &options.tls_key, &options.tls_client_ca);
        let origin = match (&options.ca, files, &options.trust_domain) {
            (Some(dir), ..) => Origin::Ca(dir.clone()),
            (None, (Some(certificate), Some(key), Some(client_ca)), Some(trust_domain)) => {
                Origin::Files {
                    certificate: certificate.clone(),
                    key: key.clone(),
                    client_ca: client_ca.clone(),
                    trust_domain: trust_domain.clone(),
                }
            }
            _ => return Ok(None),
        };
        let ttl = Duration::from_secs(options.certificate_ttl_s);
        let material = origin.build(&origin.read()?, ttl)?;
        Ok(Some(Arc::new(Self {
            origin,
            rules: options.identity.clone(),
            ttl,
            current: watch::Sender::new(Arc::new(material)),
        })))
    }

    fn material(&self) -> Arc<Material> {
        self.current.borrow().clone()
    }

    /// The CA, if certificates are issued.
    #[must_use]
    pub fn authority(&self) -> Option<Arc<Authority>> {
        self.material().authority.clone()
    }

    /// How long certificates hold that are issued.
    #[must_use]
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// Whether certificates are issued.
    #[must_use]
    pub fn issues(&self) -> bool {
        matches!(self.origin, Origin::Ca(_))
    }

    /// Takes up what changes, for ever.
    pub async fn follow(self: Arc<Self>) {
        let mut last = None;
        let mut looks = tokio::time::interval(LOOK_INTERVAL.min(self.ttl / 8));
        loop {
            looks.tick().await;
            let (access, seen) = (self.clone(), last.clone());
            let look = tokio::task::spawn_blocking(move || access.look(seen));
            match look.await {
                Ok(seen) => last = seen,
                Err(error) => tracing::error!(%error, "looking at certificates failed"),
            }
        }
    }

    /// One look; gives what was seen. What is as it was at the last look is not tried again.
    fn look(&self, last: Option<Vec<String>>) -> Option<Vec<String>> {
        let renew_at = self.material().renew_at;
        let is_due = renew_at.is_some_and(|at| {
            let now = SystemTime::now();
            now >= at || now + self.ttl < at
        });
        let texts = match self.origin.read() {
            Ok(texts) => texts,
            // Files are being replaced, or gone: said once, when it is known what is wrong.
            Err(error) => {
                if last.as_ref().is_none_or(|last| !last.is_empty()) {
                    refused(&error);
                }
                return Some(Vec::new());
            }
        };
        if last.as_ref() == Some(&texts) && !is_due {
            return last;
        }
        // At the first look nothing is new, but for what changed since the start.
        match self.origin.build(&texts, self.ttl) {
            Ok(material) => {
                if last.is_some() && !is_due {
                    tracing::info!("certificates are read again");
                }
                self.take(material, last.as_ref() == Some(&texts));
            }
            Err(error) => refused(&error),
        }
        Some(texts)
    }

    /// If only our own certificate is new, the CA stays the same one.
    fn take(&self, material: Material, is_same_ca: bool) {
        count("good");
        self.current.send_modify(|current| {
            let before = current.authority.clone().filter(|_| is_same_ca);
            *current = Arc::new(Material {
                authority: before.or(material.authority),
                ..material
            });
        });
    }
}

fn count(result: &'static str) {
    metrics::counter!("outrigger_control_plane_certificate_loads_total", "result" => result)
        .increment(1);
}

fn refused(error: &anyhow::Error) {
    count("bad");
    tracing::warn!("certificates are not taken, those that were good last stay: {error:#}");
}

impl Origin {
    /// What its files hold.
    fn read(&self) -> anyhow::Result<Vec<String>> {
        match self {
            Self::Files {
                certificate,
                key,
                client_ca,
                ..
            } => [certificate, key, client_ca]
                .into_iter()
                .map(|path| ca::read(path))
                .collect(),
            Self::Ca(dir) => ca::files(dir),
        }
    }

    fn build(&self, texts: &[String], ttl: Duration) -> anyhow::Result<Material> {
        let [first, second, rest @ ..] = texts else {
            anyhow::bail!("no files");
        };
        match (self, rest) {
            (
                Self::Files {
                    certificate,
                    client_ca,
                    trust_domain,
                    ..
                },
                [bundle],
            ) => {
                let pair = Pair {
                    chain: first.clone(),
                    key: second.clone(),
                };
                let at = |path: &Path| path.display().to_string();
                let verifier = verifier(bundle, trust_domain).with_context(|| at(client_ca))?;
                let server = server(&pair, verifier.clone()).with_context(|| at(certificate))?;
                Ok(Material {
                    server,
                    verifier,
                    authority: None,
                    renew_at: None,
                })
            }
            _ => of_ca(Authority::new(first.clone(), second)?, ttl),
        }
    }
}

/// The CA vouches for clients, and for us.
fn of_ca(authority: Authority, ttl: Duration) -> anyhow::Result<Material> {
    let now = SystemTime::now();
    let domain = &authority.trust_domain;
    let pair = authority.issue(&domain.control_plane(), ttl, now)?;
    let verifier = verifier(&authority.bundle, domain)?;
    Ok(Material {
        server: server(&pair, verifier.clone())?,
        verifier,
        authority: Some(Arc::new(authority)),
        renew_at: Some(now + ttl / 2),
    })
}

fn verifier(bundle: &str, domain: &TrustDomain) -> anyhow::Result<Arc<dyn ClientCertVerifier>> {
    let roots = ca::roots(&ca::certificates(bundle)?)?;
    let provider = Arc::new(ring::default_provider());
    let chain = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
    Ok(Arc::new(OfTrustDomain::new(chain, domain.clone())))
}

/// TLS 1.2 and 1.3, of HTTP/2.
fn server(pair: &Pair, clients: Arc<dyn ClientCertVerifier>) -> anyhow::Result<Arc<ServerConfig>> {
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).context("no private key")?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(clients)
        .with_single_cert(ca::certificates(&pair.chain)?, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The other end of a connection.
#[derive(Debug, Clone, Default)]
pub struct Peer {
    /// Where it is, if that is known.
    pub address: Option<SocketAddr>,
    proven: Option<Arc<Proven>>,
}

/// Who it proved to be.
#[derive(Debug)]
struct Proven {
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    access: Arc<Access>,
    /// Told when it is no longer who it was: what goes over its connection next would be refused, too, for ever.
    over: Arc<Notify>,
}

impl Peer {
    /// Of a request.
    #[must_use]
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        let known = request.extensions().get::<Self>();
        known.cloned().unwrap_or_default()
    }

    /// Who it proved to be, and who may come; without TLS nobody proves anything.
    #[must_use]
    pub fn access(&self) -> Option<&Arc<Access>> {
        self.proven.as_ref().map(|proven| &proven.access)
    }

    /// Its SPIFFE id.
    #[must_use]
    pub fn id(&self) -> Option<&SpiffeId> {
        self.proven.as_ref().map(|proven| &proven.id)
    }

    /// Whether it may be this node. Without TLS everybody is who they say.
    #[must_use]
    pub fn may_be(&self, node: &str) -> bool {
        let proven = self.proven.as_ref();
        proven.is_none_or(|proven| identity::may_be(&proven.id, node, &proven.access.rules))
    }

    /// Takes it as this node.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`, or what [`Self::check`] says; counted and logged.
    pub fn admit(&self, node: &str) -> Result<(), Status> {
        // Its connection may be older than its certificate is good.
        self.check()?;
        if self.may_be(node) {
            return Ok(());
        }
        let id = self.id().map(ToString::to_string).unwrap_or_default();
        tracing::warn!(address = ?self.address, id, node, "a client may not be the node that it says it is");
        refuse_stream("identity");
        Err(Status::permission_denied(format!(
            "{id} may not be node '{node}'"
        )))
    }

    /// When to look whether it is still who it was; never without TLS.
    #[must_use]
    pub fn checks(&self) -> Option<tokio::time::Interval> {
        let ttl = self.access()?.ttl;
        let interval = (ttl / 8).clamp(CHECK_INTERVAL_MIN, CHECK_INTERVAL);
        let first = tokio::time::Instant::now() + interval;
        Some(tokio::time::interval_at(first, interval))
    }

    /// Whether it would be let in now; if not, its connection is closed a moment later, so that it comes back with what it has then.
    ///
    /// # Errors
    /// `UNAUTHENTICATED`, counted and logged: its certificate holds no longer, or nobody vouches for it any more.
    pub fn check(&self) -> Result<(), Status> {
        let Some(proven) = &self.proven else {
            return Ok(());
        };
        let verifier = &proven.access.material().verifier;
        let (leaf, rest) = proven.chain.split_first().unzip();
        let checked = leaf.map(|leaf| {
            verifier.verify_client_cert(leaf, rest.unwrap_or_default(), UnixTime::now())
        });
        let Some(Err(error)) = checked else {
            return Ok(());
        };
        tracing::warn!(address = ?self.address, id = %proven.id, %error, "the certificate of a client holds no longer");
        refuse_stream("certificate");
        proven.over.notify_one();
        Err(Status::unauthenticated(format!(
            "the certificate holds no longer: {error}"
        )))
    }
}

fn refuse_stream(reason: &'static str) {
    metrics::counter!("outrigger_control_plane_streams_refused_total", "reason" => reason)
        .increment(1);
}
