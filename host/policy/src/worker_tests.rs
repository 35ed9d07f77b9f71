//! A worker that is driven turn by turn, so that what happens between two forward passes can be seen.

use std::pin::Pin;

use fulgurite_core::id::{AttemptKey, AttemptNumber, PolicyVersion, RolloutId};
use fulgurite_core::llm::{FinishReason, LlmError, Sampling};
use fulgurite_core::seed::Seed;
use futures::FutureExt;

use super::*;
use crate::call::{Generated, Request};
use crate::config::PolicyConfig;
use crate::decoder::Decoder;
use crate::kv_cache::BlockLayout;
use crate::parameters::Parameters;
use crate::rotary::RotaryTable;
use crate::scheduler::SchedulerLimits;
use crate::tokenizer::{PolicyTokenizer, TokenizerConfig};

const BLOCK_BYTES: usize = 2 * 32 * 32 * 4;

type Asked = Pin<Box<dyn Future<Output = Result<Generated, LlmError>>>>;

struct Bench {
    scheduler: Arc<Scheduler>,
    worker: Worker,
    session: u64,
    asked: u64,
}

fn decoder(version: u64) -> Decoder {
    let config = PolicyConfig {
        d_model: Some(32),
        heads: Some(2),
        layers: Some(1),
        d_ff: Some(32),
        context_tokens_max: Some(1_024),
        initial_std: 0.2,
        ..PolicyConfig::default()
    };
    let shape = config.shape(300).unwrap();
    assert_eq!(BlockLayout::new(&shape).block_bytes(), BLOCK_BYTES);
    let parameters = Parameters::initial(&shape, config.initial_std, Seed::new(version));
    Decoder::new(&parameters, PolicyVersion(version), Arc::new(RotaryTable::new(&shape)), 1)
}

impl Bench {
    fn new(kv_blocks_max: usize, swap_in_flight: bool) -> Self {
        Self::with_threads(1, kv_blocks_max, swap_in_flight)
    }

    fn with_threads(threads: usize, kv_blocks_max: usize, swap_in_flight: bool) -> Self {
        Self::with_idle(threads, kv_blocks_max, usize::MAX, swap_in_flight)
    }

    fn with_idle(threads: usize, kv_blocks_max: usize, idle_bytes_max: usize, swap_in_flight: bool) -> Self {
        let texts = ["a room for people", "a room"].map(String::from);
        let tokenizer = PolicyTokenizer::train(texts.into_iter(), &TokenizerConfig::default()).unwrap();
        let limits = SchedulerLimits {
            threads,
            batch_wait_ms_max: 0,
            kv_cache_bytes_max: kv_blocks_max * BLOCK_BYTES,
            kv_cache_idle_bytes_max: idle_bytes_max,
            requests_waiting_max: 10_000,
            stream_chunk_tokens: 1,
            kept_tokens_max: 0,
            swap_in_flight,
        };
        let scheduler = Arc::new(Scheduler::new(decoder(0), tokenizer, limits));
        let session = scheduler.open_session();
        Self { worker: Worker::new(scheduler.clone(), 0), scheduler, session, asked: 0 }
    }

    /// Queues a call. Tokens that end a completion are banned, so that only `max_tokens` does.
    fn ask(&mut self, prompt: Vec<u32>, max_tokens: u32) -> Asked {
        self.ask_at(1.0, prompt, max_tokens)
    }

    fn ask_at(&mut self, temperature: f32, prompt: Vec<u32>, max_tokens: u32) -> Asked {
        let rollout = RolloutId::derived("test", 0, self.asked).unwrap();
        let attempt = AttemptKey { rollout, attempt: AttemptNumber::FIRST };
        let logit_bias =
            vec![fulgurite_core::llm::TokenBias { token: self.scheduler.tokenizer.ends()[0], bias: -100.0 }];
        let sampling = Sampling { temperature, max_tokens, logit_bias, ..Sampling::default() };
        let request =
            Request { prompt: prompt.into(), sampling, seed: Seed::new(self.asked), progress: None, listener: None };
        self.asked += 1;
        let (scheduler, session) = (self.scheduler.clone(), self.session);
        let mut asked: Asked = Box::pin(async move { scheduler.ask(session, attempt, 0, request).await });
        assert!((&mut asked).now_or_never().is_none());
        asked
    }

