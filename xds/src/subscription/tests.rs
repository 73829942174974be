//! Conversations as tables: what is sent, what comes, what time does.

use super::{
    Answer, Ask, DOES_NOT_EXIST_AFTER, ERROR_BYTES_MAX, Kind, Lapse, Protocol, RateLimit, Received,
    Request, Sent, Status, Subscriptions, TTL_MAX,
};
use crate::load::binary::Packed;
use prost_types::Any;
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

struct Talk {
    client: Subscriptions,
    begun: Instant,
    now: Instant,
}

fn names(text: &str) -> BTreeSet<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// `name@version`, with `+ttl` in seconds; `~` before it is a heartbeat.
fn sent(text: &str) -> Sent {
    let (text, ttl) = text.split_once('+').unwrap_or((text, ""));
    let (name, version) = text.split_once('@').unwrap_or((text, ""));
    Sent {
        name: name.trim_start_matches('~').to_owned(),
        version: version.to_owned(),
        ttl: ttl.parse().ok().map(Duration::from_secs),
        error: None,
        body: (!name.starts_with('~')).then(|| Packed(Any::default())),
    }
}

fn answer(kind: Kind, version: &str, nonce: &str, resources: &str, removed: &str) -> Answer {
    Answer {
        type_url: kind.type_url().to_owned(),
        version: version.to_owned(),
        nonce: nonce.to_owned(),
        resources: resources.split_whitespace().map(sent).collect(),
        removed: removed.split_whitespace().map(str::to_owned).collect(),
        errors: Vec::new(),
    }
}

/// A request in one line.
fn line(request: &Request) -> String {
    let mut line = format!("{:?}", request.kind);
    let mut say = |what: &str, text: String| {
        if !text.is_empty() {
            line.push_str(&format!(" {what}{text}"));
        }
    };
    match &request.ask {
        Ask::State { version, names } => {
            say("", names.join(","));
            say("v", version.clone());
        }
        Ask::Delta {
            subscribe,
            unsubscribe,
            initial_versions,
        } => {
            say("+", subscribe.join(","));
            say("-", unsubscribe.join(","));
            let versions = initial_versions.iter();
            let versions: Vec<String> = versions.map(|(name, v)| format!("{name}@{v}")).collect();
            say("has ", versions.join(","));
        }
    }
    say("n", request.nonce.clone());
    say("!", request.error.clone().unwrap_or_default());
    if request.first {
        line.insert(0, '*');
    }
    line
}

impl Talk {
    fn new(protocol: Protocol) -> Self {
        let now = Instant::now();
        Self {
            client: Subscriptions::new(protocol, RateLimit::default(), now),
            begun: now,
            now,
        }
    }

    fn at(&mut self, seconds: u64) -> &mut Self {
        self.now = self.begun + Duration::from_secs(seconds);
        self
    }

    fn want(&mut self, kind: Kind, what: &str) -> &mut Self {
        self.client.want(kind, names(what));
        self
    }

    fn says(&mut self, expected: &[&str]) -> &mut Self {
        let mut said = Vec::new();
        while let Some(request) = self.client.next_request(self.now) {
            said.push(line(&request));
        }
        assert_eq!(said, expected);
        self
    }

    fn hears(&mut self, answer: Answer) -> Received {
        self.client
            .received(answer, self.now)
            .expect("it is wanted")
    }

    /// Says whatever there is to say.
    fn speaks(&mut self) -> &mut Self {
        while self.client.next_request(self.now).is_some() {}
        self
    }

    /// Hears and judges: those named in `refused` are.
    fn takes(&mut self, answer: Answer, refused: &str) -> &mut Self {
        let received = self.hears(answer);
        let refused = refused.split_whitespace();
        let refused: Vec<_> = refused
            .map(|name| (name.to_owned(), "no".to_owned()))
            .collect();
        self.client.judged(received.receipt, &refused, self.now);
        self
    }
}

