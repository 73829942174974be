//! `--check`: does the fleet do what it is for? A scripted conversation mix entering at both proxies, one request at a
//! time and many at once, its texts compared with an engine's own; then the policy changed ([`policy`]) and an engine
//! killed ([`outage`]) under load.

use super::{
    conversation::{Ask, Conversation},
    exchange::{self, Flight, Generation},
    fleet::{Fleet, Speed, wait_until},
    outage, policy,
    report::{Report, quantile_ms},
    reuse::{BLOCK_TOKENS, Held},
};
use anyhow::Result;
use futures_util::{StreamExt, future::join_all, stream};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde_json::json;
use std::{
    cell::RefCell,
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Fast engines, so that the check takes seconds; slow enough that streams can be cut.
const SPEED: Speed = Speed {
    prefill_tokens_per_s: 50_000,
    decode_itl_ms: 2.0,
};
const CONVERSATIONS: usize = 12;
const TURNS: usize = 4;
/// Clients at once.
const CLIENTS: usize = 8;
/// Length of an answer.
const ANSWER_TOKENS: u32 = 12;
/// For all of it; no part of it comes near.
const CHECK_LIMIT: Duration = Duration::from_secs(120);
/// For one request; an answer that takes longer hangs.
pub(super) const REQUEST_LIMIT: Duration = Duration::from_secs(15);
/// For the events and the load of a request to reach both proxies.
const SETTLE_LIMIT: Duration = Duration::from_secs(2);
/// Least share of reusable tokens that comes from caches, one request at a time.
const HIT_RATIO_MIN: f64 = 0.95;
/// Least share of predictions that are right within one block.
const PREDICTED_RIGHT_MIN: f64 = 0.99;

/// Runs all of it and prints the report; true if every expectation held.
pub(super) async fn run(seed: u64) -> bool {
    let mut report = Report::new(seed);
    match tokio::time::timeout(CHECK_LIMIT, stages(&mut report, seed)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => report.expect("the demo runs", false, format!("{error:#}")),
        Err(_) => report.expect(
            "the check ends",
            false,
            format!("not within {CHECK_LIMIT:?}"),
        ),
    }
    report.conclude()
}

async fn stages(report: &mut Report, seed: u64) -> Result<()> {
    let begun = Instant::now();
    let mut fleet = Fleet::start(SPEED).await?;
    report.figure("ready_s", json!(begun.elapsed().as_secs_f64()));
    let mut held = Held::default();
    let mut turns = one_at_a_time(report, &fleet, seed, &mut held).await;
    turns.extend(at_once(report, &fleet, seed, &mut held).await);
    texts(report, &fleet, &turns).await;
    let mut result = policy::run(report, &fleet, seed).await;
    if result.is_ok() {
        result = outage::run(report, &mut fleet, seed).await;
    }
    fleet.stop().await;
    result
}

/// A request that was answered whole.
pub(super) struct Turn {
    pub(super) ask: Ask,
    pub(super) answer: Generation,
    /// The engine that served, by number and as the proxies name it.
    pub(super) served: usize,
    engine: String,
    /// Prompt tokens foretold to be cached, and whether the prompt was known exactly.
    predicted: Option<(u64, bool)>,
    first_s: f64,
}

/// Sends a request to a proxy; what is wrong with the answer if it is not whole.
pub(super) async fn send(fleet: &Fleet, entry: usize, ask: &Ask) -> Result<Turn, String> {
    let address = fleet.proxies[entry].outbound;
    let reply = exchange::post(
        address,
        ask.path,
        &ask.body,
        &Flight::default(),
        REQUEST_LIMIT,
    )
    .await;
    let answer = Generation::of(&reply);
    let served = fleet.served_by(&reply);
    let (Some(served), 200, true, None) = (served, reply.status, answer.is_whole(), &reply.fault)
    else {
        let text: String = reply.text().chars().take(200).collect();
        return Err(format!(
            "{} {} {} {text}",
            reply.status,
            reply.engine(),
            reply.fault.as_deref().unwrap_or_default()
        ));
    };
    let first_s = reply.first.unwrap_or_default().as_secs_f64();
    let (engine, predicted) = (reply.engine().to_owned(), reply.predicted());
    Ok(Turn {
        ask: ask.clone(),
        answer,
        served,
        engine,
        predicted,
        first_s,
    })
}

/// The engines' own counter of prompt tokens taken from their caches.
async fn hit_tokens(fleet: &Fleet) -> f64 {
    let mut sum = 0.0;
    for engine in &fleet.engines {
        sum += engine
            .metrics()
            .await
            .sum("vllm:prefix_cache_hits_total", &[]);
    }
    sum
}

/// Waits until each proxy's index holds as many blocks of each engine as requests left there.
async fn settled(fleet: &Fleet, held: &Held, names: &[Option<String>]) -> bool {
    let blocks = |name: &Option<String>| name.as_ref().map_or(0, |name| held.blocks(name) as u64);
    let expected: Vec<u64> = names.iter().map(blocks).collect();
    let agree = || async { fleet.indexes().await.iter().all(|index| *index == expected) };
    wait_until(SETTLE_LIMIT, agree).await.is_some()
}

/// Each request after the events and the load of the one before it have arrived.
async fn one_at_a_time(
    report: &mut Report,
    fleet: &Fleet,
    seed: u64,
    held: &mut Held,
) -> Vec<Turn> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut conversations: Vec<_> = (0..CONVERSATIONS)
        .map(|n| Conversation::new(seed, n, ANSWER_TOKENS))
        .collect();
    let (mut turns, mut failures) = (Vec::new(), Vec::new());
    let (mut restless, mut busy, mut reusable) = (0, 0, 0);
    let mut names = vec![None; fleet.engines.len()];
    let mut entries = [0_usize; 2];
    let before = hit_tokens(fleet).await;
    for turn in 0..TURNS {
        let mut order: Vec<usize> = (0..CONVERSATIONS).collect();
        order.shuffle(&mut rng);
        for number in order {
            // Nobody's prefix is anywhere yet in the first round, and idle engines serve what enters beside them.
            let entry = if turn == 0 {
                number % 2
            } else {
                rng.random_range(0..2)
            };
            entries[entry] += 1;
            let ask = conversations[number].next(false);
            let sent = Instant::now();
            match send(fleet, entry, &ask).await {
                Err(failure) => failures.push(failure),
                Ok(turn) => {
                    reusable += held.reusable_tokens(&turn.answer.prompt);
                    held.add(&turn.engine, &turn.answer.prompt, &turn.answer.generated);
                    names[turn.served] = Some(turn.engine.clone());
                    let served = turn.served;
                    conversations[number].answered(&turn.answer.text);
                    turns.push(turn);
                    restless += usize::from(!settled(fleet, held, &names).await);
                    // Its load is told a little later than its events.
                    let is_idle =
                        wait_until(SETTLE_LIMIT, || fleet.is_told_idle(served, sent)).await;
                    busy += usize::from(is_idle.is_none());
                }
            }
        }
    }
    let own_hits = hit_tokens(fleet).await - before;
    let all = CONVERSATIONS * TURNS;
    report.expect(
        "one at a time: every request is answered",
        turns.len() == all,
        outcome(turns.len(), all, &failures),
    );
    let what = "one at a time: both indexes hold exactly what requests left on each engine";
    report.expect(
        what,
        restless == 0,
        format!("{restless} of {all} did not within {SETTLE_LIMIT:?}"),
    );
    let what = "one at a time: both proxies hear that the engine is idle again";
    report.expect(
        what,
        busy == 0,
        format!("{busy} of {all} did not within {SETTLE_LIMIT:?}"),
    );
    judge_hits(report, &turns, reusable, own_hits);
    judge_spread(report, &turns, entries);
    turns
}