    fn turn(&mut self) {
        self.worker.next_turn();
        let meter = self.scheduler.memory.bytes();
        let blocks: BTreeSet<_> = self.worker.active.values().flat_map(|a| a.cache.blocks()).map(Arc::as_ptr).collect();
        assert!(blocks.len() * BLOCK_BYTES <= meter);
    }

    /// Turns until a call has ended, and its answer.
    fn run(&mut self, asked: &mut Asked, turns_max: usize) -> (Generated, usize) {
        for turn in 0..=turns_max {
            if let Some(answer) = asked.now_or_never() {
                return (answer.unwrap(), turn);
            }
            self.turn();
        }
        panic!("no answer after {turns_max} turns");
    }
}

/// Prompts that share nothing.
fn prompt(number: u32, length: u32) -> Vec<u32> {
    (0..length).map(|at| 10 + (at * 37 + number * 11 + (at * at) % 13 + number) % 280).collect()
}

#[test]
fn long_prompts_do_not_hold_back_a_call_that_is_drawn() {
    let mut bench = Bench::new(10_000, false);
    let mut long: Vec<Asked> = (0..8).map(|n| bench.ask(prompt(n, 900), 2)).collect();
    bench.turn();
    let mut short = bench.ask(prompt(50, 5), 10);
    // One turn for its own prompt's turn among the others', then one token in each.
    let (answer, turns) = bench.run(&mut short, 100);
    assert_eq!(answer.completion.len(), 10);
    assert!(turns <= 8 + 10, "{turns}");
    let rows = 8 * 900 / (ROWS_MAX - 1) + 8 + 3;
    let ended = (0..rows).find(|_| {
        bench.turn();
        bench.worker.active.is_empty()
    });
    assert!(ended.is_some(), "8 prompts of 900 tokens take {rows} turns at most");
    assert!(long.iter_mut().all(|asked| asked.now_or_never().is_some()));
}

#[test]
fn calls_that_are_drawn_do_not_hold_back_a_prompt() {
    let mut bench = Bench::new(10_000, false);
    let mut drawn: Vec<Asked> = (0..300).map(|n| bench.ask(prompt(n, 2), 60)).collect();
    while bench.worker.active.values().any(|active| active.unfed() > 1) || bench.worker.active.is_empty() {
        bench.turn();
    }
    let mut long = bench.ask(prompt(999, 320), 1);
    let (_, turns) = bench.run(&mut long, 100);
    // Its last token is drawn in turn with 300 others.
    assert!(turns <= 320 / PROMPT_ROWS_MIN + 300 / (ROWS_MAX - PROMPT_ROWS_MIN) + 2, "{turns}");
    let waiting = drawn.iter_mut().filter_map(futures::FutureExt::now_or_never).count();
    assert_eq!(waiting, 0, "they were still drawn");
}

#[test]
fn a_cancelled_call_frees_its_memory_before_the_next_step() {
    let mut bench = Bench::new(0, false);
    let first = bench.ask(prompt(0, 100), 50);
    for _ in 0..3 {
        bench.turn();
    }
    assert_eq!((bench.worker.active.len(), bench.scheduler.memory.bytes()), (1, 4 * BLOCK_BYTES));
    drop(first);
    bench.turn();
    assert_eq!((bench.worker.active.len(), bench.scheduler.memory.bytes()), (0, 0));
    assert!(bench.worker.prompts.is_empty() && bench.worker.turns.is_empty());
    // The slot is free: another call is taken in at once.
    let mut second = bench.ask(prompt(1, 3), 2);
    assert_eq!(bench.run(&mut second, 2).1, 2);
}