#[test]
fn state_of_the_world() {
    let mut talk = Talk::new(Protocol::State);
    talk.want(Kind::Clusters, "*").says(&[]);
    talk.client.opened();
    talk.says(&["*Clusters"])
        .takes(answer(Kind::Clusters, "1", "a", "x y", ""), "")
        .want(Kind::Endpoints, "x y")
        // The answer first, and what it led to by itself.
        .says(&["Clusters v1 na", "Endpoints x,y"])
        .takes(answer(Kind::Endpoints, "1", "b", "x y z", ""), "")
        .want(Kind::Endpoints, "x")
        .says(&["Endpoints x,y v1 nb", "Endpoints x v1 nb"])
        .takes(answer(Kind::Clusters, "2", "c", "x y", ""), "y")
        .says(&["Clusters v1 nc !'y': no"])
        .takes(answer(Kind::Clusters, "3", "d", "x", ""), "")
        .says(&["Clusters v3 nd"]);
    // Nonces are of a stream, versions are not.
    talk.client.broken();
    talk.says(&[]);
    talk.client.opened();
    talk.says(&["*Clusters v3", "Endpoints x v1"])
        .want(Kind::Endpoints, "")
        .says(&["Endpoints v1"]);
}

/// The server would believe that there is what that version says, and send nothing.
#[test]
fn who_took_a_part_of_a_refused_answer_claims_no_version_on_the_next_stream() {
    let mut talk = Talk::new(Protocol::State);
    talk.want(Kind::Clusters, "*").client.opened();
    talk.says(&["*Clusters"])
        .takes(answer(Kind::Clusters, "1", "a", "x", ""), "")
        .takes(answer(Kind::Clusters, "2", "b", "x y z", ""), "z")
        .says(&["Clusters v1 na", "Clusters v1 nb !'z': no"]);
    talk.client.broken();
    talk.client.opened();
    talk.says(&["*Clusters"])
        .takes(answer(Kind::Clusters, "1", "c", "x", ""), "")
        .says(&["Clusters v1 nc"]);
    talk.client.broken();
    talk.client.opened();
    talk.says(&["*Clusters v1"]);
}

#[test]
fn what_changed() {
    let mut talk = Talk::new(Protocol::Delta);
    talk.want(Kind::Clusters, "*").client.opened();
    talk.says(&["*Clusters"])
        .takes(answer(Kind::Clusters, "", "a", "x@1 y@1", ""), "y")
        .want(Kind::Endpoints, "x")
        .says(&["Clusters na !'y': no", "Endpoints +x"])
        .takes(answer(Kind::Endpoints, "", "b", "x@7", ""), "")
        .want(Kind::Endpoints, "y z")
        .says(&["Endpoints nb", "Endpoints +y,z -x"])
        .takes(answer(Kind::Endpoints, "", "c", "y@1", "z"), "")
        .says(&["Endpoints nc"]);
    assert_eq!(talk.client.status(Kind::Endpoints, "y"), Status::Acked);
    assert_eq!(
        talk.client.status(Kind::Endpoints, "z"),
        Status::DoesNotExist
    );
    talk.client.broken();
    talk.client.opened();
    // What was refused was never there.
    talk.says(&["*Clusters has x@1", "Endpoints +y,z has y@1"])
        .takes(answer(Kind::Clusters, "", "d", "", "x"), "")
        .says(&["Clusters nd"]);
    talk.client.opened();
    talk.says(&["*Clusters", "Endpoints +y,z has y@1"]);
}

#[test]
fn what_was_given_up_and_wanted_again_is_asked_for_anew() {
    for (protocol, first, then) in [
        (
            Protocol::State,
            "Endpoints x,y",
            ["Endpoints y v1 na", "Endpoints x,y v1 na"],
        ),
        (
            Protocol::Delta,
            "Endpoints +x,y",
            ["Endpoints -x", "Endpoints +x"],
        ),
    ] {
        let mut talk = Talk::new(protocol);
        talk.want(Kind::Endpoints, "x y").client.opened();
        talk.says(&[&format!("*{first}")])
            .takes(answer(Kind::Endpoints, "1", "a", "x@1 y@1", ""), "");
        let confirmed = talk.client.next_request(talk.now);
        assert_eq!(confirmed.map(|request| request.nonce), Some("a".into()));
        talk.want(Kind::Endpoints, "y")
            .want(Kind::Endpoints, "x y")
            .says(&then);
    }
}

