//! Which modules may be named where, what modules are called, and what they must begin with.

use crate::{
    report,
    sources::{self, Source, is_cfg_test, tokens},
};
use proc_macro2::TokenTree;
use syn::{Item, UseTree, visit::Visit};

/// Modules of ours that some of our crates must not name: crate, module, who must not.
const NEVER: &[(&str, &str, &[&str])] = &[
    ("outrigger_xds", "wire", &["proxy", "filters", "gpu-agent"]),
    ("outrigger_gpu_agent", "blocks", &["proxy"]),
    ("outrigger_gpu_agent", "transport", &["proxy"]),
];
/// Names that say nothing.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "helper", "helpers", "misc"];
/// Levels of modules below `src`.
const DEPTH_MAX: usize = 2;
/// Files that may hold `unsafe`, each named in the architecture.
const UNSAFE_FILES: &[&str] = &[];

#[test]
fn modules_are_named_only_by_those_who_may_know_them() {
    let mut violations = Vec::new();
    for source in sources::written() {
        let never: Vec<_> = NEVER
            .iter()
            .filter(|(_, _, whom)| whom.contains(&source.member()))
            .collect();
        if never.is_empty() {
            continue;
        }
        for (line, path) in paths(&source.text) {
            for (owner, module, _) in &never {
                let names_it = path.len() > 1 && path[0] == *owner && path[1] == *module;
                // Another name for the crate, or everything in it, would hide what is used.
                let hides_it = path[0] == *owner
                    && path
                        .get(1)
                        .is_some_and(|next| next == "*" || next.starts_with("as "));
                if names_it || hides_it {
                    violations.push(source.at(line, format_args!("names {}", path.join("::"))));
                }
            }
        }
    }
    report(violations);
}

#[test]
fn the_simulator_shares_nothing_with_the_product() {
    let mut violations = Vec::new();
    for source in sources::written().filter(|source| source.name.starts_with("conformance/src/sim"))
    {
        let ours = paths(&source.text)
            .into_iter()
            .filter(|(_, path)| path[0].starts_with("outrigger_"));
        violations.extend(
            ours.map(|(line, path)| source.at(line, format_args!("names {}", path.join("::")))),
        );
    }
    report(violations);
}

#[test]
fn paths_are_found_wherever_they_stand() {
    let text = "use outrigger_xds::{load, wire as w};\nfn f() { outrigger_xds::wire::g(); m!(a, outrigger_xds::wire::h) }\nuse outrigger_xds as x;";
    let found: Vec<_> = paths(text)
        .into_iter()
        .map(|(line, path)| (line, path.join("::")))
        .collect();
    for wanted in [
        (1, "outrigger_xds::wire::as w"),
        (2, "outrigger_xds::wire::g"),
        (2, "outrigger_xds::wire::h"),
        (3, "outrigger_xds::as x"),
    ] {
        assert!(
            found.contains(&(wanted.0, wanted.1.to_owned())),
            "{wanted:?} in {found:?}"
        );
    }
}

/// Every path of a file: those of `use` with their groups spread out, and all others as they stand, macros included.
fn paths(text: &str) -> Vec<(usize, Vec<String>)> {
    let mut uses = Uses::default();
    uses.visit_file(&syn::parse_file(text).expect("a source can be parsed"));
    let mut found = uses.0;
    let tokens = tokens(text.parse().expect("a source can be cut into tokens"));
    for start in 0..tokens.len() {
        let mut path = Vec::new();
        let mut at = start;
        while let Some((_, TokenTree::Ident(ident))) = tokens.get(at) {
            path.push(ident.to_string());
            let colons = |at: usize| matches!(tokens.get(at), Some((_, TokenTree::Punct(punct))) if punct.as_char() == ':');
            if !(colons(at + 1) && colons(at + 2)) {
                break;
            }
            at += 3;
        }
        if path.len() > 1 {
            found.push((tokens[start].0, path));
        }
    }
    found
}

/// Collects what `use` items name.
#[derive(Default)]
struct Uses(Vec<(usize, Vec<String>)>);

impl<'ast> Visit<'ast> for Uses {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        let line = item.use_token.span.start().line;
        let mut waiting = vec![(Vec::new(), &item.tree)];
        while let Some((before, tree)) = waiting.pop() {
            let with = |last: String| [before.clone(), vec![last]].concat();
            match tree {
                UseTree::Path(path) => waiting.push((with(path.ident.to_string()), &path.tree)),
                UseTree::Name(name) => self.0.push((line, with(name.ident.to_string()))),
                UseTree::Rename(rename) => {
                    let mut path = with(rename.ident.to_string());
                    path.push(format!("as {}", rename.rename));
                    self.0.push((line, path));
                }
                UseTree::Glob(_) => self.0.push((line, with("*".into()))),
                UseTree::Group(group) => {
                    waiting.extend(group.items.iter().map(|tree| (before.clone(), tree)))
                }
            }
        }
    }
}

