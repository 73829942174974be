//! The model's files mean the same to others as to the engine: a Hugging Face tokenizer and a Jinja renderer agree.

use outrigger_conformance::sim::{
    CHAT_TEMPLATE, Config, Ending, Message, SimEngine, TOKENIZER_JSON, Tokenizer, render,
    write_model_dir,
};
use serde_json::json;

use super::client::ask;

const TEXTS: &[&str] = &[
    "Name three colours.",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "  two  spaces \n\n\ttabs\r\nend ",
    "12345 678 9,000.50 a1b2c3",
    "don't {\"model\": \"sim\"} -- (x) ...",
    "Grüße, 世界! 🎨🤖 naïve \u{a0}nbsp \u{200d}",
    "word word wordword WORD Word",
    "<|im_start|><|im_end|><|endoftext|><|im_ <|",
    "",
];

#[test]
fn ids_are_those_of_a_hugging_face_tokenizer() {
    let file = serde_json::from_str(TOKENIZER_JSON).expect("json");
    let theirs = fastokens::Tokenizer::from_json(file).expect("the file loads");
    let ours = Tokenizer::embedded();
    let training = include_str!("../../assets/training_text.txt");
    for text in TEXTS
        .iter()
        .copied()
        .chain([training])
        .chain(training.lines())
    {
        assert_eq!(
            ours.encode(text),
            theirs.encode(text).expect("encode"),
            "{text:?}"
        );
        assert_eq!(ours.decode(&ours.encode(text)), text);
    }
    assert!(
        ours.encode(training).len() * 3 < training.len(),
        "the merges are not used"
    );
}

#[test]
fn prompts_are_those_of_the_jinja_template() {
    let environment = minijinja::Environment::new();
    let message = |role: &str, content: &str| Message {
        role: role.to_owned(),
        content: content.to_owned(),
    };
    let conversations = [
        vec![message("user", "Hi")],
        vec![
            message("system", "Be brief."),
            message("user", "Hi"),
            message("assistant", "Yo\n"),
            message("user", "{{ x }}"),
        ],
        vec![message("assistant", "")],
    ];
    for messages in conversations {
        for (ending, add_generation_prompt) in
            [(Ending::GenerationPrompt, true), (Ending::Closed, false)]
        {
            let list: Vec<_> = messages
                .iter()
                .map(|m| json!({"role": m.role, "content": m.content}))
                .collect();
            let context = json!({"messages": list, "add_generation_prompt": add_generation_prompt});
            let theirs = environment
                .render_str(CHAT_TEMPLATE, context)
                .expect("render");
            assert_eq!(render(&messages, ending), theirs);
        }
    }
    let open = render(
        &[message("user", "Hi"), message("assistant", "The sky")],
        Ending::ContinueFinal,
    );
    assert!(open.ends_with("<|im_start|>assistant\nThe sky"), "{open}");
}

#[test]
fn a_model_path_names_a_directory_with_the_files() {
    let dir = std::env::temp_dir().join(format!("outrigger-sim-model-{}", std::process::id()));
    let engine = SimEngine::start(Config {
        model_path: Some(dir.clone()),
        ..Config::default()
    })
    .expect("start");
    let root = ask(engine.http_addr, "GET", "/v1/models", b"").json()["data"][0]["root"].clone();
    assert_eq!(root, dir.display().to_string());
    assert_eq!(
        std::fs::read_to_string(dir.join("tokenizer.json")).expect("written"),
        TOKENIZER_JSON
    );
    std::fs::write(dir.join("chat_template.jinja"), "mine").expect("write");
    write_model_dir(&dir).expect("again");
    assert_eq!(
        std::fs::read_to_string(dir.join("chat_template.jinja")).expect("kept"),
        "mine"
    );
    std::fs::remove_dir_all(dir).expect("clean up");
}
