//! TensorRT-LLM's KV events: asked for over HTTP, where reading empties the engine's queue.
//!
//! What was read is gone and cannot be asked for again, so there may be one reader only: us, beside the engine. Events are
//! numbered by rank; a number that does not follow the last means that somebody else reads too, that the engine's queue
//! was too short, or that an answer was lost on the way: what was known of that rank is void. The engine answers when
//! nothing has happened for a while (2 s, in the newest source 0): one that is never quiet does not answer, and is left
//! alone. What an answer says is `told`'s business, what the events mean is `lineage`'s.

mod told;

use self::told::{Numbered, Sizes, Told, read};
use crate::engine::EngineConfig;
use crate::event::EventBatch;
use crate::http::{HttpClient, HttpError};
use crate::zmq_events::{BeginReason, RankEvent};
use bytes::Bytes;
use http::StatusCode;
use serde::de::Error as _;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::sleep;

const PATH: &str = "/kv_cache_events";
/// After an answer that did not come: the engine goes on reading for it until nothing happened for 2 s, and a question
/// beside that one would be a second reader.
const ORPHAN_PAUSE: Duration = Duration::from_secs(3);
/// Answers that may be missing in a row before the engine is left alone.
const UNANSWERED_MAX: u32 = 3;
/// Before asking an engine again that was left alone.
const LEFT_ALONE: Duration = Duration::from_secs(60);
/// Between an answer with events and the next question: what the engine does meanwhile comes in one answer.
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Before asking again where there is no such path, or the key was refused.
const REFUSED_RETRY: Duration = Duration::from_secs(30);
/// Longest answer read. A block of 32 tokens takes some 2 KB.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// A longer answer is read on a thread of its own.
const READ_HERE_BYTES_MAX: usize = 64 << 10;
/// Data-parallel ranks of one engine that are followed.
const RANKS_MAX: u32 = 256;

type Events = mpsc::Sender<(u32, RankEvent)>;

/// Nobody listens any more.
struct Unheard;

/// Asks one engine for its events.
pub(crate) struct Polling {
    client: Result<HttpClient, HttpError>,
    /// Between an answer without events and the next question.
    idle_pause: Duration,
    /// Answers that did not come in time, in a row.
    unanswered: u32,
    follower: Follower,
}

impl Polling {
    pub(crate) fn new(config: &EngineConfig, events: Events) -> Self {
        Self {
            client: HttpClient::new(
                &config.url,
                config.api_key.clone(),
                config.kv_events_timeout,
                ANSWER_BYTES_MAX,
            ),
            idle_pause: config.poll_interval,
            unanswered: 0,
            follower: Follower {
                engine: config.id.to_string(),
                events,
                ranks: BTreeMap::from([(0, Rank::default())]),
                sizes: Sizes::default(),
            },
        }
    }

    /// Asks until nobody listens any more.
    pub(crate) async fn run(mut self) {
        loop {
            let Ok(client) = &self.client else {
                // Who watches the engine has found the same, and ended.
                return std::future::pending().await;
            };
            let answer = client.post(PATH).await;
            match self.take(answer).await {
                Ok(pause) => sleep(pause).await,
                Err(Unheard) => return,
            }
        }
    }

    /// Takes in what came of a question; how long to wait before the next.
    async fn take(
        &mut self,
        answer: Result<(StatusCode, Bytes), HttpError>,
    ) -> Result<Duration, Unheard> {
        if !matches!(answer, Err(HttpError::Timeout(_))) {
            self.unanswered = 0;
        }
        match answer {
            Ok((StatusCode::OK, body)) => Ok(match self.follower.hear(body).await? {
                true => BUSY_PAUSE,
                false => self.idle_pause,
            }),
            Ok((status, _)) => {
                let reason = format!("POST {PATH} answered {status}");
                self.follower.lost(reason).await?;
                Ok(match status.is_client_error() {
                    true => REFUSED_RETRY,
                    false => self.idle_pause,
                })
            }
            Err(HttpError::Refused) => {
                let reason = format!("POST {PATH}: {}", HttpError::Refused);
                self.follower.lost(reason).await?;
                Ok(self.idle_pause)
            }
            Err(error) => self.unanswered(&error).await,
        }
    }

    /// What the engine said or will say to this question is lost, and it may be that blocks are gone.
    async fn unanswered(&mut self, error: &HttpError) -> Result<Duration, Unheard> {
        let engine = &self.follower.engine;
        tracing::warn!(engine, %error, "an answer of {PATH} is lost: what was known of its cache is forgotten");
        let mut reason = format!("POST {PATH}: {error}");
        let pause = match error {
            HttpError::Timeout(_) => {
                self.unanswered += 1;
                if self.unanswered >= UNANSWERED_MAX {
                    self.unanswered = 0;
                    self.follower
                        .count("outrigger_kv_event_left_alone_total", 1);
                    reason = format!(
                        "{reason}, {UNANSWERED_MAX} times: it answers only when it is quiet; not asked for {LEFT_ALONE:?}"
                    );
                    LEFT_ALONE
                } else {
                    ORPHAN_PAUSE
                }
            }
            HttpError::TooLong(_) => {
                metrics::counter!("outrigger_engine_answers_too_long_total").increment(1);
                BUSY_PAUSE
            }
            _ => self.idle_pause,
        };
        self.follower.forget(BeginReason::Unanswered).await?;
        self.follower.lost(reason).await?;
        Ok(pause)
    }
}

/// Where in one rank's history we are.
#[derive(Default)]
struct Rank {
    /// Number of the event to come; `None` before the first of a history.
    next: Option<u64>,
    /// A history was begun.
    begun: bool,
}

/// Makes histories of answers.
struct Follower {
    engine: String,
    events: Events,
    ranks: BTreeMap<u32, Rank>,
    sizes: Sizes,
}

