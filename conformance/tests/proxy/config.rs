//! Starting: with flags, with a bootstrap, before any engine, and not at all.

use http::Method;
use outrigger_conformance::{
    harness::{
        Client, Process, ProxyBuilder, Upstream, Version, alive, eventually, request, scratch,
    },
    sim::{Config, SimEngine},
};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};
use tokio::net::TcpSocket;

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");
const CHAT: &str = "/v1/chat/completions";

/// A port where nobody listens yet, kept from others: a socket that is only bound shares it with a later listener that
/// names it, and no port 0 finds it.
fn held() -> (SocketAddr, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    (socket.local_addr().unwrap(), socket)
}

#[tokio::test]
async fn before_its_engine_a_proxy_answers_503_and_then_serves() {
    for version in Version::BOTH {
        let (address, _held) = held();
        let proxy = ProxyBuilder::new().engine(address).start();
        let mut client = proxy.client(version).await;
        let body = r#"{"model":"sim","prompt":"hello","max_tokens":2}"#;
        let early = client.post("/v1/completions", body).await;
        assert_eq!(
            (early.status.as_u16(), early.header("x-outrigger-error")),
            (503, "UH"),
            "{version:?}"
        );
        assert!(
            early
                .header("retry-after")
                .parse::<u32>()
                .is_ok_and(|seconds| seconds >= 1)
        );
        assert_eq!(early.json()["error"]["message"], "no healthy upstream");
        assert_eq!(
            Client::get(proxy.admin(), "/ready").await.status,
            200,
            "the proxy itself is ready"
        );
        let config = Config {
            port: address.port(),
            ..Config::default()
        };
        let _engine = SimEngine::start(config).expect("the held port");
        let started = Instant::now();
        proxy.wait_alive(1).await;
        // Tried at most a second apart; the rest is for a busy machine.
        assert!(
            started.elapsed() < Duration::from_millis(2500),
            "{:?}",
            started.elapsed()
        );
        let reply = client.post("/v1/completions", body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(reply.json()["model"], "sim");
    }
}

#[tokio::test]
async fn a_dead_engine_is_tried_at_most_a_second_apart() {
    let (address, _held) = held();
    let proxy = ProxyBuilder::new().engine(address).start();
    // Nobody is there for a while: the pause between tries must not have grown.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let mut tries = Vec::new();
    while tries.len() < 3 {
        // Closed at once: still dead.
        drop(listener.accept().await.unwrap());
        tries.push(Instant::now());
    }
    for pair in tries.windows(2) {
        assert!(pair[1] - pair[0] < Duration::from_millis(1500), "{tries:?}");
    }
    assert_eq!(alive(proxy.admin()).await, 0);
}

#[tokio::test]
async fn an_engine_of_unknown_kind_is_plain_http() {
    let server = Upstream::engine(|mut conn, got| async move {
        let path = got.path().to_owned();
        conn.answer("200 OK", "text/plain", &format!("you asked for {path}"))
            .await
            .then_some(conn)
    })
    .await;
    let proxy = ProxyBuilder::new()
        .engine(server.address)
        .flag("--policy", "kv")
        .start();
    proxy.wait_alive(1).await;
    for version in Version::BOTH {
        let mut client = proxy.client(version).await;
        for path in [CHAT, "/predict?x=1", "/v1/models"] {
            assert_eq!(
                client.post(path, r#"{"model":"any"}"#).await.text(),
                format!("you asked for {path}")
            );
        }
        let listed = client.send(request(Method::GET, "/v1/models", "")).await;
        assert_eq!(listed.status, 404, "it has no list, and says so itself");
    }
}

fn write(name: &str, text: &str) -> PathBuf {
    let path = scratch(name);
    std::fs::write(&path, text).unwrap();
    path
}

struct Ran {
    code: Option<i32>,
    out: String,
    errors: String,
}

fn run(arguments: &[&str]) -> Ran {
    let output = Command::new(PROGRAM)
        .arg("proxy")
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran {
        code: output.status.code(),
        out: text(output.stdout),
        errors: text(output.stderr),
    }
}

fn bootstrap(upstream: SocketAddr, more: &str) -> String {
    let port = upstream.port();
    format!(
        r#"
node: {{id: file, cluster: test}}
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}}}
static_resources:
  listeners:
  - name: outbound
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: file
          {more}
          route_config:
            name: all
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{path: /direct}}
                direct_response: {{status: 418, body: {{inline_string: short and stout}}}}
              - match: {{prefix: "/"}}
                route: {{cluster: plain}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: plain
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: plain
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}
"#
    )
}