fn outcome(answered: usize, all: usize, failures: &[String]) -> String {
    format!(
        "{answered} of {all} {}",
        failures.first().map_or("", String::as_str)
    )
}

fn judge_hits(report: &mut Report, turns: &[Turn], reusable: usize, own_hits: f64) {
    let cached: u64 = turns.iter().filter_map(|turn| turn.answer.cached).sum();
    let ratio = cached as f64 / reusable as f64;
    let told: Vec<(u64, bool, u64)> = turns
        .iter()
        .filter_map(|turn| turn.predicted.zip(turn.answer.cached))
        .map(|((predicted, exact), cached)| (predicted, exact, cached))
        .collect();
    let right = told
        .iter()
        .filter(|(predicted, _, cached)| predicted.abs_diff(*cached) <= BLOCK_TOKENS as u64)
        .count();
    let exact = told.iter().filter(|(_, exact, _)| *exact).count();
    let what =
        format!("one at a time: at least {HIT_RATIO_MIN} of reusable tokens come from caches");
    report.expect(
        &what,
        reusable > 0 && ratio >= HIT_RATIO_MIN,
        format!("{cached} of {reusable}, {ratio:.4}"),
    );
    let what = "one at a time: engines counted the same hits as they told clients";
    report.expect(
        what,
        own_hits == cached as f64,
        format!("{own_hits} and {cached}"),
    );
    report.expect(
        "one at a time: 99 % of predictions are right within one block",
        !told.is_empty()
            && told.len() == turns.len()
            && right as f64 >= told.len() as f64 * PREDICTED_RIGHT_MIN,
        format!(
            "{right} of {}, told for {} of {}",
            told.len(),
            told.len(),
            turns.len()
        ),
    );
    let what = "one at a time: prompts are known by their exact tokens";
    report.expect(
        what,
        !told.is_empty() && exact == told.len(),
        format!("{exact} of {}", told.len()),
    );
    let mut first: Vec<f64> = turns.iter().map(|turn| turn.first_s).collect();
    let figures = json!({
        "requests": turns.len(), "reusable_tokens": reusable, "cached_tokens": cached, "hit_ratio": ratio,
        "predictions": told.len(), "predictions_right": right, "predictions_equal": told.iter().filter(|(p, _, c)| p == c).count(),
        "ttft_ms": {"p50": quantile_ms(&mut first, 0.5), "p99": quantile_ms(&mut first, 0.99)},
    });
    report.figure("one_at_a_time", figures);
}

