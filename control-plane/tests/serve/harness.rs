//! A directory, a control plane that serves it, and clients that look closely.

use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use outrigger_control_plane::{
    serve::{Options, Running, start},
    tls,
};
use outrigger_xds::{
    subscription::Kind,
    wire::envoy::{
        config::core::v3::Node,
        service::discovery::v3::{
            DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
            aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
        },
    },
};
use serde_json::Value;
use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

/// For something to happen; the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A directory and who serves it.
pub(crate) struct Served {
    pub(crate) directory: PathBuf,
    options: Options,
    pub(crate) running: Running,
}

impl Served {
    /// With these files.
    pub(crate) async fn new(test: &str, files: &[(&str, &str)]) -> Self {
        Self::with(test, files, |_| {}).await
    }

    /// With leases of so many seconds.
    pub(crate) async fn leasing(test: &str, files: &[(&str, &str)], lease_s: u64) -> Self {
        Self::with(test, files, |options| {
            options.leases = Some(leases_of(&options.config));
            options.lease_s = lease_s;
        })
        .await
    }

    /// For those who may come.
    pub(crate) async fn secured(test: &str, files: &[(&str, &str)], tls: tls::Options) -> Self {
        Self::with(test, files, |options| options.tls = tls).await
    }

    /// With these files, and other options.
    pub(crate) async fn with(
        test: &str,
        files: &[(&str, &str)],
        change: impl FnOnce(&mut Options),
    ) -> Self {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("serve-{test}"));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        for (name, text) in files {
            fs::write(directory.join(name), text).unwrap();
        }
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let mut options = Options {
            config: directory.clone(),
            listen: any,
            admin: any,
            leases: None,
            lease_s: 30,
            tls: tls::Options::default(),
            state: None,
            versions_max: 50,
            rollout: vec![100],
            rollout_step_s: 60,
            drain_time_s: 0,
            log_level: "info".into(),
        };
        change(&mut options);
        Self {
            running: start(&options).await.unwrap(),
            directory,
            options,
        }
    }

    /// Ends, and begins anew; meanwhile this happens.
    pub(crate) async fn restarted(self, meanwhile: impl FnOnce(&Path)) -> Self {
        self.restarted_after(Duration::ZERO, meanwhile).await
    }

    /// The same; streams end over this time.
    pub(crate) async fn restarted_after(
        self,
        leave: Duration,
        meanwhile: impl FnOnce(&Path),
    ) -> Self {
        let Self {
            directory,
            options,
            running,
        } = self;
        running.end(leave).await.unwrap();
        meanwhile(&directory);
        // What is left of the one before lets go of its state.
        let running = eventually("it starts again", async || start(&options).await.ok()).await;
        Self {
            directory,
            options,
            running,
        }
    }

    /// A file is replaced as a whole.
    pub(crate) fn put(&self, name: &str, text: &str) {
        let new = self.directory.join(".new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.directory.join(name)).unwrap();
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        ask(self.running.admin, http::Request::get(path)).await
    }

    pub(crate) async fn post(&self, path: &str) -> (u16, String) {
        ask(self.running.admin, http::Request::post(path)).await
    }

    pub(crate) async fn json(&self, path: &str) -> Value {
        let (status, body) = self.get(path).await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    pub(crate) async fn channel(&self) -> Channel {
        let uri = format!("http://{}", self.running.address);
        Channel::from_shared(uri).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn delta(&self, user_agent: &str) -> Delta {
        self.delta_of(node(user_agent)).await
    }

    /// Of a node that says this of itself.
    pub(crate) async fn delta_of(&self, node: Node) -> Delta {
        Delta::over(self.channel().await, node).await
    }

    pub(crate) async fn state(&self) -> Result<State, Status> {
        let (sender, receiver) = mpsc::channel(16);
        let mut client = AggregatedDiscoveryServiceClient::new(self.channel().await);
        let requests = ReceiverStream::new(receiver);
        let answers = client.stream_aggregated_resources(requests).await?;
        Ok(State {
            sender,
            answers: answers.into_inner(),
        })
    }
}

/// Where leases are kept.
pub(crate) fn leases_of(directory: &Path) -> PathBuf {
    directory.join(".leases")
}

/// Of an admin.
pub(crate) async fn ask(admin: SocketAddr, request: http::request::Builder) -> (u16, String) {
    let stream = tokio::net::TcpStream::connect(admin).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = request
        .header("host", "admin")
        .body(Empty::<bytes::Bytes>::new())
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

pub(crate) fn node(user_agent: &str) -> Node {
    Node {
        id: "test".into(),
        user_agent_name: user_agent.into(),
        ..Node::default()
    }
}

/// What `look` finds, as soon as it finds something.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = timeout(PATIENCE, async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    found.await.unwrap_or_else(|_| panic!("never: {what}"))
}

pub(crate) struct State {
    pub(crate) sender: mpsc::Sender<DiscoveryRequest>,
    pub(crate) answers: Streaming<DiscoveryResponse>,
}

impl State {
    pub(crate) async fn next(&mut self) -> Result<Option<DiscoveryResponse>, Status> {
        timeout(PATIENCE, self.answers.message())
            .await
            .expect("an answer")
    }
}

pub(crate) struct Delta {
    node: Option<Node>,
    pub(crate) sender: mpsc::Sender<DeltaDiscoveryRequest>,
    pub(crate) answers: Streaming<DeltaDiscoveryResponse>,
}

impl Delta {
    pub(crate) async fn over(channel: Channel, node: Node) -> Self {
        let (sender, receiver) = mpsc::channel(16);
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let requests = ReceiverStream::new(receiver);
        let answers = client.delta_aggregated_resources(requests).await.unwrap();
        Self {
            node: Some(node),
            sender,
            answers: answers.into_inner(),
        }
    }

    pub(crate) async fn send(&mut self, request: DeltaDiscoveryRequest) {
        let node = self.node.take();
        let request = DeltaDiscoveryRequest { node, ..request };
        self.sender.send(request).await.unwrap();
    }

    pub(crate) async fn want(&mut self, kind: Kind, names: &[&str]) {
        self.send(DeltaDiscoveryRequest {
            type_url: kind.type_url().into(),
            resource_names_subscribe: names.iter().map(|name| (*name).into()).collect(),
            ..DeltaDiscoveryRequest::default()
        })
        .await;
    }

    pub(crate) async fn next(&mut self) -> DeltaDiscoveryResponse {
        let answer = timeout(PATIENCE, self.answers.message())
            .await
            .expect("an answer");
        answer.unwrap().expect("the stream goes on")
    }

    /// Takes the next answer, or refuses it, and gives it as `Kind[names] -[names]`.
    pub(crate) async fn take(&mut self, error: Option<&str>) -> String {
        let answer = self.next().await;
        self.answer(&answer, error).await;
        written(&answer)
    }

    pub(crate) async fn answer(&mut self, answer: &DeltaDiscoveryResponse, error: Option<&str>) {
        self.send(DeltaDiscoveryRequest {
            type_url: answer.type_url.clone(),
            response_nonce: answer.nonce.clone(),
            error_detail: error.map(|message| outrigger_xds::wire::google::rpc::Status {
                code: 3,
                message: message.into(),
            }),
            ..DeltaDiscoveryRequest::default()
        })
        .await;
    }

    /// Nothing more is on its way: an answer that was asked for after all else comes first.
    pub(crate) async fn is_quiet(&mut self) {
        self.want(Kind::Secrets, &["nothing of this name"]).await;
        assert_eq!(self.take(None).await, "Secrets[] -[nothing of this name]");
    }
}

pub(crate) fn written(answer: &DeltaDiscoveryResponse) -> String {
    let names: Vec<&str> = answer.resources.iter().map(|it| it.name.as_str()).collect();
    let kind = Kind::of(&answer.type_url).unwrap();
    let mut text = format!("{kind:?}[{}]", names.join(" "));
    if !answer.removed_resources.is_empty() {
        text.push_str(&format!(" -[{}]", answer.removed_resources.join(" ")));
    }
    text
}

/// A cluster whose endpoints come by EDS.
pub(crate) fn cluster(name: &str) -> String {
    format!(
        r#"{{"@type": type.googleapis.com/envoy.config.cluster.v3.Cluster, name: {name}, type: EDS, eds_cluster_config: {{eds_config: {{ads: {{}}, resource_api_version: V3}}}}}}"#
    )
}

/// Its endpoints.
pub(crate) fn endpoints(name: &str, port: u16) -> String {
    format!(
        r#"{{"@type": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment, cluster_name: {name}, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}"#
    )
}

/// Routes that lead to a cluster.
pub(crate) fn routes(cluster: &str) -> String {
    format!(
        r#"{{"@type": type.googleapis.com/envoy.config.route.v3.RouteConfiguration, name: table, virtual_hosts: [{{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: {cluster}}}}}]}}]}}"#
    )
}

/// A listener with those routes, and a filter of ours.
pub(crate) const LISTENER: &str = r#"
"@type": type.googleapis.com/envoy.config.listener.v3.Listener
name: edge
address: {socket_address: {address: 127.0.0.1, port_value: 8080}}
filter_chains:
- filters:
  - name: hcm
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: edge
      rds: {route_config_name: table, config_source: {ads: {}, resource_api_version: V3}}
      http_filters:
      - name: ours
        typed_config:
          "@type": type.googleapis.com/xds.type.v3.TypedStruct
          type_url: type.googleapis.com/outrigger.filters.http.openai.v1.Config
          value: {}
      - name: router
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
"#;

/// Everything that one cluster needs.
pub(crate) fn everything() -> Vec<(&'static str, String)> {
    vec![
        ("clusters.yaml", format!("resources: [{}]", cluster("a"))),
        ("endpoints.yaml", format!("[{}]", endpoints("a", 1))),
        ("routes.yaml", routes("a")),
        ("listener.yaml", LISTENER.into()),
    ]
}

pub(crate) fn as_str<'a>(files: &'a [(&'static str, String)]) -> Vec<(&'a str, &'a str)> {
    files
        .iter()
        .map(|(name, text)| (*name, text.as_str()))
        .collect()
}
