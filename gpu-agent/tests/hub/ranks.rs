//! An engine with several data-parallel ranks, each with sockets, numbers and a history of its own.

use crate::engine::{ID, following, watch};
use crate::listener::Picture;
use crate::support::{FakeEngine, canonical, prompt, removed, stored};
use outrigger_xds::report::{Health, Shelf, Tier};
use std::collections::HashSet;

/// An engine of two ranks; what publishes for rank 1 is a fake of its own.
async fn two_ranks() -> (FakeEngine, FakeEngine) {
    let second = FakeEngine::start_with(|inner| inner.rank = 1).await;
    let sockets = (second.publisher, second.replay);
    let first = FakeEngine::start_with(|inner| inner.further_ranks = vec![sockets]).await;
    (first, second)
}

fn held(picture: &Picture, rank: u32) -> HashSet<u64> {
    let tier = Tier::Device;
    let blocks = picture.blocks.get(&Shelf { rank, tier });
    blocks.cloned().unwrap_or_default()
}

#[tokio::test]
async fn ranks_are_followed_apart() {
    let (first, second) = two_ranks().await;
    let (_hub, mut listener) = following(&first).await;
    let (a, b) = (prompt(1, 3), prompt(2, 2));
    first.publish(vec![stored(&a, 32, 0)]);
    second.publish(vec![stored(&a[..64], 32, 0)]);
    second.publish(vec![stored(&b, 32, 0)]);
    let picture = listener
        .until(ID, "blocks of both", |picture| {
            held(picture, 0) == canonical(&[&a]) && held(picture, 1) == canonical(&[&a[..64], &b])
        })
        .await;
    assert_eq!(
        (picture.state.dp_size, picture.state.reason.as_str()),
        (2, "")
    );
    assert_eq!(picture.blocks.len(), 2, "of no other rank");
    // The same block goes at one rank and stays at the other.
    second.publish(vec![removed(&a[..64])]);
    listener
        .until(ID, "the removal", |picture| {
            held(picture, 1) == canonical(&[&a[..32], &b]) && held(picture, 0) == canonical(&[&a])
        })
        .await;
    first.publish(vec![rmpv::Value::Map(vec![(
        "type".into(),
        "AllBlocksCleared".into(),
    )])]);
    listener
        .until(ID, "rank 0 to be empty", |picture| {
            held(picture, 0).is_empty() && held(picture, 1) == canonical(&[&a[..32], &b])
        })
        .await;
}

#[tokio::test]
async fn each_rank_s_past_and_gaps_are_replayed_from_its_own_socket() {
    let (first, second) = two_ranks().await;
    let (a, b, c) = (prompt(1, 2), prompt(2, 1), prompt(3, 1));
    first.lose(vec![stored(&a, 32, 0)]);
    second.lose(vec![stored(&b, 32, 0)]);
    let (_hub, mut listener) = following(&first).await;
    let before = listener
        .until(ID, "the past of both", |picture| {
            held(picture, 0) == canonical(&[&a]) && held(picture, 1) == canonical(&[&b])
        })
        .await;
    let replays = |engine: &FakeEngine| engine.inner.lock().unwrap().replays;
    let of_first = replays(&first);
    assert!(of_first >= 1 && replays(&second) >= 1);
    // A gap of rank 1 alone.
    second.lose(vec![stored(&c, 32, 0)]);
    second.publish(vec![removed(&b)]);
    let after = listener
        .until(ID, "the repaired gap", |picture| {
            held(picture, 1) == canonical(&[&c])
        })
        .await;
    assert_eq!((after.epoch, after.complete), (before.epoch, true));
    assert_eq!(held(&after, 0), canonical(&[&a]));
    assert_eq!(replays(&first), of_first, "rank 0 was not asked for it");
}

#[tokio::test]
async fn a_rank_that_says_nothing_holds_up_no_other() {
    let (first, second) = two_ranks().await;
    let (_hub, mut listener) = following(&first).await;
    let a = prompt(1, 2);
    first.publish(vec![stored(&a, 32, 0)]);
    let picture = listener
        .until(ID, "blocks of rank 0", |picture| {
            held(picture, 0) == canonical(&[&a])
        })
        .await;
    assert!(picture.state.kv_events && picture.complete && held(&picture, 1).is_empty());
    drop(second);
}

#[tokio::test]
async fn a_rank_that_cannot_be_reached_is_named_and_the_engine_counts_as_silent() {
    let (first, mut second) = two_ranks().await;
    second.die().await;
    let (_hub, mut listener) = watch(&first);
    let picture = listener
        .until(ID, "the complaint", |picture| {
            picture.state.reason.contains("KV events of rank 1")
        })
        .await;
    assert_eq!(
        picture.state.health,
        Health::Healthy,
        "it serves all the same"
    );
    assert!(!picture.state.kv_events, "half an index would mislead");
    assert!(
        !picture.state.reason.contains("rank 0"),
        "{}",
        picture.state.reason
    );
    let (a, b) = (prompt(1, 1), prompt(2, 1));
    first.publish(vec![stored(&a, 32, 0)]);
    second.rise();
    second.publish(vec![stored(&b, 32, 0)]);
    listener
        .until(ID, "both", |picture| {
            held(picture, 0) == canonical(&[&a]) && held(picture, 1) == canonical(&[&b])
        })
        .await;
    listener
        .until(ID, "a settled history", |picture| {
            picture.state.kv_events && picture.state.reason.is_empty() && picture.complete
        })
        .await;
}
