//! What a client is sent that is not ours: the same resources without what only Outrigger understands.
//!
//! A filter of ours that says `is_optional` stays: who does not know it passes over it. Of a JSON format, keys with operators of ours are left out; a text
//! format with one of them is, as a whole, and what is written is Envoy's default.

use outrigger_xds::{
    load::written::{self, Meaning, Written},
    problems::ConfigErrors,
    resource::access_log::has_operators_of_ours,
};
use serde_json::Value;

/// Begins the names of our types.
const OURS: &str = "outrigger.";

/// A resource without what is ours in it; none if there is nothing of ours.
///
/// # Errors
/// Without it, it is no resource.
pub fn without_ours(written: &Written) -> Result<Option<Written>, ConfigErrors> {
    if !may_have_ours(written) {
        return Ok(None);
    }
    let mut json = written::to_json(&written.any)?;
    strip(&mut json);
    written::resource(json, "").map(Some)
}

/// At a glance: most resources have nothing of ours, and need not be taken apart.
fn may_have_ours(written: &Written) -> bool {
    let bytes = &written.any.value;
    let ours = OURS.as_bytes();
    bytes.windows(ours.len()).any(|bytes| bytes == ours)
        || (matches!(written.meaning, Meaning::Listener(_))
            && has_operators_of_ours(&String::from_utf8_lossy(bytes)))
}

/// Whether a resource is of use to nobody else: the configuration of a filter of ours.
#[must_use]
pub fn is_of_ours(meaning: &Meaning) -> bool {
    match meaning {
        Meaning::Extension(extension) => is_type_of_ours(&extension.config.type_url),
        _ => false,
    }
}

fn is_type_of_ours(url: &str) -> bool {
    url.rsplit('/').next().unwrap_or(url).starts_with(OURS)
}

/// A filter whose configuration comes from elsewhere may be whatever is left of what it may be; whether nothing is.
fn is_nothing_else(discovery: &mut Value) -> bool {
    let Some(listed) = discovery["type_urls"].as_array_mut() else {
        return false;
    };
    listed.retain(|url| !url.as_str().is_some_and(is_type_of_ours));
    let is_nothing = listed.is_empty();
    if is_ours(&discovery["default_config"])
        && let Some(fields) = discovery.as_object_mut()
    {
        fields.remove("default_config");
        fields.remove("apply_default_config_without_warming");
    }
    is_nothing
}

