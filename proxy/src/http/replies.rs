//! Answers of our own: an error's, and what `local_reply_config` makes of it.

use super::{Manager, record::Record};
use crate::{
    access_log::{Answer, BodyTemplate, Captured, Filter, Formats},
    route::Level,
    snapshot::HttpConfig,
};
use http::{HeaderValue, Response, StatusCode, header};
use outrigger_filters::{
    body::ResponseBody,
    error::{Error, Flag, Retry},
    filter::LogFields,
    local_reply::{self, Shape},
    router::attempt,
    runtime::Runtime,
};
use outrigger_xds::resource::{
    header_mutation::Mutations,
    local_reply::{BodyFormat, LocalReplyConfig, ResponseMapper},
};

/// `LocalReplyConfig`, prepared.
pub(crate) struct LocalReplies {
    formats: Formats,
    mappers: Vec<Mapper>,
    body_format: Option<Body>,
}

struct Mapper {
    filter: Filter,
    status: Option<StatusCode>,
    body: Option<String>,
    body_format: Option<Body>,
    add: Option<Level>,
}

struct Body {
    template: BodyTemplate,
    content_type: HeaderValue,
}

/// What is to become of one answer.
pub(super) struct Verdict<'a> {
    replies: &'a LocalReplies,
    mapper: Option<&'a Mapper>,
    format: Option<&'a Body>,
}

impl LocalReplies {
    /// Prepares it; `None` if it changes nothing.
    ///
    /// # Errors
    /// A format is none, and where.
    pub(crate) fn new(
        config: &LocalReplyConfig,
        runtime: &Runtime,
    ) -> Result<Option<Self>, String> {
        if config.is_empty() {
            return Ok(None);
        }
        let mut formats = Formats::default();
        let mut mappers = Vec::new();
        for (index, mapper) in config.mappers.iter().enumerate() {
            let mapper = Mapper::new(mapper, &mut formats, runtime);
            let place = format!("local_reply_config.mappers[{index}]");
            mappers.push(mapper.map_err(|error| format!("{place}.{error}"))?);
        }
        let body_format = Body::new(config.body_format.as_ref(), "body_format", &mut formats)
            .map_err(|error| format!("local_reply_config.{error}"))?;
        Ok(Some(Self {
            formats,
            mappers,
            body_format,
        }))
    }

    /// What conditions and formats need of a request, before its head goes on.
    pub(super) fn capture(&self, request: &http::request::Parts) -> Captured {
        self.formats.capture_with_conditions(request)
    }

    /// The first mapper that fits decides, as in Envoy.
    pub(super) fn judge<'a>(
        &'a self,
        status: StatusCode,
        record: &Record,
        log: &LogFields,
    ) -> Verdict<'a> {
        let answer = Answer {
            code: status.as_u16(),
            duration: record.started.elapsed(),
            flags: &log.flags,
            captured: &record.replied,
        };
        let mut mappers = self.mappers.iter();
        let mapper = mappers.find(|mapper| mapper.filter.holds(&answer));
        let format = mapper.and_then(|mapper| mapper.body_format.as_ref());
        Verdict {
            replies: self,
            mapper,
            format: format.or(self.body_format.as_ref()),
        }
    }
}

impl Mapper {
    fn new(
        config: &ResponseMapper,
        formats: &mut Formats,
        runtime: &Runtime,
    ) -> Result<Self, String> {
        let add = Mutations {
            add: config.headers_to_add.clone(),
            remove: Vec::new(),
        };
        let format = config.body_format.as_ref();
        Ok(Self {
            filter: formats
                .condition(&config.filter, runtime)
                .map_err(|error| format!("filter: {error}"))?,
            status: config.status,
            body: config.body.clone(),
            body_format: Body::new(format, "body_format_override", formats)?,
            add: Level::new(&add, formats).map_err(|error| format!("headers_to_add: {error}"))?,
        })
    }
}

impl Body {
    fn new(
        config: Option<&BodyFormat>,
        place: &str,
        formats: &mut Formats,
    ) -> Result<Option<Self>, String> {
        let Some(config) = config else {
            return Ok(None);
        };
        Ok(Some(Self {
            template: formats.body(&config.format, place)?,
            content_type: HeaderValue::from_str(&config.content_type)
                .map_err(|_| format!("{place}.content_type: no header value"))?,
        }))
    }
}

