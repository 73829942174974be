//! The streams that bring resources: one for whatever says `ads`, and one of a single type for each service that is named in
//! its place. Each has subscriptions of its own.
//!
//! A secret has a stream to itself, as in Envoy: a server that ends a stream for a name that it does not give away would
//! end the others with it.

use super::{
    Discovery,
    model::{Kind, Subscription, Wait},
    stats::{self, StreamStats},
};
use outrigger_xds::{
    resource::{
        ads::Ads,
        config_source::{Origin, Service},
    },
    subscription::{Request, Subscriptions},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::Instant,
};

/// Streams of a single type at once. What would be one more waits until there is room, or its time is over.
const SERVICE_STREAMS_MAX: usize = 256;

/// A stream that somebody is to keep open.
#[derive(Debug, Clone)]
pub struct Channel {
    /// Never used twice.
    pub id: u64,
    /// What it is called in the log.
    pub name: String,
    /// The type that it carries; none is all.
    pub kind: Option<Kind>,
    /// Where it leads.
    pub control_plane: Arc<Ads>,
}

/// What a stream is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Purpose {
    /// Whatever says `ads`.
    Ads,
    /// What is asked of a service of one type: all of it, or one secret.
    Service(Kind, Service, Option<String>),
}

impl Purpose {
    /// What of that which is asked for comes by this stream; none comes by a stream if it is in a file.
    fn of(asked: &Subscription) -> Option<Self> {
        match &asked.origin {
            Origin::Path(_) => None,
            Origin::Ads => Some(Self::Ads),
            Origin::Service(service) => {
                let one = (asked.kind == Kind::Secrets).then(|| asked.name.clone());
                Some(Self::Service(asked.kind, service.clone(), one))
            }
        }
    }

    /// Where what it brings is from.
    pub(super) fn origin(&self) -> Origin {
        match self {
            Self::Ads => Origin::Ads,
            Self::Service(_, service, _) => Origin::Service(service.clone()),
        }
    }

    /// Whether a resource of its origin comes by it.
    fn carries(&self, kind: Kind, name: &str) -> bool {
        match self {
            Self::Ads => true,
            Self::Service(own, _, one) => {
                *own == kind && one.as_ref().is_none_or(|one| one == name)
            }
        }
    }

    pub(super) fn brings(&self, asked: &Subscription) -> bool {
        let is_origin = match (self, &asked.origin) {
            (Self::Ads, Origin::Ads) => true,
            (Self::Service(_, service, _), Origin::Service(of)) => service == of,
            _ => false,
        };
        is_origin && self.carries(asked.kind, &asked.name)
    }

    fn kind(&self) -> Option<Kind> {
        match self {
            Self::Ads => None,
            Self::Service(kind, ..) => Some(*kind),
        }
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Service(kind, _, one) = self else {
            return f.write_str("ads");
        };
        f.write_str(match kind {
            Kind::Runtimes => "rtds",
            Kind::Clusters => "cds",
            Kind::Endpoints => "eds",
            Kind::Listeners => "lds",
            Kind::Routes => "rds",
            Kind::Secrets => "sds",
            Kind::Extensions => "ecds",
        })?;
        one.iter().try_for_each(|one| write!(f, " '{one}'"))
    }
}

/// A stream's side here.
pub(super) struct Line {
    purpose: Purpose,
    control_plane: Arc<Ads>,
    pub(super) subscriptions: Subscriptions,
    is_connected: bool,
    /// Those in whose names it is shown.
    shown: Vec<(Subscription, BTreeSet<String>)>,
    stats: Vec<StreamStats>,
}

impl Line {
    fn new(purpose: Purpose, control_plane: Arc<Ads>) -> Self {
        let limit = control_plane.rate_limit.unwrap_or_default();
        let is_ads = purpose == Purpose::Ads;
        Self {
            purpose,
            subscriptions: Subscriptions::new(control_plane.protocol, limit, Instant::now()),
            control_plane,
            is_connected: false,
            shown: Vec::new(),
            stats: is_ads.then(stats::of_ads).into_iter().collect(),
        }
    }

    pub(super) fn purpose(&self) -> Purpose {
        self.purpose.clone()
    }

