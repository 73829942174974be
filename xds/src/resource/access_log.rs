//! `envoy.config.accesslog.v3.AccessLog`: where requests and connections are logged, and how a line looks.

use super::{log_filter::LogFilter, tls};
use crate::{
    problems::ConfigErrors,
    protobuf::{pack, struct_from_json, struct_to_json, unpack},
    wire::envoy::{
        config::{accesslog::v3 as log, core::v3 as core},
        extensions::access_loggers::{file::v3 as file, stream::v3 as stream},
    },
};
use prost_types::Any;
use serde_json::Value;
use std::collections::BTreeMap;

/// Where an access log goes and how it looks.
#[derive(Debug, Clone, PartialEq)]
pub struct AccessLog {
    /// What is logged; all if there is none.
    pub filter: Option<LogFilter>,
    /// Where.
    pub sink: AccessLogSink,
    /// How.
    pub format: AccessLogFormat,
}

/// Destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogSink {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A file, appended to.
    File(String),
}

/// Shape of a line.
#[derive(Debug, Clone, PartialEq)]
pub enum AccessLogFormat {
    /// Text with operators; `None` is Envoy's default line.
    Text(Option<String>),
    /// A JSON object: keys and operator strings (or nested objects of them).
    Json(BTreeMap<String, Value>),
}

/// Operators that only we have: an Envoy refuses a format with one of them.
const OPERATORS_OF_OURS: [&str; 10] = [
    "%MODEL",
    "%TTFT",
    "%ITL_P99",
    "%PROMPT_TOKENS",
    "%COMPLETION_TOKENS",
    "%PREFIX_HIT_TOKENS",
    "%PREFIX_HIT_TOKENS_CONFIRMED",
    "%MIGRATIONS",
    "%ROUTING_DECISION",
    "%DISAGGREGATION",
];

/// Whether a format has an operator that only we have.
#[must_use]
pub fn has_operators_of_ours(format: &str) -> bool {
    OPERATORS_OF_OURS.iter().any(|operator| {
        let mut found = format.match_indices(operator);
        // What goes on is another operator, `%MODEL_X%`.
        found.any(|(at, _)| format[at + operator.len()..].starts_with(['%', '(', ':']))
    })
}

/// The JSON format where nobody says another: of stand-alone proxies, and of what the control plane makes itself.
#[must_use]
pub fn default_json() -> BTreeMap<String, Value> {
    [
        ("start_time", "%START_TIME%"),
        ("method", "%REQ(:METHOD)%"),
        ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
        ("protocol", "%PROTOCOL%"),
        ("response_code", "%RESPONSE_CODE%"),
        ("response_flags", "%RESPONSE_FLAGS%"),
        ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
        ("bytes_received", "%BYTES_RECEIVED%"),
        ("bytes_sent", "%BYTES_SENT%"),
        ("duration", "%DURATION%"),
        ("upstream_host", "%UPSTREAM_HOST%"),
        ("upstream_cluster", "%UPSTREAM_CLUSTER%"),
        ("attempts", "%UPSTREAM_REQUEST_ATTEMPT_COUNT%"),
        ("request_id", "%REQ(X-REQUEST-ID)%"),
        ("model", "%MODEL%"),
        ("ttft_ms", "%TTFT%"),
        ("itl_p99_ms", "%ITL_P99%"),
        ("prompt_tokens", "%PROMPT_TOKENS%"),
        ("completion_tokens", "%COMPLETION_TOKENS%"),
        ("prefix_hit_tokens", "%PREFIX_HIT_TOKENS%"),
        (
            "prefix_hit_tokens_confirmed",
            "%PREFIX_HIT_TOKENS_CONFIRMED%",
        ),
        ("migrations", "%MIGRATIONS%"),
        ("routing_decision", "%ROUTING_DECISION%"),
        ("disaggregation", "%DISAGGREGATION%"),
        ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
        ("user_agent", "%REQ(USER-AGENT)%"),
        ("route", "%ROUTE_NAME%"),
    ]
    .into_iter()
    .map(|(key, operator)| (key.to_owned(), Value::from(operator)))
    .collect()
}

impl TryFrom<log::AccessLog> for AccessLog {
    type Error = ConfigErrors;

    fn try_from(wire: log::AccessLog) -> Result<Self, ConfigErrors> {
        let Some(log::access_log::ConfigType::TypedConfig(any)) = wire.config_type else {
            return Err(ConfigErrors::one("", "required: typed_config"));
        };
        let mut problems = ConfigErrors::default();
        let filter = wire
            .filter
            .and_then(|filter| problems.take("filter", LogFilter::try_from(filter)));
        let log = problems.take("typed_config", logger(&any));
        problems.finish(log.map(|log| Self { filter, ..log }))
    }
}

