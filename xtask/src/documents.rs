//! Cheap checks of what is promised in prose: licences, links between documents, and where unsafe
//! code may be.

use std::fs;
use std::path::{Path, PathBuf};

/// Crates without a line of unsafe code, by the file that says so.
const FORBID_UNSAFE: [&str; 4] = [
    "crates/kvxfer/src/lib.rs",
    "crates/cli/src/main.rs",
    "crates/loom/src/lib.rs",
    "xtask/src/main.rs",
];

/// What a stranger must find in the README: the two commands that do everything.
const COMMANDS: [&str; 2] = ["cargo run --release --bin kvxfer -- bw", "cargo xtask test"];

/// All that is wrong, one line each.
pub(crate) fn problems(root: &Path) -> Vec<String> {
    let mut problems = Vec::new();
    for name in ["LICENSE-MIT", "LICENSE-APACHE", "README.md", "CHANGELOG.md"] {
        if fs::metadata(root.join(name)).map_or(0, |m| m.len()) == 0 {
            problems.push(format!("{name}: missing or empty"));
        }
    }
    for name in FORBID_UNSAFE {
        let text = fs::read_to_string(root.join(name)).unwrap_or_default();
        if !text.contains("#![forbid(unsafe_code)]") {
            problems.push(format!("{name}: no #![forbid(unsafe_code)]"));
        }
    }
    let readme = fs::read_to_string(root.join("README.md")).unwrap_or_default();
    for command in COMMANDS {
        if !readme.contains(command) {
            problems.push(format!("README.md: does not name `{command}`"));
        }
    }
    for page in pages(root) {
        let text = fs::read_to_string(&page).unwrap_or_default();
        let folder = page.parent().unwrap_or(root);
        for link in links(&text) {
            if !folder.join(link).exists() {
                let page = page.strip_prefix(root).unwrap_or(&page);
                problems.push(format!("{}: no {link}", page.display()));
            }
        }
    }
    problems
}

/// Our Markdown pages, in a fixed order.
fn pages(root: &Path) -> Vec<PathBuf> {
    let mut pages = vec![root.join("README.md"), root.join("CHANGELOG.md")];
    let mut folders = vec![root.join("docs"), root.join("kernels"), root.join("crates")];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "md") {
                pages.push(path);
            }
        }
    }
    pages.sort();
    pages
}

/// The relative links of a page, without their anchors. Code is no prose.
fn links(text: &str) -> Vec<&str> {
    let mut links = Vec::new();
    let mut code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            code = !code;
        }
        if code {
            continue;
        }
        let prose = line.split('`').step_by(2);
        for part in prose {
            for (at, _) in part.match_indices("](") {
                let rest = part.get(at + 2..).unwrap_or_default();
                let Some((link, _)) = rest.split_once(')') else {
                    continue;
                };
                let file = link.split('#').next().unwrap_or_default();
                if !file.is_empty() && !file.contains(':') {
                    links.push(file);
                }
            }
        }
    }
    links
}

#[cfg(test)]
mod tests {
    use super::links;

    #[test]
    fn only_relative_links_of_prose_are_looked_at() {
        let text = "see [a](docs/a.md#part), [b](https://x.org/b.md), [c](#here), `[d](d.md)`\n\
                    ```\n[e](e.md)\n```\n[f](../f.md) [broken](";
        assert_eq!(links(text), ["docs/a.md", "../f.md"]);
    }
}
