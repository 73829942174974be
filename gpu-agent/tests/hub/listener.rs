//! A subscriber for tests: keeps the picture a feed paints, and checks the feed's contract while it listens.

use futures_util::StreamExt;
use outrigger_xds::feed::{Continuity, FeedBody, FeedMessage, FeedStream};
use outrigger_xds::report::{EngineId, EngineState, KvChange, Load, Shelf};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

/// What a subscriber knows of one engine.
#[derive(Debug, Clone, Default)]
pub(crate) struct Picture {
    pub(crate) state: EngineState,
    pub(crate) load: Load,
    pub(crate) epoch: u64,
    pub(crate) complete: bool,
    pub(crate) blocks: BTreeMap<Shelf, HashSet<u64>>,
    pub(crate) snapshots: u32,
}

impl Picture {
    pub(crate) fn device(&self) -> HashSet<u64> {
        self.blocks
            .get(&Shelf::default())
            .cloned()
            .unwrap_or_default()
    }
}

/// A subscriber that checks the feed's contract while it listens.
pub(crate) struct Listener {
    stream: FeedStream,
    continuity: Continuity,
    pub(crate) engines: HashMap<EngineId, Picture>,
}

impl Listener {
    pub(crate) fn new(stream: FeedStream) -> Self {
        Self {
            stream,
            continuity: Continuity::default(),
            engines: HashMap::new(),
        }
    }

    fn hear(&mut self, message: FeedMessage) {
        assert_eq!(self.continuity.admit(&message), Ok(true), "{message:?}");
        if message.body == FeedBody::Gone {
            self.engines.remove(&message.engine);
            return;
        }
        let picture = self.engines.entry(message.engine).or_default();
        if matches!(message.body, FeedBody::Snapshot(_) | FeedBody::Changes(_)) {
            picture.epoch = message.epoch;
        }
        match message.body {
            FeedBody::State(state) => picture.state = state,
            FeedBody::Load(load) => picture.load = load,
            FeedBody::Snapshot(snapshot) => {
                assert_eq!(snapshot.block_tokens, 32);
                picture.complete = snapshot.complete;
                picture.blocks = snapshot
                    .shelves
                    .into_iter()
                    .map(|(shelf, hashes)| (shelf, hashes.into_iter().collect()))
                    .collect();
                picture.snapshots += 1;
            }
            FeedBody::Changes(changes) => {
                for change in changes {
                    match change {
                        KvChange::Stored { shelf, hashes } => {
                            picture.blocks.entry(shelf).or_default().extend(hashes)
                        }
                        KvChange::Removed { shelf, hashes } => {
                            let blocks = picture.blocks.entry(shelf).or_default();
                            hashes.iter().for_each(|hash| {
                                assert!(blocks.remove(hash), "removed what was not there")
                            });
                        }
                        KvChange::Cleared { rank } => {
                            picture.blocks.retain(|shelf, _| shelf.rank != rank)
                        }
                    }
                }
            }
            FeedBody::Gone => unreachable!("handled above"),
        }
    }

    /// Listens until engine `id` looks as wanted.
    pub(crate) async fn until(
        &mut self,
        id: &str,
        what: &str,
        wanted: impl Fn(&Picture) -> bool,
    ) -> Picture {
        let id = EngineId::from(id);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(picture) = self.engines.get(&id).filter(|picture| wanted(picture)) {
                return picture.clone();
            }
            let next = tokio::time::timeout_at(deadline, self.stream.next()).await;
            let Ok(message) = next else {
                panic!("{what}: never came; now {:#?}", self.engines.get(&id))
            };
            self.hear(message.expect("the feed does not end"));
        }
    }

    /// Listens for a while.
    pub(crate) async fn listen(&mut self, time: Duration) {
        let deadline = tokio::time::Instant::now() + time;
        while let Ok(message) = tokio::time::timeout_at(deadline, self.stream.next()).await {
            self.hear(message.expect("the feed does not end"));
        }
    }
}
