//! Tools that ask servers and databases while their agent does something else: how long that takes is another matter in a
//! replay, and what comes out is the same.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fulgurite_core::dataset::DatasetItem;
use fulgurite_core::limits::Limits;
use fulgurite_core::outcome::OutcomeKind;
use fulgurite_core::seed::{Generator, Seed};
use fulgurite_core::span::SpanBody;
use fulgurite_grants::ToolCapabilities;
use fulgurite_runner::Plugins;
use fulgurite_runner::replay::Replayer;
use nasty_agent::program::Step;
use serde_json::json;

use crate::support::{Backend, Bench, Model, assert_identical, job, limits, plugins, program, sandbox, shown};

/// A server on this machine.
struct Server {
    port: u16,
    requests: Arc<AtomicUsize>,
}

impl Server {
    /// Answers sooner or later, or never.
    fn start(answers: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&requests);
        std::thread::spawn(move || {
            let mut unanswered = vec![];
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut head = String::new();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while reader.read_line(&mut head).unwrap() > 2 {}
                let number = count.fetch_add(1, Ordering::SeqCst);
                for _ in 0..number % 5 * 100 {
                    std::thread::yield_now();
                }
                let body = format!("visitor {number}");
                if answers {
                    let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                } else {
                    unanswered.push(stream);
                }
            }
        });
        Self { port, requests }
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    /// Requests when all that were on their way have come: it answers one after the other.
    fn settled(&self) -> usize {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        self.requests()
    }

    /// The nasty guests, and a tool that may ask this server and has a database.
    fn plugins(&self) -> Plugins {
        let origin = format!("http://127.0.0.1:{}", self.port);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("shop.db"), "").unwrap();
        let grants = json!({
            "http": [{"origin": origin, "allow_private": ["127.0.0.1"]}],
            "sqlite": {"shop": folder.path().join("shop.db")},
        });
        let grants = serde_json::from_value(grants).unwrap();
        let none = |_: &str| None;
        let granted = ToolCapabilities::open("tools.granted", &grants, &Limits::default(), &[], &none).unwrap();
        // The port stands in the manifest and in the code.
        let mut bytes = std::fs::read(crate::support::component("granted_tool")).unwrap();
        let old = b"http://127.0.0.1:47001";
        assert_eq!(old.len(), origin.len(), "ports that the system gives have five digits");
        while let Some(at) = bytes.windows(old.len()).position(|window| window == old) {
            bytes[at..at + old.len()].copy_from_slice(origin.as_bytes());
        }
        let file = folder.path().join("tool.wasm");
        std::fs::write(&file, bytes).unwrap();
        let granted = sandbox().load_granted_tool(&file, granted).unwrap();
        let mut plugins = plugins();
        plugins.tools.insert("granted".to_owned(), granted);
        plugins
    }
}

