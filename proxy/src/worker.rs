//! Worker threads: one runtime each, which accepts and serves what its share of every listener brings.
//!
//! A worker that does nothing but relay events of streams finds fewer of them at each look at its sockets the faster it
//! is, and pays for each look. It lets them [gather](Pace) for a moment then. Neither a lone event waits nor what an
//! engine's step brings for all its streams at once: it takes many looks in quick succession.
//!
//! Waking who waits for our bytes is the dearest part of a write, and who has read them sleeps again. Of the requests and
//! answers that become ready in one [turn](Turn), all but the first [leave](FirstWrite) at its end, one right after the
//! other: most find their reader awake.

use crate::{listeners::Share, upstream};
use std::{
    cell::Cell,
    num::NonZero,
    task, thread,
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

thread_local! {
    static TURN: Turn = const { Turn::new() };
}

/// What a worker does until nothing is ready: it runs each task that is, and looks at its sockets after every 61.
struct Turn {
    /// On other threads nothing waits.
    is_worker: Cell<bool>,
    /// Begun in this turn.
    writes: Cell<u32>,
}

impl Turn {
    const fn new() -> Self {
        Self {
            is_worker: Cell::new(false),
            writes: Cell::new(0),
        }
    }

    /// Another write; whether it waits for the tasks that are ready before it.
    fn write(&self) -> bool {
        let before = self.writes.replace(self.writes.get().saturating_add(1));
        self.is_worker.get() && before > 0
    }

    /// How many writes waited.
    fn end(&self) -> u32 {
        self.is_worker.set(true);
        self.writes.take().saturating_sub(1)
    }
}

/// As if a worker had written in this turn already.
#[cfg(test)]
pub(crate) fn begin_busy_turn() {
    TURN.with(|turn| turn.is_worker.set(true));
    TURN.with(Turn::write);
}

/// The first write of a request or an answer.
#[derive(Debug, Default)]
pub(crate) struct FirstWrite {
    asked: bool,
}

impl FirstWrite {
    /// One that waits for nothing.
    pub(crate) const AT_ONCE: Self = Self { asked: true };

    /// Ready when it may be written, and ever after. Else its task is ready again, behind all that are ready now.
    pub(crate) fn poll(&mut self, cx: &task::Context<'_>) -> task::Poll<()> {
        if !std::mem::replace(&mut self.asked, true) && TURN.with(Turn::write) {
            cx.waker().wake_by_ref();
            return task::Poll::Pending;
        }
        task::Poll::Ready(())
    }
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
    let gathered = metrics::counter!("outrigger_worker_gathers_total");
    let held = metrics::counter!("outrigger_worker_held_writes_total");
    builder.on_thread_park(move || {
        held.increment(TURN.with(Turn::end).into());
        if !gather.is_zero() && PACE.with(|pace| pace.look(Instant::now())) {
            thread::sleep(gather);
            gathered.increment(1);
        }
    });
    builder.build()
}

async fn work(mut shares: mpsc::UnboundedReceiver<Share>, mut stopped: watch::Receiver<bool>) {
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    loop {
        tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => return,
            Some(share) = shares.recv() => drop(tokio::spawn(share.serve())),
            _ = tick.tick() => upstream::close_idle(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        future::poll_fn,
        sync::{Arc, Mutex},
    };
    use tokio::sync::Notify;

    /// What tasks that become ready at once do, in its order: `+` is work of one, `w` a write.
    fn turn_of(tasks: usize) -> String {
        let (done, ready) = (Arc::new(Mutex::new(String::new())), Arc::new(Notify::new()));
        let log = done.clone();
        runtime(Duration::ZERO).unwrap().block_on(async move {
            let serve = |_| {
                let (log, ready) = (log.clone(), ready.clone());
                tokio::spawn(async move {
                    ready.notified().await;
                    log.lock().unwrap().push('+');
                    let mut first = FirstWrite::default();
                    for _ in 0..2 {
                        poll_fn(|cx| first.poll(cx)).await;
                        log.lock().unwrap().push('w');
                    }
                })
            };
            let served: Vec<_> = (0..tasks).map(serve).collect();
            // All wait, and the thread has looked at its sockets.
            tokio::time::sleep(Duration::from_millis(1)).await;
            ready.notify_waiters();
            for task in served {
                task.await.unwrap();
            }
        });
        let log = done.lock().unwrap();
        log.clone()
    }

    #[test]
    fn all_but_the_first_message_of_a_turn_begin_to_leave_at_its_end() {
        assert_eq!(turn_of(1), "+ww");
        assert_eq!(turn_of(4), "+ww+++wwwwww");
    }

    #[test]
    fn writes_do_not_wait_on_threads_that_are_no_workers() {
        let cx = task::Context::from_waker(task::Waker::noop());
        for _ in 0..2 {
            assert!(FirstWrite::default().poll(&cx).is_ready());
        }
    }

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
