//! Discovery over gRPC: all types over one stream (ADS), or one type over a stream of its own, in both protocols.
//!
//! A stream holds one response until the client takes it. Only then is the next one made, of what is true then: a client that is
//! slow gets changes merged, and nothing queues up for it.

mod dialect;
mod made_of;
mod services;

pub use services::Discovery;

use crate::{
    catalog::Catalog,
    clients::{Clients, Entry, STREAMS_MAX},
    issued::Seen,
    rollout,
    session::{Client, Refusal, Request, Response},
    tls::Peer,
    views,
};
use dialect::Dialect;
use made_of::MadeOf;
use outrigger_xds::subscription::Kind;
use std::{
    error::Error,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// Longer requests end their stream.
pub const REQUEST_BYTES_MAX: usize = 16 << 20;

/// A response each time there is room for one.
type Answers<T> = ReceiverStream<Result<T, Status>>;

/// What all streams share.
#[derive(Debug, Clone)]
pub struct Shared {
    /// What is served.
    pub catalog: Arc<Catalog>,
    /// Who is served.
    pub clients: Arc<Clients>,
    /// Set when streams are to end: by then, each at a moment of its own.
    pub ending: watch::Receiver<Option<Ending>>,
}

/// The end of all streams.
#[derive(Debug, Clone, Copy)]
pub struct Ending {
    /// When it began.
    pub since: Instant,
    /// Over which time streams end, so that not all clients come back elsewhere at once.
    pub over: Duration,
}

/// Moments over which the ends of streams are spread.
const ENDING_STEPS: u32 = 64;

impl Ending {
    fn of_stream(self, id: u64) -> Instant {
        let step = u32::try_from(id % u64::from(ENDING_STEPS)).unwrap_or_default();
        self.since + self.over * step / ENDING_STEPS
    }
}

/// A service that carries one type, or all.
#[derive(Debug, Clone, Copy)]
struct Served {
    name: &'static str,
    kind: Option<Kind>,
}

impl Served {
    /// On a stream of one type, that need not be said.
    fn typed(self, mut request: Request) -> Result<Request, Status> {
        let Some(kind) = self.kind else {
            return Ok(request);
        };
        if request.type_url.is_empty() {
            kind.type_url().clone_into(&mut request.type_url);
        } else if request.type_url != kind.type_url() {
            refused("type");
            let message = format!("{} are not served here", request.type_url);
            return Err(Status::invalid_argument(message));
        }
        Ok(request)
    }
}

/// A stream is refused, or ended, because of what its client did.
pub(crate) fn refused(reason: &'static str) {
    metrics::counter!("outrigger_control_plane_streams_refused_total", "reason" => reason)
        .increment(1);
}

/// Why no request can be read any more: silent if the client or its connection is gone, else what it is told.
pub(crate) fn unread(status: Status) -> Result<(), Status> {
    // Errors of the transport have a cause; those of what came have none.
    if status.code() == Code::Cancelled || status.source().is_some() {
        return Ok(());
    }
    let is_too_long = status.code() == Code::OutOfRange;
    refused(if is_too_long { "limit" } else { "request" });
    tracing::warn!(%status, "a request cannot be read");
    Err(status)
}

fn status(refusal: &Refusal) -> Status {
    let message = refusal.to_string();
    match refusal {
        Refusal::Anonymous | Refusal::NoType => {
            refused("request");
            Status::invalid_argument(message)
        }
        Refusal::TooManyTypes | Refusal::TooManyNames(_) | Refusal::TooLong => {
            refused("limit");
            Status::resource_exhausted(message)
        }
    }
}

impl Shared {
    /// What is served; nobody is told that there is nothing before the sources were read.
    fn served(&self) -> Result<Arc<views::Served>, Status> {
        let served = self.catalog.served();
        served.ok_or_else(|| {
            Status::unavailable("no good configuration yet: see /sources of its admin")
        })
    }

    fn converse<D: Dialect>(
        &self,
        served: Served,
        request: tonic::Request<Streaming<D::Request>>,
    ) -> Result<tonic::Response<Answers<D::Response>>, Status> {
        self.served()?;
        let peer = Peer::of(&request);
        let entry = self.clients.enter(served.name, D::PROTOCOL, peer.address);
        let entry = entry.ok_or_else(|| {
            refused("limit");
            let message = format!("more than {STREAMS_MAX} streams at this control plane");
            Status::resource_exhausted(message)
        })?;
        let (sender, receiver) = mpsc::channel(1);
        let conversation = Conversation::<D> {
            served,
            seen: Seen::new(peer.clone(), entry.stream.id),
            peer,
            entry,
            catalog: self.catalog.clone(),
            published: self.catalog.subscribe(),
            made_of: MadeOf::default(),
            ending: self.ending.clone(),
            sender,
        };
        tokio::spawn(conversation.run(request.into_inner()));
        Ok(tonic::Response::new(ReceiverStream::new(receiver)))
    }
}

/// One stream.
struct Conversation<D: Dialect> {
    served: Served,
    peer: Peer,
    seen: Seen,
    entry: Entry,
    catalog: Arc<Catalog>,
    published: watch::Receiver<Option<Arc<views::Served>>>,
    made_of: MadeOf,
    ending: watch::Receiver<Option<Ending>>,
    sender: mpsc::Sender<Result<D::Response, Status>>,
}

impl<D: Dialect> Conversation<D> {
    async fn run(mut self, requests: Streaming<D::Request>) {
        if let Err(status) = self.talk(requests).await {
            // Who is gone needs no reason.
            let _ = self.sender.send(Err(status)).await;
        }
    }

    /// Until the client ends it.
    async fn talk(&mut self, mut requests: Streaming<D::Request>) -> Result<(), Status> {
        let mut is_news = false;
        let mut ending = self.ending.clone();
        let mut checks = self.peer.checks();
        let (id, sender) = (self.entry.stream.id, self.sender.clone());
        let mut held_until = None;
        loop {
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        self.hear(request)?;
                        is_news = true;
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => return unread(status),
                },
                changed = self.published.changed() => match changed {
                    Ok(()) => is_news = true,
                    Err(_) => return Ok(()),
                },
                slot = sender.reserve(), if is_news => {
                    let Ok(slot) = slot else { return Ok(()) };
                    match self.next() {
                        Some(response) => slot.send(Ok(D::write(response))),
                        None => is_news = false,
                    }
                    let held = self.entry.stream.session().held();
                    held_until = held.map(|held| Instant::now() + held);
                }
                () = over(held_until), if !is_news => is_news = true,
                () = due(&mut checks) => {
                    self.peer.check()?;
                    is_news |= self.seen.is_due(SystemTime::now());
                }
                () = ended(&mut ending, id) => return Err(Status::unavailable("shutting down")),
            }
        }
    }

    fn hear(&mut self, request: D::Request) -> Result<(), Status> {
        let request = self.served.typed(D::read(request))?;
        if let Some(client) = &request.node {
            self.peer.admit(&client.node.id)?;
        }
        let mut session = self.entry.stream.session();
        count(&request, session.client());
        let against = self.made_of.speaks_against(D::PROTOCOL, &request);
        if let (Some(version), Some(client)) = (against, session.client()) {
            self.catalog.refused(version, refusal(&request, client));
        }
        session
            .hear(request, SystemTime::now())
            .map_err(|refusal| status(&refusal))
    }

    /// What the client is to be told now.
    fn next(&mut self) -> Option<Response> {
        let served = self.published.borrow_and_update().clone()?;
        let stream = &self.entry.stream;
        let mut session = stream.session();
        let now = SystemTime::now();
        let with_secrets = session.has_asked(Kind::Secrets);
        let client = session.client()?.clone();
        let version = served.of(&client.node.id);
        let snapshot = self
            .seen
            .snapshot(&version.published, &client, with_secrets, now);
        let Some(response) = session.next(snapshot, now) else {
            // What is held back is to be told yet.
            if session.held().is_none() {
                stream.told_all(version.number);
            }
            return None;
        };
        let of_trial = self.made_of.said(D::PROTOCOL, &served, &client, &response);
        if of_trial {
            self.catalog.sent(version.number, &client.node.id);
        }
        let type_url = label(&response.type_url);
        metrics::counter!("outrigger_control_plane_responses_total", "type" => type_url)
            .increment(1);
        metrics::counter!("outrigger_control_plane_resources_sent_total", "type" => type_url)
            .increment(response.resources.len() as u64);
        Some(response)
    }
}

