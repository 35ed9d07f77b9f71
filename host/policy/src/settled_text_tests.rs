use fulgurite_core::seed::{Generator, Seed};

use super::*;
use crate::tokenizer::TokenizerConfig;

fn tokenizer() -> PolicyTokenizer {
    let texts = ["a room for people", "a room"].map(String::from);
    PolicyTokenizer::train(texts.into_iter(), &TokenizerConfig::default()).unwrap()
}

fn ids(tokenizer: &PolicyTokenizer, bytes: &[&[u8]]) -> Vec<u32> {
    let all = 0..u32::try_from(tokenizer.vocabulary()).unwrap();
    let of = |wanted: &&[u8]| all.clone().find(|id| tokenizer.bytes(*id) == *wanted).unwrap();
    bytes.iter().map(of).collect()
}

#[test]
fn characters_are_handed_out_whole() {
    let tokenizer = tokenizer();
    let mut text = SettledText::new(tokenizer.clone(), vec![]);
    let mut taken = vec![];
    // An accent in two tokens, a byte that nothing can follow, a character that is broken off by a letter.
    for id in ids(&tokenizer, &[b"a", b"\xc3", b"\xa9", b"\xff", b"\xe6", b"\xbc", b"b"]) {
        text.push(id);
        taken.push(text.take().unwrap_or_default());
    }
    assert_eq!(taken, ["a", "", "\u{e9}", "\u{fffd}", "", "", "\u{fffd}b"]);
}

#[test]
fn what_may_be_a_stop_text_is_held_back() {
    let tokenizer = tokenizer();
    let stops = vec!["aab".to_owned(), "or".to_owned()];
    let mut text = SettledText::new(tokenizer.clone(), stops);
    let mut taken = vec![];
    for id in ids(&tokenizer, &[b"o", b"f", b"a", b"a", b"a", b"c", b"a", b"a", b"b"]) {
        text.push(id);
        taken.push(text.take().unwrap_or_default());
    }
    // Behind `aab` nothing is handed out: the completion has ended before it.
    assert_eq!(taken, ["", "of", "", "", "a", "aac", "", "", ""]);
}

/// Random tokens with everything in them: bytes that are no text, control tokens, calls, stop texts.
#[test]
fn what_was_handed_out_is_a_beginning_of_what_the_ended_completion_says() {
    let tokenizer = tokenizer();
    let mut generator = Generator::new(Seed::new(3));
    let open = (0..10).find(|id| tokenizer.opens_call(*id)).unwrap();
    let call = [&[open][..], &tokenizer.encode(r#"{"name":"f","arguments":{}}"#).unwrap(), &[open + 1]].concat();
    let (mut handed_out, mut all, mut calls_found, mut stopped) = (0, 0, 0, 0);
    for round in 0..3_000 {
        let stops: Vec<String> =
            ["oo", "a ro", "\u{e9}", " "].map(String::from).into_iter().filter(|_| generator.below(4) == 0).collect();
        let mut drawn: Vec<u32> = vec![];
        for _ in 0..=generator.below(20) {
            match generator.below(12) {
                0 => drawn.extend(&call),
                1 => drawn.extend(ids(&tokenizer, &[b"\xc3", b"\xa9"])),
                2..7 => {
                    drawn.extend(tokenizer.encode(["a room", "r", "o", " ", "ro"][generator.below(5)]).unwrap().iter());
                }
                _ => drawn.push(1 + u32::try_from(generator.below(tokenizer.vocabulary() - 1)).unwrap()),
            }
        }
        // As a call ends: with the token that completes a stop text.
        let ends = (1..=drawn.len()).find_map(|tokens| {
            let bytes = tokenizer.decode_bytes(&drawn[..tokens]);
            let found = |stop: &String| bytes.windows(stop.len()).position(|window| window == stop.as_bytes());
            Some((tokens, stops.iter().filter_map(found).min()?, bytes))
        });
        let (before_end, whole) = if let Some((tokens, at, bytes)) = &ends {
            (tokens - 1, String::from_utf8_lossy(&bytes[..*at]).into_owned())
        } else {
            let (whole, calls) = tokenizer.parse_completion(&drawn, 0);
            calls_found += calls.len();
            (drawn.len() - 1, whole)
        };
        stopped += usize::from(ends.is_some());
        let mut text = SettledText::new(tokenizer.clone(), stops.clone());
        let mut taken = String::new();
        for (at, id) in drawn[..before_end].iter().enumerate() {
            text.push(*id);
            if at % (1 + round % 3) == 0 {
                taken.extend(text.take());
            }
        }
        assert!(whole.starts_with(&taken), "{round}: {taken:?} of {whole:?}, stops {stops:?}, {drawn:?}");
        handed_out += taken.len();
        all += whole.len();
    }
    assert!(handed_out * 3 > all && calls_found > 100 && stopped > 300, "{handed_out} {all} {calls_found} {stopped}");
}