#[test]
fn what_pilot_agent_writes_around_its_resources_is_valid() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pilot-agent/bootstrap.json");
    let ran = run(&["-c", path.to_str().unwrap(), "--mode", "validate"]);
    assert_eq!(ran.code, Some(0), "{}", ran.errors);
}

#[tokio::test]
async fn validate_tells_good_from_bad_and_where() {
    let (upstream, _held) = held();
    let good = write("good.yaml", &bootstrap(upstream, ""));
    let ran = run(&["-c", good.to_str().unwrap(), "--mode", "validate"]);
    assert_eq!(ran.code, Some(0), "{}", ran.errors);
    assert!(ran.out.contains("valid"), "{}", ran.out);
    for (text, says) in [
        (
            bootstrap(upstream, "no_such_field: 1"),
            vec!["no_such_field", "listeners[0]"],
        ),
        (
            bootstrap(upstream, "").replace("cluster: plain", "cluster: missing"),
            vec!["missing"],
        ),
        (
            bootstrap(upstream, "stream_idle_timeout: soon"),
            vec!["stream_idle_timeout"],
        ),
        (
            bootstrap(upstream, "").replace("connect_timeout: 1s", "connect_timeout: 0s"),
            vec!["connect_timeout"],
        ),
        (
            bootstrap(upstream, "").replace("clusters:", "cluster_list:"),
            vec!["cluster_list", "static_resources"],
        ),
        ("[".to_owned(), vec![]),
    ] {
        let bad = write("bad.yaml", &text);
        let ran = run(&["-c", bad.to_str().unwrap(), "--mode", "validate"]);
        assert_eq!(ran.code, Some(1), "{text}");
        for word in says {
            assert!(ran.errors.contains(word), "{word}: {}", ran.errors);
        }
    }
    let both = bootstrap(upstream, "no_such_field: 1")
        .replace("cluster: plain", "cluster: plain, other_field: 2");
    let ran = run(&[
        "-c",
        write("both.yaml", &both).to_str().unwrap(),
        "--mode",
        "validate",
    ]);
    assert!(
        ran.errors.contains("no_such_field") && ran.errors.contains("other_field"),
        "all at once: {}",
        ran.errors
    );
}

#[tokio::test]
async fn a_wrong_command_line_is_told_and_nothing_starts() {
    for (arguments, code, says) in [
        (vec!["--no-such-flag"], 2, "--no-such-flag"),
        (
            vec!["--engine", "localhost:8000"],
            1,
            "must begin with http://",
        ),
        (
            vec!["--engine", "http://a:1;role=x", "--peer", "b"],
            1,
            "role=x",
        ),
        (vec!["-c", "/no/such/file"], 1, "/no/such/file"),
        (vec!["-c", "x", "--engine", "http://a:1"], 2, "--engine"),
        // What a file says cannot be said beside it: it would have no effect.
        (vec!["-c", "x", "--peer", "http://a:1"], 2, "--peer"),
        (vec!["-c", "x", "--listen", ":1"], 2, "--listen"),
        (vec!["-c", "x", "--inbound", ":1"], 2, "--inbound"),
        (vec!["-c", "x", "--admin", ":1"], 2, "--admin"),
        (vec!["-c", "x", "--policy", "random"], 2, "--policy"),
        (vec!["-c", "x", "--access-log", "none"], 2, "--access-log"),
        (
            vec!["-c", "x", "--body-bytes-max", "1"],
            2,
            "--body-bytes-max",
        ),
        (
            vec!["--engine-api-key-file", "/no/such/file"],
            1,
            "/no/such/file",
        ),
    ] {
        let ran = run(&[arguments.as_slice(), &["--mode", "validate"]].concat());
        assert_eq!(ran.code, Some(code), "{arguments:?}: {}", ran.errors);
        assert!(ran.errors.contains(says), "{arguments:?}: {}", ran.errors);
    }
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ran = run(&[
        "--listen",
        &address,
        "--inbound",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
        "--access-log",
        "none",
    ]);
    assert_eq!(ran.code, Some(1));
    assert!(
        ran.errors.contains(&address) && ran.errors.contains("outbound"),
        "{}",
        ran.errors
    );
}

