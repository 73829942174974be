//! A request as it came, and the requests that are made of it: other bodies and ids, the same otherwise.

use crate::body::RequestBody;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, header};

const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// A body, whole, in two pieces.
pub(super) type Pieces = (Bytes, Bytes);

/// A request as it came: what both legs are made of.
#[derive(Clone)]
pub(super) struct Head {
    pub(super) method: Method,
    pub(super) uri: Uri,
    pub(super) version: Version,
    pub(super) headers: HeaderMap,
    pub(super) body: Pieces,
}

impl Head {
    pub(super) fn of(request: &Request<RequestBody>) -> Self {
        Self {
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            headers: request.headers().clone(),
            body: request.body().parts().unwrap_or_default(),
        }
    }

    pub(super) fn is_chat(&self) -> bool {
        let path = self.uri.path().trim_end_matches('/');
        path.ends_with("/chat/completions")
    }

    /// The body, an object, with more members at its end. Its bytes are shared, but for the last piece if there are two.
    pub(super) fn extended(&self, members: &[&str]) -> Option<Pieces> {
        let (first, more) = &self.body;
        let last = if more.is_empty() { first } else { more };
        let brace = memchr::memrchr(b'}', last)?;
        if !last[brace + 1..].trim_ascii().is_empty() {
            return None;
        }
        let mut tail = Vec::new();
        if !more.is_empty() {
            tail.extend_from_slice(&more[..brace]);
        }
        tail.push(b',');
        members
            .iter()
            .for_each(|text| tail.extend_from_slice(text.as_bytes()));
        tail.push(b'}');
        let kept = if more.is_empty() { brace } else { first.len() };
        Some((first.slice(..kept), tail.into()))
    }

    /// The request with another body and id.
    pub(super) fn request(&self, body: RequestBody, id: &str) -> Request<RequestBody> {
        let length = http_body::Body::size_hint(&body).lower();
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = self.version;
        let headers = request.headers_mut();
        headers.clone_from(&self.headers);
        if headers.contains_key(header::CONTENT_LENGTH) {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        }
        put_id(headers, id);
        request
    }
}

/// Names a request, if it has a name.
pub(super) fn put_id(headers: &mut HeaderMap, id: &str) {
    if let Ok(id) = HeaderValue::from_str(id)
        && !id.is_empty()
    {
        headers.insert(REQUEST_ID_HEADER, id);
    }
}
