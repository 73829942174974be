//! Tasks that look for what is new: in watched files, in the fleet, among names.

use super::Shared;
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

/// How often watched files are looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// Brings the views of clusters up to date with who is in the fleet and what names mean.
pub(super) async fn refresh_views(
    (mut members, mut names): (watch::Receiver<u64>, watch::Receiver<u64>),
    shared: Arc<Shared>,
) {
    loop {
        let changed = tokio::select! {
            changed = members.changed() => changed,
            changed = names.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
        shared.clusters.refresh();
    }
}

/// Looks at watched files, off the main thread: a file system may hang.
pub(super) async fn watch_files(shared: Arc<Shared>) {
    let mut tick = tokio::time::interval(WATCH_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if shared.discovery().is_idle() {
            continue;
        }
        let looking = shared.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || looking.look()).await {
            tracing::error!(%error, "watching files failed");
        }
    }
}
