//! The runtime: values by key, in layers of which the last that has a key counts.

use super::config_source::ConfigSource;
use crate::{
    load::{Syntax, documents},
    problems::ConfigErrors,
    protobuf::{struct_from_json, struct_to_json},
    wire::envoy::{config::bootstrap::v3 as wire, service::runtime::v3 as service},
};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashSet};
use wire::runtime_layer::{AdminLayer, LayerSpecifier, RtdsLayer};

/// Keys of Envoy's own that would change what happens to requests, and do not here.
const NOT_SUPPORTED: [&str; 9] = [
    "circuit_breakers.",
    "conn_pool.",
    "fault.http.",
    "health_check.",
    "http.",
    "outlier_detection.",
    "overload.",
    "tracing.",
    "upstream.",
];
/// A limit that is none.
const UNLIMITED: f64 = i32::MAX as f64;
/// The name of the layer that is there where none is written.
const ADMIN: &str = "admin";
/// Values nested deeper are refused.
const DEPTH_MAX: usize = 32;

/// A value, as far as it can be read as one or the other.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RuntimeValue {
    /// As it is shown.
    pub text: String,
    /// As a share: so many of so many.
    pub fraction: Option<(u32, u32)>,
    /// As a whole number.
    pub integer: Option<u64>,
}

impl RuntimeValue {
    /// What a text says, as the admin is told it.
    #[must_use]
    pub fn of_text(text: &str) -> Self {
        let fraction = text.contains("numerator").then(|| {
            let values = documents(text, Syntax::Yaml).ok()?;
            fraction(values.first()?.as_object()?)
        });
        Self {
            text: text.to_owned(),
            fraction: fraction.flatten(),
            integer: text.parse().ok().and_then(whole),
        }
    }

    /// As a share: what is a number only is a percentage.
    #[must_use]
    pub fn share(&self) -> Option<(u32, u32)> {
        let percent = |number: u64| (u32::try_from(number.min(100)).unwrap_or(100), 100);
        self.fraction.or_else(|| self.integer.map(percent))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the range is checked"
)]
fn whole(number: f64) -> Option<u64> {
    (number.fract() == 0.0 && (0.0..=u64::MAX as f64).contains(&number)).then_some(number as u64)
}

/// `FractionalPercent`.
fn fraction(fields: &Map<String, Value>) -> Option<(u32, u32)> {
    let known = |key: &String| key == "numerator" || key == "denominator";
    let numerator = fields.get("numerator").map_or(Some(0), Value::as_u64)?;
    let denominator = match fields.get("denominator") {
        None => 100,
        Some(Value::String(name)) => match name.as_str() {
            "HUNDRED" => 100,
            "TEN_THOUSAND" => 10_000,
            "MILLION" => 1_000_000,
            _ => return None,
        },
        Some(number) => match number.as_u64()? {
            0 => 100,
            1 => 10_000,
            2 => 1_000_000,
            _ => return None,
        },
    };
    let numerator = u32::try_from(numerator).ok()?;
    fields.keys().all(known).then_some((numerator, denominator))
}

/// Values by key.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RuntimeValues {
    /// As written: what is nested has its key joined by dots.
    written: Map<String, Value>,
    /// By whole key.
    pub by_key: BTreeMap<String, RuntimeValue>,
}

impl RuntimeValues {
    fn read(written: Map<String, Value>) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let mut by_key = BTreeMap::new();
        for (key, value) in &written {
            walk(&mut problems, &mut by_key, (key, value), DEPTH_MAX);
        }
        problems.finish(Some(Self { written, by_key }))
    }
}

