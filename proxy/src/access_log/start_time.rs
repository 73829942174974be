//! How `%START_TIME(format)%` shows a time: the strftime conversions that access logs use, in UTC.

use super::escape::{append_padded, append_uint};
use std::time::{SystemTime, UNIX_EPOCH};

/// A compiled time format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TimeFormat(Vec<Piece>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Literal(String),
    Year,
    Month,
    Day,
    DayOfYear,
    Hour,
    Minute,
    Second,
    /// Digits after the second's point.
    Fraction(u32),
    /// Seconds since 1970.
    Epoch,
    MonthName,
    WeekDayName,
}

const DAYS: [&str; 7] = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];
const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

impl Default for TimeFormat {
    /// RFC 3339 with milliseconds, as Envoy's default.
    fn default() -> Self {
        Self::compile("%Y-%m-%dT%H:%M:%E3SZ").expect("invariant: the default format is one we know")
    }
}

impl TimeFormat {
    /// # Errors
    /// Names the first conversion that is not known.
    pub(crate) fn compile(format: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            literal(&mut pieces, &rest[..at]);
            rest = conversion(&mut pieces, &rest[at..])?;
        }
        literal(&mut pieces, rest);
        Ok(Self(pieces))
    }

    /// Appends `time`, which is shown as 1970 if it is before that.
    pub(crate) fn append(&self, time: SystemTime, out: &mut Vec<u8>) {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let day = since.as_secs() / 86_400;
        let second = since.as_secs() % 86_400;
        let date = Date::from_days(day);
        for piece in &self.0 {
            match piece {
                Piece::Literal(text) => out.extend_from_slice(text.as_bytes()),
                Piece::Year => append_padded(date.year, 4, out),
                Piece::Month => append_padded(date.month, 2, out),
                Piece::Day => append_padded(date.day, 2, out),
                Piece::DayOfYear => append_padded(date.day_of_year(), 3, out),
                Piece::Hour => append_padded(second / 3600, 2, out),
                Piece::Minute => append_padded(second / 60 % 60, 2, out),
                Piece::Second => append_padded(second % 60, 2, out),
                Piece::Fraction(digits) => {
                    let nanos = u64::from(since.subsec_nanos());
                    append_padded(nanos / 10_u64.pow(9 - digits), *digits, out);
                }
                Piece::Epoch => append_uint(since.as_secs(), out),
                Piece::MonthName => {
                    out.extend_from_slice(MONTHS[date.month as usize - 1].as_bytes())
                }
                Piece::WeekDayName => {
                    out.extend_from_slice(DAYS[(day as usize + 4) % 7].as_bytes())
                }
            }
        }
    }
}

fn literal(pieces: &mut Vec<Piece>, text: &str) {
    if text.is_empty() {
        return;
    }
    if let Some(Piece::Literal(before)) = pieces.last_mut() {
        before.push_str(text);
    } else {
        pieces.push(Piece::Literal(text.to_owned()));
    }
}

/// Takes one conversion, percent sign first, and gives what follows it.
fn conversion<'a>(pieces: &mut Vec<Piece>, text: &'a str) -> Result<&'a str, String> {
    let unknown = || {
        format!(
            "unknown time conversion {:?}",
            text.chars().take(4).collect::<String>()
        )
    };
    // %3f and %E3S: a number of digits between one and nine.
    let digits = |at: usize| {
        text[at..]
            .chars()
            .next()?
            .to_digit(10)
            .filter(|digits| (1..=9).contains(digits))
    };
    let letter = text[1..].chars().next().ok_or_else(unknown)?;
    let known: &[Piece] = match letter {
        'Y' => &[Piece::Year],
        'm' => &[Piece::Month],
        'd' => &[Piece::Day],
        'j' => &[Piece::DayOfYear],
        'H' => &[Piece::Hour],
        'M' => &[Piece::Minute],
        'S' => &[Piece::Second],
        'f' => &[Piece::Fraction(9)],
        's' => &[Piece::Epoch],
        'b' | 'h' => &[Piece::MonthName],
        'a' => &[Piece::WeekDayName],
        'F' | 'T' | 'z' | 'Z' | '%' => {
            expand(pieces, letter);
            &[]
        }
        'E' => {
            let digits = digits(2)
                .filter(|_| text[3..].starts_with('S'))
                .ok_or_else(unknown)?;
            pieces.push(Piece::Second);
            literal(pieces, ".");
            pieces.push(Piece::Fraction(digits));
            return Ok(&text[4..]);
        }
        _ => {
            let digits = digits(1)
                .filter(|_| text[2..].starts_with('f'))
                .ok_or_else(unknown)?;
            pieces.push(Piece::Fraction(digits));
            return Ok(&text[3..]);
        }
    };
    pieces.extend_from_slice(known);
    Ok(&text[2..])
}

