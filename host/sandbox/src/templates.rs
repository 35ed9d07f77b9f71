//! Prompt templates as a run pins them.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Renders a template. The sandbox does not know the language of templates.
pub trait TemplateRenderer: Send + Sync {
    /// Renders `text`, the template called `name`, with `variables`.
    ///
    /// # Errors
    /// A text for the guest: which variable is missing, or what else is wrong.
    fn render(
        &self,
        name: &str,
        text: &str,
        variables: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, String>;
}

/// Prompt templates of one version.
#[derive(Clone)]
pub struct Templates {
    version: u64,
    texts: BTreeMap<String, String>,
    renderer: Option<Arc<dyn TemplateRenderer>>,
}

impl std::fmt::Debug for Templates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Templates").field("version", &self.version).field("texts", &self.texts).finish_non_exhaustive()
    }
}

impl Templates {
    /// Templates by name, of one version.
    #[must_use]
    pub fn new(version: u64, texts: BTreeMap<String, String>, renderer: Arc<dyn TemplateRenderer>) -> Self {
        Self { version, texts, renderer: Some(renderer) }
    }

    /// No templates, for runs that use none.
    #[must_use]
    pub fn none() -> Self {
        Self { version: 0, texts: BTreeMap::new(), renderer: None }
    }

    /// The pinned version.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The template's text.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        self.texts.get(name).map(String::as_str)
    }

    /// Names of all templates, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.texts.keys().map(String::as_str)
    }

    /// All templates by name.
    #[must_use]
    pub fn texts(&self) -> &BTreeMap<String, String> {
        &self.texts
    }

    /// Renders a template; `None` when there is none of that name.
    pub(crate) fn render(
        &self,
        name: &str,
        variables: &serde_json::Map<String, serde_json::Value>,
    ) -> Option<Result<String, String>> {
        let text = self.texts.get(name)?;
        let renderer = self.renderer.as_ref()?;
        Some(renderer.render(name, text, variables))
    }
}