#[test]
fn what_nobody_asked_for_is_left_out() {
    let mut talk = Talk::new(Protocol::State);
    talk.want(Kind::Routes, "r").client.opened();
    talk.says(&["*Routes r"]);
    let received = talk.hears(answer(Kind::Routes, "1", "a", "other r", ""));
    let came: Vec<&str> = received.resources.iter().map(|sent| &*sent.name).collect();
    assert_eq!((came, received.whole), (vec!["r"], None));
    // A reply about a type that was not asked for on this stream would be a subscription to all of it.
    let late = answer(Kind::Endpoints, "1", "b", "x", "");
    assert_eq!(talk.client.received(late, talk.now), None);
    talk.says(&[]);
    let strange = Answer {
        type_url: "type.googleapis.com/strange.Type".into(),
        ..Answer::default()
    };
    assert_eq!(talk.client.received(strange, talk.now), None);
    talk.says(&[]);
}

#[test]
fn the_state_of_the_world_says_what_is_gone() {
    let mut talk = Talk::new(Protocol::State);
    talk.want(Kind::Listeners, "*").client.opened();
    talk.speaks();
    talk.takes(answer(Kind::Listeners, "1", "a", "x@1+9 y", ""), "");
    let received = talk.hears(answer(Kind::Listeners, "2", "b", "~x@1+9", ""));
    assert!(received.resources.is_empty(), "a heartbeat is no update");
    assert_eq!(received.whole, Some(names("x")));
    talk.client.judged(received.receipt, &[], talk.now);
    assert_eq!(talk.client.status(Kind::Listeners, "x"), Status::Acked);
    assert_eq!(talk.client.status(Kind::Listeners, "y"), Status::Requested);
    // What has no name may be anything: then nothing is known to be gone.
    let mut torn = answer(Kind::Listeners, "3", "c", "z", "");
    torn.resources[0].name.clear();
    let received = talk.hears(torn);
    assert_eq!((received.whole, received.resources.len()), (None, 1));
}

#[test]
fn what_the_server_cannot_send_is_neither_gone_nor_missing() {
    let broken = |answer: Answer, names: &[&str]| Answer {
        errors: names
            .iter()
            .map(|name| ((*name).to_owned(), "away".to_owned()))
            .collect(),
        ..answer
    };
    let mut talk = Talk::new(Protocol::State);
    talk.want(Kind::Listeners, "*").client.opened();
    talk.speaks();
    talk.takes(answer(Kind::Listeners, "1", "a", "x y", ""), "");
    let received = talk.hears(broken(answer(Kind::Listeners, "2", "b", "", ""), &["x"]));
    assert_eq!(received.whole, Some(names("x")));
    assert_eq!(received.errors, [("x".to_owned(), "away".to_owned())]);
    talk.client.judged(received.receipt, &[], talk.now);
    assert_eq!(talk.client.status(Kind::Listeners, "x"), Status::Acked);
    assert_eq!(talk.client.status(Kind::Listeners, "y"), Status::Requested);
    // Of what nobody wants nothing is told; what is told of has not to come in time.
    let mut talk = Talk::new(Protocol::Delta);
    talk.want(Kind::Endpoints, "x y").client.opened();
    talk.speaks();
    talk.takes(
        broken(answer(Kind::Endpoints, "", "a", "", ""), &["x", "z"]),
        "",
    );
    talk.at(DOES_NOT_EXIST_AFTER.as_secs());
    let late = Lapse::Missing(Kind::Endpoints, "y".into());
    assert_eq!(talk.client.lapse(talk.now), [late]);
}