fn judge_spread(report: &mut Report, turns: &[Turn], entries: [usize; 2]) {
    let served: Vec<usize> = (0..2)
        .map(|engine| turns.iter().filter(|turn| turn.served == engine).count())
        .collect();
    let what = "one at a time: requests entered at both proxies and both engines served";
    let holds = entries.iter().chain(&served).all(|&count| count > 0);
    report.expect(
        what,
        holds,
        format!("entered {entries:?}, served {served:?}"),
    );
}

/// What many clients share.
struct Crowd<'a> {
    fleet: &'a Fleet,
    waiting: RefCell<VecDeque<(Conversation, StdRng)>>,
    held: RefCell<&'a mut Held>,
    turns: RefCell<Vec<Turn>>,
    failures: RefCell<Vec<String>>,
    reusable: RefCell<usize>,
}

impl Crowd<'_> {
    /// One client: takes a conversation, has it turn by turn, takes the next.
    async fn client(&self) {
        loop {
            let Some((mut conversation, mut rng)) = self.waiting.borrow_mut().pop_front() else {
                return;
            };
            for _ in 0..TURNS {
                let ask = conversation.next(true);
                let before = self.held.borrow().clone();
                match send(self.fleet, rng.random_range(0..2), &ask).await {
                    Err(failure) => self.failures.borrow_mut().push(failure),
                    Ok(turn) => {
                        *self.reusable.borrow_mut() += before.reusable_tokens(&turn.answer.prompt);
                        self.held.borrow_mut().add(
                            &turn.engine,
                            &turn.answer.prompt,
                            &turn.answer.generated,
                        );
                        conversation.answered(&turn.answer.text);
                        self.turns.borrow_mut().push(turn);
                    }
                }
            }
        }
    }
}

