//! Draining: one switch that listeners and connections watch, and a count of what still runs.

use outrigger_filters::services::Serving;
use std::sync::{
    Arc,
    atomic::{
        AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
};
use tokio::sync::watch;

/// The switch.
#[derive(Debug, Clone)]
pub struct Drain {
    /// What health checks are told.
    pub serving: Arc<Serving>,
    switch: Arc<watch::Sender<bool>>,
    running: Arc<AtomicUsize>,
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            serving: Arc::default(),
            switch: Arc::new(watch::Sender::new(false)),
            running: Arc::default(),
        }
    }
}

/// Counts a connection as running until dropped.
#[derive(Debug)]
pub struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Drain {
    /// Begins to drain; idempotent.
    pub fn begin(&self) {
        self.serving.draining.store(true, Relaxed);
        self.switch.send_replace(true);
    }

    /// Whether it has begun.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        *self.switch.borrow()
    }

    /// Completes when draining begins.
    pub async fn begun(&self) {
        let mut watch = self.switch.subscribe();
        // The sender lives in `self`, so this cannot fail.
        let _ = watch.wait_for(|begun| *begun).await;
    }

    /// Whether clients are asked to go elsewhere: health checks fail.
    #[must_use]
    pub fn is_unhealthy(&self) -> bool {
        self.serving.failed.load(Relaxed)
    }

    /// One more connection.
    #[must_use]
    pub fn enter(&self) -> Running {
        self.running.fetch_add(1, SeqCst);
        Running(self.running.clone())
    }

    /// Connections that run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.load(SeqCst)
    }
}
