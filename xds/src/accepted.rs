//! Resources of one type from one source, as they were last accepted.
//!
//! Whatever brought them (a file, a control plane), they are judged one by one: the good ones of an update take
//! effect, a bad one keeps its last good version and is remembered with what is wrong. It does no IO and knows no
//! clock.

use crate::problems::ConfigErrors;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};

/// A resource of an update, before it is accepted.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate<R> {
    /// Its name, as far as it has one.
    pub name: String,
    /// Its own version; empty is that of the update.
    pub version: String,
    /// As written.
    pub configuration: Value,
    /// What it means, or what is wrong with it.
    pub read: Result<R, ConfigErrors>,
}

/// What came at once.
#[derive(Debug, Clone, PartialEq)]
pub struct Update<R> {
    /// `version_info`.
    pub version: String,
    /// When it came.
    pub at: SystemTime,
    /// The resources.
    pub resources: Vec<Candidate<R>>,
    /// Names of those that are gone.
    pub removed: Vec<String>,
    /// What their absence means.
    pub scope: Scope,
}

/// What it means that an update does not have a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// It is gone: updates are whole (listeners, clusters).
    Whole,
    /// Nothing: who names it decides how long it lives (routes, endpoints, secrets).
    Named,
}

/// All that is known of a resource.
#[derive(Debug, Clone, PartialEq)]
pub struct State<R> {
    /// What is in effect; none if no version of it was ever good.
    pub good: Option<Good<R>>,
    /// What is wrong with the newest version, if anything is.
    pub error: Option<Failure>,
}

/// An accepted resource.
#[derive(Debug, Clone, PartialEq)]
pub struct Good<R> {
    /// The resource.
    pub resource: Arc<R>,
    /// Version of the update that last changed it.
    pub version: String,
    /// When that was.
    pub at: SystemTime,
}

/// Envoy's `UpdateFailureState`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// As written.
    pub configuration: Value,
    /// Version of the update that it came in.
    pub version: String,
    /// When that was.
    pub at: SystemTime,
    /// What is wrong, with places.
    pub details: String,
}

/// What an update changed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Names of resources that are new or other than before.
    pub changed: Vec<String>,
    /// Names of resources that are gone.
    pub removed: Vec<String>,
    /// Names of resources that were not accepted, and why; each line has a place.
    pub rejected: Vec<(String, String)>,
}

/// Resources of one type from one source.
#[derive(Debug, Clone, PartialEq)]
pub struct Accepted<R> {
    states: BTreeMap<String, State<R>>,
    /// Of the newest update.
    version: String,
    answered: bool,
}

impl<R> Default for Accepted<R> {
    fn default() -> Self {
        Self {
            states: BTreeMap::new(),
            version: String::new(),
            answered: false,
        }
    }
}

impl<R: PartialEq> Accepted<R> {
    /// Takes out what an update is about, so that it is judged beside the others; [`Self::put_back`] ends it.
    #[must_use]
    pub fn take_out(&mut self, update: &Update<R>) -> Self {
        let states = match update.scope {
            Scope::Whole => std::mem::take(&mut self.states),
            Scope::Named => {
                let coming = update.resources.iter().map(|coming| &coming.name);
                let about = coming.chain(&update.removed);
                about
                    .filter_map(|name| self.states.remove_entry(name))
                    .collect()
            }
        };
        Self {
            states,
            version: self.version.clone(),
            answered: self.answered,
        }
    }

    /// Takes back what was judged.
    pub fn put_back(&mut self, judged: Self) {
        self.states.extend(judged.states);
        (self.version, self.answered) = (judged.version, judged.answered);
    }

