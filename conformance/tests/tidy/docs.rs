//! Do the documents hold what they promise? Links lead somewhere, and every module, flag, metric, filter field and limit
//! stands where a reader will look for it. It does not judge whether what is said there is true.

use crate::{
    report, root,
    sources::{self, is_cfg_test},
    tree::{files_below, shown},
};
use clap::CommandFactory;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};
use syn::{Fields, Item, Visibility};

/// Lines of a decision record: a page.
const ADR_LINES_MAX: usize = 60;

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// All Markdown of ours.
fn pages() -> Vec<PathBuf> {
    let files = files_below(&root());
    files
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect()
}

/// Targets of Markdown links in a line, those in code left out.
fn links(line: &str) -> Vec<String> {
    let prose: String = line.split('`').step_by(2).collect();
    let targets = prose
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')'));
    targets.map(|(target, _)| target.to_owned()).collect()
}

#[test]
fn links_lead_somewhere() {
    let mut violations = Vec::new();
    for page in pages() {
        let text = fs::read_to_string(&page).expect("a page is UTF-8");
        for (index, line) in text.lines().enumerate() {
            let broken = links(line)
                .into_iter()
                .filter(|target| !leads_somewhere(&page, target));
            violations.extend(
                broken.map(|target| {
                    format!("{}:{}: {target} does not exist", shown(&page), index + 1)
                }),
            );
        }
    }
    report(violations);
}

fn leads_somewhere(page: &Path, target: &str) -> bool {
    if target.contains("://") || target.starts_with("mailto:") {
        return true;
    }
    let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
    let directory = page.parent().expect("a page lies in a directory");
    let path = if path.is_empty() {
        page.to_owned()
    } else {
        directory.join(path)
    };
    if anchor.is_empty() {
        return path.exists();
    }
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut headings = text.lines().filter_map(|line| line.strip_prefix('#'));
    headings.any(|heading| slug(heading.trim_start_matches('#').trim()) == anchor)
}

/// The anchor that Markdown renderers give a heading.
fn slug(heading: &str) -> String {
    let kept = heading
        .chars()
        .filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter));
    kept.map(|letter| {
        if letter == ' ' {
            '-'
        } else {
            letter.to_ascii_lowercase()
        }
    })
    .collect()
}

#[test]
fn the_book_has_every_page_and_every_page_is_in_the_book() {
    let summary = read("docs/src/SUMMARY.md");
    let listed: BTreeSet<PathBuf> = summary
        .lines()
        .flat_map(links)
        .map(|link| root().join("docs/src").join(link))
        .collect();
    assert!(listed.len() > 5, "SUMMARY.md lists next to nothing");
    let missing = listed
        .iter()
        .filter(|page| !page.is_file())
        .map(|page| format!("{}: listed, and does not exist", shown(page)));
    let below = files_below(&root().join("docs/src"));
    let forgotten = below
        .iter()
        .filter(|page| {
            page.extension().is_some_and(|extension| extension == "md")
                && !page.ends_with("SUMMARY.md")
        })
        .filter(|page| !listed.contains(*page))
        .map(|page| format!("{}: not in docs/src/SUMMARY.md", shown(page)));
    report(missing.chain(forgotten).collect());
}

#[test]
fn the_readme_begins_with_the_two_commands() {
    let readme = read("README.md");
    let block = readme
        .split("```")
        .nth(1)
        .expect("the README has a code block");
    let commands: Vec<&str> = block
        .lines()
        .skip(1)
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .collect();
    assert_eq!(
        commands[..2],
        [
            "cargo run --release --bin outrigger-demo",
            "cargo test --workspace"
        ],
        "the first code block"
    );
}

#[test]
fn decisions_have_a_page_a_number_and_three_parts() {
    let mut violations = Vec::new();
    let directory = root().join("docs/src/adr");
    let mut numbers = BTreeSet::new();
    let index = read("docs/src/adr/index.md");
    for page in files_below(&directory)
        .into_iter()
        .filter(|page| !page.ends_with("index.md"))
    {
        let text = fs::read_to_string(&page).expect("a page is UTF-8");
        let name = page
            .file_name()
            .expect("a file")
            .to_string_lossy()
            .into_owned();
        let mut add = |line: usize, problem: String| {
            violations.push(format!("{}:{line}: {problem}", shown(&page)))
        };
        let lines = text.lines().count();
        if lines > ADR_LINES_MAX {
            add(1, format!("{lines} lines, at most {ADR_LINES_MAX}"));
        }
        let number = name.split('-').next().unwrap_or_default();
        if number.len() != 4 || number.parse::<u16>().is_err() || !numbers.insert(number.to_owned())
        {
            add(
                1,
                "is not named NNNN-title.md with a number of its own".into(),
            );
        }
        for part in ["Context", "Decision", "Consequences"] {
            if !text.lines().any(|line| line == format!("## {part}")) {
                add(1, format!("has no '## {part}'"));
            }
        }
        if !index.contains(&name) {
            add(1, "is not in the index".into());
        }
    }
    assert!(numbers.len() >= 10, "the decisions were not found");
    let elsewhere = files_below(&root().join("docs/adr"));
    violations.extend(
        elsewhere
            .iter()
            .map(|page| format!("{}: decisions stand in docs/src/adr", shown(page))),
    );
    report(violations);
}

