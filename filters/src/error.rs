//! One error type for everything that can go wrong with a request: who, which of Envoy's flags, may a retry help.

use crate::body::BodyError;
use http::{HeaderMap, StatusCode};
use std::{
    borrow::Cow,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
    time::Duration,
};

/// Envoy's response flags (the subset that can happen here); `Display` gives the short code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flag {
    /// NR: no route.
    NoRouteFound,
    /// NFCF: a filter's configuration has not come.
    NoFilterConfigFound,
    /// NC: no such cluster.
    NoClusterFound,
    /// UH: no healthy upstream.
    NoHealthyUpstream,
    /// UF: connection failed.
    UpstreamConnectionFailure,
    /// UC: upstream closed the connection.
    UpstreamConnectionTermination,
    /// UR: upstream reset the stream.
    UpstreamRemoteReset,
    /// UPE: upstream broke the protocol.
    UpstreamProtocolError,
    /// UT: upstream was too slow.
    UpstreamRequestTimeout,
    /// UO: a circuit breaker.
    UpstreamOverflow,
    /// URX: retries used up.
    UpstreamRetryLimitExceeded,
    /// SI: no byte for too long.
    StreamIdleTimeout,
    /// DT: took too long in all.
    DurationTimeout,
    /// DC: the client went away.
    DownstreamConnectionTermination,
    /// DPE: the client broke the protocol.
    DownstreamProtocolError,
    /// LR: reset here.
    LocalReset,
    /// DO: refused here, draining or overloaded.
    DropOverload,
    /// LH: a health check of this proxy failed.
    FailedLocalHealthCheck,
    /// RL: over a limit of requests or tokens.
    RateLimited,
    /// DI: delayed on purpose.
    DelayInjected,
    /// FI: ended on purpose.
    FaultInjected,
    /// None: Envoy has no flag for it. Not logged.
    Unflagged,
}

/// Why we give up on an engine before its answer is whole. It is noted before the answer is dropped, and read by whoever
/// counts the request; without it, the client wants the answer no more.
#[derive(Debug, Clone, Default)]
pub struct GivenUp(Arc<AtomicU8>);

impl GivenUp {
    /// Those of our reasons that are the engine's fault; kept as the place in this list, from 1.
    const REASONS: [Flag; 4] = [
        Flag::StreamIdleTimeout,
        Flag::DurationTimeout,
        Flag::UpstreamRequestTimeout,
        Flag::UpstreamRemoteReset,
    ];

    /// What is dropped next is given up for this reason. Others than the engine's fault are not kept.
    pub fn note(&self, reason: Flag) {
        let places = Self::REASONS.iter().zip(1..);
        let place = places.into_iter().find(|(known, _)| **known == reason);
        if let Some((_, place)) = place {
            self.0.store(place, Relaxed);
        }
    }

    /// It was dropped; what comes next is well.
    pub fn clear(&self) {
        self.0.store(0, Relaxed);
    }

    /// The reason, if there is one.
    #[must_use]
    pub fn reason(&self) -> Option<Flag> {
        let place = usize::from(self.0.load(Relaxed)).checked_sub(1)?;
        Self::REASONS.get(place).copied()
    }
}

impl Flag {
    /// Envoy's short code.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoRouteFound => "NR",
            Self::NoFilterConfigFound => "NFCF",
            Self::NoClusterFound => "NC",
            Self::NoHealthyUpstream => "UH",
            Self::UpstreamConnectionFailure => "UF",
            Self::UpstreamConnectionTermination => "UC",
            Self::UpstreamRemoteReset => "UR",
            Self::UpstreamProtocolError => "UPE",
            Self::UpstreamRequestTimeout => "UT",
            Self::UpstreamOverflow => "UO",
            Self::UpstreamRetryLimitExceeded => "URX",
            Self::StreamIdleTimeout => "SI",
            Self::DurationTimeout => "DT",
            Self::DownstreamConnectionTermination => "DC",
            Self::DownstreamProtocolError => "DPE",
            Self::LocalReset => "LR",
            Self::DropOverload => "DO",
            Self::FailedLocalHealthCheck => "LH",
            Self::RateLimited => "RL",
            Self::DelayInjected => "DI",
            Self::FaultInjected => "FI",
            Self::Unflagged => "-",
        }
    }
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who is to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The client.
    Downstream,
    /// This proxy.
    Proxy,
    /// The engine, or the proxy beside it.
    Upstream,
}

/// May trying again help?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// No.
    No,
    /// Nothing of the request had been sent: always safe.
    NothingSent,
    /// It had been sent, and nothing came back: safe for what may run twice.
    NothingReceived,
}

/// What went wrong with a request before its response began.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message} ({flag}, {details})")]
pub struct Error {
    /// Who.
    pub origin: Origin,
    /// Envoy's flag.
    pub flag: Flag,
    /// Status to answer with.
    pub status: StatusCode,
    /// `%RESPONSE_CODE_DETAILS%`.
    pub details: Cow<'static, str>,
    /// For the client: Envoy's body text where Envoy has one.
    pub message: Cow<'static, str>,
    /// May trying again help?
    pub retry: Retry,
    /// A reused connection turned out to be closed: the same endpoint is worth another try at once.
    pub stale: bool,
    /// The upstream refused the stream, and did nothing with it.
    pub refused: bool,
    /// `Retry-After` to send.
    pub retry_after: Option<Duration>,
    /// What filters change in the headers of the local reply.
    pub edits: Edits,
}

