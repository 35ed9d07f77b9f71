//! Changes to inputs.

use fulgurite_core::seed::Generator;

use crate::{Numbers, Target};

/// Numbers at borders.
const BORDERS: [u64; 18] = [
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    (1 << 53) - 1,
    1 << 53,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX,
];
/// Most changes of one input.
const CHANGES_MAX: usize = 4;

/// An input made of one that is known, by one to four changes; half of the time by one. The pools are equally likely.
pub(crate) fn mutate(target: &Target, pools: [&Vec<Vec<u8>>; 4], generator: &mut Generator) -> Vec<u8> {
    let mut input = pick(pools, generator).clone();
    let changes = if generator.below(2) == 0 { 1 } else { 1 + generator.below(CHANGES_MAX) };
    for _ in 0..changes {
        let other = pick(pools, generator);
        change(target, other, &mut input, generator);
    }
    input.truncate(target.input_bytes_max);
    input
}

/// An input of one of the pools, which may be empty.
fn pick<'a>(pools: [&'a Vec<Vec<u8>>; 4], generator: &mut Generator) -> &'a Vec<u8> {
    static NOTHING: Vec<u8> = vec![];
    let pool = pools[generator.below(pools.len())];
    pool.get(generator.below(pool.len())).unwrap_or(&NOTHING)
}

fn change(target: &Target, other: &[u8], input: &mut Vec<u8>, generator: &mut Generator) {
    let (start, end) = range(input, generator);
    let place = start.min(input.len().saturating_sub(1));
    match generator.below(12) {
        0 if !input.is_empty() => input[place] ^= 1 << generator.below(8),
        1 if !input.is_empty() => input[place] = u8::try_from(generator.below(256)).unwrap_or(0),
        2 => input.truncate(start),
        3 => {
            input.drain(start..end);
        }
        4 => {
            let copy = input[start..end].to_vec();
            let place = generator.below(input.len() + 1);
            input.splice(place..place, copy);
        }
        5 => {
            // The beginning of one and the end of another.
            let (_, from) = range(other, generator);
            input.truncate(start);
            input.extend(&other[from..]);
        }
        6 => {
            let (from, to) = range(other, generator);
            input.splice(start..start, other[from..to].iter().copied());
        }
        7 | 8 if !target.dictionary.is_empty() => {
            let word = target.dictionary[generator.below(target.dictionary.len())];
            let end = if generator.below(2) == 0 { start } else { end };
            input.splice(start..end, word.iter().copied());
        }
        9 => number(target.numbers, input, generator),
        10 => lines(input, generator),
        _ => {
            let byte = [0, 0xff, 0x7f, 0x80, b'0', b'\n'][generator.below(6)];
            input[start..end].fill(byte);
        }
    }
}

/// A part of an input, mostly a short one.
fn range(input: &[u8], generator: &mut Generator) -> (usize, usize) {
    let start = generator.below(input.len() + 1).min(input.len());
    let length = if generator.below(4) == 0 { generator.below(input.len() + 1) } else { 1 + generator.below(8) };
    (start, (start + length).min(input.len()))
}

/// Puts a number at a border in the place of one that is there.
fn number(numbers: Numbers, input: &mut Vec<u8>, generator: &mut Generator) {
    let border = BORDERS[generator.below(BORDERS.len())];
    match numbers {
        Numbers::Text => {
            let digits: Vec<usize> = (0..input.len())
                .filter(|place| input[*place].is_ascii_digit() && (*place == 0 || !input[*place - 1].is_ascii_digit()))
                .collect();
            if digits.is_empty() {
                return;
            }
            let start = digits[generator.below(digits.len())];
            let length = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            let sign = ["", "-", "0.", "1e"][generator.below(4)];
            input.splice(start..start + length, format!("{sign}{border}").into_bytes());
        }
        Numbers::Varint => {
            let start = generator.below(input.len() + 1).min(input.len());
            let length = input[start..].iter().take_while(|byte| **byte >= 0x80).count() + 1;
            let end = (start + length).min(input.len());
            input.splice(start..end, varint(border));
        }
    }
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = vec![];
    while number >= 0x80 {
        bytes.push(u8::try_from(number & 0x7f).unwrap_or(0) | 0x80);
        number >>= 7;
    }
    bytes.push(u8::try_from(number).unwrap_or(0));
    bytes
}

/// Doubles, removes or moves a line.
fn lines(input: &mut Vec<u8>, generator: &mut Generator) {
    let mut lines: Vec<Vec<u8>> = input.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    if lines.len() < 2 {
        return;
    }
    let (from, to) = (generator.below(lines.len()), generator.below(lines.len()));
    match generator.below(3) {
        0 => lines.insert(to, lines[from].clone()),
        1 => {
            lines.remove(from);
        }
        _ => lines.swap(from, to),
    }
    *input = lines.concat();
}

#[cfg(test)]
mod tests {
    use fulgurite_core::seed::Seed;

    use super::*;

    fn target(numbers: Numbers) -> Target {
        let run = |_: &[u8]| String::new();
        Target { name: "test", run, dictionary: &[b"word"], numbers, input_bytes_max: 64 }
    }

    #[test]
    fn inputs_follow_from_the_seed_and_are_bounded_and_many() {
        for numbers in [Numbers::Text, Numbers::Varint] {
            let target = target(numbers);
            let known = vec![b"a = 1\nb = 22\n".to_vec(), vec![], vec![0x80; 60]];
            let make = |seed| {
                let mut generator = Generator::new(Seed::new(seed));
                (0..5_000)
                    .map(|_| mutate(&target, [&known, &vec![], &known, &known], &mut generator))
                    .collect::<Vec<_>>()
            };
            let inputs = make(1);
            assert_eq!(inputs, make(1));
            assert!(inputs.iter().all(|input| input.len() <= 64));
            let different: std::collections::BTreeSet<_> = inputs.iter().collect();
            assert!(different.len() > 1_500, "{}", different.len());
            assert!(inputs.iter().any(|input| input.windows(4).any(|word| word == b"word")));
        }
    }

    #[test]
    fn varints_are_those_of_the_records() {
        assert_eq!(varint(300), [0xac, 2]);
        assert_eq!(varint(u64::MAX).len(), 10);
    }
}
