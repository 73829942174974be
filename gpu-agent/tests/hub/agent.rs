//! The agent's process: its flags, its feed, its end.

use crate::listener::Listener;
use crate::support::{FakeEngine, canonical, prompt, stored};
use futures_util::StreamExt;
use outrigger_xds::feed::{FeedTimeouts, connect};
use outrigger_xds::report::Role;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn start(engine: &str, key_file: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_outrigger-agent"))
        .args(["--engine", engine, "--listen", "127.0.0.1:0", "--node", "n"])
        .arg("--engine-api-key-file")
        .arg(key_file)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Sends SIGTERM by the shell's own `kill`: the program of that name comes with a package that a slim machine lacks.
fn terminate(process: &Child) {
    let told = Command::new("sh")
        .args(["-c", &format!("kill -TERM {}", process.id())])
        .status();
    assert!(told.is_ok_and(|status| status.success()));
}

#[tokio::test]
async fn serves_the_feed_and_ends_on_sigterm() {
    let engine = FakeEngine::start_with(|inner| inner.key = Some("secret-key".into())).await;
    let mut key_file = std::env::temp_dir();
    key_file.push(format!("outrigger-agent-key-{}", std::process::id()));
    std::fs::File::create(&key_file)
        .unwrap()
        .write_all(b"secret-key\n")
        .unwrap();
    let mut agent = start(&format!("{};role=prefill", engine.url()), &key_file);
    let mut log = BufReader::new(agent.stderr.take().unwrap()).lines();
    let line = log
        .find_map(|line| line.ok().filter(|line| line.contains("serving the feed")))
        .unwrap();
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    let address = line["fields"]["address"].as_str().unwrap().to_owned();

    let feed = connect(
        format!("http://{address}").parse().unwrap(),
        FeedTimeouts::default(),
    )
    .await
    .unwrap();
    let mut listener = Listener::new(Box::pin(feed.map(|message| message.unwrap())));
    let id = format!("n/{}", engine.http);
    let picture = listener
        .until(&id, "events", |picture| {
            picture.state.kv_events && picture.complete
        })
        .await;
    assert_eq!(
        (picture.state.role, picture.state.models[0].id.as_str()),
        (Role::Prefill, "tiny")
    );
    let a = prompt(1, 2);
    engine.publish(vec![stored(&a, 32, 0)]);
    listener
        .until(&id, "blocks", |picture| {
            picture.device() == canonical(&[&a])
        })
        .await;
    drop(listener);

    terminate(&agent);
    let told = Instant::now();
    let status = agent.wait().unwrap();
    assert!(
        status.success() && told.elapsed() < Duration::from_secs(5),
        "{status}"
    );
    let rest: Vec<String> = log.map_while(Result::ok).collect();
    assert!(
        rest.iter().all(|line| !line.contains("secret-key")),
        "a key in the log"
    );
    std::fs::remove_file(&key_file).unwrap();
}
