//! Exact arithmetic: fractions of 64-bit numbers, by recursive descent.

use std::fmt;
use std::iter::Peekable;
use std::str::Chars;

/// Parentheses and signs inside of each other. 32: far below what the stack of a guest bears.
const DEPTH_MAX: u32 = 32;

/// A fraction in lowest terms, with a positive denominator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fraction {
    numerator: i64,
    denominator: i64,
}

impl fmt::Display for Fraction {
    /// `19` or `7/2`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.numerator)?;
        if self.denominator == 1 { Ok(()) } else { write!(f, "/{}", self.denominator) }
    }
}

/// Why an expression has no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Problem {
    /// Something else stands there, or nothing.
    Expected(&'static str),
    /// A number beyond 64 bits.
    TooLarge,
    DivisionByZero,
    TooDeep,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expected(what) => write!(f, "expected {what}"),
            Self::TooLarge => f.write_str("a number does not fit into 64 bits"),
            Self::DivisionByZero => f.write_str("division by zero"),
            Self::TooDeep => write!(f, "more than {DEPTH_MAX} parentheses or signs inside of each other"),
        }
    }
}

/// The value of an expression.
pub(crate) fn evaluate(text: &str) -> Result<Fraction, Problem> {
    let mut parser = Parser { rest: text.chars().peekable(), depth: 0 };
    let value = parser.sum()?;
    match parser.next() {
        None => Ok(value),
        Some(_) => Err(Problem::Expected("an operator or the end")),
    }
}

struct Parser<'a> {
    rest: Peekable<Chars<'a>>,
    depth: u32,
}

impl Parser<'_> {
    /// The next character that is no blank, left in place.
    fn next(&mut self) -> Option<char> {
        while self.rest.next_if(char::is_ascii_whitespace).is_some() {}
        self.rest.peek().copied()
    }

    fn sum(&mut self) -> Result<Fraction, Problem> {
        let mut value = self.product()?;
        while let Some(operator) = self.next().filter(|c| matches!(c, '+' | '-')) {
            self.rest.next();
            let other = self.product()?;
            value = if operator == '+' { value.add(other)? } else { value.add(other.negated()?)? };
        }
        Ok(value)
    }

    fn product(&mut self) -> Result<Fraction, Problem> {
        let mut value = self.atom()?;
        while let Some(operator) = self.next().filter(|c| matches!(c, '*' | '/')) {
            self.rest.next();
            let other = self.atom()?;
            value = if operator == '*' { value.multiply(other)? } else { value.multiply(other.inverse()?)? };
        }
        Ok(value)
    }

    fn atom(&mut self) -> Result<Fraction, Problem> {
        match self.next() {
            Some('(') => {
                self.rest.next();
                let value = self.deeper(Self::sum)?;
                if self.next() == Some(')') {
                    self.rest.next();
                    Ok(value)
                } else {
                    Err(Problem::Expected("`)`"))
                }
            }
            Some('-') => {
                self.rest.next();
                self.deeper(Self::atom)?.negated()
            }
            Some(digit) if digit.is_ascii_digit() => self.number(),
            _ => Err(Problem::Expected("a number, `-` or `(`")),
        }
    }

    fn deeper(&mut self, parse: fn(&mut Self) -> Result<Fraction, Problem>) -> Result<Fraction, Problem> {
        if self.depth == DEPTH_MAX {
            return Err(Problem::TooDeep);
        }
        self.depth += 1;
        let value = parse(self);
        self.depth -= 1;
        value
    }

    fn number(&mut self) -> Result<Fraction, Problem> {
        let mut value = 0_i64;
        while let Some(digit) = self.rest.next_if(char::is_ascii_digit).and_then(|c| c.to_digit(10)) {
            value = value.checked_mul(10).and_then(|v| v.checked_add(digit.into())).ok_or(Problem::TooLarge)?;
        }
        Ok(Fraction { numerator: value, denominator: 1 })
    }
}

impl Fraction {
    /// In lowest terms, when both parts fit.
    fn new(numerator: i128, denominator: i128) -> Result<Self, Problem> {
        let divisor = greatest_common_divisor(numerator, denominator) * denominator.signum();
        if divisor == 0 {
            return Err(Problem::DivisionByZero);
        }
        let part = |value: i128| i64::try_from(value / divisor).map_err(|_| Problem::TooLarge);
        Ok(Self { numerator: part(numerator)?, denominator: part(denominator)? })
    }

    fn add(self, other: Self) -> Result<Self, Problem> {
        let cross = |a: Self, b: Self| i128::from(a.numerator) * i128::from(b.denominator);
        // Each product is below 2^126, so their sum fits.
        Self::new(cross(self, other) + cross(other, self), i128::from(self.denominator) * i128::from(other.denominator))
    }

    fn multiply(self, other: Self) -> Result<Self, Problem> {
        let times = |a: i64, b: i64| i128::from(a) * i128::from(b);
        Self::new(times(self.numerator, other.numerator), times(self.denominator, other.denominator))
    }

    fn negated(self) -> Result<Self, Problem> {
        Self::new(-i128::from(self.numerator), self.denominator.into())
    }

    fn inverse(self) -> Result<Self, Problem> {
        Self::new(self.denominator.into(), self.numerator.into())
    }
}

/// Not negative; 0 only of two zeros.
fn greatest_common_divisor(mut a: i128, mut b: i128) -> i128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a.abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> String {
        evaluate(text).map_or_else(|problem| format!("? {problem}"), |value| value.to_string())
    }

    #[test]
    fn products_bind_tighter_and_equals_go_from_the_left() {
        for (text, expected) in [
            ("12+7", "19"),
            (" 12 + 7*2 ", "26"),
            ("(12+7)*2", "38"),
            ("20-5-3", "12"),
            ("24/4/2", "3"),
            ("7/2", "7/2"),
            ("7/2*2", "7"),
            ("-3*-(2+1)", "9"),
            ("2-7", "-5"),
            ("6/-4", "-3/2"),
        ] {
            assert_eq!(value(text), expected, "{text}");
        }
    }

    #[test]
    fn what_has_no_value_says_why() {
        for (text, expected) in [
            ("", "? expected a number, `-` or `(`"),
            ("12+", "? expected a number, `-` or `(`"),
            ("(12", "? expected `)`"),
            ("12 7", "? expected an operator or the end"),
            ("1/0", "? division by zero"),
            ("1/(3-3)", "? division by zero"),
            ("9223372036854775808", "? a number does not fit into 64 bits"),
            ("9223372036854775807+1", "? a number does not fit into 64 bits"),
            ("٣", "? expected a number, `-` or `(`"),
        ] {
            assert_eq!(value(text), expected, "{text}");
        }
    }

    #[test]
    fn depth_is_bounded() {
        let nested = |depth| format!("{}1{}", "(".repeat(depth), ")".repeat(depth));
        assert_eq!(value(&nested(32)), "1");
        assert!(value(&nested(33)).contains("inside of each other"));
        assert!(value(&"-".repeat(1_000_000)).contains("inside of each other"));
    }
}
