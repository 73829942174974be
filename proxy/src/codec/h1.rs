//! HTTP/1 with a client: one exchange after the other, driven by the connection's own task.
//!
//! The codec is ours: what comes is read into one buffer per thread, a head is parsed where it stands, a body that came
//! with its head is handed on as it is, any other is read when it is asked for. While an answer is made or under way, the
//! connection is watched: when its client goes away, whatever runs for it is dropped at once.

use super::{
    HTTP_1, Requests,
    client::{self, Client},
    h1_body::{self, Demand, Feeder},
    h1_refusal,
    h1_request::{self, Fault, Head, REQUEST_HEAD_BYTES_MAX},
    h1_response::{Asked, Outgoing},
};
use crate::{
    h1::{self, decoder::Decoder},
    http::{ConnectionInfo, Manager},
};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use outrigger_filters::{
    body::{AtHand, ClientBody, ResponseBody},
    error::Flag,
};
use std::{
    future::{Future, poll_fn},
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    time::Sleep,
};

/// A client that has ended its side may only have nothing more to say: so long it may still get its answer. Whoever has
/// left looks the same, and what runs for it is not to run on.
const HALF_CLOSED_GRACE: Duration = Duration::from_millis(50);
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// How HTTP on a connection ended.
pub(super) enum End {
    /// For good.
    Closed,
    /// What came was no HTTP.
    Malformed,
    /// The connection goes on as something else.
    Switched(Client),
}

/// Speaks until the client goes, or an answer or the exchange's state says that the connection is over.
pub(super) async fn serve(
    client: Client,
    manager: &Arc<Manager>,
    info: &Arc<ConnectionInfo>,
    requests: &Requests,
    limit: HeadLimit,
) -> End {
    let mut connection = Connection {
        client,
        manager,
        info,
        looks: false,
        half: HalfHead {
            manager,
            info,
            here: false,
            limit,
        },
        upload: None,
        interim: None,
        leaves: None,
        answering: false,
        read_closed: false,
    };
    let end = loop {
        let came = match poll_fn(|cx| connection.poll_head(cx)).await {
            None => break End::Closed,
            Some(Ok(came)) => came,
            Some(Err(fault)) => {
                connection.refuse(fault).await;
                break End::Malformed;
            }
        };
        if requests.one(HTTP_1) {
            info.exchange.leave();
        }
        let (request, asked) = connection.begin(came);
        match connection.exchange(request, asked).await {
            Ok(After::Next) => {}
            Ok(After::Close) => break End::Closed,
            Ok(After::Switch) => return End::Switched(connection.client),
            // A farewell would make a broken answer a whole one.
            Err(Gone) => return End::Closed,
        }
    };
    let _ = poll_fn(|cx| Pin::new(&mut connection.client).poll_shutdown(cx)).await;
    end
}

/// The client went away, its connection broke, or the answer did.
struct Gone;

impl From<io::Error> for Gone {
    fn from(error: io::Error) -> Self {
        tracing::debug!(%error, "downstream connection ended");
        Self
    }
}

/// What becomes of a connection after an exchange.
enum After {
    Next,
    Close,
    Switch,
}

/// A head, and what of its body came with it.
#[derive(Debug)]
pub(super) struct Came {
    pub(super) head: Head,
    data: Bytes,
    trailers: Option<Box<HeaderMap>>,
}

struct Connection<'a> {
    client: Client,
    manager: &'a Arc<Manager>,
    info: &'a Arc<ConnectionInfo>,
    /// What was read ahead has been looked at.
    looks: bool,
    half: HalfHead<'a>,
    /// The body of the request that runs, until all of it has come.
    upload: Option<Feeder>,
    /// What is left to say before an answer; nothing left of it means that it is to be seen on its way.
    interim: Option<&'static [u8]>,
    /// The client has ended its side: when that means that it has gone.
    leaves: Option<Pin<Box<Sleep>>>,
    /// The answer has begun.
    answering: bool,
    /// Where the next request would begin is not known.
    read_closed: bool,
}

