//! What is said comes back equal, on the wire and on disk; what cannot be is refused with its place.

use super::*;
use crate::report::{EngineKind, Health, Role};
use rand::{Rng, SeedableRng, rngs::StdRng};

fn registration() -> Registration {
    Registration {
        node: Node {
            id: "a".into(),
            cluster: "outrigger".into(),
            region: "r".into(),
            zone: "z".into(),
            address: address("[::1]:8081").unwrap(),
            labels: BTreeMap::from([("gpu".to_owned(), "h100".to_owned())]),
            version: "0.1.0".into(),
        },
        engines: vec![Engine {
            id: "a/127.0.0.1:8000".into(),
            address: address("127.0.0.1:8000").unwrap(),
            state: EngineState {
                kind: EngineKind::Vllm,
                version: "0.32".into(),
                models: vec![named("m".into()), named("m-lora".into())],
                role: Role::Decode,
                health: Health::Draining,
                reason: "told to".into(),
                block_tokens: 16,
                kv_blocks: 1 << 40,
                ..EngineState::default()
            },
        }],
        leaving: false,
        registrant: Registrant::Agent,
    }
}

#[test]
fn what_is_said_comes_back_equal() {
    let leaving = Registration {
        leaving: true,
        engines: Vec::new(),
        ..registration()
    };
    for plain in [registration(), leaving] {
        let wire = wire::Registration::from(&plain);
        assert_eq!(Registration::try_from(wire), Ok(plain.clone()));
        let length = Duration::from_millis(1500);
        let json = kept_to_json([(&plain, length)]);
        let kept = Kept {
            registration: plain,
            length,
        };
        assert_eq!(kept_from_json(&json), Ok(vec![kept]));
    }
}

#[test]
fn what_cannot_be_is_refused_with_its_place() {
    type Edit = fn(&mut wire::Registration);
    let cases: [(Edit, &str); 14] = [
        (|it| it.registrant = 2, "registrant: 2 is none"),
        (|it| it.node = None, "node: required"),
        (
            |it| it.node.as_mut().unwrap().id.clear(),
            "node.id: required",
        ),
        (
            |it| it.node.as_mut().unwrap().id = "a\nb".into(),
            "node.id: longer than",
        ),
        (
            |it| it.node.as_mut().unwrap().address = "10.0.0.1".into(),
            "node.address: expected HOST:PORT",
        ),
        (
            |it| it.node.as_mut().unwrap().address = "10.0.0.1:0".into(),
            "node.address: expected HOST:PORT",
        ),
        (
            |it| it.node.as_mut().unwrap().zone = "z".repeat(TEXT_BYTES_MAX + 1),
            "node.zone: longer than",
        ),
        (
            |it| {
                let labels = (0..=LABELS_MAX).map(|n| (n.to_string(), String::new()));
                it.node.as_mut().unwrap().labels = labels.collect();
            },
            "node.labels: 65, at most 64",
        ),
        (|it| it.engines[0].id.clear(), "engines[0].id: required"),
        (
            |it| it.engines[0].address = "/run/engine".into(),
            "engines[0].address: expected HOST:PORT",
        ),
        (|it| it.engines[0].role = 0, "engines[0]: "),
        (
            |it| it.engines[0].models = vec!["m".into(); MODELS_MAX + 1],
            "engines[0].models: 257, at most 256",
        ),
        (
            |it| it.engines.push(it.engines[0].clone()),
            "engines[1]: a/127.0.0.1:8000 (127.0.0.1:8000) is there twice",
        ),
        (
            |it| it.engines = vec![it.engines[0].clone(); ENGINES_MAX + 1],
            "engines: 65, at most 64",
        ),
    ];
    for (edit, expected) in cases {
        let mut wire = wire::Registration::from(&registration());
        edit(&mut wire);
        let error = Registration::try_from(wire).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn garbage_is_an_error_and_never_a_panic() {
    use prost::Message;
    let mut random = StdRng::seed_from_u64(7);
    let valid = wire::Registration::from(&registration()).encode_to_vec();
    let mut refused = 0;
    for _ in 0..20_000 {
        let mut bytes = valid.clone();
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..bytes.len());
            bytes[at] = random.random();
        }
        let read = wire::Registration::decode(&*bytes)
            .map_err(|error| ConfigErrors::one("", error.to_string()))
            .and_then(Registration::try_from);
        refused += usize::from(read.is_err());
    }
    assert!(refused > 1000, "{refused}");
}
