//! What do clients see when an engine is killed under load, and does it come back? A request is judged by what had
//! been delivered to its client when the engine died.

use super::{
    check::{REQUEST_LIMIT, same_straight, send},
    conversation::{Ask, Conversation, MODEL, prose},
    exchange::{self, Flight, Generation, Reply},
    fleet::{Fleet, wait_until},
    report::Report,
};
use anyhow::{Context, Result};
use futures_util::future::{join, join_all};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::json;
use std::{
    cell::{Cell, OnceCell, RefCell},
    rc::Rc,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

/// The engine that is killed.
const VICTIM: usize = 0;
const SURVIVOR: usize = 1;
/// Clients at once: every third does not stream. So few that all who have nothing yet fit into a proxy's retry budget.
const CLIENTS: usize = 8;
/// Retries at once that a proxy always allows; see `min_retry_concurrency`.
const RETRIES_AT_ONCE: usize = 3;
/// A request this young cannot be done within one look at the victim: its answer takes longer.
const YOUNG: Duration = Duration::from_millis(120);
/// Longer than a byte takes from an engine to a client.
const TRANSIT: Duration = Duration::from_millis(10);
/// A client that was let down breathes before it asks again.
const BREATH: Duration = Duration::from_millis(50);
/// Long answers, so that there is something to cut; of several lengths, or clients of a slow machine run in step.
const ANSWER_TOKENS: std::ops::RangeInclusive<u32> = 80..=160;
const PROMPT_WORDS: usize = 40;
/// For a moment in which the victim's death hurts.
const MOMENT_LIMIT: Duration = Duration::from_secs(10);
/// For a dead engine to leave every index.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
/// Requests that must have gone well after the death before the load ends.
const SERVED_AFTER_MIN: usize = 8;
/// For a restarted engine to be known, and to be used.
const RETURN_LIMIT: Duration = Duration::from_secs(10);

/// One request of the load.
struct Record {
    ask: Ask,
    stream: bool,
    sent: Instant,
    flight: Flight,
    reply: OnceCell<Reply>,
    done: Cell<Option<Instant>>,
}

/// Clients that go on until told to stop.
struct Load<'a> {
    fleet: &'a Fleet,
    seed: u64,
    stopped: Cell<bool>,
    records: RefCell<Vec<Rc<Record>>>,
}

impl Load<'_> {
    async fn client(&self, number: usize) {
        let mut rng =
            StdRng::seed_from_u64(self.seed.wrapping_mul(977).wrapping_add(number as u64));
        let stream = number % 3 != 2;
        while !self.stopped.get() {
            let mut body = json!({
                "model": MODEL, "temperature": 0, "max_tokens": rng.random_range(ANSWER_TOKENS), "ignore_eos": true, "stream": stream,
                "return_token_ids": true, "messages": [{"role": "user", "content": prose(&mut rng, PROMPT_WORDS)}],
            });
            if stream {
                body["stream_options"] = json!({"include_usage": true});
            }
            let record = Rc::new(Record {
                ask: Ask {
                    path: "/v1/chat/completions",
                    body,
                },
                stream,
                sent: Instant::now(),
                flight: Flight::default(),
                reply: OnceCell::new(),
                done: Cell::new(None),
            });
            self.records.borrow_mut().push(record.clone());
            let entry = self.fleet.proxies[rng.random_range(0..2)].outbound;
            let reply = exchange::post(
                entry,
                record.ask.path,
                &record.ask.body,
                &record.flight,
                REQUEST_LIMIT,
            )
            .await;
            record.done.set(Some(Instant::now()));
            if verdict(stream, &reply, &Generation::of(&reply)) != Verdict::Answered {
                tokio::time::sleep(BREATH).await;
            }
            // Set once: a record is one request.
            let _ = record.reply.set(reply);
        }
    }

    /// Requests under way (by their place in `records`) to which the victim delivered something, and how many there are
    /// to which nobody did; `None` if one of the latter may be done any moment.
    fn under_way(&self) -> Option<(Vec<usize>, usize)> {
        let records = self.records.borrow();
        let (mut by_victim, mut nothing) = (Vec::new(), 0);
        for (place, record) in records.iter().enumerate() {
            if record.done.get().is_some() {
                continue;
            }
            if !record.flight.delivered.load(Relaxed) {
                nothing += 1;
                if record.sent.elapsed() > YOUNG {
                    return None;
                }
            } else if record
                .flight
                .engine
                .get()
                .is_some_and(|id| self.fleet.engines[VICTIM].is(id))
            {
                by_victim.push(place);
            }
        }
        Some((by_victim, nothing))
    }

    /// Whether the victim is writing to two clients and busy for one who has nothing yet.
    async fn strikes_well(&self) -> bool {
        let look = || {
            self.under_way().filter(|(by_victim, nothing)| {
                by_victim.len() >= 2 && (1..=RETRIES_AT_ONCE).contains(nothing)
            })
        };
        let Some((mut written_to, _)) = look() else {
            return false;
        };
        let running = self.fleet.engines[VICTIM]
            .metrics()
            .await
            .sum("vllm:num_requests_running", &[]);
        // What the victim had written by then must have arrived before it is counted as nothing.
        tokio::time::sleep(TRANSIT).await;
        let Some((later, _)) = look() else {
            return false;
        };
        written_to.extend(later);
        written_to.sort_unstable();
        written_to.dedup();
        running as usize > written_to.len()
    }

    fn served_since(&self, moment: Instant) -> usize {
        let records = self.records.borrow();
        let went_well = |record: &&Rc<Record>| {
            record.sent > moment && record.reply.get().is_some_and(|reply| reply.status == 200)
        };
        records.iter().filter(went_well).count()
    }
}

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Answered,
    /// Something was delivered, then an error event and `[DONE]`.
    CutWell,
    Hung,
    /// Nothing was delivered, and no other engine served it.
    Lost(String),
    /// The stream did not end as streams do.
    Torn(String),
}