impl Connection<'_> {
    /// The next head; `None` is the end.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Came, Fault>>> {
        if self.info.exchange.is_leaving() {
            return Poll::Ready(None);
        }
        let ahead = &mut self.client.ahead;
        let mut found = Ok(None);
        if !std::mem::replace(&mut self.looks, true) && !ahead.is_empty() {
            found = take_ahead(ahead);
            self.half.here = h1_request::has_begun(ahead);
        }
        while let Ok(None) = found {
            let read = h1::poll_read(&mut self.client.stream, cx, |bytes| {
                (!bytes.is_empty()).then(|| take(ahead, bytes))
            });
            match read {
                Poll::Pending => return self.half.poll_late(cx).map(|()| Some(Err(Fault::Late))),
                Poll::Ready(Ok(Some(more))) => found = more,
                Poll::Ready(Ok(None) | Err(_)) => return Poll::Ready(None),
            }
            self.half.here = h1_request::has_begun(ahead);
        }
        self.half.is_over();
        Poll::Ready(found.transpose())
    }

    /// Says what was wrong with a head.
    async fn refuse(&mut self, fault: Fault) {
        let head = std::mem::take(&mut self.client.ahead);
        let words = h1_refusal::answer(self.manager, self.info, &head, fault);
        if self.client.write_all(&words).await.is_ok() {
            let _ = self.client.flush().await;
        }
    }

    /// Makes a request of what came.
    fn begin(&mut self, came: Came) -> (Request<ClientBody>, Asked) {
        let Came {
            head,
            data,
            trailers,
        } = came;
        self.looks = false;
        self.answering = false;
        let asked = Asked {
            version: head.parts.version,
            head_only: head.parts.method == Method::HEAD,
            takes_trailers: head.takes_trailers,
            keep_alive: head.keep_alive,
        };
        let body = if head.body.is_done() && !head.expects {
            ClientBody::AtHand(AtHand {
                data,
                trailers,
                is_sized: head.is_sized,
            })
        } else {
            self.read_closed = head.body == Decoder::Broken;
            let (body, feeder) =
                h1_body::streaming(head.body, data, trailers, (head.is_sized, head.expects));
            self.upload = Some(feeder).filter(|feeder| !feeder.is_over());
            body
        };
        (Request::from_parts(head.parts, body), asked)
    }

    async fn exchange(
        &mut self,
        request: Request<ClientBody>,
        asked: Asked,
    ) -> Result<After, Gone> {
        let response = self.answer(request).await?;
        poll_fn(|cx| {
            self.abandon_if_unread(cx);
            Poll::Ready(())
        })
        .await;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // Where its body would end and the new protocol begin is not known.
            if self.upload.is_some() || self.read_closed {
                return Err(Gone);
            }
            self.respond(response, asked).await?;
            return Ok(After::Switch);
        }
        if self.respond(response, asked).await? {
            return Ok(After::Close);
        }
        self.finish_upload().await?;
        Ok(if self.read_closed {
            After::Close
        } else {
            After::Next
        })
    }

    /// Somebody may still read what the client sends.
    async fn finish_upload(&mut self) -> Result<(), Gone> {
        poll_fn(|cx| {
            while self.upload.is_some() {
                ready!(self.poll_client(cx))?;
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    /// An answer that came before all of its request says truly whether the connection goes on.
    fn abandon_if_unread(&mut self, cx: &mut Context<'_>) {
        let upload = self.upload.as_ref();
        if upload.is_some_and(|upload| upload.demand(cx) == Demand::Dropped) {
            self.abandon_upload(cx);
        }
    }

    async fn answer(
        &mut self,
        request: Request<ClientBody>,
    ) -> Result<Response<ResponseBody>, Gone> {
        // On the heap for as long as it runs: within the connection it would take its room while the answer streams.
        let mut handler = Box::pin(self.manager.handle(request, self.info));
        poll_fn(|cx| self.poll_beside(cx, |_, cx| handler.as_mut().poll(cx))).await
    }

    /// Whether the connection ends with the answer.
    async fn respond(
        &mut self,
        response: Response<ResponseBody>,
        mut asked: Asked,
    ) -> Result<bool, Gone> {
        asked.keep_alive &= !self.read_closed && !self.info.exchange.is_leaving();
        self.answering = true;
        let mut outgoing = Outgoing::new(response, asked);
        if self.leaves.is_some() {
            // It is taken for gone any moment.
            outgoing.hurry();
        }
        let sent = poll_fn(|cx| {
            self.poll_beside(cx, |this, cx| {
                ready!(this.poll_interim(cx))?;
                outgoing.poll_send(cx, &mut this.client.stream)
            })
        });
        sent.await??;
        Ok(outgoing.is_last())
    }

    /// Does some work while the client is looked after. Whether it is still there comes first: who has left needs no answer.
    fn poll_beside<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut work: impl FnMut(&mut Self, &mut Context<'_>) -> Poll<T>,
    ) -> Poll<Result<T, Gone>> {
        loop {
            let moved = self.poll_client(cx)?.is_ready();
            if let Poll::Ready(done) = work(self, cx) {
                return Poll::Ready(Ok(done));
            }
            // The work may have asked for more of what the client sends.
            let waits = self.upload.is_none() || self.poll_client(cx)?.is_pending();
            if !moved && waits {
                return Poll::Pending;
            }
        }
    }

    /// What the client sends, and whether it is there. Ready when whoever is served may have something to do.
    fn poll_client(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        let Some(upload) = &self.upload else {
            return self.poll_gone(cx);
        };
        match upload.demand(cx) {
            Demand::Nothing => return Poll::Pending,
            Demand::Dropped => self.abandon_upload(cx),
            Demand::Piece => ready!(self.poll_piece(cx)),
            Demand::Word => {
                if !self.answering {
                    self.interim.get_or_insert(CONTINUE);
                }
                ready!(self.poll_interim(cx))?;
                if let Some(upload) = &self.upload {
                    upload.said(cx);
                }
            }
        }
        self.upload.take_if(|upload| upload.is_over());
        Poll::Ready(Ok(()))
    }

    fn poll_interim(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(words) = &mut self.interim else {
            return Poll::Ready(Ok(()));
        };
        while !words.is_empty() {
            let sent = ready!(Pin::new(&mut self.client).poll_write(cx, words))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            *words = &words[sent..];
        }
        ready!(Pin::new(&mut self.client).poll_flush(cx))?;
        self.interim = None;
        Poll::Ready(Ok(()))
    }

    /// Reads on for whoever waits for the body.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(upload) = &mut self.upload else {
            return Poll::Ready(());
        };
        let (stream, ahead) = (&mut self.client.stream, &mut self.client.ahead);
        let read = h1::poll_read(stream, cx, |bytes| {
            let decoded = upload.decoder.decode(bytes);
            ahead.extend_from_slice(&bytes[decoded.used..]);
            let data = Bytes::copy_from_slice(&bytes[..decoded.payload]);
            (bytes.len(), data, decoded.trailers)
        });
        match ready!(read) {
            Ok((0, ..)) => upload.fail(h1_body::gone("it ended early")),
            Ok((_, data, trailers)) => upload.give(data, trailers, Some(cx)),
            Err(error) => upload.fail(h1_body::gone(&error.to_string())),
        }
        self.read_closed |= upload.decoder == Decoder::Broken;
        Poll::Ready(())
    }

    /// Nobody reads the body any more. If the rest of it is here, the connection can go on.
    fn abandon_upload(&mut self, cx: &mut Context<'_>) {
        let Some(mut upload) = self.upload.take() else {
            return;
        };
        if !upload.decoder.is_done() {
            let (stream, ahead) = (&mut self.client.stream, &mut self.client.ahead);
            let read = h1::poll_read(stream, cx, |bytes| {
                let decoded = upload.decoder.decode(bytes);
                ahead.extend_from_slice(&bytes[decoded.used..]);
            });
            self.read_closed |= read.is_pending() || !upload.decoder.is_done();
        }
    }

    /// Ready if the client has gone. What it sends instead is the beginning of its next request.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        while !self.read_closed && !h1_request::has_begun(&self.client.ahead) {
            // Empty lines, if anything.
            self.client.ahead = BytesMut::new();
            if self.leaves.is_none() && ready!(self.client.poll_ahead(cx))? > 0 {
                continue;
            }
            let after = || Box::pin(tokio::time::sleep(HALF_CLOSED_GRACE));
            ready!(self.leaves.get_or_insert_with(after).as_mut().poll(cx));
            return Poll::Ready(Err(Gone));
        }
        Poll::Pending
    }
}

