//! Draining: a switch that listeners and connections watch, and a count of what still runs.
//!
//! The process has one, and every configuration of a listener has one below it: replaced or removed, it drains while
//! the process goes on.

use outrigger_filters::services::Serving;
use std::sync::{
    Arc,
    atomic::{
        AtomicBool, AtomicUsize,
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
    own: Option<Arc<Own>>,
}

/// Of a part of the process.
#[derive(Debug)]
struct Own {
    stage: watch::Sender<Stage>,
    /// What requests look at.
    retired: AtomicBool,
    running: AtomicUsize,
}

/// How far the drain of a part is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Serving,
    /// Nothing new; connections are asked to end.
    Retired,
    /// What still runs is cut.
    Over,
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            serving: Arc::default(),
            switch: Arc::new(watch::Sender::new(false)),
            running: Arc::default(),
            own: None,
        }
    }
}

/// Counts a connection as running until dropped.
#[derive(Debug)]
pub struct Running(Arc<AtomicUsize>, Option<Arc<Own>>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
        if let Some(own) = &self.1 {
            own.running.fetch_sub(1, SeqCst);
        }
    }
}

impl Drain {
    /// One for a part of the process: drains when the process does, or alone.
    #[must_use]
    pub fn part(&self) -> Self {
        Self {
            own: Some(Arc::new(Own {
                stage: watch::Sender::new(Stage::Serving),
                retired: AtomicBool::new(false),
                running: AtomicUsize::new(0),
            })),
            ..self.clone()
        }
    }

    /// Whether both are of the same part of the process.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        match (&self.own, &other.own) {
            (Some(ours), Some(theirs)) => Arc::ptr_eq(ours, theirs),
            _ => false,
        }
    }

    /// Begins to drain the process; idempotent.
    pub fn begin(&self) {
        self.serving.draining.store(true, Relaxed);
        self.switch.send_replace(true);
    }

    /// Begins to drain a part alone. Its connections are asked to end as soon as that disturbs nobody.
    pub fn retire(&self) {
        self.advance(Stage::Retired);
    }

    /// Ends what still runs of a part.
    pub fn cut(&self) {
        self.advance(Stage::Over);
    }

    fn advance(&self, stage: Stage) {
        if let Some(own) = &self.own {
            own.retired.store(true, Relaxed);
            own.stage.send_replace(stage);
        }
    }

    /// Whether the process drains.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        *self.switch.borrow()
    }

    /// Completes when draining begins, of the process or of the part.
    pub async fn begun(&self) {
        tokio::select! {
            () = self.process_begun() => {}
            () = self.reached(Stage::Retired) => {}
        }
    }

    /// Completes when the process begins to drain: then idle connections end at once.
    pub async fn process_begun(&self) {
        let mut watch = self.switch.subscribe();
        // The sender lives in `self`, so this cannot fail.
        let _ = watch.wait_for(|begun| *begun).await;
    }

    /// Completes when what still runs of the part is to be cut.
    pub async fn over(&self) {
        self.reached(Stage::Over).await;
    }

    /// Completes when who has not asked anything yet is to go: the process drains, or what runs of the part is cut. (A part
    /// that is only replaced still serves who came before.)
    pub async fn ends(&self) {
        tokio::select! {
            () = self.process_begun() => {}
            () = self.over() => {}
        }
    }

    async fn reached(&self, stage: Stage) {
        match &self.own {
            None => std::future::pending().await,
            Some(own) => {
                let mut watch = own.stage.subscribe();
                let _ = watch.wait_for(|now| *now >= stage).await;
            }
        }
    }

    /// Whether clients are asked to go elsewhere: health checks fail, or this part of the process is replaced.
    #[must_use]
    pub fn is_unhealthy(&self) -> bool {
        self.serving.failed.load(Relaxed) || self.is_retired()
    }

    fn is_retired(&self) -> bool {
        let own = self.own.as_ref();
        own.is_some_and(|own| own.retired.load(Relaxed))
    }

    /// One more connection.
    #[must_use]
    pub fn enter(&self) -> Running {
        self.running.fetch_add(1, SeqCst);
        if let Some(own) = &self.own {
            own.running.fetch_add(1, SeqCst);
        }
        Running(self.running.clone(), self.own.clone())
    }

    /// Connections that run, in all parts.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.load(SeqCst)
    }

    /// Connections that run in this part.
    #[must_use]
    pub fn own_running(&self) -> usize {
        let own = self.own.as_ref();
        own.map_or(0, |own| own.running.load(SeqCst))
    }
}