    /// Whether the server is known to be there.
    pub(super) fn connected(&mut self, is_connected: bool) {
        self.is_connected = is_connected;
        self.stats
            .iter()
            .for_each(|stats| stats.connected(is_connected));
    }

    /// Shows the stream in the names of those who ask.
    fn count_for(&mut self, asked: &[(&Subscription, &Wait)]) {
        if self.purpose == Purpose::Ads {
            return;
        }
        let now = asked.iter().map(|(asked, wait)| (*asked, &wait.owners));
        if self
            .shown
            .iter()
            .map(|(asked, of)| (asked, of))
            .eq(now.clone())
        {
            return;
        }
        self.shown = now
            .map(|(asked, owners)| (asked.clone(), owners.clone()))
            .collect();
        self.stats.iter().for_each(|stats| stats.connected(false));
        let shown = self.shown.iter();
        self.stats = shown
            .flat_map(|(asked, owners)| stats::of_stream(asked, owners))
            .collect();
        self.connected(self.is_connected);
    }

    /// All that may be said now.
    pub(super) fn requests(&mut self, now: Instant) -> Vec<Request> {
        std::iter::from_fn(|| self.subscriptions.next_request(now)).collect()
    }

    /// Whether more is to be said later.
    pub(super) fn held_back(&self) -> bool {
        let is_held_back = self.subscriptions.has_request();
        self.stats
            .iter()
            .for_each(|stats| stats.held_back(is_held_back));
        is_held_back
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.connected(false);
    }
}

/// All streams.
#[derive(Default)]
pub(super) struct Lines {
    by_id: BTreeMap<u64, Line>,
    last: u64,
    /// One came or went, or has something to say, since somebody was told.
    are_news: bool,
    /// It was told that there are too many.
    is_full: bool,
}

impl Lines {
    pub(super) fn get(&mut self, id: u64) -> Option<&mut Line> {
        self.by_id.get_mut(&id)
    }

    /// The one of ADS.
    pub(super) fn ads(&self) -> Option<&Subscriptions> {
        let mut all = self.by_id.values();
        let line = all.find(|line| line.purpose == Purpose::Ads)?;
        Some(&line.subscriptions)
    }

    /// The one that brings this.
    pub(super) fn of(&self, asked: &Subscription) -> Option<&Subscriptions> {
        let mut all = self.by_id.values();
        let line = all.find(|line| line.purpose.brings(asked))?;
        Some(&line.subscriptions)
    }

    /// That of ADS, to be told something.
    pub(super) fn ads_mut(&mut self) -> Option<&mut Subscriptions> {
        let mut all = self.by_id.values_mut();
        let line = all.find(|line| line.purpose == Purpose::Ads)?;
        Some(&mut line.subscriptions)
    }

    pub(super) fn each(&mut self) -> impl Iterator<Item = &mut Line> {
        self.by_id.values_mut()
    }

    fn has(&self, purpose: &Purpose) -> bool {
        self.by_id.values().any(|line| line.purpose == *purpose)
    }

    fn retain(&mut self, stays: impl Fn(&Line) -> bool) {
        let before = self.by_id.len();
        self.by_id.retain(|_, line| stays(line));
        self.are_news |= self.by_id.len() != before;
    }

    fn add(&mut self, line: Line) {
        self.last += 1;
        self.are_news = true;
        self.by_id.insert(self.last, line);
    }

    /// Whether one more may be there.
    fn has_room(&self, purpose: &Purpose) -> bool {
        let all = self.by_id.values();
        let of_services = all.filter(|line| line.purpose != Purpose::Ads);
        *purpose == Purpose::Ads || of_services.count() < SERVICE_STREAMS_MAX
    }

    /// So many found no room; what waits for them waits on.
    fn lack(&mut self, count: usize) {
        metrics::gauge!("outrigger_config_streams_missing").set(count as f64);
        if !std::mem::replace(&mut self.is_full, count > 0) && count > 0 {
            tracing::warn!(
                count,
                "there are {SERVICE_STREAMS_MAX} streams of single types, no more are opened"
            );
        }
    }
}

