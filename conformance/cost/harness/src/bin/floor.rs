//! What does the plainest reverse proxy cost? hyper with hyper-util's pooled client, on one thread.
//!
//! Round robin, hop-by-hop headers dropped, bodies streamed: it has no feature that a measurement could blame.
//! usage: `floor [--tls CERTIFICATE KEY] LISTEN_PORT UPSTREAM_PORT…`

use http::{
    HeaderName, Request, Response, StatusCode, Uri, Version, header, uri::Authority,
    uri::PathAndQuery,
};
use http_body_util::{BodyExt, Empty, combinators::BoxBody};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio_rustls::rustls::{self, ServerConfig};

const ACCEPT_BACKLOG: u32 = 16384;
const POOL_IDLE: Duration = Duration::from_secs(60);
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

struct Floor {
    client: Client<HttpConnector, Incoming>,
    upstreams: Vec<Authority>,
    next: AtomicUsize,
}

impl Floor {
    async fn proxy(
        self: Arc<Self>,
        mut request: Request<Incoming>,
    ) -> Result<Response<BoxBody<Bytes, hyper::Error>>, http::Error> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.upstreams.len();
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::builder()
            .scheme("http")
            .authority(self.upstreams[turn].clone())
            .path_and_query(path.unwrap_or_else(|| PathAndQuery::from_static("/")))
            .build()?;
        *request.version_mut() = Version::HTTP_11;
        for name in &HOP_BY_HOP {
            request.headers_mut().remove(name);
        }
        if let Ok(mut response) = self.client.request(request).await {
            for name in &HOP_BY_HOP {
                response.headers_mut().remove(name);
            }
            return Ok(response.map(BodyExt::boxed));
        }
        let body = Empty::new().map_err(|never| match never {}).boxed();
        Response::builder()
            .status(StatusCode::BAD_GATEWAY)
            .body(body)
    }

    async fn accept(self: Arc<Self>, socket: TcpStream, tls: Option<TlsAcceptor>) {
        match tls {
            None => self.serve(socket).await,
            Some(tls) => {
                if let Ok(stream) = tls.accept(socket).await {
                    self.serve(stream).await;
                }
            }
        }
    }

    async fn serve(self: Arc<Self>, socket: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new());
        let service = service_fn(move |request| Arc::clone(&self).proxy(request));
        // A client that leaves in mid-request is not the proxy's fault; the load generator counts what it misses.
        let _ = builder
            .serve_connection(TokioIo::new(socket), service)
            .await;
    }
}

/// TLS 1.3 or 1.2 with the certificate of these files.
fn acceptor(certificate: &str, key: &str) -> Result<TlsAcceptor, Box<dyn Error>> {
    let certificates = CertificateDer::pem_file_iter(certificate)?.collect::<Result<_, _>>()?;
    let mut config =
        ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(certificates, PrivateKeyDer::from_pem_file(key)?)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn run(
    listen: u16,
    upstreams: Vec<Authority>,
    tls: Option<TlsAcceptor>,
) -> Result<(), Box<dyn Error>> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client = Client::builder(TokioExecutor::new())
        .pool_idle_timeout(POOL_IDLE)
        .pool_timer(TokioTimer::new())
        .build(connector);
    let floor = Arc::new(Floor {
        client,
        upstreams,
        next: AtomicUsize::new(0),
    });
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(([127, 0, 0, 1], listen).into())?;
    let listener = socket.listen(ACCEPT_BACKLOG)?;
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        tokio::spawn(Arc::clone(&floor).accept(socket, tls.clone()));
    }
}

const USAGE: &str = "usage: floor [--tls CERTIFICATE KEY] LISTEN_PORT UPSTREAM_PORT…";

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).peekable();
    let mut tls = None;
    if arguments.next_if(|first| first == "--tls").is_some() {
        let certificate = arguments.next().ok_or(USAGE)?;
        tls = Some(acceptor(&certificate, &arguments.next().ok_or(USAGE)?)?);
    }
    let listen = arguments.next().ok_or(USAGE)?.parse()?;
    let upstreams: Vec<Authority> = arguments
        .map(|port| format!("127.0.0.1:{port}").parse())
        .collect::<Result<_, _>>()?;
    if upstreams.is_empty() {
        return Err(USAGE.into());
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(run(listen, upstreams, tls))
}
