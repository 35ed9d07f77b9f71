//! Whether JSON fits a JSON schema: the keywords that tools describe their arguments with (JSON Schema 2020-12, Validation,
//! sections 4 to 6, and the applicators of Core).
//!
//! Keywords that are not in the table here are not looked at, as the standard has it for annotations. A crate for all of the
//! standard would bring formats, remote references and some twenty dependencies for what no tool description uses.

use regex::RegexBuilder;
use serde_json::{Map, Value};

/// How deep a schema may nest. 64: the same as a reader of JSON would take twice over.
const DEPTH_MAX: usize = 64;
/// Schemas that one judgement may look at. 10,000: a tool's description has some ten, and references must not make it loop.
const STEPS_MAX: u32 = 10_000;
/// Bytes that a compiled `pattern` may take. 1 MiB: the schema is a guest's word.
const PATTERN_BYTES_MAX: usize = 1 << 20;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It fits.
    Fits,
    /// It does not; the text says where and why.
    Unfit(String),
    /// The schema itself cannot be used, which is nobody's fault who wrote the value.
    NoSchema,
}

/// Judges JSON text by a schema's JSON text.
pub(crate) fn judge(schema: &str, text: &str) -> Verdict {
    let Ok(schema) = serde_json::from_str::<Value>(schema) else { return Verdict::NoSchema };
    let value = match serde_json::from_str::<Value>(text) {
        Ok(value) => value,
        Err(error) => return Verdict::Unfit(format!("it is no JSON: {error}")),
    };
    let mut judge = Judge { root: &schema, steps: 0 };
    match judge.check(&schema, &value, "", 0) {
        Ok(()) => Verdict::Fits,
        Err(Stop::Unfit(problem)) => Verdict::Unfit(problem),
        Err(Stop::NoSchema) => Verdict::NoSchema,
    }
}

enum Stop {
    Unfit(String),
    NoSchema,
}

struct Judge<'a> {
    root: &'a Value,
    steps: u32,
}

fn unfit(path: &str, problem: &str) -> Result<(), Stop> {
    let place = if path.is_empty() { "it" } else { path };
    Err(Stop::Unfit(format!("{place} {problem}")))
}

impl<'a> Judge<'a> {
    fn check(&mut self, schema: &'a Value, value: &Value, path: &str, depth: usize) -> Result<(), Stop> {
        self.steps += 1;
        if depth > DEPTH_MAX || self.steps > STEPS_MAX {
            return Err(Stop::NoSchema);
        }
        let schema = match schema {
            Value::Bool(true) => return Ok(()),
            Value::Bool(false) => return unfit(path, "must not be there"),
            Value::Object(schema) => schema,
            _ => return Err(Stop::NoSchema),
        };
        if let Some(reference) = schema.get("$ref") {
            let pointer = reference.as_str().and_then(|text| text.strip_prefix('#')).ok_or(Stop::NoSchema)?;
            let target = self.root.pointer(pointer).ok_or(Stop::NoSchema)?;
            self.check(target, value, path, depth + 1)?;
        }
        check_type(schema, value, path)?;
        check_choice(schema, value, path)?;
        match value {
            Value::Number(_) => check_number(schema, value, path)?,
            Value::String(text) => check_text(schema, text, path)?,
            Value::Array(items) => self.check_items(schema, items, path, depth)?,
            Value::Object(fields) => self.check_fields(schema, fields, path, depth)?,
            Value::Null | Value::Bool(_) => {}
        }
        self.check_combinations(schema, value, path, depth)
    }

    fn check_items(
        &mut self,
        schema: &'a Map<String, Value>,
        items: &[Value],
        path: &str,
        depth: usize,
    ) -> Result<(), Stop> {
        check_count(schema, "minItems", "maxItems", items.len(), "items", path)?;
        if schema.get("uniqueItems") == Some(&Value::Bool(true)) {
            let repeated = items
                .iter()
                .enumerate()
                .any(|(place, item)| items.iter().take(place).any(|earlier| same(item, earlier)));
            if repeated {
                return unfit(path, "has the same item twice");
            }
        }
        let first = schema.get("prefixItems").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        for (place, item) in items.iter().enumerate() {
            if let Some(of_item) = first.get(place).or_else(|| schema.get("items")) {
                self.check(of_item, item, &format!("{path}[{place}]"), depth + 1)?;
            }
        }
        Ok(())
    }

