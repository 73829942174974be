//! Canaries: engines that answer and do not generate, that generate something else, and that are only busy; who is told, and
//! what a probe costs.

use http::Method;
use outrigger_conformance::{
    harness::{
        Client, ProxyBuilder, TestProxy, Version, eventually, free_address, hosts, metric, request,
        send_signal,
    },
    sim::{Config, Fault, FaultKind, Profile, SimEngine},
};
use outrigger_proxy::bootstrap::{FLEET, LOCAL, canary};
use outrigger_xds::resource::{
    bootstrap::Bootstrap,
    canary::{Canary, Enforcing},
    cluster::Cluster,
    health_check::{Checker, HealthCheck},
};
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");
const COMPLETIONS: &str = "/v1/completions";
const ENDPOINT: &str = "x-outrigger-endpoint";

/// A canary that is in a hurry, and asks for no golden answers unless told to.
fn hasty(edit: impl Fn(&mut HealthCheck, &mut Canary)) -> HealthCheck {
    let millis = Duration::from_millis;
    let mut check = HealthCheck {
        timeout: millis(500),
        interval: millis(200),
        unhealthy_interval: millis(50),
        // Of endpoints that no proxy stands beside.
        no_traffic_interval: millis(50),
        no_traffic_healthy_interval: millis(50),
        ..canary()
    };
    let mut config = Canary {
        share_percent: 100.0,
        first_timeout_ms: 500,
        readmission_ms: 100,
        ..Canary::default()
    };
    config.golden.enforcing = Enforcing::Off;
    edit(&mut check, &mut config);
    check.checker = Checker::Canary(config);
    check
}

/// Golden answers at short intervals; the simulated model is never surer than this.
fn golden(check: &mut HealthCheck, config: &mut Canary) {
    check.timeout = Duration::from_secs(5);
    check.interval = Duration::from_secs(60);
    config.golden.enforcing = Enforcing::Eject;
    config.golden.interval_ms = 100;
    config.golden.margin = 0.2;
}

fn cluster<'a>(bootstrap: &'a mut Bootstrap, name: &str) -> &'a mut Cluster {
    let mut clusters = bootstrap.clusters.iter_mut();
    clusters.find(|cluster| cluster.name == name).unwrap()
}

fn beside(engines: &[SocketAddr], check: HealthCheck) -> ProxyBuilder {
    let builder = ProxyBuilder::new().edit(move |bootstrap| {
        cluster(bootstrap, LOCAL).health_check = Some(check);
    });
    let engines = engines.iter();
    engines.fold(builder, |builder, engine| builder.engine(*engine))
}

fn engine() -> SimEngine {
    SimEngine::start(Config::default()).unwrap()
}

fn freeze(engine: &SimEngine, for_ms: u64) {
    engine.fault(Fault {
        for_ms,
        ..Fault::new(FaultKind::Freeze)
    });
}

fn answer_wrong(engine: &SimEngine) {
    engine.fault(Fault {
        count: u64::MAX,
        ..Fault::new(FaultKind::WrongAnswer)
    });
}

/// What a proxy says of an engine, by its port.
async fn told(admin: SocketAddr, engine: SocketAddr) -> Value {
    let port = format!(":{}", engine.port());
    let hosts = hosts(admin, FLEET).await;
    let is_it = |host: &&Value| {
        let id = host["outrigger"]["engine_id"].as_str();
        id.is_some_and(|id| id.ends_with(&port))
    };
    hosts.iter().find(is_it).cloned().unwrap_or_default()
}

async fn wait_health(admin: SocketAddr, engine: SocketAddr, health: &str) -> Value {
    eventually(&format!("{engine} is {health}"), || async {
        let told = told(admin, engine).await;
        (told["outrigger"]["health"] == health).then_some(told)
    })
    .await
}