/// Half a head of a client that goes away is told to log and metrics.
struct HalfHead<'a> {
    manager: &'a Arc<Manager>,
    info: &'a Arc<ConnectionInfo>,
    here: bool,
    limit: HeadLimit,
}

/// When a head that has begun is late, if that was asked for.
#[derive(Default)]
pub(super) struct HeadLimit(Option<Pin<Box<Sleep>>>);

impl HeadLimit {
    /// Ready when it is late; its time begins with the first call.
    pub(super) fn poll(&mut self, manager: &Manager, cx: &mut Context<'_>) -> Poll<()> {
        if self.0.is_none() {
            let limit = manager.config.load().manager.request_headers_timeout;
            self.0 = (!limit.is_zero()).then(|| Box::pin(tokio::time::sleep(limit)));
        }
        match &mut self.0 {
            Some(limit) => limit.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }
}

impl HalfHead<'_> {
    /// Ready when it is late.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.here {
            return Poll::Pending;
        }
        ready!(self.limit.poll(self.manager, cx));
        self.is_over();
        Poll::Ready(())
    }

    /// It is whole, or nobody waits for the rest of it.
    fn is_over(&mut self) {
        self.here = false;
        self.limit = HeadLimit::default();
    }
}

impl Drop for HalfHead<'_> {
    fn drop(&mut self) {
        if self.here {
            let gone = (0, Some(Flag::DownstreamConnectionTermination));
            self.manager
                .refused(self.info, gone, "downstream_remote_disconnect", 0);
        }
    }
}

