//! Room that a thread has used and uses again: for header maps, which are larger than what an allocator gives away cheaply.

use http::{HeaderMap, HeaderName, HeaderValue};
use std::cell::RefCell;

/// Most things of a kind that a thread keeps.
const SPARES_MAX: usize = 32;
/// A map with room for more fields is not kept.
const FIELDS_KEPT_MAX: usize = 64;

thread_local! {
    static HEADERS: Shelf<HeaderMap> = const { Shelf::new() };
    static FIELDS: Shelf<Vec<(HeaderName, HeaderValue)>> = const { Shelf::new() };
}

/// What a thread keeps of one kind, last in, first out.
#[derive(Debug)]
pub struct Shelf<T>(RefCell<Vec<T>>);

impl<T> Shelf<T> {
    /// An empty one.
    #[must_use]
    pub const fn new() -> Self {
        Self(RefCell::new(Vec::new()))
    }

    /// One of them, if there is any.
    pub fn take(&self) -> Option<T> {
        self.0.borrow_mut().pop()
    }

    /// Keeps this, unless there are enough.
    pub fn keep(&self, spare: T) {
        let mut kept = self.0.borrow_mut();
        if kept.len() < SPARES_MAX {
            kept.push(spare);
        }
    }
}

impl<T> Default for Shelf<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// An empty map with room for so many fields.
#[must_use]
pub fn headers(fields: usize) -> HeaderMap {
    match HEADERS.with(Shelf::take) {
        Some(spare) if spare.capacity() >= fields => spare,
        _ => HeaderMap::with_capacity(fields),
    }
}

/// Keeps the room of a map for the next head of this thread.
pub fn release_headers(mut headers: HeaderMap) {
    if (1..=FIELDS_KEPT_MAX).contains(&headers.capacity()) {
        headers.clear();
        HEADERS.with(|kept| kept.keep(headers));
    }
}

/// A copy of a head's fields that is most likely never needed: a list, in room that was used before, is made sooner than a map.
#[derive(Debug)]
pub struct Fields(Vec<(HeaderName, HeaderValue)>);

impl Fields {
    /// Of this map.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        let mut fields = FIELDS.with(Shelf::take).unwrap_or_default();
        fields.reserve(headers.len());
        let named = |(name, value): (&HeaderName, &HeaderValue)| (name.clone(), value.clone());
        fields.extend(headers.iter().map(named));
        Self(fields)
    }

    /// The map again.
    #[must_use]
    pub fn map(&self) -> HeaderMap {
        let mut map = headers(self.0.len());
        for (name, value) in &self.0 {
            map.append(name.clone(), value.clone());
        }
        map
    }
}

impl Drop for Fields {
    fn drop(&mut self) {
        if self.0.capacity() <= FIELDS_KEPT_MAX {
            let mut fields = std::mem::take(&mut self.0);
            fields.clear();
            FIELDS.with(|kept| kept.keep(fields));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderValue, header};

    #[test]
    fn a_map_comes_back_empty_with_its_room() {
        let mut map = HeaderMap::with_capacity(20);
        map.insert(header::HOST, HeaderValue::from_static("a"));
        let room = map.capacity();
        release_headers(map);
        let again = headers(10);
        assert!(again.is_empty());
        assert_eq!(again.capacity(), room);
        assert_eq!(
            headers(1).capacity(),
            HeaderMap::<HeaderValue>::with_capacity(1).capacity()
        );
    }

    #[test]
    fn a_list_of_fields_makes_the_map_it_was_made_of() {
        let mut map = HeaderMap::new();
        map.insert(header::HOST, HeaderValue::from_static("a"));
        map.append(header::VIA, HeaderValue::from_static("one"));
        map.append("x-own", HeaderValue::from_static("b"));
        map.append(header::VIA, HeaderValue::from_static("two"));
        let fields = Fields::of(&map);
        assert_eq!(fields.map(), map);
        let room = fields.0.capacity();
        drop(fields);
        let again = Fields::of(&HeaderMap::new());
        assert_eq!((again.0.len(), again.0.capacity()), (0, room));
    }

    #[test]
    fn what_is_too_small_too_large_or_too_much_is_not_kept() {
        release_headers(HeaderMap::with_capacity(4));
        assert!(headers(40).capacity() >= 40);
        release_headers(HeaderMap::with_capacity(10 * FIELDS_KEPT_MAX));
        release_headers(HeaderMap::new());
        assert!(HEADERS.with(Shelf::take).is_none());
        let shelf = Shelf::new();
        (0..2 * SPARES_MAX).for_each(|spare| shelf.keep(spare));
        assert_eq!(std::iter::from_fn(|| shelf.take()).count(), SPARES_MAX);
    }
}
