//! What responses were made of: so that a refusal speaks against the version that is tried, and only for what is new in that.

use crate::{
    session::{Client, Request, Response},
    snapshot::{ByName, Resource},
    views::Served,
};
use outrigger_xds::subscription::{Kind, Protocol};
use std::collections::BTreeMap;

/// Answers that are waited for; of older ones, nobody knows what they were of.
const AWAITED_MAX: usize = 64;

/// Of one stream.
#[derive(Debug, Default)]
pub(super) struct MadeOf {
    /// Responses that brought something else than what is live, by their nonces, and of which version.
    awaited: BTreeMap<u64, u64>,
    /// With which words the client refused what is live, of types of which each response holds all.
    refused_live: BTreeMap<Kind, String>,
}

impl MadeOf {
    /// A client is told this; gives whether it is something of the version that is tried.
    pub(super) fn said(
        &mut self,
        protocol: Protocol,
        served: &Served,
        client: &Client,
        response: &Response,
    ) -> bool {
        let version = served.of(&client.node.id).number;
        let is_tried = version != served.live.number;
        if !is_tried || !is_other(protocol, served, client, response) {
            return false;
        }
        if let Ok(nonce) = response.nonce.parse() {
            self.awaited.insert(nonce, version);
        }
        if self.awaited.len() > AWAITED_MAX {
            self.awaited.pop_first();
        }
        true
    }

    /// A client answers: the version that this speaks against, if it does.
    pub(super) fn speaks_against(&mut self, protocol: Protocol, request: &Request) -> Option<u64> {
        let version = self.awaited.remove(&request.nonce.parse().ok()?);
        let (kind, error) = (Kind::of(&request.type_url)?, request.error.as_ref()?);
        // Such a response brings all that was refused before, too.
        let is_whole = protocol == Protocol::State && kind.is_whole();
        if version.is_none() && is_whole {
            self.refused_live.insert(kind, error.clone());
        }
        let is_as_ever = is_whole && self.refused_live.get(&kind) == Some(error);
        version.filter(|_| !is_as_ever)
    }
}