/// Looks for a head in what came before and in what just came; what is left over is `ahead` then, also of a head that is
/// none.
pub(super) fn take(ahead: &mut BytesMut, bytes: &mut [u8]) -> Result<Option<Came>, Fault> {
    if ahead.is_empty() {
        let found = parse(bytes);
        let used = found.as_ref().map_or(0, |found| found.used);
        ahead.extend_from_slice(&bytes[used..]);
        return found.map(|found| found.came);
    }
    let before = ahead.len();
    ahead.extend_from_slice(bytes);
    let mut came = None;
    if h1_request::may_be_whole(ahead, before) {
        came = take_ahead(ahead)?;
    }
    if came.is_none() && ahead.len() >= REQUEST_HEAD_BYTES_MAX {
        return Err(Fault::TooLarge);
    }
    Ok(came)
}

/// Looks for a head in what came before alone.
fn take_ahead(ahead: &mut BytesMut) -> Result<Option<Came>, Fault> {
    let found = parse(ahead)?;
    client::consume(ahead, found.used);
    Ok(found.came)
}

/// What [`parse`] found.
struct Found {
    came: Option<Came>,
    used: usize,
}

fn parse(bytes: &mut [u8]) -> Result<Found, Fault> {
    let (mut used, mut came) = (0, None);
    if bytes.ends_with(b"\n") && !h1_request::has_begun(bytes) {
        // Empty lines may stand before a request.
        used = bytes.len();
    } else if let Some(mut head) = h1_request::read(bytes)? {
        let rest = &mut bytes[head.used..];
        let decoded = head.body.decode(rest);
        used = head.used + decoded.used;
        came = Some(Came {
            data: Bytes::copy_from_slice(&rest[..decoded.payload]),
            trailers: decoded.trailers,
            head,
        });
    }
    Ok(Found { came, used })
}