fn verdict(stream: bool, reply: &Reply, answer: &Generation) -> Verdict {
    let seen = || {
        let text = reply.text();
        let tail: String = text
            .chars()
            .skip(text.chars().count().saturating_sub(160))
            .collect();
        format!(
            "{} {} {tail}",
            reply.status,
            reply.fault.as_deref().unwrap_or_default()
        )
    };
    let delivered = !answer.prompt.is_empty() || !answer.text.is_empty();
    if reply.hung {
        Verdict::Hung
    } else if reply.status == 200 && reply.fault.is_none() && answer.is_whole() {
        Verdict::Answered
    } else if !stream || reply.status != 200 || !delivered {
        Verdict::Lost(seen())
    } else if answer.ended && answer.error && !answer.garbage && reply.fault.is_none() {
        Verdict::CutWell
    } else {
        Verdict::Torn(seen())
    }
}

/// Kills an engine under load, then starts it again.
pub(super) async fn run(report: &mut Report, fleet: &mut Fleet, seed: u64) -> Result<()> {
    let before = retries(fleet).await;
    let load = Load {
        fleet,
        seed,
        stopped: Cell::new(false),
        records: RefCell::default(),
    };
    let (strike, _) = join(
        strike(&load),
        join_all((0..CLIENTS).map(|number| load.client(number))),
    )
    .await;
    let records = load.records.into_inner();
    let strike = strike?;
    let after = retries(fleet).await;
    judge(
        report,
        fleet,
        &records,
        &strike,
        (after.0 - before.0, after.1 - before.1),
    )
    .await;
    comes_back(report, fleet, seed).await
}

/// Retries so far, and those that the budget did not allow.
async fn retries(fleet: &Fleet) -> (f64, f64) {
    let refused = fleet
        .stat("envoy_cluster_upstream_rq_retry_overflow", &[])
        .await;
    (fleet.stat("outrigger_retries_total", &[]).await, refused)
}

/// What was seen of the death.
struct Strike {
    at: Instant,
    well: bool,
    left_index: Option<Duration>,
    unhealthy: Option<Duration>,
    served_after: usize,
}

async fn strike(load: &Load<'_>) -> Result<Strike> {
    let fleet = load.fleet;
    let well = wait_until(MOMENT_LIMIT, || load.strikes_well())
        .await
        .is_some();
    fleet.engines[VICTIM].kill()?;
    let at = Instant::now();
    let is_gone = || async { fleet.indexes().await.iter().all(|index| index[VICTIM] == 0) };
    let left_index = wait_until(LEAVE_LIMIT, is_gone).await;
    let is_unhealthy = || async {
        for proxy in &fleet.proxies {
            if proxy
                .knows(&fleet.engines[VICTIM])
                .await
                .is_none_or(|known| known.health == "healthy")
            {
                return false;
            }
        }
        true
    };
    let unhealthy = wait_until(LEAVE_LIMIT, is_unhealthy).await;
    let served = || async { load.served_since(at) >= SERVED_AFTER_MIN };
    wait_until(REQUEST_LIMIT, served).await;
    load.stopped.set(true);
    Ok(Strike {
        at,
        well,
        left_index,
        unhealthy,
        served_after: load.served_since(at),
    })
}

