//! Commands for a control plane that runs: which versions it has, what is different, going back, a dry run. They ask its admin.

use crate::{
    source::{Problem, files},
    store::{self, Contents},
};
use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Args;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::{fmt::Write, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};
use tokio::{net::TcpStream, time::timeout};

/// For an answer: what is judged before may take its time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Where the control plane is.
#[derive(Debug, Clone, Args)]
pub struct Running {
    /// The admin of the control plane that runs
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:18001")]
    admin: SocketAddr,
}

/// `diff`.
#[derive(Debug, Args)]
pub struct Diff {
    /// Two versions: from which to which
    #[arg(num_args = 2, value_names = ["FROM", "TO"], required_unless_present = "config")]
    versions: Vec<u64>,
    /// Or a directory: what would change if it were served. Nothing is sent to anybody
    #[arg(long, value_name = "DIR", conflicts_with = "versions")]
    config: Option<PathBuf>,
    #[command(flatten)]
    running: Running,
}

/// `rollback`.
#[derive(Debug, Args)]
pub struct Rollback {
    /// Which is served from then on, until what the sources say changes
    version: u64,
    #[command(flatten)]
    running: Running,
}

impl Running {
    /// A table of all versions.
    ///
    /// # Errors
    /// Nobody answers, or says no.
    pub fn versions(&self) -> anyhow::Result<String> {
        let text = self.ask(Method::GET, "/versions", Vec::new())?;
        let value: Value = serde_json::from_str(&text).context("an answer that is no JSON")?;
        Ok(table(&value))
    }

    /// What the sources say counts again.
    ///
    /// # Errors
    /// Nobody answers, or says no.
    pub fn resume(&self) -> anyhow::Result<String> {
        self.ask(Method::POST, "/resume", Vec::new())
    }

    fn ask(&self, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let asked = runtime.block_on(async {
            let asking = timeout(ANSWER_TIMEOUT, self.exchange(method, path, body));
            asking.await.context("no answer")?
        });
        let (status, text) = asked.with_context(|| format!("{}{path}", self.admin))?;
        if status != 200 {
            bail!("{}", text.trim_end());
        }
        Ok(text)
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> anyhow::Result<(u16, String)> {
        let stream = TcpStream::connect(self.admin).await?;
        let io = TokioIo::new(stream);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
        // It ends with the runtime.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.admin.to_string())
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }
}

impl Diff {
    /// What is different.
    ///
    /// # Errors
    /// Nobody answers, or says no; the directory is not good.
    pub fn run(&self) -> anyhow::Result<String> {
        let Some(directory) = &self.config else {
            let [from, to] = self.versions[..] else {
                bail!("two versions, or --config DIR");
            };
            let path = format!("/diff?from={from}&to={to}");
            return self.running.ask(Method::GET, &path, Vec::new());
        };
        let content = files::load(directory).map_err(|problems| wrong(&problems))?;
        let contents = Contents::from([("directory".to_owned(), Arc::new(content))]);
        let body = store::encode(&contents).map_err(anyhow::Error::msg)?;
        self.running.ask(Method::POST, "/dry-run", body)
    }
}

impl Rollback {
    /// Serves another version.
    ///
    /// # Errors
    /// Nobody answers, or says no.
    pub fn run(&self) -> anyhow::Result<String> {
        let path = format!("/rollback?version={}", self.version);
        self.running.ask(Method::POST, &path, Vec::new())
    }
}

fn wrong(problems: &[Problem]) -> anyhow::Error {
    let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
    anyhow::Error::msg(lines.join("\n"))
}

/// Version, state, age, size, what changed.
fn table(value: &Value) -> String {
    let mut text = format!(
        "{:>7}  {:<11}  {:>8}  {:>9}  CHANGED\n",
        "VERSION", "STATE", "AGE", "BYTES"
    );
    for version in value["versions"].as_array().into_iter().flatten() {
        let seconds = version["seconds_ago"].as_f64().unwrap_or_default();
        let changes = version["changes"].as_u64().unwrap_or_default();
        let named = version["changed"].as_array();
        let named: Vec<&str> = named
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let more = if (named.len() as u64) < changes {
            ", …"
        } else {
            ""
        };
        let state = version["state"].as_str().unwrap_or_default();
        let why = version["rolled_back"].as_str();
        let why = why.map_or_else(String::new, |why| format!("  [{why}]"));
        // Writing to a text cannot fail.
        let _ = writeln!(
            text,
            "{:>7}  {state:<11}  {:>8}  {:>9}  {}{more}{why}",
            version["version"].as_u64().unwrap_or_default(),
            age(seconds),
            version["bytes"].as_u64().unwrap_or_default(),
            named.join(", "),
        );
    }
    if let Some(problem) = value["store"]["problem"].as_str() {
        let _ = writeln!(text, "not kept: {problem}");
    }
    text
}

fn age(seconds: f64) -> String {
    match seconds {
        few if few < 120.0 => format!("{few:.0}s"),
        some if some < 7200.0 => format!("{:.0}m", some / 60.0),
        many if many < 172_800.0 => format!("{:.0}h", many / 3600.0),
        all => format!("{:.0}d", all / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn versions_stand_in_a_table() {
        let value = json!({
            "versions": [
                {"version": 12, "state": "rolled back", "seconds_ago": 5.2, "bytes": 900, "changes": 21, "changed": ["~ Cluster a", "+ Fleet b"], "rolled_back": "by hand, to version 3"},
                {"version": 3, "state": "live", "seconds_ago": 7300.0, "bytes": 800, "changes": 0, "changed": [], "rolled_back": null},
            ],
            "store": {"problem": "no space"},
        });
        let expected = "\
VERSION  STATE             AGE      BYTES  CHANGED
     12  rolled back        5s        900  ~ Cluster a, + Fleet b, …  [by hand, to version 3]
      3  live               2h        800  
not kept: no space
";
        assert_eq!(table(&value), expected);
    }
}
