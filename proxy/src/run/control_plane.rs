//! Streams to control planes: opened, opened again, and their news handed to whoever judges them.
//!
//! The first server that can be reached is used. One that cannot, or ends the stream before it says anything, is
//! followed by the next; after the last one there is a pause. Everything that takes time is done off the main thread.

use super::Shared;
use crate::{
    discovery::{Channel, Discovery, News, Turn, kept},
    upstream::{connect::dialer, own},
};
use outrigger_filters::endpoints::Secured;
use outrigger_xds::{
    ads::{self, AdsError, AdsStream, Event, Server},
    backoff::Backoff,
    resource::{
        ads::{Ads, GrpcService, MESSAGE_BYTES_MAX_DEFAULT, Target},
        cluster::{Cluster, ConnectionOptions, TcpKeepalive},
        endpoint::{Address, LbEndpoint},
    },
};
use std::{
    collections::BTreeMap,
    convert::Infallible,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::{sync::watch, task::AbortHandle};

/// How often it is looked whether there is a server to be asked.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// A dead server is noticed although nothing is said.
const KEEPALIVE: TcpKeepalive = TcpKeepalive {
    probes: Some(3),
    time: Some(Duration::from_secs(30)),
    interval: Some(Duration::from_secs(10)),
};
/// How often what the control plane brought is kept, at most.
const KEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Pause after a write that failed.
const KEEP_RETRY: Duration = Duration::from_secs(10);

/// Where what the control plane brought is kept.
pub(super) struct Cache {
    /// None keeps nothing.
    directory: Option<PathBuf>,
    /// Something may have changed since it was last kept.
    pub(super) is_stale: AtomicBool,
    writing: Mutex<()>,
}

impl Cache {
    pub(super) fn new(directory: Option<PathBuf>) -> Self {
        Self {
            directory,
            is_stale: AtomicBool::new(false),
            writing: Mutex::new(()),
        }
    }
}

/// Keeps all streams open that are wanted, and no others, for as long as the process lives.
pub(super) async fn follow(shared: Arc<Shared>) {
    let mut asked = shared.ask.subscribe();
    let mut followed: BTreeMap<u64, AbortHandle> = BTreeMap::new();
    loop {
        let channels = shared.discovery().channels();
        followed.retain(|id, task| {
            let stays = channels.iter().any(|channel| channel.id == *id);
            if !stays {
                task.abort();
            }
            stays
        });
        for channel in channels {
            followed
                .entry(channel.id)
                .or_insert_with(|| tokio::spawn(talk(shared.clone(), channel)).abort_handle());
        }
        if asked.changed().await.is_err() {
            return;
        }
    }
}

/// Talks to a control plane, by one stream after the other, until somebody ends it.
async fn talk(shared: Arc<Shared>, channel: Channel) {
    let mut backoff = Backoff::default();
    let mut is_alone = false;
    loop {
        let servers = servers(&shared, &channel.control_plane);
        if servers.is_empty() {
            if !std::mem::replace(&mut is_alone, true) {
                tell_alone(&shared, &channel).await;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
            continue;
        }
        is_alone = false;
        let mut was_answered = false;
        for server in servers {
            let mut talk = Talk {
                shared: &shared,
                channel: &channel,
                was_answered: false,
                is_connected: false,
                asked: shared.ask.subscribe(),
                server: &server.authority,
            };
            let Err(error) = talk.with(&server).await;
            was_answered = talk.was_answered;
            let (server, limit) = (&server.authority, backoff.limit());
            tracing::warn!(
                server, stream = channel.name, %error,
                "no stream to the control plane; what is there stays in effect, the next attempt comes within {limit:?}"
            );
            broke(&shared, &channel).await;
            if was_answered {
                break;
            }
        }
        if was_answered {
            backoff = Backoff::default();
        }
        tokio::time::sleep(backoff.pause()).await;
    }
}

async fn broke(shared: &Arc<Shared>, channel: &Channel) {
    if let Err(error) = shared.turn(channel.id, News::Broken).await {
        tracing::error!(%error, "the end of a control plane's stream");
    }
}

/// There is nobody to ask, now.
async fn tell_alone(shared: &Arc<Shared>, channel: &Channel) {
    tracing::warn!(
        servers = %channel.control_plane,
        stream = channel.name,
        "no control plane can be asked: a cluster of its servers is not there, waits for something, or has no endpoint"
    );
    broke(shared, channel).await;
}

/// Keeps what the control plane brought, if that is wanted, for as long as the process lives.
pub(super) async fn keep(shared: Arc<Shared>) {
    if shared.cache.directory.is_none() {
        return;
    }
    let mut pause = KEEP_INTERVAL;
    loop {
        tokio::time::sleep(pause).await;
        let keeping = shared.clone();
        let kept = tokio::task::spawn_blocking(move || keeping.store()).await;
        pause = kept.unwrap_or_else(|error| {
            tracing::error!(%error, "keeping configuration failed");
            KEEP_RETRY
        });
    }
}

/// All servers of the control plane, in order.
pub(super) fn servers(shared: &Shared, ads: &Ads) -> Vec<Server> {
    let each = ads.servers.iter();
    each.flat_map(|service| match &service.target {
        Target::Cluster {
            name,
            authority,
            message_bytes_max,
        } => {
            let authority = if authority.is_empty() {
                name
            } else {
                authority
            };
            let longest = message_bytes_max.map(|max| max as usize);
            of_cluster(shared, service, (name, authority), longest)
        }
        Target::Address { address, .. } => {
            let way = (address, None, ConnectionOptions::default());
            let authority = if address.is_pipe() {
                "localhost".to_owned()
            } else {
                address.to_string()
            };
            vec![server(service, way, authority)]
        }
    })
    .collect()
}

/// A server by its address, in plain text.
pub(super) fn at(address: &Address) -> Server {
    let service = GrpcService {
        target: Target::Address {
            address: address.clone(),
            uri: address.to_string(),
            stat_prefix: String::new(),
        },
        initial_metadata: Vec::new(),
    };
    let way = (address, None, ConnectionOptions::default());
    server(&service, way, address.to_string())
}

/// The servers that a cluster has, secured as it says; none while it waits.
pub(super) fn in_cluster(shared: &Shared, name: &str, authority: &str) -> Vec<Server> {
    let service = GrpcService {
        target: Target::Cluster {
            name: name.to_owned(),
            authority: authority.to_owned(),
            message_bytes_max: None,
        },
        initial_metadata: Vec::new(),
    };
    let authority = if authority.is_empty() {
        name
    } else {
        authority
    };
    of_cluster(shared, &service, (name, authority), None)
}

fn of_cluster(
    shared: &Shared,
    service: &GrpcService,
    (name, authority): (&str, &str),
    longest: Option<usize>,
) -> Vec<Server> {
    let carried = shared.carried.load();
    let Some((clusters, contexts)) = carried.as_deref() else {
        return Vec::new();
    };
    let Some(cluster) = clusters.iter().find(|cluster| cluster.name == name) else {
        return Vec::new();
    };
    let secured = |endpoint: &LbEndpoint| -> Option<Secured> {
        let sockets = contexts.get(name)?;
        sockets.get(cluster.socket_of(endpoint))?.clone()
    };
    let endpoints = cluster.load_assignment.endpoints.iter();
    endpoints
        .map(|endpoint| {
            let way = (&endpoint.address, secured(endpoint), options(cluster));
            let authority = own::authority(authority, &endpoint.address);
            Server {
                message_bytes_max: longest.unwrap_or(MESSAGE_BYTES_MAX_DEFAULT),
                connect_timeout: cluster.connect_timeout,
                ..server(service, way, authority)
            }
        })
        .collect()
}

fn options(cluster: &Cluster) -> ConnectionOptions {
    let mut options = cluster.connection.clone();
    options.keepalive.get_or_insert(KEEPALIVE);
    options
}

fn server(
    service: &GrpcService,
    (address, tls, mut options): (&Address, Option<Secured>, ConnectionOptions),
    authority: String,
) -> Server {
    options.keepalive.get_or_insert(KEEPALIVE);
    Server {
        metadata: service.initial_metadata.clone(),
        ..Server::new(authority, dialer(address.clone(), tls, options))
    }
}

/// One stream.
struct Talk<'a> {
    shared: &'a Arc<Shared>,
    channel: &'a Channel,
    was_answered: bool,
    /// The server is known to be there.
    is_connected: bool,
    /// There may be something new to say.
    asked: watch::Receiver<u64>,
    server: &'a str,
}

impl Talk<'_> {
    /// Goes on until the stream breaks.
    async fn with(&mut self, server: &Server) -> Result<Infallible, AdsError> {
        let node = self.shared.bootstrap.load().node.clone();
        let id = self.channel.id;
        let spoken = (self.channel.kind, self.channel.control_plane.protocol);
        let mut stream = ads::open(server, spoken, &node).await?;
        // By then it has answered a ping.
        let proven = Instant::now() + server.ping_interval + server.ping_timeout;
        let mut turn = self.shared.turn(id, News::Opened).await?;
        loop {
            let is_held_back = turn.is_held_back;
            let at = turn.at;
            for request in turn.requests {
                stream.send(request).await?;
            }
            let news = self.news(&mut stream, is_held_back, (at, proven)).await?;
            turn = self.shared.turn(id, news).await?;
        }
    }

    fn connected(&mut self) {
        if !std::mem::replace(&mut self.is_connected, true) {
            let stream = &self.channel.name;
            tracing::info!(
                server = self.server,
                stream,
                "connected to the control plane"
            );
        }
    }

    /// What happens next. While we may not answer, nothing more is taken.
    async fn news(
        &mut self,
        stream: &mut AdsStream,
        is_held_back: bool,
        (at, proven): (Option<Instant>, Instant),
    ) -> Result<News, AdsError> {
        let until = async {
            match at {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = stream.next(), if !is_held_back => {
                let event = event?;
                self.connected();
                Ok(match event {
                    Event::Accepted => News::Connected,
                    Event::Answer(answer) => {
                        self.was_answered = true;
                        News::Came(answer)
                    }
                })
            }
            () = tokio::time::sleep_until(proven.into()), if !self.is_connected => {
                self.connected();
                Ok(News::Connected)
            }
            // Its sender is as old as the process.
            _ = self.asked.changed() => Ok(News::Woken),
            () = until => Ok(News::Woken),
        }
    }
}

impl Shared {
    /// Takes news in, and says what is to be done. What cannot be taken in breaks the stream: the next one begins anew.
    async fn turn(self: &Arc<Self>, id: u64, news: News) -> Result<Turn, AdsError> {
        let shared = self.clone();
        let turn = tokio::task::spawn_blocking(move || shared.take_turn(id, news)).await;
        turn.map_err(|error| AdsError::Broken(format!("its news could not be taken in: {error}")))
    }

    /// Tells those who keep streams open that there is something to do for one of them.
    pub(super) fn wake_streams(&self, discovery: &mut Discovery) {
        if discovery.has_news_for_streams() {
            self.ask.send_modify(|count| *count += 1);
        }
    }

    /// Keeps what the control plane brought, if that changed since; when to come again. What cannot be kept yet is not
    /// forgotten.
    pub(super) fn store(&self) -> Duration {
        let cache = &self.cache;
        let Some(directory) = &cache.directory else {
            return KEEP_INTERVAL;
        };
        let _one_by_one = cache.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if !cache.is_stale.swap(false, Relaxed) {
            return KEEP_INTERVAL;
        }
        let kept = self.discovery().keep();
        let (is_kept, again) = match kept {
            None => (false, KEEP_INTERVAL),
            Some(kept) if kept::store(directory, &kept) => (true, KEEP_INTERVAL),
            Some(_) => (false, KEEP_RETRY),
        };
        cache.is_stale.fetch_or(!is_kept, Relaxed);
        again
    }

    fn take_turn(&self, id: u64, news: News) -> Turn {
        let mut discovery = self.discovery();
        let now = Instant::now();
        let is_news = discovery.hear(id, news, now);
        self.advance(&mut discovery, is_news, now);
        let turn = discovery.turn(id, now);
        self.wake_streams(&mut discovery);
        turn
    }
}
