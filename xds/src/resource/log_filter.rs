//! `envoy.config.accesslog.v3.AccessLogFilter`: conditions on requests that have an answer.

use super::matching::HeaderMatch;
use crate::{
    problems::ConfigErrors,
    wire::envoy::config::{accesslog::v3 as wire, core::v3::RuntimeUInt32},
};
use wire::{access_log_filter::FilterSpecifier, comparison_filter::Op};

/// Envoy's short codes of response flags.
const FLAGS: [&str; 29] = [
    "DC", "DF", "DI", "DO", "DPE", "DR", "DT", "FI", "IH", "LH", "LR", "NC", "NFCF", "NR", "OM",
    "RFCF", "RL", "RLSE", "SI", "UAEX", "UC", "UF", "UH", "UMSDR", "UO", "UPE", "UR", "URX", "UT",
];

/// What must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogFilter {
    /// Of the status.
    Status(Comparison),
    /// Of the time it took, in milliseconds.
    Duration(Comparison),
    /// Of a header of the request.
    Header(HeaderMatch),
    /// One of these flags is set; with none, any.
    Flags(Vec<String>),
    /// All of them.
    And(Vec<Self>),
    /// One of them.
    Or(Vec<Self>),
}

/// How a number compares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// How.
    pub how: How,
    /// To what.
    pub value: u32,
    /// Where the runtime keeps that.
    pub runtime_key: String,
}

/// `ComparisonFilter.Op`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum How {
    /// Equal.
    #[default]
    Equal,
    /// At least.
    AtLeast,
    /// At most.
    AtMost,
    /// Not equal.
    NotEqual,
}

impl How {
    /// Whether `number` compares so to `value`.
    #[must_use]
    pub fn holds(self, number: u64, value: u64) -> bool {
        match self {
            Self::Equal => number == value,
            Self::AtLeast => number >= value,
            Self::AtMost => number <= value,
            Self::NotEqual => number != value,
        }
    }
}

impl TryFrom<wire::AccessLogFilter> for LogFilter {
    type Error = ConfigErrors;

    fn try_from(wire: wire::AccessLogFilter) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let filter = match wire.filter_specifier {
            None => {
                problems.add("", "required: a filter");
                None
            }
            Some(FilterSpecifier::StatusCodeFilter(filter)) => {
                let place = "status_code_filter.comparison";
                let read: Option<Comparison> = problems.required(place, filter.comparison);
                read.map(Self::Status)
            }
            Some(FilterSpecifier::DurationFilter(filter)) => {
                let place = "duration_filter.comparison";
                let read: Option<Comparison> = problems.required(place, filter.comparison);
                read.map(Self::Duration)
            }
            Some(FilterSpecifier::HeaderFilter(filter)) => {
                let read = problems.required("header_filter.header", filter.header);
                read.map(Self::Header)
            }
            Some(FilterSpecifier::ResponseFlagFilter(filter)) => {
                for (index, flag) in filter.flags.iter().enumerate() {
                    if !FLAGS.contains(&flag.as_str()) {
                        let place = format!("response_flag_filter.flags[{index}]");
                        problems.add(place, format!("no such flag: '{flag}'"));
                    }
                }
                Some(Self::Flags(filter.flags))
            }
            Some(FilterSpecifier::AndFilter(filter)) => {
                several(&mut problems, "and_filter.filters", filter.filters).map(Self::And)
            }
            Some(FilterSpecifier::OrFilter(filter)) => {
                several(&mut problems, "or_filter.filters", filter.filters).map(Self::Or)
            }
        };
        problems.finish(filter)
    }
}

fn several(
    problems: &mut ConfigErrors,
    place: &str,
    filters: Vec<wire::AccessLogFilter>,
) -> Option<Vec<LogFilter>> {
    if filters.len() < 2 {
        problems.add(place, "must have at least two");
    }
    Some(problems.take_all(place, filters))
}

impl TryFrom<wire::ComparisonFilter> for Comparison {
    type Error = ConfigErrors;

    fn try_from(wire: wire::ComparisonFilter) -> Result<Self, ConfigErrors> {
        let how = match wire.op() {
            Op::Eq => How::Equal,
            Op::Ge => How::AtLeast,
            Op::Le => How::AtMost,
            Op::Ne => How::NotEqual,
        };
        let value = wire
            .value
            .ok_or_else(|| ConfigErrors::one("value", "required"))?;
        if value.runtime_key.is_empty() {
            return Err(ConfigErrors::one("value.runtime_key", "must not be empty"));
        }
        Ok(Self {
            how,
            value: value.default_value,
            runtime_key: value.runtime_key,
        })
    }
}

impl From<&LogFilter> for wire::AccessLogFilter {
    fn from(plain: &LogFilter) -> Self {
        let all = |filters: &[LogFilter]| filters.iter().map(Into::into).collect();
        let specifier = match plain {
            LogFilter::Status(comparison) => {
                FilterSpecifier::StatusCodeFilter(wire::StatusCodeFilter {
                    comparison: Some(comparison.into()),
                })
            }
            LogFilter::Duration(comparison) => {
                FilterSpecifier::DurationFilter(wire::DurationFilter {
                    comparison: Some(comparison.into()),
                })
            }
            LogFilter::Header(header) => FilterSpecifier::HeaderFilter(wire::HeaderFilter {
                header: Some(header.into()),
            }),
            LogFilter::Flags(flags) => {
                FilterSpecifier::ResponseFlagFilter(wire::ResponseFlagFilter {
                    flags: flags.clone(),
                })
            }
            LogFilter::And(filters) => FilterSpecifier::AndFilter(wire::AndFilter {
                filters: all(filters),
            }),
            LogFilter::Or(filters) => FilterSpecifier::OrFilter(wire::OrFilter {
                filters: all(filters),
            }),
        };
        Self {
            filter_specifier: Some(specifier),
        }
    }
}

impl From<&Comparison> for wire::ComparisonFilter {
    fn from(plain: &Comparison) -> Self {
        let op = match plain.how {
            How::Equal => Op::Eq,
            How::AtLeast => Op::Ge,
            How::AtMost => Op::Le,
            How::NotEqual => Op::Ne,
        };
        Self {
            op: op.into(),
            value: Some(RuntimeUInt32 {
                default_value: plain.value,
                runtime_key: plain.runtime_key.clone(),
            }),
        }
    }
}