/// A metric of one engine.
async fn counted(proxy: &TestProxy, name: &str, engine: SocketAddr, label: &str) -> f64 {
    let page = Client::get(proxy.admin(), "/stats/prometheus").await.text();
    // Of this proxy: one of another case may have found an engine again at a port that is ours now.
    let id = format!("\"{}/{engine}\"", proxy.bootstrap.node.id);
    let lines = page.lines().filter(|line| line.starts_with(name));
    let ours = lines.filter(|line| line.contains(&id) && line.contains(label));
    ours.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
        .sum()
}

async fn wait_counted(proxy: &TestProxy, name: &str, engine: SocketAddr, label: &str, least: f64) {
    eventually(&format!("{name} {label} of {engine}"), || async {
        (counted(proxy, name, engine, label).await >= least).then_some(())
    })
    .await;
}

fn generation() -> String {
    json!({"model": "sim", "prompt": "hello", "max_tokens": 2}).to_string()
}

/// Which ports serve some requests.
async fn served_by(proxy: &TestProxy, requests: usize) -> Vec<String> {
    let mut client = proxy.client(Version::H1).await;
    let mut served = Vec::new();
    for _ in 0..requests {
        let reply = client.post(COMPLETIONS, generation()).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let id = reply.header(ENDPOINT).to_owned();
        served.push(id.rsplit(':').next().unwrap_or_default().to_owned());
    }
    served
}

#[tokio::test]
async fn an_engine_that_hangs_is_told_of_everywhere_avoided_and_taken_back() {
    let (hung, well) = (engine(), engine());
    let near = beside(&[hung.http_addr], hasty(|_, _| ())).start();
    let far = beside(&[well.http_addr], hasty(|_, _| ()))
        .peer(near.inbound())
        .start();
    far.wait_alive(2).await;
    freeze(&hung, 4_000);
    let at_near = wait_health(near.admin(), hung.http_addr, "unhealthy").await;
    let reason = at_near["outrigger"]["health_reason"].as_str().unwrap();
    assert!(reason.contains("no token within"), "{reason}");
    assert_eq!(at_near["health_status"]["failed_active_health_check"], true);
    let at_far = wait_health(far.admin(), hung.http_addr, "unhealthy").await;
    assert_eq!(at_far["outrigger"]["health_reason"], *reason);
    let port = well.http_addr.port().to_string();
    let served = served_by(&far, 6).await;
    assert!(served.iter().all(|by| *by == port), "{served:?}");
    // The engine's health is no question of the proxy's.
    assert_eq!(Client::get(near.admin(), "/ready").await.status, 200);
    wait_health(far.admin(), hung.http_addr, "healthy").await;
    let verdicts = "outrigger_canary_verdicts_total";
    for label in [r#"to="unhealthy""#, r#"to="healthy""#] {
        wait_counted(&near, verdicts, hung.http_addr, label, 1.0).await;
    }
    eventually("it gets requests again", || async {
        let served = served_by(&far, 2).await;
        served.iter().any(|by| *by != port).then_some(())
    })
    .await;
}

#[tokio::test]
async fn where_all_hang_requests_still_go_somewhere() {
    let hung = engine();
    let proxy = beside(&[hung.http_addr], hasty(|_, _| ())).start();
    proxy.wait_alive(1).await;
    freeze(&hung, 3_000);
    wait_health(proxy.admin(), hung.http_addr, "unhealthy").await;
    // In a panic, and answered when the engine goes on.
    assert_eq!(served_by(&proxy, 1).await.len(), 1);
}

/// An engine as a process, to be stopped.
struct Stoppable(Child);

