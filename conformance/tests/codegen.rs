//! Are the checked-in protobuf types what `xds/proto` says?
//!
//! `OUTRIGGER_CODEGEN=write cargo test -p outrigger-conformance --test codegen` writes them anew. It does not answer
//! whether the transcription agrees with Envoy's own files.

use prost::Message;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

const DESCRIPTORS: &str = "descriptors.bin";
const TREE: &str = "tree.rs";

fn xds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../xds")
}

/// All `.proto` files below `dir`, as paths relative to `root`, sorted so that the output is always the same.
fn protos(root: &Path, dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("proto directory") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            protos(root, &path, found);
        } else if path
            .extension()
            .is_some_and(|extension| extension == "proto")
        {
            found.push(path.strip_prefix(root).expect("below the root").to_owned());
        }
    }
    found.sort();
}

/// What `xds/src/wire` must hold, by file name.
fn generate() -> BTreeMap<String, Vec<u8>> {
    let root = xds().join("proto");
    let mut files = Vec::new();
    protos(&root, &root, &mut files);
    let mut compiler = protox::Compiler::new([&root]).expect("proto root");
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(&files).expect("valid protos");
    let mut set = compiler.file_descriptor_set();

    let out = std::env::temp_dir().join(format!("outrigger-codegen-{}", std::process::id()));
    fs::create_dir_all(&out).expect("temp dir");
    let mut config = prost_build::Config::new();
    config
        .out_dir(&out)
        .include_file(TREE)
        .btree_map(["."])
        .enable_type_names();
    tonic_prost_build::configure()
        .out_dir(&out)
        .include_file(TREE)
        .emit_rerun_if_changed(false)
        .compile_fds_with_config(set.clone(), config)
        .expect("generated");

    let mut made = BTreeMap::new();
    for entry in fs::read_dir(&out).expect("temp dir") {
        let path = entry.expect("entry").path();
        let name = path
            .file_name()
            .expect("a file")
            .to_string_lossy()
            .into_owned();
        made.insert(name, fs::read(&path).expect("readable"));
    }
    fs::remove_dir_all(&out).expect("temp dir");
    for file in &mut set.file {
        file.source_code_info = None;
    }
    made.insert(DESCRIPTORS.to_owned(), set.encode_to_vec());
    made
}

#[test]
fn generated_types_are_up_to_date() {
    let made = generate();
    let dir = xds().join("src/wire");
    let checked_in: BTreeMap<String, Vec<u8>> = fs::read_dir(&dir)
        .expect("xds/src/wire")
        .map(|entry| entry.expect("entry").path())
        .map(|path| {
            let name = path
                .file_name()
                .expect("a file")
                .to_string_lossy()
                .into_owned();
            (name, fs::read(&path).expect("readable"))
        })
        .collect();
    if std::env::var("OUTRIGGER_CODEGEN").is_ok_and(|mode| mode == "write") {
        for name in checked_in.keys().filter(|name| !made.contains_key(*name)) {
            fs::remove_file(dir.join(name)).expect("removable");
        }
        for (name, content) in &made {
            fs::write(dir.join(name), content).expect("writable");
        }
        return;
    }
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(
        names(&made),
        names(&checked_in),
        "files in xds/src/wire; OUTRIGGER_CODEGEN=write makes them anew"
    );
    for (name, content) in &made {
        assert!(
            content == &checked_in[name],
            "xds/src/wire/{name} is stale; OUTRIGGER_CODEGEN=write makes it anew"
        );
    }
}