/// Conversions that stand for several pieces or for fixed text.
fn expand(pieces: &mut Vec<Piece>, letter: char) {
    let (parts, between) = match letter {
        'F' => ([Piece::Year, Piece::Month, Piece::Day], "-"),
        'T' => ([Piece::Hour, Piece::Minute, Piece::Second], ":"),
        'z' => return literal(pieces, "+0000"),
        'Z' => return literal(pieces, "UTC"),
        _ => return literal(pieces, "%"),
    };
    for (index, part) in parts.into_iter().enumerate() {
        if index > 0 {
            literal(pieces, between);
        }
        pieces.push(part);
    }
}

struct Date {
    year: u64,
    month: u64,
    day: u64,
}

impl Date {
    /// The Gregorian date so many days after 1970-01-01, by counting years from March: then the leap day is last.
    fn from_days(days: u64) -> Self {
        const DAYS_IN_400_YEARS: u64 = 146_097;
        const MARCH_1_YEAR_0_TO_1970: u64 = 719_468;
        let days = days + MARCH_1_YEAR_0_TO_1970;
        let era = days / DAYS_IN_400_YEARS;
        let day_of_era = days % DAYS_IN_400_YEARS;
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // Months from March alternate 31 and 30 days with one more 31 in between: 153 days in five months.
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day,
        }
    }

    fn day_of_year(&self) -> u64 {
        const BEFORE: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        let is_leap = self.year.is_multiple_of(4)
            && (!self.year.is_multiple_of(100) || self.year.is_multiple_of(400));
        BEFORE[self.month as usize - 1] + self.day + u64::from(is_leap && self.month > 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[track_caller]
    fn check(format: &str, seconds: u64, nanos: u32, expect: &str) {
        let mut out = Vec::new();
        TimeFormat::compile(format)
            .unwrap()
            .append(UNIX_EPOCH + Duration::new(seconds, nanos), &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), expect);
    }

    #[test]
    fn formats() {
        const T: u64 = 1_795_347_015; // date -u -d @1795347015: Sun Nov 22 11:30:15 UTC 2026
        check(
            "%Y-%m-%dT%H:%M:%E3SZ",
            T,
            7_654_321,
            "2026-11-22T11:30:15.007Z",
        );
        check("%s.%3f", T, 999_999_999, "1795347015.999");
        check(
            "%a, %d %b %Y %T %Z (%j) %%",
            T,
            0,
            "Sun, 22 Nov 2026 11:30:15 UTC (326) %",
        );
        check("%F %z é", T, 0, "2026-11-22 +0000 é");
        check("%f %1f %9f", T, 123_456_789, "123456789 1 123456789");
        check("plain", T, 0, "plain");
    }

    #[test]
    fn dates_at_the_edges() {
        check("%F %j", 0, 0, "1970-01-01 001");
        check("%F %j", 951_782_400, 0, "2000-02-29 060");
        check("%F %j", 1_709_164_800, 0, "2024-02-29 060");
        check("%F %j", 1_735_603_200, 0, "2024-12-31 366");
        check("%F %T", 4_107_542_399, 0, "2100-02-28 23:59:59");
        check("%F", 4_107_542_400, 0, "2100-03-01");
    }

    #[test]
    fn unknown_conversions_are_named() {
        for format in ["%Q", "%", "%E3", "%0f", "%é", "%Eé", "%3é"] {
            let error = TimeFormat::compile(format).unwrap_err();
            assert!(
                error.contains("unknown time conversion"),
                "{format}: {error}"
            );
        }
    }
}
