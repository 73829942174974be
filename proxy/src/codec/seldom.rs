//! A future beside one that is polled often: it is polled only when it was woken itself.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::AcqRel, Ordering::Relaxed, Ordering::Release},
    },
    task::{Context, Poll, Wake, Waker},
};

/// See the module.
pub(super) struct Seldom<'a, F> {
    future: Pin<&'a mut F>,
    woken: Option<Arc<Woken>>,
}

struct Woken {
    flag: AtomicBool,
    task: Waker,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.flag.store(true, Release);
        self.task.wake_by_ref();
    }
}

impl<'a, F: Future> Seldom<'a, F> {
    pub(super) fn new(future: Pin<&'a mut F>) -> Self {
        Self {
            future,
            woken: None,
        }
    }
}

impl<F: Future> Future for Seldom<'_, F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let known = self.woken.as_ref();
        if let Some(woken) = known.filter(|woken| woken.task.will_wake(cx.waker())) {
            if !woken.flag.load(Relaxed) || !woken.flag.swap(false, AcqRel) {
                return Poll::Pending;
            }
        } else {
            self.woken = Some(Arc::new(Woken {
                flag: AtomicBool::new(false),
                task: cx.waker().clone(),
            }));
        }
        match self.woken.clone() {
            Some(woken) => {
                let waker = Waker::from(woken);
                self.future.as_mut().poll(&mut Context::from_waker(&waker))
            }
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{future::poll_fn, pin::pin};
    use tokio::sync::Notify;

    #[tokio::test]
    async fn it_is_polled_when_it_was_woken_and_not_when_others_were() {
        let (notify, polls) = (Notify::new(), std::cell::Cell::new(0));
        let watching = pin!(async {
            let mut notified = pin!(notify.notified());
            poll_fn(|cx| {
                polls.set(polls.get() + 1);
                notified.as_mut().poll(cx)
            })
            .await;
        });
        let mut seldom = Seldom::new(watching);
        let mut turns = 0;
        poll_fn(|cx| {
            turns += 1;
            cx.waker().wake_by_ref();
            match Pin::new(&mut seldom).poll(cx) {
                Poll::Pending if turns == 10 => {
                    notify.notify_one();
                    Poll::Pending
                }
                other => other,
            }
        })
        .await;
        assert_eq!((turns, polls.get()), (11, 2));
    }
}
