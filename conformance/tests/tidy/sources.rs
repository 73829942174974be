//! Each Rust file, read and parsed once for all rules.

use crate::tree::{rust_files, shown};
use proc_macro2::{TokenStream, TokenTree};
use std::{fs, sync::OnceLock};

/// A file of ours.
pub(crate) struct Source {
    /// From the root of the checkout, e.g. `proxy/src/run.rs`.
    pub(crate) name: String,
    /// As it is.
    pub(crate) text: String,
    /// As `syn` understands it; parsed anew by each rule, since a syntax tree belongs to one thread.
    pub(crate) is_generated: bool,
    /// Whether all of it is tests.
    pub(crate) is_test: bool,
}

impl Source {
    /// The syntax tree, with places.
    pub(crate) fn parse(&self) -> syn::File {
        syn::parse_file(&self.text).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// The crate's directory, e.g. `proxy`.
    pub(crate) fn member(&self) -> &str {
        self.name.split('/').next().unwrap_or_default()
    }

    /// The path below `src`, if it is there.
    pub(crate) fn below_src(&self) -> Option<&str> {
        self.name.split_once("/src/").map(|(_, rest)| rest)
    }

    /// A violation in it.
    pub(crate) fn at(&self, line: usize, text: impl std::fmt::Display) -> String {
        format!("{}:{line}: {text}", self.name)
    }
}

/// All of them. The harness of the cost stage is a workspace of its own and is left out.
pub(crate) fn all() -> &'static [Source] {
    static ALL: OnceLock<Vec<Source>> = OnceLock::new();
    ALL.get_or_init(|| {
        let files = rust_files().into_iter().map(|path| (shown(&path), path));
        let ours = files.filter(|(name, _)| !name.starts_with("conformance/cost/"));
        let found: Vec<_> = ours
            .map(|(name, path)| Source {
                text: fs::read_to_string(&path).expect("a source is UTF-8"),
                is_generated: name.starts_with("xds/src/wire/"),
                is_test: name.contains("/tests/")
                    || name.ends_with("/tests.rs")
                    || name.ends_with("_tests.rs"),
                name,
            })
            .collect();
        assert!(found.len() > 50, "the sources were not found");
        found
    })
}

/// Those that people write.
pub(crate) fn written() -> impl Iterator<Item = &'static Source> {
    all().iter().filter(|source| !source.is_generated)
}

/// All tokens of a stream in order, groups opened: each with its line, and the group itself where it is one.
pub(crate) fn tokens(stream: TokenStream) -> Vec<(usize, TokenTree)> {
    let mut found = Vec::new();
    let mut waiting: Vec<TokenTree> = stream.into_iter().collect();
    waiting.reverse();
    while let Some(tree) = waiting.pop() {
        found.push((tree.span().start().line, tree.clone()));
        if let TokenTree::Group(group) = tree {
            let mut inner: Vec<TokenTree> = group.stream().into_iter().collect();
            inner.reverse();
            waiting.extend(inner);
        }
    }
    found
}

/// Whether this attribute leaves its item out of everything but tests.
pub(crate) fn is_cfg_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .meta
                .require_list()
                .is_ok_and(|list| list.tokens.to_string() == "test")
    })
}