impl Follower {
    /// Takes in an answer; whether it told of anything.
    async fn hear(&mut self, body: Bytes) -> Result<bool, Unheard> {
        let window = self.sizes.window;
        let told = match self.read(body).await {
            Ok(told) => told,
            Err(error) => return self.garbage(&error).await.map(|()| false),
        };
        self.count("outrigger_kv_event_garbage_total", told.garbage);
        if window != 0 && self.sizes.window > window {
            self.forget(BeginReason::WiderWindow).await?;
        }
        let mut by_rank: BTreeMap<u32, Vec<Numbered>> = BTreeMap::new();
        for event in told.events {
            by_rank.entry(event.rank).or_default().push(event);
        }
        let any = !by_rank.is_empty();
        for (rank, events) in by_rank {
            self.follow(rank, events).await?;
        }
        if !any {
            self.quiet().await?;
        }
        Ok(any)
    }

    /// Reads an answer; a long one beside the runtime, which others wait for.
    async fn read(&mut self, body: Bytes) -> Result<Told, serde_json::Error> {
        if body.len() <= READ_HERE_BYTES_MAX {
            return read(&body, &mut self.sizes);
        }
        let mut sizes = self.sizes;
        let reading = tokio::task::spawn_blocking(move || {
            let told = read(&body, &mut sizes);
            (told, sizes)
        });
        match reading.await {
            Ok((told, sizes)) => {
                self.sizes = sizes;
                told
            }
            Err(error) => Err(serde_json::Error::custom(error)),
        }
    }

    /// Delivers what came of one rank, and begins anew where it does not follow.
    async fn follow(&mut self, rank: u32, told: Vec<Numbered>) -> Result<(), Unheard> {
        if rank >= RANKS_MAX {
            self.count("outrigger_kv_event_garbage_total", told.len() as u64);
            return Ok(());
        }
        let mut state = self.ranks.remove(&rank).unwrap_or_default();
        let mut batch = EventBatch::default();
        let mut first = None;
        for Numbered { id, events, .. } in told {
            if let Some(reason) = self.judge(rank, &state, id) {
                // What came before it in this answer is as void as the rest.
                batch.events.clear();
                self.begin(rank, reason).await?;
                (state.begun, state.next) = (true, None);
            }
            if state.next.is_none() {
                first = Some(id);
            }
            state.next = Some(id.saturating_add(1));
            batch.events.extend(events);
        }
        self.ranks.insert(rank, state);
        self.tell(rank, RankEvent::Connected).await?;
        self.tell(rank, RankEvent::Batch(batch)).await?;
        match first {
            // Nothing was before event 0.
            Some(first) => {
                let complete = first == 0;
                self.tell(rank, RankEvent::Settled { complete }).await
            }
            None => Ok(()),
        }
    }

    /// Why a history begins with this event, if it does.
    fn judge(&self, rank: u32, state: &Rank, id: u64) -> Option<BeginReason> {
        let engine = &self.engine;
        match state.next {
            None => (!state.begun).then_some(BeginReason::Start),
            Some(next) if id == next => None,
            Some(next) if id > next => {
                self.count("outrigger_kv_event_gaps_total", 1);
                tracing::warn!(
                    engine,
                    rank,
                    next,
                    got = id,
                    "KV events are missing, and what was known of the rank is forgotten: does somebody else read {PATH}, or is event_buffer_max_size too small?"
                );
                Some(BeginReason::GapTooOld)
            }
            Some(_) => Some(BeginReason::Restart),
        }
    }

    async fn begin(&self, rank: u32, reason: BeginReason) -> Result<(), Unheard> {
        metrics::counter!("outrigger_kv_event_histories_total", "engine" => self.engine.clone(), "reason" => reason.as_str()).increment(1);
        self.tell(rank, RankEvent::Begin(reason)).await
    }

    /// What is known of all ranks is void; their histories go on with whatever comes next.
    async fn forget(&mut self, reason: BeginReason) -> Result<(), Unheard> {
        for state in self.ranks.values_mut() {
            state.next = None;
        }
        for (rank, _) in self.ranks.iter().filter(|(_, state)| state.begun) {
            self.begin(*rank, reason).await?;
        }
        Ok(())
    }

    /// An answer that nobody can read may have said that blocks are gone.
    async fn garbage(&mut self, error: &serde_json::Error) -> Result<(), Unheard> {
        self.count("outrigger_kv_event_garbage_total", 1);
        tracing::warn!(engine = self.engine, %error, "unreadable KV events: what was known of its cache is forgotten");
        self.forget(BeginReason::Unreadable).await?;
        self.lost("unreadable, and what was known is forgotten".to_owned())
            .await
    }

    /// An engine that keeps no events answers as one that has none: only events show that there are any.
    async fn quiet(&self) -> Result<(), Unheard> {
        for (rank, state) in &self.ranks {
            let event = match state.begun {
                true => RankEvent::Connected,
                false => RankEvent::Lost(
                    "none told yet; it keeps some with event_buffer_max_size only".to_owned(),
                ),
            };
            self.tell(*rank, event).await?;
        }
        Ok(())
    }

    async fn lost(&self, reason: String) -> Result<(), Unheard> {
        for rank in self.ranks.keys() {
            self.tell(*rank, RankEvent::Lost(reason.clone())).await?;
        }
        Ok(())
    }

    async fn tell(&self, rank: u32, event: RankEvent) -> Result<(), Unheard> {
        self.events.send((rank, event)).await.map_err(|_| Unheard)
    }

    fn count(&self, name: &'static str, count: u64) {
        if count > 0 {
            metrics::counter!(name, "engine" => self.engine.clone()).increment(count);
        }
    }
}
