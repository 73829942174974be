//! What each client is sent: the resources of all sources and what short ones become, as the node of the client sees them, with or
//! without what only our proxies understand.
//!
//! Nodes that a short resource names have a view of their own; all others share the general one. Envoy's resources are in all views, but for secrets
//! that nothing in a view names: keys are for those who use them. A view is judged as a whole: what is wrong with one of them is wrong.

use crate::{
    foreign, grpc, issued, references,
    registered::{self, Places},
    rollout,
    session::Client,
    short::{Document, Problems},
    snapshot::{self, Resource, Snapshot},
    source::{Content, Placed, Problem},
    translate::{self, translate},
};
use outrigger_xds::{registry::Registration, subscription::Kind};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, OnceLock},
};

/// What is served.
#[derive(Debug, Default)]
pub struct Published {
    /// Of all of it.
    pub version: String,
    /// What clients are sent that no short resource names.
    pub general: View,
    /// What the others are sent, by their node's id.
    pub nodes: BTreeMap<String, View>,
    /// Which pools engines that registered are in.
    pub places: Arc<Places>,
}

impl Published {
    /// Of a node.
    #[must_use]
    pub fn view(&self, node: &str) -> &View {
        self.nodes.get(node).unwrap_or(&self.general)
    }

    /// What a client is sent.
    #[must_use]
    pub fn snapshot(&self, client: &Client) -> &Snapshot {
        let view = self.view(&client.node.id);
        if client.is_ours() {
            &view.ours
        } else if client.is_grpc() {
            view.grpc.get_or_init(|| grpc::snapshot(&view.others))
        } else {
            &view.others
        }
    }
}

/// What is served at a moment: one version to all, or another one to some.
#[derive(Debug)]
pub struct Served {
    /// To all, or to all others.
    pub live: Numbered,
    /// To nodes whose place is not above this.
    pub trial: Option<(Numbered, u64)>,
}

/// What is served of a version.
#[derive(Debug, Clone)]
pub struct Numbered {
    /// Which.
    pub number: u64,
    /// It.
    pub published: Arc<Published>,
}

impl Served {
    /// To a node.
    #[must_use]
    pub fn of(&self, node: &str) -> &Numbered {
        match &self.trial {
            Some((trial, last)) if rollout::place(node) <= *last => trial,
            _ => &self.live,
        }
    }

    /// Whether what is tried is anything else for a client than what is live.
    #[must_use]
    pub fn concerns(&self, client: &Client) -> bool {
        let live = self.live.published.snapshot(client);
        let trial = self.trial.as_ref();
        trial.is_some_and(|(trial, _)| {
            let trial = trial.published.snapshot(client);
            let is_same = trial.shares_all(live) || client.is_grpc() && trial.is_as(live);
            !is_same
        })
    }

    /// Whether everybody is sent the same of both.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let key = |served: &Self| {
            let version = |it: &Numbered| (it.number, it.published.version.clone());
            let trial = served.trial.as_ref();
            (
                version(&served.live),
                trial.map(|(it, last)| (version(it), *last)),
            )
        };
        key(self) == key(other)
    }
}

/// What a node is sent, whichever program it runs.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// Our proxies.
    pub ours: Snapshot,
    /// Others.
    pub others: Snapshot,
    /// Clients of gRPC: the same as they understand it, made when the first of them asks.
    grpc: OnceLock<Snapshot>,
}

impl View {
    /// Has this from now on, in place of what had its name. What is as it was in another view is taken from there.
    fn insert(&mut self, placed: &Placed, last: &Self) -> Result<(), Problem> {
        let (kind, name) = key(placed);
        let own = Resource::from(&placed.written);
        let known = |snapshot: &Snapshot| snapshot.of(kind).get(name).cloned();
        let before = known(&last.ours).filter(|before| before.version == own.version);
        if let (Some(own), Some(other)) = (before, known(&last.others)) {
            self.ours.insert(kind, own);
            self.others.insert(kind, other);
            return Ok(());
        }
        let own = Arc::new(own);
        if foreign::is_of_ours(&placed.written.meaning) {
            self.ours.insert(kind, own);
            return Ok(());
        }
        let other = match foreign::without_ours(&placed.written) {
            Ok(Some(other)) => Arc::new(Resource::from(&other)),
            Ok(None) => own.clone(),
            Err(errors) => {
                return Err(Problem {
                    origin: placed.origin.clone(),
                    message: format!("{name}: without filters of ours: {errors}"),
                });
            }
        };
        self.others.insert(kind, other);
        self.ours.insert(kind, own);
        Ok(())
    }

