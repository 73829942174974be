//! The services by which the tests' own control plane is reached: of all types, and of each.

use super::ads_server::{Answers, Delta, Service, State, converse};
use futures_util::stream;
use outrigger_xds::wire::envoy::service::{
    cluster::v3::cluster_discovery_service_server::{
        ClusterDiscoveryService, ClusterDiscoveryServiceServer,
    },
    discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
        aggregated_discovery_service_server::{
            AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
        },
    },
    endpoint::v3::endpoint_discovery_service_server::{
        EndpointDiscoveryService, EndpointDiscoveryServiceServer,
    },
    extension::v3::extension_config_discovery_service_server::{
        ExtensionConfigDiscoveryService, ExtensionConfigDiscoveryServiceServer,
    },
    listener::v3::listener_discovery_service_server::{
        ListenerDiscoveryService, ListenerDiscoveryServiceServer,
    },
    route::v3::route_discovery_service_server::{
        RouteDiscoveryService, RouteDiscoveryServiceServer,
    },
    runtime::v3::runtime_discovery_service_server::{
        RuntimeDiscoveryService, RuntimeDiscoveryServiceServer,
    },
    secret::v3::secret_discovery_service_server::{
        SecretDiscoveryService, SecretDiscoveryServiceServer,
    },
};
use std::path::Path;
use tokio::{
    net::{TcpListener, UnixListener},
    runtime::Runtime,
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::Router},
};

/// Serves all of them at an address and, if there is one, at a pipe.
pub(super) fn serve(
    runtime: &Runtime,
    service: &Service,
    listener: std::net::TcpListener,
    pipe: Option<&Path>,
) {
    listener.set_nonblocking(true).unwrap();
    let router = all(service);
    runtime.spawn(async move {
        let listener = TcpListener::from_std(listener).unwrap();
        let accepted = stream::unfold(listener, |listener| async move {
            let accepted = listener.accept().await.map(|(socket, _)| socket);
            Some((accepted, listener))
        });
        router.serve_with_incoming(accepted).await
    });
    if let Some(path) = pipe {
        let _ = std::fs::remove_file(path);
        let guard = runtime.enter();
        let listener = UnixListener::bind(path).unwrap();
        drop(guard);
        let accepted = stream::unfold(listener, |listener| async move {
            let accepted = listener.accept().await.map(|(socket, _)| socket);
            Some((accepted, listener))
        });
        runtime.spawn(all(service).serve_with_incoming(accepted));
    }
}

/// All of them.
fn all(service: &Service) -> Router {
    Server::builder()
        .add_service(AggregatedDiscoveryServiceServer::new(service.clone()))
        .add_service(ClusterDiscoveryServiceServer::new(service.clone()))
        .add_service(EndpointDiscoveryServiceServer::new(service.clone()))
        .add_service(ListenerDiscoveryServiceServer::new(service.clone()))
        .add_service(RouteDiscoveryServiceServer::new(service.clone()))
        .add_service(SecretDiscoveryServiceServer::new(service.clone()))
        .add_service(RuntimeDiscoveryServiceServer::new(service.clone()))
        .add_service(ExtensionConfigDiscoveryServiceServer::new(service.clone()))
}

/// A service in both protocols, and what else its trait has.
macro_rules! serves {
    ($service:ident, $name:literal, $State:ident $state:ident, $Delta:ident $delta:ident $(, $fetch:ident)?) => {
        #[tonic::async_trait]
        impl $service for Service {
            type $State = Answers<DiscoveryResponse>;
            type $Delta = Answers<DeltaDiscoveryResponse>;

            async fn $state(
                &self,
                request: Request<Streaming<DiscoveryRequest>>,
            ) -> Result<Response<Self::$State>, Status> {
                converse::<State>(self, request, $name)
            }

            async fn $delta(
                &self,
                request: Request<Streaming<DeltaDiscoveryRequest>>,
            ) -> Result<Response<Self::$Delta>, Status> {
                converse::<Delta>(self, request, $name)
            }

            $(async fn $fetch(
                &self,
                _: Request<DiscoveryRequest>,
            ) -> Result<Response<DiscoveryResponse>, Status> {
                Err(Status::unimplemented("REST"))
            })?
        }
    };
}

serves!(AggregatedDiscoveryService, "ads", StreamAggregatedResourcesStream stream_aggregated_resources, DeltaAggregatedResourcesStream delta_aggregated_resources);
serves!(ClusterDiscoveryService, "cds", StreamClustersStream stream_clusters, DeltaClustersStream delta_clusters, fetch_clusters);
serves!(EndpointDiscoveryService, "eds", StreamEndpointsStream stream_endpoints, DeltaEndpointsStream delta_endpoints, fetch_endpoints);
serves!(ListenerDiscoveryService, "lds", StreamListenersStream stream_listeners, DeltaListenersStream delta_listeners, fetch_listeners);
serves!(RouteDiscoveryService, "rds", StreamRoutesStream stream_routes, DeltaRoutesStream delta_routes, fetch_routes);
serves!(SecretDiscoveryService, "sds", StreamSecretsStream stream_secrets, DeltaSecretsStream delta_secrets, fetch_secrets);
serves!(ExtensionConfigDiscoveryService, "ecds", StreamExtensionConfigsStream stream_extension_configs, DeltaExtensionConfigsStream delta_extension_configs, fetch_extension_configs);
serves!(RuntimeDiscoveryService, "rtds", StreamRuntimeStream stream_runtime, DeltaRuntimeStream delta_runtime, fetch_runtime);
