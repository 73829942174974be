//! The admin listener over real sockets.

use super::*;
use crate::listener::bind::Listening;
use arc_swap::ArcSwap;
use outrigger_filters::endpoints::{Endpoint, Live, Via};
use outrigger_xds::{
    report::{EngineKind, EngineState, Health, Load, Model},
    resource::{cluster::LbPolicy, endpoint::Address},
};
use serde_json::json;
use std::{
    net::{SocketAddr, TcpListener},
    sync::{Mutex, atomic::AtomicU8},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    sync::oneshot,
    time::timeout,
};

/// Of a configuration dump: more than the sockets of a connection take in.
const DUMP_BYTES: usize = 12 << 20;

/// A running admin listener and what it was told.
struct Running {
    address: SocketAddr,
    /// Index into the states.
    state: Arc<AtomicU8>,
    told: Arc<Mutex<Vec<String>>>,
    stop: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

struct Answer {
    head: String,
    body: String,
}

impl Answer {
    fn status(&self) -> u16 {
        self.head.split(' ').nth(1).unwrap().parse().unwrap()
    }

    fn json(&self) -> Value {
        assert!(
            self.head.contains("content-type: application/json\r\n"),
            "{}",
            self.head
        );
        serde_json::from_str(&self.body).unwrap()
    }
}

fn endpoint(host: &str, via: Via, live: Live) -> Arc<Endpoint> {
    Arc::new(Endpoint {
        id: format!("node/{host}:8000").as_str().into(),
        address: Address {
            host: host.into(),
            port: 8000,
        },
        via,
        hostname: host.into(),
        weight: 1,
        cluster: "engines".into(),
        live: Arc::new(ArcSwap::from_pointee(live)),
        ..Endpoint::default()
    })
}

fn clusters() -> Vec<Arc<ClusterView>> {
    let state = |health| {
        let model = Model {
            id: "smollm2".into(),
            ..Model::default()
        };
        Arc::new(EngineState {
            kind: EngineKind::Vllm,
            health,
            models: vec![model],
            reason: "a\nb".into(),
            ..EngineState::default()
        })
    };
    let load = Load {
        active_prefill_tokens: 321,
        ..Load::default()
    };
    let local = endpoint(
        "127.0.0.1",
        Via::Local,
        Live {
            state: state(Health::Healthy),
            load,
            heard: true,
            ..Live::default()
        },
    );
    (0..5).for_each(|_| local.host.tally.begin());
    let dead = endpoint(
        "127.0.0.2",
        Via::Peer,
        Live {
            state: state(Health::Dead),
            heard: true,
            ..Live::default()
        },
    );
    dead.inhibit();
    vec![Arc::new(ClusterView {
        name: "engines".into(),
        lb_policy: LbPolicy::RoundRobin,
        connect_timeout: Duration::from_secs(5),
        silent_peer: false,
        original_dst: None,
        plain: false,
        even: true,
        override_host: Arc::default(),
        breakers: Arc::default(),
        endpoints: vec![local, dead],
    })]
}

async fn start(limits: Limits) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let listener = Acceptor::new(Listening::Tcp(listener)).unwrap();
    let number = Arc::new(AtomicU8::new(0));
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = |what: &'static str| {
        let told = told.clone();
        move || told.lock().unwrap().push(what.to_owned())
    };
    let (for_state, for_logs) = (number.clone(), told.clone());
    let states = [
        ServerState::Live,
        ServerState::Draining,
        ServerState::PreInitializing,
        ServerState::Initializing,
    ];
    let state = Arc::new(AdminState {
        started: Instant::now(),
        runtime: Arc::default(),
        serving: Arc::default(),
        server_state: Arc::new(move || states[usize::from(for_state.load(Relaxed))]),
        config_dump: Arc::new(
            |_| json!({"configs": [{"@type": "t", "static_listeners": [{"name": "big", "pad": "x".repeat(DUMP_BYTES)}]}, {"one": {"a": 1}}]}),
        ),
        client_status: Arc::new(|_| csds::Client::default()),
        certs: Arc::new(|| json!({"certificates": []})),
        clusters: Arc::new(clusters),
        listeners: Arc::new(|| {
            vec![
                (
                    "outbound".into(),
                    SocketAddr::from(([127, 0, 0, 1], 10000)).into(),
                ),
                ("piped".into(), EndAddress::Pipe("/run/l".into())),
            ]
        }),
        options: json!({"concurrency": 2}),
        node: ("n1".into(), "c1".into()),
        leave: Arc::new(|_, _| {}),
        on_drain: Arc::new(tell("drain")),
        set_log_level: Arc::new(move |directives| {
            for_logs.lock().unwrap().push(directives.to_owned());
            if directives.contains("loud") {
                Err("\"loud\" is no log level".into())
            } else {
                Ok("info,h2=warn".into())
            }
        }),
        reopen_logs: Arc::new(tell("reopen")),
        quit: Arc::new(tell("quit")),
    });
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(serve_within(listener, state, limits, stopped));
    Running {
        address,
        state: number,
        told,
        stop: Some(stop),
        task,
    }
}

