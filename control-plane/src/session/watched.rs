//! What one client has of one type, as far as we sent it, and what it still wants.

use super::{
    Owed, RESPONSE_BYTES_MAX,
    sent::{By, Sent, State, What, restored},
};
use crate::snapshot::{ByName, Resource, version_of};
use outrigger_xds::subscription::{Kind, Protocol, WILDCARD};
use std::{
    cell::LazyCell,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};

/// A response that was sent, or taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// Which version of all of the type.
    pub version: String,
    /// When.
    pub at: SystemTime,
}

/// A response that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nack {
    /// Why.
    pub error: String,
    /// When.
    pub at: SystemTime,
}

/// What a client has of a type, for those who look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeStatus {
    /// Which.
    pub type_url: String,
    /// Whether it wants all that there are.
    pub all: bool,
    /// How many it names.
    pub names: usize,
    /// How many it has, or was sent.
    pub resources: usize,
    /// The worst of what became of these.
    pub state: State,
    /// The last response that was sent.
    pub sent: Option<Told>,
    /// The last one of those that was taken.
    pub acked: Option<Told>,
    /// The last one that was refused, unless all that it brought was replaced since.
    pub nacked: Option<Nack>,
}

/// What is to be sent.
#[derive(Debug, Default)]
pub(super) struct Content {
    pub(super) version: String,
    pub(super) resources: Vec<Arc<Resource>>,
    pub(super) removed: Vec<String>,
}

#[derive(Debug, Default)]
pub(super) struct Watched {
    begun: bool,
    /// It wants all that there are.
    all: bool,
    /// It named something once: to name nothing is to want nothing then.
    named: bool,
    names: BTreeSet<String>,
    /// To be answered, whatever it has.
    asked: BTreeSet<String>,
    /// All that there are were asked for, and that is to be answered, even if there are none.
    due: bool,
    /// The version that it has by its own account.
    claimed: String,
    sent: BTreeMap<String, Sent>,
    last: Option<Arc<By>>,
    /// The last response of those that were taken or refused.
    answered: u64,
    acked: Option<Told>,
    nacked: Option<Nack>,
    /// All that there was when it lacked nothing of it, and has said nothing since.
    at_rest: Option<Arc<ByName>>,
}

impl Watched {
    pub(super) fn names_count(&self) -> usize {
        let asked = self.asked.iter();
        self.names.len() + asked.filter(|name| !self.names.contains(*name)).count()
    }

    pub(super) fn sent(&self) -> impl Iterator<Item = (&str, &Sent)> {
        self.sent.iter().map(|(name, sent)| (name.as_str(), sent))
    }

    /// Whether there is nothing to be told of this.
    pub(super) fn is_at_rest(&self, all: &Arc<ByName>) -> bool {
        self.at_rest
            .as_ref()
            .is_some_and(|rest| Arc::ptr_eq(rest, all))
    }

    /// Unless something that it has is gone, and held back: that may be told though nothing of this type changes.
    pub(super) fn rest(&mut self, all: &Arc<ByName>) {
        let has_gone = self.sent.keys().any(|name| !all.contains_key(name));
        self.at_rest = (!has_gone).then(|| all.clone());
    }

    pub(super) fn wake(&mut self) {
        self.at_rest = None;
    }

