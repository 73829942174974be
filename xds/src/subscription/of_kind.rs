//! The subscriptions to one type of resources.

use super::{
    Answer, Ask, DOES_NOT_EXIST_AFTER, ERROR_BYTES_MAX, Kind, Lapse, Protocol, Receipt, Received,
    Request, Sent, Status, TTL_MAX, WILDCARD,
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

/// A resource that is there.
#[derive(Debug)]
struct Known {
    version: String,
    /// A newer version that was not accepted.
    refused: Option<String>,
    /// When its life is over; none is never.
    until: Option<Instant>,
}

#[derive(Debug)]
struct Reply {
    nonce: String,
    error: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct OfKind {
    wanted: BTreeSet<String>,
    /// What the server knows of that, on this stream.
    told: BTreeSet<String>,
    /// Given up and wanted again before the server was told.
    again: BTreeSet<String>,
    /// Whether the first request was sent on this stream.
    begun: bool,
    /// Of the last answer that was accepted as a whole.
    pub(super) version: String,
    /// A part of a later answer was accepted: what is there is no more what that version says.
    strayed: bool,
    /// Of the last answer on this stream.
    nonce: String,
    replies: VecDeque<Reply>,
    known: BTreeMap<String, Known>,
    /// Asked for on this stream and not there, since when.
    awaited: BTreeMap<String, Instant>,
    missing: BTreeSet<String>,
}

/// The names in a request; to ask for all is to name nobody.
fn listed(names: &BTreeSet<String>) -> Vec<String> {
    if names.len() == 1 && names.contains(WILDCARD) {
        return Vec::new();
    }
    names.iter().cloned().collect()
}

impl OfKind {
    pub(super) fn want(&mut self, names: BTreeSet<String>) {
        let all = names.contains(WILDCARD);
        for gone in self.wanted.difference(&names) {
            self.awaited.remove(gone);
            self.missing.remove(gone);
        }
        for new in names.difference(&self.wanted) {
            if self.told.contains(new) {
                self.again.insert(new.clone());
            }
        }
        self.again.retain(|name| names.contains(name));
        self.known.retain(|name, _| all || names.contains(name));
        self.wanted = names;
    }

    pub(super) fn remember(&mut self, name: String, version: String) {
        let known = Known {
            version,
            refused: None,
            until: None,
        };
        self.known.insert(name, known);
    }

    pub(super) fn version_of(&self, name: &str) -> Option<&str> {
        self.known.get(name).map(|known| &*known.version)
    }

    pub(super) fn is_mortal(&self, name: &str) -> bool {
        let known = self.known.get(name);
        known.is_some_and(|known| known.until.is_some())
    }

    pub(super) fn status(&self, name: &str) -> Status {
        if self.known.contains_key(name) {
            Status::Acked
        } else if self.missing.contains(name) {
            Status::DoesNotExist
        } else {
            Status::Requested
        }
    }

    /// Nothing was said yet on the stream that is to come.
    pub(super) fn begin(&mut self) {
        self.begun = false;
        self.nonce.clear();
        self.told.clear();
        self.again.clear();
        self.replies.clear();
        self.awaited.clear();
    }

    fn is_wanted(&self, name: &str) -> bool {
        self.wanted.contains(WILDCARD) || self.wanted.contains(name)
    }

    pub(super) fn received(
        &mut self,
        kind: Kind,
        protocol: Protocol,
        mut answer: Answer,
        now: Instant,
    ) -> Option<Received> {
        if !self.begun {
            return None;
        }
        self.nonce.clone_from(&answer.nonce);
        if self.wanted.is_empty() {
            if protocol == Protocol::State {
                self.version = answer.version;
            }
            self.replies.push_back(Reply {
                nonce: answer.nonce,
                error: None,
            });
            return None;
        }
        // What has no name is for those who judge: it is wrong.
        answer
            .resources
            .retain(|sent| sent.name.is_empty() || self.is_wanted(&sent.name));
        answer.removed.retain(|name| self.is_wanted(name));
        answer.errors.retain(|(name, _)| self.is_wanted(name));
        let whole = whole(kind, protocol, &answer);
        let absent = self.absent(whole.as_ref());
        let (beats, resources): (Vec<_>, Vec<_>) = answer
            .resources
            .into_iter()
            .partition(|sent| sent.body.is_none());
        for beat in beats {
            self.beat(&beat, now);
        }
        for sent in &resources {
            self.awaited.remove(&sent.name);
            self.missing.remove(&sent.name);
        }
        for name in &answer.removed {
            self.awaited.remove(name);
            if !self.wanted.contains(WILDCARD) {
                self.missing.insert(name.clone());
            }
        }
        for (name, _) in &answer.errors {
            self.awaited.remove(name);
            self.missing.remove(name);
        }
        let receipt = self.receipt(kind, &resources, (&answer.version, answer.nonce));
        let removed = answer.removed.iter().cloned().chain(absent);
        Some(Received {
            kind,
            version: answer.version,
            resources,
            receipt: Receipt {
                removed: removed.collect(),
                ..receipt
            },
            removed: answer.removed,
            errors: answer.errors,
            whole,
        })
    }

    fn receipt(&self, kind: Kind, resources: &[Sent], (version, nonce): (&str, String)) -> Receipt {
        let came = resources.iter().map(|sent| {
            let own = if sent.version.is_empty() {
                version
            } else {
                &sent.version
            };
            (sent.name.clone(), own.to_owned(), sent.ttl)
        });
        Receipt {
            kind,
            version: version.to_owned(),
            nonce,
            came: came.collect(),
            removed: Vec::new(),
        }
    }

    /// What the state of the world lacks.
    fn absent(&self, whole: Option<&BTreeSet<String>>) -> Vec<String> {
        let Some(whole) = whole else {
            return Vec::new();
        };
        let absent = self.known.keys().filter(|name| !whole.contains(*name));
        absent.cloned().collect()
    }

    /// A resource lives on.
    fn beat(&mut self, beat: &Sent, now: Instant) {
        if let Some(known) = self.known.get_mut(&beat.name)
            && (known.version == beat.version || known.refused.as_ref() == Some(&beat.version))
            && beat.error.is_none()
        {
            known.until = end_of(beat.ttl, now);
        }
    }

    pub(super) fn judged(
        &mut self,
        protocol: Protocol,
        receipt: Receipt,
        rejected: &[(String, String)],
        now: Instant,
    ) {
        let refused: BTreeSet<&str> = rejected.iter().map(|(name, _)| &**name).collect();
        for (name, version, ttl) in receipt.came {
            let until = end_of(ttl, now);
            if !refused.contains(&*name) {
                let known = Known {
                    version,
                    refused: None,
                    until,
                };
                self.known.insert(name, known);
            } else if let Some(known) = self.known.get_mut(&name) {
                // The server has it still: what is good of it lives on.
                known.refused = Some(version);
                known.until = known.until.and(until).or(known.until);
            }
        }
        for name in &receipt.removed {
            self.known.remove(name);
        }
        if rejected.is_empty() && protocol == Protocol::State {
            self.version = receipt.version;
        }
        self.strayed = !rejected.is_empty();
        self.replies.push_back(Reply {
            nonce: receipt.nonce,
            error: (!rejected.is_empty()).then(|| explain(rejected)),
        });
    }

    /// The answer to an answer, if one is due.
    pub(super) fn reply(&mut self, kind: Kind, protocol: Protocol) -> Option<Request> {
        let reply = self.replies.pop_front()?;
        Some(Request {
            kind,
            first: false,
            ask: match protocol {
                Protocol::State => self.state(),
                Protocol::Delta => delta(BTreeSet::new(), BTreeSet::new()),
            },
            nonce: reply.nonce,
            error: reply.error,
        })
    }

    fn state(&self) -> Ask {
        Ask::State {
            version: self.version.clone(),
            names: listed(&self.told),
        }
    }

    pub(super) fn has_request(&self) -> bool {
        !self.replies.is_empty() || self.has_change()
    }

    fn has_change(&self) -> bool {
        if self.begun {
            self.told != self.wanted || !self.again.is_empty()
        } else {
            !self.wanted.is_empty()
        }
    }

    /// What the server does not know yet, if there is anything.
    pub(super) fn change(
        &mut self,
        kind: Kind,
        protocol: Protocol,
        now: Instant,
    ) -> Option<Request> {
        if !self.has_change() {
            return None;
        }
        let ask = if !std::mem::replace(&mut self.begun, true) {
            self.begin_asking(protocol, now)
        } else if !self.again.is_empty() {
            self.take_back(protocol)
        } else {
            self.ask_anew(protocol, now)
        };
        let nonce = match protocol {
            Protocol::State => self.nonce.clone(),
            Protocol::Delta => String::new(),
        };
        Some(Request {
            kind,
            first: false,
            ask,
            nonce,
            error: None,
        })
    }

    fn begin_asking(&mut self, protocol: Protocol, now: Instant) -> Ask {
        self.told.clone_from(&self.wanted);
        self.again.clear();
        self.wait_for(self.wanted.clone(), now);
        match protocol {
            // Who is told a version that it has itself need not send anything.
            Protocol::State if self.strayed => Ask::State {
                version: String::new(),
                names: listed(&self.told),
            },
            Protocol::State => self.state(),
            Protocol::Delta => {
                let versions = self.known.iter();
                Ask::Delta {
                    subscribe: listed(&self.wanted),
                    unsubscribe: Vec::new(),
                    initial_versions: versions
                        .map(|(name, known)| (name.clone(), known.version.clone()))
                        .collect(),
                }
            }
        }
    }

    /// What was given up meanwhile must be unsubscribed before it is asked for again, or it would never be sent again.
    fn take_back(&mut self, protocol: Protocol) -> Ask {
        let again = std::mem::take(&mut self.again);
        let gone: BTreeSet<String> = self
            .told
            .iter()
            .filter(|name| again.contains(*name) || !self.wanted.contains(*name))
            .cloned()
            .collect();
        self.told.retain(|name| !gone.contains(name));
        match protocol {
            Protocol::State => self.state(),
            Protocol::Delta => delta(BTreeSet::new(), gone),
        }
    }

    fn ask_anew(&mut self, protocol: Protocol, now: Instant) -> Ask {
        let new: BTreeSet<String> = self.wanted.difference(&self.told).cloned().collect();
        let gone = self.told.difference(&self.wanted).cloned().collect();
        self.told.clone_from(&self.wanted);
        self.wait_for(new.clone(), now);
        match protocol {
            Protocol::State => self.state(),
            Protocol::Delta => delta(new, gone),
        }
    }

    fn wait_for(&mut self, names: BTreeSet<String>, now: Instant) {
        for name in names {
            if name != WILDCARD && !self.known.contains_key(&name) {
                self.awaited.insert(name, now);
            }
        }
    }

    pub(super) fn lapse(&mut self, kind: Kind, now: Instant) -> Vec<Lapse> {
        let is_over = |known: &Known| known.until.is_some_and(|until| until <= now);
        let dead = self.known.iter().filter(|(_, known)| is_over(known));
        let dead: Vec<String> = dead.map(|(name, _)| name.clone()).collect();
        self.known.retain(|_, known| !is_over(known));
        let is_late = |since: &Instant| *since + DOES_NOT_EXIST_AFTER <= now;
        let late = self.awaited.iter().filter(|(_, since)| is_late(since));
        let late: Vec<String> = late.map(|(name, _)| name.clone()).collect();
        self.awaited.retain(|_, since| !is_late(since));
        self.missing.extend(late.iter().cloned());
        let dead = dead.into_iter().map(|name| Lapse::Expired(kind, name));
        dead.chain(late.into_iter().map(|name| Lapse::Missing(kind, name)))
            .collect()
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let dead = self.known.values().filter_map(|known| known.until);
        let late = self
            .awaited
            .values()
            .map(|since| *since + DOES_NOT_EXIST_AFTER);
        dead.chain(late).min()
    }
}

/// When a life that begins now is over.
fn end_of(ttl: Option<Duration>, now: Instant) -> Option<Instant> {
    ttl.map(|ttl| now + ttl.min(TTL_MAX))
}

fn delta(subscribe: BTreeSet<String>, unsubscribe: BTreeSet<String>) -> Ask {
    Ask::Delta {
        subscribe: subscribe.into_iter().collect(),
        unsubscribe: unsubscribe.into_iter().collect(),
        initial_versions: BTreeMap::new(),
    }
}

/// All that there are, where an answer says so; heartbeats count as being there. What has no name may be any of them.
fn whole(kind: Kind, protocol: Protocol, answer: &Answer) -> Option<BTreeSet<String>> {
    let has_names = answer.resources.iter().all(|sent| !sent.name.is_empty());
    let is_whole = protocol == Protocol::State && kind.is_whole() && has_names;
    is_whole.then(|| {
        let names = answer.resources.iter().map(|sent| &sent.name);
        // What cannot be sent is not gone.
        let names = names.chain(answer.errors.iter().map(|(name, _)| name));
        names.cloned().collect()
    })
}

/// All that was wrong, as far as there is room for it.
fn explain(rejected: &[(String, String)]) -> String {
    let mut text = String::new();
    for (name, details) in rejected {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&format!("'{name}': {details}"));
        if text.len() > ERROR_BYTES_MAX {
            let end = text.floor_char_boundary(ERROR_BYTES_MAX);
            text.truncate(end);
            text.push('…');
            break;
        }
    }
    text
}
