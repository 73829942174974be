//! Load reports of single endpoints (ORCA), as they stand in headers and trailers: `endpoint-load-metrics` with `TEXT`, `JSON`
//! or `BIN` before the report, or `endpoint-load-metrics-bin`.
//!
//! What it does not do: say what becomes of a report. One that is wrong anywhere is refused as a whole, as in Envoy.

use crate::wire::xds::data::orca::v3::OrcaLoadReport;
use base64::{
    Engine as _,
    engine::{
        DecodePaddingMode,
        general_purpose::{GeneralPurpose, GeneralPurposeConfig},
    },
};
use http::{HeaderMap, HeaderName};
use prost::Message;
use serde::Deserialize;
use std::{collections::BTreeMap, fmt::Write};

/// Carries a report in any of its forms.
pub const HEADER: HeaderName = HeaderName::from_static("endpoint-load-metrics");
/// Carries one in its binary form, as gRPC does.
pub const BINARY_HEADER: HeaderName = HeaderName::from_static("endpoint-load-metrics-bin");
/// With it a client asks for reports.
pub const FORMAT_HEADER: HeaderName = HeaderName::from_static("endpoint-load-metrics-format");
/// A longer report is not read.
pub const REPORT_BYTES_MAX: usize = 8 << 10;

/// gRPC leaves the padding out.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// `xds.data.orca.v3.OrcaLoadReport`; 0 is unknown. Shares are of 1, rates are per second.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default)]
pub struct LoadReport {
    /// Of the processors.
    #[serde(alias = "cpuUtilization")]
    pub cpu_utilization: f64,
    /// Of the memory.
    #[serde(alias = "memUtilization")]
    pub mem_utilization: f64,
    /// Of whatever the application is short of; may be above 1.
    #[serde(alias = "applicationUtilization")]
    pub application_utilization: f64,
    /// Requests.
    #[serde(alias = "rpsFractional")]
    pub rps_fractional: f64,
    /// Failed requests.
    pub eps: f64,
    /// By name.
    #[serde(alias = "namedMetrics")]
    pub named_metrics: BTreeMap<String, f64>,
    /// By name.
    pub utilization: BTreeMap<String, f64>,
    /// By name.
    #[serde(alias = "requestCost")]
    pub request_cost: BTreeMap<String, f64>,
}

/// Why a report was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// Longer than [`REPORT_BYTES_MAX`].
    #[error("too long")]
    TooLong,
    /// Neither `TEXT`, `JSON` nor `BIN`.
    #[error("unsupported format")]
    Format,
    /// No such metric, no number, or twice.
    #[error("wrong metric: {0}")]
    Metric(String),
    /// No JSON, base64 or protobuf of a report.
    #[error("cannot be read: {0}")]
    Unreadable(String),
}

impl LoadReport {
    /// The report of a response or its trailers, if there is one. The binary header comes first, as in Envoy.
    #[must_use]
    pub fn read(headers: &HeaderMap) -> Option<Result<Self, ReportError>> {
        if let Some(value) = headers.get(BINARY_HEADER) {
            return Some(Self::binary(value.as_bytes()));
        }
        let value = headers.get(HEADER)?;
        let Ok(text) = value.to_str() else {
            return Some(Err(ReportError::Format));
        };
        if text.len() > REPORT_BYTES_MAX {
            return Some(Err(ReportError::TooLong));
        }
        Some(match text.split_once(' ') {
            Some(("TEXT", list)) => Self::text(list),
            Some(("JSON", json)) => Self::json(json),
            Some(("BIN", base64)) => Self::binary(base64.as_bytes()),
            _ => Err(ReportError::Format),
        })
    }

    /// `name=value, …`; a colon will do, too.
    fn text(list: &str) -> Result<Self, ReportError> {
        let mut report = Self::default();
        let mut seen = Vec::new();
        for metric in list
            .split(',')
            .map(str::trim)
            .filter(|metric| !metric.is_empty())
        {
            let wrong = || ReportError::Metric(metric.to_owned());
            let (name, value) = metric.split_once(['=', ':']).ok_or_else(wrong)?;
            let name = name.trim();
            let value: f64 = value.trim().parse().map_err(|_| wrong())?;
            if seen.contains(&name) || !value.is_finite() {
                return Err(wrong());
            }
            seen.push(name);
            *report.place(name).ok_or_else(wrong)? = value;
        }
        Ok(report)
    }