/// As Envoy: what has a numerator or a denominator is a share, any other object holds values.
fn walk(
    problems: &mut ConfigErrors,
    found: &mut BTreeMap<String, RuntimeValue>,
    (key, value): (&str, &Value),
    depth: usize,
) {
    let read = match value {
        Value::String(text) => RuntimeValue::of_text(text),
        Value::Bool(flag) => RuntimeValue {
            text: flag.to_string(),
            ..RuntimeValue::default()
        },
        Value::Number(number) => RuntimeValue {
            text: number.to_string(),
            integer: number.as_f64().and_then(whole),
            fraction: None,
        },
        Value::Object(fields) => {
            let is_share = ["numerator", "denominator"]
                .iter()
                .any(|name| fields.contains_key(*name));
            if !is_share {
                let Some(depth) = depth.checked_sub(1) else {
                    return problems.add("layer", format!("{key}: nested too deeply"));
                };
                for (name, value) in fields {
                    walk(problems, found, (&format!("{key}.{name}"), value), depth);
                }
                return;
            }
            RuntimeValue {
                text: value.to_string(),
                fraction: fraction(fields),
                integer: None,
            }
        }
        Value::Null | Value::Array(_) => {
            return problems.add("layer", format!("Invalid runtime entry value for {key}"));
        }
    };
    found.insert(key.to_owned(), read);
}

/// `envoy.service.runtime.v3.Runtime`: a layer that came.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Runtime {
    /// What it is asked for by.
    pub name: String,
    /// Its values.
    pub values: RuntimeValues,
}

impl TryFrom<service::Runtime> for Runtime {
    type Error = ConfigErrors;

    fn try_from(wire: service::Runtime) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name);
        let values = problems.take("", values(wire.layer.unwrap_or_default()));
        problems.finish(values.map(|values| Self { name, values }))
    }
}

impl From<&Runtime> for service::Runtime {
    fn from(plain: &Runtime) -> Self {
        let layer = Value::Object(plain.values.written.clone());
        Self {
            name: plain.name.clone(),
            layer: Some(struct_from_json(layer)),
        }
    }
}

fn values(layer: prost_types::Struct) -> Result<RuntimeValues, ConfigErrors> {
    match struct_to_json(layer) {
        Value::Object(fields) => RuntimeValues::read(fields),
        _ => Ok(RuntimeValues::default()),
    }
}

/// `RuntimeLayer`.
#[derive(Debug, Clone, PartialEq)]
pub struct RuntimeLayer {
    /// Unique.
    pub name: String,
    /// What is in it.
    pub content: LayerContent,
}

/// `layer_specifier`.
#[derive(Debug, Clone, PartialEq)]
pub enum LayerContent {
    /// What is written.
    Static(RuntimeValues),
    /// What the admin is told.
    Admin,
    /// What comes from elsewhere.
    Rtds(Rtds),
}

/// `RtdsLayer`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rtds {
    /// What it is asked for by.
    pub name: String,
    /// Where from.
    pub source: ConfigSource,
}

impl RuntimeLayer {
    /// As in Envoy, the one that is there where none is written.
    #[must_use]
    pub fn admin() -> Self {
        Self {
            name: ADMIN.to_owned(),
            content: LayerContent::Admin,
        }
    }

    /// Where it comes from, if it is from elsewhere.
    #[must_use]
    pub fn rtds(&self) -> Option<&Rtds> {
        match &self.content {
            LayerContent::Rtds(rtds) => Some(rtds),
            LayerContent::Static(_) | LayerContent::Admin => None,
        }
    }
}

/// All layers, the last of which counts.
pub(super) fn layers(problems: &mut ConfigErrors, wire: wire::LayeredRuntime) -> Vec<RuntimeLayer> {
    let place = "layered_runtime.layers";
    let layers: Vec<RuntimeLayer> = problems.take_all(place, wire.layers);
    let mut names = HashSet::new();
    for layer in &layers {
        if !layer.name.is_empty() && !names.insert(&layer.name) {
            problems.add(place, format!("Duplicate layer name: {}", layer.name));
        }
    }
    let admins = layers
        .iter()
        .filter(|layer| layer.content == LayerContent::Admin);
    if admins.count() > 1 {
        let message =
            "Too many admin layers specified in LayeredRuntime, at most one may be specified";
        problems.add(place, message);
    }
    layers
}

impl TryFrom<wire::RuntimeLayer> for RuntimeLayer {
    type Error = ConfigErrors;

