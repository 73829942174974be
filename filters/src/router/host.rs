//! The host of a request: where it stands, and how it is replaced.

use crate::{body::RequestBody, matching::authority};
use http::{HeaderName, HeaderValue, Request, Uri, header};

const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const ORIGINAL_HOST: HeaderName = HeaderName::from_static("x-envoy-original-host");

/// Puts another host in place of the request's. A name that cannot be a host changes nothing.
pub fn replace(
    request: &mut Request<RequestBody>,
    host: &str,
    append_forwarded: bool,
    tell_original: bool,
) {
    let Ok(value) = HeaderValue::from_str(host) else {
        return;
    };
    let original = authority(request.uri(), request.headers()).to_owned();
    if let Ok(original) = HeaderValue::from_str(&original) {
        if append_forwarded && !original.is_empty() {
            append(request, &original);
        }
        if tell_original {
            request.headers_mut().insert(ORIGINAL_HOST, original);
        }
    }
    if request.uri().authority().is_some() {
        let mut parts = request.uri().clone().into_parts();
        parts.authority = host.parse().ok();
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request.headers_mut().insert(header::HOST, value);
}

/// Not twice: a retry does not add what was added before.
fn append(request: &mut Request<RequestBody>, host: &HeaderValue) {
    let known = request.headers().get(FORWARDED_HOST);
    let value = match known.and_then(|known| known.to_str().ok()) {
        Some(known) if !known.is_empty() => {
            let host = host.to_str().unwrap_or_default();
            if known.rsplit(',').next().map(str::trim) == Some(host) {
                return;
            }
            HeaderValue::from_str(&format!("{known},{host}")).ok()
        }
        _ => Some(host.clone()),
    };
    if let Some(value) = value {
        request.headers_mut().insert(FORWARDED_HOST, value);
    }
}
