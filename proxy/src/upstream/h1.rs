//! HTTP/1.1 to an endpoint: one exchange at a time on a connection that its own request drives.
//!
//! The codec is ours: the head is serialised from where it stands (so a request that may be sent again is not copied),
//! what comes is read into one buffer per thread, and all that came at once is handed on as one frame.

use super::{
    IDLE_CONNECTIONS_MAX, IDLE_MS_MAX,
    connect::{OpenConnection, connect},
    h1_request::{Outgoing, SendError},
    h1_response::{self, RESPONSE_HEAD_BYTES_MAX},
    headers_within, is_spent,
    queue::{self, Queue, Slot},
};
use crate::{
    h1::{self, decoder::Decoder},
    tls, worker,
};
use ahash::AHashMap;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, response::Parts};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use outrigger_filters::{
    body::{BodyError, RequestBody, ResponseBody},
    endpoints::{Endpoint, SendOptions, clock_ms},
    error::{Error, Flag, Retry},
};
use outrigger_xds::resource::{cluster::UpstreamProtocol, endpoint::Address};
use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, ReadBuf},
    task::unconstrained,
};

/// A reused connection that ends this soon after a request was sent on it, with nothing received, had been closed by an
/// upstream that had not seen the request. Later, the upstream may have begun to work on it.
const STALE_MS_MAX: u64 = 100;

/// A connection with nothing running on it, or the one an exchange runs on.
struct Conn {
    socket: tls::Stream,
    open: OpenConnection,
    idle_since_ms: u64,
    /// That it has served.
    requests: u32,
}

/// By where they lead.
type Idle = AHashMap<Address, Vec<Conn>>;

thread_local! {
    static IDLE: RefCell<Idle> = RefCell::default();
    /// By [`Secured`](outrigger_filters::endpoints::Secured): never mixed, not with plain ones either.
    static IDLE_TLS: RefCell<AHashMap<u64, Idle>> = RefCell::default();
}

fn with_idle<T>(endpoint: &Endpoint, use_it: impl FnOnce(&mut Idle) -> T) -> T {
    match &endpoint.tls {
        None => IDLE.with_borrow_mut(use_it),
        Some(tls) => IDLE_TLS.with_borrow_mut(|all| use_it(all.entry(tls.id).or_default())),
    }
}

impl Conn {
    async fn open(
        endpoint: &Arc<Endpoint>,
        options: SendOptions,
        slot: Slot,
    ) -> Result<Self, Error> {
        let spoken = UpstreamProtocol::Http1;
        let (socket, open) = connect(endpoint, spoken, options.connect_timeout, slot).await?;
        Ok(Self {
            socket,
            open,
            idle_since_ms: 0,
            requests: 0,
        })
    }

    /// A new one, or, if there may be no more, the next that comes free.
    async fn queued(endpoint: &Arc<Endpoint>, options: SendOptions) -> Result<Self, Error> {
        let mut queue = Queue::enter(endpoint, &options)?;
        loop {
            if let Some(slot) = queue.turn().await? {
                return Self::open(endpoint, options, slot).await;
            }
            if let Some(conn) = Self::reuse(endpoint).await {
                return Ok(conn);
            }
        }
    }

    /// Whether it has been idle for no longer than it may.
    fn is_fresh(&self, now_ms: u64) -> bool {
        let idle_ms = now_ms.saturating_sub(self.idle_since_ms);
        idle_ms < IDLE_MS_MAX && !self.open.is_idle_too_long(idle_ms)
    }

    /// Whether its peer has neither closed it nor said anything unasked.
    fn poll_usable(&mut self, cx: &mut Context<'_>) -> bool {
        let mut byte = [0];
        let mut read = ReadBuf::new(&mut byte);
        Pin::new(&mut self.socket)
            .poll_read(cx, &mut read)
            .is_pending()
    }

