//! An HTTP/2 server that gives back what it gets: body, trailers, and the request's headers as `x-got-…`.

use bytes::Bytes;
use http::{HeaderName, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};
use tokio::{net::TcpListener, task::JoinHandle};

/// The server.
pub struct EchoH2 {
    /// Where it listens.
    pub address: SocketAddr,
    connections: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl EchoH2 {
    /// Serves.
    ///
    /// # Panics
    /// If no port is free.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("invariant: a free port");
        let address = listener.local_addr().expect("invariant: a bound socket");
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = connections.clone();
        let task = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                counted.fetch_add(1, SeqCst);
                let serve = http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(socket), service_fn(echo));
                tokio::spawn(async move { drop(serve.await) });
            }
        });
        Self {
            address,
            connections,
            task,
        }
    }

    /// Connections so far.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }
}

impl Drop for EchoH2 {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Echoed = UnsyncBoxBody<Bytes, Infallible>;

async fn echo(request: Request<Incoming>) -> Result<Response<Echoed>, hyper::Error> {
    let (parts, body) = request.into_parts();
    let collected = body.collect().await?;
    let trailers = collected.trailers().cloned();
    let mut frames = vec![Ok(Frame::data(collected.to_bytes()))];
    frames.extend(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
    let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
    let mut response = Response::new(body);
    for (name, value) in &parts.headers {
        if let Ok(name) = format!("x-got-{name}").parse::<HeaderName>() {
            response.headers_mut().append(name, value.clone());
        }
    }
    Ok(response)
}
