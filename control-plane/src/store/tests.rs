//! Versions that are kept: over restarts, kills, damage, and with nothing to write to.

use super::*;
use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

fn directory(test: &str) -> PathBuf {
    let directory =
        std::env::temp_dir().join(format!("outrigger-{}-store-{test}", std::process::id()));
    let _ = fs::remove_dir_all(&directory);
    directory
}

fn version(number: u64, bytes: usize) -> Version {
    Version {
        number,
        at_ms: number * 1000,
        hash: format!("hash of {number}"),
        bytes,
        changes: Changes::default(),
        rolled_back: None,
    }
}

/// A change that makes one more version live.
fn one_more(store: &Store, bytes: usize) -> Change {
    let number = store.next();
    let held = vec![u8::try_from(number % 251).unwrap(); bytes];
    let situation = Situation {
        said: format!("hash of {number}"),
        live: Some(number),
        ..Situation::default()
    };
    Change {
        situation,
        new: Some((version(number, bytes), Arc::new(held))),
        marks: Vec::new(),
    }
}

fn numbers(store: &Store) -> Vec<u64> {
    store.versions().map(|version| version.number).collect()
}

#[test]
fn what_is_kept_is_there_again() {
    let directory = directory("again");
    let mut store = Store::open(&directory, 3).unwrap();
    for _ in 0..3 {
        store.commit(one_more(&store, 10)).unwrap();
    }
    let trial = Situation {
        live: Some(1),
        trial: Some(Trial {
            version: 3,
            step: 1,
            threshold: Some(u64::MAX),
        }),
        ..store.situation().clone()
    };
    let marks = vec![(2, Some("why".to_owned()))];
    let change = Change {
        situation: trial.clone(),
        new: None,
        marks,
    };
    store.commit(change).unwrap();
    let in_use = Store::open(&directory, 3).unwrap_err();
    assert!(matches!(in_use, StoreError::InUse(_)), "{in_use}");
    drop(store);
    let mut store = Store::open(&directory, 3).unwrap();
    assert_eq!(numbers(&store), [1, 2, 3]);
    assert_eq!(store.situation(), &trial);
    assert_eq!(
        store.version(2).unwrap().rolled_back.as_deref(),
        Some("why")
    );
    assert_eq!(*store.bytes(3).unwrap(), [3; 10]);
    assert_eq!(
        (store.next(), store.problem(), store.notice()),
        (4, None, None)
    );
    // Others than those that are served make room.
    let change = Change {
        situation: trial,
        ..one_more(&store, 10)
    };
    store.commit(change).unwrap();
    assert_eq!(numbers(&store), [1, 3, 4]);
    assert_eq!(store.bytes(2), Err(StoreError::NoVersion(2)));
    // Nobody else reads it: it may hold keys.
    let mode = fs::metadata(directory.join("versions.redb")).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    drop(store);
    fs::remove_dir_all(directory).unwrap();
}

#[test]
fn a_version_that_is_too_long_is_not_taken() {
    let mut store = Store::in_memory(2);
    let change = one_more(&store, VERSIONS_BYTES_MAX + 1);
    let refused = store.commit(change).unwrap_err();
    assert_eq!(refused, StoreError::TooLong(VERSIONS_BYTES_MAX + 1));
    assert_eq!((numbers(&store), store.next()), (Vec::new(), 1));
    assert!(store.problem().is_some());
    store.commit(one_more(&store, 1)).unwrap();
    assert_eq!((numbers(&store), store.problem()), (vec![1], None));
    // Two that are too long together.
    for _ in 0..2 {
        store
            .commit(one_more(&store, VERSIONS_BYTES_MAX / 2 + 1))
            .unwrap();
    }
    assert_eq!(numbers(&store), [3]);
}

#[test]
fn a_broken_file_is_moved_aside_and_said() {
    let directory = directory("broken");
    for (count, garbage) in [b"no database at all".to_vec(), vec![0xa5; 100_000]]
        .into_iter()
        .enumerate()
    {
        let mut store = Store::open(&directory, 3).unwrap();
        store.commit(one_more(&store, 10)).unwrap();
        drop(store);
        fs::write(directory.join("versions.redb"), &garbage).unwrap();
        let mut store = Store::open(&directory, 3).unwrap();
        let aside = directory.join(format!("versions.redb.broken.{}", count + 1));
        assert_eq!(fs::read(&aside).unwrap(), garbage);
        let notice = store.notice().unwrap().to_owned();
        assert!(notice.contains(aside.to_str().unwrap()), "{notice}");
        assert_eq!((numbers(&store), store.problem()), (Vec::new(), None));
        store.commit(one_more(&store, 10)).unwrap();
        drop(store);
        fs::remove_file(directory.join("versions.redb")).unwrap();
    }
    fs::remove_dir_all(directory).unwrap();
}

/// Whatever is overwritten or cut off: it opens, with what was kept or with nothing, and says so.
#[test]
fn a_file_that_is_damaged_anywhere_opens() {
    let directory = directory("damaged");
    let mut store = Store::open(&directory, 3).unwrap();
    for _ in 0..3 {
        store.commit(one_more(&store, 3000)).unwrap();
    }
    drop(store);
    let file = directory.join("versions.redb");
    let good = fs::read(&file).unwrap();
    let mut moved = 0;
    for round in 0..40_usize {
        let mut bad = good.clone();
        let place = round * 7919 % bad.len().min(64 << 10);
        if round % 4 == 0 {
            bad.truncate(place);
        } else {
            let end = (place + 64).min(bad.len());
            bad[place..end].fill(0x5a);
        }
        fs::write(&file, &bad).unwrap();
        let mut store = Store::open(&directory, 3).unwrap();
        moved += usize::from(store.notice().is_some());
        assert_eq!(store.problem(), None, "round {round}");
        store.commit(one_more(&store, 10)).unwrap();
    }
    assert!(moved > 0);
    fs::remove_dir_all(directory).unwrap();
}

