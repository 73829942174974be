//! SGLang's own answers: `/server_info`, `/v1/loads`.

use crate::detect::{Answers, version};
use crate::load::Figures;
use crate::zmq_events::EventSource;
use outrigger_xds::report::{EngineKind, EngineState, Role};
use serde::Deserialize;

#[derive(Debug, Default, Deserialize)]
struct ServerInfo {
    #[serde(default)]
    dp_size: Option<u32>,
    #[serde(default)]
    page_size: Option<u32>,
    #[serde(default)]
    kv_events: Option<KvEvents>,
    #[serde(default)]
    disaggregation_mode: Option<String>,
    #[serde(default)]
    disaggregation_bootstrap_port: Option<u16>,
    /// What it listens on.
    #[serde(default)]
    host: Option<String>,
}

impl ServerInfo {
    /// What it was started for.
    fn role(&self) -> Role {
        match self.disaggregation_mode.as_deref() {
            Some("prefill") => Role::Prefill,
            Some("decode") => Role::Decode,
            _ => Role::Both,
        }
    }

    /// Where it meets engines that decode; `host` is where we reach it.
    fn bootstrap(&self, host: &str) -> Option<String> {
        let port = self.disaggregation_bootstrap_port?;
        let concrete = |host: &&str| !matches!(*host, "" | "0.0.0.0" | "::");
        let own = self.host.as_deref().filter(concrete);
        Some(match own {
            Some(own) if own.contains(':') => format!("[{own}]:{port}"),
            own => format!("{}:{port}", own.unwrap_or(host)),
        })
    }
}

/// `kv_events` of `/server_info`; null when events are off.
#[derive(Debug, Deserialize)]
struct KvEvents {
    #[serde(default)]
    publisher: Option<String>,
    endpoint_host: String,
    endpoint_port_base: u16,
    #[serde(default)]
    topic: Option<String>,
    #[serde(default)]
    block_size: Option<u32>,
    #[serde(default)]
    dp_size: Option<u16>,
    #[serde(default)]
    replay_endpoint_port_base: Option<u16>,
}

/// Whether a `/server_info` is SGLang's.
pub(crate) fn is_server_info(body: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Telltale {
        #[serde(rename = "model_path")]
        _model_path: String,
    }
    serde_json::from_slice::<Telltale>(body).is_ok()
}

#[derive(Deserialize)]
struct Loads {
    loads: Vec<RankLoad>,
}

#[derive(Deserialize)]
struct RankLoad {
    num_running_reqs: u64,
    num_waiting_reqs: u64,
    #[serde(default)]
    token_usage: f64,
}

/// Reads `/v1/loads`, which is there without `--enable-metrics`.
pub(crate) fn read_loads(body: &[u8]) -> Option<Figures> {
    let loads = serde_json::from_slice::<Loads>(body).ok()?.loads;
    #[expect(clippy::cast_precision_loss, reason = "a handful of ranks")]
    let ranks = loads.len().max(1) as f64;
    Some(Figures {
        kind: EngineKind::Sglang,
        running: Some(loads.iter().map(|load| load.num_running_reqs).sum()),
        waiting: Some(loads.iter().map(|load| load.num_waiting_reqs).sum()),
        kv_usage: Some(loads.iter().map(|load| load.token_usage).sum::<f64>() / ranks),
        ..Figures::default()
    })
}

/// Fills in what only SGLang's endpoints say; returns the event sources. `host` is the engine's.
pub(crate) fn complete(
    answers: &Answers,
    figures: &Figures,
    host: &str,
    state: &mut EngineState,
) -> Vec<EventSource> {
    let info: ServerInfo = answers
        .server_info
        .as_deref()
        .and_then(|body| serde_json::from_slice(body).ok())
        .unwrap_or_default();
    state.version = version(answers.server_info.as_ref());
    state.dp_size = state.dp_size.max(info.dp_size.unwrap_or(1));
    let role = info.role();
    // What it was started for counts, unless it was said what it is used for.
    if state.role == Role::Both {
        state.role = role;
    }
    if role == Role::Prefill {
        state.bootstrap = info.bootstrap(host).unwrap_or_default();
    }
    let events_block = info.kv_events.as_ref().and_then(|events| events.block_size);
    state.block_tokens = events_block.or(info.page_size).unwrap_or(0);
    if state.block_tokens > 0 {
        state.kv_blocks = figures.kv_tokens.unwrap_or(0) / u64::from(state.block_tokens);
    }
    info.kv_events
        .map(|events| event_sources(&events, host))
        .unwrap_or_default()
}