    async fn reuse(endpoint: &Endpoint) -> Option<Self> {
        loop {
            let mut conn = with_idle(endpoint, |idle| idle.get_mut(&endpoint.address)?.pop())?;
            let fresh = conn.is_fresh(clock_ms());
            // A task that has done its share for this turn is told that every socket waits, closed ones too.
            let asked = unconstrained(poll_fn(|cx| Poll::Ready(conn.poll_usable(cx))));
            if fresh && asked.await {
                return Some(conn);
            }
        }
    }

    fn keep(mut self, endpoint: &Endpoint) {
        self.requests += 1;
        if is_spent(endpoint, self.requests) {
            return;
        }
        self.idle_since_ms = clock_ms();
        with_idle(endpoint, |idle| {
            if let Some(conns) = idle.get_mut(&endpoint.address) {
                // Old ones are at the front; they go first.
                if conns.len() >= IDLE_CONNECTIONS_MAX {
                    conns.remove(0);
                }
                conns.push(self);
            } else {
                idle.insert(endpoint.address.clone(), vec![self]);
            }
        });
        queue::freed(endpoint);
    }
}

/// Closes idle connections of this thread that are too old to be reused.
pub(super) fn close_idle() {
    let now = clock_ms();
    let sweep = |idle: &mut Idle| {
        idle.retain(|_, conns| {
            conns.retain(|conn| conn.is_fresh(now));
            !conns.is_empty()
        });
    };
    IDLE.with_borrow_mut(sweep);
    IDLE_TLS.with_borrow_mut(|all| {
        all.retain(|_, idle| {
            sweep(idle);
            !idle.is_empty()
        });
    });
}

/// One exchange.
pub(super) async fn send(
    endpoint: &Arc<Endpoint>,
    request: &mut Request<RequestBody>,
    options: SendOptions,
) -> Result<Response<ResponseBody>, Error> {
    let Some(conn) = Conn::reuse(endpoint).await else {
        // Boxed, as it is rare: opening a connection would be part of every exchange's future.
        return Box::pin(send_anew(endpoint, request, options)).await;
    };
    let sent_ms = clock_ms();
    match exchange(conn, endpoint, request, options).await {
        // The peer was closing the connection this very moment: nothing came back, and a new one will tell.
        Err(Failed { mut error, heard }) if !heard && closed_while_idle(&error, sent_ms) => {
            metrics::counter!("outrigger_upstream_stale_connections_total").increment(1);
            // The others are no younger, and whoever tries again is to get a new one.
            with_idle(endpoint, |idle| idle.remove(&endpoint.address));
            if options.replace_stale && !request.body().is_spent() {
                return Box::pin(send_anew(endpoint, request, options)).await;
            }
            error.stale = true;
            error.retry = Retry::NothingSent;
            Err(error)
        }
        outcome => outcome.map_err(|failed| failed.error),
    }
}

async fn send_anew(
    endpoint: &Arc<Endpoint>,
    request: &mut Request<RequestBody>,
    options: SendOptions,
) -> Result<Response<ResponseBody>, Error> {
    let conn = Conn::queued(endpoint, options).await?;
    exchange(conn, endpoint, request, options)
        .await
        .map_err(|failed| failed.error)
}

/// An exchange that came to no answer.
struct Failed {
    error: Error,
    /// Part of an answer had come: the upstream had read the request, and may work on it.
    heard: bool,
}

fn closed_while_idle(error: &Error, sent_ms: u64) -> bool {
    error.retry != Retry::No
        && clock_ms().saturating_sub(sent_ms) <= STALE_MS_MAX
        && matches!(
            error.flag,
            Flag::UpstreamConnectionTermination
                | Flag::UpstreamConnectionFailure
                | Flag::UpstreamRemoteReset
        )
}

