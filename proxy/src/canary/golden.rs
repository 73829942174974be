//! The golden answer: what an engine says to a fixed prompt, and whether its cohort says the same. No IO.

use outrigger_xds::report::{EngineState, GoldenAnswer, Health};
use serde_json::Value;

/// Longest text of an answer in a message for people.
const SHOWN_CHARS: usize = 60;

/// Who is to answer alike, as far as is known.
pub(super) fn cohort(state: &EngineState) -> String {
    let model = state.models.first().map_or("", |model| model.id.as_str());
    let (kind, version, numerics) = (state.kind.as_str(), &state.version, &state.numerics);
    format!("{kind} {version} {model} {numerics}")
}

/// Reads the answer of `/v1/completions`; `None` if it has no tokens with probabilities.
pub(super) fn read(body: &Value, cohort: String, margin: f64) -> Option<GoldenAnswer> {
    let logprobs = &body["choices"][0]["logprobs"];
    let tokens: Vec<String> = logprobs["tokens"]
        .as_array()?
        .iter()
        .map(|token| token.as_str().map(str::to_owned))
        .collect::<Option<_>>()?;
    let is_clear =
        |at: &usize| clearance(logprobs, *at, &tokens[*at]).is_some_and(|by| by >= margin);
    let clear = (0..tokens.len()).take_while(is_clear).count();
    (!tokens.is_empty()).then_some(GoldenAnswer {
        cohort,
        tokens,
        clear,
    })
}

/// How much more likely, as a difference of logarithms, the token is than the next best.
fn clearance(logprobs: &Value, at: usize, token: &str) -> Option<f64> {
    let own = logprobs["token_logprobs"][at].as_f64()?;
    let others = logprobs["top_logprobs"][at].as_object()?;
    let others = others.iter().filter(|(other, _)| *other != token);
    let best = others.filter_map(|(_, logprob)| logprob.as_f64());
    best.reduce(f64::max).map(|best| own - best)
}

/// What an answer is worth beside the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Opinion {
    /// Most say the same, or it is the expected one.
    Right,
    /// Most say something else.
    Wrong(String),
    /// Others say something else, but most agree on nothing.
    Unclear(String),
    /// Nobody to compare with.
    Alone,
}

/// Compares with what the answer must begin with.
pub(super) fn check(own: &GoldenAnswer, expected: &str) -> Opinion {
    let text = own.tokens.concat();
    let is_part = !text.is_empty() && expected.starts_with(&text);
    if is_part || text.starts_with(expected) {
        return Opinion::Right;
    }
    Opinion::Wrong(differs(&text, expected))
}

/// Compares with the answers of the others in the cohort.
pub(super) fn compare(own: &GoldenAnswer, others: &[&GoldenAnswer]) -> Opinion {
    let voters = others.len() + 1;
    let says = |answer: &GoldenAnswer, what: &GoldenAnswer| {
        answer.tokens.starts_with(&what.tokens[..what.clear])
    };
    let agreed = |what: &[String]| {
        let everybody = others.iter().copied().chain([own]);
        let agreeing = everybody.filter(|answer| answer.tokens.starts_with(what));
        agreeing.count() * 2 > voters
    };
    let beginnings = others
        .iter()
        .flat_map(|what| (1..=what.clear).map(|length| &what.tokens[..length]));
    let majority = beginnings
        .filter(|what| agreed(what))
        .max_by_key(|what| what.len());
    let mut others = others.iter();
    let different = others.find(|other| other.clear > 0 && !says(own, other));
    match (majority, different) {
        (Some(majority), _) if !own.tokens.starts_with(majority) => {
            Opinion::Wrong(differs(&own.tokens.concat(), &majority.concat()))
        }
        (Some(majority), _) if majority.len() >= own.clear => Opinion::Right,
        // Most agree on a beginning, and on nothing of what it is sure of after that.
        (_, Some(other)) => Opinion::Unclear(differs(&own.tokens.concat(), &clear_text(other))),
        (Some(_), None) => Opinion::Right,
        (None, None) => Opinion::Alone,
    }
}

fn clear_text(answer: &GoldenAnswer) -> String {
    answer.tokens[..answer.clear].concat()
}

fn differs(own: &str, other: &str) -> String {
    let short = |text: &str| text.chars().take(SHOWN_CHARS).collect::<String>();
    format!("{:?}, not {:?}", short(own), short(other))
}

/// The answers that count: of engines that are well, in the same cohort.
pub(super) fn voters<'a>(
    cohort: &str,
    others: impl Iterator<Item = &'a EngineState>,
) -> Vec<&'a GoldenAnswer> {
    others
        .filter(|state| state.health == Health::Healthy)
        .filter_map(|state| state.golden.as_ref())
        .filter(|answer| answer.cohort == cohort)
        .collect()
}