/// A source per rank: both ports grow by one a rank.
fn event_sources(events: &KvEvents, host: &str) -> Vec<EventSource> {
    if events.publisher.as_deref() == Some("null") {
        return Vec::new();
    }
    let endpoint = |base: u16, rank: u16| {
        Some(format!(
            "tcp://{}:{}",
            events.endpoint_host,
            base.checked_add(rank)?
        ))
    };
    (0..events.dp_size.unwrap_or(1).max(1))
        .filter_map(|rank| {
            let replay = events
                .replay_endpoint_port_base
                .and_then(|base| endpoint(base, rank));
            let topic = events.topic.as_deref().unwrap_or_default();
            EventSource::from_endpoint(
                rank.into(),
                &endpoint(events.endpoint_port_base, rank)?,
                replay.as_deref(),
                topic,
                host,
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_say_what_they_are_and_where_they_meet() {
        let state = |info: &str, role| {
            let mut answers = Answers::default();
            answers.server_info = Some(info.to_owned().into());
            let mut state = EngineState {
                role,
                ..EngineState::default()
            };
            complete(&answers, &Figures::default(), "h", &mut state);
            (state.role, state.bootstrap)
        };
        let told = |mode: &str, host: &str| {
            format!(
                r#"{{"disaggregation_mode":"{mode}","disaggregation_bootstrap_port":8998,"host":"{host}"}}"#
            )
        };
        for (mode, host, role, bootstrap) in [
            ("null", "10.0.0.1", Role::Both, ""),
            ("decode", "10.0.0.1", Role::Decode, ""),
            ("prefill", "10.0.0.1", Role::Prefill, "10.0.0.1:8998"),
            ("prefill", "0.0.0.0", Role::Prefill, "h:8998"),
            ("prefill", "fd00::1", Role::Prefill, "[fd00::1]:8998"),
        ] {
            let expected = (role, bootstrap.to_owned());
            assert_eq!(
                state(&told(mode, host), Role::Both),
                expected,
                "{mode} {host}"
            );
        }
        assert_eq!(state(&told("prefill", "h"), Role::Decode).0, Role::Decode);
    }

    #[test]
    fn ports_grow_by_one_a_rank() {
        let info = |events: &str| {
            let body = format!(r#"{{"dp_size":2,"page_size":16,"kv_events":{events}}}"#);
            let mut answers = Answers::default();
            answers.server_info = Some(body.into());
            let mut state = EngineState::default();
            let sources = complete(&answers, &Figures::default(), "h", &mut state);
            assert_eq!((state.dp_size, state.block_tokens), (2, 16));
            sources
        };
        let sources = info(
            r#"{"publisher":"zmq","endpoint_host":"*","endpoint_port_base":5557,"topic":"kv","dp_size":2,"replay_endpoint_port_base":5657}"#,
        );
        let source = |rank, port: u16, replay: u16| EventSource {
            rank,
            address: format!("h:{port}"),
            may_bind: false,
            replay: Some(format!("h:{replay}")),
            topic: "kv".into(),
        };
        assert_eq!(sources, [source(0, 5557, 5657), source(1, 5558, 5658)]);
        let off = r#"{"publisher":"null","endpoint_host":"*","endpoint_port_base":5557}"#;
        assert!(info(off).is_empty());
        let last = r#"{"endpoint_host":"*","endpoint_port_base":65535,"dp_size":2}"#;
        assert_eq!(info(last).len(), 1, "there is no port 65536");
    }
}
