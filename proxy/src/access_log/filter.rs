//! Conditions on requests that have an answer, prepared once: which are logged, which answers of ours are changed.

use super::{Captured, Headers};
use outrigger_filters::{
    error::Flag,
    matching::HeaderMatcher,
    runtime::{Number, Runtime},
};
use outrigger_xds::resource::log_filter::{Comparison, How, LogFilter};
use std::time::Duration;

/// `LogFilter`, prepared.
#[derive(Debug)]
pub(crate) enum Filter {
    Status(Limit),
    DurationMs(Limit),
    /// What is held ready in [`Captured`].
    Header(usize),
    /// Any, if there are none.
    Flags(Vec<String>),
    And(Vec<Self>),
    Or(Vec<Self>),
}

/// `Comparison`, prepared.
#[derive(Debug)]
pub(crate) struct Limit {
    how: How,
    value: Number,
}

impl Limit {
    fn new(wanted: &Comparison, runtime: &Runtime) -> Self {
        Self {
            how: wanted.how,
            value: runtime.number(&wanted.runtime_key, wanted.value.into()),
        }
    }

    fn holds(&self, number: u64) -> bool {
        self.how.holds(number, self.value.get())
    }
}

/// What a condition may look at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answer<'a> {
    pub(crate) code: u16,
    pub(crate) duration: Duration,
    pub(crate) flags: &'a [Flag],
    /// With the headers' conditions, which were looked at when the request came.
    pub(crate) captured: &'a Captured,
}

impl Filter {
    /// Prepares it; conditions on headers get a place in `headers`.
    ///
    /// # Errors
    /// A regular expression is not valid, which the checks of the configuration rule out.
    pub(super) fn compile(
        wanted: &LogFilter,
        headers: &mut Headers,
        runtime: &Runtime,
    ) -> Result<Self, String> {
        let mut all = |filters: &[LogFilter]| -> Result<Vec<Self>, String> {
            let filters = filters.iter();
            filters
                .map(|filter| Self::compile(filter, headers, runtime))
                .collect()
        };
        Ok(match wanted {
            LogFilter::Status(comparison) => Self::Status(Limit::new(comparison, runtime)),
            LogFilter::Duration(comparison) => Self::DurationMs(Limit::new(comparison, runtime)),
            LogFilter::Flags(flags) => Self::Flags(flags.clone()),
            LogFilter::And(filters) => Self::And(all(filters)?),
            LogFilter::Or(filters) => Self::Or(all(filters)?),
            LogFilter::Header(header) => {
                headers.conditions.push(HeaderMatcher::new(header)?);
                Self::Header(headers.conditions.len() - 1)
            }
        })
    }

    /// Whether it holds.
    pub(crate) fn holds(&self, answer: &Answer<'_>) -> bool {
        match self {
            Self::Status(comparison) => comparison.holds(answer.code.into()),
            Self::DurationMs(comparison) => comparison.holds(answer.duration.as_millis() as u64),
            Self::Header(at) => answer
                .captured
                .conditions
                .get(*at)
                .is_some_and(|held| *held),
            Self::Flags(flags) if flags.is_empty() => !answer.flags.is_empty(),
            Self::Flags(flags) => {
                let mut set = answer.flags.iter().map(|flag| flag.as_str());
                set.any(|set| flags.iter().any(|flag| flag == set))
            }
            Self::And(filters) => filters.iter().all(|filter| filter.holds(answer)),
            Self::Or(filters) => filters.iter().any(|filter| filter.holds(answer)),
        }
    }
}
