//! A worker that is driven turn by turn, so that what a reader sees between two tokens can be looked at.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use fulgurite_core::id::{AttemptKey, AttemptNumber, PolicyVersion, RolloutId};
use fulgurite_core::llm::{
    FinishReason, LlmBackend, LlmSession, Message, Role, Sampling, SessionInfo, TokenBias, TokenData,
};
use fulgurite_core::seed::Seed;
use futures::FutureExt;
use futures::task::noop_waker_ref;

use super::*;
use crate::config::PolicyConfig;
use crate::decoder::Decoder;
use crate::parameters::Parameters;
use crate::rotary::RotaryTable;
use crate::scheduler::{Generator, Scheduler, SchedulerLimits};
use crate::session::{PolicyBackend, Speaker};
use crate::tokenizer::{PolicyTokenizer, TokenizerConfig};
use crate::worker::Worker;

struct Bench {
    session: Box<dyn LlmSession>,
    scheduler: Arc<Scheduler>,
    worker: Worker,
}

impl Bench {
    fn new(stream_chunk_tokens: usize) -> Self {
        let texts = ["a room for people", "a room"].map(String::from);
        let tokenizer = PolicyTokenizer::train(texts.into_iter(), &TokenizerConfig::default()).unwrap();
        let config = PolicyConfig {
            d_model: Some(32),
            heads: Some(2),
            layers: Some(1),
            d_ff: Some(32),
            context_tokens_max: Some(400),
            initial_std: 0.2,
            ..PolicyConfig::default()
        };
        let shape = config.shape(tokenizer.vocabulary()).unwrap();
        let parameters = Parameters::initial(&shape, config.initial_std, Seed::new(1));
        let decoder = Decoder::new(&parameters, PolicyVersion(6), Arc::new(RotaryTable::new(&shape)), 1);
        let limits = SchedulerLimits {
            threads: 1,
            batch_wait_ms_max: 0,
            kv_cache_bytes_max: 1 << 20,
            kv_cache_idle_bytes_max: 1 << 20,
            requests_waiting_max: 10,
            stream_chunk_tokens,
            kept_tokens_max: 0,
            swap_in_flight: false,
        };
        let scheduler = Arc::new(Scheduler::new(decoder, tokenizer.clone(), limits));
        let own = Speaker { model: None, generator: Arc::new(Generator { scheduler: scheduler.clone() }) };
        let backend = PolicyBackend::new(own, BTreeMap::new(), tokenizer);
        let attempt = AttemptKey { rollout: RolloutId::new("r").unwrap(), attempt: AttemptNumber::FIRST };
        let sampling = Sampling::default();
        let info = SessionInfo { attempt, item_id: "item".into(), seed: Seed::new(2), sampling, history: vec![] };
        Self { session: backend.open(info), worker: Worker::new(scheduler.clone(), 0), scheduler }
    }

    /// The same call in two ways.
    fn chat(&mut self, request: &Arc<ChatRequest>) -> Completion {
        let mut answer = self.session.chat(0, request.clone());
        loop {
            if let Some(answer) = (&mut answer).now_or_never() {
                return Completion::clone(&answer.unwrap());
            }
            self.worker.next_turn();
        }
    }

    fn stream(&self, request: &Arc<ChatRequest>) -> Box<dyn LlmStream> {
        self.session.stream(0, request.clone())
    }

    /// Reads to the end, as soon as there is something to read.
    fn read(&mut self, request: &Arc<ChatRequest>) -> (Vec<String>, Completion) {
        let mut stream = self.stream(request);
        let mut pieces = vec![];
        loop {
            match poll_text(&mut stream) {
                Poll::Ready(true) => pieces.push(stream.take_text().unwrap()),
                Poll::Ready(false) => return (pieces, end(&mut stream)),
                Poll::Pending => self.worker.next_turn(),
            }
        }
    }

    fn drawn(&self) -> u64 {
        self.scheduler.counters.completion_tokens.load(Ordering::Relaxed)
    }
}