fn drawn(seed: Seed) -> Vec<Step> {
    const TOOLS: [&str; 4] = ["visit", "note", "note", "count"];
    let mut draw = Generator::new(seed);
    let length = 4 + draw.below(20);
    let step = |_| {
        let tool = TOOLS[draw.below(TOOLS.len())].to_owned();
        match draw.below(24) {
            0..=8 => Step::StartTool(tool),
            9..=11 => Step::FinishTool(draw.below(3)),
            12 => Step::Tool(tool),
            13 => Step::Ready(draw.below(3)),
            14 => Step::WaitAnyTool(2),
            15 => Step::DropTool(draw.below(3)),
            16..=18 => Step::Chat,
            19 => Step::Start,
            20 => Step::Finish(0),
            21 => Step::Clock,
            22 => Step::List,
            _ => Step::Message,
        }
    };
    (0..length).map(step).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tools_that_ask_while_the_agent_goes_on_are_replayed_in_the_recorded_order() {
    let (bench, server) = (Bench::new(), Server::start(true));
    let runner = bench.runner(server.plugins(), Limits { guest_cpu_ms_max: 5_000, ..limits() });
    let jobs = (0..300).map(|number| {
        let steps = drawn(Seed::new(number).child("granted"));
        job(&runner, &format!("granted-{number}"), number, &program(steps), &json!({}))
    });
    let results = bench.record(&runner, jobs.collect(), Model::Answers).await;
    let asked = server.settled();
    assert!(asked > 100, "{asked}");
    // The model is asked meanwhile: some answers come after events of the agent that began before them.
    let is_host_call =
        |body: &SpanBody| matches!(body, SpanBody::HostCall { interface, .. } if interface.contains("tool/"));
    let late = results
        .iter()
        .flat_map(|result| result.spans.windows(2))
        .filter(|pair| is_host_call(&pair[1].body) && matches!(pair[0].body, SpanBody::Llm(_)));
    assert!(late.count() > 20);
    let ids: Vec<_> = results.iter().map(|result| result.spec.id.clone()).collect();
    for live in [1, 64] {
        let different = bench.different(&ids, server.plugins(), live).await;
        assert!(different.is_empty(), "{} differ, {}", different.len(), shown(&different[0]));
    }
    assert_eq!(server.requests(), asked, "a replay asks nobody");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_never_ends_does_not_end_in_a_replay() {
    let (bench, server) = (Bench::new(), Server::start(false));
    let runner = bench.runner(server.plugins(), limits());
    // The agent goes on without it.
    let visit = || "visit".to_owned();
    let steps =
        vec![Step::StartTool(visit()), Step::Chat, Step::Ready(0), Step::DropTool(0), Step::Chat, Step::Message];
    let dropped = job(&runner, "dropped", 1, &program(steps), &json!({}));
    let result = bench.record(&runner, vec![dropped], Model::Answers).await.remove(0);
    assert_eq!(result.outcome.kind, OutcomeKind::Completed, "{result:?}");
    assert_identical(&bench.replay(&result.spec.id, server.plugins()).await);
    // Cancelled while the agent waits for it, after the tool has done other things.
    let waits = [
        vec![Step::Tool(visit())],
        vec![Step::StartTool("note".to_owned()), Step::StartTool(visit()), Step::Chat, Step::FinishTool(1)],
    ];
    for (number, steps) in waits.into_iter().enumerate() {
        let asked = server.requests();
        let job = job(&runner, &format!("waits-{number}"), 1, &program(steps), &json!({}));
        let id = job.spec.id.clone();
        let batch = runner.submit(vec![job], Arc::new(Backend::new(Model::Answers))).await.unwrap();
        while server.requests() == asked {
            tokio::task::yield_now().await;
        }
        batch.cancel();
        let result = batch.all().await.unwrap().remove(0);
        assert_eq!(result.outcome.kind, OutcomeKind::Cancelled);
        let asked = server.requests();
        let report = bench.replay(&id, server.plugins()).await;
        assert_identical(&report);
        assert_eq!((report.outcome, server.requests()), (result.outcome, asked));
    }
}

/// An agent that asks for something else is stopped where it does: nobody waits for what will never be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_call_than_the_recorded_one_is_found_and_not_made() {
    let (bench, server) = (Bench::new(), Server::start(true));
    let runner = bench.runner(server.plugins(), limits());
    let tool = |name: &str| Step::Tool(name.to_owned());
    let start = |name: &str| Step::StartTool(name.to_owned());
    let cases = [
        (vec![tool("note"), Step::Message], vec![tool("visit"), Step::Message]),
        (vec![tool("visit"), Step::Message], vec![tool("note"), Step::Message]),
        (vec![Step::Chat], vec![start("visit"), Step::FinishTool(0), Step::Chat]),
        (vec![start("visit"), Step::FinishTool(0)], vec![start("note"), start("visit"), Step::FinishTool(1)]),
        (vec![Step::Message], vec![Step::Message, tool("visit")]),
    ];
    for (number, (recorded, changed)) in cases.into_iter().enumerate() {
        let job = job(&runner, &format!("changed-{number}"), 1, &program(recorded), &json!({}));
        let result = bench.record(&runner, vec![job], Model::Answers).await.remove(0);
        let asked = server.requests();
        let mut recorded = bench.load(&result.spec.id);
        let item = DatasetItem::new(recorded.item.id.clone(), program(changed), json!({}), json!({}));
        recorded.item = Arc::new(item);
        let replayer = Replayer::new(server.plugins(), &bench.settings(&recorded), 1).unwrap();
        let replay = tokio::time::timeout(Duration::from_mins(1), replayer.replay(&recorded, None));
        let report = replay.await.unwrap_or_else(|_| panic!("case {number} waits for ever"));
        assert!(report.divergence.is_some(), "case {number}: {}", shown(&report));
        assert_eq!(server.requests(), asked, "case {number}");
    }
}