impl Discovery {
    /// Has a stream for whatever is asked of a control plane, and no other.
    pub(super) fn open_lines(&mut self) {
        let mut wanted: BTreeMap<Purpose, Arc<Ads>> = BTreeMap::new();
        if let Some(ads) = &self.model.bootstrap.ads {
            wanted.insert(Purpose::Ads, Arc::new(ads.clone()));
        }
        for asked in self.model.waits.keys() {
            if let (Some(purpose), Origin::Service(service)) = (Purpose::of(asked), &asked.origin) {
                wanted.insert(purpose, service.control_plane().clone());
            }
        }
        self.lines
            .retain(|line| wanted.get(&line.purpose) == Some(&line.control_plane));
        wanted.retain(|purpose, _| !self.lines.has(purpose));
        let mut missing = 0;
        for (purpose, control_plane) in wanted {
            if self.lines.has_room(&purpose) {
                self.add_line(purpose, control_plane);
            } else {
                missing += 1;
            }
        }
        self.lines.lack(missing);
    }

    fn add_line(&mut self, purpose: Purpose, control_plane: Arc<Ads>) {
        // Another server's errors are not its own.
        self.errors.forget(|about| purpose.brings(about));
        // As if it were from the disk: it is told the names, sends all of it anew, and says what is gone.
        let mut known = self.model.good_of(&purpose.origin());
        known.retain(|(kind, name)| purpose.carries(*kind, name));
        let mut line = Line::new(purpose, control_plane);
        for (kind, name) in known {
            line.subscriptions.remember(kind, name, String::new());
        }
        self.lines.add(line);
    }

    /// Asks all of them for what is named now.
    pub(super) fn ask_control_planes(&mut self) {
        self.open_lines();
        self.errors.keep_asked(&self.model.waits);
        for line in self.lines.by_id.values_mut() {
            let was_silent = !line.subscriptions.has_request();
            let waits = self.model.waits.iter();
            let asked: Vec<_> = waits
                .filter(|(asked, _)| line.purpose.brings(asked))
                .collect();
            for kind in Kind::ALL {
                let of_kind = asked.iter().filter(|(asked, _)| asked.kind == kind);
                let names: BTreeSet<String> = of_kind.map(|(asked, _)| asked.wanted()).collect();
                line.subscriptions.want(kind, names);
            }
            line.count_for(&asked);
            self.lines.are_news |= was_silent && line.subscriptions.has_request();
        }
    }

    /// All streams that are to be open.
    #[must_use]
    pub fn channels(&self) -> Vec<Channel> {
        let each = self.lines.by_id.iter();
        each.map(|(id, line)| Channel {
            id: *id,
            name: line.purpose.to_string(),
            kind: line.purpose.kind(),
            control_plane: line.control_plane.clone(),
        })
        .collect()
    }

    /// Whether a stream came or went, or has something to say that it had not before, since the last call.
    pub fn has_news_for_streams(&mut self) -> bool {
        std::mem::take(&mut self.lines.are_news)
    }

    /// What is asked for of one type and comes by a stream.
    pub(super) fn asked_by(&self, purpose: &Purpose, kind: Kind) -> Vec<Subscription> {
        let asked = self.model.waits.keys();
        asked
            .filter(|asked| asked.kind == kind && purpose.brings(asked))
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control_plane() -> Ads {
        Ads {
            protocol: outrigger_xds::subscription::Protocol::State,
            servers: Vec::new(),
            rate_limit: None,
        }
    }

    #[test]
    fn streams_of_single_types_are_bounded_and_that_of_all_is_not_among_them() {
        let service = Service::new(control_plane());
        let secret = |name: usize| {
            let name = Some(name.to_string());
            Purpose::Service(Kind::Secrets, service.clone(), name)
        };
        let line = |purpose| Line::new(purpose, service.control_plane().clone());
        let mut lines = Lines::default();
        for name in 0..SERVICE_STREAMS_MAX {
            assert!(lines.has_room(&secret(name)), "{name}");
            lines.add(line(secret(name)));
        }
        let one_more = secret(SERVICE_STREAMS_MAX);
        assert!(!lines.has_room(&one_more));
        assert!(lines.has_room(&Purpose::Ads));
        lines.add(line(Purpose::Ads));
        lines.retain(|line| line.purpose != secret(7));
        assert!(lines.has_room(&one_more));
    }
}
