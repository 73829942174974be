//! kill -9 and SIGSTOP of engines that are processes, in the middle of streams.

use super::{
    migration::migration,
    support::{Story, story},
};
use outrigger_conformance::harness::{
    ProxyBuilder, TestProxy, Version, free_address, request, send_signal,
};
use rand::Rng;
use serde_json::json;
use std::{
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_outrigger-demo");
const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const ENDPOINT: &str = "x-outrigger-endpoint";

/// An engine that can be killed, and begins anew at the same place.
struct Engine {
    child: Child,
    address: SocketAddr,
}

impl Engine {
    fn start(address: SocketAddr) -> Self {
        let port = address.port().to_string();
        let child = Command::new(PROGRAM)
            .args(["engine", "--port", &port, "--decode-itl-ms", "3"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, address }
    }

    fn kill(&mut self) {
        send_signal(self.child.id(), "KILL");
        self.child.wait().unwrap();
        *self = Self::start(self.address);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // It may be gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn fleet(count: usize, stall_ms: u64) -> (Vec<Engine>, TestProxy) {
    let addresses: Vec<_> = (0..count).map(|_| free_address()).collect();
    let engines: Vec<_> = addresses.iter().copied().map(Engine::start).collect();
    let builder = ProxyBuilder::new().edit(migration(json!({"stall_ms": stall_ms})));
    let builder = addresses
        .iter()
        .fold(builder, |builder, address| builder.engine(*address));
    (engines, builder.start())
}

fn body(path: &str, stop: Option<&str>) -> String {
    let mut body = json!({"model": "sim", "stream": true, "temperature": 0, "max_tokens": 120, "ignore_eos": true,
        "stream_options": {"include_usage": true}, "stop": stop});
    if path == CHAT {
        body["messages"] = json!([{"role": "user", "content": "Paint the sky with words."}]);
    } else {
        body["prompt"] = json!("One day a robot painted");
    }
    body.to_string()
}

/// Asks, and does something to the engine that serves it once `cut` bytes have come.
async fn ask(
    proxy: &TestProxy,
    path: &str,
    body: &str,
    cut: usize,
    mut strike: impl FnMut(u16),
) -> Story {
    let mut client = proxy.client(Version::H1).await;
    let post = request(http::Method::POST, path, body.to_owned());
    let mut answer = client.begin(post).await;
    assert_eq!(answer.status, 200);
    let served = answer.headers[ENDPOINT].to_str().unwrap();
    let port: u16 = served.rsplit(':').next().unwrap().parse().unwrap();
    let mut seen = String::new();
    let mut struck = false;
    while let Some(more) = answer.next().await {
        seen.push_str(&String::from_utf8_lossy(&more));
        if !struck && seen.len() >= cut {
            struck = true;
            strike(port);
        }
    }
    story(&seen)
}

#[tokio::test]
async fn text_is_the_same_after_kill_9_at_any_token() {
    let (mut engines, proxy) = fleet(3, 30_000);
    proxy.wait_alive(3).await;
    let mut random = rand::rng();
    for path in [CHAT, COMPLETIONS] {
        let free = ask(&proxy, path, &body(path, None), usize::MAX, |_| {}).await;
        assert_eq!(free.problem(), None);
        let letters: Vec<char> = free.text.chars().collect();
        let at = letters.len() * 3 / 4;
        let stop: String = letters[at..at + 9].iter().collect();
        for stop in [None, Some(stop.as_str())] {
            let body = body(path, stop);
            let whole = ask(&proxy, path, &body, usize::MAX, |_| {}).await;
            assert_eq!(whole.finish == "stop", stop.is_some());
            for _ in 0..5 {
                proxy.wait_alive(3).await;
                let cut = random.random_range(300..12_000);
                let got = ask(&proxy, path, &body, cut, |port| {
                    let serving = engines
                        .iter_mut()
                        .find(|engine| engine.address.port() == port);
                    serving.unwrap().kill();
                })
                .await;
                assert_eq!(
                    (got.problem(), &got),
                    (None, &whole),
                    "{path} {stop:?} {cut}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_stopped_engine_costs_no_more_than_the_limit() {
    let (engines, proxy) = fleet(2, 500);
    proxy.wait_alive(2).await;
    let body = body(CHAT, None);
    let whole = ask(&proxy, CHAT, &body, usize::MAX, |_| {}).await;
    let begun = Instant::now();
    let got = ask(&proxy, CHAT, &body, 4_000, |port| {
        let serving = engines.iter().find(|engine| engine.address.port() == port);
        send_signal(serving.unwrap().child.id(), "STOP");
    })
    .await;
    let took = begun.elapsed();
    assert_eq!((got.problem(), &got), (None, &whole));
    assert!(took < Duration::from_secs(5), "{took:?}");
}
