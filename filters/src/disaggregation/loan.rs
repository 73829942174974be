//! Blocks that wait at the engine of the prefill leg: taken once, by the decode leg of the same request, or given back.
//!
//! An engine does not check for which prompt blocks were computed: whoever takes them a second time, or for another
//! prompt, gets wrong text with status 200. So what names them cannot be cloned, and its body can be sent once. If the
//! client leaves before they were taken, they are taken by a leg that nobody waits for, since only that frees them
//! before their lease ends. Once the decode leg's body was touched nothing is sent again, for that engine frees them, unless
//! it is known that it reached no engine.

use super::{
    Head,
    dialect::{Answer, Dialect},
    head::Pieces,
    leg,
    rule::prompt_tokens,
};
use crate::{
    body::{BodyError, RequestBody, ResponseBody},
    endpoints::Part,
    error::Flag,
    filter::{Context, Kept},
};
use bytes::{Bytes, BytesMut};
use http::Request;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{
            AtomicU8, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    task::{Context as Task, Poll},
    time::Duration,
};

/// A longer answer of a prefill leg is not read; one that tells the prompt's tokens may have some bytes more for each.
pub(super) const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Blocks being given back at once, in the whole process.
pub(super) const RELEASES_MAX: usize = 256;
/// Giving them back is given up after this.
pub(super) const RELEASE_SECONDS_MAX: u64 = 10;

static RELEASES: AtomicUsize = AtomicUsize::new(0);

/// Nobody took the blocks.
const FREE: u8 = 0;
/// The body of a decode leg was touched: its engine may take them.
const SENT: u8 = 1;
/// They are being given back.
const RELEASED: u8 = 2;

/// Who has the blocks: whoever finds them free, and nobody after that.
#[derive(Debug, Default)]
pub(super) struct Taken(AtomicU8);

impl Taken {
    /// Whether they went from one state to the other here and now.
    fn turn(&self, from: u8, to: u8) -> bool {
        self.0.compare_exchange(from, to, AcqRel, Acquire).is_ok()
    }

    fn is(&self, state: u8) -> bool {
        self.0.load(Acquire) == state
    }
}

/// Blocks on loan, from the head of the prefill leg's answer on.
pub(super) struct Loan(Option<Terms>);

struct Terms {
    chain: Kept,
    head: Head,
    template: Context,
    /// The answer, until it was read.
    body: Option<ResponseBody>,
    read: BytesMut,
    /// A longer one is not read.
    bytes_max: usize,
    answer: Option<Answer>,
    dialect: &'static Dialect,
    /// Who has the blocks.
    taken: Arc<Taken>,
}

impl Loan {
    pub(super) fn new(
        dialect: &'static Dialect,
        chain: Kept,
        head: Head,
        context: &Context,
        body: ResponseBody,
    ) -> Self {
        let mut template = leg(context, Part::Decode, "f");
        template.ranked.clone_from(&context.ranked);
        Self(Some(Terms {
            chain,
            head,
            template,
            body: Some(body),
            read: BytesMut::new(),
            bytes_max: bytes_max(dialect, prompt_tokens(context)),
            answer: None,
            dialect,
            taken: Arc::default(),
        }))
    }

    /// Reads the prefill leg's answer.
    pub(super) async fn read(&mut self) -> Result<(), &'static str> {
        let terms = self.0.as_mut().ok_or("no_params")?;
        terms.read().await
    }

    /// Prompt tokens that needed no computing.
    pub(super) fn cached(&self) -> u64 {
        let answer = self.0.as_ref().and_then(|terms| terms.answer.as_ref());
        answer.map_or(0, |answer| answer.cached)
    }

    /// The decode leg, which takes the blocks as soon as its body is sent.
    pub(super) fn decode(&self, id: &str) -> Result<Request<RequestBody>, &'static str> {
        let terms = self.0.as_ref().ok_or("no_params")?;
        let answer = terms.answer.as_ref().ok_or("no_params")?;
        let parts = (terms.dialect.decode)(&terms.head, answer)?;
        let body = once(parts, terms.taken.clone());
        Ok(terms.head.request(body, id))
    }

    /// The decode leg failed before any engine had its request, although its body was touched.
    pub(super) fn not_sent(&self) {
        if let Some(terms) = &self.0 {
            terms.taken.turn(SENT, FREE);
        }
    }
}

fn bytes_max(dialect: &Dialect, prompt_tokens: u64) -> usize {
    let tokens = usize::try_from(prompt_tokens).unwrap_or(usize::MAX);
    ANSWER_BYTES_MAX.saturating_add(tokens.saturating_mul(dialect.token_bytes))
}