    /// Of secrets and configurations of filters only those.
    fn keep(&mut self, named: &BTreeSet<(Kind, &str)>) {
        for snapshot in [&mut self.ours, &mut self.others] {
            for kind in [Kind::Secrets, Kind::Extensions] {
                snapshot.keep(kind, |name| named.contains(&(kind, name)));
            }
        }
    }

    fn share(&mut self, last: &Self) {
        self.ours.share(&last.ours);
        self.others.share(&last.others);
        // Made here, and not when somebody waits for it, where there are such clients.
        if let Some(before) = last.grpc.get() {
            let mut grpc = grpc::snapshot(&self.others);
            grpc.share(before);
            self.grpc = OnceLock::from(grpc);
        }
    }
}

fn key(placed: &Placed) -> (Kind, &str) {
    (placed.written.meaning.kind(), &placed.written.name)
}

/// What short resources become.
#[derive(Debug, Default)]
struct Made {
    /// For all nodes.
    general: Vec<Placed>,
    /// For one, in place of what has the same name for all.
    nodes: BTreeMap<String, Vec<Placed>>,
}

impl Made {
    fn new(resources: Vec<translate::Resource>) -> Self {
        let mut made = Self::default();
        for resource in resources {
            let placed = Placed {
                place: resource.origin.to_string(),
                origin: resource.origin.file,
                written: resource.v3.into_written(),
            };
            match resource.node {
                None => made.general.push(placed),
                Some(node) => made.nodes.entry(node).or_default().push(placed),
            }
        }
        made
    }

    /// What one of the nodes gets.
    fn of_node<'a>(&'a self, own: &'a [Placed]) -> impl Iterator<Item = &'a Placed> {
        let replaced: BTreeSet<_> = own.iter().map(key).collect();
        let general = self.general.iter();
        general
            .filter(move |placed| !replaced.contains(&key(placed)))
            .chain(own)
    }
}

/// What is to be served of what all sources have. What did not change is shared with what is served by now.
///
/// # Errors
/// Everything that is wrong with it as a whole. Secrets that are issued may be named if `issues` says so.
pub fn publish(
    all: &[&Content],
    last: &Published,
    issues: bool,
) -> Result<Published, Vec<Problem>> {
    let raw: Vec<&Placed> = all.iter().flat_map(|content| &content.raw).collect();
    let short = all.iter().flat_map(|content| content.short.iter().cloned());
    let mut short: Vec<Document> = short.collect();
    let registered: Vec<&Registration> = all.iter().flat_map(|content| &content.nodes).collect();
    let places = registered::place(&mut short, &registered);
    let issued: BTreeSet<String> = issued::names().filter(|_| issues).collect();
    let made = made(&short, &raw, &issued)?;
    judge(&raw, &made, &issued)?;
    let published = build(&raw, &made, last)?;
    Ok(Published {
        places: Arc::new(places),
        ..published
    })
}

fn made(
    short: &[Document],
    raw: &[&Placed],
    issued: &BTreeSet<String>,
) -> Result<Made, Vec<Problem>> {
    let secrets = raw.iter().filter_map(|placed| match key(placed) {
        (Kind::Secrets, name) => Some(name.to_owned()),
        _ => None,
    });
    let secrets = secrets.chain(issued.iter().cloned());
    let resources = translate(short, &secrets.collect())
        .map_err(|Problems(found)| found.into_iter().map(Problem::from).collect::<Vec<_>>())?;
    Ok(Made::new(resources))
}

/// Whether each view fits together. What is wrong with several is said once.
fn judge(raw: &[&Placed], made: &Made, issued: &BTreeSet<String>) -> Result<(), Vec<Problem>> {
    let mut problems = misfits(raw, made.general.iter(), issued);
    for own in made.nodes.values() {
        problems.extend(misfits(raw, made.of_node(own), issued));
    }
    finish(problems)
}

fn misfits<'a>(
    raw: &[&'a Placed],
    short: impl Iterator<Item = &'a Placed>,
    issued: &BTreeSet<String>,
) -> Vec<Problem> {
    let all: Vec<&Placed> = raw.iter().copied().chain(short).collect();
    references::problems(&all, issued)
}

fn finish(mut problems: Vec<Problem>) -> Result<(), Vec<Problem>> {
    problems.sort();
    problems.dedup();
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems)
    }
}