impl Running {
    async fn ask(&self, method: &str, path: &str) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        Answer {
            head: format!("{head}\r\n"),
            body: body.to_owned(),
        }
    }

    #[track_caller]
    fn told(&self, expect: &[&str]) {
        assert_eq!(std::mem::take(&mut *self.told.lock().unwrap()), expect);
    }
}

/// Reads to the end; whether that came in time.
async fn closes(stream: &mut TcpStream, within: Duration) -> bool {
    let mut rest = Vec::new();
    timeout(within, stream.read_to_end(&mut rest)).await.is_ok()
}

#[tokio::test]
async fn plain_paths_and_their_headers() {
    let admin = start(Limits::default()).await;
    for (path, expect) in [
        ("/listeners", "outbound::127.0.0.1:10000\npiped::/run/l\n"),
        ("/live", "LIVE\n"),
        ("/ready", "LIVE\n"),
        ("/help", "admin commands are:\n  /: Admin home page\n"),
        ("/stats?filter=%5Eserver.live", "server.live: 1\n"),
        (
            "/stats/prometheus?filter=server.live",
            "# HELP envoy_server_live ",
        ),
        (
            "/stats/prometheus?filter=%5Eenvoy_server_live$",
            "# HELP envoy_server_live ",
        ),
        (
            "/stats?format=prometheus&filter=server.live",
            "# HELP envoy_server_live ",
        ),
    ] {
        let answer = admin.ask("GET", path).await;
        assert_eq!(answer.status(), 200, "{path}");
        assert!(answer.body.starts_with(expect), "{path}: {}", answer.body);
        for header in [
            "content-type: text/plain; charset=UTF-8\r\n",
            "cache-control: no-cache, max-age=0\r\n",
            "x-content-type-options: nosniff\r\n",
        ] {
            assert!(answer.head.contains(header), "{path}: {}", answer.head);
        }
    }
    let home = admin.ask("GET", "/").await;
    assert!(
        home.head
            .contains("content-type: text/html; charset=UTF-8\r\n")
            && home.body.contains("href=\"/stats\"")
    );
    let unknown = admin.ask("GET", "/nothing").await;
    assert_eq!(unknown.status(), 404);
    assert!(
        unknown
            .body
            .starts_with("invalid path. admin commands are:\n"),
        "{}",
        unknown.body
    );
}

#[tokio::test]
async fn json_paths() {
    let admin = start(Limits::default()).await;
    assert_eq!(
        admin.ask("GET", "/certs").await.json(),
        json!({"certificates": []})
    );
    let listeners = admin.ask("GET", "/listeners?format=json").await.json();
    let address = json!({"socket_address": {"address": "127.0.0.1", "port_value": 10000}});
    assert_eq!(
        listeners,
        json!({"listener_statuses": [
            {"name": "outbound", "local_address": address},
            {"name": "piped", "local_address": {"pipe": {"path": "/run/l"}}},
        ]})
    );
    let info = admin.ask("GET", "/server_info").await.json();
    assert_eq!(
        (&info["state"], &info["node"]["id"]),
        (&json!("LIVE"), &json!("n1"))
    );
    assert_eq!(info["command_line_options"], json!({"concurrency": 2}));
    assert!(
        info["uptime_current_epoch"]
            .as_str()
            .unwrap()
            .ends_with('s')
    );
    let memory = admin.ask("GET", "/memory").await.json();
    assert!(
        memory["total_physical_bytes"]
            .as_str()
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > 1_000_000
    );
    let stats = admin
        .ask("GET", "/stats?format=json&filter=server.state")
        .await
        .json();
    assert_eq!(
        stats,
        json!({"stats": [{"name": "server.state", "value": 0}]})
    );

    let dump = admin.ask("GET", "/config_dump").await;
    assert!(
        dump.body.starts_with("{\n \"configs\": [\n  {\n"),
        "one space of indent"
    );
    assert_eq!(dump.json()["configs"].as_array().unwrap().len(), 2);
    assert_eq!(
        admin.ask("GET", "/config_dump?resource=one").await.json(),
        json!({"configs": [{"a": 1}]})
    );
    let list = admin
        .ask("GET", "/config_dump?resource=static_listeners")
        .await
        .json();
    assert_eq!(list["configs"][0]["name"], "big");
    assert_eq!(
        admin.ask("GET", "/config_dump?resource=x").await.status(),
        404
    );
    assert_eq!(admin.ask("GET", "/config_dump?mask=x").await.status(), 400);
}

