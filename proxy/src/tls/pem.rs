//! Certificates, keys and CAs out of their sources.
//!
//! A context is built of what the sources hold at that moment; its fingerprint tells whether they hold something else
//! now.

use super::certificate::Certificate;
use outrigger_xds::resource::tls::{CommonTls, DataSource, TlsCertificate};
use rustls::{
    RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use std::{
    borrow::Cow,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

/// Larger files are no certificates.
pub(super) const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// The bytes of a source, and how problems call it.
fn read(source: &DataSource) -> Result<(Cow<'_, [u8]>, Cow<'_, str>), String> {
    match source {
        DataSource::Inline(bytes) => Ok((bytes.into(), "<inline>".into())),
        DataSource::File(path) => {
            let explain = |error: std::io::Error| format!("cannot read {path}: {error}");
            let size = std::fs::metadata(path).map_err(explain)?.len();
            if size > FILE_BYTES_MAX {
                return Err(format!("{path}: has more than {FILE_BYTES_MAX} bytes"));
            }
            let bytes = std::fs::read(path).map_err(explain)?;
            Ok((bytes.into(), path.into()))
        }
    }
}

fn certificates(source: &DataSource) -> Result<Vec<CertificateDer<'static>>, String> {
    let (bytes, name) = read(source)?;
    let found = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| format!("{name}: not PEM: {error}"))?;
    if found.is_empty() {
        return Err(format!("{name}: no certificate in it"));
    }
    Ok(found)
}

/// A certificate with its key; they belong together.
pub(super) fn pair(
    certificate: &TlsCertificate,
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>, String> {
    let chain = certificates(&certificate.chain)?;
    let (bytes, name) = read(&certificate.key)?;
    let key = PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|error| format!("{name}: no private key in it: {error}"))?;
    let pair = CertifiedKey::from_der(chain, key, provider)
        .map_err(|error| format!("{name}: does not fit its certificate: {error}"))?;
    Ok(Arc::new(pair))
}

/// CAs to believe.
pub(super) fn roots(source: &DataSource) -> Result<Arc<RootCertStore>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(source)? {
        roots
            .add(certificate)
            .map_err(|error| format!("trusted_ca: {error}"))?;
    }
    Ok(Arc::new(roots))
}

/// Of all bytes that a context without secrets is made of; those that cannot be read are none.
pub(super) fn fingerprint(common: &CommonTls) -> u64 {
    let mut hasher = DefaultHasher::new();
    let pairs = common.certificates.iter();
    let of_pairs = pairs.flat_map(|pair| [&pair.chain, &pair.key]);
    let validation = common.validation.iter().map(|whom| &whom.trusted_ca);
    for source in of_pairs.chain(validation) {
        let read = read(source);
        read.map(|(bytes, _)| bytes).ok().hash(&mut hasher);
    }
    hasher.finish()
}

/// The certificates of a context, ours and those we believe, for people.
pub(super) fn shown(common: &CommonTls) -> (Vec<Certificate>, Vec<Certificate>) {
    let show = |source: &DataSource| {
        let name = match source {
            DataSource::File(path) => path.as_str(),
            DataSource::Inline(_) => "<inline>",
        };
        let found = certificates(source).unwrap_or_default().into_iter();
        let read = found.filter_map(|der| Certificate::read(name, &der));
        read.collect::<Vec<_>>()
    };
    let ours = common.certificates.iter();
    let ours = ours.flat_map(|pair| show(&pair.chain)).collect();
    let theirs = common.validation.iter();
    let theirs = theirs.flat_map(|whom| show(&whom.trusted_ca));
    (ours, theirs.collect())
}
