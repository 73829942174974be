//! One question to one engine, on a connection of its own: a generation of one token, or the golden prompt.

use crate::upstream::connect;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use outrigger_filters::{endpoints::Secured, sse::is_of_the_moment};
use outrigger_xds::{
    report::{EngineKind, EngineState, Model, Role},
    resource::{
        canary::Golden,
        cluster::{ConnectionOptions, UpstreamProtocol},
        endpoint::Address,
    },
};
use serde_json::{Value, json};
use std::sync::Arc;

/// Of an answer.
const ANSWER_BYTES_MAX: usize = 65_536;
/// What the engine's log can tell probes by.
const USER_AGENT: &str = "outrigger-canary";
/// Begins the ids of probes.
const REQUEST_ID_PREFIX: &str = "outrigger-canary-";
/// Behind everything else, in vLLM's words (there lower is first) and, negative, in SGLang's.
const PRIORITY_LAST: i64 = 1_000_000;
/// What is generated from.
const PROMPT: &str = ".";

/// What came of a question.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Asked {
    /// The answer.
    Well(Value),
    /// It does not do this for us: that says nothing about its health.
    Refused(String),
    /// Not now.
    Busy(String),
    /// It failed.
    Failed(String),
    /// It failed at a question that it never answered: whether that is its fault nobody knows.
    Unproven(String),
}

/// Which question an engine understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Completion,
    Embedding,
    /// The engine's own probe: SGLang's prefill and decode engines want a partner for everything else.
    Own,
}

/// Asks one engine.
pub(crate) struct Prober {
    address: Address,
    connection: Arc<ConnectionOptions>,
    tls: Option<Secured>,
    /// For engines that want a key.
    bearer: Option<HeaderValue>,
    form: Form,
    /// Whether this process answered one of that form.
    is_proven: bool,
    /// Whether it takes a priority: some refuse one where they do not schedule by it.
    takes_priority: bool,
}

impl Prober {
    pub(crate) fn new(
        address: Address,
        connection: Arc<ConnectionOptions>,
        tls: Option<Secured>,
    ) -> Self {
        Self {
            address,
            connection,
            tls,
            bearer: None,
            form: Form::Completion,
            is_proven: false,
            takes_priority: true,
        }
    }

    /// Another process, perhaps with other settings.
    pub(super) fn restart(&mut self) {
        (self.is_proven, self.takes_priority) = (false, true);
    }

    /// With a key.
    pub(super) fn authorized(mut self, bearer: Option<HeaderValue>) -> Self {
        self.bearer = bearer;
        self
    }

    /// The first model that a server serves of which nobody tells us.
    pub(crate) async fn model(&self) -> Option<Model> {
        let (_, body) = self.exchange(Method::GET, "/v1/models", None).await.ok()?;
        let listed: Value = serde_json::from_slice(&body).ok()?;
        Some(Model {
            id: listed["data"][0]["id"].as_str()?.to_owned(),
            ..Model::default()
        })
    }

    /// The least that shows that it works.
    pub(crate) async fn ask(&mut self, state: &EngineState) -> Asked {
        let form = self.form(state);
        let is_own = form == Form::Own;
        let asked = self.ask_as(form, state).await;
        self.is_proven |= matches!(asked, Asked::Well(_));
        let is_doubtful = match &asked {
            Asked::Refused(_) => true,
            Asked::Unproven(_) => !self.is_proven,
            _ => false,
        };
        if is_doubtful && !is_own {
            return self.ask_otherwise(asked, state).await;
        }
        match asked {
            Asked::Unproven(why) if self.is_proven => Asked::Failed(why),
            asked => asked,
        }
    }

    fn form(&self, state: &EngineState) -> Form {
        if state.kind == EngineKind::Sglang && state.role != Role::Both {
            return Form::Own;
        }
        self.form
    }

