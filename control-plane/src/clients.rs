//! Who is connected: a session for each stream, to be looked at while it goes on.

use crate::session::Session;
use outrigger_xds::subscription::Protocol;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::SystemTime,
};

/// Streams that may be open at once.
pub const STREAMS_MAX: usize = 20_000;

/// A stream.
#[derive(Debug)]
pub struct Stream {
    /// Counts up.
    pub id: u64,
    /// Of which service.
    pub service: &'static str,
    /// Where it comes from, if that is known.
    pub peer: Option<SocketAddr>,
    /// Since when.
    pub since: SystemTime,
    session: Mutex<Session>,
    told_all: AtomicU64,
}

impl Stream {
    /// Its session; nobody keeps it for long. What a panic leaves of it is as good as before.
    pub fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its client was told all of this version, for which it asked. Who says so has its session.
    pub fn told_all(&self, version: u64) {
        self.told_all.store(version, Relaxed);
    }

    /// Of which version its client was told all last; who asks has its session.
    pub fn knows(&self) -> u64 {
        self.told_all.load(Relaxed)
    }
}

/// The streams that are open.
#[derive(Debug, Default)]
pub struct Clients {
    last: AtomicU64,
    open: Mutex<BTreeMap<u64, Arc<Stream>>>,
}

impl Clients {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Stream>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more, until what comes back is dropped; none if there are too many.
    #[must_use]
    pub fn enter(
        self: &Arc<Self>,
        service: &'static str,
        protocol: Protocol,
        peer: Option<SocketAddr>,
    ) -> Option<Entry> {
        let mut open = self.lock();
        if open.len() >= STREAMS_MAX {
            return None;
        }
        let id = self.last.fetch_add(1, Relaxed) + 1;
        let stream = Arc::new(Stream {
            id,
            service,
            peer,
            since: SystemTime::now(),
            session: Mutex::new(Session::new(protocol)),
            told_all: AtomicU64::new(0),
        });
        open.insert(id, stream.clone());
        metrics::gauge!("outrigger_control_plane_streams", "service" => service).increment(1.0);
        Some(Entry {
            clients: self.clone(),
            stream,
        })
    }

    /// Those that are open.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Stream>> {
        self.lock().values().cloned().collect()
    }
}

/// A stream that is open.
#[derive(Debug)]
pub struct Entry {
    clients: Arc<Clients>,
    /// It.
    pub stream: Arc<Stream>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.clients.lock().remove(&self.stream.id);
        let service = self.stream.service;
        metrics::gauge!("outrigger_control_plane_streams", "service" => service).decrement(1.0);
    }
}
