//! W3C's trace context as a request brings it.

use crate::headers::trace_id;
use http::{HeaderMap, HeaderName, HeaderValue};
use outrigger_filters::trace::TRACEPARENT;
use outrigger_xds::otlp::SpanId;

pub(crate) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Of a `tracestate` that spans tell: what W3C asks everybody to pass on.
const TRACESTATE_BYTES_MAX: usize = 512;
/// Length of a `traceparent` of version 00.
const LENGTH: usize = 55;

/// The span that the sender of a request made for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parent {
    /// Its id.
    pub(crate) span: SpanId,
    /// The sender traces it.
    pub(crate) sampled: bool,
}

/// The trace that a request belongs to, and where in it, if anybody traces or has decided not to; `None` unless it says
/// so once, and well.
pub(crate) fn parent(fields: &HeaderMap) -> Option<(&str, Option<Parent>)> {
    let mut lines = fields.get_all(TRACEPARENT).iter();
    let (Some(line), None) = (lines.next(), lines.next()) else {
        return None;
    };
    let text = line.to_str().ok()?;
    let parent = read(text)?;
    Some((trace_id(text), parent))
}

/// The inner `None` is of what [`new_traceparent`](crate::headers::new_traceparent) made where nobody decides.
fn read(text: &str) -> Option<Option<Parent>> {
    let dashes = [2, 35, 52]
        .iter()
        .all(|&at| text.as_bytes().get(at) == Some(&b'-'));
    let (version, trace) = (hex(text, 0, 2)?, hex(text, 3, 35)?);
    let (span, flags) = (hex(text, 36, 52)?, hex(text, 53, 55)?);
    let ends = match text.as_bytes().get(LENGTH) {
        None => true,
        Some(next) => version > 0 && *next == b'-',
    };
    let fits = dashes && ends && version != 0xff && trace != 0 && span != 0;
    let (span, sampled) = (span as u64, flags & 1 == 1);
    let decided = sampled || span != trace as u64;
    fits.then(|| {
        decided.then(|| Parent {
            span: span.to_be_bytes(),
            sampled,
        })
    })
}

/// A number of lowercase digits.
fn hex(text: &str, from: usize, to: usize) -> Option<u128> {
    let digits = text.get(from..to)?;
    let is_digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if !digits.bytes().all(is_digit) {
        return None;
    }
    u128::from_str_radix(digits, 16).ok()
}

/// What spans tell of `tracestate`: its lines as one, which also goes upstream; nothing if that is too long.
pub(crate) fn state(fields: &mut HeaderMap) -> String {
    let lines = fields.get_all(TRACESTATE).iter();
    let lines: Vec<_> = lines.filter_map(|line| line.to_str().ok()).collect();
    let bytes: usize = lines.iter().map(|line| line.len() + 1).sum();
    if bytes > TRACESTATE_BYTES_MAX + 1 {
        return String::new();
    }
    let state = lines.join(",");
    if lines.len() > 1
        && let Ok(one) = HeaderValue::from_str(&state)
    {
        fields.insert(TRACESTATE, one);
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::headers::new_traceparent;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn fields(name: &HeaderName, lines: &[&str]) -> HeaderMap {
        let mut fields = HeaderMap::new();
        for line in lines {
            fields.append(name, line.parse().unwrap());
        }
        fields
    }

    #[test]
    fn only_a_traceparent_that_is_well_formed_is_one() {
        for (text, sampled) in [
            (format!("00-{TRACE}-{SPAN}-01"), Some(true)),
            (format!("00-{TRACE}-{SPAN}-00"), Some(false)),
            (format!("00-{TRACE}-{SPAN}-03"), Some(true)),
            (format!("01-{TRACE}-{SPAN}-01"), Some(true)),
            (format!("01-{TRACE}-{SPAN}-01-more"), Some(true)),
            (format!("01-{TRACE}-{SPAN}-01more"), None),
            (format!("00-{TRACE}-{SPAN}-01-more"), None),
            (format!("ff-{TRACE}-{SPAN}-01"), None),
            (format!("00-{}-{SPAN}-01", TRACE.to_uppercase()), None),
            (format!("00-{TRACE}-{}-01", SPAN.to_uppercase()), None),
            (format!("00-{TRACE}-+{}-01", &SPAN[1..]), None),
            (format!("00-+{}-{SPAN}-01", &TRACE[1..]), None),
            (format!("00-{}-{SPAN}-01", "0".repeat(32)), None),
            (format!("00-{TRACE}-{}-01", "0".repeat(16)), None),
            (format!("00_{TRACE}-{SPAN}-01"), None),
            (format!("00-{TRACE}_{SPAN}-01"), None),
            (format!("00-{TRACE}-{SPAN}_01"), None),
            (format!("0x-{TRACE}-{SPAN}-01"), None),
            (format!("00-{TRACE}-{SPAN}-0"), None),
            (format!("00-{TRACE}-{SPAN}-+1"), None),
            (String::new(), None),
        ] {
            let fields = fields(&TRACEPARENT, &[&text]);
            let read = parent(&fields);
            let parent = read.map(|(_, parent)| parent.unwrap());
            assert_eq!(parent.map(|parent| parent.sampled), sampled, "{text}");
            assert!(read.is_none_or(|(trace, _)| trace == TRACE), "{text}");
        }
        let one = format!("00-{TRACE}-{SPAN}-01");
        let told = fields(&TRACEPARENT, &[&one]);
        let read = parent(&told);
        let span = read.unwrap().1.unwrap().span;
        assert_eq!(span, [0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]);
        assert_eq!(parent(&fields(&TRACEPARENT, &[&one, &one])), None, "two");
    }

    #[test]
    fn what_a_proxy_without_traces_makes_is_no_decision() {
        for decides in [false, true] {
            let made = new_traceparent(decides);
            let fields = fields(&TRACEPARENT, &[made.as_str()]);
            let (trace, parent) = parent(&fields).unwrap();
            assert_eq!(trace, trace_id(made.as_str()));
            assert_eq!(
                parent.map(|parent| parent.sampled),
                decides.then_some(false)
            );
        }
    }

    #[test]
    fn lines_of_state_are_one_and_long_ones_are_not_told() {
        let (most, long) = ("x".repeat(512), "x".repeat(513));
        for (lines, told, upstream) in [
            (vec![], "", 0),
            (vec!["a=1"], "a=1", 1),
            (vec!["a=1", "b=2"], "a=1,b=2", 1),
            (vec![&most], most.as_str(), 1),
            (vec![&long], "", 1),
            (vec![&most, "b=2"], "", 2),
        ] {
            let mut fields = fields(&TRACESTATE, &lines);
            assert_eq!(state(&mut fields), told);
            assert_eq!(
                fields.get_all(TRACESTATE).iter().count(),
                upstream,
                "{told}"
            );
        }
    }
}
