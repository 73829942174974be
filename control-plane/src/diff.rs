//! What is different between two versions, for people: resource by resource, field by field. What may be secret is left out.

use crate::store::Named;
use serde_json::Value;
use std::{collections::BTreeSet, fmt::Write};

/// Fields of one resource that are told.
const FIELDS_TOLD_MAX: usize = 200;
/// Letters of a value that are told.
const VALUE_LETTERS_MAX: usize = 200;

/// From one to another.
#[must_use]
pub fn text(old: &Named, new: &Named) -> String {
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let (mut text, mut counts) = (String::new(), [0_usize; 3]);
    for name in names {
        match (old.get(name), new.get(name)) {
            (None, _) => {
                counts[0] += 1;
                line(&mut text, format_args!("+ {name}"));
            }
            (_, None) => {
                counts[1] += 1;
                line(&mut text, format_args!("- {name}"));
            }
            (Some(old), Some(new)) if old != new => {
                counts[2] += 1;
                line(&mut text, format_args!("~ {name}"));
                fields(&mut text, name, old, new);
            }
            _ => {}
        }
    }
    let [added, removed, changed] = counts;
    line(
        &mut text,
        format_args!("{added} added, {removed} removed, {changed} changed"),
    );
    text
}

/// Writing to a text cannot fail.
fn line(text: &mut String, what: std::fmt::Arguments<'_>) {
    let _ = writeln!(text, "{what}");
}

fn fields(text: &mut String, name: &str, old: &Value, new: &Value) {
    if name.starts_with("Secret ") {
        line(text, format_args!("    (what is in it is left out)"));
        return;
    }
    let mut found = Vec::new();
    compare("", Some(old), Some(new), &mut found);
    for (place, old, new) in found.iter().take(FIELDS_TOLD_MAX) {
        let told = |value: &Option<Value>| {
            let value = value.as_ref()?;
            Some(if is_secret(place) {
                "(left out)".to_owned()
            } else {
                shortened(&value.to_string())
            })
        };
        match (told(old), told(new)) {
            (Some(old), Some(new)) => line(text, format_args!("    {place}: {old} -> {new}")),
            (None, Some(new)) => line(text, format_args!("  + {place}: {new}")),
            (Some(old), None) => line(text, format_args!("  - {place}: {old}")),
            (None, None) => {}
        }
    }
    if let Some(more) = found.len().checked_sub(FIELDS_TOLD_MAX + 1) {
        line(text, format_args!("    and {} more", more + 1));
    }
}

/// Keys and certificates may stand in place, in listeners and clusters, too.
fn is_secret(place: &str) -> bool {
    ["inline_string", "inline_bytes", "password"]
        .iter()
        .any(|field| place.contains(field))
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(VALUE_LETTERS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

type Found = Vec<(String, Option<Value>, Option<Value>)>;

fn compare(place: &str, old: Option<&Value>, new: Option<&Value>, found: &mut Found) {
    match (old, new) {
        (old, new) if old == new => {}
        (Some(Value::Object(old)), Some(Value::Object(new))) => {
            let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
            let dot = if place.is_empty() { "" } else { "." };
            for name in names {
                let place = format!("{place}{dot}{name}");
                compare(&place, old.get(name), new.get(name), found);
            }
        }
        (Some(Value::Array(old)), Some(Value::Array(new))) => lists(place, old, new, found),
        // An object as a whole may hold what is secret: it is told by its fields.
        (None, Some(Value::Object(fields))) => {
            each(place, fields, found, |value| (None, Some(value)));
        }
        (Some(Value::Object(fields)), None) => {
            each(place, fields, found, |value| (Some(value), None));
        }
        (None, Some(Value::Array(new))) => lists(place, &[], new, found),
        (Some(Value::Array(old)), None) => lists(place, old, &[], found),
        _ => found.push((place.to_owned(), old.cloned(), new.cloned())),
    }
}

fn each(
    place: &str,
    fields: &serde_json::Map<String, Value>,
    found: &mut Found,
    sides: impl Fn(&Value) -> (Option<&Value>, Option<&Value>),
) {
    if fields.is_empty() {
        let empty = Value::Object(fields.clone());
        let (old, new) = sides(&empty);
        found.push((place.to_owned(), old.cloned(), new.cloned()));
    }
    for (name, value) in fields {
        let (old, new) = sides(value);
        compare(&format!("{place}.{name}"), old, new, found);
    }
}

/// What both begin and end with is the same, whatever came between.
fn lists(place: &str, old: &[Value], new: &[Value], found: &mut Found) {
    if old.is_empty() && new.is_empty() {
        return;
    }
    let begin = old.iter().zip(new).take_while(|(one, other)| one == other);
    let begin = begin.count();
    let rest = (&old[begin..], &new[begin..]);
    let end = rest.0.iter().rev().zip(rest.1.iter().rev());
    let end = end.take_while(|(one, other)| one == other).count();
    let (old, new) = (&rest.0[..rest.0.len() - end], &rest.1[..rest.1.len() - end]);
    for index in 0..old.len().max(new.len()) {
        let place = format!("{place}[{}]", begin + index);
        compare(&place, old.get(index), new.get(index), found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn named(resources: &[(&str, Value)]) -> Named {
        let resources = resources.iter().cloned();
        resources
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    #[test]
    fn what_is_different_is_told_field_by_field() {
        let old = named(&[
            (
                "Cluster a",
                json!({"connect_timeout": "5s", "name": "a", "hosts": [{"port": 1}, {"port": 2}, {"port": 4}]}),
            ),
            ("Cluster gone", json!({})),
            ("Fleet same", json!({"spec": 1})),
            (
                "Listener edge",
                json!({"tls": {"key": {"inline_string": "old key"}}, "name": "edge", "none": []}),
            ),
            ("Secret front", json!({"key": "old secret"})),
        ]);
        let new = named(&[
            (
                "Cluster a",
                json!({"connect_timeout": "6s", "name": "a", "hosts": [{"port": 1}, {"port": 2}, {"port": 3}, {"port": 4}], "limits": {"requests": {"max": 7}}}),
            ),
            ("Cluster new", json!({})),
            ("Fleet same", json!({"spec": 1})),
            (
                "Listener edge",
                json!({"tls": {"key": {"inline_string": "new key"}}, "password": {"a": "b"}, "none": [[]]}),
            ),
            ("Secret front", json!({"key": "new secret"})),
        ]);
        let expected = "\
~ Cluster a
    connect_timeout: \"5s\" -> \"6s\"
  + hosts[2].port: 3
  + limits.requests.max: 7
- Cluster gone
+ Cluster new
~ Listener edge
  - name: \"edge\"
  + password.a: (left out)
    tls.key.inline_string: (left out) -> (left out)
~ Secret front
    (what is in it is left out)
1 added, 1 removed, 3 changed
";
        assert_eq!(text(&old, &new), expected);
        assert_eq!(text(&old, &old), "0 added, 0 removed, 0 changed\n");
    }

    #[test]
    fn what_is_told_has_an_end() {
        let many = |base: usize| {
            let fields = (0..300).map(|index| (format!("f{index}"), json!(base + index)));
            named(&[("Cluster a", Value::Object(fields.collect()))])
        };
        let text = text(&many(0), &many(1));
        assert!(text.contains("    and 100 more\n"), "{text}");
        assert_eq!(text.lines().count(), FIELDS_TOLD_MAX + 3);
        assert_eq!(shortened(&"ä".repeat(300)).chars().count(), 201);
    }
}