impl Drop for Stoppable {
    fn drop(&mut self) {
        // It may be gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_process_that_is_stopped_is_found_before_its_polls_time_out() {
    let address = free_address();
    let child = Command::new(PROGRAM)
        .args(["engine", "--port", &address.port().to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let process = Stoppable(child);
    let proxy = beside(&[address], hasty(|_, _| ())).start();
    proxy.wait_alive(1).await;
    send_signal(process.0.id(), "STOP");
    wait_health(proxy.admin(), address, "unhealthy").await;
    send_signal(process.0.id(), "CONT");
    wait_health(proxy.admin(), address, "healthy").await;
}

/// Sends a prompt that takes six seconds to compute; gives its status when it is answered.
fn long_prompt(proxy: &TestProxy) -> tokio::task::JoinHandle<u16> {
    let body = json!({"model": "sim", "prompt": vec![5; 2400], "max_tokens": 1}).to_string();
    let address = proxy.outbound();
    tokio::spawn(async move {
        let mut client = Client::connect(address, Version::H1).await;
        client.post(COMPLETIONS, body).await.status.as_u16()
    })
}

#[tokio::test]
async fn a_long_prefill_is_no_failure() {
    // What every engine is said to compute decides.
    for (prefill_tokens_per_s, expected) in [(100, "healthy"), (1_000_000, "unhealthy")] {
        let slow = SimEngine::start(Config {
            prefill_tokens_per_s: 400.0,
            ..Config::default()
        })
        .unwrap();
        let check = hasty(|_, config| config.prefill_tokens_per_s = prefill_tokens_per_s);
        let proxy = beside(&[slow.http_addr], check)
            .flag("--policy", "kv")
            .start();
        proxy.wait_alive(1).await;
        let answered = long_prompt(&proxy);
        if expected == "unhealthy" {
            wait_health(proxy.admin(), slow.http_addr, expected).await;
        }
        assert_eq!(answered.await.unwrap(), 200);
        let failed = counted(
            &proxy,
            "outrigger_canary_probes_total",
            slow.http_addr,
            r#"outcome="failed""#,
        )
        .await;
        assert_eq!(failed > 0.0, expected == "unhealthy", "{failed} failed");
    }
}

#[tokio::test]
async fn requests_that_fail_bring_a_probe_forward() {
    let broken = engine();
    let check = hasty(|check, _| check.interval = Duration::from_secs(600));
    let proxy = beside(&[broken.http_addr], check).start();
    proxy.wait_alive(1).await;
    // It showed that it understands the probe.
    broken.fault(Fault::new(FaultKind::Http500));
    let mut client = proxy.client(Version::H1).await;
    client.post(COMPLETIONS, generation()).await;
    let probes = "outrigger_canary_probes_total";
    wait_counted(&proxy, probes, broken.http_addr, r#"outcome="well""#, 1.0).await;
    broken.fault(Fault {
        count: 12,
        ..Fault::new(FaultKind::Http500)
    });
    let reply = client.post(COMPLETIONS, generation()).await;
    assert_eq!(reply.status, 500);
    let told = wait_health(proxy.admin(), broken.http_addr, "unhealthy").await;
    let reason = told["outrigger"]["health_reason"].as_str().unwrap();
    assert!(reason.contains("answered 500"), "{reason}");
    // The fault is spent in time.
    wait_health(proxy.admin(), broken.http_addr, "healthy").await;
}

#[tokio::test]
async fn an_engine_that_drained_and_is_back_has_its_verdict_still() {
    let broken = engine();
    let proxy = beside(&[broken.http_addr], hasty(|_, _| ())).start();
    proxy.wait_alive(1).await;
    let (probes, failed) = ("outrigger_canary_probes_total", r#"outcome="failed""#);
    wait_counted(&proxy, probes, broken.http_addr, r#"outcome="well""#, 1.0).await;
    broken.fault(Fault {
        count: u64::MAX,
        ..Fault::new(FaultKind::Http500)
    });
    let told = wait_health(proxy.admin(), broken.http_addr, "unhealthy").await;
    let drain = format!(
        "/drain?endpoint={}",
        told["outrigger"]["engine_id"].as_str().unwrap()
    );
    let mut admin = Client::connect(proxy.admin(), Version::H1).await;
    admin.send(request(Method::POST, &drain, "")).await;
    wait_health(proxy.admin(), broken.http_addr, "draining").await;
    // It is looked at every 100 ms.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = counted(&proxy, probes, broken.http_addr, failed).await;
    admin
        .send(request(Method::POST, &format!("{drain}&undo"), ""))
        .await;
    wait_counted(&proxy, probes, broken.http_addr, failed, before + 3.0).await;
    wait_health(proxy.admin(), broken.http_addr, "unhealthy").await;
    let cleared = counted(
        &proxy,
        "outrigger_canary_verdicts_total",
        broken.http_addr,
        r#"to="healthy""#,
    )
    .await;
    assert_eq!(cleared, 0.0);
}

#[tokio::test]
async fn an_engine_that_never_answered_a_probe_is_not_judged_by_it() {
    let odd = engine();
    odd.fault(Fault {
        count: u64::MAX,
        ..Fault::new(FaultKind::Http500)
    });
    let proxy = beside(&[odd.http_addr], hasty(|_, _| ())).start();
    proxy.wait_alive(1).await;
    let told = eventually("a note of it", || async {
        let told = told(proxy.admin(), odd.http_addr).await;
        let reason = told["outrigger"]["health_reason"].as_str()?;
        reason.contains("never answered a probe").then_some(told)
    })
    .await;
    assert_eq!(told["outrigger"]["health"], "healthy");
}

#[tokio::test]
async fn an_engine_that_aborts_on_priority_is_asked_without() {
    let engine = SimEngine::start(Config {
        profile: Profile::Sglang,
        abort_on_priority: true,
        ..Config::default()
    })
    .unwrap();
    let proxy = beside(&[engine.http_addr], hasty(|_, _| ())).start();
    proxy.wait_alive(1).await;
    let probes = "outrigger_canary_probes_total";
    let well = r#"outcome="well""#;
    wait_counted(&proxy, probes, engine.http_addr, well, 2.0).await;
    let failed = r#"outcome="failed""#;
    assert_eq!(counted(&proxy, probes, engine.http_addr, failed).await, 0.0);
}

#[tokio::test]
async fn an_engine_that_sleeps_is_left_alone_until_it_is_woken() {
    let engine = SimEngine::start(Config {
        dev_mode: true,
        ..Config::default()
    })
    .unwrap();
    let proxy = beside(&[engine.http_addr], hasty(|_, _| ())).start();
    proxy.wait_alive(1).await;
    let mut client = Client::connect(engine.http_addr, Version::H1).await;
    assert_eq!(client.post("/sleep", String::new()).await.status, 200);
    let told = wait_health(proxy.admin(), engine.http_addr, "draining").await;
    let reason = told["outrigger"]["health_reason"].as_str().unwrap();
    assert!(reason.contains("asleep"), "{reason}");
    let probes = "outrigger_canary_probes_total";
    let before = counted(&proxy, probes, engine.http_addr, "").await;
    // Five intervals.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let asleep = counted(&proxy, probes, engine.http_addr, "").await;
    assert!(asleep <= before + 1.0, "one may have been on its way");
    assert_eq!(client.post("/wake_up", String::new()).await.status, 200);
    wait_health(proxy.admin(), engine.http_addr, "healthy").await;
    let well = r#"outcome="well""#;
    let before = counted(&proxy, probes, engine.http_addr, well).await;
    wait_counted(&proxy, probes, engine.http_addr, well, before + 1.0).await;
}

#[tokio::test]
async fn a_first_answer_that_takes_long_is_no_failure() {
    let cold = engine();
    let check = hasty(|_, config| config.first_timeout_ms = 60_000);
    freeze(&cold, 3_000);
    let proxy = beside(&[cold.http_addr], check).start();
    let probes = "outrigger_canary_probes_total";
    let well = r#"outcome="well""#;
    wait_counted(&proxy, probes, cold.http_addr, well, 1.0).await;
    let failed = r#"outcome="failed""#;
    assert_eq!(counted(&proxy, probes, cold.http_addr, failed).await, 0.0);
    // Later ones may not.
    freeze(&cold, 600_000);
    wait_health(proxy.admin(), cold.http_addr, "unhealthy").await;
}

#[tokio::test]
async fn whole_answers_prove_that_an_engine_without_figures_works() {
    let blind = SimEngine::start(Config {
        profile: Profile::Trtllm,
        ..Config::default()
    })
    .unwrap();
    let check = hasty(|check, _| check.interval = Duration::from_secs(2));
    let begun = Instant::now();
    let proxy = beside(&[blind.http_addr], check).start();
    proxy.wait_alive(1).await;
    let (mut last, mut longest) = (begun, Duration::ZERO);
    while begun.elapsed() < Duration::from_secs(4) {
        served_by(&proxy, 1).await;
        longest = longest.max(last.elapsed());
        last = Instant::now();
    }
    let probes = "outrigger_canary_probes_total";
    let asked = counted(&proxy, probes, blind.http_addr, "").await;
    // On a machine that does nothing for so long there was no proof.
    let is_slow = longest > Duration::from_secs(1);
    assert!(
        asked == 0.0 || is_slow,
        "{asked} probes, {longest:?} at most"
    );
    wait_counted(&proxy, probes, blind.http_addr, r#"outcome="well""#, 1.0).await;
}

#[tokio::test]
async fn one_of_three_that_answers_wrong_is_ejected_and_everybody_is_told() {
    let engines = [engine(), engine(), engine()];
    let addresses = engines.each_ref().map(|engine| engine.http_addr);
    let near = beside(&addresses, hasty(golden)).start();
    let far = ProxyBuilder::new().peer(near.inbound()).start();
    far.wait_alive(3).await;
    let total = "outrigger_canary_golden_total";
    for address in addresses {
        wait_counted(&near, total, address, r#"outcome="right""#, 1.0).await;
    }
    let wrong = addresses[1];
    answer_wrong(&engines[1]);
    let told = wait_health(far.admin(), wrong, "unhealthy").await;
    let reason = told["outrigger"]["health_reason"].as_str().unwrap();
    assert!(reason.contains("wrong answer"), "{reason}");
    assert!(counted(&near, total, wrong, r#"outcome="wrong""#).await >= 3.0);
    let verdicts = "outrigger_canary_verdicts_total";
    wait_counted(&near, verdicts, wrong, r#"reason="wrong_answer""#, 1.0).await;
    let served = served_by(&far, 6).await;
    let port = wrong.port().to_string();
    assert!(!served.contains(&port), "{served:?}");
    for well in [addresses[0], addresses[2]] {
        assert_eq!(counted(&near, total, well, r#"outcome="wrong""#).await, 0.0);
    }
    engines[1].disarm();
    wait_health(far.admin(), wrong, "healthy").await;
}

#[tokio::test]
async fn of_two_that_differ_nobody_knows_which_is_wrong() {
    let engines = [engine(), engine()];
    let addresses = engines.each_ref().map(|engine| engine.http_addr);
    let proxy = beside(&addresses, hasty(golden)).start();
    proxy.wait_alive(2).await;
    answer_wrong(&engines[0]);
    let total = "outrigger_canary_golden_total";
    for address in addresses {
        wait_counted(&proxy, total, address, r#"outcome="unclear""#, 5.0).await;
        let told = wait_health(proxy.admin(), address, "healthy").await;
        let reason = told["outrigger"]["health_reason"].as_str().unwrap();
        assert!(reason.contains("no majority"), "{reason}");
        assert_eq!(
            counted(&proxy, total, address, r#"outcome="wrong""#).await,
            0.0
        );
    }
}

#[tokio::test]
async fn of_two_cohorts_that_differ_neither_is_wrong() {
    let engines = [engine(), engine()];
    answer_wrong(&engines[0]);
    let labels = ["a", "b"];
    let builder = engines.iter().zip(labels);
    let proxy = builder
        .fold(beside(&[], hasty(golden)), |builder, (engine, label)| {
            let url = format!("http://{};cohort={label}", engine.http_addr);
            builder.flag("--engine", &url)
        })
        .start();
    proxy.wait_alive(2).await;
    let total = "outrigger_canary_golden_total";
    for (engine, label) in engines.iter().zip(labels) {
        let address = engine.http_addr;
        wait_counted(&proxy, total, address, r#"outcome="alone""#, 3.0).await;
        let told = wait_health(proxy.admin(), address, "healthy").await;
        let numerics = told["outrigger"]["numerics"].as_str().unwrap();
        assert!(numerics.ends_with(&format!("cohort={label}")), "{numerics}");
        for other in [r#"outcome="wrong""#, r#"outcome="unclear""#] {
            assert_eq!(counted(&proxy, total, address, other).await, 0.0);
        }
    }
}

#[tokio::test]
async fn the_last_engine_is_not_ejected_for_what_it_says() {
    let only = engine();
    let check = hasty(|check, config| {
        golden(check, config);
        config.golden.expected = "nothing that the model says".to_owned();
    });
    let proxy = beside(&[only.http_addr], check).start();
    proxy.wait_alive(1).await;
    let total = "outrigger_canary_golden_total";
    wait_counted(&proxy, total, only.http_addr, r#"outcome="wrong""#, 6.0).await;
    let told = wait_health(proxy.admin(), only.http_addr, "healthy").await;
    let reason = told["outrigger"]["health_reason"].as_str().unwrap();
    assert!(reason.contains("wrong answer"), "{reason}");
}

#[tokio::test]
async fn probes_take_no_more_than_their_share_and_are_no_requests() {
    // The token of a probe is made by the step that computes its prompt, of one token at least.
    let slow = SimEngine::start(Config {
        prefill_tokens_per_s: 10.0,
        ..Config::default()
    })
    .unwrap();
    let check = hasty(|check, config| {
        check.interval = Duration::from_millis(1);
        // One that is given up may still run beside the next.
        check.timeout = Duration::from_secs(10);
        check.unhealthy_interval = Duration::from_millis(1);
        config.share_percent = 50.0;
    });
    let begun = Instant::now();
    let proxy = beside(&[slow.http_addr], check).start();
    let probes = "outrigger_canary_probes_total";
    let well = r#"outcome="well""#;
    let mut most = 0;
    let done = eventually("some probes", || {
        most = most.max(slow.load().0 + slow.load().1);
        async {
            let done = counted(&proxy, probes, slow.http_addr, well).await;
            (done >= 12.0).then_some(done)
        }
    })
    .await;
    // Each takes 100 ms, of which the engine may save 2, and leaves as much to the next. All of them began after `begun` and
    // ended before they were counted: whatever keeps us from looking makes it longer.
    let elapsed = begun.elapsed();
    let least = Duration::from_millis(98).mul_f64(2.0 * done - 1.0);
    assert!(elapsed >= least, "{done} within {elapsed:?}");
    assert!(most <= 1, "{most} at once");
    let told = told(proxy.admin(), slow.http_addr).await;
    assert_eq!(told["outrigger"]["load"]["active_requests"], 0);
    let stats = told["stats"].as_array().unwrap();
    let total = stats
        .iter()
        .find(|stat| stat["name"] == "rq_total")
        .unwrap();
    assert_eq!(total["value"], "0");
}

#[tokio::test]
async fn a_push_switches_it_off_and_its_verdict_is_void() {
    let hung = engine();
    let proxy = beside(&[hung.http_addr], hasty(|_, _| ())).start();
    proxy.wait_alive(1).await;
    freeze(&hung, 600_000);
    wait_health(proxy.admin(), hung.http_addr, "unhealthy").await;
    let mut pushed = proxy.bootstrap.clone();
    let other = hasty(|check, _| check.interval = Duration::from_millis(300));
    cluster(&mut pushed, LOCAL).health_check = Some(other);
    proxy.proxy.apply(pushed.clone()).unwrap();
    let told = told(proxy.admin(), hung.http_addr).await;
    assert_eq!(
        told["outrigger"]["health"], "unhealthy",
        "a push loses nothing"
    );
    cluster(&mut pushed, LOCAL).health_check = None;
    proxy.proxy.apply(pushed).unwrap();
    wait_health(proxy.admin(), hung.http_addr, "healthy").await;
}

#[tokio::test]
async fn a_server_that_no_proxy_stands_beside_is_probed_by_those_who_use_it() {
    let plain = engine();
    let proxy = ProxyBuilder::new()
        .server(plain.http_addr)
        .edit(|bootstrap| {
            cluster(bootstrap, FLEET).health_check = Some(hasty(|_, _| ()));
        })
        .start();
    let failed = |failed: bool| {
        let admin = proxy.admin();
        async move {
            eventually(&format!("it failed its check: {failed}"), || async {
                let known = hosts(admin, FLEET).await;
                let status = &known[0]["health_status"]["failed_active_health_check"];
                ((*status == true) == failed).then_some(())
            })
            .await;
        }
    };
    failed(false).await;
    freeze(&plain, 3_000);
    failed(true).await;
    failed(false).await;
    assert!(metric(proxy.admin(), "envoy_cluster_health_check_attempt", FLEET).await > 3.0);
}

/// Asks for a stream and reads it to its end.
async fn stream(proxy: &TestProxy, tokens: u32) -> String {
    let body = json!({"model": "sim", "prompt": "hello", "stream": true, "max_tokens": tokens, "ignore_eos": true});
    let mut client = proxy.client(Version::H1).await;
    client.post(COMPLETIONS, body.to_string()).await.text()
}

#[tokio::test]
async fn an_error_inside_a_stream_brings_a_probe_forward() {
    let engine = engine();
    let check = hasty(|check, _| check.interval = Duration::from_secs(600));
    let proxy = beside(&[engine.http_addr], check).start();
    proxy.wait_alive(1).await;
    let probes = "outrigger_canary_probes_total";
    assert!(stream(&proxy, 20).await.ends_with("[DONE]\n\n"));
    assert_eq!(counted(&proxy, probes, engine.http_addr, "").await, 0.0);
    engine.fault(Fault {
        after_tokens: 5,
        ..Fault::new(FaultKind::InBandError)
    });
    // The stream moves, perhaps to the same engine: the client need not see it.
    stream(&proxy, 20).await;
    let well = r#"outcome="well""#;
    wait_counted(&proxy, probes, engine.http_addr, well, 1.0).await;
    wait_health(proxy.admin(), engine.http_addr, "healthy").await;
}

#[tokio::test]
async fn an_engine_that_serves_is_not_probed() {
    let busy = SimEngine::start(Config {
        decode_itl_ms: 10.0,
        ..Config::default()
    })
    .unwrap();
    let idle = engine();
    let check = hasty(|check, _| check.interval = Duration::from_millis(1_500));
    let first = beside(&[busy.http_addr], check.clone()).start();
    let second = beside(&[idle.http_addr], check).start();
    first.wait_alive(1).await;
    second.wait_alive(1).await;
    let probes = "outrigger_canary_probes_total";
    let meanwhile = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        counted(&first, probes, busy.http_addr, "").await
    };
    let (before, _) = tokio::join!(meanwhile, stream(&first, 400));
    let after = counted(&first, probes, busy.http_addr, "").await;
    assert_eq!(after, before, "it was probed while it served");
    wait_counted(&second, probes, idle.http_addr, r#"outcome="well""#, 1.0).await;
    // Nothing proves any more that it works.
    wait_counted(&first, probes, busy.http_addr, r#"outcome="well""#, 1.0).await;
}
