//! The admin: what is served, who takes it, whether all is well. Over HTTP, for people and Prometheus; what can be changed by it is in `versions`.

mod versions;

use crate::{
    catalog::Catalog, clients::Clients, figures, lrs::Loads, registry::Registry,
    snapshot::Snapshot, status,
};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt, Collected, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use outrigger_xds::{load::written, registry::Holder, subscription::Kind};
use serde_json::{Value, json};
use std::{
    convert::Infallible, net::IpAddr, pin::pin, sync::Arc, time::Duration, time::SystemTime,
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

/// Connections that may be open at once.
const ADMIN_CONNECTIONS_MAX: usize = 64;
/// A connection is closed after that, and after the answer that it is at.
const ADMIN_CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// To finish an answer on a connection that is too old, and to tell one too many that it is.
const FAREWELL: Duration = Duration::from_secs(1);
const REFUSAL: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 27\r\nconnection: close\r\n\r\ntoo many admin connections\n";
/// After an accept that failed.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the admin shows.
#[derive(Debug)]
pub struct Admin {
    /// What is served.
    pub catalog: Arc<Catalog>,
    /// To whom.
    pub clients: Arc<Clients>,
    /// What load they report.
    pub loads: Arc<Loads>,
    /// Who registered, if anybody may.
    pub registry: Option<Arc<Registry>>,
}

type Shown = fn(&Admin, &str) -> Answer;

struct Answer {
    status: StatusCode,
    content_type: &'static str,
    body: String,
}

/// Path, what it shows, for people.
const ENDPOINTS: &[(&str, Shown, &str)] = &[
    ("/", help, "this page"),
    ("/ready", ready, "200 if something is served, else 503"),
    (
        "/clients",
        clients,
        "who is connected, and what each took or refused",
    ),
    (
        "/sources",
        |admin, _| json_of(&sources(admin)),
        "where resources come from, and what is wrong there",
    ),
    (
        "/leases",
        leases,
        "which engines registered, from where, until when, and which pools they are in",
    ),
    (
        "/config_dump",
        config_dump,
        "what is served; ?node=ID: to this node; for=others: to who is not an Outrigger proxy",
    ),
    (
        "/versions",
        versions::versions,
        "all versions that are kept, and which of them is served",
    ),
    (
        "/diff",
        versions::difference,
        "?from=N&to=M: what is different between two versions",
    ),
    (
        "/rollout",
        versions::rollout,
        "how a version gets on that some nodes try",
    ),
    ("/stats/prometheus", stats, "metrics"),
];

fn text(status: StatusCode, body: String) -> Answer {
    let content_type = "text/plain; charset=UTF-8";
    Answer {
        status,
        content_type,
        body,
    }
}

fn json_of(value: &Value) -> Answer {
    Answer {
        status: StatusCode::OK,
        content_type: "application/json",
        body: format!("{value:#}\n"),
    }
}

fn help(_: &Admin, _: &str) -> Answer {
    let lines = ENDPOINTS.iter().map(|(path, _, what)| (path, what));
    let changes = versions::CHANGES.iter();
    let lines = lines.chain(changes.map(|(path, _, what)| (path, what)));
    let lines = lines.map(|(path, what)| format!("{path}: {what}\n"));
    text(StatusCode::OK, lines.collect())
}

fn clients(admin: &Admin, _: &str) -> Answer {
    json_of(&json!({
        "clients": status::to_json(&admin.clients),
        "loads": admin.loads.to_json(),
    }))
}

fn ready(admin: &Admin, _: &str) -> Answer {
    match admin.catalog.published() {
        Some(published) => text(StatusCode::OK, format!("LIVE {}\n", published.version)),
        None => text(
            StatusCode::SERVICE_UNAVAILABLE,
            "PRE_INITIALIZING\n".to_owned(),
        ),
    }
}

fn stats(admin: &Admin, _: &str) -> Answer {
    for (state, count) in status::behind(&admin.clients) {
        metrics::gauge!("outrigger_control_plane_clients_behind", "state" => state)
            .set(f64::from(u32::try_from(count).unwrap_or(u32::MAX)));
    }
    text(StatusCode::OK, figures::page())
}

fn sources(admin: &Admin) -> Value {
    let ago = |then: Option<SystemTime>| {
        then.map(|then| then.elapsed().unwrap_or_default().as_secs_f64())
    };
    let status = admin.catalog.status().into_iter();
    let sources: Vec<Value> = status
        .map(|(name, status)| {
            let problems: Vec<String> = status.problems.iter().map(ToString::to_string).collect();
            json!({
                "name": name,
                "resources": status.resources,
                "good_seconds_ago": ago(status.good_at),
                "tried_seconds_ago": ago(status.tried_at),
                "problems": problems,
            })
        })
        .collect();
    let published = admin.catalog.published();
    let against = versions::against_sources(admin);
    json!({
        "version": published.map(|it| it.version.clone()),
        "number": admin.catalog.summary().live,
        "not_as_sources_say": against,
        "store": versions::of_store(admin),
        "sources": sources,
    })
}

fn leases(admin: &Admin, _: &str) -> Answer {
    let places = admin.catalog.places();
    let placed = |holder: &Holder, engine: &str| {
        let place = places.get(holder).and_then(|engines| engines.get(engine));
        match place {
            Some(Ok(place)) => (json!(place.pool), json!(place.through)),
            Some(Err(why)) => (json!({ "none": why }), Value::Null),
            None => (json!({ "none": "not judged yet" }), Value::Null),
        }
    };
    let leases = admin.registry.as_ref().map(|it| it.to_json(placed));
    json_of(&json!({ "leases": leases }))
}

fn config_dump(admin: &Admin, query: &str) -> Answer {
    let Some(served) = admin.catalog.served() else {
        return json_of(&json!({ "configs": [] }));
    };
    let fields = || query.split('&').filter_map(|field| field.split_once('='));
    let node = fields().find(|(key, _)| *key == "node");
    let node = node.map_or_else(String::new, |(_, id)| percent_decoded(id));
    let numbered = served.of(&node);
    let published = &numbered.published;
    let view = published.view(&node);
    // A node that nothing is for by itself is shown what is for all such.
    let node = Some(node).filter(|node| published.nodes.contains_key(node));
    let snapshot = if fields().any(|field| field == ("for", "others")) {
        &view.others
    } else {
        &view.ours
    };
    json_of(&json!({
        "version": published.version,
        "number": numbered.number,
        "node": node,
        "configs": configs(snapshot),
    }))
}

fn percent_decoded(text: &str) -> String {
    let mut pieces = text.split('%');
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        let hex = piece
            .get(..2)
            .filter(|hex| hex.bytes().all(|it| it.is_ascii_hexdigit()));
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend(&piece.as_bytes()[2..]);
            }
            // Nothing that means more.
            None => {
                bytes.push(b'%');
                bytes.extend(piece.as_bytes());
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn configs(snapshot: &Snapshot) -> Vec<Value> {
    let all = Kind::ALL.into_iter();
    let all = all.flat_map(|kind| snapshot.of(kind).values().map(move |it| (kind, it)));
    all.map(|(kind, resource)| {
        let body = match kind {
            // Keys are nobody's business.
            Kind::Secrets => json!("left out"),
            Kind::Runtimes
            | Kind::Clusters
            | Kind::Endpoints
            | Kind::Listeners
            | Kind::Routes
            | Kind::Extensions => written::to_json(&resource.any).unwrap_or_default(),
        };
        json!({
            "type_url": kind.type_url(),
            "name": resource.name,
            "version": resource.version,
            "resource": body,
        })
    })
    .collect()
}

impl Admin {
    /// Some pages wait for what is judged: they are made beside the runtime.
    async fn answer_beside(self: Arc<Self>, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let answering = tokio::task::spawn_blocking(move || self.answer(&request));
        answering.await.unwrap_or_else(|error| {
            text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into()
        })
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        let found = ENDPOINTS.iter().find(|(known, ..)| *known == path);
        let answer = match found {
            Some((_, shown, _)) if request.method() == Method::GET => {
                shown(self, request.uri().query().unwrap_or_default())
            }
            Some(_) => text(StatusCode::METHOD_NOT_ALLOWED, "GET only\n".to_owned()),
            None => text(
                StatusCode::NOT_FOUND,
                "no such path; / has all\n".to_owned(),
            ),
        };
        answer.into()
    }

    /// Takes time, and is done beside the runtime.
    async fn change(
        self: Arc<Self>,
        peer: Option<IpAddr>,
        request: Request<Incoming>,
    ) -> Response<Full<Bytes>> {
        if !versions::may_change(peer, request.headers()) {
            let message = "only from this machine, and not from a page in a browser\n";
            return text(StatusCode::FORBIDDEN, message.to_owned()).into();
        }
        let (head, body) = request.into_parts();
        let body = Limited::new(body, versions::BODY_BYTES_MAX).collect().await;
        let Ok(body) = body.map(Collected::to_bytes) else {
            let message = "the body is too long, or did not come\n".to_owned();
            return text(StatusCode::PAYLOAD_TOO_LARGE, message).into();
        };
        let changing = tokio::task::spawn_blocking(move || {
            let query = head.uri.query().unwrap_or_default();
            versions::change(&self, head.uri.path(), query, &body)
        });
        let unknown = || {
            let message = "no such path for POST; / has all\n".to_owned();
            text(StatusCode::METHOD_NOT_ALLOWED, message)
        };
        match changing.await {
            Ok(answer) => answer.unwrap_or_else(unknown).into(),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into(),
        }
    }
}

impl From<Answer> for Response<Full<Bytes>> {
    fn from(answer: Answer) -> Self {
        let mut response = Self::new(Full::from(answer.body));
        *response.status_mut() = answer.status;
        let value = http::HeaderValue::from_static(answer.content_type);
        response.headers_mut().insert(CONTENT_TYPE, value);
        response
    }
}

/// Serves until it is dropped.
pub async fn serve(listener: TcpListener, admin: Arc<Admin>) {
    let slots = Arc::new(Semaphore::new(ADMIN_CONNECTIONS_MAX));
    loop {
        let mut stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "admin: cannot accept");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            metrics::counter!("outrigger_control_plane_admin_connections_refused_total")
                .increment(1);
            // A fresh socket takes so little at once.
            let _ = timeout(FAREWELL, stream.write_all(REFUSAL)).await;
            continue;
        };
        let admin = admin.clone();
        tokio::spawn(async move {
            serve_one(stream, admin, ADMIN_CONNECTION_TIMEOUT).await;
            drop(slot);
        });
    }
}

async fn serve_one(stream: TcpStream, admin: Arc<Admin>, age_max: Duration) {
    let peer = stream.peer_addr().ok().map(|peer| peer.ip());
    let service = service_fn(move |request: Request<Incoming>| {
        let admin = admin.clone();
        async move {
            let response = if request.method() == Method::POST {
                admin.change(peer, request).await
            } else {
                admin.answer_beside(request).await
            };
            Ok::<_, Infallible>(response)
        }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service);
    let mut serving = pin!(serving);
    tokio::select! {
        served = &mut serving => {
            if let Err(error) = served {
                tracing::debug!(%error, "admin: connection ended");
            }
            return;
        }
        () = sleep(age_max) => {}
    }
    serving.as_mut().graceful_shutdown();
    let _ = timeout(FAREWELL, serving).await;
}
