//! What hyper says of a failed HTTP/2 exchange, in Envoy's flags and reset reasons.

use outrigger_filters::{
    body::BodyError,
    error::{Error, Flag, Retry},
};

/// How hyper's error before a response maps to Envoy's flag, its reset reason, and what a retry may do.
pub(super) fn classify(error: &hyper::Error) -> Error {
    if error.is_canceled() || error.is_closed() {
        // The dispatcher had not begun to write it.
        return Error::upstream_reset(
            Flag::UpstreamConnectionFailure,
            "connection termination",
            Retry::NothingSent,
        );
    }
    if error.is_parse() {
        return Error::upstream_reset(
            Flag::UpstreamProtocolError,
            "protocol error",
            Retry::NothingReceived,
        );
    }
    if let Some(error) = caused_by_client(error) {
        return error;
    }
    if stream_refused(error) {
        let mut refused = Error::upstream_reset(
            Flag::UpstreamRemoteReset,
            "remote refused stream reset",
            Retry::NothingReceived,
        );
        refused.refused = true;
        return refused;
    }
    if error.is_incomplete_message() || error.is_body_write_aborted() || was_cut(error) {
        return Error::upstream_reset(
            Flag::UpstreamConnectionTermination,
            "connection termination",
            Retry::NothingReceived,
        );
    }
    Error::upstream_reset(
        Flag::UpstreamRemoteReset,
        "remote reset",
        Retry::NothingReceived,
    )
}

/// `REFUSED_STREAM`: the upstream did nothing with the request (RFC 9113, 8.7).
fn stream_refused(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<h2::Error>() {
            return error.is_remote() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        }
        source = cause.source();
    }
    false
}

/// What of a system error is behind it.
fn io_kind(error: &hyper::Error) -> Option<std::io::ErrorKind> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return Some(io.kind());
        }
        source = cause.source();
    }
    None
}

/// The connection was cut by its peer's system.
fn was_cut(error: &hyper::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(
        io_kind(error),
        Some(ConnectionReset | BrokenPipe | ConnectionAborted)
    )
}

/// The request body failed, not the upstream: the client's fault.
fn caused_by_client(error: &hyper::Error) -> Option<Error> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(body) = cause.downcast_ref::<BodyError>() {
            return match body.flag {
                Flag::DownstreamConnectionTermination => {
                    Some(Error::downstream_gone("the request body ended early"))
                }
                Flag::DownstreamProtocolError => Some(Error::downstream_garbage()),
                _ => None,
            };
        }
        source = cause.source();
    }
    None
}

/// How hyper's error in the middle of a body maps to Envoy's flag.
pub(super) fn classify_body(error: &hyper::Error) -> BodyError {
    use std::io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    let broke_framing = matches!(
        io_kind(error),
        Some(UnexpectedEof | InvalidData | InvalidInput)
    );
    let flag = if error.is_parse() || error.is_user() || broke_framing {
        Flag::UpstreamProtocolError
    } else if error.is_incomplete_message() || was_cut(error) {
        Flag::UpstreamConnectionTermination
    } else {
        Flag::UpstreamRemoteReset
    };
    BodyError::new(
        flag,
        format_args!("the engine's response broke off: {error}"),
    )
}
