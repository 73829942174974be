//! One configuration over another, as Envoy lays `--config-yaml` over `-c`: messages are merged, lists joined, the rest
//! replaced. What carries its own type is replaced as a whole.

use super::walk::snake_case;
use serde_json::Value;

/// Lays `over` over `base`.
pub(super) fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        // Nothing said.
        (_, Value::Null) => {}
        (Value::Object(base), Value::Object(over)) if !over.contains_key("@type") => {
            for (key, value) in over {
                let same = |known: &&String| snake_case(known) == snake_case(&key);
                let known = base.keys().find(same).cloned();
                match known.and_then(|known| base.get_mut(&known)) {
                    Some(before) => merge(before, value),
                    None => drop(base.insert(key, value)),
                }
            }
        }
        (Value::Array(base), Value::Array(over)) => base.extend(over),
        (base, over) => *base = over,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_lies_above_counts_and_lists_are_joined() {
        let mut base = json!({
            "node": {"id": "a", "cluster": "c"},
            "static_resources": {"clusters": [1]},
            "socket": {"@type": "t", "x": 1},
            "kept": 1,
        });
        let over = json!({
            "node": {"id": "b"},
            "staticResources": {"clusters": [2], "listeners": [3]},
            "socket": {"@type": "u"},
            "kept": null,
            "new": {"a": 1},
        });
        merge(&mut base, over);
        assert_eq!(
            base,
            json!({
                "node": {"id": "b", "cluster": "c"},
                "static_resources": {"clusters": [1, 2], "listeners": [3]},
                "socket": {"@type": "u"},
                "kept": 1,
                "new": {"a": 1},
            })
        );
    }
}
