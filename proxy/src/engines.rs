//! The engines beside this proxy: who watches them, and what they say.
//!
//! Embedded adapters (feature `standalone`), an agent over gRPC, or an agent over NATS: all are one `FeedSource`.

use crate::cluster::Contexts;
use outrigger_filters::{endpoints::Secured, services::is_loopback};
use outrigger_xds::{
    feed::{FeedBody, FeedMessage, FeedSource},
    report::{EngineId, Role},
    resource::{
        cluster::Cluster,
        endpoint::{Address, Duty, METADATA_NAMESPACE},
        listener::{Listener, TrafficDirection},
    },
};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

/// An engine that configuration puts beside us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfiguredEngine {
    /// Where.
    pub address: Address,
    /// `role` of its metadata; empty is both.
    pub role: String,
    /// `bootstrap` of its metadata; empty is what the engine says.
    pub bootstrap: String,
    /// `cohort` of its metadata; empty is what the engine shows.
    pub cohort: String,
}

/// Engines and peers of all clusters.
#[must_use]
pub fn configured(clusters: &[Cluster]) -> (BTreeMap<EngineId, ConfiguredEngine>, Vec<Address>) {
    let mut engines = BTreeMap::new();
    let mut peers = Vec::new();
    for endpoint in clusters
        .iter()
        .flat_map(|cluster| &cluster.load_assignment.endpoints)
    {
        match endpoint.duty() {
            Duty::Engine => {
                let ours = endpoint.metadata.get(METADATA_NAMESPACE);
                let told = |name: &str| {
                    let told = ours.and_then(|ours| ours.get(name)?.as_str());
                    told.unwrap_or_default().to_owned()
                };
                let engine = ConfiguredEngine {
                    address: endpoint.address.clone(),
                    role: told("role"),
                    bootstrap: told("bootstrap"),
                    cohort: told("cohort"),
                };
                // What is written comes first, and knows its engines better than who was told of them.
                engines
                    .entry(crate::cluster::engine_id(endpoint))
                    .or_insert(engine);
            }
            Duty::Peer if !peers.contains(&endpoint.address) => {
                peers.push(endpoint.address.clone())
            }
            Duty::Peer | Duty::Plain => {}
        }
    }
    (engines, peers)
}

/// Each peer with the way it is secured in the cluster that names it.
#[must_use]
pub fn with_contexts(
    clusters: &[Cluster],
    peers: Vec<Address>,
    contexts: &Contexts,
) -> Vec<(Address, Option<Secured>)> {
    let of = |peer: &Address| {
        clusters.iter().find_map(|cluster| {
            let mut endpoints = cluster.load_assignment.endpoints.iter();
            let named = endpoints
                .find(|endpoint| endpoint.address == *peer && endpoint.duty() == Duty::Peer)?;
            let sockets = contexts.get(&cluster.name)?;
            sockets.get(cluster.socket_of(named))?.clone()
        })
    };
    peers
        .into_iter()
        .map(|peer| {
            let tls = of(&peer);
            (peer, tls)
        })
        .collect()
}

/// Where others reach the machine of this proxy, as far as an inbound listener tells.
#[must_use]
pub fn own_host(listeners: &[Listener]) -> Option<Arc<str>> {
    let is_inbound = |listener: &&Listener| listener.traffic_direction == TrafficDirection::Inbound;
    let mut hosts = listeners.iter().filter(is_inbound).map(|it| &it.address);
    let told = hosts.find(|address| {
        let ip = address.host.parse::<IpAddr>();
        let everywhere = ip.is_ok_and(|ip| ip.is_unspecified());
        !everywhere && !address.is_pipe() && !is_loopback(&address.host)
    });
    told.map(|address| address.host.as_str().into())
}

/// Whether there are proxies on other machines.
#[must_use]
pub fn has_far_peers(clusters: &[Cluster]) -> bool {
    let (_, peers) = configured(clusters);
    peers.iter().any(|peer| !is_loopback(&peer.host))
}

/// Whether an engine says that engines for decode find it at a loopback address.
#[must_use]
pub fn meets_on_loopback(message: &FeedMessage) -> bool {
    let FeedBody::State(state) = &message.body else {
        return false;
    };
    let host = state.bootstrap.rsplit_once(':').map(|(host, _)| host);
    state.role == Role::Prefill
        && host.is_some_and(|host| is_loopback(host.trim_matches(['[', ']'])))
}

/// Who tells of the engines beside us.
#[derive(Clone)]
pub struct Watcher {
    /// What they say.
    pub source: Arc<dyn FeedSource>,
    #[cfg(feature = "standalone")]
    embedded: Option<Embedded>,
}

#[cfg(feature = "standalone")]
#[derive(Clone)]
struct Embedded {
    hub: Arc<outrigger_gpu_agent::Hub>,
    watched: Arc<std::sync::Mutex<BTreeMap<EngineId, ConfiguredEngine>>>,
    api_key: Option<outrigger_gpu_agent::ApiKey>,
    block_tokens: usize,
}

impl Watcher {
    /// Somebody else watches: an agent.
    #[must_use]
    pub fn elsewhere(source: Arc<dyn FeedSource>) -> Self {
        Self {
            source,
            #[cfg(feature = "standalone")]
            embedded: None,
        }
    }

