//! The control plane as a process, to its end.

use crate::harness::{PATIENCE, as_str, eventually, everything, node};
use outrigger_xds::{
    subscription::Kind,
    wire::envoy::service::discovery::v3::{
        DiscoveryRequest, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};
use tonic::transport::Channel;

/// Ends with its test.
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn signal(&self) {
        let mut kill = Command::new("kill");
        let status = kill.args(["-TERM", &self.0.id().to_string()]).status();
        assert!(status.unwrap().success());
    }
}

/// Streams would end only after hours.
#[tokio::test]
async fn who_is_told_twice_to_end_does_at_once() {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("serve-told-twice");
    let _ = fs::remove_dir_all(&directory);
    let config = directory.join("config");
    fs::create_dir_all(&config).unwrap();
    let files = everything();
    for (name, text) in as_str(&files) {
        fs::write(config.join(name), text).unwrap();
    }
    let log = directory.join("log");
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-control-plane"));
    command
        .args(["serve", "--config", config.to_str().unwrap()])
        .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .args(["--drain-time-s", "1000000"])
        .env("NO_COLOR", "1")
        .stderr(Stdio::from(fs::File::create(&log).unwrap()));
    let mut process = Process(command.spawn().unwrap());
    let said = async |what: &str| {
        eventually(what, async || {
            let text = fs::read_to_string(&log).unwrap();
            text.split_once(what).map(|(_, rest)| rest.to_owned())
        })
        .await
    };
    let rest = said("serving xDS address=").await;
    let address = rest.split_whitespace().next().unwrap();
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    let mut client = AggregatedDiscoveryServiceClient::new(channel.connect().await.unwrap());
    let request = DiscoveryRequest {
        node: Some(node("envoy")),
        type_url: Kind::Clusters.type_url().into(),
        ..DiscoveryRequest::default()
    };
    let requests = tokio_stream::iter([request]);
    let forever = tokio_stream::StreamExt::chain(requests, tokio_stream::pending());
    let answers = client.stream_aggregated_resources(forever).await.unwrap();
    let mut answers = answers.into_inner();
    let first = tokio::time::timeout(PATIENCE, answers.message()).await;
    assert!(first.unwrap().unwrap().is_some());
    process.signal();
    said("streams end").await;
    assert!(process.0.try_wait().unwrap().is_none(), "a stream goes on");
    process.signal();
    let ended = eventually("it ends", async || process.0.try_wait().unwrap()).await;
    assert!(ended.success(), "{ended}");
}
