//! TLS as the proxy speaks it: contexts made of resources and their files, and the connection below HTTP.
//!
//! One stack: rustls over ring. A handshake runs in the task of its own connection, so that no other waits for it.
//! Sessions are not resumed: a resumed one would outlive a certificate that was replaced, or a CA that was taken away.

mod certificate;
pub(crate) mod client;
pub(crate) mod contexts;
mod material;
mod peer;
mod pem;
pub(crate) mod server;
mod verify;

pub use peer::Peer;

use crate::socket::Socket;
use outrigger_xds::resource::{secret::SecretContent, tls::TlsParams};
use rustls::{
    CipherSuite, NamedGroup, SupportedProtocolVersion,
    crypto::{CryptoProvider, ring},
    version::{TLS12, TLS13},
};
use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::TlsStream;

/// BoringSSL's names of what we have for TLS 1.2 (1.3 has its own, which cannot be configured).
const CIPHER_SUITES: [(&str, CipherSuite); 6] = [
    (
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    ),
    (
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    ),
    (
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    (
        "ECDHE-RSA-AES128-GCM-SHA256",
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    ),
    (
        "ECDHE-RSA-AES256-GCM-SHA384",
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    ),
    (
        "ECDHE-RSA-CHACHA20-POLY1305",
        CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
];
/// BoringSSL's names of those that rustls leaves out on purpose: without forward secrecy, or with CBC. Beside others they are passed over,
/// as istiod lists some of them for every sidecar.
const WEAK_CIPHER_SUITES: [&str; 9] = [
    "AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-SHA",
    "AES256-SHA",
    "DES-CBC3-SHA",
    "ECDHE-ECDSA-AES128-SHA",
    "ECDHE-ECDSA-AES256-SHA",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-RSA-AES256-SHA",
];
/// BoringSSL's names of the groups we have.
const CURVES: [(&str, NamedGroup); 3] = [
    ("X25519", NamedGroup::X25519),
    ("P-256", NamedGroup::secp256r1),
    ("P-384", NamedGroup::secp384r1),
];

/// Whether a secret could be used.
///
/// # Errors
/// What is wrong with it, or with its files.
pub(crate) fn check_secret(secret: &SecretContent) -> Result<(), String> {
    match secret {
        SecretContent::Certificate(certificate) => {
            let provider = provider(&TlsParams::default())?;
            pem::pair(certificate, &provider).map(drop)
        }
        SecretContent::Validation(validation) => pem::roots(&validation.trusted_ca).map(drop),
    }
}

/// The algorithms of a context.
///
/// # Errors
/// One is named that rustls does not have.
fn provider(params: &TlsParams) -> Result<Arc<CryptoProvider>, String> {
    let mut provider = ring::default_provider();
    if !params.cipher_suites.is_empty() {
        let (of_1_3, of_1_2): (Vec<_>, Vec<_>) = provider
            .cipher_suites
            .into_iter()
            .partition(|suite| suite.version() == &TLS13);
        provider.cipher_suites = of_1_3;
        let is_weak = |wanted: &&String| WEAK_CIPHER_SUITES.contains(&wanted.as_str());
        let all_are_weak = params.cipher_suites.iter().all(|wanted| is_weak(&wanted));
        let wanted = params.cipher_suites.iter();
        for wanted in wanted.filter(|wanted| all_are_weak || !is_weak(wanted)) {
            let id = named(&CIPHER_SUITES, wanted)
                .ok_or_else(|| format!("not supported: cipher suite {wanted}"))?;
            let suite = of_1_2.iter().find(|suite| suite.suite() == id);
            provider.cipher_suites.extend(suite);
        }
    }
    if !params.ecdh_curves.is_empty() {
        let all = std::mem::take(&mut provider.kx_groups);
        for wanted in &params.ecdh_curves {
            let id = named(&CURVES, wanted)
                .ok_or_else(|| format!("not supported: ECDH curve {wanted}"))?;
            provider
                .kx_groups
                .extend(all.iter().find(|group| group.name() == id));
        }
    }
    Ok(Arc::new(provider))
}

fn named<T: Copy>(all: &[(&str, T)], wanted: &str) -> Option<T> {
    let found = all.iter().find(|(name, _)| *name == wanted)?;
    Some(found.1)
}

fn versions(params: &TlsParams) -> Vec<&'static SupportedProtocolVersion> {
    match (params.only_1_2, params.only_1_3) {
        (true, _) => vec![&TLS12],
        (false, true) => vec![&TLS13],
        (false, false) => vec![&TLS12, &TLS13],
    }
}

/// What lies below HTTP on a connection, either direction.
#[derive(Debug)]
pub(crate) enum Stream {
    Plain(Socket),
    /// Boxed: it is a kilobyte, and plain text is not to carry it.
    Tls(Box<TlsStream<Socket>>),
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

/// What is known of a connection because it is TLS.
#[derive(Debug, Clone, Default)]
pub struct TlsFacts {
    /// `TLSv1.3`.
    pub version: &'static str,
    /// As the client asked for; may be empty.
    pub server_name: String,
    /// URI names of the peer's certificate, comma separated; may be empty.
    pub peer_uri_sans: String,
    /// DNS names of the peer's certificate, comma separated; may be empty.
    pub peer_dns_sans: String,
    /// The peer's certificate, if it showed one.
    pub peer: Option<Peer>,
    /// URI names of the certificate that it was shown.
    pub local_uri_sans: Arc<[String]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weak_suites_are_passed_over_beside_others_and_refused_by_themselves() {
        let suites = |names: &[&str]| {
            let params = TlsParams {
                cipher_suites: names.iter().map(|name| (*name).to_owned()).collect(),
                ..TlsParams::default()
            };
            let of_1_2 = |suite: &&rustls::SupportedCipherSuite| suite.version() != &TLS13;
            provider(&params).map(|made| made.cipher_suites.iter().filter(of_1_2).count())
        };
        let good = "ECDHE-RSA-AES128-GCM-SHA256";
        assert_eq!(
            suites(&["AES256-GCM-SHA384", good, "AES128-GCM-SHA256"]),
            Ok(1)
        );
        for refused in [&["AES256-GCM-SHA384"][..], &[good, "NULL-MD5"]] {
            assert!(suites(refused).is_err(), "{refused:?}");
        }
    }
}
