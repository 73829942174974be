//! Who registered, and until when that counts. No IO, and the clock is given in.
//!
//! Leases end by time: not when a stream breaks, and not when the clock on the wall jumps, for [`Instant`] does not. Time in
//! which this process stood still counts for nobody, since it heard nobody.

use outrigger_xds::registry::{Holder, Kept, Registration};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Nodes, and agents, that may hold a lease. Each is sent all others: what that takes grows with the square of them, and is not measured.
pub const LEASES_MAX: usize = 1_000;
/// Shortest lease that can be given.
pub const LEASE_MIN: Duration = Duration::from_secs(1);
/// Longest lease that can be given.
pub const LEASE_MAX: Duration = Duration::from_secs(3600);
/// How often it is looked whose lease is over.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Between two looks; what is longer is no lease's time.
const STALL: Duration = Duration::from_secs(1);

/// A lease that runs.
#[derive(Debug, Clone)]
pub struct Lease {
    /// What its node said last.
    pub registration: Registration,
    /// From where; empty if it was on disk.
    pub from: String,
    /// For how long it was given.
    pub length: Duration,
    /// When it is over, unless it is renewed.
    pub until: Instant,
}

/// What a registration led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// The node held no lease.
    New,
    /// It said something else than before.
    Changed,
    /// It said the same.
    Renewed,
    /// Its lease ended, if it held one.
    Left,
}

impl Heard {
    /// As metrics have it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Changed => "changed",
            Self::Renewed => "renewed",
            Self::Left => "left",
        }
    }
}

/// Why a registration is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Too many nodes.
    #[error("{0} nodes hold a lease, and no more may")]
    TooMany(usize),
    /// The id is in use.
    #[error("{id} is registered at {at}: the id is free when that lease is over or given back")]
    Elsewhere {
        /// Of the node.
        id: Holder,
        /// Who has it.
        at: String,
    },
    /// The address is in use.
    #[error("{at} is where {by} is registered")]
    Taken {
        /// Where.
        at: String,
        /// Who has it.
        by: Holder,
    },
}

/// All leases.
#[derive(Debug)]
pub struct Table {
    length: Duration,
    leases: BTreeMap<Holder, Lease>,
    /// Who is where.
    addresses: BTreeMap<String, Holder>,
    /// Another one whenever something else is to be served.
    generation: u64,
    looked: Instant,
}

impl Table {
    /// That gives leases of this length. Those that were kept on disk count for a whole lease from now: nobody could renew
    /// them while we were away.
    #[must_use]
    pub fn new(length: Duration, kept: Vec<Kept>, now: Instant) -> Self {
        let mut table = Self {
            length,
            leases: BTreeMap::new(),
            addresses: BTreeMap::new(),
            generation: 0,
            looked: now,
        };
        for kept in kept {
            // Who was given a longer one renews it as seldom.
            let length = kept.length.clamp(length, LEASE_MAX.max(length));
            table.put(kept.registration, "", length, now);
        }
        table
    }

    /// All leases.
    #[must_use]
    pub fn leases(&self) -> &BTreeMap<Holder, Lease> {
        &self.leases
    }

