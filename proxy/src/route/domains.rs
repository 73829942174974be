//! Which virtual host an authority belongs to, in Envoy's order: exact, longest `*.suffix`, longest `prefix.*`, `*`.

use super::rewrite::split_port;
use ahash::AHashMap;
use outrigger_xds::resource::route::RouteConfiguration;

/// The domains of a route table, ready to be looked up.
#[derive(Debug, Default)]
pub struct Domains {
    exact: AHashMap<String, usize>,
    /// Longest first, as the next two.
    suffixes: Vec<(String, usize)>,
    prefixes: Vec<(String, usize)>,
    any: Option<usize>,
    ignore_port: bool,
}

impl Domains {
    /// Prepares them. That no domain is there twice is checked before.
    #[must_use]
    pub fn new(config: &RouteConfiguration) -> Self {
        let mut domains = Self {
            ignore_port: config.ignore_port_in_host_matching,
            ..Self::default()
        };
        for (index, host) in config.virtual_hosts.iter().enumerate() {
            for domain in &host.domains {
                let domain = domain.to_ascii_lowercase();
                if domain == "*" {
                    domains.any = Some(index);
                } else if let Some(suffix) = domain.strip_prefix('*') {
                    domains.suffixes.push((suffix.to_owned(), index));
                } else if let Some(prefix) = domain.strip_suffix('*') {
                    domains.prefixes.push((prefix.to_owned(), index));
                } else {
                    domains.exact.insert(domain, index);
                }
            }
        }
        for wildcards in [&mut domains.suffixes, &mut domains.prefixes] {
            wildcards.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        }
        domains
    }

    /// Index of the virtual host.
    #[must_use]
    pub fn find(&self, authority: &str) -> Option<usize> {
        if self.exact.is_empty() && self.suffixes.is_empty() && self.prefixes.is_empty() {
            return self.any;
        }
        let authority = if self.ignore_port {
            split_port(authority).0
        } else {
            authority
        };
        let authority = authority.to_ascii_lowercase();
        if let Some(index) = self.exact.get(&authority) {
            return Some(*index);
        }
        // A wildcard stands for at least one letter.
        let longer = |text: &str| authority.len() > text.len();
        let suffix = self
            .suffixes
            .iter()
            .find(|(suffix, _)| longer(suffix) && authority.ends_with(suffix));
        let prefix = || {
            self.prefixes
                .iter()
                .find(|(prefix, _)| longer(prefix) && authority.starts_with(prefix))
        };
        suffix.or_else(prefix).map(|(_, index)| *index).or(self.any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::resource::route::VirtualHost;

    #[test]
    fn domains_are_matched_in_envoys_order() {
        let host = |domain: &str| VirtualHost {
            domains: vec![domain.to_owned()],
            ..VirtualHost::default()
        };
        let config = RouteConfiguration {
            virtual_hosts: [
                "*",
                "foo.*",
                "*.bar.com",
                "*.foo.bar.com",
                "a.foo.bar.com",
                "*-bar.com",
            ]
            .map(host)
            .into(),
            ..RouteConfiguration::default()
        };
        let domains = Domains::new(&config);
        for (authority, index) in [
            ("A.foo.bar.com", 4),
            ("b.foo.bar.com", 3),
            ("x.bar.com", 2),
            ("foo.org", 1),
            ("foo.bar.com", 2),
            ("x-bar.com", 5),
            ("other", 0),
            (".bar.com", 0),
        ] {
            assert_eq!(domains.find(authority), Some(index), "{authority}");
        }
        assert_eq!(Domains::default().find("a"), None);
    }
}