type EditReply = Arc<dyn Fn(StatusCode, &mut HeaderMap) + Send + Sync>;

/// Changes to the headers of a local reply that is not made yet, in the order they were asked for.
#[derive(Clone, Default)]
pub struct Edits(Vec<EditReply>);

impl Edits {
    /// One more.
    pub fn add(&mut self, edit: impl Fn(StatusCode, &mut HeaderMap) + Send + Sync + 'static) {
        self.0.push(Arc::new(edit));
    }

    /// Makes them all.
    pub fn apply(&self, status: StatusCode, headers: &mut HeaderMap) {
        for edit in &self.0 {
            edit(status, headers);
        }
    }
}

impl fmt::Debug for Edits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} edits", self.0.len())
    }
}

impl Error {
    /// An error nobody should retry, with Envoy's words.
    pub fn new(
        origin: Origin,
        flag: Flag,
        status: StatusCode,
        details: impl Into<Cow<'static, str>>,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self {
            origin,
            flag,
            status,
            details: details.into(),
            message: message.into(),
            retry: Retry::No,
            stale: false,
            refused: false,
            retry_after: None,
            edits: Edits::default(),
        }
    }

    /// A circuit breaker of this proxy refuses it. Nothing was sent: a proxy in front of this one may go elsewhere.
    #[must_use]
    pub fn overflow() -> Self {
        let mut error =
            Self::upstream_reset(Flag::UpstreamOverflow, "overflow", Retry::NothingSent);
        error.origin = Origin::Proxy;
        error
    }

    /// Whether [`Self::overflow`] made it.
    #[must_use]
    pub fn is_own_overflow(&self) -> bool {
        self.origin == Origin::Proxy && self.flag == Flag::UpstreamOverflow
    }

    /// Whether the upstream broke, or was not there, rather than being too busy or too slow.
    #[must_use]
    pub fn is_breakdown(&self) -> bool {
        matches!(
            self.flag,
            Flag::UpstreamConnectionFailure
                | Flag::UpstreamConnectionTermination
                | Flag::UpstreamRemoteReset
                | Flag::NoHealthyUpstream
        )
    }

    /// No endpoint can serve it now.
    #[must_use]
    pub fn no_healthy_upstream() -> Self {
        let mut error = Self::new(
            Origin::Upstream,
            Flag::NoHealthyUpstream,
            StatusCode::SERVICE_UNAVAILABLE,
            "no_healthy_upstream",
            "no healthy upstream",
        );
        error.retry_after = Some(Duration::from_secs(1));
        error
    }

    /// The upstream failed before response headers; `reason` is Envoy's reset reason, e.g. `connection termination`.
    #[must_use]
    pub fn upstream_reset(flag: Flag, reason: &str, retry: Retry) -> Self {
        Self {
            origin: Origin::Upstream,
            flag,
            // Envoy's statuses: what broke HTTP is a bad gateway, all else may be better in a moment.
            status: match flag {
                Flag::UpstreamProtocolError => StatusCode::BAD_GATEWAY,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            },
            details: format!(
                "upstream_reset_before_response_started{{{}}}",
                reason.replace(' ', "_")
            )
            .into(),
            message: format!(
                "upstream connect error or disconnect/reset before headers. reset reason: {reason}"
            )
            .into(),
            retry,
            stale: false,
            refused: false,
            retry_after: None,
            edits: Edits::default(),
        }
    }

    /// Nothing came for too long, before a response: 408 while the client still sends, else 504.
    #[must_use]
    pub fn stream_idle(upload_runs: bool) -> Self {
        let (origin, status) = if upload_runs {
            (Origin::Downstream, StatusCode::REQUEST_TIMEOUT)
        } else {
            (Origin::Upstream, StatusCode::GATEWAY_TIMEOUT)
        };
        Self::new(
            origin,
            Flag::StreamIdleTimeout,
            status,
            "stream_idle_timeout",
            "stream timeout",
        )
    }

    /// The whole exchange took too long.
    #[must_use]
    pub fn duration_timeout() -> Self {
        Self::new(
            Origin::Upstream,
            Flag::DurationTimeout,
            StatusCode::GATEWAY_TIMEOUT,
            "max_duration_timeout",
            "downstream duration timeout",
        )
    }

    /// The upstream took too long.
    #[must_use]
    pub fn upstream_timeout() -> Self {
        Self::new(
            Origin::Upstream,
            Flag::UpstreamRequestTimeout,
            StatusCode::GATEWAY_TIMEOUT,
            "response_timeout",
            "upstream request timeout",
        )
    }

    /// The client went away or broke its body; nobody will read the answer.
    #[must_use]
    pub fn downstream_gone(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(
            Origin::Downstream,
            Flag::DownstreamConnectionTermination,
            StatusCode::BAD_REQUEST,
            "downstream_remote_disconnect",
            reason,
        )
    }

    /// The client's body is no body.
    #[must_use]
    pub fn downstream_garbage() -> Self {
        Self::new(
            Origin::Downstream,
            Flag::DownstreamProtocolError,
            StatusCode::BAD_REQUEST,
            "http1.codec_error",
            "Bad Request",
        )
    }

    /// The client's body broke.
    #[must_use]
    pub fn of_client_body(error: &BodyError) -> Self {
        if error.flag == Flag::DownstreamProtocolError {
            Self::downstream_garbage()
        } else {
            Self::downstream_gone(error.message.clone())
        }
    }

    /// With another verdict on retrying.
    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }
}