#[test]
fn a_group_computes_its_prompt_once_and_a_later_member_only_its_last_token() {
    let mut bench = Bench::new(10_000, false);
    let mut group: Vec<Asked> = (0..16).map(|_| bench.ask(prompt(1, 512), 1)).collect();
    let (_, turns) = bench.run(&mut group[0], 100);
    // 512 tokens at 128 a turn, and then the others' last tokens.
    assert_eq!(turns, 4);
    bench.turn();
    assert!(group.iter_mut().skip(1).all(|asked| asked.now_or_never().is_some()));
    let rows = |bench: &Bench| {
        let counters = &bench.scheduler.counters;
        counters.prompt_tokens.load(Ordering::Relaxed) - counters.reused_tokens.load(Ordering::Relaxed)
    };
    assert_eq!(rows(&bench), 512 + 15);
    let mut later = bench.ask([prompt(1, 512), prompt(7, 20)].concat(), 1);
    bench.run(&mut later, 1);
    assert_eq!(rows(&bench), 512 + 15 + 20, "only what is new");
}

#[test]
fn blocks_are_kept_for_the_session_that_has_used_them_and_go_with_it_or_with_its_weights() {
    let mut bench = Bench::with_idle(1, 10_000, 0, false);
    let turn = |bench: &mut Bench| {
        let mut asked = bench.ask(prompt(0, 100), 2);
        bench.run(&mut asked, 10);
        bench.scheduler.counters.reused_tokens.load(Ordering::Relaxed)
    };
    assert_eq!((turn(&mut bench), bench.scheduler.memory.bytes()), (0, 4 * BLOCK_BYTES));
    // It draws another token, so that its last block is one of its own.
    assert_eq!((turn(&mut bench), bench.scheduler.memory.bytes()), (99, 5 * BLOCK_BYTES));
    bench.scheduler.close_session(bench.session);
    assert_eq!(bench.scheduler.memory.bytes(), 0);
    bench.session = bench.scheduler.open_session();
    assert_eq!((turn(&mut bench), bench.scheduler.memory.bytes()), (99, 4 * BLOCK_BYTES));
    bench.scheduler.publish(decoder(1));
    assert_eq!(bench.scheduler.memory.bytes(), 0, "before anything is asked of the new ones");
    assert_eq!((turn(&mut bench), bench.scheduler.memory.bytes()), (99, 4 * BLOCK_BYTES));
}

#[test]
fn a_thread_leaves_alone_what_another_one_computes() {
    // Four parts, of which the last may be one token.
    for length in [500, 3 * u32::try_from(ROWS_MAX).unwrap() + 1] {
        let mut bench = Bench::with_threads(2, 10_000, false);
        let mut group: Vec<Asked> = (0..16).map(|_| bench.ask(prompt(1, length), 2)).collect();
        let mut other = bench.ask(prompt(9, 80), 1);
        let first = bench.scheduler.admit(0, 0, true).unwrap();
        assert_eq!(first.len(), 9, "its half");
        let second = bench.scheduler.admit(1, 0, true).unwrap();
        assert_eq!(second.iter().map(|call| call.request.prompt.len()).collect::<Vec<_>>(), [80]);
        let mut helper = Worker::new(bench.scheduler.clone(), 1);
        helper.turn(second);
        assert!((&mut other).now_or_never().is_some());
        bench.worker.turn(first);
        for _ in 0..3 {
            bench.worker.turn(vec![]);
        }
        let rest = bench.scheduler.admit(1, 0, true).unwrap();
        assert_eq!(rest.len(), 7);
        helper.turn(rest);
        for _ in 0..3 {
            helper.turn(vec![]);
            bench.worker.turn(vec![]);
        }
        assert!(group.iter_mut().all(|asked| asked.now_or_never().is_some()));
        let counters = &bench.scheduler.counters;
        let computed = counters.prompt_tokens.load(Ordering::Relaxed) - counters.reused_tokens.load(Ordering::Relaxed);
        assert_eq!(computed, u64::from(length) + 15 + 80);
    }
}

