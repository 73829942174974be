//! `date`: what every answer of ours says that has none (RFC 9110, 6.6.1). Made once a second.

use crate::access_log::TimeFormat;
use std::{
    cell::RefCell,
    time::{SystemTime, UNIX_EPOCH},
};

struct Cached {
    format: TimeFormat,
    second: Option<u64>,
    text: Vec<u8>,
}

thread_local! {
    static CACHED: RefCell<Cached> = RefCell::new(Cached {
        format: TimeFormat::compile("%a, %d %b %Y %H:%M:%S GMT")
            .expect("invariant: these conversions are known"),
        second: None,
        text: Vec::new(),
    });
}

/// Appends the line.
pub(super) fn write(out: &mut Vec<u8>) {
    let now = SystemTime::now();
    let second = now
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    CACHED.with_borrow_mut(|cached| {
        if cached.second != Some(second) {
            cached.second = Some(second);
            cached.text.clear();
            cached.format.append(now, &mut cached.text);
        }
        out.extend_from_slice(b"date: ");
        out.extend_from_slice(&cached.text);
        out.extend_from_slice(b"\r\n");
    });
}
