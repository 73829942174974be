//! Holds a lease at a control plane: registers, renews, comes back after whatever broke, and says when it goes.
//!
//! Proxies and agents hold theirs alike; what is different between them is a [`Tells`].

use super::{
    ENGINES_MAX, Node, Registrant, Registration, RegistryError, RegistryStream,
    known::{self, States},
    open,
};
use crate::{ads::Server, backoff::Backoff, feed::FeedSource, resource::endpoint::Address};
use rand::Rng;
use std::{collections::BTreeMap, net::IpAddr, pin::Pin, sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

pub use known::Beside;

/// How long an attempt may take, to the answer; of a short lease a part, see [`Holding::limit`].
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it is waited until all engines said how they are. Who registers before says that it serves nothing.
const STATES_TIMEOUT: Duration = Duration::from_secs(10);
/// Shortest time between two renewals.
const RENEW_MIN: Duration = Duration::from_millis(100);
/// What a lease is taken for before one was given.
const LEASE_GUESS: Duration = Duration::from_secs(30);
/// How long the end waits until the control plane knows of it.
pub const FAREWELL: Duration = Duration::from_secs(1);

/// Who registers.
pub trait Tells: Send + Sync {
    /// The servers of the control plane, in order; none while there is nobody to be asked.
    fn servers(&self) -> Vec<Server>;

    /// The engines beside it.
    fn engines(&self) -> Vec<Beside>;
}

/// Completes when it is to go.
pub type End = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Whether whoever hears of an address from a control plane can reach us there: of loopback, only who is on our machine.
#[must_use]
pub fn is_for_others(ip: IpAddr, server: &Address) -> bool {
    !ip.is_unspecified() && (!ip.is_loopback() || server.is_loopback())
}

/// Reads labels, each `KEY=VALUE`.
///
/// # Errors
/// Those that are none.
pub fn labels(texts: &[String]) -> Result<BTreeMap<String, String>, Vec<String>> {
    let (mut labels, mut errors) = (BTreeMap::new(), Vec::new());
    for label in texts {
        match label.split_once('=') {
            Some((key, value)) if !key.is_empty() => drop(labels.insert(key.into(), value.into())),
            _ => errors.push(format!("--label {label}: must be KEY=VALUE")),
        }
    }
    if errors.is_empty() {
        Ok(labels)
    } else {
        Err(errors)
    }
}

/// Reads `--advertise`.
///
/// # Errors
/// It is no address that others can reach.
pub fn advertised(text: &str) -> Result<Address, String> {
    let address = super::address(text).ok_or(format!("--advertise {text}: must be HOST:PORT"))?;
    let ip = address.host.parse::<IpAddr>();
    if ip.is_ok_and(|ip| ip.is_unspecified()) {
        return Err(format!("--advertise {text}: nobody can reach that"));
    }
    Ok(address)
}

/// Holds a lease until `end`, and then says that it goes. What engines are like is heard from `source`.
pub async fn hold(
    tells: Arc<dyn Tells>,
    (node, registrant): (Node, Registrant),
    source: Arc<dyn FeedSource>,
    end: End,
) {
    let (told, states) = watch::channel(States::new());
    tokio::spawn(known::hear(source, told));
    let holding = Holding {
        tells,
        at: 0,
        node,
        registrant,
        states,
        end,
        lease: LEASE_GUESS,
        until: None,
    };
    holding.run().await;
}

fn count(result: &'static str) {
    metrics::counter!("outrigger_registrations_total", "result" => result).increment(1);
}

fn set_registered(is_registered: bool) {
    metrics::gauge!("outrigger_registered").set(f64::from(u8::from(is_registered)));
}

/// What is said, answered in time.
async fn within<T>(
    limit: Duration,
    said: impl Future<Output = Result<T, RegistryError>>,
) -> Result<T, RegistryError> {
    let late = |_| RegistryError::Broken(format!("no answer within {limit:?}"));
    timeout(limit, said).await.map_err(late)?
}

struct Holding {
    tells: Arc<dyn Tells>,
    /// Which server is asked: the one that gave a lease, or the next after one that did not.
    at: usize,
    node: Node,
    registrant: Registrant,
    states: watch::Receiver<States>,
    /// Whoever sees it complete does not look again.
    end: End,
    /// The last one that was given.
    lease: Duration,
    /// When it is over, if one was.
    until: Option<Instant>,
}

impl Holding {
    fn registration(&mut self) -> Registration {
        let engines = self.tells.engines().into_iter().take(ENGINES_MAX);
        let states = self.states.borrow_and_update();
        Registration {
            node: self.node.clone(),
            engines: engines
                .map(|beside| {
                    let known = states.get(&beside.id);
                    known::engine(beside, known)
                })
                .collect(),
            leaving: false,
            registrant: self.registrant,
        }
    }

    /// How long an attempt may take.
    fn limit(&self) -> Duration {
        (self.lease / 6).clamp(RENEW_MIN, ATTEMPT_TIMEOUT)
    }

    /// Longest pause after an attempt. While a lease runs, two more fit into it after a renewal at a third of it that failed: 1/3 and
    /// three times 1/6 for attempts, two times 1/12 for pauses. Later nothing is lost any more, but a control plane that was away gives
    /// whom it knew a whole lease to come back in.
    fn pause_max(&self) -> Duration {
        let runs = self.until.is_some_and(|until| Instant::now() < until);
        self.lease / if runs { 12 } else { 3 }
    }

    /// Until the end; then says that it goes.
    async fn run(mut self) {
        let mut backoff = Backoff::default();
        let engines = self.tells.engines();
        let mut first = self.states.clone();
        let told = async {
            // What it gives is a lock.
            let _ = first
                .wait_for(|states| known::are_told(&engines, states))
                .await;
        };
        tokio::select! {
            // Those that say nothing are told as they are.
            _ = timeout(STATES_TIMEOUT, told) => {}
            () = &mut self.end => return self.leave(None).await,
        }
        loop {
            set_registered(false);
            let mut was_taken = false;
            let held = self.hold(&mut was_taken).await;
            set_registered(false);
            let error = match held {
                Ok(stream) => return self.leave(Some(stream)).await,
                Err(error) => error,
            };
            let servers = self.tells.servers();
            let server = servers.get(self.at % servers.len().max(1));
            let server = server.map(|it| it.authority.as_str()).unwrap_or_default();
            count(match error {
                RegistryError::Refused(_) => "refused",
                RegistryError::Broken(_) => "broken",
            });
            tracing::warn!(server, %error, "not registered at the control plane: the next attempt comes soon");
            if was_taken {
                backoff = Backoff::default();
            } else if !servers.is_empty() {
                self.at = self.at.wrapping_add(1);
            }
            let pause = backoff.pause().min(self.pause_max());
            tokio::select! {
                () = sleep(pause) => {}
                () = &mut self.end => return self.leave(None).await,
            }
        }
    }

    fn server(&self) -> Result<Server, RegistryError> {
        let mut servers = self.tells.servers();
        if servers.is_empty() {
            let none = "its cluster waits for something, or has no endpoint";
            return Err(RegistryError::Broken(none.into()));
        }
        let at = self.at % servers.len();
        Ok(servers.swap_remove(at))
    }

    /// Holds a lease until the end; the stream is what is left of it.
    async fn hold(&mut self, was_taken: &mut bool) -> Result<RegistryStream, RegistryError> {
        let server = self.server()?;
        let mut said = self.registration();
        let mut asked = Instant::now();
        let opening = async {
            let mut stream = open(&server, &said).await?;
            let lease = stream.lease().await?;
            Ok((stream, lease))
        };
        let (mut stream, mut lease) = within(self.limit(), opening).await?;
        loop {
            self.lease = lease;
            self.until = Some(asked + lease);
            count("taken");
            set_registered(true);
            if !std::mem::replace(was_taken, true) {
                let (server, lease) = (&server.authority, self.lease);
                tracing::info!(server, ?lease, "registered at the control plane");
            }
            if self.is_over(&mut stream, &said).await? {
                return Ok(stream);
            }
            said = self.registration();
            asked = Instant::now();
            let renewing = async {
                stream.say(&said).await?;
                stream.lease().await
            };
            lease = within(self.limit(), renewing).await?;
        }
    }

    /// Waits until it is to be said again, or is over.
    async fn is_over(
        &mut self,
        stream: &mut RegistryStream,
        said: &Registration,
    ) -> Result<bool, RegistryError> {
        // Not all at once.
        let share = rand::rng().random_range(0.8..1.0);
        let renewal = sleep((self.lease / 3).mul_f64(share).max(RENEW_MIN));
        tokio::pin!(renewal);
        loop {
            tokio::select! {
                () = &mut renewal => return Ok(false),
                Ok(()) = self.states.changed() => {
                    if self.registration() != *said {
                        return Ok(false);
                    }
                }
                unasked = stream.lease() => drop(unasked?),
                () = &mut self.end => return Ok(true),
            }
        }
    }

    /// Says that we go, on the stream that is open or on a new one.
    async fn leave(&mut self, stream: Option<RegistryStream>) {
        let leaving = Registration {
            node: self.node.clone(),
            engines: Vec::new(),
            leaving: true,
            registrant: self.registrant,
        };
        let server = self.server();
        let leaving = async {
            let mut stream = match stream {
                None => open(&server?, &leaving).await?,
                Some(mut stream) => {
                    stream.say(&leaving).await?;
                    stream
                }
            };
            stream.lease().await
        };
        match timeout(FAREWELL, leaving).await {
            Ok(Ok(_)) => tracing::info!("the control plane knows that we go"),
            Ok(Err(error)) => tracing::warn!(%error, "the control plane does not know that we go"),
            Err(_) => tracing::warn!("the control plane does not know that we go"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_for_those_on_this_machine() {
        for (ip, server, expected) in [
            ("127.0.0.1", "127.0.0.1", true),
            ("127.0.0.1", "localhost", true),
            ("127.0.0.1", "10.0.0.9", false),
            ("::1", "control-plane", false),
            ("10.0.0.1", "10.0.0.9", true),
            ("0.0.0.0", "127.0.0.1", false),
            ("::", "10.0.0.9", false),
        ] {
            let server = Address {
                host: server.into(),
                port: 1,
            };
            assert_eq!(
                is_for_others(ip.parse().unwrap(), &server),
                expected,
                "{ip}"
            );
        }
    }
}
