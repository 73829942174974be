//! The feed over NATS: telling it, and listening to it.
//!
//! NATS core only, at most once. Messages of an engine go to `outrigger.feed.v1.TOKEN` as the frames of
//! `outrigger_xds::feed::encode`, one publication each. A listener that comes late or misses something asks on
//! `outrigger.feed.v1.snapshot` (payload: an engine's id, or empty for all); every agent that has such an engine
//! answers to the reply subject with state, load and snapshot. An agent repeats its engines' states every two seconds:
//! an engine not heard of for ten is gone. What the messages mean is `outrigger_xds::feed`'s.

use async_nats::{Client, ConnectOptions, Event, Subject, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream::poll_fn};
use outrigger_xds::feed::{
    Assembler, Continuity, FeedBody, FeedMessage, FeedSource, FeedStream, encode,
};
use outrigger_xds::report::EngineId;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Everything told.
const SUBJECTS: &str = "outrigger.feed.v1.*";
/// Before an engine's token.
const SUBJECT_PREFIX: &str = "outrigger.feed.v1.";
/// Where snapshots are asked for. No engine's token: those begin with `e-`.
const SNAPSHOT_SUBJECT: &str = "outrigger.feed.v1.snapshot";
/// How often an agent repeats the states of its engines.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Silence after which an engine is gone.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Between two requests for the same snapshot.
const REQUEST_INTERVAL: Duration = Duration::from_secs(1);
/// Messages a listener may be behind; NATS drops beyond its own buffer, and the gap is repaired.
const MESSAGES_MAX: usize = 1024;

/// Why the feed cannot be told or heard.
#[derive(Debug, thiserror::Error)]
pub enum NatsError {
    /// The broker cannot be used; a URL that is none, or a refused subscription.
    #[error("NATS: {0}")]
    Broker(String),
    /// The source ended.
    #[error("the feed's source ended")]
    SourceEnded,
}

/// Tells `source` until it ends or the broker refuses. Waits for a broker that is not there yet.
///
/// # Errors
/// See [`NatsError`].
pub async fn nats_publish(url: &str, source: Arc<dyn FeedSource>) -> Result<(), NatsError> {
    let client = connect(url).await?;
    let mut requests = client.subscribe(SNAPSHOT_SUBJECT).await.map_err(broker)?;
    let mut feed = source.subscribe();
    let mut states: HashMap<EngineId, FeedMessage> = HashMap::new();
    let mut heartbeats = interval(HEARTBEAT);
    heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            message = feed.next() => {
                let message = message.ok_or(NatsError::SourceEnded)?;
                match &message.body {
                    FeedBody::State(_) => drop(states.insert(message.engine.clone(), message.clone())),
                    FeedBody::Gone => drop(states.remove(&message.engine)),
                    FeedBody::Load(_) | FeedBody::Snapshot(_) | FeedBody::Changes(_) => {}
                }
                // The repeated state tells a listener how far it should have heard.
                if let Some(state) = states.get_mut(&message.engine) {
                    (state.epoch, state.seq) = (message.epoch, message.seq);
                }
                send(&client, subject(&message.engine), &message).await?;
            }
            request = requests.next() => match request {
                Some(request) => answer(&client, source.as_ref(), &request).await?,
                None => return Err(NatsError::Broker("the subscription to snapshot requests ended".into())),
            },
            _ = heartbeats.tick() => {
                for state in states.values() {
                    send(&client, subject(&state.engine), state).await?;
                }
            }
        }
    }
}

/// Answers a request with what a new subscriber gets first.
async fn answer(
    client: &Client,
    source: &dyn FeedSource,
    request: &async_nats::Message,
) -> Result<(), NatsError> {
    let Some(reply) = request.reply.clone() else {
        return Ok(());
    };
    metrics::counter!("outrigger_nats_snapshots_total").increment(1);
    let mut feed = source.subscribe();
    // A source has its beginning ready; the first wait is for changes.
    while let Some(Some(message)) = feed.next().now_or_never() {
        if request.payload.is_empty() || request.payload == message.engine.0.as_bytes() {
            send(client, reply.clone(), &message).await?;
        }
    }
    Ok(())
}

async fn send(client: &Client, subject: Subject, message: &FeedMessage) -> Result<(), NatsError> {
    for frame in encode(message) {
        client
            .publish(subject.clone(), frame)
            .await
            .map_err(broker)?;
    }
    Ok(())
}

async fn connect(url: &str) -> Result<Client, NatsError> {
    let on_event = |event: Event| async move {
        metrics::counter!("outrigger_nats_events_total", "event" => event_name(&event))
            .increment(1);
        tracing::info!(%event, "NATS");
    };
    let options = ConnectOptions::new()
        .name("outrigger")
        .retry_on_initial_connect()
        .event_callback(on_event);
    options.connect(url).await.map_err(broker)
}

