//! Who has what: the sessions that are open, as Envoy's client status discovery service tells it, and as JSON for people.

use crate::{
    clients::{Clients, Stream},
    session::{Client, State, Told, TypeStatus},
};
use outrigger_xds::{
    subscription::Protocol,
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
use serde_json::{Value, json};
use std::{collections::BTreeMap, sync::Arc, time::SystemTime};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

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
pub struct ClientStatus(pub Arc<Clients>);

impl ClientStatus {
    fn answer(&self, request: &ClientStatusRequest) -> Result<ClientStatusResponse, Status> {
        let matchers = &request.node_matchers;
        for matcher in matchers {
            supported(matcher)?;
        }
        let with_contents = !request.exclude_resource_contents;
        let streams = self.0.all();
        let chosen = streams.iter().filter_map(|stream| {
            let session = stream.session();
            let id = &session.client()?.node.id;
            let is_chosen = matchers.is_empty() || matchers.iter().any(|it| is_match(it, id));
            drop(session);
            is_chosen.then(|| config(stream, with_contents))
        });
        Ok(ClientStatusResponse {
            config: chosen.collect(),
        })
    }
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

/// All that a client was sent, resource by resource.
fn config(stream: &Stream, with_contents: bool) -> ClientConfig {
    let session = stream.session();
    let nacks: BTreeMap<String, UpdateFailureState> = session
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
        .collect();
    let resources = session.sent().map(|(type_url, name, sent)| {
        let (server, client) = match sent.state {
            State::NotSent => (ConfigStatus::NotSent, ClientResourceStatus::Requested),
            State::Pending => (ConfigStatus::Stale, ClientResourceStatus::Unknown),
            State::Acked => (ConfigStatus::Synced, ClientResourceStatus::Acked),
            State::Nacked => (ConfigStatus::Error, ClientResourceStatus::Nacked),
        };
        let failure = nacks.get(type_url).filter(|_| sent.state == State::Nacked);
        let body = sent.resource().filter(|_| with_contents);
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
    ClientConfig {
        node: session.client().map(node),
        generic_xds_configs: resources.collect(),
    }
}

#[tonic::async_trait]
impl ClientStatusDiscoveryService for ClientStatus {
    type StreamClientStatusStream = ReceiverStream<Result<ClientStatusResponse, Status>>;

    async fn stream_client_status(
        &self,
        request: Request<Streaming<ClientStatusRequest>>,
    ) -> Result<Response<Self::StreamClientStatusStream>, Status> {
        let mut requests = request.into_inner();
        let (sender, receiver) = mpsc::channel(1);
        let asked = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                let answer = asked.answer(&request);
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
        self.answer(&request.into_inner()).map(Response::new)
    }
}
