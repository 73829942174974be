//! What does the plainest reverse proxy cost? hyper with hyper-util's pooled client, on one thread.
//!
//! Round robin, hop-by-hop headers dropped, bodies streamed: it has no feature that a measurement could blame.
//! usage: `floor LISTEN_PORT UPSTREAM_PORT…`

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
use tokio::net::{TcpSocket, TcpStream};

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

    async fn serve(self: Arc<Self>, socket: TcpStream) {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new());
        let service = service_fn(move |request| Arc::clone(&self).proxy(request));
        // A client that leaves in mid-request is not the proxy's fault; the load generator counts what it misses.
        let _ = builder
            .serve_connection(TokioIo::new(socket), service)
            .await;
    }
}

async fn run(listen: u16, upstreams: Vec<Authority>) -> Result<(), Box<dyn Error>> {
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
        tokio::spawn(Arc::clone(&floor).serve(socket));
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let listen = arguments
        .next()
        .ok_or("usage: floor LISTEN_PORT UPSTREAM_PORT…")?
        .parse()?;
    let upstreams: Vec<Authority> = arguments
        .map(|port| format!("127.0.0.1:{port}").parse())
        .collect::<Result<_, _>>()?;
    if upstreams.is_empty() {
        return Err("usage: floor LISTEN_PORT UPSTREAM_PORT…".into());
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(run(listen, upstreams))
}
