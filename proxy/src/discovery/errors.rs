//! What control planes say that they cannot send, for as long as it is so and somebody asks for it.

use super::{
    Discovery,
    channels::Purpose,
    model::{Kind, Subscription, Wait},
};
use outrigger_xds::{accepted::Failure, resource::config_source::Origin};
use serde_json::Value;
use std::{collections::BTreeMap, time::SystemTime};

/// Resources of which it is remembered that they cannot be sent.
const RESOURCE_ERRORS_MAX: usize = 10_000;

/// The last word on each: by type, source and name, be they asked for by name or not.
#[derive(Default)]
pub(super) struct Errors(BTreeMap<Subscription, Failure>);

impl Errors {
    pub(super) fn of(&self, kind: Kind, origin: &Origin, name: &str) -> Option<&Failure> {
        self.0.get(&Subscription {
            kind,
            origin: origin.clone(),
            name: name.to_owned(),
        })
    }

    /// Those of one type from one source.
    pub(super) fn each(
        &self,
        kind: Kind,
        origin: &Origin,
    ) -> impl Iterator<Item = (&str, &Failure)> {
        let all = self.0.iter();
        let own = all.filter(move |(about, _)| about.kind == kind && about.origin == *origin);
        own.map(|(about, failure)| (about.name.as_str(), failure))
    }

    /// There is another word on these by now.
    pub(super) fn forget(&mut self, is_over: impl Fn(&Subscription) -> bool) {
        self.0.retain(|about, _| !is_over(about));
    }

    /// Nobody asks for the others any more.
    pub(super) fn keep_asked(&mut self, waits: &BTreeMap<Subscription, Wait>) {
        self.forget(|about| {
            let is_asked = if about.kind.is_whole() {
                waits.contains_key(&Subscription {
                    name: String::new(),
                    ..about.clone()
                })
            } else {
                waits.contains_key(about)
            };
            !is_asked
        });
    }

    fn note(&mut self, about: Subscription, failure: Failure) {
        if self.0.len() < RESOURCE_ERRORS_MAX || self.0.contains_key(&about) {
            self.0.insert(about, failure);
        }
    }
}

impl Discovery {
    /// A control plane cannot send these: what is there stays, and what is not is waited for no longer. Whether somebody did.
    pub(super) fn note_errors(
        &mut self,
        purpose: &Purpose,
        kind: Kind,
        errors: Vec<(String, String)>,
        version: &str,
    ) -> bool {
        let mut given_up = false;
        for (name, details) in errors {
            tracing::warn!(
                ?kind,
                name,
                details,
                "the control plane cannot send it, what is there stays"
            );
            let about = Subscription {
                kind,
                origin: purpose.origin(),
                name,
            };
            given_up |= self.model.is_waited_for(&about);
            self.model.stop_waiting(kind, &about.origin, &about.name);
            let failure = Failure {
                configuration: Value::Null,
                version: version.to_owned(),
                at: SystemTime::now(),
                details,
            };
            self.errors.note(about, failure);
        }
        given_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(name: String) -> Subscription {
        Subscription {
            kind: Kind::Endpoints,
            origin: Origin::Ads,
            name,
        }
    }

    fn failure(details: &str) -> Failure {
        Failure {
            configuration: Value::Null,
            version: String::new(),
            at: SystemTime::UNIX_EPOCH,
            details: details.to_owned(),
        }
    }

    #[test]
    fn errors_are_bounded_and_what_is_known_may_change() {
        let mut errors = Errors::default();
        for number in 0..=RESOURCE_ERRORS_MAX {
            errors.note(about(number.to_string()), failure("away"));
        }
        let too_many = RESOURCE_ERRORS_MAX.to_string();
        let of = |errors: &Errors, name: &str| {
            let failure = errors.of(Kind::Endpoints, &Origin::Ads, name);
            failure.map(|failure| failure.details.clone())
        };
        assert_eq!(of(&errors, &too_many), None);
        errors.note(about("0".to_owned()), failure("broken"));
        assert_eq!(of(&errors, "0"), Some("broken".to_owned()));
        // Of what nobody asks for nothing is kept, and there is room again.
        errors.keep_asked(&BTreeMap::new());
        errors.note(about(too_many.clone()), failure("away"));
        assert_eq!(of(&errors, &too_many), Some("away".to_owned()));
        assert_eq!(of(&errors, "0"), None);
    }
}