/// The load, sorted by what became of it.
#[derive(Default)]
struct Verdicts {
    /// Answered, and under way when the engine died.
    answered: Vec<(Rc<Record>, Generation)>,
    cut: usize,
    hung: usize,
    lost: Vec<String>,
    torn: Vec<String>,
    longest: Duration,
}

impl Verdicts {
    fn of(records: &[Rc<Record>], died: Instant) -> Self {
        let mut all = Self::default();
        for record in records {
            let (Some(reply), Some(done)) = (record.reply.get(), record.done.get()) else {
                all.hung += 1;
                continue;
            };
            all.longest = all.longest.max(done - record.sent);
            let answer = Generation::of(reply);
            match verdict(record.stream, reply, &answer) {
                Verdict::Answered if record.sent < died && died < done => {
                    all.answered.push((record.clone(), answer));
                }
                Verdict::Answered => {}
                Verdict::CutWell => all.cut += 1,
                Verdict::Hung => all.hung += 1,
                Verdict::Lost(seen) => all.lost.push(seen),
                Verdict::Torn(seen) => all.torn.push(seen),
            }
        }
        all
    }
}

async fn judge(
    report: &mut Report,
    fleet: &Fleet,
    records: &[Rc<Record>],
    strike: &Strike,
    (retries, refused): (f64, f64),
) {
    let verdicts = Verdicts::of(records, strike.at);
    judge_requests(report, &verdicts, records.len(), (retries, refused));
    let answered = verdicts.answered.iter();
    let answers = answered.map(|(record, answer)| (&record.ask, answer, SURVIVOR));
    let (same, difference) = same_straight(fleet, answers).await;
    let under_way = verdicts.answered.len();
    report.expect(
        "kill -9: texts of requests under way are those of an engine asked straight",
        same == under_way && same > 0,
        format!("{same} of {under_way} {}", difference.unwrap_or_default()),
    );
    judge_strike(report, strike);
    let figures = json!({
        "requests": records.len(), "cut": verdicts.cut, "retries": retries,
        "longest_request_s": verdicts.longest.as_secs_f64(),
        "left_index_s": strike.left_index.map(|time| time.as_secs_f64()),
        "unhealthy_s": strike.unhealthy.map(|time| time.as_secs_f64()),
    });
    report.figure("outage", figures);
}

fn judge_requests(
    report: &mut Report,
    verdicts: &Verdicts,
    all: usize,
    (retries, refused): (f64, f64),
) {
    let first =
        |all: &[String]| format!("{} {}", all.len(), all.first().map_or("", String::as_str));
    let (hung, cut, longest) = (verdicts.hung, verdicts.cut, verdicts.longest);
    report.expect(
        "kill -9: no request hung",
        hung == 0 && all > 0,
        format!("{hung} of {all}, longest {longest:.2?}"),
    );
    report.expect(
        "kill -9: no request with nothing delivered was lost",
        verdicts.lost.is_empty(),
        format!(
            "{}, {refused} retries beyond the budget",
            first(&verdicts.lost)
        ),
    );
    let under_way = verdicts.answered.len();
    report.expect(
        "kill -9: requests of the dead engine went to the other one",
        retries >= 1.0,
        format!("{retries} retries, {under_way} answered that were under way"),
    );
    report.expect(
        "kill -9: streams under way went on at the other engine, none was cut",
        verdicts.torn.is_empty() && cut == 0,
        format!("{cut} were cut; torn: {}", first(&verdicts.torn)),
    );
}

fn judge_strike(report: &mut Report, strike: &Strike) {
    let within = |seen: &Option<Duration>| {
        seen.map_or("not in time".to_owned(), |time| format!("{time:.2?}"))
    };
    report.expect(
        "kill -9: the engine died while it wrote to clients and was busy for one more",
        strike.well,
        if strike.well { "yes" } else { "no such moment" },
    );
    report.expect(
        "kill -9: the dead engine left every index",
        strike.left_index.is_some(),
        within(&strike.left_index),
    );
    report.expect(
        "kill -9: every proxy found it unhealthy",
        strike.unhealthy.is_some(),
        within(&strike.unhealthy),
    );
    report.expect(
        "kill -9: the other engine serves",
        strike.served_after >= SERVED_AFTER_MIN,
        format!("{} requests since", strike.served_after),
    );
}

