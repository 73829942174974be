//! The runtime as requests see it: shares and numbers by key, which change while requests go on.
//!
//! What reads a key gets its slot when the configuration is built; a request then reads one atomic, and no name. Changes go
//! through a lock that no request takes.

use crate::matching::chance;
use outrigger_xds::resource::{
    matching::Fraction,
    runtime::{RuntimeLayer, RuntimeValue},
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// Keys that the admin may set.
pub const RUNTIME_OVERRIDES_MAX: usize = 1_000;
/// No whole number was given.
const NO_NUMBER: u64 = u64::MAX;

/// What a key says, ready to be read.
#[derive(Debug)]
struct Slot {
    /// Numerator and denominator; 0 is nothing.
    share: AtomicU64,
    number: AtomicU64,
}

impl Slot {
    fn new(value: Option<&RuntimeValue>) -> Self {
        let slot = Self {
            share: AtomicU64::new(0),
            number: AtomicU64::new(NO_NUMBER),
        };
        slot.set(value);
        slot
    }

    fn set(&self, value: Option<&RuntimeValue>) {
        let share = value.and_then(RuntimeValue::share);
        let share = share.map_or(0, |(of, all)| u64::from(of) << 32 | u64::from(all));
        self.share.store(share, Relaxed);
        let number = value.and_then(|value| value.integer);
        self.number.store(number.unwrap_or(NO_NUMBER), Relaxed);
    }
}

/// A share of requests: as the runtime says, else as configured.
#[derive(Debug, Clone)]
pub struct Share {
    default: (u32, u32),
    slot: Option<Arc<Slot>>,
}

impl Share {
    /// Whether chance says yes; all and none are certain.
    #[must_use]
    pub fn draw(&self) -> bool {
        let said = self
            .slot
            .as_ref()
            .map_or(0, |slot| slot.share.load(Relaxed));
        let (numerator, denominator) = match said {
            0 => self.default,
            said => ((said >> 32) as u32, said as u32),
        };
        chance(numerator, denominator)
    }
}

/// A whole number: as the runtime says, else as configured.
#[derive(Debug, Clone)]
pub struct Number {
    default: u64,
    slot: Option<Arc<Slot>>,
}

impl Number {
    /// What it is now.
    #[must_use]
    pub fn get(&self) -> u64 {
        let slot = self.slot.as_ref();
        match slot.map_or(NO_NUMBER, |slot| slot.number.load(Relaxed)) {
            NO_NUMBER => self.default,
            said => said,
        }
    }
}

/// A layer as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Its name.
    pub name: String,
    /// Its values; none of the admin's, which are kept here.
    pub values: Option<BTreeMap<String, RuntimeValue>>,
}

/// Why something could not be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotModified {
    /// In Envoy's words.
    #[error("No admin layer specified")]
    NoAdminLayer,
    /// [`RUNTIME_OVERRIDES_MAX`].
    #[error("more than {RUNTIME_OVERRIDES_MAX} keys")]
    TooMany,
}

/// All layers of a process.
#[derive(Debug)]
pub struct Runtime(Mutex<State>);

#[derive(Debug)]
struct State {
    layers: Vec<Layer>,
    /// What the admin was told; it outlives a push.
    admin: BTreeMap<String, RuntimeValue>,
    slots: HashMap<String, Weak<Slot>>,
}

impl Default for Runtime {
    fn default() -> Self {
        let admin = Layer {
            name: RuntimeLayer::admin().name,
            values: None,
        };
        Self(Mutex::new(State {
            layers: vec![admin],
            admin: BTreeMap::new(),
            slots: HashMap::new(),
        }))
    }
}

impl State {
    fn values<'a>(&'a self, layer: &'a Layer) -> &'a BTreeMap<String, RuntimeValue> {
        layer.values.as_ref().unwrap_or(&self.admin)
    }

    /// What counts of a key.
    fn get(&self, key: &str) -> Option<&RuntimeValue> {
        let mut layers = self.layers.iter().rev();
        layers.find_map(|layer| self.values(layer).get(key))
    }

    fn publish(&mut self) {
        self.slots.retain(|_, slot| slot.strong_count() > 0);
        for (key, slot) in &self.slots {
            if let Some(slot) = slot.upgrade() {
                slot.set(self.get(key));
            }
        }
        let keys: BTreeSet<&String> = self
            .layers
            .iter()
            .flat_map(|layer| self.values(layer).keys())
            .collect();
        metrics::counter!("envoy_runtime_load_success").increment(1);
        metrics::gauge!("envoy_runtime_num_keys").set(keys.len() as f64);
        metrics::gauge!("envoy_runtime_num_layers").set(self.layers.len() as f64);
        let is_overridden = !self.admin.is_empty();
        metrics::gauge!("envoy_runtime_admin_overrides_active")
            .set(f64::from(u8::from(is_overridden)));
    }
}

impl Runtime {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Without a key nothing can change it.
    fn slot(&self, key: &str) -> Option<Arc<Slot>> {
        if key.is_empty() {
            return None;
        }
        let mut state = self.state();
        let known = state.slots.get(key).and_then(Weak::upgrade);
        Some(known.unwrap_or_else(|| {
            if state.slots.len().is_power_of_two() {
                state.slots.retain(|_, slot| slot.strong_count() > 0);
            }
            let slot = Arc::new(Slot::new(state.get(key)));
            state.slots.insert(key.to_owned(), Arc::downgrade(&slot));
            slot
        }))
    }

    /// A share that this key may change.
    #[must_use]
    pub fn share(&self, key: &str, default: (u32, u32)) -> Share {
        let slot = self.slot(key);
        Share { default, slot }
    }