fn poll_text(stream: &mut Box<dyn LlmStream>) -> Poll<bool> {
    stream.poll_text(&mut Context::from_waker(noop_waker_ref()))
}

fn end(stream: &mut Box<dyn LlmStream>) -> Completion {
    let Poll::Ready(ended) = stream.poll_end(&mut Context::from_waker(noop_waker_ref())) else { panic!("no end") };
    Completion::clone(&ended.unwrap())
}

fn request(messages: Vec<Message>, sampling: Sampling) -> Arc<ChatRequest> {
    Arc::new(ChatRequest { messages, tools: vec![], sampling, agent_role: "agent".into(), endpoint: None })
}

fn ask(sampling: Sampling) -> Arc<ChatRequest> {
    request(vec![Message::text(Role::User, "a room")], sampling)
}

/// Draws letters and spaces only, 40 of them.
fn letters(bench: &Bench) -> Sampling {
    let tokenizer = &bench.scheduler.tokenizer;
    let is_text = |id: &u32| tokenizer.bytes(*id).iter().all(|byte| byte.is_ascii_alphabetic() || *byte == b' ');
    let others = (0..u32::try_from(tokenizer.vocabulary()).unwrap()).filter(|id| !is_text(id));
    let logit_bias = others.map(|token| TokenBias { token, bias: -100.0 }).collect();
    Sampling { max_tokens: 40, logit_bias, ..Sampling::default() }
}

fn ids(completion: &Completion) -> &TokenData {
    completion.tokens.as_ref().unwrap()
}

#[test]
fn pieces_come_before_the_end_and_make_up_the_whole() {
    for chunk_tokens in [1, 3, 8, 100] {
        let mut bench = Bench::new(chunk_tokens);
        let request = ask(letters(&bench));
        let whole = bench.chat(&request);
        assert_eq!(ids(&whole).completion_ids.len(), 40);
        let before = bench.drawn();
        let mut stream = bench.stream(&request);
        let mut pieces: Vec<String> = vec![];
        while let Poll::Pending | Poll::Ready(true) = poll_text(&mut stream) {
            match stream.take_text() {
                Some(piece) => {
                    pieces.push(piece);
                    // The call goes on: what it has drawn is counted when it ends.
                    assert_eq!((bench.worker.calls(), bench.drawn()), (1, before));
                    assert!(stream.poll_end(&mut Context::from_waker(noop_waker_ref())).is_pending());
                }
                None => bench.worker.next_turn(),
            }
        }
        // The last token comes with the end.
        assert_eq!(pieces.len(), 39 / chunk_tokens);
        assert_eq!(end(&mut stream), whole);
        assert!(whole.text.starts_with(&pieces.concat()));
        let tokenizer = &bench.scheduler.tokenizer;
        let of_tokens = ids(&whole).completion_ids.chunks(chunk_tokens).map(|ids| tokenizer.decode(ids));
        assert!(of_tokens.zip(&pieces).all(|(tokens, piece)| tokens == *piece), "{pieces:?}");
    }
}

#[test]
fn a_slow_reader_gets_the_same_pieces() {
    let mut bench = Bench::new(2);
    // Anything but the end may be drawn: bytes that are no text, too.
    let logit_bias = vec![TokenBias { token: bench.scheduler.tokenizer.ends()[0], bias: -100.0 }];
    let request = ask(Sampling { max_tokens: 60, logit_bias, ..Sampling::default() });
    let (pieces, whole) = bench.read(&request);
    assert!(pieces.len() > 3, "{whole:?}");
    let mut stream = bench.stream(&request);
    assert!(poll_text(&mut stream).is_pending());
    bench.worker.next_turn();
    while bench.worker.calls() > 0 {
        bench.worker.next_turn();
    }
    let mut late = vec![];
    while poll_text(&mut stream) == Poll::Ready(true) {
        late.push(stream.take_text().unwrap());
    }
    assert_eq!((late, end(&mut stream)), (pieces, whole));
}