    /// Takes an update in. `check` judges what no resource can tell by itself.
    pub fn take(
        &mut self,
        update: Update<R>,
        check: &mut dyn FnMut(&R) -> Result<(), String>,
    ) -> Outcome {
        self.version.clone_from(&update.version);
        self.answered = true;
        let mut outcome = Outcome::default();
        let mut copies: BTreeMap<String, usize> = BTreeMap::new();
        for candidate in &update.resources {
            *copies.entry(candidate.name.clone()).or_default() += 1;
        }
        let removed: BTreeSet<&String> = update.removed.iter().collect();
        let is_absent = |name: &String| update.scope == Scope::Whole && !copies.contains_key(name);
        let gone = self
            .states
            .keys()
            .filter(|name| is_absent(name) || removed.contains(name));
        outcome.removed = gone.cloned().collect();
        for name in &outcome.removed {
            self.states.remove(name);
        }
        for candidate in update.resources {
            let read = candidate.read.map_err(|errors| errors.to_string());
            let once = match copies[&candidate.name] {
                1 => Ok(()),
                _ if candidate.name.is_empty() => Ok(()),
                count => Err(format!("written {count} times")),
            };
            let judged = once.and(read).and_then(|resource| {
                check(&resource)?;
                Ok(resource)
            });
            let name = candidate.name;
            let version = match &candidate.version {
                own if own.is_empty() => &update.version,
                own => own,
            };
            match judged {
                Ok(resource) => {
                    if self.accept(&name, resource, (version, update.at)) {
                        outcome.changed.push(name);
                    }
                }
                Err(details) => {
                    let failure = Failure {
                        configuration: candidate.configuration,
                        version: version.clone(),
                        at: update.at,
                        details: details.clone(),
                    };
                    self.fail(&name, failure);
                    outcome.rejected.push((name, details));
                }
            }
        }
        outcome
    }

    /// Whether it is another than before.
    fn accept(&mut self, name: &str, resource: R, (version, at): (&str, SystemTime)) -> bool {
        let state = self.states.entry(name.to_owned()).or_insert(State {
            good: None,
            error: None,
        });
        state.error = None;
        let same = state
            .good
            .as_ref()
            .is_some_and(|good| *good.resource == resource);
        if !same {
            state.good = Some(Good {
                resource: Arc::new(resource),
                version: version.to_owned(),
                at,
            });
        }
        !same
    }

    fn fail(&mut self, name: &str, failure: Failure) {
        if name.is_empty() {
            return;
        }
        let state = self.states.entry(name.to_owned()).or_insert(State {
            good: None,
            error: None,
        });
        state.error = Some(failure);
    }

