//! As much of Markdown as our documents use: code blocks, code spans, links, headings.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A code block, fenced or indented by four.
pub(crate) struct Block {
    /// Line of the file at which its content begins.
    pub(crate) line: usize,
    /// What the fence says; empty for indented blocks, which hold commands.
    pub(crate) language: String,
    pub(crate) text: String,
}

impl Block {
    /// The commands of a shell block, each with the lines that belong to it.
    pub(crate) fn commands(&self) -> Vec<String> {
        let (mut commands, mut command) = (Vec::new(), String::new());
        for line in self.text.lines() {
            command += line;
            match command.strip_suffix('\\') {
                Some(begun) => command = begun.to_owned(),
                // A quote that is open: comments come with apostrophes.
                None if command.split(" #").next().unwrap().matches('\'').count() % 2 == 1 => {
                    command.push('\n');
                }
                None => commands.push(std::mem::take(&mut command)),
            }
        }
        assert!(command.is_empty(), "a command without an end: {command}");
        commands.retain(|command| !command.trim().is_empty());
        commands
    }
}

/// A document of the repository.
pub(crate) struct Document {
    /// Its path from the root.
    pub(crate) name: String,
    pub(crate) blocks: Vec<Block>,
    /// Everything outside of blocks.
    prose: String,
}

impl Document {
    fn read(name: &Path) -> Self {
        let text = fs::read_to_string(crate::root().join(name)).unwrap();
        let name = name.to_str().unwrap().to_owned();
        let (mut blocks, mut prose): (Vec<Block>, _) = (Vec::new(), String::new());
        let (mut fence, mut indented, mut blank) = (None, false, true);
        for (index, line) in text.lines().enumerate() {
            let (content, line_number) = (line.trim_start(), index + 1);
            let indent = line.len() - content.len();
            if let Some(by) = fence {
                if content == "```" {
                    fence = None;
                } else {
                    let block = &mut blocks.last_mut().unwrap().text;
                    *block += line.get(by..).unwrap_or_default();
                    block.push('\n');
                }
                continue;
            }
            if let Some(language) = content.strip_prefix("```") {
                fence = Some(indent);
                let language = language.to_owned();
                blocks.push(Block { line: line_number + 1, language, text: String::new() });
            } else if indent >= 4 && (indented || blank) {
                if !indented {
                    blocks.push(Block {
                        line: line_number,
                        language: String::new(),
                        text: String::new(),
                    });
                }
                indented = true;
                let block = &mut blocks.last_mut().unwrap().text;
                *block += &line[4..];
                block.push('\n');
                continue;
            } else {
                prose += line;
            }
            prose.push('\n');
            (indented, blank) = (false, content.is_empty());
        }
        assert!(fence.is_none(), "{name}: a fence without an end");
        Self { name, blocks, prose }
    }

    /// The prose in turns with the code spans in it, beginning with prose.
    fn pieces(&self) -> Vec<&str> {
        for paragraph in self.prose.split("\n\n") {
            let ticks = paragraph.matches('`').count();
            assert!(ticks.is_multiple_of(2), "{}: {paragraph}", self.name);
        }
        self.prose.split('`').collect()
    }

    /// The code spans, each on one line.
    pub(crate) fn spans(&self) -> Vec<String> {
        let spans = self.pieces().into_iter().skip(1).step_by(2);
        spans.map(|span| span.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }

    /// Where links lead to.
    pub(crate) fn links(&self) -> Vec<String> {
        let prose = self.pieces().into_iter().step_by(2).collect::<Vec<_>>().join("");
        let targets = prose.split("](").skip(1);
        targets.map(|target| target.split(')').next().unwrap().to_owned()).collect()
    }

    /// What links to a place in this document may name, by GitHub's rule.
    pub(crate) fn anchors(&self) -> BTreeSet<String> {
        let mut anchors = BTreeSet::new();
        for line in self.prose.lines() {
            let text = line.trim_start_matches('#');
            if text.len() < line.len() && text.starts_with(' ') {
                let kept = |c: &char| c.is_alphanumeric() || [' ', '-', '_'].contains(c);
                let text: String = text.trim().to_lowercase().chars().filter(kept).collect();
                let anchor = text.replace(' ', "-");
                let again = (1..).map(|n| format!("{anchor}-{n}"));
                let mut free = std::iter::once(anchor.clone()).chain(again);
                anchors.insert(free.find(|name| !anchors.contains(name)).unwrap());
            }
        }
        anchors
    }
}

/// Every document of the repository.
pub(crate) fn documents() -> Vec<Document> {
    let (mut folders, mut names) = (vec![PathBuf::new()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(crate::root().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let (name, path) = (entry.file_name(), folder.join(entry.file_name()));
            // What git ignores begins with a dot or is one of the others.
            let text = name.to_str().unwrap();
            let ours = !text.starts_with('.') && !["target", "vitq-data", "out"].contains(&text);
            if ours && entry.file_type().unwrap().is_dir() {
                folders.push(path);
            } else if ours && text.ends_with(".md") {
                names.push(path);
            }
        }
    }
    names.sort();
    names.iter().map(|name| Document::read(name)).collect()
}
