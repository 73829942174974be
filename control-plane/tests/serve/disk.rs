//! A disk that is full, and a file that is broken: what was good is served on.

use crate::{
    harness::{Served, as_str, ask, endpoints, eventually, everything},
    process::Process,
    versions::{client, says_states, state, states, takes},
};
use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
};

#[tokio::test]
async fn a_database_that_is_broken_is_moved_aside_and_what_is_there_served() {
    let state = state("broken");
    fs::create_dir_all(&state).unwrap();
    fs::write(state.join("versions.redb"), vec![7; 50_000]).unwrap();
    let files = everything();
    let served = Served::with("broken", &as_str(&files), |options| {
        options.state = Some(state.clone());
    })
    .await;
    let mut client = client(&served, "n").await;
    assert_eq!(takes(&mut client, None).await, 1);
    assert_eq!(states(&served).await, "1 live");
    let store = &served.json("/sources").await["store"];
    assert!(
        store["notice"].as_str().unwrap().contains("was broken"),
        "{store}"
    );
    assert!(store["problem"].is_null());
    let aside = fs::read(state.join("versions.redb.broken.1")).unwrap();
    assert_eq!(aside, vec![7; 50_000]);
}

/// With a state that cannot be: better than nothing, and said.
#[tokio::test]
async fn a_first_version_is_served_even_if_it_cannot_be_kept() {
    let state = state("in-the-way");
    fs::write(&state, "a file").unwrap();
    let files = everything();
    let served = Served::with("in-the-way", &as_str(&files), |options| {
        options.state = Some(state.clone());
    })
    .await;
    let mut client = client(&served, "n").await;
    assert_eq!(takes(&mut client, None).await, 1);
    let store = &served.json("/sources").await["store"];
    assert!(store["problem"].is_string(), "{store}");
    // What comes then waits, until it can be kept; and then is.
    served.put("endpoints.yaml", &endpoints("a", 2));
    eventually("it waits", async || {
        let store = &served.json("/sources").await["store"];
        (store["waiting"] == true).then_some(())
    })
    .await;
    client.is_quiet().await;
    fs::remove_file(&state).unwrap();
    assert_eq!(takes(&mut client, None).await, 2);
    assert!(served.json("/sources").await["store"]["problem"].is_null());
    fs::remove_dir_all(&state).unwrap();
}

fn limit(process: &Process, bytes: &str) {
    let mut command = Command::new("prlimit");
    let arguments = ["--pid", &process.0.id().to_string(), bytes];
    assert!(command.args(arguments).status().unwrap().success());
}

/// A limit of what files may be long is as a disk that is full.
#[tokio::test]
async fn a_disk_that_is_full_keeps_what_is_served_until_there_is_room() {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("serve-full");
    let _ = fs::remove_dir_all(&directory);
    let config = directory.join("config");
    fs::create_dir_all(&config).unwrap();
    let files = everything();
    for (name, text) in as_str(&files) {
        fs::write(config.join(name), text).unwrap();
    }
    let log = directory.join("log");
    // Else a signal would end it.
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""])
        .arg(env!("CARGO_BIN_EXE_outrigger-control-plane"))
        .args(["serve", "--config", config.to_str().unwrap()])
        .args(["--state", directory.join("state").to_str().unwrap()])
        .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .env("NO_COLOR", "1")
        .stderr(Stdio::from(fs::File::create(&log).unwrap()));
    let process = Process(command.spawn().unwrap());
    let admin: SocketAddr = eventually("it serves", async || {
        let text = fs::read_to_string(&log).unwrap();
        let (_, rest) = text.split_once("serving xDS address=")?;
        let (_, rest) = rest.split_once("admin=")?;
        rest.split_whitespace().next()?.parse().ok()
    })
    .await;
    let page = async |path: &str| ask(admin, http::Request::get(path)).await.1;
    let number = async || {
        let page: serde_json::Value = serde_json::from_str(&page("/sources").await).unwrap();
        (
            page["number"].as_u64(),
            page["store"]["problem"].is_string(),
        )
    };
    assert_eq!(number().await, (Some(1), false));
    limit(&process, "--fsize=16384:unlimited");
    fs::write(config.join("endpoints.yaml"), endpoints("a", 2)).unwrap();
    eventually("it is said", async || {
        (number().await == (Some(1), true)).then_some(())
    })
    .await;
    assert!(page("/config_dump").await.contains("\"port_value\": 1"));
    assert!(
        page("/stats/prometheus")
            .await
            .contains("outrigger_control_plane_store_ok 0")
    );
    assert!(page("/ready").await.starts_with("LIVE"));
    limit(&process, "--fsize=unlimited:unlimited");
    eventually("it is kept", async || {
        (number().await == (Some(2), false)).then_some(())
    })
    .await;
    assert!(page("/config_dump").await.contains("\"port_value\": 2"));
    assert!(
        page("/stats/prometheus")
            .await
            .contains("outrigger_control_plane_store_ok 1")
    );
}

#[tokio::test]
async fn what_could_not_be_read_at_first_is_not_written_over() {
    let place = state("unread");
    fs::create_dir_all(place.join("good")).unwrap();
    fs::write(place.join("bad"), "no directory").unwrap();
    let point_to = |target: &str| {
        symlink(place.join(target), place.join("new")).unwrap();
        fs::rename(place.join("new"), place.join("link")).unwrap();
    };
    point_to("good");
    let files = everything();
    let served = Served::with("unread", &as_str(&files), |options| {
        options.state = Some(place.join("link"));
    })
    .await;
    served.put("endpoints.yaml", &endpoints("a", 2));
    says_states(&served, "1 past, 2 live").await;
    let served = served.restarted(|_| point_to("bad")).await;
    assert_eq!(states(&served).await, "");
    let mut client = client(&served, "n").await;
    assert_eq!(takes(&mut client, None).await, 2);
    point_to("good");
    says_states(&served, "1 past, 2 live").await;
    client.is_quiet().await;
    served.put("endpoints.yaml", &endpoints("a", 3));
    assert_eq!(takes(&mut client, None).await, 3);
    assert_eq!(states(&served).await, "1 past, 2 past, 3 live");
}