    fn check_fields(
        &mut self,
        schema: &'a Map<String, Value>,
        fields: &Map<String, Value>,
        path: &str,
        depth: usize,
    ) -> Result<(), Stop> {
        check_count(schema, "minProperties", "maxProperties", fields.len(), "fields", path)?;
        let required = schema.get("required").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        if let Some(missing) = required.iter().filter_map(Value::as_str).find(|name| !fields.contains_key(*name)) {
            return unfit(path, &format!("lacks `{missing}`"));
        }
        let known = schema.get("properties").and_then(Value::as_object);
        for (name, field) in fields {
            let place = if path.is_empty() { format!("`{name}`") } else { format!("{path}.`{name}`") };
            match known.and_then(|known| known.get(name)) {
                Some(of_field) => self.check(of_field, field, &place, depth + 1)?,
                None => match schema.get("additionalProperties") {
                    Some(Value::Bool(false)) => return unfit(&place, "is no field that is known"),
                    Some(of_field) => self.check(of_field, field, &place, depth + 1)?,
                    None => {}
                },
            }
        }
        Ok(())
    }

    fn check_combinations(
        &mut self,
        schema: &'a Map<String, Value>,
        value: &Value,
        path: &str,
        depth: usize,
    ) -> Result<(), Stop> {
        let list = |keyword: &str| schema.get(keyword).and_then(Value::as_array);
        for part in list("allOf").into_iter().flatten() {
            self.check(part, value, path, depth + 1)?;
        }
        if let Some(any) = list("anyOf")
            && self.fitting(any, value, path, depth)? == 0
        {
            return unfit(path, "fits none of `anyOf`");
        }
        if let Some(one) = list("oneOf") {
            let fitting = self.fitting(one, value, path, depth)?;
            if fitting != 1 {
                return unfit(path, &format!("fits {fitting} of `oneOf` and must fit one"));
            }
        }
        match schema.get("not") {
            Some(not) if self.fitting(std::slice::from_ref(not), value, path, depth)? > 0 => {
                unfit(path, "fits what it must not")
            }
            _ => Ok(()),
        }
    }

    fn fitting(&mut self, parts: &'a [Value], value: &Value, path: &str, depth: usize) -> Result<usize, Stop> {
        let mut fitting = 0;
        for part in parts {
            match self.check(part, value, path, depth + 1) {
                Ok(()) => fitting += 1,
                Err(Stop::Unfit(_)) => {}
                Err(Stop::NoSchema) => return Err(Stop::NoSchema),
            }
        }
        Ok(fitting)
    }
}

fn check_type(schema: &Map<String, Value>, value: &Value, path: &str) -> Result<(), Stop> {
    let is = |name: &str| match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "number" => value.is_number(),
        // 1.0 is an integer to JSON Schema.
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        _ => false,
    };
    match schema.get("type") {
        Some(Value::String(name)) if !is(name) => unfit(path, &format!("is no {name}")),
        Some(Value::Array(names)) if !names.iter().filter_map(Value::as_str).any(is) => {
            let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
            unfit(path, &format!("is none of {}", names.join(", ")))
        }
        _ => Ok(()),
    }
}

fn check_choice(schema: &Map<String, Value>, value: &Value, path: &str) -> Result<(), Stop> {
    if let Some(choices) = schema.get("enum").and_then(Value::as_array)
        && !choices.iter().any(|choice| same(choice, value))
    {
        return unfit(path, "is none of the values that it may have");
    }
    match schema.get("const") {
        Some(only) if !same(only, value) => unfit(path, &format!("is not {only}")),
        _ => Ok(()),
    }
}

fn check_number(schema: &Map<String, Value>, value: &Value, path: &str) -> Result<(), Stop> {
    let Some(number) = value.as_f64() else { return Ok(()) };
    let bound = |keyword: &str| schema.get(keyword).and_then(Value::as_f64);
    let refused = [
        ("minimum", bound("minimum").is_some_and(|bound| number < bound)),
        ("maximum", bound("maximum").is_some_and(|bound| number > bound)),
        ("exclusiveMinimum", bound("exclusiveMinimum").is_some_and(|bound| number <= bound)),
        ("exclusiveMaximum", bound("exclusiveMaximum").is_some_and(|bound| number >= bound)),
        ("multipleOf", bound("multipleOf").is_some_and(|step| step > 0.0 && (number / step).fract() != 0.0)),
    ];
    match refused.iter().find(|(_, refused)| *refused) {
        Some((keyword, _)) => unfit(path, &format!("is {number}, which `{keyword}` forbids")),
        None => Ok(()),
    }
}

fn check_text(schema: &Map<String, Value>, text: &str, path: &str) -> Result<(), Stop> {
    check_count(schema, "minLength", "maxLength", text.chars().count(), "characters", path)?;
    let Some(pattern) = schema.get("pattern").and_then(Value::as_str) else { return Ok(()) };
    let pattern = RegexBuilder::new(pattern).size_limit(PATTERN_BYTES_MAX).build().map_err(|_| Stop::NoSchema)?;
    if pattern.is_match(text) { Ok(()) } else { unfit(path, "does not match its pattern") }
}