fn event_name(event: &Event) -> &'static str {
    match event {
        Event::Connected => "connected",
        Event::Disconnected => "disconnected",
        Event::SlowConsumer(_) => "slow_consumer",
        _ => "other",
    }
}

fn broker(error: impl std::fmt::Display) -> NatsError {
    NatsError::Broker(error.to_string())
}

/// The subject of an engine: what may not stand in a token is `=` and two hexadecimal digits a byte.
fn subject(engine: &EngineId) -> Subject {
    let mut subject = format!("{SUBJECT_PREFIX}e-");
    for byte in engine.0.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b':' | b'/') {
            subject.push(char::from(byte));
        } else {
            subject.push_str(&format!("={byte:02X}"));
        }
    }
    subject.into()
}

/// Listens to all engines told at the broker. Spawns on the current tokio runtime; ends when the stream is dropped.
///
/// The stream keeps `FeedSource`'s promise: what was missed is replaced by a snapshot. It never ends; a broker that
/// is not there is waited for, and its engines are gone meanwhile.
#[must_use]
pub fn nats_subscribe(url: &str) -> FeedStream {
    let (sender, mut receiver) = mpsc::channel(MESSAGES_MAX);
    let url = url.to_owned();
    tokio::spawn(async move {
        while let Err(error) = listen(&url, &sender).await {
            tracing::warn!(%error, "the feed over NATS is interrupted");
            tokio::time::sleep(REQUEST_INTERVAL).await;
        }
    });
    Box::pin(poll_fn(move |context| receiver.poll_recv(context)))
}

/// Listens until nobody wants to hear it.
async fn listen(url: &str, sender: &mpsc::Sender<FeedMessage>) -> Result<(), NatsError> {
    let client = connect(url).await?;
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.map_err(broker)?;
    let mut told = client.subscribe(SUBJECTS).await.map_err(broker)?;
    let mut listener = Listener {
        client,
        inbox: inbox.into(),
        sender: sender.clone(),
        continuity: Continuity::default(),
        heard: HashMap::new(),
        told_frames: Assembler::default(),
        answer_frames: Assembler::default(),
        asked: HashMap::new(),
    };
    let result = listener.run(&mut told, &mut answers).await;
    listener.forget(|_| true).await;
    result
}

/// What a listener knows of an engine.
struct Heard {
    /// Epoch and sequence number of the last KV message; `None` before the first snapshot.
    position: Option<(u64, u64)>,
    /// Epoch and sequence number that the last message of any kind gave: beyond `position`, something was missed.
    told: (u64, u64),
    at: Instant,
}

impl Heard {
    /// Whether an answer says no more than what was heard since it was asked for.
    fn covers(&self, answer: &FeedMessage) -> bool {
        self.position
            .is_some_and(|(epoch, seq)| epoch == answer.epoch && seq >= answer.seq)
    }

    /// Whether something was told that was not heard.
    fn misses_something(&self) -> bool {
        self.position
            .is_none_or(|(epoch, seq)| self.told.0 != epoch || self.told.1 > seq)
    }
}

struct Listener {
    client: Client,
    inbox: Subject,
    sender: mpsc::Sender<FeedMessage>,
    continuity: Continuity,
    heard: HashMap<EngineId, Heard>,
    /// Two, because frames of one engine must not mix.
    told_frames: Assembler,
    answer_frames: Assembler,
    asked: HashMap<EngineId, Instant>,
}

