//! No request fails and no stream breaks while our control plane changes a proxy at random: clusters, endpoints, weights,
//! DRAINING, filters, certificates, filter chains, listeners and virtual hosts, over ADS, in both protocols.

use super::{
    ads::ads_source,
    dynamic::{address, answers, listener, table, typed},
    dynamic_listeners::held,
    dynamic_load::{Seen, http1, http2, server},
    dynamic_tls::{certificate, secret},
    tls::{Ca, Pair, TlsClient},
};
use outrigger_conformance::harness::{
    Client, ControlPlane, Process, Upstream, driven_bootstrap, eventually, free_address, metric,
    scratch,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IteratorRandom};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");
const CHANGES: usize = 200;
/// So often the next change waits until the last one is live; else it comes whenever it likes.
const LIVE_EVERY: usize = 10;
/// Between two changes at most.
const PAUSE: Duration = Duration::from_millis(120);
const SERVERS: usize = 3;
/// Clusters that there may be.
const CLUSTERS: usize = 5;
/// Filters that may stand before the router.
const FILTERS: [&str; 3] = ["header_mutation", "local_ratelimit", "cors"];

/// An endpoint of a cluster.
#[derive(Clone, Copy)]
struct Endpoint {
    weight: u32,
    is_draining: bool,
}

/// A cluster: its endpoints by server.
#[derive(Clone)]
struct Backend {
    endpoints: BTreeMap<usize, Endpoint>,
    connect_timeout_s: u32,
}

impl Backend {
    fn new(rng: &mut StdRng) -> Self {
        let endpoint = Endpoint {
            weight: 1,
            is_draining: false,
        };
        Self {
            endpoints: BTreeMap::from([(rng.random_range(0..SERVERS), endpoint)]),
            connect_timeout_s: 5,
        }
    }

    fn takes(&self) -> bool {
        self.endpoints
            .values()
            .any(|endpoint| !endpoint.is_draining)
    }
}

/// All that a proxy is told.
#[derive(Clone)]
struct World {
    clusters: BTreeMap<usize, Backend>,
    /// Which of them get requests, and how many of a sum.
    weights: BTreeMap<usize, u32>,
    /// Those that may get some until the next change is live: several changes may come at once, and then endpoints that
    /// leave go before routes do.
    weighted: BTreeSet<usize>,
    filters: BTreeSet<usize>,
    /// Which certificate is shown.
    pair: usize,
    /// Chains beside the one that everybody meets.
    chains: BTreeSet<u32>,
    /// Virtual hosts that nobody asks for.
    hosts: BTreeSet<u32>,
    /// Listeners that nobody comes to, with their ports.
    listeners: BTreeMap<u32, SocketAddr>,
}

impl World {
    fn new(rng: &mut StdRng) -> Self {
        Self {
            clusters: BTreeMap::from([(0, Backend::new(rng))]),
            weights: BTreeMap::from([(0, 1)]),
            weighted: BTreeSet::from([0]),
            filters: BTreeSet::new(),
            pair: 0,
            chains: BTreeSet::new(),
            hosts: BTreeSet::new(),
            listeners: BTreeMap::new(),
        }
    }

    /// Whether nothing that gets requests is without anybody who takes them.
    fn serves(&self) -> bool {
        let takes = |cluster: &usize| self.clusters.get(cluster).is_some_and(Backend::takes);
        let mut there = self
            .weighted
            .iter()
            .filter(|cluster| self.clusters.contains_key(cluster));
        !self.weights.is_empty() && self.weights.keys().all(takes) && there.all(takes)
    }

    /// All changes so far are live.
    fn is_live(&mut self) {
        self.weighted = self.weights.keys().copied().collect();
    }

    /// Something is otherwise.
    fn change(&mut self, rng: &mut StdRng) {
        loop {
            let mut next = self.clone();
            next.try_change(rng);
            if next.serves() {
                next.weighted.extend(next.weights.keys());
                *self = next;
                return;
            }
        }
    }

    fn try_change(&mut self, rng: &mut StdRng) {
        let cluster = rng.random_range(0..CLUSTERS);
        match rng.random_range(0..10) {
            0 => drop(
                self.clusters
                    .entry(cluster)
                    .or_insert_with(|| Backend::new(rng)),
            ),
            // With its share of the requests, at once.
            1 => drop((
                self.clusters.remove(&cluster),
                self.weights.remove(&cluster),
            )),
            2 | 3 => self.change_endpoint(cluster, rng),
            4 => self.change_weights(rng),
            5 => toggle(&mut self.filters, rng.random_range(0..FILTERS.len())),
            6 => self.pair += 1,
            7 => toggle(&mut self.chains, rng.random_range(0..4)),
            8 => toggle(&mut self.hosts, rng.random_range(0..4)),
            _ => {
                let name = rng.random_range(0..4);
                if self.listeners.remove(&name).is_none() {
                    self.listeners.insert(name, free_address());
                }
            }
        }
    }