    /// An agent watches, and tells over NATS.
    ///
    /// # Errors
    /// This build cannot listen to NATS.
    pub fn nats(url: &str) -> Result<Self, String> {
        #[cfg(feature = "standalone")]
        {
            Ok(Self::elsewhere(Arc::new(NatsSource(url.to_owned()))))
        }
        #[cfg(not(feature = "standalone"))]
        {
            Err(format!("--nats {url}: this build cannot listen to NATS"))
        }
    }

    /// The embedded adapters watch.
    ///
    /// # Errors
    /// This build has none.
    pub fn embedded(api_key: Option<&str>, block_tokens: usize) -> Result<Self, String> {
        #[cfg(feature = "standalone")]
        {
            let hub = outrigger_gpu_agent::Hub::new();
            let api_key = api_key.map(outrigger_gpu_agent::ApiKey::new);
            let embedded = Embedded {
                hub: hub.clone(),
                watched: Arc::default(),
                api_key,
                block_tokens,
            };
            Ok(Self {
                source: hub,
                embedded: Some(embedded),
            })
        }
        #[cfg(not(feature = "standalone"))]
        {
            let _ = (api_key, block_tokens);
            Err("this build has no engine adapters: give --agent or --nats".into())
        }
    }

    /// What engines want to see of those who ask them, if they want a key.
    #[must_use]
    pub fn bearer(&self) -> Option<http::HeaderValue> {
        #[cfg(feature = "standalone")]
        {
            self.embedded.as_ref()?.api_key.as_ref()?.bearer()
        }
        #[cfg(not(feature = "standalone"))]
        {
            None
        }
    }

    /// Watches exactly these engines; one that stays is not disturbed.
    pub fn configure(&self, engines: &BTreeMap<EngineId, ConfiguredEngine>) {
        #[cfg(feature = "standalone")]
        if let Some(embedded) = &self.embedded {
            embedded.configure(engines);
        }
        #[cfg(not(feature = "standalone"))]
        let _ = engines;
    }
}

/// The feed of agents over NATS.
#[cfg(feature = "standalone")]
struct NatsSource(String);

#[cfg(feature = "standalone")]
impl FeedSource for NatsSource {
    fn subscribe(&self) -> outrigger_xds::feed::FeedStream {
        outrigger_gpu_agent::publish::nats_subscribe(&self.0)
    }
}

#[cfg(feature = "standalone")]
impl Embedded {
    fn configure(&self, engines: &BTreeMap<EngineId, ConfiguredEngine>) {
        let mut watched = self
            .watched
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        watched.retain(|id, engine| {
            let stays = engines.get(id) == Some(engine);
            if !stays {
                self.hub.unwatch(id);
            }
            stays
        });
        for (id, engine) in engines {
            if watched.contains_key(id) {
                continue;
            }
            let url = format!("http://{}", engine.address);
            let mut config = outrigger_gpu_agent::EngineConfig::new(id.clone(), url);
            config.role = match engine.role.as_str() {
                "prefill" => Role::Prefill,
                "decode" => Role::Decode,
                _ => Role::Both,
            };
            config.bootstrap = Some(engine.bootstrap.clone()).filter(|told| !told.is_empty());
            config.cohort = Some(engine.cohort.clone()).filter(|told| !told.is_empty());
            config.api_key.clone_from(&self.api_key);
            config.block_tokens = self.block_tokens;
            self.hub.watch(config);
            watched.insert(id.clone(), engine.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{bootstrap::from_options, options::Options};
    use outrigger_xds::report::EngineState;

    #[test]
    fn an_inbound_address_is_ours_if_it_is_one_of_this_machine_alone() {
        let own = |inbound: &str| {
            let arguments = [
                "outrigger-proxy",
                "--listen",
                "10.0.0.9:1",
                "--inbound",
                inbound,
            ];
            let options = <Options as clap::Parser>::try_parse_from(arguments).unwrap();
            own_host(&from_options(&options).unwrap().listeners)
        };
        for inbound in [
            "0.0.0.0:1",
            "[::]:1",
            "127.0.0.1:1",
            "[::1]:1",
            "localhost:1",
        ] {
            assert_eq!(own(inbound), None, "{inbound}");
        }
        assert_eq!(own("[fd00::1]:1").as_deref(), Some("fd00::1"));
        assert_eq!(own("10.0.0.1:1").as_deref(), Some("10.0.0.1"));
    }

    #[test]
    fn who_meets_on_the_loopback_is_known_by_its_state() {
        let says = |role, bootstrap: &str| {
            let state = EngineState {
                role,
                bootstrap: bootstrap.into(),
                ..EngineState::default()
            };
            meets_on_loopback(&FeedMessage {
                engine: EngineId("e".into()),
                epoch: 1,
                seq: 0,
                body: FeedBody::State(state),
            })
        };
        assert!(says(Role::Prefill, "127.0.0.1:8998"));
        assert!(says(Role::Prefill, "[::1]:8998"));
        assert!(!says(Role::Prefill, "10.0.0.1:8998"));
        assert!(!says(Role::Prefill, ""));
        assert!(!says(Role::Decode, "127.0.0.1:8998"));
    }
}
