//! Judges a request's head: what no next hop could read differently from us goes on, everything else ends here.
//!
//! Statuses, texts and details are Envoy's. What is no head at all never comes here: see `codec::h1_refusal`.

use crate::{codec::h1_request::Odd, headers::Seen, snapshot::HttpConfig};
use http::{Method, StatusCode, Version, header, request::Parts};
use outrigger_filters::error::{Error, Flag, Origin};

/// Methods that Envoy knows beside those of `http::Method`.
const METHODS: [&str; 24] = [
    "ACL",
    "BIND",
    "CHECKOUT",
    "COPY",
    "LINK",
    "LOCK",
    "MERGE",
    "MKACTIVITY",
    "MKCALENDAR",
    "MKCOL",
    "MOVE",
    "NOTIFY",
    "PROPFIND",
    "PROPPATCH",
    "PURGE",
    "REBIND",
    "REPORT",
    "SEARCH",
    "SOURCE",
    "SUBSCRIBE",
    "UNBIND",
    "UNLINK",
    "UNLOCK",
    "UNSUBSCRIBE",
];

/// Whether the head may go on.
///
/// # Errors
/// The reply that refuses it.
pub(crate) fn check(parts: &Parts, seen: &Seen, config: &HttpConfig) -> Result<(), Error> {
    let odd = parts.extensions.get::<Odd>().copied().unwrap_or_default();
    if parts.version < Version::HTTP_11 {
        return Err(client_error(
            StatusCode::UPGRADE_REQUIRED,
            "low_version",
            "Upgrade Required",
        ));
    }
    framing(parts, seen, odd)?;
    if parts.version == Version::HTTP_11 {
        target(parts, odd)?;
        host(parts, seen)?;
    }
    if seen.hosts > 1 {
        return Err(bad("http1.multiple_hosts"));
    }
    if seen.bytes > config.manager.max_request_headers_kb as usize * 1024 {
        return Err(client_error(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "http1.headers_too_large",
            "Request Header Fields Too Large",
        ));
    }
    if parts.uri.path() == "*" {
        return Err(unflagged(StatusCode::NOT_FOUND, "absolute_path_rejected"));
    }
    Ok(())
}

/// Only what we decode ourselves may frame a message; anything else could end elsewhere for the next reader.
fn framing(parts: &Parts, seen: &Seen, odd: Odd) -> Result<(), Error> {
    if odd.two_lengths {
        return Err(bad("http1.codec_error"));
    }
    if !seen.transfer_encoding {
        return Ok(());
    }
    if odd.framed_twice || parts.headers.contains_key(header::CONTENT_LENGTH) {
        return Err(bad("http1.content_length_and_chunked_not_allowed"));
    }
    let codings = || parts.headers.get_all(header::TRANSFER_ENCODING).iter();
    if codings().count() > 1
        || codings().any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked"))
    {
        return Err(client_error(
            StatusCode::NOT_IMPLEMENTED,
            "http1.invalid_transfer_encoding",
            "Not Implemented",
        ));
    }
    Ok(())
}

fn target(parts: &Parts, odd: Odd) -> Result<(), Error> {
    let known = match parts.method {
        Method::GET | Method::POST => true,
        Method::PUT | Method::DELETE | Method::HEAD | Method::OPTIONS | Method::PATCH => true,
        Method::CONNECT | Method::TRACE => true,
        ref other => METHODS.contains(&other.as_str()),
    };
    let authority_form = parts.uri.scheme().is_none() && parts.uri.authority().is_some();
    if !known || authority_form && parts.method != Method::CONNECT {
        return Err(bad("http1.codec_error"));
    }
    if odd.fragment {
        return Err(unflagged(
            StatusCode::BAD_REQUEST,
            "path_normalization_failed",
        ));
    }
    Ok(())
}

fn host(parts: &Parts, seen: &Seen) -> Result<(), Error> {
    if seen.hosts == 0 && parts.uri.authority().is_none() {
        return Err(unflagged(StatusCode::BAD_REQUEST, "missing_host_header"));
    }
    let valid = |byte: &u8| byte.is_ascii_alphanumeric() || b"!$%&'()*+,-.:;=@[]_~".contains(byte);
    let hosts = parts.headers.get_all(header::HOST);
    if hosts.iter().any(|host| !host.as_bytes().iter().all(valid)) {
        return Err(bad("http.invalid_authority"));
    }
    Ok(())
}

/// Whether an HTTP/1 connection ends with this reply: nobody knows where the next request would begin.
pub(crate) fn ends_connection(error: &Error) -> bool {
    match error.flag {
        Flag::DownstreamProtocolError => true,
        Flag::StreamIdleTimeout => error.status == StatusCode::REQUEST_TIMEOUT,
        Flag::Unflagged => error.details != "absolute_path_rejected",
        _ => false,
    }
}

fn bad(details: &'static str) -> Error {
    client_error(StatusCode::BAD_REQUEST, details, "Bad Request")
}

/// The client broke the protocol.
pub(crate) fn client_error(
    status: StatusCode,
    details: &'static str,
    message: &'static str,
) -> Error {
    Error::new(
        Origin::Downstream,
        Flag::DownstreamProtocolError,
        status,
        details,
        message,
    )
}

/// A refusal that Envoy makes without flag and without text.
pub(crate) fn unflagged(status: StatusCode, details: &'static str) -> Error {
    Error::new(Origin::Downstream, Flag::Unflagged, status, details, "")
}
