//! How long functions and files are, and how much generics weigh.

use crate::{
    Exception, report,
    sources::{self, Source, is_cfg_test},
    without,
};
use proc_macro2::Span;
use syn::{GenericParam, Generics, Item, spanned::Spanned, visit::Visit};

/// Lines of a function, from its signature to its closing brace.
const FUNCTION_LINES_MAX: usize = 70;
/// Lines of a file before its tests.
const FILE_LINES_MAX: usize = 600;
/// Predicates of one `where`.
const WHERE_PREDICATES_MAX: usize = 5;
/// Type parameters of one item.
const TYPE_PARAMETERS_MAX: usize = 4;

/// Longer functions that a reviewer let stand.
const LONG_FUNCTIONS: &[Exception] = &[];
/// Longer files that a reviewer let stand.
const LONG_FILES: &[Exception] = &[];

/// One function of ours, tests left out.
struct Function {
    name: String,
    line: usize,
    lines: usize,
}

/// Walks over what is no test.
#[derive(Default)]
struct Measure {
    functions: Vec<Function>,
    heavy: Vec<(usize, String)>,
}

impl Measure {
    fn function(&mut self, signature: &syn::Signature, end: Span) {
        let line = signature.span().start().line;
        let lines = end.end().line + 1 - line;
        self.functions.push(Function {
            name: signature.ident.to_string(),
            line,
            lines,
        });
    }
}

impl<'ast> Visit<'ast> for Measure {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_cfg_test(&module.attrs) {
            syn::visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.function(&function.sig, function.block.span());
        syn::visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.function(&function.sig, function.block.span());
        syn::visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        if let Some(block) = &function.default {
            self.function(&function.sig, block.span());
        }
        syn::visit::visit_trait_item_fn(self, function);
    }

    fn visit_generics(&mut self, generics: &'ast Generics) {
        let line = generics.span().start().line;
        let predicates = generics
            .where_clause
            .as_ref()
            .map_or(0, |clause| clause.predicates.len());
        let types = generics
            .params
            .iter()
            .filter(|param| matches!(param, GenericParam::Type(_)))
            .count();
        if predicates > WHERE_PREDICATES_MAX {
            self.heavy.push((
                line,
                format!("{predicates} predicates in a where, at most {WHERE_PREDICATES_MAX}"),
            ));
        }
        if types > TYPE_PARAMETERS_MAX {
            self.heavy.push((
                line,
                format!("{types} type parameters, at most {TYPE_PARAMETERS_MAX}"),
            ));
        }
        syn::visit::visit_generics(self, generics);
    }
}

fn measured(source: &Source) -> Measure {
    let mut measure = Measure::default();
    measure.visit_file(&source.parse());
    measure
}

/// Everything that is built into a binary or runs a stage.
fn shipped() -> impl Iterator<Item = &'static Source> {
    sources::written().filter(|source| source.below_src().is_some() && !source.is_test)
}

#[test]
fn functions_are_short() {
    let mut found = Vec::new();
    let mut lengths = Vec::new();
    for source in sources::written() {
        for function in measured(source).functions {
            if source.below_src().is_some() && !source.is_test {
                lengths.push(function.lines);
            }
            if function.lines > FUNCTION_LINES_MAX {
                let text = format!(
                    "{} has {} lines, at most {FUNCTION_LINES_MAX}",
                    function.name, function.lines
                );
                found.push((
                    format!("{}::{}", source.name, function.name),
                    source.at(function.line, text),
                ));
            }
        }
    }
    lengths.sort_unstable();
    let mean = lengths.iter().sum::<usize>() as f64 / lengths.len().max(1) as f64;
    let p90 = lengths[lengths.len() * 9 / 10];
    println!(
        "{} functions: mean {mean:.1} lines (goal 13), 90th percentile {p90} (goal 27)",
        lengths.len()
    );
    report(without(LONG_FUNCTIONS, found));
}

#[test]
fn files_are_short_before_their_tests() {
    let mut found = Vec::new();
    for source in shipped() {
        let lines = lines_before_tests(source);
        if lines > FILE_LINES_MAX {
            let text = format!("{lines} lines before its tests, at most {FILE_LINES_MAX}");
            found.push((source.name.clone(), source.at(1, text)));
        }
    }
    report(without(LONG_FILES, found));
}

/// Up to the first module of tests that stands in the file itself.
fn lines_before_tests(source: &Source) -> usize {
    let tests = source
        .parse()
        .items
        .into_iter()
        .find_map(|item| match item {
            Item::Mod(module) if module.content.is_some() && is_cfg_test(&module.attrs) => module
                .attrs
                .first()
                .map(|attribute| attribute.span().start().line - 1),
            _ => None,
        });
    tests.unwrap_or_else(|| source.text.lines().count())
}

#[test]
fn generics_are_light() {
    let mut violations = Vec::new();
    for source in sources::written() {
        violations.extend(
            measured(source)
                .heavy
                .into_iter()
                .map(|(line, text)| source.at(line, text)),
        );
    }
    report(violations);
}