    /// It may serve another kind of model.
    async fn ask_otherwise(&mut self, first: Asked, state: &EngineState) -> Asked {
        let other = match self.form {
            Form::Embedding => Form::Completion,
            Form::Completion | Form::Own => Form::Embedding,
        };
        let second = self.ask_as(other, state).await;
        if !matches!(second, Asked::Well(_)) {
            return first;
        }
        (self.is_proven, self.form) = (true, other);
        second
    }

    async fn ask_as(&mut self, form: Form, state: &EngineState) -> Asked {
        let Some(model) = state.models.first() else {
            return Asked::Refused("it names no model".into());
        };
        let (path, body) = match form {
            Form::Own => return self.ask_itself().await,
            Form::Completion => {
                let body =
                    json!({"model": model.id, "prompt": PROMPT, "max_tokens": 1, "temperature": 0});
                ("/v1/completions", body)
            }
            Form::Embedding => {
                let body = json!({"model": model.id, "input": PROMPT});
                ("/v1/embeddings", body)
            }
        };
        self.post(path, body, state.kind).await
    }

    async fn ask_itself(&self) -> Asked {
        match self.exchange(Method::GET, "/health_generate", None).await {
            Ok((status, _)) if status == StatusCode::OK => Asked::Well(Value::Null),
            Ok((status, body)) => judge_status(status, &body),
            Err(error) => Asked::Failed(error),
        }
    }

    /// The golden prompt, under a cache salt that no request has: the answer is computed, not remembered.
    pub(super) async fn ask_golden(&mut self, state: &EngineState, golden: &Golden) -> Asked {
        let Some(model) = state.models.first() else {
            return Asked::Refused("it names no model".into());
        };
        // A half of a pair would keep it waiting for its partner.
        if self.form(state) != Form::Completion {
            return Asked::Refused("it completes nothing alone".into());
        }
        let mut body = json!({
            "model": model.id,
            "prompt": golden.prompt,
            "max_tokens": golden.max_tokens,
            "temperature": 0,
            "logprobs": 2,
        });
        if state.kind != EngineKind::TrtLlm {
            body["cache_salt"] = format!("outrigger-{:016x}", rand::random::<u64>()).into();
        }
        self.post("/v1/completions", body, state.kind).await
    }

    async fn post(&mut self, path: &str, body: Value, kind: EngineKind) -> Asked {
        let priority = match kind {
            EngineKind::Vllm => Some(PRIORITY_LAST),
            EngineKind::Sglang => Some(-PRIORITY_LAST),
            // It refuses what it does not know.
            EngineKind::TrtLlm | EngineKind::Unknown => None,
        };
        let Some(priority) = priority.filter(|_| self.takes_priority) else {
            return self.post_as(path, &body).await;
        };
        let mut last = body.clone();
        last["priority"] = priority.into();
        let (status, asked) = self.try_post(path, &last).await;
        // SGLang may also say so by 503.
        let is_unavailable = status == Some(StatusCode::SERVICE_UNAVAILABLE);
        if !is_unavailable && !matches!(asked, Asked::Refused(_)) {
            return asked;
        }
        let without = self.post_as(path, &body).await;
        self.takes_priority = !matches!(without, Asked::Well(_));
        without
    }

    async fn post_as(&self, path: &str, body: &Value) -> Asked {
        self.try_post(path, body).await.1
    }

    async fn try_post(&self, path: &str, body: &Value) -> (Option<StatusCode>, Asked) {
        let body = Some(Bytes::from(body.to_string()));
        match self.exchange(Method::POST, path, body).await {
            Ok((status, body)) if status == StatusCode::OK => (Some(status), judge_body(&body)),
            Ok((status, body)) => (Some(status), judge_status(status, &body)),
            Err(error) => (None, Asked::Failed(error)),
        }
    }

