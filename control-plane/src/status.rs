//! Who has what: the sessions that are open, as Envoy's client status discovery service tells it, and as JSON for people.

use crate::{
    ads::{refused, unread},
    clients::{Clients, Stream},
    session::{Client, Session, State, Told, TypeStatus},
    tls::Peer,
};
use outrigger_xds::{
    subscription::{Kind, Protocol},
    wire::envoy::{
        admin::v3::{ClientResourceStatus, UpdateFailureState},
        config::core::v3 as core,
        service::status::v3::{
            ClientConfig, ClientStatusRequest, ClientStatusResponse, ConfigStatus,
            client_config::GenericXdsConfig,
            client_status_discovery_service_server::ClientStatusDiscoveryService,
        },
        r#type::matcher::v3::{NodeMatcher, StringMatcher, string_matcher::MatchPattern},
    },
};
use prost::Message;
use serde_json::{Value, json};
use std::{collections::BTreeMap, sync::Arc, time::SystemTime};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Streams of client status discovery that may be open at once: each may hold an answer of [`STATUS_BYTES_MAX`].
const STATUS_STREAMS_MAX: usize = 8;
/// Of one answer of client status discovery.
const STATUS_BYTES_MAX: usize = 64 << 20;

fn seconds_since(then: SystemTime) -> f64 {
    // A clock that was set back says nothing.
    let age = then.elapsed().unwrap_or_default();
    age.as_secs_f64()
}

fn word(state: State) -> &'static str {
    match state {
        State::NotSent => "NOT_SENT",
        State::Pending => "STALE",
        State::Acked => "SYNCED",
        State::Nacked => "ERROR",
    }
}

/// Every stream, and what its client has of each type.
#[must_use]
pub fn to_json(clients: &Clients) -> Value {
    let streams = clients.all();
    let clients: Vec<Value> = streams.iter().map(|stream| of_stream(stream)).collect();
    clients.into()
}

fn of_stream(stream: &Stream) -> Value {
    let session = stream.session();
    let client = session.client().cloned().unwrap_or_default();
    let types: Vec<Value> = session.status().map(|status| of_type(&status)).collect();
    json!({
        "id": client.node.id,
        "cluster": client.node.cluster,
        "user_agent": client.user_agent,
        "user_agent_version": client.user_agent_version,
        "outrigger": client.is_ours(),
        "address": stream.peer.map(|peer| peer.to_string()),
        "service": stream.service,
        "protocol": match session.protocol() {
            Protocol::State => "GRPC",
            Protocol::Delta => "DELTA_GRPC",
        },
        "connected_seconds": seconds_since(stream.since),
        "types": types,
    })
}

fn of_type(status: &TypeStatus) -> Value {
    let told =
        |told: &Told| json!({ "version": told.version, "seconds_ago": seconds_since(told.at) });
    let nacked = status.nacked.as_ref();
    json!({
        "type_url": status.type_url,
        "wildcard": status.all,
        "names": status.names,
        "resources": status.resources,
        "status": word(status.state),
        "sent": status.sent.as_ref().map(told),
        "acked": status.acked.as_ref().map(told),
        "nacked": nacked.map(|nack| json!({ "error": nack.error, "seconds_ago": seconds_since(nack.at) })),
    })
}

/// How many clients have not taken all that they were sent: those that may yet, and those that refused something.
#[must_use]
pub fn behind(clients: &Clients) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::from([("pending", 0), ("refused", 0)]);
    for stream in clients.all() {
        let states: Vec<State> = stream.session().status().map(|it| it.state).collect();
        let reason = if states.contains(&State::Nacked) {
            "refused"
        } else if states.contains(&State::Pending) {
            "pending"
        } else {
            continue;
        };
        *counts.entry(reason).or_default() += 1;
    }
    counts
}

/// Client status discovery, from the server's side.
#[derive(Debug, Clone)]
pub struct ClientStatus {
    clients: Arc<Clients>,
    slots: Arc<Semaphore>,
}

impl ClientStatus {
    /// Of these clients.
    #[must_use]
    pub fn new(clients: Arc<Clients>) -> Self {
        Self {
            clients,
            slots: Arc::new(Semaphore::new(STATUS_STREAMS_MAX)),
        }
    }

    fn answer_to(
        &self,
        peer: &Peer,
        request: &ClientStatusRequest,
    ) -> Result<ClientStatusResponse, Status> {
        peer.check()?;
        self.answer(peer, request, STATUS_BYTES_MAX)
    }