    fn json(text: &str) -> Result<Self, ReportError> {
        serde_json::from_str(text).map_err(|error| ReportError::Unreadable(error.to_string()))
    }

    fn binary(base64: &[u8]) -> Result<Self, ReportError> {
        if base64.len() > REPORT_BYTES_MAX {
            return Err(ReportError::TooLong);
        }
        let unreadable = |error: &dyn std::fmt::Display| ReportError::Unreadable(error.to_string());
        let bytes = BASE64
            .decode(base64.trim_ascii())
            .map_err(|error| unreadable(&error))?;
        let wire = OrcaLoadReport::decode(&bytes[..]).map_err(|error| unreadable(&error))?;
        let report = Self {
            cpu_utilization: wire.cpu_utilization,
            mem_utilization: wire.mem_utilization,
            application_utilization: wire.application_utilization,
            rps_fractional: wire.rps_fractional,
            eps: wire.eps,
            named_metrics: wire.named_metrics,
            utilization: wire.utilization,
            request_cost: wire.request_cost,
        };
        if !report.is_finite() {
            return Err(ReportError::Metric("not finite".into()));
        }
        Ok(report)
    }

    /// Text is checked as it is read, and JSON knows finite numbers only.
    fn is_finite(&self) -> bool {
        let fields = [
            self.cpu_utilization,
            self.mem_utilization,
            self.application_utilization,
            self.rps_fractional,
            self.eps,
        ];
        let maps = [&self.named_metrics, &self.utilization, &self.request_cost];
        let named = maps.into_iter().flat_map(BTreeMap::values);
        fields.iter().chain(named).all(|value| value.is_finite())
    }

    /// Where the metric of this name stands.
    fn place(&mut self, name: &str) -> Option<&mut f64> {
        Some(match name {
            "cpu_utilization" => &mut self.cpu_utilization,
            "mem_utilization" => &mut self.mem_utilization,
            "application_utilization" => &mut self.application_utilization,
            "rps_fractional" => &mut self.rps_fractional,
            "eps" => &mut self.eps,
            _ => {
                let (map, name) = name.split_once('.').filter(|(_, name)| !name.is_empty())?;
                let map = match map {
                    "named_metrics" => &mut self.named_metrics,
                    "utilization" => &mut self.utilization,
                    "request_cost" => &mut self.request_cost,
                    _ => return None,
                };
                map.entry(name.to_owned()).or_default()
            }
        })
    }

    /// The greatest of the metrics that `name` means: a field, `named_metrics.NAME` or the like, or `named_metrics.*`.
    #[must_use]
    pub fn greatest(&self, name: &str) -> Option<f64> {
        match name {
            "cpu_utilization" => return Some(self.cpu_utilization),
            "mem_utilization" => return Some(self.mem_utilization),
            "application_utilization" => return Some(self.application_utilization),
            _ => {}
        }
        let (map, name) = name.split_once('.')?;
        let map = match map {
            "named_metrics" => &self.named_metrics,
            "utilization" => &self.utilization,
            "request_cost" => &self.request_cost,
            _ => return None,
        };
        match name {
            "*" => map.values().copied().reduce(f64::max),
            _ => map.get(name).copied(),
        }
    }