#[test]
fn a_life_ends_unless_it_is_said_to_go_on() {
    let mut talk = Talk::new(Protocol::Delta);
    talk.want(Kind::Clusters, "*").client.opened();
    talk.speaks();
    talk.takes(
        answer(Kind::Clusters, "", "a", "x@1+10 y@1+10 z@1+10 w@1", ""),
        "",
    );
    assert!(talk.client.is_mortal(Kind::Clusters, "x"));
    assert!(!talk.client.is_mortal(Kind::Clusters, "w"));
    talk.at(9);
    // One lives on, one is another version than is there, one lives as long as what was refused would have.
    talk.takes(answer(Kind::Clusters, "", "b", "~x@1+10 ~y@2+10", ""), "")
        .takes(answer(Kind::Clusters, "", "c", "z@2+10", ""), "z");
    assert_eq!(talk.client.lapse(talk.now), []);
    talk.at(10);
    let gone = |name: &str| Lapse::Expired(Kind::Clusters, name.into());
    assert_eq!(talk.speaks().client.deadline(), Some(talk.now));
    assert_eq!(talk.client.lapse(talk.now), [gone("y")]);
    talk.at(19);
    assert_eq!(talk.client.lapse(talk.now), [gone("x"), gone("z")]);
    talk.client.opened();
    talk.says(&["*Clusters has w@1"]);
}

#[test]
fn what_does_not_come_does_not_exist() {
    let missing = |name: &str| Lapse::Missing(Kind::Endpoints, name.into());
    let wait = DOES_NOT_EXIST_AFTER.as_secs();
    let mut talk = Talk::new(Protocol::State);
    talk.want(Kind::Endpoints, "x y z");
    // Nobody was asked yet.
    talk.at(100);
    assert_eq!(talk.client.lapse(talk.now), []);
    talk.client.opened();
    talk.says(&["*Endpoints x,y,z"])
        // What is refused exists.
        .takes(answer(Kind::Endpoints, "1", "a", "x y", ""), "y");
    talk.at(100 + wait - 1);
    assert_eq!(talk.client.lapse(talk.now), []);
    talk.at(100 + wait);
    assert_eq!(talk.client.lapse(talk.now), [missing("z")]);
    assert_eq!(talk.client.lapse(talk.now), [], "it is said once");
    let status = |talk: &Talk, name| talk.client.status(Kind::Endpoints, name);
    assert_eq!(status(&talk, "z"), Status::DoesNotExist);
    // Whoever has no server waits.
    talk.want(Kind::Endpoints, "z w");
    talk.says(&["Endpoints x,y,z na !'y': no", "Endpoints w,z na"]);
    talk.client.broken();
    talk.at(1000);
    assert_eq!(talk.client.lapse(talk.now), []);
    talk.client.opened();
    talk.says(&["*Endpoints w,z"])
        .takes(answer(Kind::Endpoints, "2", "b", "z", ""), "");
    assert_eq!(status(&talk, "z"), Status::Acked);
    let deadline = talk.now + DOES_NOT_EXIST_AFTER;
    assert_eq!(talk.speaks().client.deadline(), Some(deadline));
}

#[test]
fn what_was_there_before_any_server_is_told() {
    for (protocol, expected) in [
        (Protocol::State, "*Clusters v7"),
        (Protocol::Delta, "*Clusters has x@3"),
    ] {
        let mut talk = Talk::new(protocol);
        talk.want(Kind::Clusters, "*");
        talk.client.remember(Kind::Clusters, "x".into(), "3".into());
        talk.client.remember_version(Kind::Clusters, "7".into());
        talk.client.opened();
        talk.says(&[expected]);
        assert_eq!(talk.client.version_of(Kind::Clusters, "x"), Some("3"));
    }
}

#[test]
fn a_storm_of_refusals_is_slowed_down() {
    let mut talk = Talk::new(Protocol::Delta);
    talk.want(Kind::Clusters, "*").client.opened();
    let mut replies = 0;
    while talk.client.next_request(talk.now).is_some() {
        replies += 1;
    }
    for round in 0..1000 {
        let nonce = round.to_string();
        talk.takes(answer(Kind::Clusters, "", &nonce, "x@1", ""), "x");
        while talk.client.next_request(talk.now).is_some() {
            replies += 1;
        }
    }
    assert_eq!(replies, 100, "a full bucket");
    assert!(talk.client.has_request());
    let next = talk.client.deadline().unwrap();
    assert_eq!(next - talk.now, Duration::from_millis(100));
    assert!(talk.client.next_request(next).is_some());
    assert!(talk.client.next_request(next).is_none());
}