    fn change_endpoint(&mut self, cluster: usize, rng: &mut StdRng) {
        let Some(backend) = self.clusters.get_mut(&cluster) else {
            return;
        };
        let server = rng.random_range(0..SERVERS);
        let endpoint = backend.endpoints.get_mut(&server);
        match (endpoint, rng.random_range(0..4)) {
            (_, 0) => backend.connect_timeout_s = rng.random_range(3..9),
            (Some(endpoint), 1) => endpoint.weight = rng.random_range(1..5),
            (Some(endpoint), 2) => endpoint.is_draining ^= true,
            (Some(_), _) => drop(backend.endpoints.remove(&server)),
            (None, _) => {
                let endpoint = Endpoint {
                    weight: rng.random_range(1..5),
                    is_draining: rng.random_bool(0.2),
                };
                backend.endpoints.insert(server, endpoint);
            }
        }
    }

    fn change_weights(&mut self, rng: &mut StdRng) {
        let count = rng.random_range(1..=self.clusters.len());
        let chosen = self.clusters.keys().copied().choose_multiple(rng, count);
        self.weights = chosen
            .into_iter()
            .map(|cluster| (cluster, rng.random_range(1..10)))
            .collect();
    }
}

fn toggle<T: Ord>(set: &mut BTreeSet<T>, value: T) {
    if !set.remove(&value) {
        set.insert(value);
    }
}

