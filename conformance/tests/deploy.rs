//! The bootstraps under `deploy/` are valid, as the proxy itself judges them.

use outrigger_xds::load::{self, Syntax};
use std::path::Path;

#[test]
fn every_bootstrap_is_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/bootstrap");
    let mut checked = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let bootstrap = load::bootstrap(&text, Syntax::Yaml)
            .unwrap_or_else(|errors| panic!("{path:?}: {errors}"));
        outrigger_proxy::process::check(&bootstrap)
            .unwrap_or_else(|errors| panic!("{path:?}: {errors:?}"));
        checked += 1;
    }
    assert_eq!(checked, 2);
}

#[test]
fn a_route_to_nowhere_is_refused_with_its_place() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/bootstrap");
    let text = std::fs::read_to_string(folder.join("sidecar.yaml")).unwrap();
    let broken = text.replace("decision_header: false", "no_such_weight: 1");
    let bootstrap = load::bootstrap(&broken, Syntax::Yaml).unwrap();
    let errors = outrigger_proxy::process::check(&bootstrap)
        .unwrap_err()
        .join("\n");
    assert!(
        errors.contains("kv_routing") && errors.contains("no_such_weight"),
        "{errors}"
    );
}