fn logger(any: &Any) -> Result<AccessLog, ConfigErrors> {
    use {
        file::file_access_log::AccessLogFormat::LogFormat as FileFormat,
        stream::stderr_access_log::AccessLogFormat::LogFormat as StderrFormat,
        stream::stdout_access_log::AccessLogFormat::LogFormat as StdoutFormat,
    };
    let (sink, format) = if let Some(file) = unpack::<file::FileAccessLog>(any)? {
        if file.path.is_empty() {
            return Err(ConfigErrors::one("path", "must not be empty"));
        }
        (
            AccessLogSink::File(file.path),
            file.access_log_format.map(|FileFormat(format)| format),
        )
    } else if let Some(stdout) = unpack::<stream::StdoutAccessLog>(any)? {
        (
            AccessLogSink::Stdout,
            stdout.access_log_format.map(|StdoutFormat(format)| format),
        )
    } else if let Some(stderr) = unpack::<stream::StderrAccessLog>(any)? {
        (
            AccessLogSink::Stderr,
            stderr.access_log_format.map(|StderrFormat(format)| format),
        )
    } else {
        return Err(ConfigErrors::one(
            "",
            format!("not supported yet: {} as an access log", any.type_url),
        ));
    };
    Ok(AccessLog {
        filter: None,
        sink,
        format: log_format(format)?,
    })
}

fn log_format(
    wire: Option<core::SubstitutionFormatString>,
) -> Result<AccessLogFormat, ConfigErrors> {
    let Some(wire) = wire else {
        return Ok(AccessLogFormat::Text(None));
    };
    let mut problems = ConfigErrors::default();
    let format = problems.take("log_format", format_string(wire));
    problems.finish(format)
}

/// A format that is given.
pub(super) fn format_string(
    wire: core::SubstitutionFormatString,
) -> Result<AccessLogFormat, ConfigErrors> {
    use core::{data_source::Specifier, substitution_format_string::Format};
    match wire.format {
        Some(Format::TextFormat(text)) => Ok(AccessLogFormat::Text(Some(text))),
        Some(Format::TextFormatSource(core::DataSource {
            specifier: Some(Specifier::InlineString(text)),
            ..
        })) => Ok(AccessLogFormat::Text(Some(text))),
        Some(Format::TextFormatSource(core::DataSource {
            specifier: Some(other),
            ..
        })) => Err(ConfigErrors::one(
            "text_format_source",
            tls::not_inline(&other),
        )),
        Some(Format::TextFormatSource(core::DataSource {
            specifier: None, ..
        })) => Err(ConfigErrors::one(
            "text_format_source",
            "required: inline_string",
        )),
        Some(Format::JsonFormat(fields)) => match struct_to_json(fields) {
            Value::Object(fields) => Ok(AccessLogFormat::Json(fields.into_iter().collect())),
            _ => Ok(AccessLogFormat::Json(BTreeMap::new())),
        },
        None => Err(ConfigErrors::one(
            "",
            "required: json_format or text_format_source",
        )),
    }
}

impl From<&AccessLog> for log::AccessLog {
    fn from(plain: &AccessLog) -> Self {
        use {
            file::file_access_log::AccessLogFormat::LogFormat as FileFormat,
            stream::stderr_access_log::AccessLogFormat::LogFormat as StderrFormat,
            stream::stdout_access_log::AccessLogFormat::LogFormat as StdoutFormat,
        };
        let format = wire_format(&plain.format);
        let (name, any) = match &plain.sink {
            AccessLogSink::File(path) => {
                let format = format.map(FileFormat);
                let file = file::FileAccessLog {
                    path: path.clone(),
                    access_log_format: format,
                };
                ("envoy.access_loggers.file", pack(&file))
            }
            AccessLogSink::Stdout => {
                let stdout = stream::StdoutAccessLog {
                    access_log_format: format.map(StdoutFormat),
                };
                ("envoy.access_loggers.stdout", pack(&stdout))
            }
            AccessLogSink::Stderr => {
                let stderr = stream::StderrAccessLog {
                    access_log_format: format.map(StderrFormat),
                };
                ("envoy.access_loggers.stderr", pack(&stderr))
            }
        };
        Self {
            name: name.into(),
            filter: plain.filter.as_ref().map(Into::into),
            config_type: Some(log::access_log::ConfigType::TypedConfig(any)),
        }
    }
}

pub(super) fn wire_format(plain: &AccessLogFormat) -> Option<core::SubstitutionFormatString> {
    use core::{data_source::Specifier, substitution_format_string::Format};
    let format = match plain {
        AccessLogFormat::Text(None) => return None,
        AccessLogFormat::Text(Some(text)) => Format::TextFormatSource(core::DataSource {
            specifier: Some(Specifier::InlineString(text.clone())),
            watched_directory: None,
        }),
        AccessLogFormat::Json(fields) => Format::JsonFormat(struct_from_json(Value::Object(
            fields.clone().into_iter().collect(),
        ))),
    };
    Some(core::SubstitutionFormatString {
        format: Some(format),
        content_type: String::new(),
    })
}