/// Many streams at once.
async fn at_once(report: &mut Report, fleet: &Fleet, seed: u64, held: &mut Held) -> Vec<Turn> {
    // Other conversations than before.
    let seed = seed.wrapping_add(1_000_000);
    let talk = |number: usize| {
        (
            Conversation::new(seed, number, ANSWER_TOKENS),
            StdRng::seed_from_u64(seed.wrapping_mul(31).wrapping_add(number as u64)),
        )
    };
    let crowd = Crowd {
        fleet,
        waiting: RefCell::new((0..CONVERSATIONS).map(talk).collect()),
        held: RefCell::new(held),
        turns: RefCell::default(),
        failures: RefCell::default(),
        reusable: RefCell::default(),
    };
    let begun = Instant::now();
    join_all((0..CLIENTS).map(|_| crowd.client())).await;
    let took_s = begun.elapsed().as_secs_f64();
    let Crowd {
        turns,
        failures,
        reusable,
        held,
        ..
    } = crowd;
    let (turns, failures, reusable, held) = (
        turns.into_inner(),
        failures.into_inner(),
        reusable.into_inner(),
        held.into_inner(),
    );
    let all = CONVERSATIONS * TURNS;
    report.expect(
        "at once: every stream is answered",
        turns.len() == all,
        outcome(turns.len(), all, &failures),
    );
    let name = |engine: usize| {
        turns
            .iter()
            .find(|turn| turn.served == engine)
            .map(|turn| turn.engine.clone())
    };
    let names: Vec<_> = (0..fleet.engines.len()).map(name).collect();
    let what = "at once: both indexes come to hold exactly what requests left on each engine";
    let agree = settled(fleet, held, &names).await;
    report.expect(what, agree, format!("{:?}", fleet.indexes().await));
    let cached: u64 = turns.iter().filter_map(|turn| turn.answer.cached).sum();
    let mut first: Vec<f64> = turns.iter().map(|turn| turn.first_s).collect();
    let figures = json!({
        "requests": turns.len(), "clients": CLIENTS, "seconds": took_s, "reusable_tokens": reusable, "cached_tokens": cached,
        "hit_ratio": cached as f64 / reusable as f64,
        "ttft_ms": {"p50": quantile_ms(&mut first, 0.5), "p99": quantile_ms(&mut first, 0.99)},
    });
    report.figure("at_once", figures);
    turns
}

/// What an engine says when it is asked straight.
pub(super) async fn straight(fleet: &Fleet, engine: usize, ask: &Ask) -> Generation {
    let address = fleet.engines[engine].http;
    Generation::of(
        &exchange::post(
            address,
            ask.path,
            &ask.body,
            &Flight::default(),
            REQUEST_LIMIT,
        )
        .await,
    )
}

/// How many of these answers the engine that did not serve gives word for word, and one that it does not.
pub(super) async fn same_straight<'a>(
    fleet: &Fleet,
    answers: impl Iterator<Item = (&'a Ask, &'a Generation, usize)>,
) -> (usize, Option<String>) {
    let compared = answers.map(|(ask, answer, engine)| async move {
        let own = straight(fleet, engine, ask).await;
        let same = own.is_whole()
            && own.text == answer.text
            && own.prompt == answer.prompt
            && own.generated == answer.generated;
        (!same).then(|| format!("{:?} straight, {:?} through a proxy", own.text, answer.text))
    });
    let differences: Vec<Option<String>> = stream::iter(compared.collect::<Vec<_>>())
        .buffered(CLIENTS)
        .collect()
        .await;
    let same = differences
        .iter()
        .filter(|difference| difference.is_none())
        .count();
    (same, differences.into_iter().flatten().next())
}

/// An engine's text depends on every token before it: the other engine, asked straight, must say the same.
async fn texts(report: &mut Report, fleet: &Fleet, turns: &[Turn]) {
    let answers = turns
        .iter()
        .map(|turn| (&turn.ask, &turn.answer, 1 - turn.served));
    let (same, difference) = same_straight(fleet, answers).await;
    let holds = !turns.is_empty() && same == turns.len();
    let seen = format!(
        "{same} of {} {}",
        turns.len(),
        difference.unwrap_or_default()
    );
    report.expect(
        "texts are those of an engine asked straight, whichever served",
        holds,
        seen,
    );
}
