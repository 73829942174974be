//! Resources of a control plane: what it is asked for, what it brings, and what it is told of that.
//!
//! The stream itself is somebody else's, who hands in [`News`] and carries out a [`Turn`].

use super::{
    Discovery,
    model::{Kind, Model, Subscription},
    stats::Event,
};
use outrigger_xds::{
    accepted::{Accepted, Failure, Outcome},
    load::discovery::{Response, Unread},
    problems::ConfigErrors,
    resource::config_source::Origin,
    subscription::{Answer, Lapse, Received, Request, Sent, Subscriptions},
};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    time::{Instant, SystemTime},
};

/// Resources of which it is remembered that the control plane cannot send them.
const RESOURCE_ERRORS_MAX: usize = 10_000;

/// What happened to the stream.
#[derive(Debug)]
pub enum News {
    /// It is open.
    Opened,
    /// It is gone, or could not be opened.
    Broken,
    /// It brought something.
    Came(Answer),
    /// Nothing; but there may be something to say.
    Woken,
}

/// What is to be done.
#[derive(Debug, Default)]
pub struct Turn {
    /// Sent, in this order.
    pub requests: Vec<Request>,
    /// Whether more is to be sent later, before anything else is taken.
    pub is_held_back: bool,
    /// When it is my turn again although nothing happens.
    pub at: Option<Instant>,
}

/// Names of all that is known of one type.
fn known<R: PartialEq>(accepted: &Accepted<R>) -> impl Iterator<Item = String> {
    accepted.states().map(|(name, _)| name.to_owned())
}

/// What is gone although nobody says so, since what came is all that there is.
fn absent(model: &Model, kind: Kind, whole: Option<&BTreeSet<String>>) -> Vec<String> {
    let Some(whole) = whole else {
        return Vec::new();
    };
    let mut names: Vec<String> = match kind {
        Kind::Clusters => known(&model.clusters).collect(),
        Kind::Listeners => known(&model.listeners).collect(),
        Kind::Endpoints | Kind::Routes | Kind::Secrets => Vec::new(),
    };
    names.retain(|name| !whole.contains(name));
    names
}

fn unread(sent: Sent) -> Option<Unread> {
    let any = sent.body?.to_json();
    Some(Unread {
        any: match sent.error {
            None => any,
            Some(error) => Err(ConfigErrors::one("", error)),
        },
        name: sent.name,
        version: sent.version,
    })
}

impl Discovery {
    /// There is another control plane, or none any more.
    pub(super) fn change_control_plane(&mut self) {
        self.errors.clear();
        let ads = self.model.bootstrap.ads.as_ref();
        self.ads = ads.map(|ads| {
            let limit = ads.rate_limit.unwrap_or_default();
            let mut subscriptions = Subscriptions::new(ads.protocol, limit, Instant::now());
            // As if it were from the disk: it is told the names, sends all of it anew, and says what is gone.
            for (kind, name) in self.model.good_of_ads() {
                subscriptions.remember(kind, name, String::new());
            }
            subscriptions
        });
    }

    /// Asks it for what is named now.
    pub(super) fn ask_control_plane(&mut self) {
        let Some(ads) = &mut self.ads else { return };
        for kind in Kind::ALL {
            ads.want(kind, self.model.asked_of_ads(kind));
        }
    }

    /// Whether there is something to say to it.
    #[must_use]
    pub fn has_request(&self) -> bool {
        self.ads.as_ref().is_some_and(Subscriptions::has_request)
    }

