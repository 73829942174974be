//! Secrets: those of files go to who needs them, those of the built-in CA to each node.

use crate::{
    harness::{Delta, Served, as_str, cluster, endpoints, eventually, node},
    identity::named,
    secure::{Ca, channel, client, der},
};
use outrigger_control_plane::tls;
use outrigger_xds::{
    subscription::Kind,
    wire::envoy::{
        config::core::v3::data_source::Specifier,
        extensions::transport_sockets::tls::v3::{Secret, secret::Type},
        service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse},
    },
};
use prost::Message;
use rustls::version::TLS13;
use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

fn files() -> Vec<(&'static str, String)> {
    vec![(
        "all.yaml",
        format!("[{}, {}]", cluster("a"), endpoints("a", 1)),
    )]
}

async fn stream(served: &Served, ca: &Ca, id: &str) -> Delta {
    let pair = ca.good(&format!("spiffe://fleet/node/{id}"));
    let config = client(ca, Some(&pair), &TLS13);
    Delta::over(channel(served.running.address, config), named(id)).await
}

/// The next answer, taken: its secrets' PEM, certificates and CAs apart.
async fn secrets(stream: &mut Delta) -> (Vec<String>, Vec<String>) {
    let answer: DeltaDiscoveryResponse = stream.next().await;
    stream
        .send(DeltaDiscoveryRequest {
            type_url: answer.type_url.clone(),
            response_nonce: answer.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        })
        .await;
    let (mut own, mut trusted) = (Vec::new(), Vec::new());
    for resource in answer.resources {
        let any = resource.resource.unwrap();
        let secret = Secret::decode(&*any.value).unwrap();
        let text =
            |source: Option<outrigger_xds::wire::envoy::config::core::v3::DataSource>| match source
                .unwrap()
                .specifier
                .unwrap()
            {
                Specifier::InlineString(text) => text,
                other => panic!("{other:?}"),
            };
        match secret.r#type.unwrap() {
            Type::TlsCertificate(certificate) => {
                assert_eq!(secret.name, "outrigger_identity");
                assert!(text(certificate.private_key).contains("PRIVATE KEY"));
                own.push(text(certificate.certificate_chain));
            }
            Type::ValidationContext(context) => {
                assert_eq!(secret.name, "outrigger_trust");
                let names = format!("{:?}", context.match_typed_subject_alt_names);
                assert!(names.contains("spiffe://fleet/node/"), "{names}");
                trusted.push(text(context.trusted_ca));
            }
        }
    }
    (own, trusted)
}

fn ids(pem: &str) -> Vec<String> {
    let der = der(pem);
    let parsed = webpki::EndEntityCert::try_from(&der).unwrap();
    parsed.valid_uri_names().map(str::to_owned).collect()
}

#[tokio::test]
async fn certificates_are_renewed_while_streams_go_on_and_a_new_ca_is_told() {
    let ca = Ca::new("issues", "fleet");
    let tls = tls::Options {
        certificate_ttl_s: 4,
        ..ca.options()
    };
    let served = Served::secured("issues", &as_str(&files()), tls).await;
    let mut a = stream(&served, &ca, "a").await;
    a.want(Kind::Secrets, &["outrigger_identity", "outrigger_trust"])
        .await;
    let (first, trusted) = secrets(&mut a).await;
    assert_eq!(ids(&first[0]), ["spiffe://fleet/node/a"]);
    assert_eq!(trusted, [ca.pem()]);
    // What did not change is not sent again.
    let (second, again) = secrets(&mut a).await;
    assert_eq!(ids(&second[0]), ["spiffe://fleet/node/a"]);
    assert!(second != first && again.is_empty(), "{again:?}");
    // Each node has its own.
    let mut b = stream(&served, &ca, "b").await;
    b.want(Kind::Secrets, &["outrigger_identity"]).await;
    let (of_b, _) = secrets(&mut b).await;
    assert_eq!(ids(&of_b[0]), ["spiffe://fleet/node/b"]);
    let other = Ca::new("issues-other", "fleet");
    let both = format!("{}{}", ca.pem(), other.pem());
    fs::write(ca.dir.join(".new"), &both).unwrap();
    fs::rename(ca.dir.join(".new"), ca.dir.join("ca.pem")).unwrap();
    let told = eventually("both CAs are told", async || {
        let (_, trusted) = secrets(&mut a).await;
        trusted.into_iter().next()
    })
    .await;
    assert_eq!(told, both);
}

#[tokio::test]
async fn without_a_ca_nothing_is_issued_and_nothing_may_name_it() {
    let served = Served::new("no-ca", &as_str(&files())).await;
    let mut client = served.delta("envoy").await;
    client.want(Kind::Secrets, &["outrigger_identity"]).await;
    assert_eq!(client.take(None).await, "Secrets[] -[outrigger_identity]");
    served.put("fleet.yaml", FLEET);
    eventually("it is known", async || {
        let problems = served.json("/sources").await["sources"][0]["problems"].to_string();
        let expected = "spec.peerTls.secret: there is no secret 'outrigger_identity'";
        problems.contains(expected).then_some(())
    })
    .await;
}

