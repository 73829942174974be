//! Local replies: one function turns an [`Error`] into a response in the protocol of whoever asked.

use crate::{
    body::{BodyError, ResponseBody, empty, full},
    error::{Error, Flag},
    matching::is_grpc,
    sse::Farewell,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use serde_json::json;

/// Whose error format a reply takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shape {
    /// Envoy's plain text.
    #[default]
    Envoy,
    /// `{"error":{"message","type","param","code"}}`.
    OpenAi,
    /// `{"type":"error","error":{"type","message"}}`.
    Anthropic,
    /// Trailers-only `grpc-status`.
    Grpc,
}

impl Shape {
    /// The shape for a request. `openai` says whether the route has the `openai` filter.
    #[must_use]
    pub fn of(path: &str, headers: &HeaderMap, openai: bool) -> Self {
        let grpc = is_grpc(headers);
        match (grpc, openai) {
            (true, _) => Self::Grpc,
            (false, false) => Self::Envoy,
            (false, true) if path.starts_with("/v1/messages") => Self::Anthropic,
            (false, true) => Self::OpenAi,
        }
    }

    /// How a stream that broke is ended in this shape.
    #[must_use]
    pub fn farewell(self) -> Farewell {
        match self {
            Self::OpenAi => Farewell::OpenAi,
            Self::Anthropic => Farewell::Anthropic,
            Self::Envoy | Self::Grpc => Farewell::Abort,
        }
    }
}

/// Header that carries Envoy's response flag of a local reply.
pub const ERROR_HEADER: &str = "x-outrigger-error";

/// Envoy's word for a circuit breaker's refusal.
const OVERLOADED_HEADER: HeaderName = HeaderName::from_static("x-envoy-overloaded");

/// The response to an error.
#[must_use]
pub fn respond(error: &Error, shape: Shape) -> Response<ResponseBody> {
    let mut response = match shape {
        Shape::Envoy => plain(error),
        Shape::OpenAi => json_reply(error.status, &openai_error(error)),
        Shape::Anthropic => json_reply(error.status, &anthropic_error(error)),
        Shape::Grpc => grpc(error),
    };
    let headers = response.headers_mut();
    headers.insert(ERROR_HEADER, HeaderValue::from_static(error.flag.as_str()));
    if error.flag == Flag::UpstreamOverflow {
        headers.insert(OVERLOADED_HEADER, HeaderValue::from_static("true"));
    }
    if let Some(after) = error.retry_after {
        headers.insert(
            header::RETRY_AFTER,
            HeaderValue::from(after.as_secs().max(1)),
        );
    }
    error.edits.apply(error.status, response.headers_mut());
    response
}

/// Gives a local reply another text, in its shape; the content type stays.
pub fn set_body(response: &mut Response<ResponseBody>, shape: Shape, text: String) {
    let headers = response.headers_mut();
    if shape == Shape::Grpc {
        // As in Envoy, without the end of a line of JSON.
        set_grpc_message(headers, text.trim_end());
    } else if text.is_empty() {
        headers.remove(header::CONTENT_TYPE);
        *response.body_mut() = empty();
    } else {
        *response.body_mut() = full(text);
    }
}

/// A direct response of a route, shaped like an error if it is one and the route speaks OpenAI.
#[must_use]
pub fn direct(status: StatusCode, body: &str, shape: Shape) -> Response<ResponseBody> {
    let is_error = status.is_client_error() || status.is_server_error();
    match shape {
        Shape::OpenAi | Shape::Anthropic if is_error => {
            let kind = openai_type(status);
            let value = match shape {
                Shape::Anthropic => {
                    json!({"type": "error", "error": {"type": anthropic_type(status), "message": body}})
                }
                _ => {
                    json!({"error": {"message": body, "type": kind, "param": null, "code": status.as_u16()}})
                }
            };
            json_reply(status, &value)
        }
        _ => {
            let mut response = Response::new(if body.is_empty() {
                empty()
            } else {
                full(body.to_owned())
            });
            *response.status_mut() = status;
            if !body.is_empty() {
                response
                    .headers_mut()
                    .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            }
            response
        }
    }
}

fn plain(error: &Error) -> Response<ResponseBody> {
    let body = if error.message.is_empty() {
        empty()
    } else {
        full(error.message.to_string())
    };
    let mut response = Response::new(body);
    *response.status_mut() = error.status;
    if !error.message.is_empty() {
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    }
    response
}

fn json_reply(status: StatusCode, value: &serde_json::Value) -> Response<ResponseBody> {
    let mut response = Response::new(full(value.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

fn openai_error(error: &Error) -> serde_json::Value {
    json!({"error": {
        "message": error.message,
        "type": openai_type(error.status),
        "param": null,
        "code": error.status.as_u16(),
    }})
}

fn anthropic_error(error: &Error) -> serde_json::Value {
    json!({"type": "error", "error": {"type": anthropic_type(error.status), "message": error.message}})
}

/// vLLM's names for the kinds of error.
fn openai_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        400 => "BadRequestError",
        401 => "AuthenticationError",
        403 => "PermissionDeniedError",
        404 => "NotFoundError",
        408 | 504 => "TimeoutError",
        413 => "RequestTooLargeError",
        429 => "RateLimitError",
        502 | 503 | 529 => "ServiceUnavailableError",
        code if code < 500 => "BadRequestError",
        _ => "InternalServerError",
    }
}

/// Anthropic's.
fn anthropic_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 | 529 => "overloaded_error",
        504 => "timeout_error",
        code if code < 500 => "invalid_request_error",
        _ => "api_error",
    }
}

/// gRPC's codes for HTTP statuses that we produce.
fn grpc(error: &Error) -> Response<ResponseBody> {
    let code = match error.status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    };
    let mut response = Response::new(empty());
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    headers.insert("grpc-status", HeaderValue::from(code));
    set_grpc_message(headers, &error.message);
    response
}

fn set_grpc_message(headers: &mut HeaderMap, text: &str) {
    if let Ok(message) = HeaderValue::from_str(&percent_encode(text))
        && !text.is_empty()
    {
        headers.insert("grpc-message", message);
    }
}

/// gRPC's percent-encoding of status messages (printable ASCII but `%` stays).
fn percent_encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if matches!(byte, 0x20..=0x7e) && byte != b'%' {
            out.push(byte as char);
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// The last words of a stream that broke after its status was sent; none where truncation must show.
#[must_use]
pub fn farewell_event(farewell: Farewell, error: &BodyError) -> Option<Bytes> {
    match farewell {
        Farewell::Abort => None,
        Farewell::OpenAi => {
            let value = json!({"error": {
                "message": error.message, "type": "InternalServerError", "param": error.flag.as_str(), "code": 500,
            }});
            Some(format!("data: {value}\n\ndata: [DONE]\n\n").into())
        }
        Farewell::Anthropic => {
            let value =
                json!({"type": "error", "error": {"type": "api_error", "message": error.message}});
            Some(format!("event: error\ndata: {value}\n\n").into())
        }
    }
}
