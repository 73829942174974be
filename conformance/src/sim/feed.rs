//! Answers "what does the client of this generation see next": tokens as they come, or the fault that strikes it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, stream};

use super::api::{ApiError, Flight, NO_SEEDS};
use super::config::{Profile, Seeds};
use super::engine::{Engine, Generation};
use super::fault::FaultKind;
use super::http::{Piece, Response};
use super::scheduler::{Output, Sampling};
use super::sglang;

/// The error event of an engine whose process died, as recorded.
const DEAD: &str = "data: {\"error\": {\"message\": \"EngineCore encountered an issue. See stack trace (above) for the root cause.\", \"type\": \"InternalServerError\", \"param\": null, \"code\": 500}}\n\n";
/// The last event of a stream.
pub(crate) const DONE: &str = "data: [DONE]\n\n";

/// The stream of an engine that finds only now that it takes no seeds, as vLLM does.
pub(crate) fn late_refusal(engine: &Engine, sampling: &Sampling) -> Option<Response> {
    engine.note_seed(sampling.seed);
    let drawn = sampling.seed.is_some() && sampling.temperature > 0.0;
    if !drawn || engine.config.seeds != Seeds::RefusedInStream {
        return None;
    }
    engine.refuse_seed();
    let error = format!(
        "data: {{\"error\": {{\"message\": \"{NO_SEEDS}\", \"type\": \"BadRequestError\", \"param\": null, \"code\": 400}}}}\n\n"
    );
    let events = [error, DONE.to_owned()].map(Piece::Data);
    Some(Response::events(stream::iter(events)))
}

/// One step of a generation, as its client may see it.
pub(crate) enum Seen {
    Token(Output),
    End,
    /// The connection breaks.
    Broken(Piece),
    /// The engine's process died behind a server that still answers.
    Dead,
}

/// A generation and the faults on its way to the client.
pub(crate) struct Feed {
    engine: Arc<Engine>,
    generation: Generation,
    flight: Flight,
    delivered: u64,
    delay: Duration,
    taken: Vec<FaultKind>,
}

impl Feed {
    pub(crate) fn new(engine: &Arc<Engine>, generation: Generation, flight: Flight) -> Self {
        Self {
            engine: Arc::clone(engine),
            generation,
            flight,
            delivered: 0,
            delay: Duration::ZERO,
            taken: Vec::new(),
        }
    }

    /// The request's external id.
    pub(crate) fn id(&self) -> &str {
        &self.flight.id
    }

    /// The next token, or what happens instead.
    pub(crate) async fn next(&mut self) -> Seen {
        while let Some(fault) = self
            .engine
            .faults
            .take_for_stream(self.delivered, &self.taken)
        {
            self.taken.push(fault.kind);
            match fault.kind {
                FaultKind::Reset => return Seen::Broken(Piece::Reset),
                FaultKind::Garbage => return Seen::Broken(Piece::Garbage),
                FaultKind::Truncate => return Seen::Broken(Piece::Truncate),
                FaultKind::InBandError => return Seen::Dead,
                FaultKind::Stall if fault.for_ms == 0 => std::future::pending().await,
                FaultKind::Stall => tokio::time::sleep(fault.duration()).await,
                FaultKind::Slow => self.delay += fault.duration(),
                FaultKind::Die => {
                    self.engine.die();
                    std::future::pending().await
                }
                FaultKind::Freeze => self.engine.freeze(fault),
                FaultKind::CoreDies => self.engine.core_dies(fault),
                FaultKind::LoseEvents
                | FaultKind::Refuse
                | FaultKind::WrongAnswer
                | FaultKind::Http500 => {
                    self.engine.fault(fault);
                }
            }
        }
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        match self.generation.next().await {
            Some(output) => {
                self.delivered += 1;
                Seen::Token(output)
            }
            None => Seen::End,
        }
    }

    /// Gathers all tokens, for an answer in one piece.
    pub(crate) async fn collect(&mut self, choices: usize) -> Result<Vec<Vec<Output>>, Response> {
        let mut all: Vec<Vec<Output>> = (0..choices).map(|_| Vec::new()).collect();
        let mut open = choices;
        while open > 0 {
            match self.next().await {
                Seen::Token(output) => {
                    open -= usize::from(output.finish.is_some());
                    all[output.index].push(output);
                }
                Seen::Broken(how) => return Err(Response::broken(how)),
                Seen::Dead | Seen::End if self.is_curt() => {
                    return Err(Response::broken(Piece::Truncate));
                }
                Seen::End if self.is_mute() => std::future::pending().await,
                Seen::Dead if self.is_mute() => {
                    return Err(sglang::refusal(ApiError::engine_dead()));
                }
                Seen::Dead | Seen::End => return Err(ApiError::engine_dead().into()),
            }
        }
        Ok(all)
    }

    /// SGLang's server does not notice that its scheduler died, until it ends itself.
    fn is_mute(&self) -> bool {
        self.engine.config.profile == Profile::Sglang
    }

    /// TensorRT-LLM has no words for its end.
    fn is_curt(&self) -> bool {
        self.engine.config.profile == Profile::Trtllm
    }

    /// Makes a stream of events: `writer` turns tokens into events.
    pub(crate) fn into_stream(
        self,
        mut writer: impl Writer + 'static,
    ) -> impl Stream<Item = Piece> + Send + 'static {
        let mut ready = VecDeque::new();
        writer.begin(&mut ready);
        let state = Streaming {
            feed: self,
            writer,
            ready,
            ended: false,
        };
        stream::unfold(state, |mut state| async move {
            while state.ready.is_empty() && !state.ended {
                state.advance().await;
            }
            state.ready.pop_front().map(|piece| (piece, state))
        })
    }
}

/// An endpoint's way to write a stream.
pub(crate) trait Writer: Send {
    /// Events that wait for no token.
    fn begin(&mut self, _events: &mut Events) {}
    /// Events for one more token; true when it was the last of all choices.
    fn token(&mut self, output: Output, events: &mut Events) -> bool;
    /// Events behind the last token.
    fn end(&mut self, events: &mut Events);
}

/// Events ready to be sent.
pub(crate) type Events = VecDeque<Piece>;

struct Streaming<W> {
    feed: Feed,
    writer: W,
    ready: Events,
    ended: bool,
}

impl<W: Writer> Streaming<W> {
    async fn advance(&mut self) {
        match self.feed.next().await {
            Seen::Token(output) => {
                if self.writer.token(output, &mut self.ready) {
                    self.writer.end(&mut self.ready);
                    self.ended = true;
                }
            }
            Seen::Broken(how) => {
                self.ready.push_back(how);
                self.ended = true;
            }
            Seen::Dead | Seen::End if self.feed.is_curt() => {
                self.ready.push_back(Piece::Truncate);
                self.ended = true;
            }
            Seen::End if self.feed.is_mute() => std::future::pending().await,
            Seen::Dead if self.feed.is_mute() => {
                let last = sglang::error_events(&ApiError::engine_dead());
                self.ready.extend(last.map(Piece::Data));
                self.ended = true;
            }
            Seen::Dead | Seen::End => {
                self.ready.push_back(Piece::Data(DEAD.to_owned()));
                self.ready.push_back(Piece::Data(DONE.to_owned()));
                self.ended = true;
            }
        }
    }
}