/// No `async fn`: its future would have room for the connection twice, as it is given and within `Asking`.
fn exchange<'a>(
    conn: Conn,
    endpoint: &'a Arc<Endpoint>,
    request: &'a mut Request<RequestBody>,
    options: SendOptions,
) -> impl Future<Output = Result<Response<ResponseBody>, Failed>> + Send + 'a {
    let body = request.body_mut().hand_over();
    let upload = body.upload();
    let mut asking = Asking {
        conn,
        outgoing: Some(Outgoing::new(request, body)),
        unsent: None,
        came: Vec::new(),
        method: request.method().clone(),
    };
    async move {
        let answer = headers_within(
            options.headers_timeout,
            upload.as_ref(),
            Error::upstream_timeout,
            poll_fn(|cx| asking.poll_answer(cx)),
        )
        .await;
        match answer.and_then(std::convert::identity) {
            Ok((parts, lead)) => Ok(asking.respond(parts, lead, endpoint)),
            Err(error) => {
                let heard = !asking.came.is_empty();
                let untouched = asking.outgoing.filter(|outgoing| !outgoing.has_begun());
                if let Some(outgoing) = untouched {
                    *request.body_mut() = outgoing.into_body();
                }
                Err(Failed { error, heard })
            }
        }
    }
}

/// An exchange before its response's head.
struct Asking {
    conn: Conn,
    /// What is left to send.
    outgoing: Option<Outgoing>,
    /// Why the rest cannot be sent. An answer may be there all the same.
    unsent: Option<io::Error>,
    /// Of a head that did not come in one piece.
    came: Vec<u8>,
    method: Method,
}

/// What came with a head, and what is to come.
struct Lead {
    body: Decoder,
    keep_alive: bool,
    is_sized: bool,
    data: Bytes,
    trailers: Option<Box<HeaderMap>>,
}

type Answer = Result<(Parts, Lead), Error>;

impl Asking {
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Answer> {
        if let Some(outgoing) = &mut self.outgoing
            && self.unsent.is_none()
            && let Poll::Ready(sent) = outgoing.poll_send(cx, &mut self.conn.socket)
        {
            match sent {
                Ok(()) => self.outgoing = None,
                Err(SendError::Body(error)) => return Poll::Ready(Err(of_body(&error))),
                Err(SendError::Io(error)) => self.unsent = Some(error),
            }
        }
        loop {
            let (came, method) = (&mut self.came, &self.method);
            let socket = &mut self.conn.socket;
            let read = h1::poll_read(socket, cx, |bytes| take_head(came, bytes, method));
            let end = match ready!(read) {
                Ok(Some(Ok(None))) => continue,
                Ok(Some(Ok(Some(answer)))) => return Poll::Ready(Ok(answer)),
                Ok(Some(Err(error))) => return Poll::Ready(Err(error)),
                Ok(None) => io::ErrorKind::UnexpectedEof.into(),
                Err(error) => error,
            };
            let error = self.unsent.take().unwrap_or(end);
            return Poll::Ready(Err(self.broken(&error)));
        }
    }

    /// The connection ended without an answer.
    fn broken(&self, error: &io::Error) -> Error {
        let begun = self.outgoing.as_ref().is_none_or(Outgoing::has_begun);
        // Half an answer tells that the upstream was at work, whatever is still unsent.
        let retry = if begun || !self.came.is_empty() {
            Retry::NothingReceived
        } else {
            Retry::NothingSent
        };
        let (flag, reason) = if was_cut(error) {
            (
                Flag::UpstreamConnectionTermination,
                "connection termination",
            )
        } else {
            (Flag::UpstreamRemoteReset, "remote reset")
        };
        Error::upstream_reset(flag, reason, retry)
    }

    fn respond(self, parts: Parts, lead: Lead, endpoint: &Arc<Endpoint>) -> Response<ResponseBody> {
        let mut incoming = Incoming {
            lead: lead.data,
            is_sized: lead.is_sized,
            body: lead.body,
            trailers: lead.trailers,
            exchange: Some(Exchange {
                conn: self.conn,
                // What could not be sent is not tried again; the connection ends with the response.
                outgoing: self.outgoing.map(Box::new),
                is_cut: self.unsent.is_some(),
                keep_alive: lead.keep_alive,
                endpoint: endpoint.clone(),
            }),
        };
        if incoming.body.is_done() {
            incoming.release();
        }
        Response::from_parts(parts, incoming.boxed_unsync())
    }
}