/// It speaks against the version that was sent.
fn refusal(request: &Request, client: &Client) -> rollout::Refusal {
    rollout::Refusal {
        node: client.node.id.clone(),
        type_url: request.type_url.clone(),
        error: request.error.clone().unwrap_or_default(),
    }
}

fn count(request: &Request, client: Option<&Client>) {
    let type_url = label(&request.type_url);
    metrics::counter!("outrigger_control_plane_requests_total", "type" => type_url).increment(1);
    if let Some(error) = &request.error {
        let node = client.map(|client| client.node.id.as_str());
        tracing::warn!(node, type_url, error, "a client refuses a response");
        metrics::counter!("outrigger_control_plane_nacks_total", "type" => type_url).increment(1);
    } else if !request.nonce.is_empty() {
        metrics::counter!("outrigger_control_plane_acks_total", "type" => type_url).increment(1);
    }
}

/// Clients may name any type; only those that are served get a label.
fn label(type_url: &str) -> &'static str {
    Kind::of(type_url).map_or("other", Kind::type_url)
}

/// When what is held back is so no longer.
async fn over(held_until: Option<Instant>) {
    match held_until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// When it is time to look at the client's certificate, and at those issued to it.
async fn due(checks: &mut Option<tokio::time::Interval>) {
    match checks {
        Some(checks) => drop(checks.tick().await),
        None => std::future::pending().await,
    }
}

/// When this stream is to end.
pub(crate) async fn ended(ending: &mut watch::Receiver<Option<Ending>>, id: u64) {
    let Ok(ending) = ending.wait_for(Option::is_some).await.map(|it| *it) else {
        return std::future::pending().await;
    };
    if let Some(ending) = ending {
        tokio::time::sleep_until(ending.of_stream(id)).await;
    }
}