/// Two nodes that know each other by what the CA issues, and a gateway with a certificate from a file.
const FLEET: &str = r#"
apiVersion: outrigger.dev/v1
kind: Fleet
metadata: {name: chat}
spec:
  pools: [{name: all, engines: [{node: a, address: "127.0.0.1:8000"}, {node: b, address: "127.0.0.1:8000"}]}]
  nodes: {a: "10.0.0.1:8081", b: "10.0.0.2:8081"}
  peerTls: {secret: outrigger_identity, caSecret: outrigger_trust}
---
apiVersion: outrigger.dev/v1
kind: Gateway
metadata: {name: front}
spec: {listeners: [{address: ":8080", tls: {secret: front}}], routes: [{fleet: chat}], nodes: [gateway]}
"#;

const FRONT: &str = r#"
"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
name: NAME
tls_certificate: {certificate_chain: {filename: /c.pem}, private_key: {filename: /k.pem}}
"#;

#[tokio::test]
async fn secrets_go_to_the_node_that_needs_them() {
    let ca = Ca::new("needs", "fleet");
    let secrets = ["front", "nobodys"].map(|name| FRONT.replace("NAME", name));
    let files = [
        ("fleet.yaml", FLEET),
        ("front.yaml", &secrets[0]),
        ("nobodys.yaml", &secrets[1]),
    ];
    let served = Served::secured("needs", &files, ca.options()).await;
    let wanted = ["front", "nobodys", "outrigger_trust"];
    for (id, expected) in [
        ("gateway", "Secrets[front outrigger_trust] -[nobodys]"),
        ("a", "Secrets[outrigger_trust] -[front nobodys]"),
        ("another", "Secrets[outrigger_trust] -[front nobodys]"),
    ] {
        let mut client = stream(&served, &ca, id).await;
        client.want(Kind::Secrets, &wanted).await;
        assert_eq!(client.take(None).await, expected, "{id}");
    }
    // Nobody else may have the name of what is issued.
    served.put("trust.yaml", &FRONT.replace("NAME", "outrigger_trust"));
    eventually("it is known", async || {
        let problems = served.json("/sources").await["sources"][0]["problems"].to_string();
        problems
            .contains("is issued to each node by the CA")
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn without_tls_secrets_go_to_the_node_that_needs_them_too() {
    let secret = FRONT.replace("NAME", "nobodys");
    let files = [files(), vec![("secret.yaml", secret)]].concat();
    let served = Served::new("plain-secrets", &as_str(&files)).await;
    let mut client = served.delta_of(node("outrigger")).await;
    client.want(Kind::Secrets, &["nobodys"]).await;
    assert_eq!(client.take(None).await, "Secrets[] -[nobodys]");
}

fn program(arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrigger-control-plane"));
    let output = command.args(arguments).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn the_command_makes_a_ca_and_issues_what_a_node_comes_with() {
    let at = Path::new(env!("CARGO_TARGET_TMPDIR")).join("ca-command");
    let _ = fs::remove_dir_all(&at);
    let (dir, out) = (at.join("ca"), at.join("a"));
    let (dir, out_text) = (dir.to_str().unwrap(), out.to_str().unwrap());
    let init = ["ca", "init", "--dir", dir, "--trust-domain", "fleet"];
    assert!(program(&init).0);
    let (is_good, text) = program(&init);
    assert!(
        !is_good && text.contains("ca.key"),
        "a CA is never replaced: {text}"
    );
    let issue = |node| {
        program(&[
            "ca", "issue", "--dir", dir, "--node", node, "--out", out_text,
        ])
    };
    for _ in 0..2 {
        let (is_good, text) = issue("a");
        assert!(
            is_good && text.starts_with("spiffe://fleet/node/a: "),
            "{text}"
        );
    }
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    assert_eq!(ids(&read(&out.join("cert.pem"))), ["spiffe://fleet/node/a"]);
    assert_eq!(read(&out.join("ca.pem")), read(&at.join("ca/ca.pem")));
    for key in [out.join("key.pem"), at.join("ca/ca.key")] {
        let mode = fs::metadata(key).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    assert!(issue("a/b").1.contains("not the id of a node"));
    // The key of another CA.
    fs::copy(out.join("key.pem"), at.join("ca/ca.key")).unwrap();
    assert!(issue("a").1.contains("does not vouch"));
    for bad in [
        &["serve", "--config", dir, "--tls-cert", "c"][..],
        &["serve", "--config", dir, "--ca", dir, "--tls-cert", "c"],
        &["serve", "--config", dir, "--trust-domain", "fleet"],
    ] {
        let (is_good, text) = program(bad);
        assert!(!is_good && text.contains("Usage:"), "{bad:?}: {text}");
    }
}