/// What is said, and where.
struct Stage {
    directory: PathBuf,
    servers: [SocketAddr; SERVERS],
    edge: SocketAddr,
    secure: SocketAddr,
    pairs: [Pair; 3],
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Stage {
    fn put(&self, world: &World, number: usize) {
        let mut all = vec![self.table(world, number), self.secret(world)];
        for (cluster, backend) in &world.clusters {
            all.extend([
                cluster_of(*cluster, backend),
                self.assignment(*cluster, backend),
            ]);
        }
        all.push(listener("edge", self.edge, manager(world)));
        all.push(self.secured(world));
        for (name, at) in &world.listeners {
            all.push(listener(
                &format!("listener{name}"),
                *at,
                answers("nobody asks"),
            ));
        }
        replace(&self.directory, &json!({ "resources": all }).to_string());
    }

    fn assignment(&self, cluster: usize, backend: &Backend) -> Value {
        let endpoint = |(server, endpoint): (&usize, &Endpoint)| {
            json!({
                "endpoint": { "address": address(self.servers[*server]) },
                "health_status": if endpoint.is_draining { "DRAINING" } else { "UNKNOWN" },
                "load_balancing_weight": endpoint.weight,
            })
        };
        let all: Vec<_> = backend.endpoints.iter().map(endpoint).collect();
        typed(
            "envoy.config.endpoint.v3.ClusterLoadAssignment",
            json!({ "cluster_name": name(cluster), "endpoints": [{ "lb_endpoints": all }] }),
        )
    }

    /// The change is the name of a virtual host.
    fn table(&self, world: &World, number: usize) -> Value {
        let weighted = world.weights.iter();
        let weighted =
            weighted.map(|(cluster, weight)| json!({ "name": name(*cluster), "weight": weight }));
        let clusters: Vec<_> = weighted.collect();
        let action =
            json!({ "route": { "weighted_clusters": { "clusters": clusters }, "timeout": "0s" } });
        let mut routes = table("table", action);
        routes["virtual_hosts"][0]["name"] = json!(format!("change{number}"));
        for host in &world.hosts {
            let routes_of =
                json!([{ "match": { "prefix": "/" }, "direct_response": { "status": 200 } }]);
            let host = json!({ "name": format!("host{host}"), "domains": [format!("host{host}.example")], "routes": routes_of });
            routes["virtual_hosts"].as_array_mut().unwrap().push(host);
        }
        typed("envoy.config.route.v3.RouteConfiguration", routes)
    }

    fn secret(&self, world: &World) -> Value {
        secret(
            "own",
            certificate(&self.pairs[world.pair % self.pairs.len()]),
        )
    }

    /// The same over TLS, and chains for names that nobody asks for.
    fn secured(&self, world: &World) -> Value {
        let mut secured = listener("secure", self.secure, manager(world));
        let context = typed(
            "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            json!({ "common_tls_context": { "tls_certificate_sds_secret_configs": [{ "name": "own", "sds_config": ads_source() }] } }),
        );
        let tls = json!({ "name": "tls", "typed_config": context });
        secured["filter_chains"][0]["transport_socket"] = tls.clone();
        secured["filter_chains"][0]["name"] = json!("all");
        let of_names = world.chains.iter().map(|chain| {
            let mut other =
                listener("other", self.secure, answers("nobody asks"))["filter_chains"][0].clone();
            other["name"] = json!(format!("chain{chain}"));
            other["filter_chain_match"] =
                json!({ "server_names": [format!("chain{chain}.example")] });
            other["transport_socket"] = tls.clone();
            other
        });
        let of_names: Vec<_> = of_names.collect();
        secured["filter_chains"]
            .as_array_mut()
            .unwrap()
            .extend(of_names);
        let inspector = typed(
            "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
            json!({}),
        );
        secured["listener_filters"] = json!([{ "name": "tls", "typed_config": inspector }]);
        secured
    }
}

fn name(cluster: usize) -> String {
    format!("cluster{cluster}")
}

fn cluster_of(cluster: usize, backend: &Backend) -> Value {
    typed(
        "envoy.config.cluster.v3.Cluster",
        json!({
            "name": name(cluster), "type": "EDS", "eds_cluster_config": { "eds_config": ads_source() },
            "connect_timeout": format!("{}s", backend.connect_timeout_s),
        }),
    )
}

fn manager(world: &World) -> Value {
    let filter = |index: &usize| {
        let (kind, config) = match FILTERS[*index] {
            "header_mutation" => (
                "header_mutation.v3.HeaderMutation",
                json!({ "mutations": { "response_mutations": [
                { "append": { "header": { "key": "x-changed", "value": "yes" } } },
            ] } }),
            ),
            "local_ratelimit" => (
                "local_ratelimit.v3.LocalRateLimit",
                json!({
                    "stat_prefix": "limit", "token_bucket": { "max_tokens": 1_000_000, "fill_interval": "1s" },
                }),
            ),
            _ => ("cors.v3.Cors", json!({})),
        };
        json!({ "name": FILTERS[*index], "typed_config": typed(&format!("envoy.extensions.filters.http.{kind}"), config) })
    };
    let router = typed("envoy.extensions.filters.http.router.v3.Router", json!({}));
    let mut filters: Vec<_> = world.filters.iter().map(filter).collect();
    filters.push(json!({ "name": "router", "typed_config": router }));
    json!({
        "rds": { "config_source": ads_source(), "route_config_name": "table" },
        "http_filters": filters,
    })
}

/// In one step, so that nobody reads half of it.
fn replace(directory: &Path, text: &str) {
    let new = directory.join(".new");
    fs::write(&new, text).unwrap();
    fs::rename(new, directory.join("all.json")).unwrap();
}

async fn is_live(proxy: &Process, number: usize) {
    let wanted = format!("\"change{number}\"");
    eventually("the change is live", || async {
        let dump = Client::get(proxy.admin, "/config_dump").await.text();
        dump.contains(&wanted).then_some(())
    })
    .await;
}

/// A new connection for each request.
async fn tls(place: SocketAddr, client: Arc<TlsClient>, seen: Arc<Seen>) {
    while !seen.over.load(SeqCst) {
        match client.get(place, "/fast").await {
            Some(answer) if answer.status == 200 => drop(seen.good.fetch_add(1, SeqCst)),
            Some(answer) => seen.bad(format!("tls: {}", answer.status)),
            None => seen.bad("tls: no answer".into()),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn change_at_random(api_type: &str, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let ca = Ca::new();
    let servers: [Upstream; SERVERS] = [server().await, server().await, server().await];
    let ((edge, _edge), (secure, _secure)) = (held(), held());
    let stage = Stage {
        directory: scratch("random-changes"),
        servers: [0, 1, 2].map(|server: usize| servers[server].address),
        edge,
        secure,
        pairs: [0, 1, 2].map(|_| ca.pair(&["proxy.test"])),
    };
    fs::create_dir_all(&stage.directory).unwrap();
    let mut world = World::new(&mut rng);
    stage.put(&world, 0);
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let control = ControlPlane::start(PROGRAM, stage.directory.to_str().unwrap(), any).await;
    let path = stage.directory.join(".bootstrap.json");
    let mut config = driven_bootstrap(control.address, "a");
    config["dynamic_resources"]["ads_config"]["api_type"] = json!(api_type);
    fs::write(&path, config.to_string()).unwrap();
    let proxy = Process::with_config(PROGRAM, path.to_str().unwrap(), &[]).await;
    is_live(&proxy, 0).await;
    for place in [edge, secure] {
        eventually("it listens", || async {
            tokio::net::TcpStream::connect(place).await.ok()
        })
        .await;
    }
    let (seen, client) = (
        Arc::new(Seen::default()),
        Arc::new(TlsClient::new(&ca, None)),
    );
    let mut clients = Vec::new();
    for _ in 0..2 {
        clients.push(tokio::spawn(http1(edge, "/fast", seen.clone())));
        clients.push(tokio::spawn(http1(edge, "/slow", seen.clone())));
        clients.push(tokio::spawn(http2(edge, seen.clone())));
        clients.push(tokio::spawn(tls(secure, client.clone(), seen.clone())));
    }
    for number in 1..=CHANGES {
        world.change(&mut rng);
        stage.put(&world, number);
        tokio::time::sleep(rng.random_range(Duration::ZERO..PAUSE)).await;
        if number % LIVE_EVERY == 0 {
            is_live(&proxy, number).await;
            world.is_live();
        }
    }
    seen.over.store(true, SeqCst);
    for client in clients {
        client.await.unwrap();
    }
    seen.conclude(&servers);
    for refused in ["listener_manager_lds", "cluster_manager_cds", "http_rds"] {
        let name = format!("envoy_{refused}_update_rejected");
        assert_eq!(metric(proxy.admin, &name, "").await, 0.0, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_during_random_changes_of_what_changed() {
    change_at_random("DELTA_GRPC", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_during_random_changes_of_the_state_of_the_world() {
    change_at_random("GRPC", 2).await;
}
