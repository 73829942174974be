//! Connections to the port of xDS, with or without TLS. Each shakes hands in a task of its own, so that none waits for another.

use super::{Access, Peer, Proven, verify::Foreign};
use crate::ca;
use rustls::{CertificateError, Error};
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// A handshake may take so long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at once; further connections wait until there is room.
const HANDSHAKES_MAX: usize = 1024;
/// For its streams to be told why their connection is closed.
const FAREWELL: Duration = Duration::from_millis(500);
/// After a connection could not be accepted, which is mostly for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

/// A connection, and who is at its other end.
pub struct Connection {
    bytes: Box<dyn Bytes>,
    peer: Peer,
    /// When it is closed from our side, whatever goes on.
    over: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.over.as_mut().poll(context).is_ready() {
            self.over = Box::pin(std::future::ready(()));
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.bytes).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.bytes).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.bytes).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.bytes).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.bytes).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.bytes.is_write_vectored()
    }
}

/// Connections as they come, until what comes back is dropped.
#[must_use]
pub fn incoming(
    listener: TcpListener,
    access: Option<Arc<Access>>,
) -> ReceiverStream<io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let room = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        loop {
            let Ok(permit) = room.clone().acquire_owned().await else {
                return;
            };
            tokio::select! {
                () = sender.closed() => return,
                accepted = listener.accept() => match accepted {
                    Ok((socket, address)) => {
                        let peer = Peer { address: Some(address), ..Peer::default() };
                        tokio::spawn(take(socket, peer, access.clone(), sender.clone(), permit));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    });
    ReceiverStream::new(receiver)
}

async fn take(
    socket: TcpStream,
    peer: Peer,
    access: Option<Arc<Access>>,
    sender: mpsc::Sender<io::Result<Connection>>,
    _permit: OwnedSemaphorePermit,
) {
    // Answers are small, and waited for.
    let _ = socket.set_nodelay(true);
    let connection = match access {
        None => Connection {
            bytes: Box::new(socket),
            peer,
            over: Box::pin(std::future::pending()),
        },
        Some(access) => {
            let address = peer.address;
            match shake(socket, peer, access).await {
                Ok(connection) => {
                    count("ok");
                    connection
                }
                Err(error) => {
                    count(reason(&error));
                    tracing::warn!(?address, %error, "TLS handshake failed");
                    return;
                }
            }
        }
    };
    // Nobody is there any more when the process ends.
    let _ = sender.send(Ok(connection)).await;
}

async fn shake(socket: TcpStream, peer: Peer, access: Arc<Access>) -> io::Result<Connection> {
    let acceptor = TlsAcceptor::from(access.material().server.clone());
    let stream = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(socket)).await??;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let chain: Vec<_> = chain.iter().map(|der| der.clone().into_owned()).collect();
    let leaf = chain
        .first()
        .ok_or_else(|| io::Error::other("no certificate"))?;
    let over = Arc::new(Notify::new());
    let proven = Proven {
        id: ca::id_of(leaf).map_err(io::Error::other)?,
        chain,
        access,
        over: over.clone(),
    };
    Ok(Connection {
        bytes: Box::new(stream),
        over: Box::pin(async move {
            over.notified().await;
            sleep(FAREWELL).await;
        }),
        peer: Peer {
            proven: Some(Arc::new(proven)),
            ..peer
        },
    })
}

fn count(result: &'static str) {
    metrics::counter!("outrigger_control_plane_handshakes_total", "result" => result).increment(1);
}

fn reason(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::TimedOut {
        return "timeout";
    }
    let inner = error.get_ref().and_then(|error| error.downcast_ref());
    match inner {
        Some(Error::NoCertificatesPresented) => "no_certificate",
        Some(Error::InvalidCertificate(CertificateError::Other(other)))
            if other.0.is::<Foreign>() =>
        {
            "identity"
        }
        Some(Error::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        )) => "expired",
        Some(Error::InvalidCertificate(_)) => "untrusted",
        _ => "error",
    }
}