    fn try_from(wire: wire::RuntimeLayer) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let name = problems.not_empty("name", wire.name);
        let content = match wire.layer_specifier {
            Some(LayerSpecifier::StaticLayer(layer)) => {
                let read = problems.take("static_layer", values(layer));
                if let Some(read) = &read {
                    check_keys(&mut problems, read);
                }
                read.map(LayerContent::Static)
            }
            Some(LayerSpecifier::AdminLayer(_)) => Some(LayerContent::Admin),
            Some(LayerSpecifier::RtdsLayer(rtds)) => {
                let source = problems.required("rtds_layer.rtds_config", rtds.rtds_config);
                let name = problems.not_empty("rtds_layer.name", rtds.name);
                source.map(|source| LayerContent::Rtds(Rtds { name, source }))
            }
            None => {
                problems.add("", "required: static_layer, admin_layer or rtds_layer");
                None
            }
        };
        problems.finish(content.map(|content| Self { name, content }))
    }
}

/// Switches of Envoy's own workings are none of ours, but for those that would change what happens to requests. Any other key
/// may stand in a route, and counts there.
fn check_keys(problems: &mut ConfigErrors, values: &RuntimeValues) {
    for (key, value) in &values.by_key {
        let no_limit = key == "overload.global_downstream_max_connections"
            && value.text.parse().is_ok_and(|max: f64| max >= UNLIMITED);
        let is_known = NOT_SUPPORTED.iter().any(|known| key.starts_with(known));
        if is_known && !no_limit {
            problems.add("static_layer", format!("not supported yet: {key}"));
        }
    }
}

impl From<&RuntimeLayer> for wire::RuntimeLayer {
    fn from(plain: &RuntimeLayer) -> Self {
        let specifier = match &plain.content {
            LayerContent::Static(values) => {
                let written = Value::Object(values.written.clone());
                LayerSpecifier::StaticLayer(struct_from_json(written))
            }
            LayerContent::Admin => LayerSpecifier::AdminLayer(AdminLayer {}),
            LayerContent::Rtds(rtds) => LayerSpecifier::RtdsLayer(RtdsLayer {
                name: rtds.name.clone(),
                rtds_config: Some((&rtds.source).into()),
            }),
        };
        Self {
            name: plain.name.clone(),
            layer_specifier: Some(specifier),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> Result<RuntimeValues, String> {
        let Value::Object(fields) = value else {
            panic!("{value}");
        };
        RuntimeValues::read(fields).map_err(|errors| errors.to_string())
    }

    /// As a real Envoy 1.40 shows and takes them.
    #[test]
    fn values_are_read_as_in_envoy() {
        let values = read(json!({
            "a": 5, "big": 500, "f": 1.5, "t": "7", "s": "text", "y": true, "below": -1,
            "b": { "c": false, "d": { "numerator": 3, "denominator": "TEN_THOUSAND" } },
            "text": "{numerator: 4, denominator: MILLION}", "odd": { "numerator": 1, "x": 2 },
        }));
        let values = values.unwrap().by_key;
        let cases = [
            ("a", "5", Some((5, 100)), Some(5)),
            ("big", "500", Some((100, 100)), Some(500)),
            ("f", "1.5", None, None),
            ("t", "7", Some((7, 100)), Some(7)),
            ("s", "text", None, None),
            ("y", "true", None, None),
            ("below", "-1", None, None),
            ("b.c", "false", None, None),
            (
                "text",
                "{numerator: 4, denominator: MILLION}",
                Some((4, 1_000_000)),
                None,
            ),
            ("odd", "{\"numerator\":1,\"x\":2}", None, None),
        ];
        for (key, text, share, integer) in cases {
            let value = &values[key];
            let found = (value.text.as_str(), value.share(), value.integer);
            assert_eq!(found, (text, share, integer), "{key}");
        }
        assert_eq!(values["b.d"].share(), Some((3, 10_000)));
        assert_eq!(values.len(), cases.len() + 1);
    }

    #[test]
    fn what_is_no_value_is_an_error_that_names_it() {
        for value in [json!({ "a": { "b": [1] } }), json!({ "a": { "b": null } })] {
            let error = read(value).unwrap_err();
            assert!(
                error.contains("layer: Invalid runtime entry value for a.b"),
                "{error}"
            );
        }
        let mut deep = json!(1);
        for _ in 0..=DEPTH_MAX + 1 {
            deep = json!({ "a": deep });
        }
        assert!(read(deep).unwrap_err().contains("nested too deeply"));
    }
}
