//! The pages about versions: which there are, what is different, how one gets on that is tried; and the few requests that change something.
//!
//! Those are for who works on this machine. A page in a browser there must not make them either: browsers say where a page is from.

use super::{Admin, Answer, json_of, text};
use crate::{
    diff,
    rollout::{Evidence, Refusal, Requests},
    session::Client,
    store::{self, Named, StoreError, Version},
    versions::VersionError,
    views::Served,
};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header::ORIGIN};
use serde_json::{Value, json};
use std::{
    net::IpAddr,
    time::{Duration, Instant, UNIX_EPOCH},
};

/// Of a configuration that is to be compared with what is served.
pub(super) const BODY_BYTES_MAX: usize = 64 << 20;
/// Nodes that are named in an answer.
const NODES_NAMED_MAX: usize = 20;

type Changed = fn(&Admin, &str, &[u8]) -> Answer;

/// Path, what it does, for people: by POST.
pub(super) const CHANGES: &[(&str, Changed, &str)] = &[
    (
        "/rollback",
        rollback,
        "POST ?version=N: serves that version to all, until the sources say something else",
    ),
    ("/resume", resume, "POST: what the sources say counts again"),
    (
        "/dry-run",
        dry_run,
        "POST, as `outrigger-control-plane diff --config DIR` does: what would change; nothing does",
    ),
];

/// Whether somebody may change something who comes from there, with these headers.
pub(super) fn may_change(peer: Option<IpAddr>, headers: &HeaderMap) -> bool {
    let is_local = peer.is_some_and(|peer| peer.to_canonical().is_loopback());
    is_local && !headers.contains_key(ORIGIN)
}

/// Takes time.
pub(super) fn change(admin: &Admin, path: &str, query: &str, body: &Bytes) -> Option<Answer> {
    let (_, changed, _) = CHANGES.iter().find(|(known, ..)| *known == path)?;
    Some(changed(admin, query, body))
}

fn number(query: &str, name: &str) -> Result<u64, Answer> {
    let mut fields = query.split('&').filter_map(|field| field.split_once('='));
    let value = fields.find(|(key, _)| *key == name);
    let number = value.and_then(|(_, value)| value.parse().ok());
    number.ok_or_else(|| {
        let message = format!("?{name}= must be the number of a version\n");
        text(StatusCode::BAD_REQUEST, message)
    })
}

fn refused(error: &VersionError) -> Answer {
    let status = match error {
        VersionError::Store(StoreError::NoVersion(_)) => StatusCode::NOT_FOUND,
        VersionError::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
        VersionError::Bad(_) | VersionError::NothingSaid => StatusCode::CONFLICT,
    };
    text(status, format!("{error}\n"))
}

fn rollback(admin: &Admin, query: &str, _: &[u8]) -> Answer {
    let number = match number(query, "version") {
        Ok(number) => number,
        Err(answer) => return answer,
    };
    match admin.catalog.pin(number) {
        Ok(()) => text(
            StatusCode::OK,
            format!(
                "version {number} is served until the sources say something else, or /resume\n"
            ),
        ),
        Err(error) => refused(&error),
    }
}

fn resume(admin: &Admin, _: &str, _: &[u8]) -> Answer {
    match admin.catalog.resume() {
        Ok(()) => text(StatusCode::OK, "what the sources say counts\n".to_owned()),
        Err(error) => refused(&error),
    }
}

fn dry_run(admin: &Admin, _: &str, body: &[u8]) -> Answer {
    let contents = match store::decode(body) {
        Ok(contents) => contents,
        Err(problems) => return refused(&VersionError::Bad(problems)),
    };
    let (published, served) = match admin.catalog.tried(&contents) {
        Ok(tried) => tried,
        Err(error) => return refused(&error),
    };
    let clients = admin.catalog.observed().clients();
    let is_changed = |client: &Client| {
        let now = served.as_deref().map(|served| version(served, client));
        now != Some(published.snapshot(client).version())
    };
    let changed: Vec<&str> = clients
        .iter()
        .filter(|client| is_changed(client))
        .map(|client| client.node.id.as_str())
        .collect();
    let difference = diff::text(&live(admin), &store::named(&contents));
    let (count, all) = (changed.len(), clients.len());
    let named = changed.iter().take(NODES_NAMED_MAX).copied();
    let named = named.collect::<Vec<_>>().join(", ");
    let more = if count > NODES_NAMED_MAX { ", …" } else { "" };
    let colon = if count == 0 { "" } else { ": " };
    let nodes =
        format!("{count} of {all} connected nodes would be sent something{colon}{named}{more}\n");
    text(StatusCode::OK, difference + &nodes)
}

fn version(served: &Served, client: &Client) -> String {
    let numbered = served.of(&client.node.id);
    numbered.published.snapshot(client).version()
}