#[test]
fn where_nothing_can_be_written_nothing_changes_until_it_can() {
    let directory = directory("unwritable");
    // A file stands where the directory should be.
    fs::write(&directory, "in the way").unwrap();
    let mut store = Store::open(&directory, 3).unwrap();
    assert!(store.problem().is_some());
    let change = one_more(&store, 10);
    assert!(matches!(
        store.commit(change.clone()),
        Err(StoreError::Failed(_))
    ));
    assert_eq!((numbers(&store), store.next()), (Vec::new(), 1));
    fs::remove_file(&directory).unwrap();
    // What may be there is not written over.
    assert!(store.commit(change.clone()).is_err() && store.is_unread());
    store.read().unwrap();
    store.commit(change).unwrap();
    assert_eq!((numbers(&store), store.problem()), (vec![1], None));
    // A change that cannot wait is made, and written later.
    store.commit(one_more(&store, 10)).unwrap();
    store.shelf = Shelf::Disk(Database::new(&directory.join("versions.redb")));
    store.force(Change {
        situation: Situation {
            live: Some(1),
            ..Situation::default()
        },
        new: None,
        marks: vec![(2, Some("why".into()))],
    });
    assert_eq!(store.situation().live, Some(1));
    assert!(store.is_behind() && store.problem().is_some());
    store.shelf = Shelf::Disk(Database::new(&directory));
    store.catch_up().unwrap();
    assert!(!store.is_behind());
    drop(store);
    let store = Store::open(&directory, 3).unwrap();
    assert_eq!(store.situation().live, Some(1));
    assert_eq!(
        store.version(2).unwrap().rolled_back.as_deref(),
        Some("why")
    );
    drop(store);
    fs::remove_dir_all(directory).unwrap();
}

#[test]
fn changes_are_named_up_to_a_limit() {
    let named = |range: std::ops::Range<u32>, value: u32| -> Named {
        let all = range.map(|number| (format!("Cluster {number:02}"), value.into()));
        all.collect()
    };
    let changes = Changes::between(&named(0..3, 1), &named(1..4, 1));
    assert_eq!(
        (changes.count, changes.named.as_slice()),
        (2, ["- Cluster 00".into(), "+ Cluster 03".into()].as_slice())
    );
    let changes = Changes::between(&named(0..30, 1), &named(0..30, 2));
    assert_eq!(
        (changes.count, changes.named.len()),
        (30, CHANGES_NAMED_MAX)
    );
    assert_eq!(changes.named[0], "~ Cluster 00");
}

/// Set for the process that is killed: where it writes.
const WRITER: &str = "OUTRIGGER_TEST_STORE";

/// Not a test by itself: what is killed. It says each version when it was accepted.
#[test]
#[ignore = "run by kill_9_loses_no_version_that_was_accepted"]
fn writer() {
    let Some(directory) = std::env::var_os(WRITER) else {
        return;
    };
    let mut store = Store::open(Path::new(&directory), 20).unwrap();
    println!("\nopen");
    loop {
        let number = store.next();
        // Lengths differ, so that pages are split, joined and freed.
        let bytes = usize::try_from(number * 7919 % 20_000).unwrap();
        store.commit(one_more(&store, bytes)).unwrap();
        println!("{number}");
    }
}

#[test]
fn kill_9_loses_no_version_that_was_accepted() {
    let directory = directory("kill");
    let mut last = 0;
    let mut accepted = 0;
    for round in 0..100_u64 {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "store::tests::writer",
                "--ignored",
                "--nocapture",
            ])
            .env(WRITER, &directory)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        let opened = lines
            .by_ref()
            .map_while(Result::ok)
            .any(|line| line == "open");
        assert!(opened, "round {round}: the database does not open");
        // At some point of some write, however slow the disk is.
        let count = rand::random_range(0..4);
        let mut said: Vec<u64> = lines
            .by_ref()
            .map_while(Result::ok)
            .filter_map(|line| line.parse().ok())
            .take(count)
            .collect();
        thread::sleep(Duration::from_micros(rand::random_range(0..15_000)));
        writer.kill().unwrap();
        writer.wait().unwrap();
        let rest = lines.map_while(Result::ok);
        said.extend(rest.filter_map(|line| line.parse::<u64>().ok()));
        accepted += said.len();
        last = said.last().copied().unwrap_or(last);
        let mut store = Store::open(&directory, 20).unwrap();
        assert_eq!(
            (store.notice(), store.problem()),
            (None, None),
            "round {round}"
        );
        let kept = numbers(&store);
        // One that was written and not yet said may be there, too.
        let newest = kept.last().copied().unwrap_or_default();
        assert!(
            newest == last || newest == last + 1,
            "round {round}: {kept:?}, said {last}"
        );
        let oldest = (newest + 1).saturating_sub(20).max(1);
        let expected: Vec<u64> = (oldest..=newest).filter(|_| newest > 0).collect();
        assert_eq!(kept, expected, "round {round}");
        assert_eq!(store.situation().live.unwrap_or_default(), newest);
        for number in kept {
            let bytes = store.bytes(number).unwrap();
            assert_eq!(bytes.len(), store.version(number).unwrap().bytes);
            assert!(bytes.iter().all(|byte| u64::from(*byte) == number % 251));
        }
        last = newest;
    }
    println!("{accepted} versions accepted, {last} kept");
    assert!(
        accepted > 50,
        "{accepted}: kills came too early to prove anything"
    );
    fs::remove_dir_all(directory).unwrap();
}
