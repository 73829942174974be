//! One configuration over another, as Envoy lays `--config-yaml` over `-c`: messages are merged, lists joined, the rest
//! replaced. A choice holds what was said last, and entries of maps (those of `Struct` included) are replaced whole. So is
//! what carries its own type.

use super::walk::{field_by_key, snake_case};
use prost_reflect::{FieldDescriptor, Kind, MessageDescriptor};
use serde_json::{Map, Value};

/// Lays `over` over `base`, both of this message.
pub(super) fn merge(message: &MessageDescriptor, base: &mut Value, over: Value) {
    match (base, over) {
        // Nothing said.
        (_, Value::Null) => {}
        (Value::Object(base), Value::Object(over)) if !over.contains_key("@type") => {
            for (key, value) in over {
                member(message, base, key, value);
            }
        }
        (base, over) => *base = over,
    }
}

fn member(message: &MessageDescriptor, base: &mut Map<String, Value>, key: String, value: Value) {
    if value.is_null() {
        return;
    }
    let field = field_by_key(message, &key);
    let choice = field.as_ref().and_then(FieldDescriptor::containing_oneof);
    base.retain(|known, _| {
        let other = field_by_key(message, known);
        other == field || choice.is_none() || other.and_then(|it| it.containing_oneof()) != choice
    });
    // What is not transcribed has no descriptor, but two key styles all the same.
    let is_it = |known: &&String| {
        let other = field_by_key(message, known);
        other == field && (field.is_some() || snake_case(known) == snake_case(&key))
    };
    let known = base.keys().find(is_it).cloned();
    match known.and_then(|known| base.get_mut(&known)) {
        Some(before) => again(field.as_ref(), before, value),
        None => drop(base.insert(key, value)),
    }
}

/// Lays a value over one of the same field; a field that nobody knows is judged later.
fn again(field: Option<&FieldDescriptor>, before: &mut Value, over: Value) {
    let message = field.map(FieldDescriptor::kind);
    let message = message.as_ref().and_then(Kind::as_message);
    let is_struct = message.is_some_and(|of| of.full_name() == "google.protobuf.Struct");
    let is_list = field.is_some_and(FieldDescriptor::is_list);
    let is_map = field.is_some_and(FieldDescriptor::is_map) || is_struct && !is_list;
    match (before, over, message) {
        (Value::Array(before), Value::Array(over), _) if is_list => before.extend(over),
        (Value::Object(before), Value::Object(over), _) if is_map => before.extend(over),
        (before, over, Some(message)) if !is_list && !is_map => merge(message, before, over),
        (before, over, _) => *before = over,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{protobuf, wire::envoy::config::bootstrap::v3::Bootstrap};
    use prost::Name;
    use serde_json::json;

    fn merged_as(message: &str, mut base: Value, over: Value) -> Value {
        merge(&protobuf::descriptor(message).unwrap(), &mut base, over);
        base
    }

    fn merged(base: Value, over: Value) -> Value {
        merged_as(&Bootstrap::full_name(), base, over)
    }

    #[test]
    fn what_lies_above_counts_and_lists_are_joined() {
        let base = json!({
            "node": {"id": "a", "cluster": "c"},
            "static_resources": {"clusters": [{"name": "1"}]},
            "stats_flush_interval": "1s",
        });
        let over = json!({
            "node": {"id": "b"},
            "staticResources": {"clusters": [{"name": "2"}], "listeners": [{"name": "3"}]},
            "stats_flush_interval": null,
            "admin": {"profile_path": "p"},
        });
        assert_eq!(
            merged(base, over),
            json!({
                "node": {"id": "b", "cluster": "c"},
                "static_resources": {"clusters": [{"name": "1"}, {"name": "2"}], "listeners": [{"name": "3"}]},
                "stats_flush_interval": "1s",
                "admin": {"profile_path": "p"},
            })
        );
    }

    #[test]
    fn a_choice_holds_what_was_said_last() {
        let base = json!({"admin": {"address": {"socket_address": {"address": "a"}}, "profile_path": "p"}});
        let over = json!({"admin": {"address": {"pipe": {"path": "/a"}}, "profilePath": "q"}});
        assert_eq!(
            merged(base, over),
            json!({"admin": {"address": {"pipe": {"path": "/a"}}, "profile_path": "q"}})
        );
    }

    #[test]
    fn entries_of_maps_are_replaced_whole_and_their_keys_are_not_fields() {
        let entries = |inner: Value| json!({"A": inner, "fooBar": 1});
        let over = json!({"A": {"y": [2]}, "foo_bar": 2});
        let both = json!({"A": {"y": [2]}, "fooBar": 1, "foo_bar": 2});
        for (message, field) in [
            ("envoy.config.core.v3.Metadata", "filter_metadata"),
            (
                "envoy.config.core.v3.SubstitutionFormatString",
                "json_format",
            ),
        ] {
            let base = json!({field: entries(json!({"x": 1, "y": [1]}))});
            let all = merged_as(message, base, json!({field: over}));
            assert_eq!(all, json!({field: both}));
        }
    }

    #[test]
    fn what_has_its_own_type_is_replaced() {
        let log = |kind: &str| json!({"typed_config": {"@type": kind, kind: 1}});
        let all = merged_as("envoy.config.accesslog.v3.AccessLog", log("t"), log("u"));
        assert_eq!(all, log("u"));
    }
}
