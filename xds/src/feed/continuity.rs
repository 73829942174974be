//! Does a message follow the one before it?

use super::{FeedBody, FeedError, FeedMessage};
use crate::report::EngineId;
use std::collections::HashMap;

/// Remembers how far each engine's history has been heard.
#[derive(Debug, Default)]
pub struct Continuity {
    heard: HashMap<EngineId, (u64, u64)>,
}

impl Continuity {
    /// Whether `message` is news; `false` means that a snapshot already covered it.
    ///
    /// A history starts with a snapshot, or with changes numbered 0 or 1.
    ///
    /// # Errors
    /// [`FeedError::Gap`] if something before `message` was not heard.
    pub fn admit(&mut self, message: &FeedMessage) -> Result<bool, FeedError> {
        match message.body {
            FeedBody::State(_) | FeedBody::Load(_) => Ok(true),
            FeedBody::Gone => {
                self.heard.remove(&message.engine);
                Ok(true)
            }
            FeedBody::Snapshot(_) => {
                self.heard
                    .insert(message.engine.clone(), (message.epoch, message.seq));
                Ok(true)
            }
            FeedBody::Changes(_) => self.changes(message),
        }
    }

    fn changes(&mut self, message: &FeedMessage) -> Result<bool, FeedError> {
        let last = self.heard.get(&message.engine).copied();
        let follows = match last {
            Some((epoch, seq)) if epoch == message.epoch => {
                if message.seq <= seq {
                    return Ok(false);
                }
                message.seq - seq == 1
            }
            _ => message.seq <= 1,
        };
        if !follows {
            return Err(FeedError::Gap {
                engine: message.engine.clone(),
                last,
                found: message.seq,
            });
        }
        self.heard
            .insert(message.engine.clone(), (message.epoch, message.seq));
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::KvSnapshot;

    fn message(epoch: u64, seq: u64, body: FeedBody) -> FeedMessage {
        FeedMessage {
            engine: "a".into(),
            epoch,
            seq,
            body,
        }
    }

    #[test]
    fn only_what_follows_is_news() {
        let changes = |epoch, seq| message(epoch, seq, FeedBody::Changes(Vec::new()));
        let snapshot = |epoch, seq| message(epoch, seq, FeedBody::Snapshot(KvSnapshot::default()));
        let mut continuity = Continuity::default();
        let mut admit = |message: &FeedMessage| continuity.admit(message);
        assert!(admit(&changes(1, 5)).is_err(), "nothing was heard before");
        assert_eq!(admit(&snapshot(1, 5)), Ok(true));
        assert_eq!(admit(&changes(1, 4)), Ok(false), "in the snapshot");
        assert_eq!(admit(&changes(1, 5)), Ok(false), "in the snapshot");
        assert_eq!(admit(&changes(1, 6)), Ok(true));
        let gap = FeedError::Gap {
            engine: "a".into(),
            last: Some((1, 6)),
            found: 8,
        };
        assert_eq!(admit(&changes(1, 8)), Err(gap));
        assert_eq!(
            admit(&changes(2, 1)),
            Ok(true),
            "a new history from its start"
        );
        assert!(
            admit(&changes(3, 2)).is_err(),
            "a new history not from its start"
        );
        assert_eq!(admit(&message(3, 0, FeedBody::Gone)), Ok(true));
        assert!(
            admit(&changes(2, 2)).is_err(),
            "a gone engine has no history"
        );
        assert!(admit(&changes(4, u64::MAX)).is_err());
    }
}
