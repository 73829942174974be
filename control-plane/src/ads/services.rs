//! The services of Envoy's API that carry resources, each a few lines over [`Shared::converse`].

use super::{
    Answers, Served, Shared,
    dialect::{Delta, Dialect, State},
};
use crate::{
    issued::Seen,
    session::{Ask, Refusal, Response, Session},
    snapshot::version_of,
    tls::Peer,
};
use outrigger_xds::{
    subscription::{Kind, Protocol},
    wire::envoy::service::{
        cluster::v3::cluster_discovery_service_server::ClusterDiscoveryService,
        discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            aggregated_discovery_service_server::AggregatedDiscoveryService,
        },
        endpoint::v3::endpoint_discovery_service_server::EndpointDiscoveryService,
        extension::v3::extension_config_discovery_service_server::ExtensionConfigDiscoveryService,
        listener::v3::listener_discovery_service_server::ListenerDiscoveryService,
        route::v3::route_discovery_service_server::RouteDiscoveryService,
        runtime::v3::runtime_discovery_service_server::RuntimeDiscoveryService,
        secret::v3::secret_discovery_service_server::SecretDiscoveryService,
    },
};
use std::time::SystemTime;
use tonic::{Request, Response as Reply, Status, Streaming};

/// All services that carry resources.
#[derive(Debug, Clone)]
pub struct Discovery(pub Shared);

const ALL: Served = Served {
    name: "ads",
    kind: None,
};

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Reply<Self::StreamAggregatedResourcesStream>, Status> {
        self.0.converse::<State>(ALL, request)
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Reply<Self::DeltaAggregatedResourcesStream>, Status> {
        self.0.converse::<Delta>(ALL, request)
    }
}

/// A service that carries one type.
macro_rules! of_one_type {
    ($service:ident, $served:expr, $State:ident $state:ident, $Delta:ident $delta:ident, $fetch:ident) => {
        #[tonic::async_trait]
        impl $service for Discovery {
            type $State = Answers<DiscoveryResponse>;
            type $Delta = Answers<DeltaDiscoveryResponse>;

            async fn $state(
                &self,
                request: Request<Streaming<DiscoveryRequest>>,
            ) -> Result<Reply<Self::$State>, Status> {
                self.0.converse::<State>($served, request)
            }

            async fn $delta(
                &self,
                request: Request<Streaming<DeltaDiscoveryRequest>>,
            ) -> Result<Reply<Self::$Delta>, Status> {
                self.0.converse::<Delta>($served, request)
            }

            async fn $fetch(
                &self,
                request: Request<DiscoveryRequest>,
            ) -> Result<Reply<DiscoveryResponse>, Status> {
                let peer = Peer::of(&request);
                self.0
                    .fetch($served, &peer, request.into_inner())
                    .map(Reply::new)
            }
        }
    };
}

const fn one(name: &'static str, kind: Kind) -> Served {
    Served {
        name,
        kind: Some(kind),
    }
}

of_one_type!(ClusterDiscoveryService, one("cds", Kind::Clusters), StreamClustersStream stream_clusters, DeltaClustersStream delta_clusters, fetch_clusters);
of_one_type!(EndpointDiscoveryService, one("eds", Kind::Endpoints), StreamEndpointsStream stream_endpoints, DeltaEndpointsStream delta_endpoints, fetch_endpoints);
of_one_type!(ListenerDiscoveryService, one("lds", Kind::Listeners), StreamListenersStream stream_listeners, DeltaListenersStream delta_listeners, fetch_listeners);
of_one_type!(RouteDiscoveryService, one("rds", Kind::Routes), StreamRoutesStream stream_routes, DeltaRoutesStream delta_routes, fetch_routes);
of_one_type!(SecretDiscoveryService, one("sds", Kind::Secrets), StreamSecretsStream stream_secrets, DeltaSecretsStream delta_secrets, fetch_secrets);
of_one_type!(ExtensionConfigDiscoveryService, one("ecds", Kind::Extensions), StreamExtensionConfigsStream stream_extension_configs, DeltaExtensionConfigsStream delta_extension_configs, fetch_extension_configs);
of_one_type!(RuntimeDiscoveryService, one("rtds", Kind::Runtimes), StreamRuntimeStream stream_runtime, DeltaRuntimeStream delta_runtime, fetch_runtime);

impl Shared {
    /// One response to one request: as a stream that ends after it.
    fn fetch(
        &self,
        served: Served,
        peer: &Peer,
        request: DiscoveryRequest,
    ) -> Result<DiscoveryResponse, Status> {
        let versions = self.served()?;
        let mut request = served.typed(State::read(request))?;
        // Who fetches wants an answer, whatever it has.
        if let Ask::State { version, .. } = &mut request.ask {
            version.clear();
        }
        if let Some(client) = &request.node {
            peer.admit(&client.node.id)?;
        }
        let type_url = request.type_url.clone();
        let mut session = Session::new(Protocol::State);
        let now = SystemTime::now();
        session
            .hear(request, now)
            .map_err(|refusal: Refusal| super::status(&refusal))?;
        let mut seen = Seen::new(peer.clone(), 0);
        let with_secrets = session.has_asked(Kind::Secrets);
        let client = session.client().ok_or(Refusal::Anonymous);
        let client = client.map_err(|refusal| super::status(&refusal))?;
        let published = &versions.of(&client.node.id).published;
        let snapshot = seen.snapshot(published, client, with_secrets, now);
        // If nothing of it exists, that is what is told.
        let mut response = Response {
            type_url,
            version: version_of(std::iter::empty()),
            ..Response::default()
        };
        while let Some(part) = session.next(snapshot, now) {
            response.version = part.version;
            response.nonce = part.nonce;
            response.resources.extend(part.resources);
        }
        Ok(State::write(response))
    }
}
