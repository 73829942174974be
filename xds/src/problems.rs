//! Everything that is wrong with a configuration, each problem with its place.
//!
//! Reading collects instead of stopping at the first problem, so that an operator mends a file once.

use std::fmt;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Path of field names from the top, `static_resources.listeners[0].name`; empty for the whole text.
    pub place: String,
    /// What is wrong there.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.place.is_empty() {
            f.write_str(&self.message)
        } else {
            write!(f, "{}: {}", self.place, self.message)
        }
    }
}

/// All that is wrong; one line each when displayed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConfigErrors(Vec<Problem>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Path of `field` below `place`; an index comes as `[0]`.
pub(crate) fn join(place: &str, field: &str) -> String {
    if place.is_empty() {
        field.to_owned()
    } else if field.is_empty() || field.starts_with('[') {
        format!("{place}{field}")
    } else {
        format!("{place}.{field}")
    }
}

impl ConfigErrors {
    /// The problems, in the order they were found.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.0
    }

    /// A single problem.
    #[must_use]
    pub fn one(place: &str, message: impl Into<String>) -> Self {
        Self(vec![Problem {
            place: place.to_owned(),
            message: message.into(),
        }])
    }

    /// One more problem.
    pub(crate) fn add(&mut self, place: impl Into<String>, message: impl Into<String>) {
        self.0.push(Problem {
            place: place.into(),
            message: message.into(),
        });
    }

    /// Problems of a part, moved below `place`.
    pub(crate) fn absorb(&mut self, place: &str, part: Self) {
        self.0.extend(part.0.into_iter().map(|p| Problem {
            place: join(place, &p.place),
            message: p.message,
        }));
    }

    /// The value of a part, or `None` and its problems noted.
    pub(crate) fn take<T>(&mut self, place: &str, result: Result<T, Self>) -> Option<T> {
        result.map_err(|part| self.absorb(place, part)).ok()
    }

    /// All parts of a list that are well; the problems of the others noted.
    pub(crate) fn take_all<W, T: TryFrom<W, Error = Self>>(
        &mut self,
        place: &str,
        parts: Vec<W>,
    ) -> Vec<T> {
        let each = parts.into_iter().enumerate();
        each.filter_map(|(index, part)| self.take(&format!("{place}[{index}]"), T::try_from(part)))
            .collect()
    }

    /// A part that must be there.
    pub(crate) fn required<W, T: TryFrom<W, Error = Self>>(
        &mut self,
        place: &str,
        part: Option<W>,
    ) -> Option<T> {
        match part {
            Some(part) => self.take(place, T::try_from(part)),
            None => {
                self.add(place, "required");
                None
            }
        }
    }

    /// A text that must not be empty.
    pub(crate) fn not_empty(&mut self, place: &str, text: String) -> String {
        if text.is_empty() {
            self.add(place, "must not be empty");
        }
        text
    }

    /// The value, unless something was wrong. `value` is `None` only if a problem was noted.
    pub(crate) fn finish<T>(self, value: Option<T>) -> Result<T, Self> {
        match value {
            Some(value) if self.0.is_empty() => Ok(value),
            Some(_) => Err(self),
            None if self.0.is_empty() => Err(Self::one("", "incomplete")),
            None => Err(self),
        }
    }

    /// Keeps the problems for whose place `keep` says so.
    pub(crate) fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.0.retain(|problem| keep(&problem.place));
    }
}

/// An error with its causes: the first alone is often just "transport error".
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