impl Verdict<'_> {
    pub(super) fn status(&self) -> Option<StatusCode> {
        self.mapper?.status
    }

    pub(super) fn body(&self) -> Option<&str> {
        self.mapper?.body.as_deref()
    }

    /// The form of what is formatted here is nobody else's.
    pub(super) fn shape(&self, shape: Shape) -> Shape {
        match (shape, self.format) {
            (Shape::Grpc, _) | (_, None) => shape,
            _ => Shape::Envoy,
        }
    }

    /// Adds headers and formats the body, which is `text` so far.
    pub(super) fn finish(
        &self,
        response: &mut Response<ResponseBody>,
        (status, shape, text): (StatusCode, Shape, &str),
        record: &Record,
        log: &LogFields,
    ) {
        let mut entry = record.entry(log);
        // What is 200 for gRPC's sake is not called so.
        entry.code = status.as_u16();
        entry.local_reply_body = text;
        let formats = &self.replies.formats;
        let mut captured = record.replied.clone();
        let headers = response.headers_mut();
        let mut content_type = headers.remove(header::CONTENT_TYPE);
        if let Some(add) = self.mapper.and_then(|mapper| mapper.add.as_ref()) {
            formats.capture_response(headers, &mut captured);
            add.add(headers, |format| format.render(&entry, &captured));
        }
        let mut formatted = None;
        if let Some(format) = self.format {
            formats.capture_response(headers, &mut captured);
            formatted = Some(format.template.render(&entry, &captured));
            if shape != Shape::Grpc {
                content_type = Some(format.content_type.clone());
            }
        }
        if let Some(kind) = content_type
            && !headers.contains_key(header::CONTENT_TYPE)
        {
            headers.insert(header::CONTENT_TYPE, kind);
        }
        if let Some(body) = formatted {
            local_reply::set_body(response, shape, body);
        }
    }
}

impl Manager {
    /// The answer to an error.
    pub(super) fn local_reply(
        &self,
        mut error: Error,
        shape: Shape,
        record: &Record,
        log: &mut LogFields,
        config: &HttpConfig,
    ) -> Response<ResponseBody> {
        if error.flag != Flag::Unflagged {
            log.flags.push(error.flag);
        }
        log.details = error.details.to_string();
        tracing::debug!(%error, "local reply");
        match error.flag {
            Flag::NoRouteFound => self.stats.no_route.increment(1),
            Flag::NoClusterFound => self.stats.no_cluster.increment(1),
            _ => {}
        }
        let replies = config.local_replies.as_ref();
        let verdict = replies.map(|replies| replies.judge(error.status, record, log));
        let mut response = match verdict {
            None => local_reply::respond(&error, shape),
            Some(verdict) => {
                error.status = verdict.status().unwrap_or(error.status);
                if let Some(body) = verdict.body() {
                    error.message = body.to_owned().into();
                }
                let shape = verdict.shape(shape);
                let mut response = local_reply::respond(&error, shape);
                let said = (error.status, shape, &*error.message);
                verdict.finish(&mut response, said, record, log);
                response
            }
        };
        let retry = match error.retry {
            Retry::No => None,
            Retry::NothingSent => Some("nothing-sent"),
            Retry::NothingReceived => Some("nothing-received"),
        };
        if let Some(retry) = retry.filter(|_| config.inbound) {
            let headers = response.headers_mut();
            headers.insert(attempt::RETRY_HEADER, HeaderValue::from_static(retry));
        }
        response
    }

    /// What a route answered by itself, with this text.
    pub(super) fn mapped(
        mut response: Response<ResponseBody>,
        (shape, text): (Shape, &str),
        record: &Record,
        log: &LogFields,
        config: &HttpConfig,
    ) -> Response<ResponseBody> {
        let Some(replies) = &config.local_replies else {
            return response;
        };
        // What a route answers by itself is plain HTTP, whoever asks.
        let shape = match shape {
            Shape::Grpc => Shape::Envoy,
            shape => shape,
        };
        let verdict = replies.judge(response.status(), record, log);
        let status = verdict.status().unwrap_or(response.status());
        let (shape, text) = (verdict.shape(shape), verdict.body().unwrap_or(text));
        let mut fresh = local_reply::direct(status, text, shape);
        *response.status_mut() = status;
        let kind = fresh.headers_mut().remove(header::CONTENT_TYPE);
        match kind {
            Some(kind) => drop(response.headers_mut().insert(header::CONTENT_TYPE, kind)),
            None => drop(response.headers_mut().remove(header::CONTENT_TYPE)),
        }
        *response.body_mut() = fresh.into_body();
        verdict.finish(&mut response, (status, shape, text), record, log);
        response
    }
}