/// Starts the victim again and waits until it serves: a first turn at its own proxy, and the second at the other one,
/// which must find it by its KV events.
async fn comes_back(report: &mut Report, fleet: &mut Fleet, seed: u64) -> Result<()> {
    fleet.engines[VICTIM]
        .restart()
        .await
        .context("the killed engine does not start again")?;
    let known = fleet.wait_known(VICTIM, RETURN_LIMIT).await;
    let seen = known.as_ref().map_or_else(
        |error| format!("{error:#}"),
        |time| format!("after {time:.2?}"),
    );
    report.expect(
        "restart: every proxy finds the engine healthy",
        known.is_ok(),
        seen,
    );
    let begun = Instant::now();
    let (mut first, mut second) = (false, Err("never asked".to_owned()));
    // Conversations that nobody had before.
    let mut number = seed as usize % 1000 * 1000;
    while begun.elapsed() < RETURN_LIMIT && second.is_err() {
        number += 4;
        let mut conversation = Conversation::new(seed.wrapping_add(number as u64), number, 12);
        match send(fleet, VICTIM, &conversation.next(true)).await {
            Ok(turn) if turn.served == VICTIM => conversation.answered(&turn.answer.text),
            _ => continue,
        }
        first = true;
        let is_indexed = || async { fleet.indexes().await.iter().all(|index| index[VICTIM] > 0) };
        wait_until(RETURN_LIMIT.saturating_sub(begun.elapsed()), is_indexed).await;
        second = match send(fleet, SURVIVOR, &conversation.next(true)).await {
            Ok(turn) if turn.served == VICTIM => Ok(turn.answer.cached.unwrap_or_default()),
            Ok(turn) => Err(format!("engine {} served", turn.served)),
            Err(error) => Err(error),
        };
    }
    let took = format!("after {:.2?}", begun.elapsed());
    report.expect("restart: its own proxy sends it requests", first, &took);
    let (holds, seen) = match second {
        Ok(cached) => (cached > 0, format!("{cached} cached tokens, {took}")),
        Err(why) => (false, why),
    };
    report.expect(
        "restart: the other proxy sends it what its KV events say it holds",
        holds,
        seen,
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderMap;

    fn judged(stream: bool, status: u16, body: &str, fault: Option<&str>) -> Verdict {
        let mut headers = HeaderMap::new();
        let kind = if stream {
            "text/event-stream"
        } else {
            "application/json"
        };
        headers.insert("content-type", kind.parse().unwrap());
        let fault = fault.map(str::to_owned);
        let reply = Reply {
            status,
            headers,
            body: body.into(),
            fault,
            hung: false,
            first: None,
        };
        verdict(stream, &reply, &Generation::of(&reply))
    }

    #[test]
    fn requests_are_judged_by_what_was_delivered() {
        let text = "data: {\"prompt_token_ids\":[1],\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":{}}\n\n";
        let error = "data: {\"error\":{\"message\":\"gone\"}}\n\n";
        let done = "data: [DONE]\n\n";
        assert_eq!(
            judged(true, 200, &[text, done].concat(), None),
            Verdict::Answered
        );
        assert_eq!(
            judged(true, 200, &[text, error, done].concat(), None),
            Verdict::CutWell
        );
        assert!(matches!(
            judged(true, 200, &[text, error].concat(), None),
            Verdict::Torn(_)
        ));
        assert!(matches!(
            judged(true, 200, text, Some("reset")),
            Verdict::Torn(_)
        ));
        assert!(matches!(
            judged(true, 200, &[text, "data: {\"ch", done].concat(), None),
            Verdict::Torn(_)
        ));
        assert!(matches!(
            judged(true, 200, &[error, done].concat(), None),
            Verdict::Lost(_)
        ));
        assert!(matches!(
            judged(false, 503, "{\"error\":{}}", None),
            Verdict::Lost(_)
        ));
        assert!(matches!(
            judged(false, 200, "{\"choi", Some("reset")),
            Verdict::Lost(_)
        ));
    }
}