/// Whether it brings, or takes away, anything in which what is tried is not as what is live, for this client. Certificates that are issued to it are of neither.
fn is_other(protocol: Protocol, served: &Served, client: &Client, response: &Response) -> bool {
    let Some(kind) = Kind::of(&response.type_url) else {
        return false;
    };
    let tried = served.of(&client.node.id).published.snapshot(client);
    let (tried, live) = (
        tried.of(kind),
        served.live.published.snapshot(client).of(kind),
    );
    let has = |all: &ByName, resource: &Resource| {
        let known = all.get(&resource.name);
        known.is_some_and(|known| known.version == resource.version)
    };
    let mut brought = response.resources.iter();
    let is_new = brought.any(|it| has(tried, it) && !has(live, it));
    let mut gone = live.keys().filter(|name| !tried.contains_key(*name));
    // What is gone is named, or, where a response holds all of a type, left out.
    let is_whole = protocol == Protocol::State && kind.is_whole();
    let is_left_out =
        |name: &str| is_whole && response.resources.iter().all(|it| &*it.name != name);
    is_new || gone.any(|name| response.removed.contains(name) || is_left_out(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        rollout::place,
        views::{Numbered, Published},
    };
    use outrigger_xds::resource::bootstrap::Node;
    use std::sync::Arc;

    const KIND: Kind = Kind::Clusters;

    fn resource(name: &str, version: &str) -> Arc<Resource> {
        Arc::new(Resource {
            name: name.into(),
            version: version.into(),
            any: prost_types::Any::default(),
            endpoints: None,
            ..Resource::default()
        })
    }

    fn numbered(number: u64, resources: &[(&str, &str)]) -> Numbered {
        let mut published = Published::default();
        for (name, version) in resources {
            let resource = resource(name, version);
            published.general.ours.insert(KIND, resource.clone());
            published.general.others.insert(KIND, resource);
        }
        Numbered {
            number,
            published: Arc::new(published),
        }
    }

    fn client() -> Client {
        let node = Node {
            id: "n".into(),
            ..Node::default()
        };
        Client {
            node,
            ..Client::default()
        }
    }

    fn response(nonce: u64, resources: &[(&str, &str)], removed: &[&str]) -> Response {
        let resources = resources.iter();
        Response {
            type_url: KIND.type_url().into(),
            nonce: nonce.to_string(),
            resources: resources.map(|(name, it)| resource(name, it)).collect(),
            removed: removed.iter().map(|name| (*name).into()).collect(),
            ..Response::default()
        }
    }

    fn nack(nonce: u64, error: &str) -> Request {
        Request {
            type_url: KIND.type_url().into(),
            nonce: nonce.to_string(),
            error: Some(error.into()),
            ..Request::default()
        }
    }

    fn tried() -> Served {
        Served {
            live: numbered(1, &[("a", "1"), ("b", "1"), ("c", "1")]),
            trial: Some((numbered(2, &[("a", "2"), ("b", "1")]), place("n"))),
        }
    }

    #[test]
    fn what_is_live_speaks_against_nothing() {
        for (resources, removed, expected) in [
            (&[("a", "2")][..], &[][..], Some(2)),
            // The same words of something else.
            (&[("b", "1")], &[], None),
            (&[("b", "1"), ("a", "2")], &[], Some(2)),
            (&[], &["c"], Some(2)),
            (&[], &["never there"], None),
            // Of neither.
            (&[("issued", "7")], &[], None),
        ] {
            let mut made_of = MadeOf::default();
            let is_of_it = made_of.said(
                Protocol::Delta,
                &tried(),
                &client(),
                &response(7, resources, removed),
            );
            assert_eq!(is_of_it, expected.is_some(), "{resources:?} {removed:?}");
            let against = made_of.speaks_against(Protocol::Delta, &nack(7, "no"));
            assert_eq!(against, expected, "{resources:?} {removed:?}");
            let again = made_of.speaks_against(Protocol::Delta, &nack(7, "no"));
            assert_eq!(again, None);
        }
        // Nor what a node is told that does not try it.
        let mut served = tried();
        served.trial = None;
        let mut made_of = MadeOf::default();
        made_of.said(
            Protocol::Delta,
            &served,
            &client(),
            &response(7, &[("a", "2")], &[]),
        );
        let against = made_of.speaks_against(Protocol::Delta, &nack(7, "no"));
        assert_eq!(against, None);
    }

    /// Where each response holds all, what was refused ever since is in each.
    #[test]
    fn the_state_of_the_world_is_refused_as_ever_or_anew() {
        for (error, expected) in [("b is bad", None), ("a is bad", Some(2))] {
            let mut made_of = MadeOf::default();
            let live = [("a", "1"), ("b", "1"), ("c", "1")];
            made_of.said(
                Protocol::State,
                &tried(),
                &client(),
                &response(1, &live, &[]),
            );
            let of_live = made_of.speaks_against(Protocol::State, &nack(1, "b is bad"));
            assert_eq!(of_live, None);
            let news = [("a", "2"), ("b", "1")];
            made_of.said(
                Protocol::State,
                &tried(),
                &client(),
                &response(2, &news, &[]),
            );
            let against = made_of.speaks_against(Protocol::State, &nack(2, error));
            assert_eq!(against, expected, "{error}");
        }
    }

    /// There, nothing is named that is gone.
    #[test]
    fn what_a_whole_type_leaves_out_is_of_what_is_tried() {
        let all = response(3, &[("b", "1"), ("c", "1")], &[]);
        let fewer = response(4, &[("b", "1")], &[]);
        for (response, expected) in [(all, false), (fewer, true)] {
            let mut made_of = MadeOf::default();
            let is_of_it = made_of.said(Protocol::State, &tried(), &client(), &response);
            assert_eq!(is_of_it, expected, "{response:?}");
        }
    }

    #[test]
    fn answers_are_not_waited_for_without_end() {
        let mut made_of = MadeOf::default();
        for nonce in 0..=AWAITED_MAX as u64 {
            made_of.said(
                Protocol::Delta,
                &tried(),
                &client(),
                &response(nonce, &[("a", "2")], &[]),
            );
        }
        let mut against = |nonce| made_of.speaks_against(Protocol::Delta, &nack(nonce, "no"));
        assert_eq!((against(0), against(1)), (None, Some(2)));
    }
}