/// What is in backticks on a page, so that `drain` the word is not taken for `drain` the module.
fn named(page: &str) -> BTreeSet<String> {
    let text = read(page);
    let spans = text.split('`').skip(1).step_by(2);
    spans
        .flat_map(|span| span.split([' ', ',', '/', '{', '}']))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_code_map_has_every_module() {
    let named = named("ARCHITECTURE.md");
    let mut violations = Vec::new();
    for source in sources::written().filter(|source| !source.is_test) {
        let Some(path) = source.below_src().filter(|path| !path.starts_with("bin/")) else {
            continue;
        };
        let stem = Path::new(path)
            .file_stem()
            .expect("a file")
            .to_string_lossy();
        if !matches!(&*stem, "lib" | "main") && !named.contains(&*stem) {
            violations.push(source.at(1, "is not in the code map of ARCHITECTURE.md"));
        }
    }
    report(violations);
}

#[test]
fn every_flag_is_documented() {
    let text = read("docs/src/flags.md");
    let commands = [
        outrigger_proxy::options::Options::command(),
        outrigger_gpu_agent::run::Args::command(),
    ];
    let control_plane = outrigger_control_plane::Cli::command();
    let all = commands.iter().chain(control_plane.get_subcommands());
    let flags = all.flat_map(|command| {
        command
            .get_arguments()
            .filter_map(|argument| argument.get_long())
    });
    let missing = flags
        .map(|flag| format!("`--{flag}"))
        .filter(|flag| !text.contains(flag.as_str()));
    report(
        missing
            .map(|flag| format!("docs/src/flags.md: says nothing of {flag}`"))
            .collect(),
    );
}

#[test]
fn every_metric_is_documented() {
    let named = named("docs/src/metrics.md");
    let rows = outrigger_proxy::metrics::table::ROWS;
    assert!(rows.len() > 50);
    let names = rows.iter().map(|row| row.name);
    let figures = outrigger_control_plane::figures::ROWS.iter();
    let missing = names
        .chain(figures.map(|row| row.name))
        .filter(|name| !named.contains(*name));
    report(
        missing
            .map(|name| format!("docs/src/metrics.md: says nothing of {name}"))
            .collect(),
    );
}

#[test]
fn every_field_of_a_filter_is_documented() {
    let named = named("docs/src/filters.md");
    let mut violations = Vec::new();
    let mut seen = 0;
    for source in sources::written().filter(|source| source.name.starts_with("filters/src/")) {
        for item in source.parse().items {
            let Item::Struct(item) = item else { continue };
            let read = item.attrs.iter().any(|attribute| {
                attribute
                    .meta
                    .require_list()
                    .is_ok_and(|list| list.tokens.to_string().contains("deny_unknown_fields"))
            });
            let Fields::Named(fields) = &item.fields else {
                continue;
            };
            for field in fields
                .named
                .iter()
                .filter(|field| read && matches!(field.vis, Visibility::Public(_)))
            {
                seen += 1;
                let ident = field.ident.as_ref().expect("a named field");
                if !named.contains(&ident.to_string()) {
                    violations.push(source.at(
                        ident.span().start().line,
                        format_args!("{ident} is not in docs/src/filters.md"),
                    ));
                }
            }
        }
    }
    assert!(seen > 10, "the configurations of filters were not found");
    report(violations);
}

/// By its name. Other `_BYTES` are sizes of what is written, not limits.
fn is_limit(name: &str) -> bool {
    ["_MAX", "_TIMEOUT", "_WINDOW_BYTES", "_BUFFER_BYTES"]
        .iter()
        .any(|end| name.ends_with(end))
}

#[test]
fn every_limit_is_documented() {
    let named = named("docs/src/limits.md");
    let mut violations = Vec::new();
    for source in
        sources::written().filter(|source| source.below_src().is_some() && !source.is_test)
    {
        if source.member() == "conformance" {
            continue;
        }
        let mut waiting = source.parse().items;
        while let Some(item) = waiting.pop() {
            match item {
                Item::Const(item) if is_limit(&item.ident.to_string()) => {
                    let name = item.ident.to_string();
                    if !named.contains(&name) {
                        violations.push(source.at(
                            item.ident.span().start().line,
                            format_args!("{name} is not in docs/src/limits.md"),
                        ));
                    }
                }
                Item::Mod(module) if !is_cfg_test(&module.attrs) => {
                    waiting.extend(module.content.into_iter().flat_map(|(_, items)| items))
                }
                _ => {}
            }
        }
    }
    report(violations);
}
