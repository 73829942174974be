//! What one request leaves behind: its line in the access log, its metrics, and what formats say of it meanwhile.

use super::{ConnectionInfo, Manager, span, tunnel::Asked};
use crate::{
    access_log::{AccessLogs, Captured, Entry},
    metrics::HttpStats,
    route::{self, Applied, Edits, Facts},
    trace::Parent,
};
use http::{Method, Version, header, request::Parts};
use outrigger_filters::{
    end_address::EndAddress,
    error::Flag,
    filter::{End, Heads, LogFields, RouteFacts},
    sse::Summary,
    trace::Step,
};
use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

/// What the access log needs, kept until the response is over.
pub(super) struct Record {
    pub(super) logs: Arc<AccessLogs>,
    pub(super) stats: Arc<HttpStats>,
    pub(super) captured: Captured,
    /// What `local_reply_config` needs of it.
    pub(super) replied: Captured,
    pub(super) start: SystemTime,
    pub(super) started: Instant,
    pub(super) head_sent: Duration,
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) authority: String,
    pub(super) protocol: Version,
    pub(super) code: u16,
    pub(super) bytes_received: u64,
    /// The request had a body that was not all here with its head.
    pub(super) unread: bool,
    pub(super) connection: Arc<ConnectionInfo>,
    /// Its client: whoever is at the other end, unless proxies before us are believed.
    pub(super) remote: EndAddress,
    /// The upgrade it asks for, if it may have it.
    pub(super) asked: Option<Asked>,
    pub(super) request_id: Arc<str>,
    pub(super) trace_id: Arc<str>,
    /// The span that its sender made for it.
    pub(super) parent: Option<Parent>,
    /// Its span, if it is traced.
    pub(super) step: Option<Step>,
    pub(super) route: Arc<RouteFacts>,
    pub(super) ended: bool,
}

impl Record {
    pub(super) fn begin(manager: &Manager, parts: &Parts, connection: Arc<ConnectionInfo>) -> Self {
        let length = parts
            .headers
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok());
        manager.stats.downstream_rq_active.increment(1.0);
        Self {
            logs: manager.logs.load_full(),
            stats: manager.stats.clone(),
            captured: Captured::default(),
            replied: Captured::default(),
            start: SystemTime::now(),
            started: Instant::now(),
            head_sent: Duration::ZERO,
            method: parts.method.clone(),
            path: parts
                .uri
                .path_and_query()
                .map_or_else(String::new, |path| path.as_str().to_owned()),
            authority: route::authority(&parts.uri, &parts.headers).to_owned(),
            protocol: parts.version,
            code: 0,
            bytes_received: length.unwrap_or(0),
            unread: false,
            remote: connection.remote.clone(),
            connection,
            asked: None,
            request_id: Arc::default(),
            trace_id: Arc::default(),
            parent: None,
            step: None,
            route: Arc::default(),
            ended: false,
        }
    }

    /// Path or host are not what the client sent.
    pub(super) fn retarget(&mut self, parts: &Parts) {
        let path = parts.uri.path_and_query();
        self.path = path.map_or_else(String::new, |path| path.as_str().to_owned());
        route::authority(&parts.uri, &parts.headers).clone_into(&mut self.authority);
    }

    /// The edits of a route on this request.
    pub(super) fn edits(
        &self,
        edits: &Arc<Edits>,
        route: &Arc<RouteFacts>,
        parts: &Parts,
    ) -> Arc<dyn Heads> {
        let facts = Facts {
            start: self.start,
            started: self.started,
            method: self.method.clone(),
            path: self.path.clone(),
            authority: self.authority.clone(),
            protocol: self.protocol,
            remote: self.remote.clone(),
            direct_remote: self.connection.direct_remote.clone(),
            local: self.connection.local.clone(),
            connection_id: self.connection.id,
            tls: self.connection.tls.clone(),
            request_id: self.request_id.clone(),
            trace_id: self.trace_id.clone(),
            route: route.clone(),
        };
        Arc::new(Applied::new(edits.clone(), facts, parts))
    }

    pub(super) fn end(mut self, mut summary: Summary) {
        self.ended = true;
        if summary.end == End::ClientGone {
            summary
                .log
                .flags
                .push(Flag::DownstreamConnectionTermination);
            if summary.log.details.is_empty() {
                summary.log.details = "downstream_remote_disconnect".into();
            }
        }
        self.close(&summary);
    }

    fn close(&mut self, summary: &Summary) {
        if let Some(step) = self.step.take() {
            span::end(step, self, summary);
        }
        let duration = self.started.elapsed();
        self.stats.downstream_rq_active.decrement(1.0);
        self.stats.completed(self.code, duration);
        if summary.end == End::ClientGone {
            self.stats.downstream_rq_rx_reset.increment(1);
        }
        if summary.log.flags.contains(&Flag::StreamIdleTimeout) {
            self.stats.downstream_rq_idle_timeout.increment(1);
        }
        if self.logs.is_empty() {
            return;
        }
        let entry = Entry {
            bytes_sent: summary.bytes,
            ttft: summary.first_byte.map(|at| at.duration_since(self.started)),
            itl_p99: summary.gap_p99,
            ..self.entry_after(duration, &summary.log)
        };
        self.logs.write(&entry, &self.captured);
    }

    /// What formats say of it so far.
    pub(super) fn entry<'a>(&'a self, log: &'a LogFields) -> Entry<'a> {
        self.entry_after(self.started.elapsed(), log)
    }

    fn entry_after<'a>(&'a self, duration: Duration, log: &'a LogFields) -> Entry<'a> {
        Entry {
            start: self.start,
            duration,
            request_duration: None,
            response_duration: Some(self.head_sent),
            method: &self.method,
            path: &self.path,
            authority: &self.authority,
            protocol: Some(self.protocol),
            code: self.code,
            bytes_received: self.bytes_received,
            bytes_sent: 0,
            downstream_remote: &self.remote,
            downstream_direct_remote: &self.connection.direct_remote,
            downstream_local: &self.connection.local,
            connection_id: self.connection.id,
            tls: self.connection.tls.as_deref(),
            request_id: &self.request_id,
            trace_id: &self.trace_id,
            route_name: &self.route.name,
            virtual_host: &self.route.virtual_host,
            ttft: None,
            itl_p99: None,
            log,
            local_reply_body: "",
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // The client went away before there was a response: nothing else will tell of this request.
        if !self.ended {
            self.ended = true;
            let mut log = LogFields::default();
            log.flags.push(Flag::DownstreamConnectionTermination);
            log.details = "downstream_remote_disconnect".into();
            let summary = Summary {
                end: End::ClientGone,
                bytes: 0,
                first_byte: None,
                gap_p99: None,
                log,
            };
            self.close(&summary);
        }
        self.connection.exchange.end();
    }
}
