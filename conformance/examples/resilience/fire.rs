//! What breaks, when, and what the proxies counted meanwhile.

use crate::{Args, client::Clients, pod::Pod};
use outrigger_conformance::{harness::Client, sim::FaultKind};
use rand::seq::IteratorRandom;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};
use tokio::time::MissedTickBehavior;

/// What breaks, in turn.
const FAULTS: [FaultKind; 6] = [
    FaultKind::Die,
    FaultKind::InBandError,
    FaultKind::Reset,
    FaultKind::Truncate,
    FaultKind::Garbage,
    FaultKind::Stall,
];
/// Of so many faults one takes the proxy along.
const POD_EVERY: usize = 3;
/// How long an engine is broken before it is restarted.
const BROKEN: Duration = Duration::from_secs(1);
/// Between two looks where nothing breaks.
const CALM: Duration = Duration::from_millis(500);

/// The faults of a run.
#[derive(Default)]
pub(crate) struct Fire {
    pub(crate) faults: u64,
    pub(crate) pods: u64,
    /// Streams that ran at each fault.
    pub(crate) open: Vec<usize>,
    pub(crate) figures: Figures,
}

impl Fire {
    /// Breaks a pod at a time, until the last stream is over.
    pub(crate) async fn burn(&mut self, pods: &mut [Pod], args: &Args, clients: &Clients) {
        let every = Duration::from_millis(args.every_ms);
        let mut tick = tokio::time::interval(if every.is_zero() { CALM } else { every });
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.tick().await;
        let mut broken: VecDeque<(usize, Instant)> = VecDeque::new();
        let mut number = 0;
        while !clients.are_over() {
            tick.tick().await;
            self.open.extend(clients.open());
            if every.is_zero() {
                continue;
            }
            while let Some((at, _)) = broken.pop_front_if(|(_, since)| since.elapsed() >= BROKEN) {
                pods[at].restart(args);
            }
            for pod in pods.iter_mut() {
                if broken.iter().all(|(at, _)| *at != pod.at) {
                    pod.look(args).await;
                }
            }
            let well = (0..pods.len()).filter(|at| broken.iter().all(|(other, _)| other != at));
            let well = well.filter(|at| pods[*at].entry.is_up.load(Relaxed));
            let Some(at) = well.choose(&mut rand::rng()) else {
                continue;
            };
            self.strike(&mut pods[at], number).await;
            number += 1;
            broken.push_back((at, Instant::now()));
        }
    }

    async fn strike(&mut self, pod: &mut Pod, number: usize) {
        // Each kind has its turn with the proxy and without it.
        let with_proxy = (number / FAULTS.len() + number).is_multiple_of(POD_EVERY);
        if with_proxy {
            self.figures.add(pod).await;
        }
        pod.break_down(FAULTS[number % FAULTS.len()], with_proxy);
        self.faults += 1;
        self.pods += u64::from(with_proxy);
    }
}

/// Counters of `migration`, summed over all proxies, those that were killed included.
#[derive(Default)]
pub(crate) struct Figures(pub(crate) BTreeMap<String, f64>);

impl Figures {
    /// Adds what the proxy of a pod counted since it was started.
    pub(crate) async fn add(&mut self, pod: &Pod) {
        if !pod.entry.is_up.load(Relaxed) {
            return;
        }
        let page = Client::get(pod.addresses.admin, "/stats/prometheus").await;
        for line in page.text().lines() {
            let ours = line.strip_prefix("outrigger_migration");
            let counter = ours.and_then(|ours| ours.rsplit_once(' '));
            let Some((name, value)) = counter.filter(|(name, _)| name.contains("_total")) else {
                continue;
            };
            let name = format!("migration{name}");
            *self.0.entry(name).or_default() += value.parse().unwrap_or(0.0);
        }
    }
}
