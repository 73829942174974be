//! Answers `/v1/responses/ID`: what became of a response that was stored, told again as a stream, or cancelled; as vLLM
//! 0.32 does with `VLLM_ENABLE_RESPONSES_API_STORE=1`.
//!
//! Everything is in this engine's memory and never forgotten, as there.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures_util::{Stream, StreamExt, stream};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::api::ApiError;
use super::engine::Engine;
use super::http::{Piece, Request, Response};
use super::template::Message;

/// The last event of a response.
const COMPLETED: &str = "event: response.completed\n";

/// One response.
pub(crate) struct Stored {
    /// As it is told now.
    pub(crate) json: String,
    /// What a later response goes on from.
    pub(crate) conversation: Vec<Message>,
    /// While it runs in the background.
    pub(crate) running: Option<Running>,
    /// Its events, if it was created as a stream in the background.
    pub(crate) log: Option<watch::Receiver<Vec<String>>>,
}

/// What a cancellation needs.
pub(crate) struct Running {
    /// As it is told when it is cancelled.
    pub(crate) cancelled: String,
    pub(crate) task: AbortHandle,
}

/// All responses of an engine, by id.
#[derive(Default)]
pub(crate) struct Store(Mutex<HashMap<String, Stored>>);

impl Store {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Stored>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a response that `begin` starts; it cannot end before it is kept.
    pub(crate) fn begin<T>(&self, id: &str, begin: impl FnOnce() -> (Stored, T)) -> T {
        let mut all = self.lock();
        let (stored, begun) = begin();
        all.insert(id.to_owned(), stored);
        begun
    }

    /// Keeps what a response became, unless it was cancelled.
    pub(crate) fn finish(&self, id: &str, json: String, conversation: Vec<Message>) {
        let mut all = self.lock();
        match all.get_mut(id) {
            Some(stored) if stored.running.is_none() => {}
            Some(stored) => {
                stored.json = json;
                stored.conversation = conversation;
                stored.running = None;
            }
            None => {
                let stored = Stored {
                    json,
                    conversation,
                    running: None,
                    log: None,
                };
                all.insert(id.to_owned(), stored);
            }
        }
    }

    /// What a response with this one as its previous one goes on from.
    pub(crate) fn conversation(&self, id: &str) -> Result<Vec<Message>, ApiError> {
        let all = self.lock();
        let stored = all.get(id).ok_or_else(|| not_found(id))?;
        Ok(stored.conversation.clone())
    }

    fn cancel(&self, id: &str) -> Result<String, ApiError> {
        let mut all = self.lock();
        let stored = all.get_mut(id).ok_or_else(|| not_found(id))?;
        let Some(running) = stored.running.take() else {
            let message = "Cannot cancel a synchronous response.";
            return Err(refusal(400, message, "response_id"));
        };
        running.task.abort();
        stored.json = running.cancelled;
        Ok(stored.json.clone())
    }
}

/// A refusal in the words that vLLM has for responses.
pub(crate) fn refusal(status: u16, message: impl Into<String>, param: &str) -> ApiError {
    ApiError::new(status, "invalid_request_error", message, Some(param))
}

fn not_found(id: &str) -> ApiError {
    let message = format!("Response with id '{id}' not found.");
    refusal(404, message, "response_id")
}

/// Answers a request for `/v1/responses/ID` or `/v1/responses/ID/cancel`.
pub(crate) fn answer(engine: &Engine, request: &Request) -> Result<Response, Response> {
    let below = request.path.trim_start_matches("/v1/responses/");
    let (id, action) = below.split_once('/').unwrap_or((below, ""));
    let allow = match action {
        "" => "GET",
        "cancel" => "POST",
        _ => return Ok(Response::json(404, r#"{"detail":"Not Found"}"#.to_owned())),
    };
    if request.method != allow {
        let refusal = Response::json(405, r#"{"detail":"Method Not Allowed"}"#.to_owned());
        return Ok(Response {
            allow: Some(allow),
            ..refusal
        });
    }
    if action == "cancel" {
        return Ok(Response::json(200, engine.responses.cancel(id)?));
    }
    let all = engine.responses.lock();
    let stored = all.get(id).ok_or_else(|| not_found(id))?;
    if !flag(&request.query, "stream") {
        return Ok(Response::json(200, stored.json.clone()));
    }
    match &stored.log {
        Some(log) => Ok(Response::events(told_again(
            log.clone(),
            after(&request.query),
        ))),
        None => Err(ApiError::not_implemented("a stream of what was none").into()),
    }
}

fn flag(query: &str, name: &str) -> bool {
    query
        .split('&')
        .any(|pair| pair == format!("{name}=true") || pair == format!("{name}=1"))
}

/// The first event to be told.
fn after(query: &str) -> usize {
    let given = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("starting_after="));
    given
        .and_then(|number| number.parse::<usize>().ok())
        .map_or(0, |number| number + 1)
}

/// Events from the `first` on, as they are or come, to the last; for ever if that never comes, as vLLM waits.
pub(crate) fn told_again(
    log: watch::Receiver<Vec<String>>,
    first: usize,
) -> impl Stream<Item = Piece> + Send + 'static {
    stream::unfold(Some((log, first)), |state| async move {
        let (mut log, at) = state?;
        let event = loop {
            let event = log.borrow_and_update().get(at).cloned();
            match event {
                Some(event) => break event,
                None if log.changed().await.is_ok() => {}
                None => std::future::pending().await,
            }
        };
        let next = (!event.starts_with(COMPLETED)).then(|| (log, at + 1));
        Some((Piece::Data(event), next))
    })
}

/// Runs a stream in the background; its events are kept.
pub(crate) fn record(
    events: impl Stream<Item = Piece> + Send + 'static,
) -> (AbortHandle, watch::Receiver<Vec<String>>) {
    let (log, seen) = watch::channel(Vec::new());
    let task = tokio::spawn(async move {
        let mut events = std::pin::pin!(events);
        while let Some(Piece::Data(event)) = events.next().await {
            log.send_modify(|all| all.push(event));
        }
    });
    (task.abort_handle(), seen)
}
