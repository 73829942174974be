//! Worker threads: one runtime each, which accepts and serves what its share of every listener brings.
//!
//! A worker that does nothing but relay events of streams finds fewer of them at each look at its sockets the faster it
//! is, and pays for each look. It lets them [gather](Pace) for a moment then. Neither a lone event waits nor what an
//! engine's step brings for all its streams at once: it takes many looks in quick succession.

use crate::{listeners::Share, upstream};
use std::{
    cell::Cell,
    num::NonZero,
    thread,
    time::{Duration, Instant},
};
use tokio::{
    runtime,
    sync::{mpsc, watch},
};

/// How often a worker sweeps its pool.
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// Looks that follow each other faster than this find little.
const QUICK: Duration = Duration::from_micros(300);
/// That many quick ones in a row are more than the streams of a step: events come without rest.
const QUICK_LOOKS: u32 = 64;
/// What the system may add to a moment's rest; by default it is 50 µs, as much as the rest itself.
const TIMER_SLACK_NS: NonZero<u64> = NonZero::new(1000).expect("invariant: not zero");

thread_local! {
    static PACE: Pace = const { Pace::new() };
}

/// How fast a worker's looks at its sockets follow each other.
struct Pace {
    /// Events of streams came since the last look.
    relayed: Cell<bool>,
    last: Cell<Option<Instant>>,
    quick: Cell<u32>,
}

impl Pace {
    const fn new() -> Self {
        Self {
            relayed: Cell::new(false),
            last: Cell::new(None),
            quick: Cell::new(0),
        }
    }

    /// Before another look; whether events are to gather first.
    fn look(&self, now: Instant) -> bool {
        let before = self.last.replace(Some(now));
        let is_quick = before.is_some_and(|before| now.duration_since(before) < QUICK);
        self.quick
            .set(if is_quick { self.quick.get() + 1 } else { 0 });
        self.relayed.take() && self.quick.get() >= QUICK_LOOKS
    }
}

/// Part of a stream came: this thread relays events.
pub(crate) fn relays_events() {
    PACE.with(|pace| pace.relayed.set(true));
}

/// Starts a thread for each share of the listeners.
///
/// # Errors
/// The system has no more threads or sockets.
pub(crate) fn start(
    shares: Vec<mpsc::UnboundedReceiver<Share>>,
    stopped: &watch::Receiver<bool>,
    gather: Duration,
) -> std::io::Result<Vec<thread::JoinHandle<()>>> {
    let spawn = |(index, shares)| {
        let stopped = stopped.clone();
        let runtime = runtime(gather)?;
        thread::Builder::new()
            .name(format!("outrigger-w{index}"))
            .spawn(move || {
                if !gather.is_zero()
                    && let Err(error) =
                        rustix::thread::set_current_timer_slack(Some(TIMER_SLACK_NS))
                {
                    tracing::debug!(%error, "events gather for longer than they are told to");
                }
                runtime.block_on(work(shares, stopped));
            })
    };
    shares.into_iter().enumerate().map(spawn).collect()
}

fn runtime(gather: Duration) -> std::io::Result<runtime::Runtime> {
    let mut builder = runtime::Builder::new_current_thread();
    builder.enable_all();
    if !gather.is_zero() {
        let gathered = metrics::counter!("outrigger_worker_gathers_total");
        builder.on_thread_park(move || {
            if PACE.with(|pace| pace.look(Instant::now())) {
                thread::sleep(gather);
                gathered.increment(1);
            }
        });
    }
    builder.build()
}

async fn work(mut shares: mpsc::UnboundedReceiver<Share>, mut stopped: watch::Receiver<bool>) {
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    loop {
        tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => return,
            Some(share) = shares.recv() => drop(tokio::spawn(share.serve())),
            _ = tick.tick() => upstream::h1::close_idle(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After how many looks, each `gap` after the one before, events gather for the first time.
    fn waits_after(gap: Duration, relayed: impl Fn(u32) -> bool) -> Option<u32> {
        let pace = Pace::new();
        let begun = Instant::now();
        (0..10 * QUICK_LOOKS).find(|&look| {
            pace.relayed.set(relayed(look));
            pace.look(begun + gap * look)
        })
    }

    #[test]
    fn events_gather_where_they_come_without_rest() {
        let quick = QUICK - Duration::from_micros(1);
        assert_eq!(waits_after(quick, |_| true), Some(QUICK_LOOKS));
    }

    #[test]
    fn a_lone_event_never_waits() {
        assert_eq!(waits_after(QUICK, |_| true), None);
    }

    #[test]
    fn who_relays_no_events_never_waits() {
        let quick = Duration::from_micros(1);
        assert_eq!(waits_after(quick, |_| false), None);
        let late = 2 * QUICK_LOOKS;
        assert_eq!(waits_after(quick, |look| look >= late), Some(late));
    }
}