impl Drop for Loan {
    fn drop(&mut self) {
        let Some(terms) = self.0.take() else {
            return;
        };
        let open = terms.body.is_some() || terms.answer.is_some();
        if !open || !terms.taken.turn(FREE, RELEASED) {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let counted = Counted::new();
        runtime.spawn(async move {
            let outcome = match counted {
                None => "too_many",
                Some(_) => {
                    let limit = Duration::from_secs(RELEASE_SECONDS_MAX);
                    let released = tokio::time::timeout(limit, terms.release()).await;
                    released.unwrap_or("timeout")
                }
            };
            metrics::counter!("outrigger_disaggregation_releases_total", "outcome" => outcome)
                .increment(1);
        });
    }
}

impl Terms {
    async fn read(&mut self) -> Result<(), &'static str> {
        while let Some(body) = &mut self.body {
            match body.frame().await {
                Some(Ok(frame)) => {
                    let data = frame.into_data().unwrap_or_default();
                    self.read.extend_from_slice(&data);
                    if self.read.len() > self.bytes_max {
                        self.body = None;
                        return Err("answer_too_long");
                    }
                }
                Some(Err(_)) => {
                    self.body = None;
                    return Err("failed");
                }
                None => self.body = None,
            }
        }
        if self.answer.is_none() {
            let read = std::mem::take(&mut self.read).freeze();
            self.answer = (self.dialect.answer)(&read);
        }
        self.answer.as_ref().map(|_| ()).ok_or("no_params")
    }

    /// Takes the blocks for nobody.
    async fn release(mut self) -> &'static str {
        if self.read().await.is_err() {
            return "nothing";
        }
        let answer = self.answer.take();
        let parts = answer.and_then(|answer| (self.dialect.release)(&self.head, &answer));
        let Some(parts) = parts else {
            return "nothing";
        };
        // Of its own: the other leg's says that they are no longer free.
        let body = once(parts, Arc::default());
        let mut context = std::mem::take(&mut self.template);
        let request = self.head.request(body, &context.request_id);
        match self.chain.next().run(request, &mut context).await {
            Ok(response) if response.status().is_success() => {
                match response.into_body().collect().await {
                    Ok(_) => "released",
                    Err(_) => "failed",
                }
            }
            Ok(_) => "refused",
            Err(_) => "failed",
        }
    }
}

/// A body that is sent once, or not at all where it was given back before.
pub(super) fn once((first, more): Pieces, taken: Arc<Taken>) -> RequestBody {
    let body = Once {
        pieces: [first, more],
        taken,
        touched: false,
    };
    RequestBody::boxed(body.boxed_unsync())
}

/// Counts one release until dropped.
struct Counted;

impl Counted {
    fn new() -> Option<Self> {
        let counted = Self;
        // Whoever finds too many takes itself off again at once, by being dropped.
        (RELEASES.fetch_add(1, Relaxed) < RELEASES_MAX).then_some(counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        RELEASES.fetch_sub(1, Relaxed);
    }
}

/// A body that cannot be sent twice, and says when it was touched.
struct Once {
    pieces: [Bytes; 2],
    taken: Arc<Taken>,
    touched: bool,
}

impl Body for Once {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Task<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        // Once touched it goes on while nobody gave them up: a connection that failed may still hold it.
        let ours = match self.touched {
            true => self.taken.is(SENT),
            false => self.taken.turn(FREE, SENT),
        };
        if !ours {
            let error = BodyError::new(Flag::LocalReset, "its blocks were given back");
            return Poll::Ready(Some(Err(error)));
        }
        self.touched = true;
        let piece = self.pieces.iter_mut().find(|piece| !piece.is_empty());
        Poll::Ready(piece.map(|piece| Ok(Frame::data(std::mem::take(piece)))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.iter().all(Bytes::is_empty)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.pieces.iter().map(Bytes::len).sum::<usize>() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(taken: &Arc<Taken>) -> Once {
        Once {
            pieces: [Bytes::from_static(b"a"), Bytes::from_static(b"b")],
            taken: taken.clone(),
            touched: false,
        }
    }

    #[tokio::test]
    async fn an_answer_that_tells_the_prompt_may_be_longer_for_it() {
        use crate::{
            disaggregation::{nixl, trtllm},
            filter::{Chain, Next},
        };
        let read = async |dialect: &'static Dialect, tokens: usize| {
            let ids = vec!["123456"; tokens].join(",");
            let told = format!(
                "{{\"choices\":[{{\"finish_reason\":\"length\",\"disaggregated_params\":{{\"request_type\":\"context_only\"}}}}],\
                \"kv_transfer_params\":{{\"do_remote_prefill\":true}},\"prompt_token_ids\":[{ids}]}}"
            );
            let head = Head::of(&Request::new(RequestBody::empty()));
            let mut context = Context::default();
            context.prompt.tokens = tokens as u64;
            let body = http_body_util::Full::new(Bytes::from(told));
            let body = body.map_err(|never| match never {}).boxed_unsync();
            let chain: Chain = Arc::from([]);
            let rest = Next::new(&chain).keep();
            let mut loan = Loan::new(dialect, rest, head, &context, body);
            loan.read().await
        };
        assert_eq!(read(&nixl::DIALECT, 9).await, Ok(()));
        assert_eq!(read(&nixl::DIALECT, 200_000).await, Err("answer_too_long"));
        assert_eq!(read(&trtllm::DIALECT, 200_000).await, Ok(()));
    }

    #[tokio::test]
    async fn blocks_are_sent_or_given_back_but_not_both() {
        let taken = Arc::new(Taken::default());
        let mut sent = body(&taken);
        assert!(sent.frame().await.unwrap().is_ok());
        assert!(!taken.turn(FREE, RELEASED), "an engine may have them");
        assert!(body(&taken).frame().await.unwrap().is_err(), "a second leg");
        assert!(taken.turn(SENT, FREE) && taken.turn(FREE, RELEASED));
        assert!(sent.frame().await.unwrap().is_err(), "a late connection");
        assert!(body(&taken).frame().await.unwrap().is_err());
    }
}