#[test]
fn a_dropped_stream_frees_its_place_and_what_was_read_is_an_answer() {
    let mut bench = Bench::new(4);
    let mut drawn = (0..100).map(|seed| {
        let sampling = Sampling { max_tokens: 300, seed: Some(seed), ..Sampling::default() };
        (bench.chat(&ask(sampling.clone())), sampling)
    });
    // One that goes on for a while.
    let (whole, sampling) = drawn.find(|(whole, _)| ids(whole).completion_ids.len() > 40).unwrap();
    drop(drawn);
    let mut stream = bench.stream(&ask(sampling.clone()));
    let mut pieces = vec![];
    while pieces.len() < 2 {
        match poll_text(&mut stream) {
            Poll::Ready(true) => pieces.push(stream.take_text().unwrap()),
            Poll::Ready(false) => panic!("too short: {whole:?}"),
            Poll::Pending => bench.worker.next_turn(),
        }
    }
    let heard = stream.heard().unwrap();
    // What was drawn since then, read or not, changes nothing.
    while poll_text(&mut stream).is_pending() {
        bench.worker.next_turn();
    }
    assert_eq!(stream.heard().unwrap(), heard);
    assert_eq!((heard.finish_reason, &heard.text), (FinishReason::Cancelled, &pieces.concat()));
    let (part, all) = (ids(&heard), ids(&whole));
    let tokens = part.completion_ids.len();
    assert!((8..20).contains(&tokens), "{tokens}");
    assert_eq!(part.completion_ids, all.completion_ids[..tokens]);
    assert_eq!(part.log_probs, all.log_probs[..tokens]);
    assert_eq!((&part.prompt_ids, part.policy_version), (&all.prompt_ids, PolicyVersion(6)));
    assert_eq!((heard.usage.completion_tokens as usize, heard.not_trainable.clone()), (tokens, None));

    let before = bench.drawn();
    assert_eq!(bench.worker.calls(), 1);
    drop(stream);
    bench.worker.next_turn();
    assert_eq!((bench.worker.calls(), bench.drawn()), (0, before));

    // It comes back as the tokens that were drawn.
    let again = vec![
        Message::text(Role::User, "a room"),
        Message::text(Role::Assistant, pieces.concat()),
        Message::text(Role::User, "people"),
    ];
    let next = bench.chat(&request(again, sampling));
    assert!(ids(&next).prompt_ids.starts_with(&[all.prompt_ids.as_slice(), &part.completion_ids].concat()));
}

#[test]
fn a_stop_text_across_pieces_is_in_none_of_them() {
    let mut bench = Bench::new(1);
    let sampling = letters(&bench);
    let free = bench.chat(&ask(sampling.clone()));
    let tokens: Vec<String> =
        ids(&free).completion_ids.iter().map(|id| bench.scheduler.tokenizer.decode(&[*id])).collect();
    let mut tried = 0;
    for at in 5..30 {
        // The end of one token and the beginning of the next.
        let (first, second) = (&tokens[at], &tokens[at + 1]);
        let stop = format!("{}{}", &first[first.len() - 1..], &second[..1]);
        let (want, _) = free.text.split_once(&stop).unwrap();
        let (pieces, whole) = bench.read(&ask(Sampling { stop: vec![stop.clone()], ..sampling.clone() }));
        assert_eq!((whole.text.as_str(), whole.finish_reason), (want, FinishReason::Stop), "{stop:?}");
        assert!(want.starts_with(&pieces.concat()), "{stop:?}: {pieces:?} of {want:?}");
        tried += usize::from(pieces.len() > 2);
    }
    assert!(tried > 10, "{tried} of the stop texts had pieces before them: {tokens:?}");
}

#[test]
fn a_call_that_fails_says_why_at_the_end() {
    let bench = Bench::new(1);
    let mut stream = bench.stream(&ask(Sampling { top_p: 7.0, ..Sampling::default() }));
    assert_eq!(poll_text(&mut stream), Poll::Ready(false));
    let ended = stream.poll_end(&mut Context::from_waker(noop_waker_ref()));
    assert!(matches!(ended, Poll::Ready(Err(LlmError::InvalidRequest(text))) if text.contains("top_p")));
    assert_eq!(stream.heard(), None);
}