#[tokio::test]
async fn clusters_as_text_and_json() {
    let admin = start(Limits::default()).await;
    let text = admin.ask("GET", "/clusters").await.body;
    for line in [
        "engines::observability_name::engines",
        "engines::added_via_api::false",
        "engines::127.0.0.1:8000::rq_total::5",
        "engines::127.0.0.1:8000::health_flags::healthy",
        "engines::127.0.0.1:8000::success_rate::-1",
        "engines::127.0.0.1:8000::engine_id::node/127.0.0.1:8000",
        "engines::127.0.0.1:8000::engine_kind::vllm",
        "engines::127.0.0.1:8000::model::smollm2",
        "engines::127.0.0.1:8000::active_prefill_tokens::321",
        "engines::127.0.0.1:8000::kv_events::false",
        "engines::127.0.0.2:8000::health_flags::/failed_active_hc/failed_outlier_check",
        "engines::127.0.0.2:8000::health::dead",
        "engines::127.0.0.2:8000::health_reason::a b",
        "engines::127.0.0.2:8000::via::peer",
    ] {
        assert!(text.lines().any(|known| known == line), "{line} in\n{text}");
    }
    let json = admin.ask("GET", "/clusters?format=json").await.json();
    let hosts = &json["cluster_statuses"][0]["host_statuses"];
    assert_eq!(
        hosts[0]["address"]["socket_address"],
        json!({"address": "127.0.0.1", "port_value": 8000})
    );
    assert!(
        hosts[0]["stats"]
            .as_array()
            .unwrap()
            .contains(&json!({"name": "rq_total", "value": "5"}))
    );
    assert_eq!(
        hosts[0]["health_status"],
        json!({"eds_health_status": "HEALTHY"})
    );
    assert_eq!(
        hosts[1]["health_status"]["failed_active_health_check"],
        true
    );
    assert_eq!(hosts[0]["outrigger"]["load"]["active_prefill_tokens"], 321);
    assert_eq!(admin.ask("GET", "/clusters?filter=%5Eother").await.body, "");
}

#[tokio::test]
async fn what_changes_something_needs_post() {
    let admin = start(Limits::default()).await;
    for (path, expect) in [
        ("/drain_listeners?graceful", "drain"),
        ("/reopen_logs", "reopen"),
        ("/quitquitquit", "quit"),
    ] {
        let refused = admin.ask("GET", path).await;
        assert_eq!(refused.status(), 405, "{path}");
        assert_eq!(refused.body, "Method GET not allowed, POST required.");
        admin.told(&[]);
        let done = admin.ask("POST", path).await;
        assert_eq!((done.status(), done.body.as_str()), (200, "OK\n"), "{path}");
        admin.told(&[expect]);
    }
    let refused = admin.ask("POST", "/reset_counters").await;
    assert_eq!(refused.status(), 501);
    assert!(refused.body.starts_with("/reset_counters is not supported"));
}

#[tokio::test]
async fn health_check_and_states_turn_ready() {
    let admin = start(Limits::default()).await;
    assert_eq!(admin.ask("GET", "/healthcheck/fail").await.status(), 405);
    assert_eq!(admin.ask("POST", "/healthcheck/fail").await.body, "OK\n");
    let ready = admin.ask("GET", "/ready").await;
    assert_eq!((ready.status(), ready.body.as_str()), (503, "DRAINING\n"));
    assert_eq!(
        admin.ask("GET", "/server_info").await.json()["state"],
        "DRAINING"
    );
    assert_eq!(admin.ask("POST", "/healthcheck/ok").await.body, "OK\n");
    assert_eq!(admin.ask("GET", "/ready").await.status(), 200);
    for (number, name) in [
        (1, "DRAINING\n"),
        (2, "PRE_INITIALIZING\n"),
        (3, "INITIALIZING\n"),
    ] {
        admin.state.store(number, Relaxed);
        let ready = admin.ask("GET", "/ready").await;
        assert_eq!((ready.status(), ready.body.as_str()), (503, name));
        // Another question.
        assert_eq!(admin.ask("GET", "/live").await.status(), 200);
    }
}

