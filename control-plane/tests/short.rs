//! The program itself on short resources: what it prints, what it writes, and its exit code.

use serde_json::Value;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

const SECRET: &str = r#"
"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
name: front
tls_certificate: {certificate_chain: {filename: /c.pem}, private_key: {filename: /k.pem}}
"#;
const CLIENTS: &str = r#"
resources:
- "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
  name: clients
  validation_context: {trusted_ca: {filename: /ca.pem}}
"#;

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples")
}

/// An empty directory.
fn dir(test: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("short")
        .join(test);
    // It may be there from before.
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("temp dir");
    dir
}

/// Exit code, standard output and standard error.
fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let program = env!("CARGO_BIN_EXE_outrigger-control-plane");
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The complete example, with what it refers to.
fn complete(test: &str) -> PathBuf {
    let dir = dir(test);
    fs::copy(examples().join("complete.yaml"), dir.join("fleet.yaml")).expect("copied");
    fs::write(dir.join("secret.yaml"), SECRET).expect("written");
    fs::write(dir.join("clients.yaml"), CLIENTS).expect("written");
    fs::write(dir.join("notes.txt"), "no YAML: {").expect("written");
    dir
}

#[test]
fn directories_are_valid_as_a_whole_or_say_what_is_wrong_where() {
    let dir = complete("valid");
    let (code, printed, _) = run(&["validate", text(&dir)]);
    let place = dir.display();
    assert_eq!(
        printed,
        format!("{place}/clients.yaml: OK\n{place}/fleet.yaml: OK\n{place}/secret.yaml: OK\n")
    );
    assert_eq!(code, Some(0));
    fs::remove_file(dir.join("secret.yaml")).expect("removed");
    fs::write(dir.join("bootstrap.yaml"), "bogus: 1").expect("written");
    let (code, printed, _) = run(&["validate", text(&dir)]);
    assert_eq!(
        printed,
        format!(
            "{place}/bootstrap.yaml: no such field: 'bogus'\n{place}/clients.yaml: OK\n{place}/fleet.yaml: document 5 (Gateway front): spec.listeners[1].tls.secret: there is no secret 'front'\n"
        )
    );
    assert_eq!(code, Some(1));
    fs::write(
        dir.join("secret.yaml"),
        SECRET.replace("tls_certificate", "bogus"),
    )
    .expect("written");
    fs::write(
        dir.join("more.yaml"),
        "apiVersion: outrigger.dev/v1\nkind: Fleet",
    )
    .expect("written");
    let (code, printed, _) = run(&["validate", text(&dir), "/no/such/file"]);
    let lines: Vec<_> = printed.lines().collect();
    assert_eq!(code, Some(1));
    for want in [
        &format!("{place}/more.yaml: document 1: metadata: required"),
        &format!("{place}/more.yaml: document 1: spec: required"),
    ] {
        assert!(lines.contains(&want.as_str()), "{want:?} in {lines:#?}");
    }
    let begins = |start: String| lines.iter().any(|line| line.starts_with(&start));
    assert!(begins(format!("{place}/secret.yaml: ")), "{lines:#?}");
    assert!(
        begins("/no/such/file: cannot be read: ".into()),
        "{lines:#?}"
    );
}

#[test]
fn what_is_wrong_is_not_translated() {
    let dir = dir("wrong");
    let file = dir.join("a.yaml");
    let gateway = "apiVersion: outrigger.dev/v1\nkind: Gateway\nmetadata: {name: g}\nspec: {listeners: [{address: ':80'}], routes: [{fleet: a}]}\n";
    fs::write(&file, gateway).expect("written");
    let (code, printed, errors) = run(&["translate", text(&file)]);
    assert_eq!((code, &*printed), (Some(1), ""));
    let want = "document 1 (Gateway g): spec.routes[0].fleet: there is no Fleet a";
    assert_eq!(errors, format!("{}: {want}\n", file.display()));
    fs::write(&file, "node: {id: a}").expect("written");
    let (code, printed, errors) = run(&["translate", text(&file)]);
    assert_eq!((code, &*printed), (Some(0), ""));
    assert!(
        errors.contains("no short resource, passed over"),
        "{errors}"
    );
    fs::write(&file, "node: {").expect("written");
    let (code, _, errors) = run(&["translate", text(&file)]);
    assert_eq!(code, Some(1));
    assert!(errors.contains("a.yaml: not valid YAML: "), "{errors}");
}

#[test]
fn a_node_gets_what_is_meant_for_it() {
    let file = examples().join("fleet.yaml");
    let names = |arguments: &[&str]| -> Vec<String> {
        let (code, printed, errors) =
            run(&[&["translate", text(&file), "--format", "json"], arguments].concat());
        assert_eq!(code, Some(0), "{errors}");
        let responses: Vec<Value> = serde_json::from_str(&printed).expect("JSON");
        let resources = responses
            .iter()
            .flat_map(|response| response["resources"].as_array().expect("a list"));
        let named = resources.map(|resource| {
            let name = resource.get("name").or(resource.get("cluster_name"));
            name.and_then(Value::as_str).expect("a name").to_owned()
        });
        named.collect()
    };
    assert_eq!(names(&[]), ["chat", "chat", "front", "front"]);
    let own = [
        "chat",
        "chat/local",
        "chat",
        "chat/local",
        "front",
        "inbound",
        "front",
        "inbound",
    ];
    assert_eq!(names(&["--node", "a"]), own);
}

#[test]
fn files_name_each_other_and_secrets_are_only_in_theirs() {
    let dir = complete("files");
    let out = dir.join("out");
    for extension in ["json", "yaml"] {
        let arguments = [
            "translate",
            text(&dir),
            "--node",
            "a",
            "--format",
            extension,
            "--out",
            text(&out),
        ];
        let (code, printed, errors) = run(&arguments);
        assert_eq!(code, Some(0), "{errors}");
        let path = |kind: &str| {
            out.canonicalize()
                .expect("there")
                .join(format!("{kind}.{extension}"))
        };
        let files = ["clusters", "endpoints", "listeners", "routes", "secrets"].map(path);
        let listed: Vec<_> = printed.lines().collect();
        assert_eq!(listed, files.each_ref().map(|path| text(path)));
        let read = files
            .each_ref()
            .map(|path| fs::read_to_string(path).expect("written"));
        let named = |of: usize, kind: &str| read[of].contains(text(&path(kind)));
        assert!(
            named(0, "endpoints") && named(2, "routes") && named(2, "secrets"),
            "{read:#?}"
        );
        assert!(
            read[4].contains("/k.pem") && read[4].contains("/ca.pem"),
            "{}",
            read[4]
        );
        assert!(
            read[..4]
                .iter()
                .all(|text| !text.contains("/k.pem") && !text.contains("ads"))
        );
        let mode = fs::metadata(&files[4]).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // A second time changes nothing, so that nobody who watches them looks in vain.
        let when = |path: &PathBuf| {
            fs::metadata(path)
                .and_then(|file| file.modified())
                .expect("a time")
        };
        let before = files.each_ref().map(when);
        assert_eq!(run(&arguments).0, Some(0));
        assert_eq!(files.each_ref().map(when), before);
    }
    let (_, printed, _) = run(&["translate", text(&dir), "--node", "a"]);
    assert!(
        printed.contains("ads: {}") && !printed.contains("/k.pem"),
        "{printed}"
    );
}

#[test]
fn the_schema_is_the_one_beside_the_examples() {
    let (code, printed, _) = run(&["schema"]);
    let file = fs::read_to_string(examples().join("../schema.json")).expect("there");
    assert_eq!((code, printed), (Some(0), file));
}
