//! Resources of control planes: what they bring, and what they are told of that.
//!
//! Streams themselves are somebody else's, who hands in [`News`] and carries out a [`Turn`].

use super::{
    Discovery,
    channels::Purpose,
    model::{Kind, Model, Subscription},
    stats::Event,
};
use outrigger_xds::{
    accepted::{Accepted, Outcome},
    load::discovery::{Response, Unread},
    problems::ConfigErrors,
    resource::config_source::Origin,
    subscription::{Answer, Lapse, Received, Request, Sent},
};
use std::{collections::BTreeSet, time::Instant};

/// What happened to the stream.
#[derive(Debug)]
pub enum News {
    /// It is open.
    Opened,
    /// The server is there.
    Connected,
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
        Kind::Runtimes | Kind::Endpoints | Kind::Routes | Kind::Secrets | Kind::Extensions => {
            Vec::new()
        }
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
    /// Whether what is asked for may have changed since it was last looked at.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.stale
    }

    /// Takes news of a stream in; whether what is to be in effect may be another now. A stream that is none any more has
    /// nothing to say.
    pub fn hear(&mut self, id: u64, news: News, now: Instant) -> bool {
        let Some(line) = self.lines.get(id) else {
            return false;
        };
        match news {
            News::Opened => {
                line.subscriptions.opened();
                // What it cannot send it says anew.
                let purpose = line.purpose();
                self.errors.forget(|about| purpose.brings(about));
            }
            News::Connected => line.connected(true),
            News::Broken => {
                line.connected(false);
                line.subscriptions.broken();
                let purpose = line.purpose();
                self.count_failure(&purpose);
            }
            News::Came(answer) => {
                line.connected(true);
                let received = line.subscriptions.received(answer, now);
                return received.is_some_and(|received| self.receive(id, received, now));
            }
            News::Woken => {}
        }
        false
    }

    fn count_failure(&self, purpose: &Purpose) {
        for kind in Kind::ALL {
            self.count_each(&self.asked_by(purpose, kind), Event::Failure);
        }
    }

    fn receive(&mut self, id: u64, received: Received, now: Instant) -> bool {
        let Some(purpose) = self.lines.get(id).map(|line| line.purpose()) else {
            return false;
        };
        let (kind, origin) = (received.kind, purpose.origin());
        self.count_each(&self.asked_by(&purpose, kind), Event::Attempt);
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
                given_up |= self.lacks(&purpose, kind, &name);
            }
        }
        let is_told = |name: &String| received.whole.is_some() || about.contains(name);
        self.errors
            .forget(|about| about.kind == kind && purpose.brings(about) && is_told(&about.name));
        given_up |= self.note_errors(&purpose, kind, received.errors, &received.version);
        let response = Response {
            version: received.version,
            resources: received.resources.into_iter().filter_map(unread).collect(),
            removed: gone,
        };
        let outcome = self.take(kind, &origin, response);
        self.tell(kind, &origin, &outcome, Some(&about));
        given_up |= self.fail(&purpose, kind, &outcome);
        // They were logged, and the control plane is told: nobody collects them.
        self.problems.clear();
        if let Some(line) = self.lines.get(id) {
            line.subscriptions
                .judged(received.receipt, &outcome.rejected, now);
        }
        given_up || !was_heard || is_change(&outcome)
    }

    /// Nobody waits for what was rejected, as in Envoy; whether somebody did. What has no name may be any of them.
    fn fail(&mut self, purpose: &Purpose, kind: Kind, outcome: &Outcome) -> bool {
        if kind.is_whole() {
            return false;
        }
        let is_rejected = |asked: &Subscription| {
            let mut rejected = outcome.rejected.iter();
            rejected.any(|(name, _)| name.is_empty() || *name == asked.name)
        };
        let mut given_up = self.asked_by(purpose, kind);
        given_up.retain(|asked| is_rejected(asked) && !self.model.is_there(asked));
        for asked in &given_up {
            let name = &asked.name;
            tracing::warn!(
                ?kind,
                name,
                "its first version was rejected, going on without it"
            );
            self.model.stop_waiting(kind, &purpose.origin(), name);
        }
        !given_up.is_empty()
    }

    /// The control plane has no such resource; whether somebody waited for it. As in Envoy, what is there stays there.
    fn lacks(&mut self, purpose: &Purpose, kind: Kind, name: &str) -> bool {
        let asked = self.asked_by(purpose, kind);
        let Some(asked) = asked.into_iter().find(|asked| asked.name == name) else {
            return false;
        };
        if self.model.is_there(&asked) && !kind.is_revocable() {
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
        self.model.give_up(kind, &purpose.origin(), name);
        true
    }

    /// What time has brought about; whether what is to be in effect may be another now.
    pub(super) fn lapse(&mut self, now: Instant) -> bool {
        let mut ended = Vec::new();
        for line in self.lines.each() {
            for lapse in line.subscriptions.lapse(now) {
                let purpose = line.purpose();
                let (Lapse::Missing(kind, name) | Lapse::Expired(kind, name)) = &lapse;
                self.errors.forget(|about| {
                    about.kind == *kind && about.name == *name && purpose.brings(about)
                });
                match lapse {
                    Lapse::Missing(kind, name) => {
                        tracing::warn!(?kind, name, "asked for, and does not exist");
                    }
                    Lapse::Expired(kind, name) => {
                        tracing::warn!(?kind, name, "its life is over");
                        let version = line.subscriptions.version(kind).to_owned();
                        ended.push((purpose.origin(), kind, (name, version)));
                    }
                }
            }
        }
        let any = !ended.is_empty();
        for (origin, kind, ended) in ended {
            self.end(kind, &origin, ended);
        }
        any
    }

    fn end(&mut self, kind: Kind, origin: &Origin, (name, version): (String, String)) {
        if !kind.is_whole() {
            self.model.give_up(kind, origin, &name);
            self.stale = true;
            return;
        }
        let response = Response {
            version,
            resources: Vec::new(),
            removed: vec![name],
        };
        self.take(kind, origin, response);
    }

    /// What is to be said now on a stream, and when to come again.
    pub fn turn(&mut self, id: u64, now: Instant) -> Turn {
        let Some(line) = self.lines.get(id) else {
            return Turn::default();
        };
        Turn {
            requests: line.requests(now),
            is_held_back: line.held_back(),
            at: line.subscriptions.deadline(),
        }
    }
}

fn is_change(outcome: &Outcome) -> bool {
    !outcome.changed.is_empty() || !outcome.removed.is_empty()
}