#[tokio::test]
async fn a_wrong_command_line_of_envoys_is_told() {
    for (arguments, code, says) in [
        (
            vec!["-c", "x", "--restart-epoch", "1"],
            2,
            "--restart-epoch",
        ),
        (vec!["--config-yaml", "node: ["], 1, "--config-yaml"),
        (
            vec!["--config-yaml", "{}", "--engine", "http://a:1"],
            2,
            "--engine",
        ),
        (
            vec!["--log-path", "/no/such/directory/log"],
            1,
            "/no/such/directory/log",
        ),
    ] {
        let ran = run(&[arguments.as_slice(), &["--mode", "validate"]].concat());
        assert_eq!(ran.code, Some(code), "{arguments:?}: {}", ran.errors);
        assert!(ran.errors.contains(says), "{arguments:?}: {}", ran.errors);
    }
}

#[tokio::test]
async fn envoys_command_line_starts_it() {
    let ran = run(&["--disable-hot-restart", "--hot-restart-version"]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), "disabled\n"));
    let server = Upstream::named("plain").await;
    let text = bootstrap(server.address, "no_such_field: 1");
    let path = write("envoy.yaml", &text);
    let path = path.to_str().unwrap();
    assert_eq!(run(&["-c", path, "--mode", "validate"]).code, Some(1));
    let log = scratch("own.log");
    let over = "{node: {id: over}, static_resources: {clusters: [{name: further, type: STATIC, loadAssignment: {cluster_name: further}}]}}";
    let flags = [
        "--config-yaml",
        over,
        "--service-cluster",
        "group",
        "--allow-unknown-static-fields",
        "--log-path",
        log.to_str().unwrap(),
        "-l",
        "warning",
        "--component-log-level",
        "misc:error",
        "--drain-strategy",
        "immediate",
        "--disable-hot-restart",
    ];
    let process = Process::with_config(PROGRAM, path, &flags).await;
    let outbound = process.listener("outbound").await;
    assert_eq!(
        Client::get(outbound, "/x").await.json()["served_by"],
        "plain"
    );
    let dump = Client::get(process.admin, "/config_dump").await.json();
    let bootstrap = &dump["configs"][0]["bootstrap"];
    assert_eq!(
        bootstrap["node"],
        serde_json::json!({"id": "over", "cluster": "group"})
    );
    let clusters = bootstrap["static_resources"]["clusters"]
        .as_array()
        .unwrap();
    let names: Vec<_> = clusters.iter().map(|cluster| &cluster["name"]).collect();
    assert_eq!(names, ["plain", "further"]);
    let stats = Client::get(process.admin, "/stats/prometheus").await.text();
    assert!(
        stats.contains("envoy_server_static_unknown_fields 1"),
        "{stats}"
    );
    let told = std::fs::read_to_string(&log).unwrap();
    assert!(told.contains("no_such_field"), "{told}");
    assert!(told.contains("--component-log-level"), "{told}");
    assert!(!told.contains("--drain-strategy"), "{told}");
    assert_eq!(process.errors(), "");
}

#[tokio::test]
async fn a_bootstrap_with_a_plain_cluster_serves() {
    let server = Upstream::named("plain").await;
    let path = write("plain.yaml", &bootstrap(server.address, ""));
    let process = Process::with_config(PROGRAM, path.to_str().unwrap(), &[]).await;
    let outbound = process.listener("outbound").await;
    for version in Version::BOTH {
        let mut client = Client::connect(outbound, version).await;
        assert_eq!(client.post("/x", "{}").await.json()["served_by"], "plain");
        let direct = client.post("/direct", "").await;
        assert_eq!(
            (direct.status.as_u16(), direct.text().as_str()),
            (418, "short and stout")
        );
    }
    drop(server);
    let gone = eventually("the server is gone", || async {
        let reply = Client::get(outbound, "/x").await;
        (reply.status == 503).then_some(reply)
    })
    .await;
    assert!(
        gone.text().starts_with("upstream connect error"),
        "Envoy's words: {}",
        gone.text()
    );
    assert_eq!(gone.header("x-outrigger-error"), "UF");
    let dump = Client::get(process.admin, "/config_dump").await;
    assert!(dump.text().contains("\"plain\""), "{}", dump.text());
}