    /// Another number whenever something else is to be served.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    fn put(&mut self, registration: Registration, from: &str, length: Duration, now: Instant) {
        let holder = registration.holder();
        let at = registration.node.address.to_string();
        self.addresses.insert(at, holder.clone());
        let lease = Lease {
            from: from.to_owned(),
            length,
            until: now + length,
            registration,
        };
        self.leases.insert(holder, lease);
    }

    /// Takes in what a node says. A node is who it was if it is at the same address: whoever starts again there goes on with
    /// its lease.
    ///
    /// # Errors
    /// It may not say so; what there was stays.
    pub fn hear(
        &mut self,
        registration: Registration,
        from: &str,
        now: Instant,
    ) -> Result<(Heard, Duration), Refusal> {
        let id = registration.holder();
        let at = registration.node.address.to_string();
        let known = self.leases.get(&id);
        if let Some(other) = known.map(|lease| lease.registration.node.address.to_string())
            && other != at
        {
            return Err(Refusal::Elsewhere { id, at: other });
        }
        if registration.leaving {
            self.remove(&id);
            return Ok((Heard::Left, Duration::ZERO));
        }
        if let Some(by) = self.addresses.get(&at).filter(|by| **by != id) {
            let by = by.clone();
            return Err(Refusal::Taken { at, by });
        }
        let heard = match known {
            None if self.leases.len() >= LEASES_MAX => return Err(Refusal::TooMany(LEASES_MAX)),
            None => Heard::New,
            Some(lease) if lease.registration == registration => Heard::Renewed,
            Some(_) => Heard::Changed,
        };
        self.generation += u64::from(heard != Heard::Renewed);
        self.put(registration, from, self.length, now);
        Ok((heard, self.length))
    }

    fn remove(&mut self, id: &Holder) {
        if let Some(lease) = self.leases.remove(id) {
            self.addresses
                .remove(&lease.registration.node.address.to_string());
            self.generation += 1;
        }
    }

    /// Ends the leases that are over, and says whose they were. To be called every [`LOOK_INTERVAL`].
    pub fn look(&mut self, now: Instant) -> Vec<Holder> {
        let since = now.saturating_duration_since(self.looked);
        self.looked = now;
        if since > STALL {
            // What was said meanwhile may lie in a socket still.
            for lease in self.leases.values_mut() {
                lease.until += since;
            }
        }
        let over = self.leases.iter().filter(|(_, lease)| lease.until <= now);
        let over: Vec<Holder> = over.map(|(id, _)| id.clone()).collect();
        for id in &over {
            self.remove(id);
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::registry::{Node, Registrant, address};

    const LENGTH: Duration = Duration::from_secs(30);

    fn said(id: &str, at: &str) -> Registration {
        Registration {
            node: Node {
                id: id.into(),
                address: address(at).unwrap(),
                ..Node::default()
            },
            ..Registration::default()
        }
    }

    fn leaving(id: &str, at: &str) -> Registration {
        Registration {
            leaving: true,
            ..said(id, at)
        }
    }

    /// A table, and looks at it as often as they have to be.
    struct Run {
        table: Table,
        now: Instant,
    }

    impl Run {
        fn new(kept: Vec<Kept>) -> Self {
            let now = Instant::now();
            let table = Table::new(LENGTH, kept, now);
            Self { table, now }
        }

        /// Whose lease ends over this time.
        fn pass(&mut self, time: Duration) -> Vec<String> {
            let end = self.now + time;
            let mut over = Vec::new();
            while self.now < end {
                self.now = end.min(self.now + LOOK_INTERVAL);
                let ended = self.table.look(self.now);
                over.extend(ended.into_iter().map(|it| it.id));
            }
            over
        }

        fn hear(&mut self, said: Registration) -> Result<Heard, Refusal> {
            let heard = self.table.hear(said, "somewhere", self.now);
            heard.map(|(heard, _)| heard)
        }
    }

    #[test]
    fn a_lease_ends_by_time_or_by_word() {
        let mut run = Run::new(Vec::new());
        assert_eq!(run.hear(said("a", "h:1")), Ok(Heard::New));
        assert_eq!(run.hear(said("b", "h:2")), Ok(Heard::New));
        let before = run.table.generation();
        assert_eq!(run.pass(LENGTH / 3), [""; 0]);
        assert_eq!(run.hear(said("a", "h:1")), Ok(Heard::Renewed));
        assert_eq!(run.table.generation(), before, "a renewal is no news");
        assert_eq!(run.pass(LENGTH * 2 / 3), ["b"]);
        assert_eq!(run.table.generation(), before + 1);
        let mut more = said("a", "h:1");
        more.node.zone = "z".into();
        assert_eq!(run.hear(more), Ok(Heard::Changed));
        assert_eq!(run.hear(leaving("a", "h:1")), Ok(Heard::Left));
        assert_eq!(run.hear(leaving("a", "h:1")), Ok(Heard::Left), "twice");
        assert!(run.table.leases().is_empty());
        assert_eq!(run.table.generation(), before + 3);
    }

    #[test]
    fn an_id_and_an_address_are_one_nodes_while_its_lease_runs() {
        let mut run = Run::new(Vec::new());
        run.hear(said("a", "h:1")).unwrap();
        let elsewhere = Refusal::Elsewhere {
            id: said("a", "h:1").holder(),
            at: "h:1".into(),
        };
        assert_eq!(run.hear(said("a", "h:2")), Err(elsewhere.clone()));
        assert_eq!(run.hear(leaving("a", "h:2")), Err(elsewhere));
        let taken = Refusal::Taken {
            at: "h:1".into(),
            by: said("a", "h:1").holder(),
        };
        assert_eq!(run.hear(said("b", "h:1")), Err(taken));
        assert_eq!(run.table.leases().len(), 1);
        assert_eq!(run.hear(said("a", "h:1")), Ok(Heard::Renewed));
        assert_eq!(run.pass(LENGTH), ["a"]);
        assert_eq!(run.hear(said("a", "h:2")), Ok(Heard::New));
        assert_eq!(run.hear(said("b", "h:1")), Ok(Heard::New));
    }

    #[test]
    fn a_proxy_and_an_agent_are_two_under_one_id() {
        let agent = |at: &str| Registration {
            registrant: Registrant::Agent,
            ..said("a", at)
        };
        let mut run = Run::new(Vec::new());
        assert_eq!(run.hear(said("a", "h:1")), Ok(Heard::New));
        let by = said("a", "h:1").holder();
        let taken = Refusal::Taken {
            at: "h:1".into(),
            by,
        };
        assert_eq!(run.hear(agent("h:1")), Err(taken));
        assert_eq!(run.hear(agent("h:2")), Ok(Heard::New));
        let refused = run.hear(agent("h:3")).unwrap_err().to_string();
        assert!(refused.starts_with("the agent of node 'a' is registered at h:2"));
        assert_eq!(run.hear(leaving("a", "h:1")), Ok(Heard::Left));
        assert_eq!(run.table.leases().len(), 1);
        assert_eq!(run.hear(agent("h:2")), Ok(Heard::Renewed));
    }

    #[test]
    fn what_was_kept_counts_for_a_whole_lease() {
        let kept = |id: &str, at: &str, length| Kept {
            registration: said(id, at),
            length,
        };
        let long = LENGTH * 3;
        let mut run = Run::new(vec![
            kept("short", "h:1", Duration::ZERO),
            kept("long", "h:2", long),
        ]);
        assert_eq!(run.pass(LENGTH - LOOK_INTERVAL), [""; 0]);
        assert_eq!(run.hear(said("short", "h:1")), Ok(Heard::Renewed));
        assert_eq!(run.pass(LENGTH), ["short"]);
        assert_eq!(run.pass(LENGTH), [""; 0]);
        assert_eq!(run.pass(LENGTH), ["long"]);
    }

    #[test]
    fn time_in_which_nobody_looked_does_not_count() {
        let mut run = Run::new(Vec::new());
        run.hear(said("a", "h:1")).unwrap();
        run.pass(LENGTH / 2);
        run.now += LENGTH * 100;
        let now = run.now;
        assert!(run.table.look(now).is_empty());
        assert_eq!(run.pass(LENGTH / 2 - LOOK_INTERVAL), [""; 0]);
        assert_eq!(run.pass(LOOK_INTERVAL * 2), ["a"]);
    }

    #[test]
    fn there_is_room_for_so_many() {
        let mut run = Run::new(Vec::new());
        for number in 0..LEASES_MAX {
            run.hear(said(&number.to_string(), &format!("h{number}:1")))
                .unwrap();
        }
        let refused = run.hear(said("more", "h:1"));
        assert_eq!(refused, Err(Refusal::TooMany(LEASES_MAX)));
        assert_eq!(run.hear(said("0", "h0:1")), Ok(Heard::Renewed));
        run.hear(leaving("0", "h0:1")).unwrap();
        assert_eq!(run.hear(said("more", "h:1")), Ok(Heard::New));
    }
}