fn strip(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(strip),
        Value::Object(fields) => {
            fields.retain(|key, value| !is_format(key) || !is_text_of_ours(value));
            for (key, value) in fields {
                match (key.as_str(), &mut *value) {
                    ("http_filters" | "monitors", Value::Array(list)) => {
                        list.retain(|item| !is_ours(&item["typed_config"]) || is_optional(item));
                        list.retain_mut(|item| {
                            let discovery = item.get_mut("config_discovery");
                            !discovery.is_some_and(is_nothing_else)
                        });
                    }
                    ("health_checks", Value::Array(list)) => {
                        list.retain(|item| !is_ours(&item["custom_health_check"]["typed_config"]));
                    }
                    ("typed_per_filter_config", Value::Object(filters)) => {
                        filters.retain(|_, config| !is_ours(config));
                    }
                    ("json_format", format) => strip_format(format),
                    _ => {}
                }
                strip(value);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Where a `SubstitutionFormatString` is.
fn is_format(key: &str) -> bool {
    ["log_format", "body_format", "body_format_override"].contains(&key)
}

fn is_text_of_ours(format: &Value) -> bool {
    let texts = [
        &format["text_format"],
        &format["text_format_source"]["inline_string"],
    ];
    let mut texts = texts.into_iter().filter_map(Value::as_str);
    texts.any(has_operators_of_ours)
}

/// Keys go with their operators; objects in it stay, if empty.
fn strip_format(format: &mut Value) {
    let has_ours = |value: &Value| value.as_str().is_some_and(has_operators_of_ours);
    match format {
        Value::Object(fields) => {
            fields.retain(|_, value| !has_ours(value));
            fields.values_mut().for_each(strip_format);
        }
        Value::Array(list) => {
            list.retain(|value| !has_ours(value));
            list.iter_mut().for_each(strip_format);
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn is_optional(item: &Value) -> bool {
    item["is_optional"] == true
}

/// Whether the JSON of an `Any` is of a type of ours: itself, in a `TypedStruct`, or in what a route says about a filter.
fn is_ours(any: &Value) -> bool {
    let is_named = |key: &str| any[key].as_str().is_some_and(is_type_of_ours);
    let inner = &any["config"];
    is_named("@type")
        || is_named("type_url")
        || (inner.is_object() && is_ours(inner) && !is_optional(any))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ours(name: &str) -> Value {
        json!({
            "@type": "type.googleapis.com/xds.type.v3.TypedStruct",
            "type_url": format!("type.googleapis.com/outrigger.filters.http.{name}.v1.Config"),
            "value": {},
        })
    }

    fn table(filters: &Value) -> Value {
        json!({
            "@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            "name": "table",
            "virtual_hosts": [{
                "name": "all",
                "domains": ["*"],
                "typed_per_filter_config": filters,
                "routes": [],
            }],
        })
    }

    fn listener(filters: &Value) -> Value {
        let hcm = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
        json!({
            "@type": "type.googleapis.com/envoy.config.listener.v3.Listener",
            "name": "edge",
            "address": { "socket_address": { "address": "127.0.0.1", "port_value": 1 } },
            "filter_chains": [{ "filters": [{ "name": "hcm", "typed_config": {
                "@type": hcm,
                "stat_prefix": "edge",
                "route_config": { "virtual_hosts": [] },
                "http_filters": filters,
            } }] }],
        })
    }

    fn foreign(value: Value) -> Option<Value> {
        let written = written::resource(value, "").unwrap();
        let stripped = without_ours(&written).unwrap()?;
        Some(written::to_json(&stripped.any).unwrap())
    }

    #[test]
    fn filters_of_ours_are_left_out_unless_they_are_optional() {
        let router = json!({
            "name": "router",
            "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
        });
        let cors = json!({
            "name": "cors",
            "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors" },
        });
        let openai = json!({ "name": "a", "typed_config": ours("openai") });
        let optional =
            json!({ "name": "b", "typed_config": ours("kv_routing"), "is_optional": true });
        let all = json!([openai, cors, optional, router]);
        let json = foreign(listener(&all)).unwrap();
        let left = &json["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"];
        let names: Vec<&str> = left
            .as_array()
            .unwrap()
            .iter()
            .map(|it| it["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["cors", "b", "router"]);
        assert_eq!(foreign(listener(&json!([cors, router]))), None);
    }

    #[test]
    fn a_filter_may_become_what_is_left_of_what_it_may_become() {
        let source = json!({ "ads": {}, "resource_api_version": "V3" });
        let url =
            |name: &str| format!("type.googleapis.com/outrigger.filters.http.{name}.v1.Config");
        let cors = "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors";
        let filter = |name: &str, urls: &[String]| {
            json!({ "name": name, "config_discovery": {
                "config_source": source, "type_urls": urls, "default_config": ours("openai"),
                "apply_default_config_without_warming": true,
            } })
        };
        let router = json!({
            "name": "router",
            "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
        });
        let all = json!([
            filter("ours", &[url("openai")]),
            filter("both", &[url("openai"), cors.to_owned()]),
            router,
        ]);
        let json = foreign(listener(&all)).unwrap();
        let left = &json["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"];
        let discovery = &left[0]["config_discovery"];
        assert_eq!(
            (&left[0]["name"], &left[1]["name"]),
            (&json!("both"), &json!("router"))
        );
        assert_eq!(discovery["type_urls"], json!([cors]));
        assert!(discovery.get("default_config").is_none(), "{discovery}");
        let extension = json!({
            "@type": "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
            "name": "ours",
            "typed_config": ours("openai"),
        });
        let written = written::resource(extension, "").unwrap();
        assert!(is_of_ours(&written.meaning));
    }

    #[test]
    fn access_logs_say_nothing_that_only_we_know() {
        let log = |format: Value| {
            json!({ "name": "log", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
                "log_format": format,
            } })
        };
        let text = |text: &str| log(json!({ "text_format_source": { "inline_string": text } }));
        let logs = json!([
            log(
                json!({ "json_format": { "ttft": "%TTFT%", "in": { "a": "%MODEL(x):9%", "b": "%PROTOCOL%" } } })
            ),
            text("%MIGRATIONS%\n"),
            text("%RESPONSE_CODE% 100%MODELS\n"),
        ]);
        let router = json!({
            "name": "router",
            "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
        });
        let mut value = listener(&json!([router]));
        value["filter_chains"][0]["filters"][0]["typed_config"]["access_log"] = logs;
        let json = foreign(value).unwrap();
        let logs = &json["filter_chains"][0]["filters"][0]["typed_config"]["access_log"];
        let format = |index: usize| &logs[index]["typed_config"]["log_format"];
        assert_eq!(
            format(0)["json_format"],
            json!({ "in": { "b": "%PROTOCOL%" } })
        );
        assert_eq!(*format(1), Value::Null, "{logs}");
        let kept = &format(2)["text_format_source"]["inline_string"];
        assert_eq!(*kept, "%RESPONSE_CODE% 100%MODELS\n", "{logs}");
    }

    #[test]
    fn routes_say_nothing_of_filters_of_ours() {
        let within = |optional: bool| {
            json!({
                "@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig",
                "config": ours("openai"),
                "is_optional": optional,
            })
        };
        let filters = json!({
            "ours": ours("openai"),
            "within": within(false),
            "optional": within(true),
            "cors": { "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy" },
        });
        let json = foreign(table(&filters)).unwrap();
        let left = json["virtual_hosts"][0]["typed_per_filter_config"]
            .as_object()
            .unwrap();
        let mut names: Vec<&String> = left.keys().collect();
        names.sort();
        assert_eq!(names, ["cors", "optional"]);
    }
}