    /// Status and body; dropping it closes the connection, and the engine gives up.
    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<(StatusCode, Bytes), String> {
        let protocol = Some(UpstreamProtocol::Http1);
        let socket = connect::open(&self.address, self.tls.as_ref(), protocol, &self.connection)
            .await
            .map_err(|error| format!("cannot connect: {error}"))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(socket))
            .await
            .map_err(|error| error.to_string())?;
        let request = self.request(method, path, body)?;
        let exchange = async {
            let answer = sender.send_request(request).await;
            let (head, body) = answer.map_err(|error| error.to_string())?.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|error| format!("the answer broke: {error}"))?;
            Ok((head.status, body.to_bytes()))
        };
        // In one task with the connection, so that both end together.
        let mut connection = std::pin::pin!(connection);
        let mut exchange = std::pin::pin!(exchange);
        tokio::select! {
            biased;
            answer = &mut exchange => answer,
            ended = &mut connection => match ended {
                // What it had read is still to be taken.
                Ok(()) => exchange.await,
                Err(error) => Err(error.to_string()),
            },
        }
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<Request<Full<Bytes>>, String> {
        let id = format!("{REQUEST_ID_PREFIX}{:016x}", rand::random::<u64>());
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, self.address.to_string())
            .header(header::USER_AGENT, USER_AGENT)
            .header("x-request-id", id);
        if let Some(bearer) = &self.bearer {
            request = request.header(header::AUTHORIZATION, bearer);
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = Full::new(body.unwrap_or_default());
        request.body(body).map_err(|error| error.to_string())
    }
}

/// Whether a 200 brought what was asked for.
fn judge_body(body: &[u8]) -> Asked {
    let Ok(body) = serde_json::from_slice::<Value>(body) else {
        return Asked::Failed("answered 200 and no JSON".into());
    };
    let has = |name: &str| body[name].as_array().is_some_and(|list| !list.is_empty());
    if has("choices") || has("data") {
        return Asked::Well(body);
    }
    Asked::Failed(format!("answered 200 and {}", shorten(&body.to_string())))
}

fn judge_status(status: StatusCode, body: &[u8]) -> Asked {
    let text = || {
        format!(
            "answered {status}: {}",
            shorten(&String::from_utf8_lossy(body))
        )
    };
    match status.as_u16() {
        503 => Asked::Busy(text()),
        501 | 505 => Asked::Refused(text()),
        code if is_of_the_moment(code.into()) => Asked::Busy(text()),
        500.. => Asked::Unproven(text()),
        _ => Asked::Refused(text()),
    }
}

/// Little enough for a line of a log.
fn shorten(text: &str) -> String {
    text.chars().take(120).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_answer_means() {
        assert!(matches!(judge_body(br#"{"choices":[{}]}"#), Asked::Well(_)));
        assert!(matches!(judge_body(br#"{"data":[{}]}"#), Asked::Well(_)));
        for body in [r#"{"error":{"code":500}}"#, "{\"choices\":[]}", "<html>"] {
            assert!(
                matches!(judge_body(body.as_bytes()), Asked::Failed(_)),
                "{body}"
            );
        }
        for (status, expected) in [
            (400, "Refused"),
            (401, "Refused"),
            (404, "Refused"),
            (501, "Refused"),
            (429, "Busy"),
            (503, "Busy"),
            (500, "Unproven"),
            (502, "Unproven"),
        ] {
            let asked = judge_status(StatusCode::from_u16(status).unwrap(), b"x");
            assert!(
                format!("{asked:?}").starts_with(expected),
                "{status}: {asked:?}"
            );
        }
    }

    #[tokio::test]
    async fn half_of_a_pair_is_not_asked_to_complete_anything() {
        let endpoint = outrigger_filters::endpoints::Endpoint::default();
        let mut prober = Prober::new(endpoint.address.clone(), endpoint.connection.clone(), None);
        let state = EngineState {
            kind: EngineKind::Sglang,
            role: Role::Prefill,
            models: vec![Model::default()],
            ..EngineState::default()
        };
        let asked = prober.ask_golden(&state, &Golden::default()).await;
        assert!(matches!(asked, Asked::Refused(_)), "{asked:?}");
    }
}
