//! The built-in CA: a directory with a certificate and its key, made by `ca init`, from which `ca issue` and a running control plane issue certificates
//! that hold SPIFFE ids.
//!
//! `ca.pem` may hold more than one certificate: all are believed, the first one issues, with the key in `ca.key`. So a CA is replaced in steps.
//! Only CAs that `ca init` made can issue: of others' certificates we would have to repeat the name.

use crate::identity::{SpiffeId, TrustDomain};
use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{
    RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    server::WebPkiClientVerifier,
};
use std::{
    fs,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How long a CA holds.
const CA_TTL: Duration = Duration::from_secs(3650 * 24 * 60 * 60);
/// Certificates hold from so long ago, for clocks that are behind ours.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);
/// Larger files are no certificates.
const FILE_BYTES_MAX: u64 = 1 << 20;

const CERTIFICATES: &str = "ca.pem";
const KEY: &str = "ca.key";

/// `outrigger-control-plane ca`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes a CA: writes ca.pem and ca.key into a directory.
    Init(Init),
    /// Issues a certificate with which a node comes to the control plane: writes cert.pem, key.pem and ca.pem.
    Issue(Issue),
}

/// `ca init`.
#[derive(Debug, Args)]
pub struct Init {
    /// Where it is written; there is none yet.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Of its SPIFFE ids, such as fleet.example.
    #[arg(long, value_name = "NAME")]
    trust_domain: TrustDomain,
}

/// `ca issue`.
#[derive(Debug, Args)]
pub struct Issue {
    /// Of the CA.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// The id of the node.
    #[arg(long, value_name = "ID")]
    node: String,
    /// Where the files are written; those that are there are replaced.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How long the certificate holds.
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u64).range(1..=3650))]
    days: u64,
}

impl Command {
    /// Does it, and gives what is to be printed.
    ///
    /// # Errors
    /// Files that cannot be read or written, or a node whose id no SPIFFE id can hold.
    pub fn run(&self) -> anyhow::Result<String> {
        match self {
            Self::Init(init) => self::init(&init.dir, &init.trust_domain),
            Self::Issue(issue) => {
                let authority = Authority::load(&issue.dir)?;
                let id = authority.trust_domain.node(&issue.node)?;
                let ttl = DAY * u32::try_from(issue.days)?;
                let pair = authority.issue(&id, ttl, SystemTime::now())?;
                directory(&issue.out)?;
                let files = [
                    ("ca.pem", &authority.bundle),
                    ("key.pem", &pair.key),
                    ("cert.pem", &pair.chain),
                ];
                for (name, text) in files {
                    replace(&issue.out.join(name), text)?;
                }
                Ok(format!("{id}: {}\n", issue.out.display()))
            }
        }
    }
}

/// Makes a CA.
///
/// # Errors
/// There is one, or the directory cannot be written.
pub fn init(dir: &Path, trust_domain: &TrustDomain) -> anyhow::Result<String> {
    let key = KeyPair::generate().context("no key")?;
    let mut params = ca_params(trust_domain)?;
    hold(&mut params, CA_TTL, SystemTime::now())?;
    let certificate = params.self_signed(&key).context("no certificate")?;
    directory(dir)?;
    write_new(&dir.join(KEY), &key.serialize_pem())?;
    write_new(&dir.join(CERTIFICATES), &certificate.pem())?;
    Ok(format!("{}: {}\n", trust_domain.id(), dir.display()))
}

/// For its owner only, if it does not exist.
fn directory(path: &Path) -> anyhow::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    let made = builder.create(path);
    made.with_context(|| format!("cannot make {}", path.display()))
}

/// For its owner only.
fn write_new(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// As a whole: who reads it finds the old or the new one.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    if new.exists() {
        fs::remove_file(&new).with_context(|| format!("cannot remove {}", new.display()))?;
    }
    write_new(&new, text)?;
    fs::rename(&new, path).with_context(|| format!("cannot write {}", path.display()))
}

/// A file with certificates or a key.
///
/// # Errors
/// It cannot be read, or is too large to be one.
pub(crate) fn read(path: &Path) -> anyhow::Result<String> {
    let explain = || format!("cannot read {}", path.display());
    let size = fs::metadata(path).with_context(explain)?.len();
    ensure!(
        size <= FILE_BYTES_MAX,
        "{}: has more than {FILE_BYTES_MAX} bytes",
        path.display()
    );
    fs::read_to_string(path).with_context(explain)
}

/// What the files of a CA hold: its certificates, then its key.
///
/// # Errors
/// One cannot be read.
pub(crate) fn files(dir: &Path) -> anyhow::Result<Vec<String>> {
    let names = [CERTIFICATES, KEY].into_iter();
    names.map(|name| read(&dir.join(name))).collect()
}