#[test]
fn nothing_takes_in_a_whole_crate() {
    let mut violations = Vec::new();
    for source in sources::written() {
        let mut uses = Uses::default();
        uses.visit_file(&source.parse());
        for (line, path) in uses.0 {
            let whole = matches!(path.as_slice(), [first, star] if star == "*" && (first == "crate" || first.starts_with("outrigger_")));
            if whole {
                violations.push(source.at(line, format_args!("use {}", path.join("::"))));
            }
        }
    }
    report(violations);
}

#[test]
fn modules_are_flat_and_named_after_what_they_do() {
    let mut violations = Vec::new();
    for source in sources::all() {
        let path = source.below_src().unwrap_or_else(|| {
            source
                .name
                .split_once("/tests/")
                .map_or("", |(_, rest)| rest)
        });
        let parts: Vec<&str> = path.trim_end_matches(".rs").split('/').collect();
        if parts.iter().any(|part| EMPTY_NAMES.contains(part)) {
            violations.push(source.at(1, "a module is named after what it does"));
        }
        if source.below_src().is_none() {
            continue;
        }
        let is_root = matches!(parts.last(), Some(&"lib" | &"main" | &"mod"));
        let depth = parts.len() - usize::from(is_root);
        if depth > DEPTH_MAX {
            violations.push(source.at(
                1,
                format_args!("{depth} levels below src, at most {DEPTH_MAX}"),
            ));
        }
        if !source.is_generated && !source.is_test {
            inline_modules(source, &source.parse().items, depth, &mut violations);
        }
    }
    report(violations);
}

fn inline_modules(source: &Source, items: &[Item], depth: usize, violations: &mut Vec<String>) {
    for item in items {
        let Item::Mod(module) = item else { continue };
        let line = module.ident.span().start().line;
        if EMPTY_NAMES.contains(&module.ident.to_string().as_str()) {
            violations.push(source.at(line, "a module is named after what it does"));
        }
        let Some((_, items)) = &module.content else {
            continue;
        };
        if is_cfg_test(&module.attrs) {
            continue;
        }
        if depth + 1 > DEPTH_MAX {
            violations.push(source.at(
                line,
                format_args!("{} levels below src, at most {DEPTH_MAX}", depth + 1),
            ));
        }
        inline_modules(source, items, depth + 1, violations);
    }
}

#[test]
fn every_file_says_what_it_answers() {
    let silent = sources::written().filter(|source| !source.text.starts_with("//!"));
    report(
        silent
            .map(|source| source.at(1, "does not begin with //!"))
            .collect(),
    );
}

#[test]
fn unsafe_stands_only_where_the_architecture_names_it() {
    let mut violations = Vec::new();
    for source in sources::all()
        .iter()
        .filter(|source| !UNSAFE_FILES.contains(&source.name.as_str()))
    {
        let stream = source
            .text
            .parse()
            .unwrap_or_else(|error| panic!("{}: {error}", source.name));
        for (line, token) in tokens(stream) {
            if matches!(&token, TokenTree::Ident(ident) if ident == "unsafe") {
                violations.push(source.at(line, "unsafe"));
            }
        }
    }
    report(violations);
}

#[test]
fn a_silenced_lint_says_why() {
    let mut violations = Vec::new();
    for source in sources::written() {
        violations.extend(
            silenced(&source.text)
                .into_iter()
                .map(|(line, problem)| source.at(line, problem)),
        );
    }
    report(violations);
}

#[test]
fn silenced_lints_are_found() {
    let text = "#![allow(dead_code)]\n#[expect(clippy::all)]\nfn f() { x.expect(\"y\"); }\n#[cfg_attr(test, expect(unused_mut, reason = \"r\"))]\nfn g() {}";
    let lines: Vec<usize> = silenced(text).into_iter().map(|(line, _)| line).collect();
    assert_eq!(lines, [1, 2]);
}

/// Lints that are silenced in a way we do not want, by line.
fn silenced(text: &str) -> Vec<(usize, &'static str)> {
    let mut found = Vec::new();
    for pair in tokens(text.parse().expect("a source can be cut into tokens")).windows(2) {
        let [(line, TokenTree::Ident(word)), (_, TokenTree::Group(group))] = pair else {
            continue;
        };
        if !(word == "allow" || word == "expect") || !is_lint_list(group) {
            continue;
        }
        if word == "allow" {
            found.push((
                *line,
                "allow(…): expect(…, reason = \"…\") tells when it is not needed any more",
            ));
        } else if !group.stream().to_string().contains("reason =") {
            found.push((*line, "a lint is silenced without a reason"));
        }
    }
    found
}

/// Tells `expect(clippy::large_futures, …)` from a call of `.expect("…")`.
fn is_lint_list(group: &proc_macro2::Group) -> bool {
    const LINTS: &[&str] = &[
        "clippy",
        "rustdoc",
        "rustc",
        "missing_docs",
        "unused",
        "dead_code",
        "unsafe_code",
        "deprecated",
    ];
    let first = group.stream().into_iter().next();
    matches!(first, Some(TokenTree::Ident(ident)) if {
        let name = ident.to_string();
        LINTS.contains(&name.as_str()) || name.starts_with("unused_") || name.starts_with("unreachable_")
    })
}