impl Listener {
    async fn run(
        &mut self,
        told: &mut Subscriber,
        answers: &mut Subscriber,
    ) -> Result<(), NatsError> {
        self.ask(Bytes::new()).await?;
        let mut checks = interval(REQUEST_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let sender = self.sender.clone();
        loop {
            tokio::select! {
                () = sender.closed() => return Ok(()),
                _ = checks.tick() => {
                    self.forget(|heard| heard.at.elapsed() > SILENCE_MAX).await;
                    self.ask_for_missed().await?;
                }
                frame = answers.next() => {
                    let frame = frame.ok_or_else(|| broker("the subscription to answers ended"))?;
                    let message = self.answer_frames.push(&frame.payload);
                    if let Some(message) = self.whole(message).filter(|message| !self.is_old(message)) {
                        self.hear(message).await?;
                    }
                }
                frame = told.next() => {
                    let frame = frame.ok_or_else(|| broker("the subscription to the feed ended"))?;
                    if frame.subject.as_str() == SNAPSHOT_SUBJECT {
                        continue;
                    }
                    let message = self.told_frames.push(&frame.payload);
                    if let Some(message) = self.whole(message) {
                        self.hear(message).await?;
                    }
                }
            }
        }
    }

    fn whole(
        &self,
        message: Result<Option<FeedMessage>, outrigger_xds::feed::FeedError>,
    ) -> Option<FeedMessage> {
        message.unwrap_or_else(|error| {
            metrics::counter!("outrigger_nats_malformed_total").increment(1);
            tracing::debug!(%error, "not a feed message");
            None
        })
    }

    fn is_old(&self, answer: &FeedMessage) -> bool {
        self.heard
            .get(&answer.engine)
            .is_some_and(|heard| heard.covers(answer))
    }

    async fn hear(&mut self, message: FeedMessage) -> Result<(), NatsError> {
        if message.body == FeedBody::Gone {
            self.heard.remove(&message.engine);
            let _ = self.continuity.admit(&message);
            return self.pass(message).await;
        }
        let heard = self.heard.entry(message.engine.clone()).or_insert(Heard {
            position: None,
            told: (0, 0),
            at: Instant::now(),
        });
        heard.at = Instant::now();
        heard.told = (message.epoch, message.seq);
        let admitted = self.continuity.admit(&message);
        if let (Ok(true), FeedBody::Snapshot(_) | FeedBody::Changes(_)) = (&admitted, &message.body)
        {
            heard.position = Some((message.epoch, message.seq));
        }
        let lacks_snapshot = heard.position.is_none() || admitted.is_err();
        if lacks_snapshot {
            self.ask_for(&message.engine).await?;
        }
        match admitted {
            Ok(true) => self.pass(message).await,
            Ok(false) => Ok(()),
            Err(error) => {
                metrics::counter!("outrigger_nats_gaps_total").increment(1);
                tracing::info!(%error, "asking for a snapshot");
                Ok(())
            }
        }
    }

    /// Hands on; a receiver that is gone ends `run` at its next turn.
    async fn pass(&self, message: FeedMessage) -> Result<(), NatsError> {
        let _ = self.sender.send(message).await;
        Ok(())
    }

    async fn ask_for(&mut self, engine: &EngineId) -> Result<(), NatsError> {
        if self
            .asked
            .get(engine)
            .is_some_and(|asked| asked.elapsed() < REQUEST_INTERVAL)
        {
            return Ok(());
        }
        self.asked.insert(engine.clone(), Instant::now());
        self.ask(Bytes::copy_from_slice(engine.0.as_bytes())).await
    }

    /// Asks where the last messages of a burst were lost, so that no gap showed.
    async fn ask_for_missed(&mut self) -> Result<(), NatsError> {
        let engines: Vec<EngineId> = self
            .heard
            .iter()
            .filter(|(_, heard)| heard.misses_something())
            .map(|(engine, _)| engine.clone())
            .collect();
        for engine in engines {
            self.ask_for(&engine).await?;
        }
        Ok(())
    }

    async fn ask(&self, engine: Bytes) -> Result<(), NatsError> {
        self.client
            .publish_with_reply(SNAPSHOT_SUBJECT, self.inbox.clone(), engine)
            .await
            .map_err(broker)
    }

    /// Tells that engines are gone.
    async fn forget(&mut self, gone: impl Fn(&Heard) -> bool) {
        let gone: Vec<EngineId> = self
            .heard
            .iter()
            .filter(|(_, heard)| gone(heard))
            .map(|(engine, _)| engine.clone())
            .collect();
        for engine in gone {
            metrics::counter!("outrigger_nats_silent_engines_total").increment(1);
            self.heard.remove(&engine);
            self.asked.remove(&engine);
            let message = FeedMessage {
                engine,
                epoch: 0,
                seq: 0,
                body: FeedBody::Gone,
            };
            let _ = self.continuity.admit(&message);
            let _ = self.sender.send(message).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_snapshot_shows_and_an_old_answer_does_not_replace_it() {
        let mut heard = Heard {
            position: Some((7, 0)),
            told: (7, 0),
            at: Instant::now(),
        };
        let answer = |seq| FeedMessage {
            engine: "e".into(),
            epoch: 7,
            seq,
            body: FeedBody::Gone,
        };
        assert!(!heard.misses_something());
        // The repeated state names a snapshot that never came.
        heard.told = (7, 1);
        assert!(heard.misses_something());
        assert!(!heard.covers(&answer(1)), "that is what is missing");
        heard.position = Some((7, 1));
        assert!(heard.covers(&answer(0)) && heard.covers(&answer(1)));
        assert!(!heard.covers(&answer(2)));
    }

    #[test]
    fn an_engine_s_subject_is_one_token() {
        let subject = subject(&EngineId::from("node 1/10.0.0.1:80*>"));
        assert_eq!(
            subject.as_str(),
            "outrigger.feed.v1.e-node=201/10=2E0=2E0=2E1:80=2A=3E"
        );
        assert_ne!(
            super::subject(&EngineId::from("snapshot")).as_str(),
            SNAPSHOT_SUBJECT
        );
    }
}
