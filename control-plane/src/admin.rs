//! The admin: what is served, who takes it, whether all is well. Over HTTP, for people and Prometheus; nothing can be changed by it.

use crate::{catalog::Catalog, clients::Clients, figures, lrs::Loads, snapshot::Snapshot, status};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use outrigger_xds::{load::written, subscription::Kind};
use serde_json::{Value, json};
use std::{convert::Infallible, sync::Arc, time::Duration, time::SystemTime};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

/// Connections that may be open at once.
const ADMIN_CONNECTIONS_MAX: usize = 64;
/// A connection is closed after that.
const ADMIN_CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// After an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the admin shows.
#[derive(Debug)]
pub struct Admin {
    /// What is served.
    pub catalog: Arc<Catalog>,
    /// To whom.
    pub clients: Arc<Clients>,
    /// What load they report.
    pub loads: Arc<Loads>,
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
        "/config_dump",
        config_dump,
        "what is served; ?node=ID: to this node; for=others: to who is not an Outrigger proxy",
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
    let lines = ENDPOINTS.iter();
    let lines = lines.map(|(path, _, what)| format!("{path}: {what}\n"));
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
    json!({ "version": published.map(|it| it.version.clone()), "sources": sources })
}

fn config_dump(admin: &Admin, query: &str) -> Answer {
    let Some(published) = admin.catalog.published() else {
        return json_of(&json!({ "configs": [] }));
    };
    let fields = || query.split('&').filter_map(|field| field.split_once('='));
    let node = fields().find(|(key, _)| *key == "node");
    let view = published.view(node.map_or("", |(_, id)| id));
    let snapshot = if fields().any(|field| field == ("for", "others")) {
        &view.others
    } else {
        &view.ours
    };
    json_of(&json!({ "version": published.version, "configs": configs(snapshot) }))
}

fn configs(snapshot: &Snapshot) -> Vec<Value> {
    let all = Kind::ALL.into_iter();
    let all = all.flat_map(|kind| snapshot.of(kind).values().map(move |it| (kind, it)));
    all.map(|(kind, resource)| {
        let body = match kind {
            // Keys are nobody's business.
            Kind::Secrets => json!("left out"),
            Kind::Clusters | Kind::Endpoints | Kind::Listeners | Kind::Routes => {
                written::to_json(&resource.any).unwrap_or_default()
            }
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
        let mut response = Response::new(Full::from(answer.body));
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
        let stream = match listener.accept().await {
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
            continue;
        };
        let admin = admin.clone();
        tokio::spawn(async move {
            let serving = timeout(ADMIN_CONNECTION_TIMEOUT, serve_one(stream, admin));
            // One that is kept open for too long is cut.
            let _ = serving.await;
            drop(slot);
        });
    }
}

async fn serve_one(stream: TcpStream, admin: Arc<Admin>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = admin.answer(&request);
        async move { Ok::<_, Infallible>(response) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = serving.await {
        tracing::debug!(%error, "admin: connection ended");
    }
}