    fn answer(
        &self,
        peer: &Peer,
        request: &ClientStatusRequest,
        bytes_max: usize,
    ) -> Result<ClientStatusResponse, Status> {
        let matchers = &request.node_matchers;
        for matcher in matchers {
            supported(matcher)?;
        }
        let with_contents = !request.exclude_resource_contents;
        let mut answer = ClientStatusResponse::default();
        let mut bytes = 0;
        for stream in self.clients.all() {
            if !is_chosen(&stream, peer, matchers) {
                continue;
            }
            let room = bytes_max - bytes;
            let config = config(&stream, with_contents, room);
            let config = config.filter(|config| config.encoded_len() <= room);
            let config = config.ok_or_else(|| too_long(bytes_max))?;
            bytes += config.encoded_len();
            answer.config.push(config);
        }
        Ok(answer)
    }
}

fn too_long(bytes_max: usize) -> Status {
    let message = format!(
        "more than {bytes_max} bytes: name clients in node_matchers, or set exclude_resource_contents"
    );
    Status::resource_exhausted(message)
}

/// Of those who said who they are, all if nobody is named. Nodes that who asks may not be are not for them, nor is how much there is of them.
fn is_chosen(stream: &Stream, peer: &Peer, matchers: &[NodeMatcher]) -> bool {
    let session = stream.session();
    session.client().is_some_and(|client| {
        let id = &client.node.id;
        peer.may_be(id) && (matchers.is_empty() || matchers.iter().any(|it| is_match(it, id)))
    })
}

fn supported(matcher: &NodeMatcher) -> Result<(), Status> {
    let pattern = matcher.node_id.as_ref();
    let pattern = pattern.and_then(|id| id.match_pattern.as_ref());
    if !matcher.node_metadatas.is_empty() {
        Err(Status::invalid_argument("not supported: node_metadatas"))
    } else if matches!(pattern, Some(MatchPattern::SafeRegex(_))) {
        Err(Status::invalid_argument("not supported: safe_regex"))
    } else {
        Ok(())
    }
}

fn is_match(matcher: &NodeMatcher, id: &str) -> bool {
    let Some(StringMatcher {
        match_pattern: Some(pattern),
        ignore_case,
    }) = &matcher.node_id
    else {
        return true;
    };
    let folded = |text: &str| {
        if *ignore_case {
            text.to_ascii_lowercase()
        } else {
            text.to_owned()
        }
    };
    let id = folded(id);
    match pattern {
        MatchPattern::Exact(text) => id == folded(text),
        MatchPattern::Prefix(text) => id.starts_with(&folded(text)),
        MatchPattern::Suffix(text) => id.ends_with(&folded(text)),
        MatchPattern::Contains(text) => id.contains(&folded(text)),
        MatchPattern::SafeRegex(_) => false,
    }
}

fn node(client: &Client) -> core::Node {
    core::Node {
        user_agent_name: client.user_agent.clone(),
        ..core::Node::from(&client.node)
    }
}

/// Why responses were refused, by type.
fn failures(session: &Session) -> BTreeMap<String, UpdateFailureState> {
    session
        .status()
        .filter_map(|status| {
            let nack = status.nacked?;
            let failure = UpdateFailureState {
                last_update_attempt: Some(nack.at.into()),
                details: nack.error,
                version_info: String::new(),
            };
            Some((status.type_url, failure))
        })
        .collect()
}

/// All that a client was sent, resource by resource; of secrets only their names. None if it is longer than there is room for: no more of it is copied then.
fn config(stream: &Stream, with_contents: bool, room: usize) -> Option<ClientConfig> {
    let session = stream.session();
    let nacks = failures(&session);
    let resources = session.sent().map(|(type_url, name, sent)| {
        let (server, client) = match sent.state {
            State::NotSent => (ConfigStatus::NotSent, ClientResourceStatus::Requested),
            State::Pending => (ConfigStatus::Stale, ClientResourceStatus::Unknown),
            State::Acked => (ConfigStatus::Synced, ClientResourceStatus::Acked),
            State::Nacked => (ConfigStatus::Error, ClientResourceStatus::Nacked),
        };
        let failure = nacks.get(type_url).filter(|_| sent.state == State::Nacked);
        // Keys are nobody's business.
        let is_shown = with_contents && type_url != Kind::Secrets.type_url();
        let body = sent.resource().filter(|_| is_shown);
        GenericXdsConfig {
            type_url: type_url.to_owned(),
            name: name.to_owned(),
            version_info: sent.version().to_owned(),
            xds_config: body.map(|resource| resource.any.clone()),
            last_updated: Some(sent.at().into()),
            config_status: server.into(),
            client_status: client.into(),
            error_state: failure.cloned().map(|failure| UpdateFailureState {
                version_info: sent.version().to_owned(),
                ..failure
            }),
        }
    });
    let mut config = ClientConfig {
        node: session.client().map(node),
        generic_xds_configs: Vec::new(),
    };
    let mut bytes = 0;
    for resource in resources {
        bytes += resource.encoded_len();
        if bytes > room {
            return None;
        }
        config.generic_xds_configs.push(resource);
    }
    Some(config)
}

#[tonic::async_trait]
impl ClientStatusDiscoveryService for ClientStatus {
    type StreamClientStatusStream = ReceiverStream<Result<ClientStatusResponse, Status>>;