    /// Whether what is asked for may have changed since it was last looked at.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.stale
    }

    /// Takes news in; whether what is to be in effect may be another now.
    pub fn hear(&mut self, news: News, now: Instant) -> bool {
        let Some(ads) = &mut self.ads else {
            return false;
        };
        match news {
            News::Opened => ads.opened(),
            News::Broken => {
                ads.broken();
                self.count_failure();
            }
            News::Came(answer) => {
                let received = ads.received(answer, now);
                return received.is_some_and(|received| self.receive(received, now));
            }
            News::Woken => {}
        }
        false
    }

    fn count_failure(&mut self) {
        for kind in Kind::ALL {
            self.count_all(kind, &Origin::Ads, Event::Failure);
        }
    }

    fn receive(&mut self, received: Received, now: Instant) -> bool {
        let kind = received.kind;
        self.count_all(kind, &Origin::Ads, Event::Attempt);
        let was_heard = self.model.has_heard(kind);
        let came = received.resources.iter().map(|sent| sent.name.clone());
        let mut about: BTreeSet<String> = came.collect();
        about.extend(received.removed.iter().cloned());
        let mut gone = absent(&self.model, kind, received.whole.as_ref());
        let mut given_up = false;
        for name in received.removed {
            if kind.is_whole() {
                gone.push(name);
            } else {
                given_up |= self.lacks(kind, &name);
            }
        }
        let is_told = |name: &String| received.whole.is_some() || about.contains(name);
        self.errors
            .retain(|(of, name), _| *of != kind || !is_told(name));
        given_up |= self.note_errors(kind, received.errors, &received.version);
        let response = Response {
            version: received.version,
            resources: received.resources.into_iter().filter_map(unread).collect(),
            removed: gone,
        };
        let outcome = self.take(kind, &Origin::Ads, response);
        self.tell(kind, &Origin::Ads, &outcome, Some(&about));
        given_up |= self.fail(kind, &outcome);
        // They were logged, and the control plane is told: nobody collects them.
        self.problems.clear();
        if let Some(ads) = &mut self.ads {
            ads.judged(received.receipt, &outcome.rejected, now);
        }
        given_up || !was_heard || is_change(&outcome)
    }

    /// Nobody waits for what was rejected, as in Envoy; whether somebody did. What has no name may be any of them.
    fn fail(&mut self, kind: Kind, outcome: &Outcome) -> bool {
        if kind.is_whole() {
            return false;
        }
        let is_rejected = |asked: &Subscription| {
            let mut rejected = outcome.rejected.iter();
            rejected.any(|(name, _)| name.is_empty() || *name == asked.name)
        };
        let mut given_up = self.subscriptions(kind, &Origin::Ads);
        given_up.retain(|asked| is_rejected(asked) && !self.model.is_there(asked));
        for asked in &given_up {
            let name = &asked.name;
            tracing::warn!(
                ?kind,
                name,
                "its first version was rejected, going on without it"
            );
            self.model.stop_waiting(kind, name);
        }
        !given_up.is_empty()
    }

    /// The control plane cannot send these: what is there stays, and what is not is waited for no longer. Whether somebody did.
    fn note_errors(&mut self, kind: Kind, errors: Vec<(String, String)>, version: &str) -> bool {
        let mut given_up = false;
        for (name, details) in errors {
            tracing::warn!(
                ?kind,
                name,
                details,
                "the control plane cannot send it, what is there stays"
            );
            given_up |= self.model.is_waited_for(kind, &name);
            self.model.stop_waiting(kind, &name);
            if self.errors.len() >= RESOURCE_ERRORS_MAX {
                continue;
            }
            let failure = Failure {
                configuration: Value::Null,
                version: version.to_owned(),
                at: SystemTime::now(),
                details,
            };
            self.errors.insert((kind, name), failure);
        }
        given_up
    }

    /// The control plane has no such resource; whether somebody waited for it. As in Envoy, what is there stays there.
    fn lacks(&mut self, kind: Kind, name: &str) -> bool {
        let asked = self.subscriptions(kind, &Origin::Ads);
        let Some(asked) = asked.into_iter().find(|asked| asked.name == name) else {
            return false;
        };
        if self.model.is_there(&asked) {
            tracing::warn!(
                ?kind,
                name,
                "removed by the control plane, stays since it is in use"
            );
            return false;
        }
        tracing::warn!(
            ?kind,
            name,
            "the control plane does not have it, going on without it"
        );
        self.model.give_up(kind, name);
        true
    }

    /// What time has brought about; whether what is to be in effect may be another now.
    pub(super) fn lapse(&mut self, now: Instant) -> bool {
        let Some(ads) = &mut self.ads else {
            return false;
        };
        let mut any = false;
        for lapse in ads.lapse(now) {
            match lapse {
                Lapse::Missing(kind, name) => {
                    tracing::warn!(?kind, name, "asked for, and does not exist");
                }
                Lapse::Expired(kind, name) => {
                    tracing::warn!(?kind, name, "its life is over");
                    self.end(kind, name);
                    any = true;
                }
            }
        }
        any
    }

    fn end(&mut self, kind: Kind, name: String) {
        if !kind.is_whole() {
            self.model.give_up(kind, &name);
            self.stale = true;
            return;
        }
        let version = self.ads.as_ref().map(|ads| ads.version(kind).to_owned());
        let response = Response {
            version: version.unwrap_or_default(),
            resources: Vec::new(),
            removed: vec![name],
        };
        self.take(kind, &Origin::Ads, response);
    }

    /// What is to be said now, and when to come again.
    pub fn turn(&mut self, now: Instant) -> Turn {
        let Some(ads) = &mut self.ads else {
            return Turn::default();
        };
        let mut requests = Vec::new();
        while let Some(request) = ads.next_request(now) {
            requests.push(request);
        }
        let is_held_back = ads.has_request();
        if is_held_back {
            metrics::counter!("envoy_control_plane_rate_limit_enforced").increment(1);
        }
        metrics::gauge!("envoy_control_plane_pending_requests")
            .set(f64::from(u8::from(is_held_back)));
        Turn {
            requests,
            is_held_back,
            at: ads.deadline(),
        }
    }
}

fn is_change(outcome: &Outcome) -> bool {
    !outcome.changed.is_empty() || !outcome.removed.is_empty()
}