    /// The value of [`HEADER`], in its form for people.
    #[must_use]
    pub fn to_header(&self) -> String {
        let mut out = "TEXT".to_owned();
        let mut put = |name: &str, value: f64| {
            let comma = if out.len() > 4 { "," } else { "" };
            // Writing to a text cannot fail.
            let _ = write!(out, "{comma} {name}={}", (value * 1e4).round() / 1e4);
        };
        for (name, value) in [
            ("application_utilization", self.application_utilization),
            ("cpu_utilization", self.cpu_utilization),
            ("mem_utilization", self.mem_utilization),
            ("rps_fractional", self.rps_fractional),
            ("eps", self.eps),
        ] {
            if value != 0.0 {
                put(name, value);
            }
        }
        for (prefix, map) in [
            ("named_metrics", &self.named_metrics),
            ("utilization", &self.utilization),
            ("request_cost", &self.request_cost),
        ] {
            for (name, value) in map {
                put(&format!("{prefix}.{name}"), *value);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: HeaderName, value: &str) -> Result<LoadReport, ReportError> {
        let headers = HeaderMap::from_iter([(name, value.parse().unwrap())]);
        LoadReport::read(&headers).unwrap()
    }

    fn example() -> LoadReport {
        LoadReport {
            cpu_utilization: 0.7,
            application_utilization: 0.8,
            mem_utilization: 0.9,
            rps_fractional: 1000.0,
            eps: 2.0,
            named_metrics: BTreeMap::from([("foo".to_owned(), 123.0), ("bar".to_owned(), 0.2)]),
            utilization: BTreeMap::from([("total".to_owned(), 0.5)]),
            request_cost: BTreeMap::new(),
        }
    }

    #[test]
    fn all_forms_say_the_same() {
        let wire = OrcaLoadReport {
            cpu_utilization: 0.7,
            application_utilization: 0.8,
            mem_utilization: 0.9,
            rps_fractional: 1000.0,
            eps: 2.0,
            named_metrics: example().named_metrics,
            utilization: example().utilization,
            ..OrcaLoadReport::default()
        };
        let base64 = BASE64.encode(wire.encode_to_vec());
        let bare = base64.trim_end_matches('=');
        let list = "cpu_utilization=0.7,application_utilization=0.8,mem_utilization=0.9,rps_fractional=1000,eps=2,\
             named_metrics.foo=123, named_metrics.bar=0.2,utilization.total=0.5";
        let json = r#"{"cpu_utilization":0.7,"applicationUtilization":0.8,"mem_utilization":0.9,"rps_fractional":1000,"eps":2,
             "named_metrics":{"foo":123,"bar":0.2},"utilization":{"total":0.5},"from_the_future":1}"#;
        for (name, value) in [
            (HEADER, format!("TEXT {list}")),
            (HEADER, format!("TEXT {}", list.replace('=', ":"))),
            (HEADER, format!("JSON {}", json.replace('\n', " "))),
            (HEADER, format!("BIN {base64}")),
            (HEADER, example().to_header()),
            (BINARY_HEADER, base64.clone()),
            (BINARY_HEADER, bare.to_owned()),
        ] {
            assert_eq!(read(name, &value), Ok(example()), "{value}");
        }
        assert_eq!(LoadReport::read(&HeaderMap::new()), None);
    }

    #[test]
    fn what_is_wrong_anywhere_is_refused_as_a_whole() {
        for value in [
            "",
            "TEXT",
            "BAD 1",
            "text eps=1",
            "TEXT eps",
            "TEXT eps=",
            "TEXT eps=x",
            "TEXT eps=NaN",
            "TEXT eps=inf",
            "TEXT eps=1,eps=1",
            "TEXT cpu=1",
            "TEXT named_metrics.=1",
            "TEXT other.a=1",
            "JSON {",
            "JSON {\"eps\":\"x\"}",
            "BIN ???",
            "BIN AAAA",
        ] {
            assert!(read(HEADER, value).is_err(), "{value}");
        }
        let long = format!("TEXT {}eps=1", " ".repeat(REPORT_BYTES_MAX));
        assert_eq!(read(HEADER, &long), Err(ReportError::TooLong));
    }

    #[test]
    fn binary_numbers_that_are_not_finite_are_refused() {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let named = OrcaLoadReport {
                named_metrics: BTreeMap::from([("a".to_owned(), value)]),
                ..OrcaLoadReport::default()
            };
            let field = OrcaLoadReport {
                eps: value,
                ..OrcaLoadReport::default()
            };
            for wire in [named, field] {
                let base64 = BASE64.encode(wire.encode_to_vec());
                assert!(read(BINARY_HEADER, &base64).is_err(), "{value}");
            }
        }
    }

    #[test]
    fn metrics_are_named_one_by_one_or_all() {
        let report = example();
        for (name, value) in [
            ("cpu_utilization", Some(0.7)),
            ("named_metrics.bar", Some(0.2)),
            ("named_metrics.*", Some(123.0)),
            ("utilization.*", Some(0.5)),
            ("request_cost.*", None),
            ("named_metrics.other", None),
            ("nothing", None),
        ] {
            assert_eq!(report.greatest(name), value, "{name}");
        }
    }
}