#[test]
fn reasons_are_told_as_far_as_there_is_room() {
    let mut talk = Talk::new(Protocol::Delta);
    talk.want(Kind::Clusters, "*").client.opened();
    talk.says(&["*Clusters"]);
    let received = talk.hears(answer(Kind::Clusters, "", "a", "x@1 y@1", ""));
    let long = "ü".repeat(ERROR_BYTES_MAX);
    let rejected = [("x".to_owned(), "first".to_owned()), ("y".to_owned(), long)];
    talk.client.judged(received.receipt, &rejected, talk.now);
    let error = talk.client.next_request(talk.now).unwrap().error.unwrap();
    assert!(error.starts_with("'x': first\n'y': üü"));
    assert!((ERROR_BYTES_MAX - 4..ERROR_BYTES_MAX + 4).contains(&error.len()));
}

#[test]
fn no_life_is_too_long_to_be_reckoned() {
    let mut talk = Talk::new(Protocol::Delta);
    talk.want(Kind::Clusters, "*").client.opened();
    talk.says(&["*Clusters"]);
    let forever = format!("x@1+{}", u64::MAX);
    talk.takes(answer(Kind::Clusters, "", "a", &forever, ""), "");
    talk.takes(
        answer(Kind::Clusters, "", "b", &format!("~{forever}"), ""),
        "",
    );
    talk.speaks();
    assert_eq!(talk.client.deadline(), Some(talk.now + TTL_MAX));
}

#[test]
fn answers_that_nobody_asked_for_on_this_stream_are_not_heeded() {
    let mut talk = Talk::new(Protocol::State);
    talk.want(Kind::Clusters, "*");
    let early = answer(Kind::Clusters, "1", "a", "x", "");
    assert_eq!(talk.client.received(early.clone(), talk.now), None);
    talk.client.opened();
    assert_eq!(talk.client.received(early, talk.now), None);
    let unasked = answer(Kind::Routes, "1", "b", "x", "");
    assert_eq!(talk.client.received(unasked, talk.now), None);
    talk.says(&["*Clusters"]);
    // What is wanted no longer is confirmed with its own version.
    talk.want(Kind::Endpoints, "x").says(&["Endpoints x"]);
    talk.takes(answer(Kind::Endpoints, "1", "c", "x", ""), "")
        .says(&["Endpoints x v1 nc"])
        .want(Kind::Endpoints, "")
        .says(&["Endpoints v1 nc"]);
    let late = answer(Kind::Endpoints, "2", "d", "x", "");
    assert_eq!(talk.client.received(late, talk.now), None);
    talk.says(&["Endpoints v2 nd"]);
}

#[test]
fn what_is_good_lives_on_while_a_version_that_was_refused_does() {
    let mut talk = Talk::new(Protocol::Delta);
    talk.want(Kind::Clusters, "*").client.opened();
    talk.says(&["*Clusters"]);
    let begun = talk.now;
    talk.takes(answer(Kind::Clusters, "", "a", "x@1+10", ""), "");
    talk.now = begun + Duration::from_secs(8);
    talk.takes(answer(Kind::Clusters, "", "b", "x@2+10", ""), "x");
    talk.speaks();
    assert_eq!(
        talk.client.deadline(),
        Some(begun + Duration::from_secs(18))
    );
    talk.now = begun + Duration::from_secs(16);
    talk.takes(answer(Kind::Clusters, "", "c", "~x@2+10", ""), "");
    talk.speaks();
    assert_eq!(
        talk.client.deadline(),
        Some(begun + Duration::from_secs(26))
    );
    assert_eq!(talk.client.version_of(Kind::Clusters, "x"), Some("1"));
}
