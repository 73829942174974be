//! vLLM's own answers: version and KV event sources.

use crate::detect::{Answers, version};
use crate::zmq_events::EventSource;
use outrigger_xds::report::EngineState;
use serde::Deserialize;
use std::collections::BTreeMap;

/// One rank of `/kv_event_sources` (vLLM 0.31 and newer): the publisher's resolved configuration.
#[derive(Debug, Deserialize)]
struct Source {
    #[serde(default)]
    enable_kv_cache_events: bool,
    #[serde(default)]
    publisher: Option<String>,
    #[serde(default)]
    endpoint: Option<String>,
    #[serde(default)]
    replay_endpoint: Option<String>,
    #[serde(default)]
    topic: String,
}

/// Fills in what only vLLM's endpoints say; returns the event sources. `host` is the engine's.
pub(crate) fn complete(answers: &Answers, host: &str, state: &mut EngineState) -> Vec<EventSource> {
    state.version = version(answers.version.as_ref());
    let sources = answers
        .kv_event_sources
        .as_deref()
        .map(|body| event_sources(body, host))
        .unwrap_or_default();
    state.dp_size = state
        .dp_size
        .max(u32::try_from(sources.len()).unwrap_or(u32::MAX));
    sources
}

/// Reads `/kv_event_sources`: `{"RANK": {…}}`.
fn event_sources(body: &[u8], host: &str) -> Vec<EventSource> {
    let Ok(ranks) = serde_json::from_slice::<BTreeMap<u32, Source>>(body) else {
        return Vec::new();
    };
    ranks
        .into_iter()
        .filter(|(_, source)| {
            source.enable_kv_cache_events && source.publisher.as_deref() != Some("null")
        })
        .filter_map(|(rank, source)| {
            let replay = source.replay_endpoint.as_deref();
            EventSource::from_endpoint(
                rank,
                source.endpoint.as_deref()?,
                replay,
                &source.topic,
                host,
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_per_rank() {
        let body = br#"{"0":{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:5567","topic":"kv","buffer_steps":1},
            "1":{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://10.0.0.1:5558","replay_endpoint":null,"topic":""},
            "2":{"enable_kv_cache_events":false,"endpoint":"tcp://*:1"},
            "3":{"enable_kv_cache_events":true,"endpoint":"ipc:///tmp/x"}}"#;
        let source =
            |rank, address: &str, may_bind, replay: Option<&str>, topic: &str| EventSource {
                rank,
                address: address.into(),
                may_bind,
                replay: replay.map(Into::into),
                topic: topic.into(),
            };
        assert_eq!(
            event_sources(body, "h"),
            [
                source(0, "h:5557", false, Some("h:5567"), "kv"),
                source(1, "10.0.0.1:5558", true, None, "")
            ]
        );
        assert!(event_sources(b"[]", "h").is_empty());
    }
}
