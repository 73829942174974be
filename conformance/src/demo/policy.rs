//! Can the policy of the fleet change under load? The file that the control plane reads is replaced again and again
//! while streams go on: none may be lost, and each proxy has to do what the file says.

use super::{
    check::{REQUEST_LIMIT, send},
    control_plane::KV,
    conversation::Conversation,
    exchange::{self, Flight, Reply},
    fleet::{Fleet, wait_until},
    report::{Report, quantile_ms},
};
use anyhow::Result;
use futures_util::future::{join, join_all};
use serde_json::json;
use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

/// What the file says in turn; the last is what it began with.
const POLICIES: [&str; 6] = ["round_robin", KV, "least_request", KV, "random", KV];
/// Streams at once.
const CLIENTS: usize = 8;
/// Length of an answer: streams outlive a change.
const ANSWER_TOKENS: u32 = 100;
/// For a change of the file to be what a proxy does.
const LIVE_LIMIT: Duration = Duration::from_secs(10);

/// Clients that go on until told to stop.
struct Load<'a> {
    fleet: &'a Fleet,
    seed: u64,
    stopped: Cell<bool>,
    answered: Cell<usize>,
    failures: RefCell<Vec<String>>,
}

impl Load<'_> {
    async fn client(&self, number: usize) {
        // Conversations that nobody had before.
        let mut number = 10_000 + number;
        while !self.stopped.get() {
            let ask = Conversation::new(self.seed, number, ANSWER_TOKENS).next(true);
            match send(self.fleet, number % 2, &ask).await {
                Ok(_) => self.answered.set(self.answered.get() + 1),
                Err(failure) => self.failures.borrow_mut().push(failure),
            }
            number += CLIENTS;
        }
    }
}

/// Changes the policy under load.
pub(super) async fn run(report: &mut Report, fleet: &Fleet, seed: u64) -> Result<()> {
    let load = Load {
        fleet,
        seed,
        stopped: Cell::new(false),
        answered: Cell::new(0),
        failures: RefCell::default(),
    };
    let changes = async {
        let lived = change(fleet, seed).await;
        load.stopped.set(true);
        lived
    };
    let clients = join_all((0..CLIENTS).map(|number| load.client(number)));
    let (lived, _) = join(changes, clients).await;
    let (answered, failures) = (load.answered.get(), load.failures.into_inner());
    let mut lived = lived?;
    report.expect(
        "live policy: both proxies do what the file says",
        lived.len() == POLICIES.len(),
        format!("{} of {} changes of it", lived.len(), POLICIES.len()),
    );
    report.expect(
        "live policy: no stream is lost meanwhile",
        failures.is_empty() && answered >= CLIENTS,
        format!(
            "{answered} answered, {} lost {}",
            failures.len(),
            failures.first().map_or("", String::as_str)
        ),
    );
    let figures = json!({
        "changes": lived.len(), "streams": answered,
        "live_after_ms": {"p50": quantile_ms(&mut lived, 0.5), "max": quantile_ms(&mut lived, 1.0)},
    });
    report.figure("live_policy", figures);
    Ok(())
}

/// Seconds until each change was live, up to the first that did not become so.
async fn change(fleet: &Fleet, seed: u64) -> Result<Vec<f64>> {
    let mut lived = Vec::new();
    for policy in POLICIES {
        fleet.directory.route_by(policy)?;
        let is_live = || async {
            let proxies = (0..fleet.proxies.len()).map(|entry| routes_by(fleet, entry, seed));
            let found = join_all(proxies).await;
            found.iter().all(|found| *found == (policy == KV))
        };
        match wait_until(LIVE_LIMIT, is_live).await {
            Some(took) => lived.push(took.as_secs_f64()),
            None => break,
        }
    }
    Ok(lived)
}

/// Whether a proxy says of a request that it chose the engine by what engines have cached.
async fn routes_by(fleet: &Fleet, entry: usize, seed: u64) -> bool {
    let ask = Conversation::new(seed, entry, 1).next(false);
    let address = fleet.proxies[entry].outbound;
    let flight = Flight::default();
    let reply: Reply = exchange::post(address, ask.path, &ask.body, &flight, REQUEST_LIMIT).await;
    reply.predicted().is_some()
}