    /// The same of a resource.
    #[must_use]
    pub fn share_of(&self, fraction: &Fraction) -> Share {
        let default = (fraction.numerator, fraction.denominator);
        self.share(&fraction.runtime_key, default)
    }

    /// A number that this key may change.
    #[must_use]
    pub fn number(&self, key: &str, default: u64) -> Number {
        let slot = self.slot(key);
        Number { default, slot }
    }

    /// Has these layers from now on; the last that has a key counts. What the admin was told stays.
    pub fn configure(&self, layers: Vec<Layer>) {
        let mut state = self.state();
        if state.layers != layers {
            state.layers = layers;
            state.publish();
        }
    }

    /// The admin sets these; an empty text takes what it set before back.
    ///
    /// # Errors
    /// Nothing was changed.
    pub fn modify(&self, changes: &[(String, String)]) -> Result<(), NotModified> {
        let mut state = self.state();
        if state.layers.iter().all(|layer| layer.values.is_some()) {
            return Err(NotModified::NoAdminLayer);
        }
        let mut admin = state.admin.clone();
        for (key, text) in changes {
            if text.is_empty() {
                admin.remove(key);
            } else {
                admin.insert(key.clone(), RuntimeValue::of_text(text));
            }
        }
        if admin.len() > RUNTIME_OVERRIDES_MAX {
            return Err(NotModified::TooMany);
        }
        state.admin = admin;
        state.publish();
        Ok(())
    }

    /// The body of `/runtime`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let state = self.state();
        let names: Vec<&String> = state.layers.iter().map(|layer| &layer.name).collect();
        let mut entries: BTreeMap<&String, Vec<&str>> = BTreeMap::new();
        for (index, layer) in state.layers.iter().enumerate() {
            for (key, value) in state.values(layer) {
                let values = entries.entry(key);
                let values = values.or_insert_with(|| vec![""; names.len()]);
                values[index] = &value.text;
            }
        }
        let shown = entries.into_iter().map(|(key, values)| {
            let last = values.iter().rev().find(|value| !value.is_empty());
            let shown = json!({ "layer_values": values, "final_value": last.unwrap_or(&"") });
            (key.clone(), shown)
        });
        let entries: serde_json::Map<String, Value> = shown.collect();
        json!({ "layers": names, "entries": entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(name: &str, values: &[(&str, &str)]) -> Layer {
        let values = values
            .iter()
            .map(|(key, text)| ((*key).to_owned(), RuntimeValue::of_text(text)));
        Layer {
            name: name.to_owned(),
            values: Some(values.collect()),
        }
    }

    fn admin() -> Layer {
        Layer {
            name: "adm".to_owned(),
            values: None,
        }
    }

    fn change(key: &str, text: &str) -> Vec<(String, String)> {
        vec![(key.to_owned(), text.to_owned())]
    }

    #[test]
    fn the_last_layer_that_has_a_key_counts_wherever_it_was_read() {
        let runtime = Runtime::default();
        let (share, number) = (runtime.share("a", (0, 100)), runtime.number("a", 7));
        let seen = |draws: bool, is: u64| assert_eq!((share.draw(), number.get()), (draws, is));
        seen(false, 7);
        runtime.configure(vec![layer("base", &[("a", "100"), ("b", "1")]), admin()]);
        seen(true, 100);
        runtime.configure(vec![
            layer("base", &[("a", "100")]),
            layer("rt", &[("a", "0")]),
            admin(),
        ]);
        seen(false, 0);
        runtime
            .modify(&change("a", "{numerator: 1000000, denominator: MILLION}"))
            .unwrap();
        seen(true, 7);
        // Read anew, it is the same.
        assert!(runtime.share("a", (0, 100)).draw());
        runtime.modify(&change("a", "")).unwrap();
        seen(false, 0);
        runtime.modify(&change("a", "nonsense")).unwrap();
        seen(false, 7);
        assert_eq!(runtime.number("", 3).get(), 3);
    }

    #[test]
    fn it_is_shown_as_by_envoy() {
        let runtime = Runtime::default();
        assert_eq!(
            runtime.to_json(),
            json!({ "layers": ["admin"], "entries": {} })
        );
        runtime.configure(vec![layer("base", &[("a", "1")]), admin()]);
        runtime.modify(&change("a", "2")).unwrap();
        let expected = json!({
            "layers": ["base", "adm"],
            "entries": { "a": { "layer_values": ["1", "2"], "final_value": "2" } },
        });
        assert_eq!(runtime.to_json(), expected);
    }

    #[test]
    fn what_the_admin_sets_is_bounded_and_needs_its_layer() {
        let runtime = Runtime::default();
        let many = |count: usize| -> Vec<_> {
            let each = (0..count).map(|key| (key.to_string(), "1".to_owned()));
            each.collect()
        };
        runtime.modify(&many(RUNTIME_OVERRIDES_MAX)).unwrap();
        let one_more = runtime.modify(&change("one more", "1"));
        assert_eq!(one_more, Err(NotModified::TooMany));
        runtime.configure(vec![layer("base", &[])]);
        let none = runtime.modify(&change("a", "1"));
        assert_eq!(none.unwrap_err().to_string(), "No admin layer specified");
    }

    #[test]
    fn slots_of_what_is_gone_are_forgotten() {
        let runtime = Runtime::default();
        for key in 0..100 {
            drop(runtime.share(&key.to_string(), (1, 100)));
        }
        runtime.modify(&change("a", "1")).unwrap();
        assert!(runtime.state().slots.is_empty());
    }
}