    pub(super) fn take_asked(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.asked)
    }

    /// A client answers. What answers an older response says something of what that brought, too. With the state of the world, who takes a
    /// response need not have answered those before it.
    pub(super) fn answered(
        &mut self,
        protocol: Protocol,
        (nonce, version): (u64, Option<&str>),
        error: Option<String>,
        now: SystemTime,
    ) {
        let Some(last) = self.last.as_ref().filter(|last| nonce <= last.nonce) else {
            return;
        };
        let has_another = version.is_some_and(|version| version != last.version);
        if error.is_none() && last.nonce == nonce && has_another {
            // It says what it wants, after it refused that response, whose nonce it repeats: who takes a response names its version.
            return;
        }
        self.answered = self.answered.max(nonce);
        let state = if error.is_some() {
            State::Nacked
        } else {
            State::Acked
        };
        let settles_older = protocol == Protocol::State && state == State::Acked;
        let brought = |sent: &&mut Sent| {
            let is_older = sent.state == State::Pending && sent.by.nonce < nonce;
            sent.by.nonce == nonce || (settles_older && is_older)
        };
        for sent in self.sent.values_mut().filter(brought) {
            sent.state = state;
        }
        let last = self.last.as_ref().filter(|last| last.nonce == nonce);
        if let Some(error) = error {
            self.nacked = Some(Nack { error, at: now });
        } else if let Some(last) = last {
            self.acked = Some(Told {
                version: last.version.clone(),
                at: now,
            });
            if self.sent.values().all(|sent| sent.state != State::Nacked) {
                self.nacked = None;
            }
        }
    }

    /// With the state of the world, a client says all that it wants. Whether it does so while answering an older response is of no matter.
    pub(super) fn want(
        &mut self,
        kind: Option<Kind>,
        version: String,
        mut names: BTreeSet<String>,
    ) {
        let first = !std::mem::replace(&mut self.begun, true);
        let is_whole = kind.is_some_and(Kind::is_whole);
        let star = names.remove(WILDCARD);
        self.named |= star || !names.is_empty();
        let all = star || (is_whole && !self.named);
        if first && all && names.is_empty() {
            self.claimed = version;
        }
        self.due |= all && !self.all;
        self.asked.extend(names.difference(&self.names).cloned());
        self.asked.retain(|name| names.contains(name));
        (self.all, self.names) = (all, names);
        self.forget_the_unwanted();
    }

    /// A refusal is over when nothing is left of what was refused.
    fn forget_the_unwanted(&mut self) {
        let is_refused = |sent: &Sent| sent.state == State::Nacked;
        let had_refused = self.sent.values().any(is_refused);
        let (all, names) = (self.all, &self.names);
        self.sent.retain(|name, _| all || names.contains(name));
        if had_refused && !self.sent.values().any(is_refused) {
            self.nacked = None;
        }
    }

    /// With what changed, it says what it wants beside that, and no more.
    pub(super) fn change(
        &mut self,
        kind: Option<Kind>,
        (mut subscribe, unsubscribe): (BTreeSet<String>, BTreeSet<String>),
        initial_versions: BTreeMap<String, String>,
        now: SystemTime,
    ) {
        let first = !std::mem::replace(&mut self.begun, true);
        let is_whole = kind.is_some_and(Kind::is_whole);
        let star = subscribe.remove(WILDCARD);
        if star || (first && is_whole && subscribe.is_empty()) {
            self.all = true;
            self.due = !first || initial_versions.is_empty();
        }
        if first {
            self.sent = restored(initial_versions, now);
        }
        for name in unsubscribe {
            self.give_up(&name);
        }
        let known = |name: &String| first && self.sent.contains_key(name);
        let new = subscribe.iter().filter(|name| !known(name));
        self.asked.extend(new.cloned());
        self.names.extend(subscribe);
        self.forget_the_unwanted();
    }

    fn give_up(&mut self, name: &str) {
        if name == WILDCARD {
            self.all = false;
        } else if self.names.remove(name) {
            // Who still has it by wanting all is told what becomes of it.
            if self.all {
                self.asked.insert(name.to_owned());
            } else {
                self.asked.remove(name);
            }
        }
    }

    fn wants(&self, name: &str) -> bool {
        self.all || self.names.contains(name)
    }

    fn wanted<'a>(&self, all: &'a ByName) -> BTreeMap<&'a str, &'a Arc<Resource>> {
        let wanted = all.iter().filter(|(name, _)| self.wants(name));
        wanted
            .map(|(name, resource)| (name.as_str(), resource))
            .collect()
    }

    pub(super) fn has(&self, resource: &Resource) -> bool {
        let sent = self.sent.get(&resource.name);
        sent.is_some_and(|sent| sent.version() == resource.version)
    }

    /// Whether it has it, and did not refuse it.
    pub(super) fn is_content_with(&self, resource: &Resource) -> bool {
        self.has(resource) && !self.is_refused(&resource.name)
    }

    pub(super) fn is_refused(&self, name: &str) -> bool {
        let sent = self.sent.get(name);
        sent.is_some_and(|sent| sent.state == State::Nacked)
    }

    /// Some refuse a response as a whole: when there is something else, all that it brought is told again, once.
    /// To be asked of what [`Self::is_refused`].
    fn was_refused_before(&self, name: &str, version: &str) -> bool {
        let sent = self.sent.get(name);
        sent.is_some_and(|sent| sent.by.version != version)
    }

    /// All of a type of which a response holds all. Clusters that are gone stay in it: routes may still lead to them.
    pub(super) fn whole(&mut self, kind: Kind, all: &ByName, now: SystemTime) -> Option<Content> {
        let mut wanted = self.wanted(all);
        let gone = self.sent.iter().filter_map(|(name, sent)| {
            let resource = sent.resource()?;
            let is_gone = kind == Kind::Clusters && !wanted.contains_key(name.as_str());
            is_gone.then_some((name.as_str(), resource))
        });
        let gone: Vec<_> = gone.collect();
        wanted.extend(gone);
        let content = whole(&wanted);
        let is_new = wanted.len() != self.sent.len()
            || content.resources.iter().any(|resource| !self.has(resource));
        let is_claimed = self.due && self.claimed == content.version;
        if !self.due && !is_new && self.asked.is_empty() {
            return None;
        }
        self.due = false;
        self.asked.clear();
        self.claimed.clear();
        if is_claimed {
            self.has_already(content, now);
            return None;
        }
        Some(content)
    }

    /// All of it, without what is gone.
    pub(super) fn without_the_gone(&mut self, all: &ByName) -> Option<Content> {
        let wanted = self.wanted(all);
        let has_gone = self
            .sent
            .keys()
            .any(|name| !wanted.contains_key(name.as_str()));
        has_gone.then(|| whole(&wanted))
    }

    /// An earlier stream brought it.
    fn has_already(&mut self, content: Content, at: SystemTime) {
        self.acked = Some(Told {
            version: content.version.clone(),
            at,
        });
        let by = Arc::new(By {
            nonce: 0,
            version: content.version,
            is_bare: false,
            at,
        });
        for resource in content.resources {
            self.keep(resource, &by, at, State::Acked);
        }
        self.last = Some(by);
    }

    fn keep(&mut self, resource: Arc<Resource>, by: &Arc<By>, since: SystemTime, state: State) {
        let name = resource.name.clone();
        let sent = Sent {
            what: What::Sent(resource),
            by: by.clone(),
            since,
            state,
        };
        self.sent.insert(name, sent);
    }

    /// What it lacks of a type of which a response may hold a part. That something is gone cannot be said.
    pub(super) fn part(&mut self, all: &ByName, owed: &BTreeMap<String, Owed>) -> Option<Content> {
        let content = self.lacking(all, owed, true);
        self.asked.retain(|name| content.left.contains(name));
        (!content.resources.is_empty()).then(|| Content {
            version: self.version(all),
            resources: content.resources,
            removed: Vec::new(),
        })
    }

    /// What it lacks, and what it asked for and does not exist. Of listeners also what is gone.
    pub(super) fn delta(
        &mut self,
        kind: Kind,
        all: &ByName,
        owed: &BTreeMap<String, Owed>,
    ) -> Option<Content> {
        let mut removed: BTreeSet<String> = self
            .asked
            .iter()
            .filter(|name| !all.contains_key(*name))
            .cloned()
            .collect();
        if kind == Kind::Listeners {
            removed.extend(self.names_gone(all));
        }
        let content = self.lacking(all, owed, removed.is_empty());
        self.asked.retain(|name| content.left.contains(name));
        let due = std::mem::take(&mut self.due);
        let is_news = due || !content.resources.is_empty() || !removed.is_empty();
        is_news.then(|| Content {
            version: self.version(all),
            resources: content.resources,
            removed: removed.into_iter().collect(),
        })
    }

    /// What was refused goes by itself: with something new in the same response, that would be refused, too. `is_alone` says whether nothing else goes with it.
    fn lacking(&self, all: &ByName, owed: &BTreeMap<String, Owed>, is_alone: bool) -> Lacking {
        // To make it takes time, and mostly nothing was refused.
        let version = LazyCell::new(|| self.version(all));
        let (mut news, mut refused) = (Vec::new(), Vec::new());
        for (name, resource) in self.wanted(all) {
            let is_due = self.asked.contains(name) || owed.contains_key(name);
            if !self.has(resource) || (is_due && !self.is_refused(name)) {
                news.push(resource);
            } else if is_due || (self.is_refused(name) && self.was_refused_before(name, &version)) {
                refused.push(resource);
            }
        }
        let (now, later) = if news.is_empty() && is_alone {
            (refused, Vec::new())
        } else {
            (news, refused)
        };
        Lacking::cut(now, later)
    }

    /// Of all that it wants and that there is.
    fn version(&self, all: &ByName) -> String {
        let wanted = all.values().filter(|resource| self.wants(&resource.name));
        version_of(wanted.map(|it| (it.name.as_str(), it.version.as_str())))
    }

    fn names_gone(&self, all: &ByName) -> Vec<String> {
        let gone = self.sent.keys().filter(|name| !all.contains_key(*name));
        gone.cloned().collect()
    }

    /// What it has and is gone.
    pub(super) fn gone(&self, all: &ByName) -> Option<Content> {
        let removed = self.names_gone(all);
        (!removed.is_empty()).then(|| Content {
            version: self.version(all),
            resources: Vec::new(),
            removed,
        })
    }

    pub(super) fn forget_the_gone(&mut self, all: &ByName) {
        self.sent.retain(|name, _| all.contains_key(name));
    }

    /// This is sent.
    pub(super) fn say(
        &mut self,
        (protocol, kind): (Protocol, Option<Kind>),
        nonce: u64,
        content: &Content,
        now: SystemTime,
    ) {
        for name in &content.removed {
            self.sent.remove(name);
        }
        let by = Arc::new(By {
            nonce,
            version: content.version.clone(),
            is_bare: content.resources.is_empty(),
            at: now,
        });
        let is_whole = protocol == Protocol::State && kind.is_some_and(Kind::is_whole);
        let before = if is_whole {
            std::mem::take(&mut self.sent)
        } else {
            BTreeMap::new()
        };
        for resource in &content.resources {
            let known = self.sent.get(&resource.name);
            let known = known.or_else(|| before.get(&resource.name));
            let since = known.and_then(|sent| sent.open_since(resource));
            self.keep(resource.clone(), &by, since.unwrap_or(now), State::Pending);
        }
        self.last = Some(by);
        self.wake();
    }

    pub(super) fn status(&self, type_url: &str) -> TypeStatus {
        TypeStatus {
            type_url: type_url.to_owned(),
            all: self.all,
            names: self.names.len(),
            resources: self.sent.len(),
            state: self.state(),
            sent: self.last.as_ref().map(|last| Told {
                version: last.version.clone(),
                at: last.at,
            }),
            acked: self.acked.clone(),
            nacked: self.nacked.clone(),
        }
    }

    /// Since when something that is there was not taken, the newest of it. What is gone is waited for by nobody.
    pub(super) fn open_since(&self, all: &ByName) -> Option<SystemTime> {
        let sent = self.sent.iter();
        let open = sent.filter(|(name, sent)| sent.is_open() && all.contains_key(*name));
        open.map(|(_, sent)| sent.since).max()
    }

    /// A response without resources is answered, too.
    fn is_unanswered(&self) -> bool {
        let last = self.last.as_ref().map_or(0, |last| last.nonce);
        self.sent.is_empty() && last > self.answered
    }

    /// Whether something was not answered at all, whatever was refused.
    pub(super) fn is_pending(&self) -> bool {
        self.is_unanswered() || self.sent.values().any(|it| it.state == State::Pending)
    }

    fn state(&self) -> State {
        let has = |state| self.sent.values().any(|sent| sent.state == state);
        let is_bare = self.last.as_ref().is_some_and(|last| last.is_bare);
        let is_refused = self.sent.is_empty() && is_bare && self.nacked.is_some();
        if has(State::Nacked) || is_refused {
            State::Nacked
        } else if has(State::Pending) || self.is_unanswered() {
            State::Pending
        } else if self.last.is_some() || !self.sent.is_empty() {
            State::Acked
        } else {
            State::NotSent
        }
    }
}

/// What is to be sent now, and what another time.
struct Lacking {
    resources: Vec<Arc<Resource>>,
    left: BTreeSet<String>,
}

impl Lacking {
    /// As much as one response takes; what is for another time is left.
    fn cut(now: Vec<&Arc<Resource>>, later: Vec<&Arc<Resource>>) -> Self {
        let mut lacking = Self {
            resources: Vec::new(),
            left: later.into_iter().map(|it| it.name.clone()).collect(),
        };
        let mut bytes = 0;
        for resource in now {
            bytes += resource.name.len() + resource.any.value.len();
            if lacking.resources.is_empty() || bytes <= RESPONSE_BYTES_MAX {
                lacking.resources.push(resource.clone());
            } else {
                lacking.left.insert(resource.name.clone());
            }
        }
        lacking
    }
}

fn whole(wanted: &BTreeMap<&str, &Arc<Resource>>) -> Content {
    let resources: Vec<Arc<Resource>> = wanted.values().map(|it| Arc::clone(it)).collect();
    let set = resources.iter();
    Content {
        version: version_of(set.map(|it| (it.name.as_str(), it.version.as_str()))),
        resources,
        removed: Vec::new(),
    }
}