#[test]
fn the_newest_call_is_put_back_when_memory_is_short_and_draws_the_same() {
    let ask = |bench: &mut Bench| -> Vec<Asked> { (0..5).map(|n| bench.ask(prompt(n, 30 + n), 80)).collect() };
    let answers = |bench: &mut Bench| -> Vec<Generated> {
        let mut all = ask(bench);
        all.iter_mut().map(|asked| bench.run(asked, 1_000).0).collect()
    };
    // Each takes four blocks in the end.
    let mut roomy = Bench::new(10_000, false);
    let want = answers(&mut roomy);
    assert_eq!(roomy.scheduler.counters.calls_put_back.load(Ordering::Relaxed), 0);
    for blocks_max in [0, 1, 4, 5, 9, 13] {
        let mut tight = Bench::new(blocks_max, false);
        let mut all = ask(&mut tight);
        let mut got: Vec<Option<Generated>> = vec![None; 5];
        while got.iter().any(Option::is_none) {
            tight.turn();
            // One call is carried in any case.
            assert!(tight.scheduler.memory.bytes() <= blocks_max.max(4) * BLOCK_BYTES);
            for (got, asked) in got.iter_mut().zip(&mut all).filter(|(got, _)| got.is_none()) {
                *got = asked.now_or_never().map(Result::unwrap);
            }
        }
        assert_eq!(got.into_iter().flatten().collect::<Vec<_>>(), want, "{blocks_max}");
        let counters = &tight.scheduler.counters;
        let put_back = counters.calls_put_back.load(Ordering::Relaxed);
        assert!(put_back > 0 || blocks_max < 5, "{blocks_max}");
        assert_eq!(counters.calls.load(Ordering::Relaxed), 5);
    }
}

#[test]
fn weights_are_swapped_in_flight_only_when_asked_to_and_each_token_has_its_version() {
    let mut still = Bench::new(10_000, false);
    let mut asked = still.ask_at(0.0, prompt(0, 40), 6);
    for _ in 0..3 {
        still.turn();
    }
    still.scheduler.publish(decoder(1));
    let answer = still.run(&mut asked, 10).0;
    assert_eq!((answer.version, answer.token_versions), (PolicyVersion(0), vec![]));

    let mut swapping = Bench::new(10_000, true);
    let mut asked = swapping.ask_at(0.0, prompt(0, 40), 6);
    for _ in 0..3 {
        swapping.turn();
    }
    swapping.scheduler.publish(decoder(1));
    let swapped = swapping.run(&mut asked, 10).0;
    assert_eq!(swapped.version, PolicyVersion(0));
    assert_eq!(swapped.token_versions, [0, 0, 0, 1, 1, 1].map(PolicyVersion));
    assert_eq!(swapped.completion[..3], answer.completion[..3]);
    assert_eq!(swapping.scheduler.counters.recomputed_tokens.load(Ordering::Relaxed), 42);
    // What was drawn after the swap is what the new weights draw after such a beginning, to the last bit.
    let mut fresh = Bench::new(10_000, false);
    fresh.scheduler.publish(decoder(1));
    let begun = [prompt(0, 40), swapped.completion[..3].to_vec()].concat();
    let mut continued = fresh.ask_at(0.0, begun, 3);
    let continued = fresh.run(&mut continued, 10).0;
    assert_eq!(
        (&swapped.completion[3..], &swapped.log_probs[3..]),
        (&continued.completion[..], &continued.log_probs[..])
    );
    assert_ne!(swapped.log_probs[3..], answer.log_probs[3..]);
    assert_eq!(swapped.finish, FinishReason::Length);
}
