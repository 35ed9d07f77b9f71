//! A calculator: `calculate(expression)` with whole numbers, `+ - * /` and parentheses, computed exactly.

mod expression;

use fulgurite_sdk::tool::{Arguments, InvalidWorld, Tool, ToolError};
use fulgurite_sdk::{ToolSpec, Value, json};
use serde::Deserialize;
use serde::de::IgnoredAny;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Calculate {
    expression: String,
}

struct Calculator;

impl Tool for Calculator {
    type World = IgnoredAny;

    fn open(_: IgnoredAny, _: u64) -> Result<Self, InvalidWorld> {
        Ok(Self)
    }

    fn list(&self) -> Vec<ToolSpec> {
        vec![ToolSpec::new(
            "calculate",
            "Computes an expression of whole numbers with + - * / and parentheses.",
            &json!({
                "type": "object",
                "properties": {"expression": {"type": "string", "description": "For example (12+7)/2."}},
                "required": ["expression"],
                "additionalProperties": false,
            }),
        )]
    }

    fn call(&mut self, name: &str, arguments: &Arguments) -> Result<Value, ToolError> {
        if name != "calculate" {
            return Err(ToolError::UnknownTool(name.to_owned()));
        }
        let Calculate { expression } = arguments.parse()?;
        let value = expression::evaluate(&expression)
            .map_err(|problem| ToolError::InvalidArguments(format!("expression: {problem}")))?;
        Ok(Value::String(value.to_string()))
    }
}

fulgurite_sdk::tool!(Calculator);

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(arguments: &str) -> Result<Value, ToolError> {
        Calculator.call("calculate", &Arguments::new(arguments))
    }

    #[test]
    fn results_are_text() {
        assert_eq!(ask(r#"{"expression":"12+7"}"#).unwrap(), "19");
        assert_eq!(ask(r#"{"expression":"7/2"}"#).unwrap(), "7/2");
    }

    #[test]
    fn what_a_model_may_get_wrong_is_an_invalid_argument() {
        for bad in ["", "null", "{}", r#"{"expression":12}"#, r#"{"expression":"12+"}"#, r#"{"expression":"1/0"}"#] {
            assert!(matches!(ask(bad), Err(ToolError::InvalidArguments(_))), "{bad}");
        }
        let unknown = Calculator.call("solve", &Arguments::new("{}"));
        assert_eq!(unknown, Err(ToolError::UnknownTool("solve".to_owned())));
    }
}
