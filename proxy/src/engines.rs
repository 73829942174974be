//! The engines beside this proxy: who watches them, and what they say.
//!
//! Embedded adapters (feature `standalone`), an agent over gRPC, or an agent over NATS: all are one `FeedSource`.

use outrigger_xds::{
    feed::FeedSource,
    report::EngineId,
    resource::{
        cluster::Cluster,
        endpoint::{Address, Duty, METADATA_NAMESPACE},
    },
};
use std::{collections::BTreeMap, sync::Arc};

/// An engine that configuration puts beside us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfiguredEngine {
    /// Where.
    pub address: Address,
    /// `role` of its metadata; empty is both.
    pub role: String,
    /// `bootstrap` of its metadata; empty is what the engine says.
    pub bootstrap: String,
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
                };
                engines.insert(crate::cluster::engine_id(endpoint), engine);
            }
            Duty::Peer if !peers.contains(&endpoint.address) => {
                peers.push(endpoint.address.clone())
            }
            Duty::Peer | Duty::Plain => {}
        }
    }
    (engines, peers)
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
        use outrigger_xds::report::Role;
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
            config.api_key.clone_from(&self.api_key);
            config.block_tokens = self.block_tokens;
            self.hub.watch(config);
            watched.insert(id.clone(), engine.clone());
        }
    }
}