    /// Whether any update ever came.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.answered
    }

    /// Version of the newest update.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// All that were ever named, by name.
    pub fn states(&self) -> impl Iterator<Item = (&str, &State<R>)> {
        let states = self.states.iter();
        states.map(|(name, state)| (name.as_str(), state))
    }

    /// What is in effect, by name.
    pub fn good(&self) -> impl Iterator<Item = &Good<R>> {
        self.states.values().filter_map(|state| state.good.as_ref())
    }

    /// What is in effect under a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<R>> {
        let good = self.states.get(name)?.good.as_ref()?;
        Some(&good.resource)
    }

    /// Forgets what nobody asks for any more.
    pub fn retain(&mut self, asked: impl Fn(&str) -> bool) {
        self.states.retain(|name, _| asked(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn update(version: &str, scope: Scope, resources: &[(&str, Result<u32, &str>)]) -> Update<u32> {
        let resources = resources.iter().map(|(name, read)| Candidate {
            name: (*name).into(),
            version: String::new(),
            configuration: json!(name),
            read: read.map_err(|error| ConfigErrors::one("field", error)),
        });
        Update {
            version: version.into(),
            at: SystemTime::UNIX_EPOCH,
            resources: resources.collect(),
            removed: Vec::new(),
            scope,
        }
    }

    /// Names, values and versions in effect.
    type Known<'a> = &'a [(&'a str, u32, &'a str)];

    fn take(accepted: &mut Accepted<u32>, update: Update<u32>) -> Outcome {
        accepted.take(update, &mut |resource| match resource {
            13 => Err("thirteen does not fit the others".into()),
            _ => Ok(()),
        })
    }

    fn outcome(changed: &[&str], removed: &[&str], rejected: &[(&str, &str)]) -> Outcome {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Outcome {
            changed: owned(changed),
            removed: owned(removed),
            rejected: rejected
                .iter()
                .map(|(name, why)| ((*name).to_owned(), (*why).to_owned()))
                .collect(),
        }
    }

    #[test]
    fn the_good_apply_and_the_bad_keep_their_last_good_version() {
        let mut known = Accepted::default();
        assert!(!known.is_answered());
        let steps: [(Update<u32>, Outcome, Known<'_>); 6] = [
            (
                update("1", Scope::Whole, &[("a", Ok(1)), ("b", Ok(1))]),
                outcome(&["a", "b"], &[], &[]),
                &[("a", 1, "1"), ("b", 1, "1")],
            ),
            // One is the same, one does not read, one is new and does not fit.
            (
                update(
                    "2",
                    Scope::Whole,
                    &[("a", Ok(1)), ("b", Err("no")), ("c", Ok(13))],
                ),
                outcome(
                    &[],
                    &[],
                    &[
                        ("b", "field: no"),
                        ("c", "thirteen does not fit the others"),
                    ],
                ),
                &[("a", 1, "1"), ("b", 1, "1")],
            ),
            (
                update("3", Scope::Whole, &[("b", Ok(3)), ("c", Ok(3))]),
                outcome(&["b", "c"], &["a"], &[]),
                &[("b", 3, "3"), ("c", 3, "3")],
            ),
            (
                update(
                    "4",
                    Scope::Whole,
                    &[("b", Ok(4)), ("b", Ok(5)), ("c", Ok(3))],
                ),
                outcome(
                    &[],
                    &[],
                    &[("b", "written 2 times"), ("b", "written 2 times")],
                ),
                &[("b", 3, "3"), ("c", 3, "3")],
            ),
            (
                update("5", Scope::Named, &[("c", Ok(5))]),
                outcome(&["c"], &[], &[]),
                &[("b", 3, "3"), ("c", 5, "5")],
            ),
            (
                update("6", Scope::Whole, &[]),
                outcome(&[], &["b", "c"], &[]),
                &[],
            ),
        ];
        for (update, expected, in_effect) in steps {
            let version = update.version.clone();
            assert_eq!(take(&mut known, update), expected, "update {version}");
            let good: Vec<_> = known
                .states()
                .filter_map(|(name, state)| {
                    let good = state.good.as_ref()?;
                    Some((name, *good.resource, good.version.as_str()))
                })
                .collect();
            assert_eq!(good, in_effect, "after update {version}");
            assert_eq!(known.version(), version);
        }
    }

    #[test]
    fn what_is_wrong_is_told_until_it_is_well() {
        let mut known = Accepted::default();
        let failure = |known: &Accepted<u32>| {
            let state = known.states().find(|(name, _)| *name == "a");
            state.and_then(|(_, state)| Some(state.error.as_ref()?.details.clone()))
        };
        take(&mut known, update("1", Scope::Named, &[("a", Err("no"))]));
        assert_eq!(failure(&known).as_deref(), Some("field: no"));
        assert_eq!(known.get("a"), None);
        take(&mut known, update("2", Scope::Named, &[("a", Ok(2))]));
        assert_eq!(failure(&known), None);
        take(&mut known, update("3", Scope::Named, &[("a", Ok(13))]));
        assert!(failure(&known).is_some());
        assert_eq!(known.get("a").map(|a| **a), Some(2));
        // The same as what is in effect: well again, and nothing changed.
        let outcome = take(&mut known, update("4", Scope::Named, &[("a", Ok(2))]));
        assert_eq!((outcome, failure(&known)), (Outcome::default(), None));
        known.retain(|name| name != "a");
        assert_eq!(known.get("a"), None);
    }

    #[test]
    fn what_has_no_name_is_refused_and_not_remembered() {
        let mut known = Accepted::default();
        let nameless = update("1", Scope::Whole, &[("", Err("must not be empty"))]);
        assert_eq!(take(&mut known, nameless).rejected.len(), 1);
        assert_eq!(known.states().count(), 0);
    }
}
