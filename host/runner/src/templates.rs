//! Renders prompt templates with minijinja, the language in which chat templates are written too.

use fulgurite_sandbox::TemplateRenderer;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior};

/// The renderer. A variable that the template names and nobody gives is an error.
#[derive(Debug, Clone, Copy, Default)]
pub struct JinjaRenderer;

impl TemplateRenderer for JinjaRenderer {
    fn render(
        &self,
        name: &str,
        text: &str,
        variables: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, String> {
        let mut environment = Environment::empty();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let rendered = environment.render_named_str(name, text, Serde(variables));
        rendered.map_err(|error| format!("template `{name}`: {error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_and_names_what_is_missing() {
        let given = serde_json::json!({"people": 4});
        let render = |text: &str| JinjaRenderer.render("greeting", text, given.as_object().unwrap());
        assert_eq!(render("for {{ people }}").unwrap(), "for 4");
        assert!(render("at {{ time }}").unwrap_err().contains("greeting"));
        assert!(render("{{").unwrap_err().contains("greeting"));
    }
}