    async fn stream_client_status(
        &self,
        request: Request<Streaming<ClientStatusRequest>>,
    ) -> Result<Response<Self::StreamClientStatusStream>, Status> {
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| {
            refused("limit");
            let message = format!(
                "more than {STATUS_STREAMS_MAX} streams of client status discovery at this control plane"
            );
            Status::resource_exhausted(message)
        })?;
        let peer = Peer::of(&request);
        let mut requests = request.into_inner();
        let (sender, receiver) = mpsc::channel(1);
        let asked = self.clone();
        tokio::spawn(async move {
            let _slot = slot;
            loop {
                let answer = match requests.message().await {
                    Ok(Some(request)) => asked.answer_to(&peer, &request),
                    Ok(None) => return,
                    Err(status) => match unread(status) {
                        Ok(()) => return,
                        Err(status) => Err(status),
                    },
                };
                let is_over = answer.is_err();
                if sender.send(answer).await.is_err() || is_over {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn fetch_client_status(
        &self,
        request: Request<ClientStatusRequest>,
    ) -> Result<Response<ClientStatusResponse>, Status> {
        let peer = Peer::of(&request);
        let answer = self.answer_to(&peer, &request.into_inner());
        answer.map(Response::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clients::Entry,
        session::{Ask, Request as Asked},
        snapshot::{Resource, Snapshot},
    };
    use outrigger_xds::resource::bootstrap::Node;
    use prost_types::Any;
    use std::collections::BTreeSet;

    /// A client that was sent a cluster and a secret.
    fn client(clients: &Arc<Clients>) -> Entry {
        let entry = clients.enter("ads", Protocol::State, None).unwrap();
        let mut snapshot = Snapshot::default();
        let mut session = entry.stream.session();
        for kind in [Kind::Clusters, Kind::Secrets] {
            let any = Any {
                type_url: kind.type_url().into(),
                value: b"what it says".into(),
            };
            let resource = Resource {
                name: "a".into(),
                version: "1".into(),
                any,
                endpoints: None,
                ..Resource::default()
            };
            snapshot.insert(kind, Arc::new(resource));
            let node = Node {
                id: "n".into(),
                ..Node::default()
            };
            let asked = Asked {
                node: Some(Client {
                    node,
                    ..Client::default()
                }),
                type_url: kind.type_url().into(),
                ask: Ask::State {
                    version: String::new(),
                    names: BTreeSet::from(["a".to_owned()]),
                },
                ..Asked::default()
            };
            session.hear(asked, SystemTime::now()).unwrap();
        }
        while session.next(&snapshot, SystemTime::now()).is_some() {}
        drop(session);
        entry
    }

    #[test]
    fn what_is_in_secrets_is_not_told() {
        let clients = Arc::new(Clients::default());
        let _entry = client(&clients);
        let status = ClientStatus::new(clients);
        let told = |exclude_resource_contents| {
            let request = ClientStatusRequest {
                exclude_resource_contents,
                ..ClientStatusRequest::default()
            };
            let answer = status
                .answer(&Peer::default(), &request, STATUS_BYTES_MAX)
                .unwrap();
            let configs = answer.config.into_iter();
            configs
                .flat_map(|config| config.generic_xds_configs)
                .map(|it| (Kind::of(&it.type_url).unwrap(), it.xds_config.is_some()))
                .collect::<BTreeMap<Kind, bool>>()
        };
        let contents = BTreeMap::from([(Kind::Clusters, true), (Kind::Secrets, false)]);
        assert_eq!(told(false), contents);
        let none = BTreeMap::from([(Kind::Clusters, false), (Kind::Secrets, false)]);
        assert_eq!(told(true), none);
    }

    #[test]
    fn an_answer_is_so_long_and_no_longer() {
        let clients = Arc::new(Clients::default());
        let _entries = [client(&clients), client(&clients)];
        let status = ClientStatus::new(clients);
        let request = ClientStatusRequest::default();
        let whole = status
            .answer(&Peer::default(), &request, STATUS_BYTES_MAX)
            .unwrap();
        assert_eq!(whole.config.len(), 2);
        let bytes: usize = whole.config.iter().map(Message::encoded_len).sum();
        assert!(status.answer(&Peer::default(), &request, bytes).is_ok());
        let refused = status
            .answer(&Peer::default(), &request, bytes - 1)
            .unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    }

    #[test]
    fn what_one_is_not_told_leaves_room() {
        let clients = Arc::new(Clients::default());
        let _entry = client(&clients);
        let status = ClientStatus::new(clients);
        let request = ClientStatusRequest::default();
        let other = Peer::proven("status", "spiffe://fleet/node/other");
        assert_eq!(status.answer(&other, &request, 0).unwrap().config, []);
        let own = Peer::proven("status-own", "spiffe://fleet/node/n");
        assert!(status.answer(&own, &request, 0).is_err());
    }
}