/// Looks for the head in what came before and in what just came. `None` is the connection's end.
fn take_head(
    came: &mut Vec<u8>,
    bytes: &mut [u8],
    method: &Method,
) -> Option<Result<Option<(Parts, Lead)>, Error>> {
    if bytes.is_empty() {
        return None;
    }
    if came.is_empty() {
        let found = answer(bytes, method);
        if matches!(found, Ok(None)) {
            came.extend_from_slice(bytes);
        }
        return Some(found);
    }
    came.extend_from_slice(bytes);
    Some(match answer(came, method) {
        Ok(None) if came.len() >= RESPONSE_HEAD_BYTES_MAX => Err(garbage()),
        found => found,
    })
}

fn answer(bytes: &mut [u8], method: &Method) -> Result<Option<(Parts, Lead)>, Error> {
    let Some(head) = h1_response::read(bytes, method).map_err(|_| garbage())? else {
        return Ok(None);
    };
    let rest = &mut bytes[head.used..];
    let mut body = head.body;
    let is_sized = body.left().is_some();
    let decoded = body.decode(rest);
    let lead = Lead {
        // More than was announced: whatever it is, nobody asked for it.
        keep_alive: head.keep_alive && decoded.used == rest.len(),
        is_sized,
        data: Bytes::copy_from_slice(&rest[..decoded.payload]),
        trailers: decoded.trailers,
        body,
    };
    Ok(Some((head.parts, lead)))
}

fn garbage() -> Error {
    Error::upstream_reset(
        Flag::UpstreamProtocolError,
        "protocol error",
        Retry::NothingReceived,
    )
}

/// The request's body failed, not the upstream.
fn of_body(error: &BodyError) -> Error {
    match error.flag {
        Flag::DownstreamConnectionTermination => {
            Error::downstream_gone("the request body ended early")
        }
        Flag::DownstreamProtocolError => Error::downstream_garbage(),
        _ => Error::upstream_reset(
            Flag::UpstreamRemoteReset,
            "remote reset",
            Retry::NothingReceived,
        ),
    }
}

/// The connection was cut, by its peer or its peer's system.
fn was_cut(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof, WriteZero};
    matches!(
        error.kind(),
        ConnectionReset | BrokenPipe | ConnectionAborted | UnexpectedEof | WriteZero
    )
}

/// The connection of a response that is not over.
struct Exchange {
    conn: Conn,
    /// The rest of a request whose response began before it was sent.
    outgoing: Option<Box<Outgoing>>,
    /// The rest of the request cannot be sent.
    is_cut: bool,
    keep_alive: bool,
    endpoint: Arc<Endpoint>,
}

/// A response body that drives its own connection.
struct Incoming {
    /// Came with the head.
    lead: Bytes,
    /// Its length was announced. Of any other it stays untold, though all of it came at once: it may have trailers.
    is_sized: bool,
    body: Decoder,
    /// Come last.
    trailers: Option<Box<HeaderMap>>,
    /// Until the body is over, or broken.
    exchange: Option<Exchange>,
}

