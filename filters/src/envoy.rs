//! Envoy's small messages, as they reach a filter in its JSON: shares, durations, header changes.
//!
//! Shapes are protobuf's JSON mapping with `snake_case` keys. What a message has and we do not is refused by name.

pub(crate) mod headers;

use crate::{
    matching::chance,
    runtime::{Runtime, Share},
};
use serde::{Deserialize, Deserializer, de::Error};
use std::time::Duration;

/// `envoy.type.v3.FractionalPercent`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct FractionalPercent {
    pub(crate) numerator: u32,
    pub(crate) denominator: Denominator,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum Denominator {
    #[default]
    Hundred,
    TenThousand,
    Million,
}

impl Denominator {
    pub(crate) fn of(self) -> u32 {
        match self {
            Self::Hundred => 100,
            Self::TenThousand => 10_000,
            Self::Million => 1_000_000,
        }
    }
}

impl FractionalPercent {
    /// Everything.
    pub(crate) const ALL: Self = Self {
        numerator: 100,
        denominator: Denominator::Hundred,
    };

    /// Whether this request is one of them: by chance, but all and none are certain.
    pub(crate) fn draw(self) -> bool {
        chance(self.numerator, self.denominator.of())
    }
}

/// `envoy.config.core.v3.RuntimeFractionalPercent`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RuntimeFractionalPercent {
    pub(crate) default_value: FractionalPercent,
    pub(crate) runtime_key: String,
}

impl RuntimeFractionalPercent {
    /// Ready to be drawn.
    pub(crate) fn share(&self, runtime: &Runtime) -> Share {
        self.share_or(runtime, self.default_value)
    }

    fn share_or(&self, runtime: &Runtime, default: FractionalPercent) -> Share {
        runtime.share(
            &self.runtime_key,
            (default.numerator, default.denominator.of()),
        )
    }
}

impl FractionalPercent {
    /// What nothing changes.
    pub(crate) fn fixed(self, runtime: &Runtime) -> Share {
        RuntimeFractionalPercent::default().share_or(runtime, self)
    }
}

/// A `google.protobuf.Duration`: `"0.250s"`.
pub(crate) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.strip_suffix('s')
        .and_then(|seconds| seconds.parse::<f64>().ok())
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| D::Error::custom(format!("'{text}' is not a duration such as \"0.25s\"")))
}