/// The certificates of a text in PEM; at least one.
///
/// # Errors
/// There is none, or one that is none.
pub(crate) fn certificates(pem: &str) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let found = found.context("not PEM")?;
    ensure!(!found.is_empty(), "no certificate in it");
    Ok(found)
}

/// Certificates as whom to believe.
///
/// # Errors
/// One cannot be a CA.
pub(crate) fn roots(certificates: &[CertificateDer<'static>]) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate.clone())?;
    }
    Ok(roots)
}

/// The one URI that a certificate of the SPIFFE standard has.
///
/// # Errors
/// It has none, several, or one that is no SPIFFE id.
pub(crate) fn id_of(certificate: &CertificateDer<'_>) -> anyhow::Result<SpiffeId> {
    let parsed = webpki::EndEntityCert::try_from(certificate)?;
    let mut uris = parsed.valid_uri_names();
    match (uris.next(), uris.next()) {
        (Some(uri), None) => Ok(uri.parse()?),
        (None, _) => bail!("a certificate without a SPIFFE id"),
        (Some(_), Some(_)) => bail!("a certificate with more than one URI"),
    }
}

fn hold(params: &mut CertificateParams, ttl: Duration, now: SystemTime) -> anyhow::Result<()> {
    let since_epoch = now
        .duration_since(UNIX_EPOCH)
        .context("a clock before 1970")?;
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + since_epoch.saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + (since_epoch + ttl);
    Ok(())
}

fn name(common: Option<String>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "outrigger");
    if let Some(common) = common {
        name.push(DnType::CommonName, common);
    }
    name
}

fn with_id(id: &SpiffeId) -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    let uri = id.to_string().try_into()?;
    params.subject_alt_names.push(SanType::URI(uri));
    Ok(params)
}

/// What a CA of this domain is; always the same, but for how long it holds.
fn ca_params(trust_domain: &TrustDomain) -> anyhow::Result<CertificateParams> {
    let mut params = with_id(&trust_domain.id())?;
    params.distinguished_name = name(Some(format!("CA of {trust_domain}")));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// A certificate with its key, as PEM.
#[derive(Clone)]
pub struct Pair {
    /// Its chain, its own first.
    pub chain: String,
    /// For nobody's eyes.
    pub key: String,
}

/// A CA that issues.
pub struct Authority {
    /// Of all its ids.
    pub trust_domain: TrustDomain,
    /// All certificates that are believed, as PEM.
    pub bundle: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("trust_domain", &self.trust_domain)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// The CA of a directory.
    ///
    /// # Errors
    /// Its files cannot be read, do not belong together, or are not of `ca init`.
    pub fn load(dir: &Path) -> anyhow::Result<Self> {
        let texts = files(dir)?;
        let [bundle, key] = &*texts else {
            bail!("{}: no files", dir.display());
        };
        Self::new(bundle.clone(), key).with_context(|| format!("{}", dir.display()))
    }

    /// Of what its files hold.
    pub(crate) fn new(bundle: String, key: &str) -> anyhow::Result<Self> {
        let certificates = certificates(&bundle).context(CERTIFICATES)?;
        let own = &certificates[..1];
        let trust_domain = id_of(&own[0]).context(CERTIFICATES)?.trust_domain().clone();
        let key = KeyPair::from_pem(key).context(KEY)?;
        let issuer = Issuer::new(ca_params(&trust_domain)?, key);
        let authority = Self {
            trust_domain,
            bundle,
            issuer,
        };
        authority
            .check(own)
            .context("the first certificate of ca.pem does not vouch for what ca.key signs")?;
        Ok(authority)
    }

    /// Whether what it issues is believed by who believes this certificate.
    fn check(&self, own: &[CertificateDer<'static>]) -> anyhow::Result<()> {
        let id = self.trust_domain.control_plane();
        let pair = self.issue(&id, DAY, SystemTime::now())?;
        let provider = Arc::new(ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots(own)?), provider).build()?;
        let leaf = &certificates(&pair.chain)?[0];
        verifier.verify_client_cert(leaf, &[], UnixTime::now())?;
        Ok(())
    }

    /// A certificate with a new key.
    ///
    /// # Errors
    /// The clock is before 1970, or the system has no randomness.
    pub fn issue(&self, id: &SpiffeId, ttl: Duration, now: SystemTime) -> anyhow::Result<Pair> {
        let key = KeyPair::generate()?;
        let mut params = with_id(id)?;
        params.distinguished_name = name(None);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        hold(&mut params, ttl, now)?;
        Ok(Pair {
            chain: params.signed_by(&key, &self.issuer)?.pem(),
            key: key.serialize_pem(),
        })
    }
}