fn live(admin: &Admin) -> Named {
    // Nobody waits while it is written out.
    let contents = admin.catalog.versions().live_contents().cloned();
    contents.as_ref().map(store::named).unwrap_or_default()
}

/// What is different between two versions.
pub(super) fn difference(admin: &Admin, query: &str) -> Answer {
    let numbers = (number(query, "from"), number(query, "to"));
    let (from, to) = match numbers {
        (Ok(from), Ok(to)) => (from, to),
        (Err(answer), _) | (_, Err(answer)) => return answer,
    };
    // Nobody waits while they are read and compared.
    let named = |number| {
        let bytes = admin.catalog.versions().bytes(number)?;
        let contents = store::decode(&bytes).map_err(VersionError::Bad)?;
        Ok(store::named(&contents))
    };
    match (named(from), named(to)) {
        (Ok(from), Ok(to)) => text(StatusCode::OK, diff::text(&from, &to)),
        (Err(error), _) | (_, Err(error)) => refused(&error),
    }
}

/// All versions, the newest first.
pub(super) fn versions(admin: &Admin, _: &str) -> Answer {
    let summary = admin.catalog.summary();
    let all: Vec<Version> = {
        let versions = admin.catalog.versions();
        versions.store().versions().rev().cloned().collect()
    };
    let trial = summary.trial.as_ref().map(|trial| trial.version);
    let state = |version: &Version| match version {
        it if Some(it.number) == summary.live => "live",
        it if Some(it.number) == trial => "candidate",
        it if it.rolled_back.is_some() => "rolled back",
        _ => "past",
    };
    let all: Vec<Value> = all
        .iter()
        .map(|version| {
            let then = UNIX_EPOCH + Duration::from_millis(version.at_ms);
            json!({
                "version": version.number,
                "state": state(version),
                "at_ms": version.at_ms,
                "seconds_ago": then.elapsed().unwrap_or_default().as_secs_f64(),
                "hash": version.hash,
                "bytes": version.bytes,
                "changes": version.changes.count,
                "changed": version.changes.named,
                "rolled_back": version.rolled_back,
            })
        })
        .collect();
    json_of(&json!({ "versions": all, "store": of_store(admin) }))
}

/// How versions are kept.
pub(super) fn of_store(admin: &Admin) -> Value {
    let summary = admin.catalog.summary();
    json!({
        "kept": if summary.is_on_disk { "on disk" } else { "in memory" },
        "problem": summary.problem,
        "waiting": summary.is_waiting,
        "notice": summary.notice,
    })
}

/// Why something else is served than what the sources say, if it is.
pub(super) fn against_sources(admin: &Admin) -> Option<String> {
    let summary = admin.catalog.summary();
    let live = summary.live?;
    if summary.is_pinned {
        return Some(format!(
            "version {live} was chosen by hand: what the sources say is not served until it changes, or POST /resume"
        ));
    }
    if let Some((number, why)) = summary.taken_back {
        return Some(format!(
            "version {number}, which the sources say, was taken back ({why}): version {live} is served until they say something else, or POST /resume"
        ));
    }
    let trial = summary.trial.as_ref();
    trial.map(|trial| {
        let number = trial.version;
        format!("version {number} is tried by some nodes: see /rollout")
    })
}

/// How what is tried gets on.
pub(super) fn rollout(admin: &Admin, _: &str) -> Answer {
    let summary = admin.catalog.summary();
    let rollout = admin.catalog.rollout();
    let trial = rollout.as_ref().map(|rollout| {
        json!({
            "version": rollout.version,
            "steps_percent": rollout.steps(),
            "percent": rollout.percent(),
            "step_seconds": rollout.elapsed(Instant::now()).as_secs_f64(),
            "evidence": of_evidence(rollout.evidence()),
        })
    });
    let taken_back = summary.taken_back.as_ref();
    let taken_back = taken_back.map(|(number, why)| json!({ "version": number, "why": why }));
    json_of(&json!({
        "live": summary.live,
        "pinned": summary.is_pinned,
        "candidate": trial,
        "rolled_back": taken_back,
    }))
}

fn of_evidence(evidence: &Evidence) -> Value {
    let refusals = evidence.refusals.iter().map(|refusal| {
        let Refusal {
            node,
            type_url,
            error,
        } = refusal;
        json!({ "node": node, "type_url": type_url, "error": error })
    });
    let requests = |it: Requests| {
        json!({
            "finished": it.finished,
            "failed": it.failed,
            "first_tokens": it.first_tokens,
            "ttft_ms": it.ttft_ms(),
        })
    };
    json!({
        "nodes": evidence.nodes,
        "gone": evidence.gone,
        "not_answered": evidence.pending,
        "waits_for": evidence.waits_for,
        "refusals": refusals.collect::<Vec<_>>(),
        "requests": requests(evidence.chosen),
        "requests_of_others": requests(evidence.others),
        "requests_before": requests(evidence.before),
    })
}