impl Incoming {
    /// The body has come whole: its connection is for others.
    fn release(&mut self) {
        if let Some(exchange) = self.exchange.take()
            && exchange.keep_alive
            && exchange.outgoing.is_none()
        {
            exchange.conn.keep(&exchange.endpoint);
        }
    }

    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        let Some(exchange) = &mut self.exchange else {
            return Poll::Ready(None);
        };
        if self.body == Decoder::Broken {
            return Poll::Ready(Some(Err(BodyError::new(
                Flag::UpstreamProtocolError,
                "the engine's response broke off: what came is no HTTP",
            ))));
        }
        if let Err(error) = exchange.poll_upload(cx) {
            return Poll::Ready(Some(Err(error)));
        }
        let body = &mut self.body;
        let read = h1::poll_read(&mut exchange.conn.socket, cx, |bytes| {
            if bytes.is_empty() {
                return None;
            }
            let decoded = body.decode(bytes);
            let spare = decoded.used < bytes.len();
            let data = Bytes::copy_from_slice(&bytes[..decoded.payload]);
            Some((data, decoded.trailers, spare))
        });
        match ready!(read) {
            Ok(Some((data, trailers, spare))) => {
                if !self.is_sized {
                    worker::relays_events();
                }
                self.trailers = trailers;
                exchange.keep_alive &= !spare;
                Poll::Ready(Some(Ok(data)))
            }
            Ok(None) if self.body.may_close() => {
                self.body = Decoder::Done;
                exchange.keep_alive = false;
                Poll::Ready(Some(Ok(Bytes::new())))
            }
            Ok(None) => Poll::Ready(Some(Err(broke_off(&io::ErrorKind::UnexpectedEof.into())))),
            Err(error) => Poll::Ready(Some(Err(broke_off(&error)))),
        }
    }
}

impl Exchange {
    /// Sends on while the response comes.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Result<(), BodyError> {
        if let Some(outgoing) = &mut self.outgoing
            && !self.is_cut
            && let Poll::Ready(sent) = outgoing.poll_send(cx, &mut self.conn.socket)
        {
            match sent {
                Ok(()) => self.outgoing = None,
                Err(SendError::Body(error)) => return Err(error),
                Err(SendError::Io(_)) => self.is_cut = true,
            }
        }
        Ok(())
    }
}

fn broke_off(error: &io::Error) -> BodyError {
    // In the middle of a body an orderly end breaks HTTP; being cut does not.
    let flag = if error.kind() == io::ErrorKind::UnexpectedEof {
        Flag::UpstreamProtocolError
    } else if was_cut(error) {
        Flag::UpstreamConnectionTermination
    } else {
        Flag::UpstreamRemoteReset
    };
    BodyError::new(
        flag,
        format_args!("the engine's response broke off: {error}"),
    )
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if !this.lead.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut this.lead)))));
        }
        while !this.body.is_done() {
            match ready!(this.poll_more(cx)) {
                None => return Poll::Ready(None),
                Some(Err(error)) => {
                    this.exchange = None;
                    return Poll::Ready(Some(Err(error)));
                }
                Some(Ok(data)) => {
                    if this.body.is_done() {
                        this.release();
                    }
                    if !data.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(data))));
                    }
                }
            }
        }
        let trailers = this.trailers.take();
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(*trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.lead.is_empty() && self.trailers.is_none() && self.body.is_done()
    }

    fn size_hint(&self) -> SizeHint {
        let lead = self.lead.len() as u64;
        match self.body.left() {
            Some(left) if self.is_sized => SizeHint::with_exact(left + lead),
            _ => {
                let mut hint = SizeHint::new();
                hint.set_lower(lead);
                hint
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::resource::route_action::Priority;
    use std::{pin::pin, time::Duration};

    #[tokio::test]
    async fn a_closed_connection_is_seen_by_a_task_that_has_done_its_share() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let endpoint = Arc::new(Endpoint {
            address: Address {
                host: address.ip().to_string(),
                port: address.port(),
            },
            ..Endpoint::default()
        });
        let options = SendOptions {
            connect_timeout: Duration::from_secs(5),
            headers_timeout: None,
            replace_stale: true,
            upgrade: false,
            priority: Priority::Default,
        };
        let conn = Conn::queued(&endpoint, options).await.unwrap();
        conn.keep(&endpoint);
        assert!(Conn::reuse(&endpoint).await.is_some_and(|conn| {
            conn.keep(&endpoint);
            true
        }));
        drop(listener.accept().await.unwrap());
        tokio::time::sleep(Duration::from_millis(50)).await;
        let reused = poll_fn(|cx| {
            while pin!(tokio::task::consume_budget()).poll(cx).is_ready() {}
            pin!(Conn::reuse(&endpoint)).poll(cx)
        });
        assert!(reused.await.is_none(), "it is closed");
    }
}