/// Whether another engine that is well serves what this one does, in the same part.
pub(super) fn has_stand_in(state: &EngineState, others: &[&EngineState]) -> bool {
    let model = state.models.first().map(|model| &model.id);
    others.iter().any(|other| {
        let mut models = other.models.iter();
        other.health == Health::Healthy
            && other.role == state.role
            && models.any(|known| model.is_none_or(|model| known.id == *model))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_xds::report::Role;
    use serde_json::json;

    #[test]
    fn who_computes_otherwise_is_of_another_cohort() {
        let of = |version: &str, numerics: &str| {
            cohort(&EngineState {
                version: version.into(),
                numerics: numerics.into(),
                ..EngineState::default()
            })
        };
        let ours = of("1", "dtype=bfloat16 tp_size=1");
        assert_eq!(ours, of("1", "dtype=bfloat16 tp_size=1"));
        for other in [
            of("2", "dtype=bfloat16 tp_size=1"),
            of("1", "dtype=bfloat16 tp_size=2"),
            of("1", "dtype=bfloat16 tp_size=1 cohort=a"),
        ] {
            assert_ne!(ours, other);
        }
    }

    fn answer(text: &str, clear: usize) -> GoldenAnswer {
        GoldenAnswer {
            cohort: "c".into(),
            tokens: text.chars().map(String::from).collect(),
            clear,
        }
    }

    #[test]
    fn tokens_are_clear_up_to_the_first_that_another_came_near() {
        let body = json!({"choices": [{"logprobs": {
            "tokens": ["a", "b", "c", "d"],
            "token_logprobs": [-0.1, -0.2, -0.5, -0.1],
            "top_logprobs": [{"a": -0.1, "x": -3.0}, {"b": -0.2, "y": -1.2}, {"c": -0.5, "z": -1.4}, {"d": -0.1, "z": -9.0}],
        }}]});
        let read = read(&body, "c".into(), 1.0).unwrap();
        assert_eq!((read.tokens.concat().as_str(), read.clear), ("abcd", 2));
        assert_eq!(super::read(&json!({"choices": []}), "c".into(), 1.0), None);
    }

    #[test]
    fn most_decide_and_where_there_are_none_nobody_does() {
        let (good, bad) = (answer("abc", 3), answer("abx", 3));
        assert_eq!(compare(&good, &[&good, &good]), Opinion::Right);
        assert!(matches!(compare(&bad, &[&good, &good]), Opinion::Wrong(_)));
        assert_eq!(compare(&good, &[&good, &bad]), Opinion::Right);
        assert!(matches!(compare(&bad, &[&good]), Opinion::Unclear(_)));
        assert_eq!(compare(&good, &[]), Opinion::Alone);
        let other = answer("zzz", 3);
        let three = compare(&bad, &[&good, &other]);
        assert!(matches!(three, Opinion::Unclear(_)), "{three:?}");
    }

    #[test]
    fn what_is_not_clear_cannot_be_wrong_but_what_others_find_clear_can_be() {
        let (clear, unsure) = (answer("abc", 3), answer("abx", 2));
        assert_eq!(compare(&unsure, &[&unsure, &unsure]), Opinion::Right);
        assert!(matches!(
            compare(&unsure, &[&clear, &clear]),
            Opinion::Wrong(_)
        ));
        let none = answer("q", 0);
        assert_eq!(compare(&none, &[&none, &none]), Opinion::Alone);
    }

    #[test]
    fn the_longest_beginning_that_most_agree_on_decides() {
        let (short, long) = (answer("ab??", 2), answer("abcd", 4));
        let bad = answer("abxx", 4);
        let others = [&short, &long, &long, &long];
        assert!(matches!(compare(&bad, &others), Opinion::Wrong(_)));
        // They differ at the end, and agree on the beginning.
        let (one, other) = (answer("abcd", 4), answer("abce", 4));
        let found = compare(&bad, &[&one, &other]);
        assert!(matches!(found, Opinion::Wrong(_)), "{found:?}");
        assert_eq!(compare(&one, &[&one, &other]), Opinion::Right);
    }

    #[test]
    fn only_an_engine_of_the_same_part_stands_in() {
        let role = |role| EngineState {
            role,
            health: Health::Healthy,
            models: vec![outrigger_xds::report::Model::default()],
            ..EngineState::default()
        };
        let (prefill, decode) = (role(Role::Prefill), role(Role::Decode));
        assert!(has_stand_in(&prefill, &[&decode, &prefill]));
        assert!(!has_stand_in(&prefill, &[&decode]));
    }

    #[test]
    fn an_answer_that_is_configured_needs_nobody() {
        assert_eq!(check(&answer("abc", 0), "ab"), Opinion::Right);
        assert!(matches!(check(&answer("axc", 3), "ab"), Opinion::Wrong(_)));
    }
}
