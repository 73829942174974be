//! What a Prometheus page says. Reads only what the demo shows: no timestamps, no exemplars.

/// One line of a page.
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

/// A page of `/metrics` or `/stats/prometheus`.
pub(super) struct Page(Vec<Sample>);

impl Page {
    /// Lines that are no samples are left out.
    pub(super) fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(sample).collect())
    }

    fn matching(&self, name: &str, labels: &[(&str, &str)]) -> impl Iterator<Item = &Sample> {
        self.0.iter().filter(move |sample| {
            let has = |(key, value): &(&str, &str)| {
                sample.labels.iter().any(|(k, v)| k == key && v == value)
            };
            sample.name == name && labels.iter().all(has)
        })
    }

    /// Sum of all samples of this name that carry these labels.
    pub(super) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|sample| sample.value).sum()
    }

    /// Sum of all samples of this name with a label that ends so.
    pub(super) fn sum_ending(&self, name: &str, label: &str, end: &str) -> f64 {
        let ends = |sample: &&Sample| {
            sample
                .labels
                .iter()
                .any(|(key, value)| key == label && value.ends_with(end))
        };
        self.matching(name, &[])
            .filter(ends)
            .map(|sample| sample.value)
            .sum()
    }

    /// Quantile of a histogram, in its unit, by straight lines within buckets; `None` while it is empty.
    pub(super) fn quantile(&self, name: &str, quantile: f64) -> Option<f64> {
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        for sample in self.matching(&format!("{name}_bucket"), &[]) {
            let bound = sample
                .labels
                .iter()
                .find(|(key, _)| key == "le")?
                .1
                .parse()
                .ok()?;
            match buckets.iter_mut().find(|(known, _)| *known == bound) {
                Some((_, count)) => *count += sample.value,
                None => buckets.push((bound, sample.value)),
            }
        }
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        let rank = buckets.last().filter(|(_, count)| *count > 0.0)?.1 * quantile;
        let mut below = (0.0, 0.0);
        for (bound, count) in buckets {
            if count >= rank {
                let share = (rank - below.1) / (count - below.1).max(f64::MIN_POSITIVE);
                return Some(if bound.is_finite() {
                    below.0 + (bound - below.0) * share
                } else {
                    below.0
                });
            }
            below = (bound, count);
        }
        None
    }
}

fn sample(line: &str) -> Option<Sample> {
    if line.starts_with('#') {
        return None;
    }
    let (head, value) = line.rsplit_once(' ')?;
    let (name, labels) = match head.split_once('{') {
        Some((name, rest)) => (name, pairs(rest.strip_suffix('}')?)?),
        None => (head, Vec::new()),
    };
    Some(Sample {
        name: name.to_owned(),
        labels,
        value: value.parse().ok()?,
    })
}

/// `a="x",b="y\"z"`.
fn pairs(mut text: &str) -> Option<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    while !text.is_empty() {
        let (key, rest) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        pairs.push((key.trim_start_matches(',').to_owned(), value));
        text = &rest[end + 1..];
    }
    Some(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_over_the_labels_not_asked_for() {
        let page = Page::parse(
            "# HELP a b\na{x=\"1\",y=\"p,\\\"q\"} 2\na{x=\"2\",y=\"r\"} 3\nab 9\nb 1.5\n",
        );
        assert_eq!(page.sum("a", &[]), 5.0);
        assert_eq!(page.sum("a", &[("y", "p,\"q")]), 2.0);
        assert_eq!(page.sum_ending("a", "y", "r"), 3.0);
        assert_eq!((page.sum("b", &[]), page.sum("c", &[])), (1.5, 0.0));
    }

    #[test]
    fn quantiles_lie_within_their_bucket() {
        let page = Page::parse(
            "h_bucket{le=\"1\"} 50\nh_bucket{le=\"2\"} 100\nh_bucket{le=\"+Inf\"} 100\n",
        );
        assert_eq!(page.quantile("h", 0.5), Some(1.0));
        assert_eq!(page.quantile("h", 0.75), Some(1.5));
        assert_eq!(page.quantile("nothing", 0.5), None);
        let slow = Page::parse("h_bucket{le=\"1\"} 0\nh_bucket{le=\"+Inf\"} 4\n");
        assert_eq!(
            slow.quantile("h", 0.5),
            Some(1.0),
            "beyond the last bound, that bound is all that is known"
        );
        let empty = Page::parse("h_bucket{le=\"+Inf\"} 0\n");
        assert_eq!(empty.quantile("h", 0.5), None);
    }
}
