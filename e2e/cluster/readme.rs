//! The README as a test reads it: its own commands and manifests, never a copy.

const README: &str = include_str!("../../README.md");

/// The part below one heading, up to the next of the same level.
pub(crate) struct Section {
    heading: &'static str,
    text: &'static str,
}

impl Section {
    /// The section `## heading`.
    pub(crate) fn of(heading: &'static str) -> Self {
        let start =
            README.find(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("the README has no {heading:?}"));
        let text = &README[start + 1..];
        Self { heading, text: text[3..].find("\n## ").map_or(text, |end| &text[..end + 3]) }
    }

    /// Its fenced blocks of a language, in order.
    pub(crate) fn all(&self, language: &str) -> Vec<String> {
        let fence = format!("```{language}\n");
        let parts = self.text.split(fence.as_str()).skip(1);
        parts.map(|part| part.split("```").next().unwrap_or_default().to_owned()).collect()
    }

    /// The only one.
    pub(crate) fn only(&self, language: &str) -> String {
        let mut all = self.all(language);
        assert_eq!(all.len(), 1, "{} of the README has {} blocks of {language}", self.heading, all.len());
        all.remove(0)
    }
}