#[tokio::test]
async fn log_levels() {
    let admin = start(Limits::default()).await;
    for (query, expect) in [
        ("", ""),
        ("?level=debug", "debug"),
        (
            "?paths=h2:warning,outrigger_proxy::admin:trace",
            "h2=warning,outrigger_proxy::admin=trace",
        ),
        ("?h2=error", "h2=error"),
    ] {
        let answer = admin.ask("POST", &format!("/logging{query}")).await;
        assert_eq!(
            (answer.status(), answer.body.as_str()),
            (200, "active loggers:\n  info\n  h2=warn\n")
        );
        admin.told(&[expect]);
    }
    let wrong = admin.ask("POST", "/logging?level=loud").await;
    assert_eq!(wrong.status(), 400);
    assert!(
        wrong
            .body
            .starts_with("error: \"loud\" is no log level\nusage: "),
        "{}",
        wrong.body
    );
    assert_eq!(
        admin.ask("POST", "/logging?a=info&b=info").await.status(),
        400
    );
}

#[tokio::test]
async fn wrong_queries_of_stats_are_refused() {
    let admin = start(Limits::default()).await;
    let long = format!("filter={}", "x".repeat(2000));
    for query in ["filter=%28", "format=xml", long.as_str()] {
        assert_eq!(
            admin.ask("GET", &format!("/stats?{query}")).await.status(),
            400,
            "{query}"
        );
    }
}

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let admin = start(Limits {
        connections_max: 2,
        ..Limits::default()
    })
    .await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(admin.address).await.unwrap();
        stream
            .write_all(b"GET /ready HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 200");
        held.push(stream);
    }
    let mut refused = String::new();
    TcpStream::connect(admin.address)
        .await
        .unwrap()
        .read_to_string(&mut refused)
        .await
        .unwrap();
    assert!(
        refused.starts_with("HTTP/1.1 503 ")
            && refused.ends_with("\r\n\r\ntoo many admin connections\n")
    );
    let counted = crate::metrics::render();
    assert!(counted.contains("outrigger_admin_connections_refused_total 1\n"));
    held.pop();
    timeout(Duration::from_secs(5), async {
        // The place is free as soon as the closing was noticed.
        loop {
            let mut stream = TcpStream::connect(admin.address).await.unwrap();
            stream
                .write_all(b"GET /ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
                .await
                .unwrap();
            let mut text = String::new();
            if stream.read_to_string(&mut text).await.is_ok() && text.ends_with("LIVE\n") {
                break;
            }
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn slow_clients_are_let_go() {
    let short = Duration::from_millis(100);
    let long = Duration::from_secs(600);
    let admin = start(Limits {
        head_timeout: short,
        idle_timeout: long,
        ..Limits::default()
    })
    .await;
    // What begins with a P may be HTTP/2.
    for begun in [&b"GET /ready HT"[..], b"P", b"PRI * HTTP/2.0\r\n"] {
        let mut half_a_head = TcpStream::connect(admin.address).await.unwrap();
        half_a_head.write_all(begun).await.unwrap();
        assert!(
            closes(&mut half_a_head, Duration::from_secs(5)).await,
            "a head that never ends: {begun:?}"
        );
    }

    let admin = start(Limits {
        idle_timeout: short,
        ..Limits::default()
    })
    .await;
    let mut idle = TcpStream::connect(admin.address).await.unwrap();
    idle.write_all(b"GET /ready HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    assert!(
        closes(&mut idle, Duration::from_secs(5)).await,
        "no second request"
    );

    // Asks for megabytes and reads none: the answer is cut off, and what was sent of it is all there is.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut deaf = socket.connect(admin.address).await.unwrap();
    deaf.write_all(b"GET /config_dump HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    deaf.readable().await.unwrap();
    tokio::time::sleep(short * 10).await;
    let mut got = Vec::new();
    let _ = timeout(Duration::from_secs(5), deaf.read_to_end(&mut got))
        .await
        .expect("the connection is over");
    assert!(got.len() < DUMP_BYTES, "{} bytes", got.len());

    let admin = start(Limits {
        age_max: short,
        ..Limits::default()
    })
    .await;
    let mut old = TcpStream::connect(admin.address).await.unwrap();
    old.write_all(b"GET /ready HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    assert!(closes(&mut old, Duration::from_secs(5)).await, "old enough");
}

#[tokio::test]
async fn shutdown_ends_idle_connections_and_the_listener() {
    let mut admin = start(Limits::default()).await;
    let mut idle = TcpStream::connect(admin.address).await.unwrap();
    idle.write_all(b"GET /ready HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    idle.readable().await.unwrap();
    admin.stop.take().unwrap().send(()).unwrap();
    timeout(Duration::from_secs(5), &mut admin.task)
        .await
        .unwrap()
        .unwrap();
    assert!(closes(&mut idle, Duration::from_secs(1)).await);
    assert!(TcpStream::connect(admin.address).await.is_err());
}