fn check_count(
    schema: &Map<String, Value>,
    least: &str,
    most: &str,
    count: usize,
    what: &str,
    path: &str,
) -> Result<(), Stop> {
    let count = count as u64;
    let bound = |keyword: &str| schema.get(keyword).and_then(Value::as_u64);
    if bound(least).is_some_and(|bound| count < bound) || bound(most).is_some_and(|bound| count > bound) {
        return unfit(path, &format!("has {count} {what}, too few or too many"));
    }
    Ok(())
}

/// Whether two values are the same to JSON Schema: 1 is 1.0, and fields have no order.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(name, a)| b.get(name).is_some_and(|b| same(a, b)))
        }
        (a, b) => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOKING: &str = r##"{
        "type": "object",
        "required": ["time", "people"],
        "additionalProperties": false,
        "properties": {
            "time": {"type": "string", "pattern": "^\\d\\d:\\d\\d$"},
            "people": {"type": "integer", "minimum": 1, "exclusiveMaximum": 100},
            "equipment": {"type": "array", "uniqueItems": true, "maxItems": 2, "items": {"$ref": "#/$defs/thing"}},
            "note": {"type": ["string", "null"], "maxLength": 4}
        },
        "$defs": {"thing": {"enum": ["whiteboard", "projector", 1]}}
    }"##;

    #[test]
    fn arguments_that_fit() {
        for text in [
            r#"{"time":"10:00","people":4}"#,
            r#"{"people":4.0,"time":"10:00","equipment":["projector",1.0],"note":null}"#,
        ] {
            assert_eq!(judge(BOOKING, text), Verdict::Fits, "{text}");
        }
    }

    #[test]
    fn arguments_that_do_not_fit_are_told_why() {
        for (text, why) in [
            ("{", "it is no JSON"),
            ("[]", "it is no object"),
            (r#"{"time":"10:00"}"#, "it lacks `people`"),
            (r#"{"time":"ten","people":4}"#, "`time` does not match"),
            (r#"{"time":10,"people":4}"#, "`time` is no string"),
            (r#"{"time":"10:00","people":0}"#, "`people` is 0"),
            (r#"{"time":"10:00","people":100}"#, "`people` is 100"),
            (r#"{"time":"10:00","people":1.5}"#, "`people` is no integer"),
            (r#"{"time":"10:00","people":1,"where":"here"}"#, "`where` is no field"),
            (r#"{"time":"10:00","people":1,"equipment":["desk"]}"#, "`equipment`[0] is none"),
            (r#"{"time":"10:00","people":1,"equipment":[1,1.0]}"#, "`equipment` has the same"),
            (r#"{"time":"10:00","people":1,"equipment":["whiteboard","projector",1]}"#, "`equipment` has 3 items"),
            (r#"{"time":"10:00","people":1,"note":"12345"}"#, "`note` has 5 characters"),
        ] {
            let Verdict::Unfit(found) = judge(BOOKING, text) else { panic!("{text}") };
            assert!(found.starts_with(why), "{text}: {found}");
        }
    }

    #[test]
    fn combinations() {
        let fits = |schema: &str, text: &str| judge(schema, text) == Verdict::Fits;
        let any = r#"{"anyOf":[{"type":"string"},{"type":"integer"}],"not":{"const":3}}"#;
        assert!(fits(any, "1") && fits(any, "\"a\"") && !fits(any, "3") && !fits(any, "1.5"));
        let one = r#"{"oneOf":[{"minimum":0},{"maximum":10}]}"#;
        assert!(fits(one, "11") && fits(one, "-1") && !fits(one, "5"));
        let all = r#"{"allOf":[{"minimum":0},{"multipleOf":2}]}"#;
        assert!(fits(all, "4") && !fits(all, "3") && !fits(all, "-2"));
        let pair = r#"{"prefixItems":[{"type":"string"}],"items":{"type":"integer"}}"#;
        assert!(fits(pair, r#"["a",1,2]"#) && !fits(pair, "[1]") && !fits(pair, r#"["a","b"]"#));
    }

    #[test]
    fn a_schema_that_cannot_be_used_is_nobodys_fault() {
        let loops = r##"{"$ref":"#"}"##;
        let wide = r##"{"anyOf":[{"$ref":"#"},{"$ref":"#"},{"$ref":"#"}]}"##;
        for schema in ["no JSON", "3", loops, wide, r#"{"$ref":"https://example.com"}"#, r#"{"pattern":"("}"#] {
            assert_eq!(judge(schema, "\"a\""), Verdict::NoSchema, "{schema}");
        }
    }
}
