//! `LocalReplyConfig` of a connection manager: what its own answers look like.

use super::{
    access_log::{AccessLogFormat, format_string, wire_format},
    header_mutation::HeaderToAdd,
    log_filter::LogFilter,
    tls,
};
use crate::{
    problems::ConfigErrors,
    wire::envoy::{
        config::core::v3 as core, extensions::filters::network::http_connection_manager::v3 as hcm,
    },
};
use core::data_source::Specifier;
use http::StatusCode;

/// All of it; nothing is changed by default.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LocalReplyConfig {
    /// The first that fits counts.
    pub mappers: Vec<ResponseMapper>,
    /// Of all bodies, unless a mapper has its own.
    pub body_format: Option<BodyFormat>,
}

/// Changes to some answers.
#[derive(Debug, Clone, PartialEq)]
pub struct ResponseMapper {
    /// To which.
    pub filter: LogFilter,
    /// Instead of theirs.
    pub status: Option<StatusCode>,
    /// Instead of theirs.
    pub body: Option<String>,
    /// Of the body.
    pub body_format: Option<BodyFormat>,
    /// To be added.
    pub headers_to_add: Vec<HeaderToAdd>,
}

/// `SubstitutionFormatString` of a body.
#[derive(Debug, Clone, PartialEq)]
pub struct BodyFormat {
    /// Text or JSON.
    pub format: AccessLogFormat,
    /// As given, or that of the format.
    pub content_type: String,
}

impl LocalReplyConfig {
    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mappers.is_empty() && self.body_format.is_none()
    }
}

impl TryFrom<hcm::LocalReplyConfig> for LocalReplyConfig {
    type Error = ConfigErrors;

    fn try_from(wire: hcm::LocalReplyConfig) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let mappers = problems.take_all("mappers", wire.mappers);
        let body_format = wire
            .body_format
            .and_then(|format| problems.take("body_format", BodyFormat::try_from(format)));
        problems.finish(Some(Self {
            mappers,
            body_format,
        }))
    }
}

impl TryFrom<hcm::ResponseMapper> for ResponseMapper {
    type Error = ConfigErrors;

    fn try_from(wire: hcm::ResponseMapper) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let filter = problems.required("filter", wire.filter);
        let status = wire.status_code.and_then(|code| {
            let status = u16::try_from(code)
                .ok()
                .filter(|code| (200..600).contains(code));
            let status = status.and_then(|code| StatusCode::from_u16(code).ok());
            if status.is_none() {
                problems.add("status_code", format!("must be 200 to 599, is {code}"));
            }
            status
        });
        let body = wire
            .body
            .and_then(|body| problems.take("body", inline(body)));
        let body_format = wire
            .body_format_override
            .and_then(|format| problems.take("body_format_override", BodyFormat::try_from(format)));
        let headers_to_add = problems.take_all("headers_to_add", wire.headers_to_add);
        problems.finish(filter.map(|filter| Self {
            filter,
            status,
            body,
            body_format,
            headers_to_add,
        }))
    }
}

fn inline(source: core::DataSource) -> Result<String, ConfigErrors> {
    match source.specifier {
        Some(Specifier::InlineString(text)) => Ok(text),
        Some(other) => Err(ConfigErrors::one("", tls::not_inline(&other))),
        None => Err(ConfigErrors::one("", "required: inline_string")),
    }
}

impl TryFrom<core::SubstitutionFormatString> for BodyFormat {
    type Error = ConfigErrors;

    fn try_from(mut wire: core::SubstitutionFormatString) -> Result<Self, ConfigErrors> {
        let given = std::mem::take(&mut wire.content_type);
        if http::HeaderValue::from_str(&given).is_err() {
            return Err(ConfigErrors::one("content_type", "no header value"));
        }
        let format = format_string(wire)?;
        let own = match format {
            AccessLogFormat::Text(_) => "text/plain",
            AccessLogFormat::Json(_) => "application/json",
        };
        Ok(Self {
            content_type: if given.is_empty() { own.into() } else { given },
            format,
        })
    }
}

impl From<&LocalReplyConfig> for hcm::LocalReplyConfig {
    fn from(plain: &LocalReplyConfig) -> Self {
        Self {
            mappers: plain.mappers.iter().map(Into::into).collect(),
            body_format: plain.body_format.as_ref().and_then(BodyFormat::show),
        }
    }
}

impl From<&ResponseMapper> for hcm::ResponseMapper {
    fn from(plain: &ResponseMapper) -> Self {
        let text = |text: &String| core::DataSource {
            specifier: Some(Specifier::InlineString(text.clone())),
            watched_directory: None,
        };
        Self {
            filter: Some((&plain.filter).into()),
            status_code: plain.status.map(|status| status.as_u16().into()),
            body: plain.body.as_ref().map(text),
            body_format_override: plain.body_format.as_ref().and_then(BodyFormat::show),
            headers_to_add: plain.headers_to_add.iter().map(Into::into).collect(),
        }
    }
}

impl BodyFormat {
    fn show(&self) -> Option<core::SubstitutionFormatString> {
        let mut format = wire_format(&self.format)?;
        format.content_type.clone_from(&self.content_type);
        Some(format)
    }
}
