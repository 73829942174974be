//! What a registration says of engines: what their feed tells, cut to what fits.

use super::{Engine, MODELS_MAX, TEXT_BYTES_MAX};
use crate::{
    feed::{FeedBody, FeedSource},
    report::{EngineId, EngineState, Health, Model, Role},
    resource::endpoint::Address,
};
use futures_util::StreamExt;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{sync::watch, time::sleep};

/// After a feed ended.
const FEED_PAUSE: Duration = Duration::from_secs(1);

/// An engine that stands beside whoever registers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beside {
    /// Its name in the fleet.
    pub id: EngineId,
    /// As its node sees it.
    pub address: Address,
    /// As configured, before what it says itself.
    pub role: Option<Role>,
    /// It was told to get no new requests.
    pub is_left: bool,
}

/// What is known of engines.
pub(super) type States = BTreeMap<EngineId, EngineState>;

/// Follows a feed, for as long as somebody wants to know.
pub(super) async fn hear(source: Arc<dyn FeedSource>, told: watch::Sender<States>) {
    let hearing = async {
        loop {
            let mut messages = source.subscribe();
            while let Some(message) = messages.next().await {
                told.send_if_modified(|states| match message.body {
                    FeedBody::State(state) => take(states, message.engine, state),
                    FeedBody::Gone => states.remove(&message.engine).is_some(),
                    FeedBody::Load(_) | FeedBody::Snapshot(_) | FeedBody::Changes(_) => false,
                });
            }
            sleep(FEED_PAUSE).await;
        }
    };
    tokio::select! {
        () = told.closed() => {}
        () = hearing => {}
    }
}

/// Whether a state is news. One that does not answer serves what it did: it is no other engine for that.
fn take(states: &mut States, engine: EngineId, mut state: EngineState) -> bool {
    let known = states.get(&engine);
    if let Some(known) = known.filter(|_| {
        state.models.is_empty() && matches!(state.health, Health::Dead | Health::Unknown)
    }) {
        state.models.clone_from(&known.models);
        state.version.clone_from(&known.version);
        (state.kind, state.role) = (known.kind, known.role);
    }
    let is_news = known != Some(&state);
    states.insert(engine, state);
    is_news
}

/// What fits of a text.
fn cut(text: &str) -> String {
    let said = text.chars().filter(|letter| !letter.is_control());
    let mut cut: String = said.collect();
    cut.truncate(cut.floor_char_boundary(TEXT_BYTES_MAX));
    cut
}

/// An engine as it is registered.
pub(super) fn engine(beside: Beside, known: Option<&EngineState>) -> Engine {
    let known = known.cloned().unwrap_or_default();
    let models = known.models.into_iter().map(|model| Model {
        id: cut(&model.id),
        ..Model::default()
    });
    Engine {
        id: beside.id.to_string(),
        address: beside.address,
        state: EngineState {
            kind: known.kind,
            version: cut(&known.version),
            models: models.take(MODELS_MAX).collect(),
            role: beside.role.unwrap_or(known.role),
            // It stays so when it is stopped: else it would be for others again, and dead.
            health: if beside.is_left {
                Health::Draining
            } else {
                known.health
            },
            reason: cut(&known.reason),
            block_tokens: known.block_tokens,
            kv_blocks: known.kv_blocks,
            ..EngineState::default()
        },
    }
}

/// Whether all these engines said how they are.
pub(super) fn are_told(engines: &[Beside], states: &States) -> bool {
    engines.iter().all(|engine| {
        let state = states.get(&engine.id);
        state.is_some_and(|it| !it.models.is_empty() || it.health != Health::Unknown)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beside(is_left: bool) -> Beside {
        Beside {
            id: "e".into(),
            address: Address {
                host: "127.0.0.1".into(),
                port: 8000,
            },
            role: None,
            is_left,
        }
    }

    fn state(health: Health, models: &[&str]) -> EngineState {
        let models = models.iter().map(|id| Model {
            id: (*id).into(),
            ..Model::default()
        });
        EngineState {
            health,
            models: models.collect(),
            ..EngineState::default()
        }
    }

    #[test]
    fn who_is_drained_and_then_dead_is_to_be_left_still() {
        let told = |health, is_left| {
            let known = state(health, &[]);
            engine(beside(is_left), Some(&known)).state.health
        };
        for health in [Health::Healthy, Health::Dead, Health::Unknown] {
            assert_eq!(told(health, true), Health::Draining);
            assert_eq!(told(health, false), health);
        }
    }

    #[test]
    fn who_serves_nothing_yet_is_waited_for() {
        let ours = [beside(false)];
        let mut states = States::new();
        assert!(!are_told(&ours, &states));
        for (said, is_told) in [
            (state(Health::Unknown, &[]), false),
            (state(Health::Unknown, &["m"]), true),
            (state(Health::Dead, &[]), true),
            (state(Health::Healthy, &["m"]), true),
        ] {
            states.insert(EngineId::from("e"), said);
            assert_eq!(are_told(&ours, &states), is_told);
        }
        // One that does not answer any more serves what it did.
        assert!(take(&mut states, "e".into(), state(Health::Dead, &[])));
        assert_eq!(&*states[&EngineId::from("e")].models[0].id, "m");
    }
}