fn build(raw: &[&Placed], made: &Made, last: &Published) -> Result<Published, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut whole = View::default();
    for placed in raw.iter().copied().chain(&made.general) {
        problems.extend(whole.insert(placed, &last.general).err());
    }
    let mut general = whole.clone();
    general.keep(&references::kept_of(
        raw.iter().copied().chain(&made.general),
    ));
    general.share(&last.general);
    let mut nodes = BTreeMap::new();
    for (node, own) in &made.nodes {
        let before = last.view(node);
        let mut view = whole.clone();
        for placed in own {
            problems.extend(view.insert(placed, before).err());
        }
        let all = raw.iter().copied().chain(made.of_node(own));
        view.keep(&references::kept_of(all));
        view.share(before);
        nodes.insert(node.clone(), view);
    }
    finish(problems)?;
    Ok(Published {
        version: version(&general, &nodes),
        general,
        nodes,
        places: Arc::default(),
    })
}

fn version(general: &View, nodes: &BTreeMap<String, View>) -> String {
    let of_nodes = nodes.iter().map(|(node, view)| (node.as_str(), view));
    let versions: Vec<(&str, String)> = [("", general)]
        .into_iter()
        .chain(of_nodes)
        .map(|(node, view)| (node, view.ours.version()))
        .collect();
    let set = versions.iter();
    snapshot::version_of(set.map(|(node, version)| (*node, version.as_str())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::short;
    use outrigger_xds::load::{Syntax, documents, written};

    const FLEET: &str = "apiVersion: outrigger.dev/v1
kind: Fleet
metadata: {name: chat}
spec:
  pools:
  - name: all
    engines:
    - {node: a, address: '127.0.0.1:8000'}
    - {node: b, address: '127.0.0.1:8000'}
  nodes: {a: '10.0.0.1:8081', b: '10.0.0.2:8081'}
---
apiVersion: outrigger.dev/v1
kind: Gateway
metadata: {name: front}
spec:
  listeners: [{address: ':8080'}]
  routes: [{fleet: chat}]
";

    fn cluster(name: &str) -> String {
        format!(
            "{{'@type': type.googleapis.com/envoy.config.cluster.v3.Cluster, name: {name}, type: STATIC, load_assignment: {{cluster_name: {name}}}}}"
        )
    }

    fn content(short: &str, raw: &[String]) -> Content {
        let raw = raw.iter().flat_map(|text| {
            let values = documents(text, Syntax::Yaml).unwrap();
            values.into_iter().map(|value| Placed {
                origin: "raw.yaml".into(),
                place: String::new(),
                written: written::resource(value, "").unwrap(),
            })
        });
        Content {
            raw: raw.collect(),
            short: short::read("fleet.yaml", short, Syntax::Yaml).unwrap(),
            nodes: Vec::new(),
        }
    }

    fn published(content: &Content, last: &Published) -> Published {
        publish(&[content], last, false).unwrap()
    }

    fn problems(content: &Content) -> Vec<String> {
        let problems = publish(&[content], &Published::default(), false).unwrap_err();
        problems.iter().map(ToString::to_string).collect()
    }

    fn names(view: &View, kind: Kind) -> Vec<&str> {
        view.ours.of(kind).keys().map(String::as_str).collect()
    }

    #[test]
    fn nodes_are_sent_what_translate_says_and_all_that_is_raw() {
        let content = content(FLEET, &[cluster("raw")]);
        let published = published(&content, &Published::default());
        let resources = translate(&content.short, &BTreeSet::new()).unwrap();
        for node in ["a", "b", "stranger"] {
            let view = published.view(node);
            let chosen = translate::for_node(&resources, Some(node));
            let mut expected: Vec<(String, Vec<u8>)> = chosen
                .iter()
                .map(|it| (it.v3.name().to_owned(), it.v3.to_any().value))
                .chain([("raw".to_owned(), content.raw[0].written.any.value.clone())])
                .collect();
            let all = Kind::ALL
                .into_iter()
                .flat_map(|kind| view.ours.of(kind).values());
            let mut got: Vec<_> = all
                .map(|it| (it.name.clone(), it.any.value.clone()))
                .collect();
            expected.sort();
            got.sort();
            assert!(got == expected, "{node}");
        }
        let (a, stranger) = (published.view("a"), published.view("stranger"));
        assert_eq!(names(a, Kind::Clusters), ["chat", "chat/local", "raw"]);
        assert_eq!(names(stranger, Kind::Clusters), ["chat", "raw"]);
        let of = |node: &str| published.view(node).ours.of(Kind::Endpoints)["chat"].clone();
        assert_ne!(of("a"), of("b"));
        assert_ne!(of("a"), of("stranger"));
    }

    #[test]
    fn strangers_to_us_get_no_filters_of_ours_whichever_node_they_are() {
        let published = published(&content(FLEET, &[]), &Published::default());
        for node in ["a", "stranger"] {
            let has_ours = |user_agent: &str| {
                let mut client = Client {
                    user_agent: user_agent.into(),
                    ..Client::default()
                };
                client.node.id = node.into();
                let front = &published.snapshot(&client).of(Kind::Listeners)["front"];
                String::from_utf8_lossy(&front.any.value).contains("outrigger.filters")
            };
            assert!(has_ours("outrigger") && !has_ours("envoy"), "{node}");
            assert!(!has_ours("gRPC C-core linux"), "{node}");
        }
    }

    #[test]
    fn what_does_not_change_is_shared() {
        let first = published(&content(FLEET, &[cluster("raw")]), &Published::default());
        let again = published(&content(FLEET, &[cluster("raw")]), &first);
        assert_eq!(again.version, first.version);
        let is_shared = |one: &View, other: &View, kind| {
            Arc::ptr_eq(one.ours.of(kind), other.ours.of(kind))
                && Arc::ptr_eq(one.others.of(kind), other.others.of(kind))
        };
        for node in ["a", "b", "stranger"] {
            for kind in Kind::ALL {
                assert!(
                    is_shared(again.view(node), first.view(node), kind),
                    "{node} {kind:?}"
                );
            }
        }
        // Where b is, is no news to b but for its own listener, and no listener to a.
        let more = FLEET.replace("b: '10.0.0.2:8081'}", "b: '10.0.0.2:8082'}");
        let other = published(&content(&more, &[cluster("raw")]), &again);
        assert_ne!(other.version, again.version);
        for (node, endpoints, listeners) in [("a", false, true), ("b", true, false)] {
            let (new, old) = (other.view(node), again.view(node));
            assert!(is_shared(new, old, Kind::Clusters), "{node}");
            assert_eq!(is_shared(new, old, Kind::Endpoints), endpoints, "{node}");
            assert_eq!(is_shared(new, old, Kind::Listeners), listeners, "{node}");
        }
        // A node that is named no more is as all others.
        let without = FLEET
            .replace("    - {node: b, address: '127.0.0.1:8000'}\n", "")
            .replace(", b: '10.0.0.2:8081'", "");
        let without = published(&content(&without, &[]), &again);
        assert_eq!(without.nodes.keys().collect::<Vec<_>>(), ["a"]);
        assert_eq!(names(without.view("b"), Kind::Clusters), ["chat"]);
    }

    #[test]
    fn every_view_must_fit_together() {
        // Of one name with what is for all, and with what is for two nodes: said once each.
        let twice = [cluster("chat"), cluster("chat/local")];
        assert_eq!(
            problems(&content(FLEET, &twice)),
            [
                "fleet.yaml: document 1 (Fleet chat): cluster 'chat' is also in raw.yaml",
                "fleet.yaml: document 1 (Fleet chat): cluster 'chat/local' is also in raw.yaml",
            ]
        );
        let routes = |to: &str| {
            format!(
                "{{'@type': type.googleapis.com/envoy.config.route.v3.RouteConfiguration, name: table, virtual_hosts: [{{name: all, domains: ['*'], routes: [{{match: {{prefix: /}}, route: {{cluster: {to}}}}}]}}]}}"
            )
        };
        published(&content(FLEET, &[routes("chat")]), &Published::default());
        // Only nodes have that one.
        assert_eq!(
            problems(&content(FLEET, &[routes("chat/local")])),
            [
                "raw.yaml: route_configuration 'table' names the cluster 'chat/local', which does not exist"
            ]
        );
        let nowhere = FLEET.replace("fleet: chat", "fleet: nowhere");
        assert_eq!(
            problems(&content(&nowhere, &[])),
            [
                "fleet.yaml: document 2 (Gateway front): spec.routes[0].fleet: there is no Fleet nowhere"
            ]
        );
    }

    #[test]
    fn secrets_that_short_resources_name_are_raw_ones() {
        let tls = FLEET.replace("':8080'", "':8080', tls: {secret: front}");
        let expected = "fleet.yaml: document 2 (Gateway front): spec.listeners[0].tls.secret: there is no secret 'front'";
        assert_eq!(problems(&content(&tls, &[])), [expected]);
        let secret = "{'@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret, name: front, tls_certificate: {certificate_chain: {filename: /c.pem}, private_key: {filename: /k.pem}}}";
        let published = published(&content(&tls, &[secret.into()]), &Published::default());
        assert_eq!(names(published.view("a"), Kind::Secrets), ["front"]);
    }
}
