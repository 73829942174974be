//! The demo's control plane: a directory with one file of short resources, which says what both proxies do. The policy
//! in it can be changed while requests go on.

use super::{
    exchange,
    fleet::{ASK_LIMIT, START_LIMIT},
    process::Process,
};
use anyhow::{Context, Result};
use outrigger_proxy::bootstrap::{FLEET, OUTBOUND};
use serde_json::Value;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

/// The policy that the demo begins with.
pub(super) const KV: &str = "kv";

/// A control plane, and the directory that it serves.
pub(super) struct ControlPlane {
    pub(super) process: Process,
    /// Where proxies come for what they do.
    pub(super) address: SocketAddr,
    /// Where people look.
    pub(super) admin: SocketAddr,
}

impl ControlPlane {
    /// Starts it on a directory with a [`Directory::write`]n file.
    pub(super) async fn start(directory: &Directory, log: &Path) -> Result<Self> {
        let arguments = ["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
        let mut arguments = arguments.map(String::from).to_vec();
        arguments.extend(["--config".into(), directory.path.display().to_string()]);
        let process = Process::start("control-plane", &arguments, log)?;
        let (address, admin) = process
            .until(START_LIMIT, async || listens(log))
            .await
            .context("the control plane does not start")?;
        Ok(Self {
            process,
            address,
            admin,
        })
    }

    /// The number of the version that it serves; `None` if it does not answer.
    pub(super) async fn version(&self) -> Option<u64> {
        let reply = exchange::get(self.admin, "/sources", ASK_LIMIT).await;
        let sources: Value = serde_json::from_slice(&reply.body).ok()?;
        sources["number"].as_u64()
    }
}

/// What it logs of its addresses: xDS, admin.
fn listens(log: &Path) -> Option<(SocketAddr, SocketAddr)> {
    let text = std::fs::read_to_string(log).ok()?;
    let line = text.lines().find(|line| line.contains("serving xDS"))?;
    let field = |name: &str| {
        let (_, rest) = line.split_once(name)?;
        rest.split_whitespace().next()?.parse().ok()
    };
    Some((field("address=")?, field("admin=")?))
}

/// The directory that it serves.
pub(super) struct Directory {
    path: PathBuf,
}

impl Directory {
    pub(super) fn new(scratch: &Path) -> Result<Self> {
        let path = scratch.join("config");
        std::fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(Self { path })
    }

    /// The file in it.
    pub(super) fn file(&self) -> PathBuf {
        self.path.join("fleet.yaml")
    }

    /// Says that these engines are a fleet, each beside the proxy of its number, which others reach at `inbound`.
    pub(super) fn write(&self, engines: &[SocketAddr], inbound: &[u16]) -> Result<()> {
        let of_pool = |(number, engine): (usize, &SocketAddr)| {
            format!("    - {{node: proxy-{number}, address: \"{engine}\"}}\n")
        };
        let of_node =
            |(number, port): (usize, &u16)| format!("    proxy-{number}: \"127.0.0.1:{port}\"\n");
        let engines: String = engines.iter().enumerate().map(of_pool).collect();
        let nodes: String = inbound.iter().enumerate().map(of_node).collect();
        let text = format!(
            "apiVersion: outrigger.dev/v1
kind: Fleet
metadata: {{name: {FLEET}}}
spec:
  pools:
  - name: all
    engines:
{engines}  nodes:
{nodes}---
apiVersion: outrigger.dev/v1
kind: Policy
metadata: {{name: {FLEET}}}
spec:
  routing: {{policy: {KV}}}
---
apiVersion: outrigger.dev/v1
kind: Gateway
metadata: {{name: {OUTBOUND}}}
spec:
  accessLog: none
  listeners: [{{address: \"127.0.0.1:0\"}}]
  routes: [{{fleet: {FLEET}}}]
"
        );
        self.replace(&text)
    }

    /// Replaces the policy by which engines are chosen.
    pub(super) fn route_by(&self, policy: &str) -> Result<()> {
        let text = std::fs::read_to_string(self.file())?;
        let changed = text.lines().map(|line| match line.split_once("policy: ") {
            Some((before, _)) => format!("{before}policy: {policy}}}\n"),
            None => format!("{line}\n"),
        });
        self.replace(&changed.collect::<String>())
    }

    /// In one step, so that nobody reads half of it.
    fn replace(&self, text: &str) -> Result<()> {
        let new = self.path.join(".fleet.yaml.new");
        std::fs::write(&new, text).with_context(|| new.display().to_string())?;
        std::fs::rename(&new, self.file()).context("the demo's fleet.yaml")
    }
}
